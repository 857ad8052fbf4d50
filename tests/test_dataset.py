"""Data sets in shards: `sample.py --text_file TEXT --out FOLDER`."""
import errno
import json
import os
import re
import sys
from functools import partial
from textwrap import dedent
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import sample
from plumbing.errors import BadInput
from plumbing.files import locked
from plumbing.flags import keep_settings
from speech import dataset
from speech.sound import log_mel
from test_roundtrip import ROOT
from text.error_rates import error_rates

LINES = ["en\tThe dog sleeps, the cat sleeps, the children play football.", "xx\tNo.", "en\t...",
         "", "fr\tLe chien dort.", "en\tThe red car.", "zh\t老师在教室里吃饺子。",
         "en\tThe dog sleeps.", "de\tDie Sonne scheint.", "en\t" + "a" * 300]  # it is cut


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(dataset, "TEXTS_A_SHARD", 3)


@pytest.fixture
def make(runs, tmp_path):
    (tmp_path / "text.tsv").write_text("\n".join(LINES), "utf-8")

    def call(folder: str, *flags: str, latent: str = "features") -> dict[str, bytes]:
        sample.main(["--text_file", str(tmp_path / "text.tsv"), "--ckpt", str(runs[0] / latent),
                     "--out", str(tmp_path / folder), *flags])
        return {str(file.relative_to(tmp_path / folder)): file.read_bytes()
                for file in (tmp_path / folder).rglob("[!.]*") if file.is_file()}
    return call


def rows_of(files: dict[str, bytes], name: str = "manifest.jsonl") -> list[dict]:
    return [json.loads(line) for line in files[name].decode().splitlines()]


def read_set(*how):
    """As docs/usage.md reads a set."""
    usage, names = (ROOT / "docs" / "usage.md").read_text("utf-8"), {}
    exec(dedent(re.search(r"^    import json, numpy.*?^(?=\S)", usage, re.M | re.S)[0]), names)
    return names["read"](*how)


def test_every_text_is_in_the_set_or_named(make, tmp_path, capsys, pocket):
    files = make("a")
    rows, rest = rows_of(files), rows_of(files, "left_out.jsonl")
    assert [r["id"][7:] for r in rows] == [*"034567", "8-0", "8-1"]
    assert [r["text"] for r in rows[1:6]] == [line.split("\t")[1] for line in LINES[4:9]]
    assert rows[6]["text"] + rows[7]["text"] == "a" * 300
    assert [(r["id"][7:], r["why"][:8]) for r in rest] == [("1", "pocket d"), ("2", "there is")]
    out = capsys.readouterr().out
    assert "fr: 1 written\n" in out and "1 left out, the first 00000001, 'xx'" in out
    assert [row for row, _ in read_set(tmp_path / "a")] == rows
    for row, x in read_set(tmp_path / "a"):
        assert x.dtype == np.float16 and x.shape == (row["frames"], 128)
        features = pocket.silence.clone()
        features[: len(x)] = torch.from_numpy(x)
        read = pocket.transcribe(features[None], [row["language"]])[0]
        assert read.text == row["hypothesis"] and row["seconds"] == row["frames"] / 50


def test_parts_and_runs_that_were_killed_make_the_same_bytes(make, tmp_path, monkeypatch, capsys):
    whole = make("a", "--best_of", "2")
    for part in ("2/2", "1/2"):
        parts = make("b", "--best_of", "2", "--part", part)
    assert parts == whole
    out = capsys.readouterr().out
    assert re.search(r"part 2/2 is done; 2 of 3 shards are missing", out) and "wrote" in out
    (tmp_path / "b" / "shard-00001.npz").write_bytes(b"half")
    make("b", "--best_of", "2", "--part", "1/2")
    assert "part 1/2 is done; 1 of 3 shards are missing" in capsys.readouterr().out
    write, written = dataset.atomic_write, []

    def dying(file):
        written.append(file)
        if len(written) % 3 == 0:
            file.with_name(f"{file.name}.0123456789ab.tmp").write_text("half")
            raise KeyboardInterrupt
        return write(file)
    monkeypatch.setattr(dataset, "atomic_write", dying)
    for _ in range(20):
        try:
            killed = make("c", "--best_of", "2")
            break
        except KeyboardInterrupt:
            pass
    assert len(written) > 9 and killed == whole


def test_the_best_seed_is_kept_and_bad_ones_are_left_out(make):
    one, many = (rows_of(make(str(n), "--best_of", str(n))) for n in (1, 4))
    seeds, others = ({row["seed"] for row in rows} for rows in (
        many, rows_of(make("other", "--best_of", "4", "--seed", "1"))))
    assert len(seeds) > 1 and not seeds & others and {row["seed"] for row in one} == {0}
    for a, b in zip(one, many):
        assert (-b["cer"], b["avg_logprob"]) >= (-a["cer"], a["avg_logprob"])
    limit = sorted(row["cer"] for row in one)[2]
    files = make("few", "--max_cer", str(limit))
    assert rows_of(files) and all(row["cer"] <= limit for row in rows_of(files))
    assert len(rows_of(files)) + len(rows_of(files, "left_out.jsonl")) == len(one) + 2


def test_spectrograms_and_sounds(make, tmp_path, pocket, monkeypatch):
    monkeypatch.setattr(dataset, "griffin_lim", partial(dataset.griffin_lim, rounds=8))
    files = make("a", "--write", "mel", "wav", "--write", "flac", "features", latent="mel")
    for row, mel in read_set(tmp_path / "a", "mel", 2):
        assert [key for key in row if key in ("wav", "flac")] == ["wav", "flac"]
        shard, n = np.load(tmp_path / "a" / row["shard"]), row["frames"]
        assert mel.shape == (2 * n, 80) and mel.std() > 0.05
        assert shard["features"].shape == (shard["frames"].sum(), 128)
        wav, flac = (soundfile.read(tmp_path / "a" / row[kind])[0] for kind in ("wav", "flac"))
        assert len(wav) == 320 * n and np.abs(wav - flac).max() < 1e-3 < wav.std()
        heard = pocket.features_of_mel(log_mel(wav.astype(np.float32), pocket))
        read = pocket.transcribe(heard, [row["language"]])[0].text
        assert abs(error_rates([(row["language"], row["text"])], [read]).cer - row["cer_sound"]
                   ) < 0.1
    for kind in ("wav", "flac"):
        (tmp_path / "a" / row[kind]).unlink()
        assert make("a", "--write", "mel", "wav", "flac", "features", latent="mel") == files
    with monkeypatch.context() as patch:  # what is whole is not made again
        patch.delattr(dataset, "make_shard")
        assert make("a", "--write", "mel", "wav", "flac", "features", latent="mel") == files
    files = make("b", "--write", "wav", latent="mel")  # without arrays only the rows count
    rows = tmp_path / "b" / "shard-00001.jsonl"
    rows.write_bytes(rows.read_bytes()[: rows.read_bytes().index(b"\n") + 1])
    assert make("b", "--write", "wav", latent="mel") == files
    for flags in ("--write wav mel", "--write wav --rooms .5"):
        with pytest.raises(BadInput, match="was begun with --(write|rooms) .*, not with --"):
            make("b", *flags.split(), latent="mel")
    with pytest.raises(BadInput, match="it needs --text_file, no --wav"):
        make("a", "--wav", str(tmp_path / "a.wav"), latent="mel")


def test_sounds_that_are_read_worse_than_their_spectrograms_are_left_out(make, monkeypatch):
    limit = str(min(row["cer"] for row in rows_of(make("a", "--write", "mel", latent="mel"))))
    monkeypatch.setattr(dataset, "griffin_lim", lambda mel: torch.zeros(160 * mel.shape[1]))
    assert rows_of(make("b", "--write", "mel", "--max_cer", limit, latent="mel"))
    with pytest.raises(BadInput, match=f"nothing of the set (.|\n)*over --max_cer {limit}"):
        make("c", "--write", "wav", "--max_cer", limit, latent="mel")


def test_texts_of_another_script_are_noted(make, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("老师在教室里。\nYes.\n", "utf-8")
    for flags in ([], ["--language", "zh"]):
        make(f"a{len(flags)}", "--text_file", str(tmp_path / "t.txt"), *flags)
        note = "1 texts such as '老师在教室里。' are read as English"
        assert (note in capsys.readouterr().err) == (not flags)
    args = SimpleNamespace(text_file=[str(tmp_path / "text.tsv")], language=None, ckpt="ckpt.pt")
    notes = dataset.survey(args, {"fr", "zh", "es"})[2]  # before the work
    assert notes == [f"ckpt.pt was not trained in {code!r}" for code in ("fr", "zh")]
    args.language = "es"
    assert "ckpt.pt was not trained in 'es'" in dataset.survey(args, {"fr", "es"})[2]
    (tmp_path / "quoted.tsv").write_text('"fr"\t"Le chien dort."\n')
    args.text_file, args.language = [str(tmp_path / "quoted.tsv")], None
    assert dataset.survey(args, {"fr", "zh"})[2] == ["ckpt.pt was not trained in 'fr'"]
    args.language = "en"
    assert dataset.survey(args, set())[2] == [
        "1 lines name a language; one begins with 'fr'. The text is read in the last column, as "
        "'en'"]
    make("table", "--language", "en")
    assert "3 lines name a language; one begins with" in capsys.readouterr().err  # fr, zh, de


def test_flags_of_a_set_that_cannot_be_used(make):
    make("a", "--part", "3/9")
    for flags, words in (
            ("--part 9/8", "--part '9/8' cannot be used; 2/8 is the second"),
            ("--best_of 0", "--best_of 0 cannot be used; 1 to 100"),
            ("--seed 3", "with --seed 0, not with --seed 3"),
            ("--seed 1000", "--seed 1000 cannot be used for a set, as --best_of tries 1000 more"),
            ("--max_cer 5", "--max_cer 5.0 cannot be used; 0 to 1, 0.05 is 5 %"),
            ("--language french", "with no --language, not with --language fr;"),
            ("--language klingon", "klingon"), ("--write mel", "have no sound"),
            ("--wav x", "have no sound"), ("--steps 2", "with --steps 4, not with --steps 2"),
            ("--best_of 2", "with --best_of 1, not"), ("--max_cer .5", "with no --max_cer, not"),
            ("--speed 2", "with --speed 1.0, not"),
            ("--write mp3", "invalid choice: 'mp3'")):
        with pytest.raises(BadInput) as error:
            make("a", *flags.split())
        assert words in str(error.value)


@pytest.mark.parametrize("change", [lambda text: text + "\nen\tThe car.", lambda text: text[:9],
                                    lambda text: text.replace("red", "big")])
def test_a_text_that_changes_meanwhile_is_told(make, tmp_path, monkeypatch, change):
    check_settings = dataset.check_settings

    def between_both_readings(*args):
        (tmp_path / "text.tsv").write_text(change("\n".join(LINES)), "utf-8")
        check_settings(*args)
    monkeypatch.setattr(dataset, "check_settings", between_both_readings)
    with pytest.raises(BadInput, match="the texts have changed since the start"):
        make("a")
    assert not (tmp_path / "a" / "manifest.jsonl").exists()
    monkeypatch.setattr(dataset, "check_settings", check_settings)
    (tmp_path / "text.tsv").write_text("\n".join(LINES), "utf-8")  # nothing of the other is kept
    assert make("a") == make("b")


def test_reasons_without_number(make, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "MAX_REASONS", 1)
    make("a")
    out = capsys.readouterr().out
    assert "1 left out, the first 00000001, 'xx'" in out
    assert "1 left out, the first 00000002, '?': other reasons" in out


def test_sounds_that_need_a_package(make, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(BadInput, match="--write flac needs soundfile .*; `pip install soundfile`"):
        make("a", "--write", "flac", latent="mel")


def fail(error: Exception):
    raise error


def test_two_parts_that_end_together(make, tmp_path, capsys, monkeypatch):
    make("a", "--part", "1/2")
    (tmp_path / "a/shard-00000.npz").unlink()
    half = tmp_path / "a/shard-00000.npz.0123456789ab.tmp"
    half.write_text("of another run, which just writes the same shard")
    make("a", "--part", "1/3")
    assert half.exists()  # until all shards are whole
    with locked(tmp_path / "a"):  # the other one merges
        assert "manifest.jsonl" not in make("a", "--part", "2/2")
    with monkeypatch.context() as patched, pytest.raises(BadInput, match="a cannot be written"):
        patched.setattr(dataset, "merge", lambda *_: fail(BadInput("a cannot be written")))
        make("a", "--part", "2/2")
    with locked(tmp_path / "a", part="-2-2"):
        with pytest.raises(BadInput, match="another run writes"):
            make("a", "--part", "2/2")
        assert "manifest.jsonl" in make("a") and half.exists()  # of a part that is still at work
    (others := tmp_path / "a" / "codes.tmp").mkdir()
    make("a")
    assert not half.exists() and others.exists()
    assert "part 2/2 is done; another part is just writing" in capsys.readouterr().out


def test_of_parts_that_begin_together_one_decides_how(tmp_path, monkeypatch):
    file, link = tmp_path / "settings.json", os.link

    def link_after_another(own, file):
        file.write_text('{"speed": 2}')
        link(own, file)

    def no_link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(os, "link", link_after_another)
    with pytest.raises(BadInput, match="begun with --speed 2, not with --speed 1; give the same"):
        keep_settings(file, dict(speed=1), "", "--out", ())
    file.unlink()
    monkeypatch.setattr(os, "link", no_link)
    keep_settings(file, dict(speed=1), "", "--out", ())
    assert [*tmp_path.iterdir()] == [file] and json.loads(file.read_text()) == dict(speed=1)


def test_a_folder_belongs_to_one_set_and_one_run(make, tmp_path):
    before = make("a")
    assert make("a") == before  # nothing is left to do
    (tmp_path / "a" / "shard-00001.npz").unlink()
    assert make("a") == before
    for name in ("a.npy", "a.parquet"):
        with pytest.raises(BadInput, match="neither FILE.npz nor a folder"):
            make(name)
    with locked(tmp_path / "a"), pytest.raises(BadInput, match="another run writes to"):
        make("a")
    with pytest.raises(BadInput, match="was begun with another checkpoint"):
        make("a", latent="mel")
    first = before["shard-00001.jsonl"].index(b"\n") + 1
    for name, length in (("shard-00000.npz", -9), ("shard-00000.npz", 0),
                         ("shard-00001.jsonl", -9),
                         ("shard-00000.jsonl", 0), ("shard-00001.jsonl", first)):
        (tmp_path / "a" / name).write_bytes(before[name][:length])  # a copy that broke off
        assert make("a") == before
    shard = tmp_path / "a" / "shard-00000.npz"
    damaged = bytearray(before[shard.name])
    damaged[damaged.index(b"PK\1\2") + 10] = 99  # how it is packed
    shard.write_bytes(damaged)
    assert make("a") == before
    shard = tmp_path / "a" / "shard-00001.npz"
    frames = np.load(shard)["frames"]
    for n, name in ([9], "features"), (frames + 1, "features"), (frames, "mel"):
        np.savez(shard, frames=n, **{name: np.zeros((sum(n), 128))})  # of another set
        assert make("a") == before
    for rows in ('{"why": 1}\n', '[1]\n', '{"why": 1, "id": 2}\n'):
        (tmp_path / "a" / "shard-00000.jsonl").write_text(rows)
        np.savez(tmp_path / "a" / "shard-00000.npz", frames=[], features=np.zeros((0, 128)))
        assert make("a") == before
    for text in ("\n".join(LINES) + "\t", "en\tThe dog sleeps.\n"):
        (tmp_path / "text.tsv").write_text(text)
        with pytest.raises(BadInput, match="was begun with another text"):
            make("a")
    (tmp_path / "text.tsv").write_text("\n".join(LINES), "utf-8")
    settings = json.loads(before["settings.json"]) | dict(whisper="1")
    (tmp_path / "a" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(BadInput, match="was begun with another whisper"):
        make("a")
    (tmp_path / "a" / "settings.json").write_text("")
    with pytest.raises(BadInput, match="settings.json is damaged"):
        make("a")
    with pytest.raises(BadInput, match="text.tsv/a cannot be a folder .*; give a place"):
        make("text.tsv/a")
    with pytest.raises(BadInput, match="/dev/null is no file that can be read twice"):
        make("c", "--text_file", "/dev/null")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / ".DS_Store").write_text("of macOS")
    assert "manifest.jsonl" in make("d")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="b holds something else; give a new or empty folder"):
        make("b")
