"""What users and systems do wrong: one sentence, nothing lost, nothing silent."""
import errno
import gzip
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import pytest
import torch
import tqdm

import data
import sample
import train
from experiments.student import load_judge
from plumbing import devices, files
from plumbing.errors import BadInput, Outliving, as_bad_input, guard, is_out_of_memory
from plumbing.files import Log, atomic_write, locked
from plumbing.flags import parse_flags
from speech import recordings
from speech.recordings import read_audio, soundfile
from test_roundtrip import FLAGS, ROOT, random_whisper
from text.durations import LANGUAGE_ROWS, char_durations, n_frames
from text.error_rates import error_rates
from text.sources import (
    builtin, load_data, make_sentence, note_unheard, read_file, read_texts, split_of,
)
from text.spelling import strip_unspoken
from whisper_decoder import FrozenWhisper


def test_only_recordings_and_flac_need_more_than_requirements_txt(runs, tmp_path):
    extras = re.findall(r"^([a-z]+)", (ROOT / "requirements-test.txt").read_text(), re.M)
    assert {"soundfile", "matplotlib"} <= {*extras}
    code = f"""import sys
sys.modules.update(dict.fromkeys({extras + ["pyarrow", "ctranslate2"]}))
import sample, train
sample.main(["The dog sleeps.", "--ckpt", {str(runs[0] / "mel")!r}, "--wav", "a.wav"])
train.main(["--speech", ".", "--max_lines", "40"])"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert "wrote a.wav: 1 texts" in done.stdout and (tmp_path / "a.wav").stat().st_size > 9999
    assert "to learn from recordings, `pip install soundfile`" in done.stderr


# ---- text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, written", [
    ("The milk (is on the table).", "The milk is on the table."),
    ("15~30 2*3 5^2 3|4 Hello(world) a_b", "15 30 2 3 5 2 3 4 Hello world a b"),
    ('"Hi," she (Ann) said -- **go**!', "Hi, she Ann said go!"),
    ("Kund*innen, l'eau, well-known", "Kundinnen, l'eau, well-known"),
    ("The \u200b dog\u200b has\u00a0a so\u00adft\tbed.\r", "The dog has a soft bed."),
    ("¿DÓNDE ESTÁ LA CIA?", "¿Dónde está la cia?"), ("The USA sleeps.",) * 2,
    ("NATO ", "NATO"), ("THE\u00a0DOG", "The dog"),
    ("Wait--what", "Wait what"), ("e\u200b\u0301 a", "é a"),
    ("AH\u0331MAD H\u0331ASAN", "A\u1e96mad \u1e96asan"),
])
def test_a_text_is_what_whisper_can_write(pocket, text, written):
    sentence = make_sentence(text, "en", pocket)
    assert strip_unspoken(sentence.text) == written == strip_unspoken(written)
    assert error_rates([sentence], [written])[1:] == (0, 1)


@pytest.mark.parametrize("text, words", [
    ("\u200d", "no word"), ("\u0301", "no word"), ("(?!)", "no word"),
    ("caf\udce9", "no UTF-8; give UTF-8"), ("T\0h\0e\0", "no text; `iconv"),
    ("he\tשלום.", "belong in a .tsv"), ("x" * 20001, "more than 20,000 characters; cut it")])
def test_what_is_no_text_is_refused(pocket, text, words):
    assert make_sentence("x" * 20000 + "\n", "en", pocket)
    with pytest.raises(BadInput, match=words):
        make_sentence(text, "en", pocket)


@pytest.mark.parametrize("changes", [dict(n_text_head=3), dict(n_audio_head=5), dict(n_mels=40),
                                     dict(n_audio_state=64), dict(n_vocab=51000)])
def test_a_whisper_of_sizes_that_do_not_fit(tmp_path, changes):
    with pytest.raises(BadInput, match="no Whisper has such sizes"):
        FrozenWhisper(random_whisper(tmp_path / "w.pt", **changes))


def test_a_perfect_reading_of_every_language_has_no_errors():
    sentences = [(code, text) for code, _, _, text in LANGUAGE_ROWS]
    rates = error_rates(sentences, [strip_unspoken(text) for _, text in sentences])
    assert len(sentences) > 90 and rates == (0, 0, 1)


def test_files_of_any_case_and_line_end_are_read(pocket, tmp_path):
    (tmp_path / "A.TSV").write_bytes(b"en\tThe dog.\rzh_CN.UTF-8\tX.\ren-US\tThe cat.\r")
    counts, notes = read_file(tmp_path / "A.TSV", None, pocket)
    assert [tuple(s) for s in counts] == [("en", "The dog."), ("zh", "X."), ("en", "The cat.")]
    assert not notes


def test_the_file_of_a_whisper_is_found_from_other_folders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").touch()  # an official name all the same
    assert train.Config(whisper="tiny").whisper == "tiny"
    assert train.Config(whisper="my.pt").whisper == str(tmp_path / "my.pt")


def test_near_duplicates_of_held_out_sentences_are_not_trained_on():
    training, (held_out, *_) = data.split(builtin(400))
    near = data.Sentence(held_out.language, held_out.text.upper() + "!")
    assert data.hash_share(near) > data.HELD_OUT  # or this shows nothing
    assert data.split([*builtin(400), near])[0] == training


def test_texts_that_may_be_meant_otherwise_are_noted(pocket, monkeypatch, tmp_path):
    texts, notes = read_texts("El perro duerme".split(), [], "es", pocket)
    assert len(texts) == 3 and notes == ["3 texts of a word each; quotes make them one text"]
    note, = read_texts(["老师在教室里。", "Yes."], [], None, pocket)[1]
    assert note.startswith("1 texts such as '老师在教室里。' are read as English; --lang")
    assert not read_texts(["42", "Yes."], [], None, pocket)[1]
    few = [data.Sentence("en", "The dog and Zoe."), data.Sentence("de", "Die Dog schläft.")]
    note, = note_unheard(few, pocket)
    assert note.startswith("pocket never heard 'zoe' (en), 'dog' (de), and misreads such words")
    note, = note_unheard([data.Sentence("en", "a1 b1 c1 d1 e1 f1")], pocket)
    assert "'d1' (en), 'e1' (en) ..., and" in note
    assert not note_unheard([data.Sentence("zh", "老师在教室里。")], pocket)
    monkeypatch.setattr(pocket, "name", "base")
    assert not note_unheard(few, pocket)
    assert not read_texts(["老师在教室里。"] * 3, [], "zh", pocket)[1]
    monkeypatch.setattr(read_file, "__defaults__", (2,))  # --max_lines is a flag of train.py alone
    (tmp_path / "a.txt").write_text("One.\nTwo.\nThree.\n")
    assert len(read_texts([], [str(tmp_path / "a.txt")], "en", pocket)[0]) == 3
    lines = io.BytesIO("One dog.\r\nA\x0cb\u2028c.\rEnd.".encode())  # as open() has lines
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines))
    assert [s.text for s in read_texts([], [], "en", pocket)[0]] == ["One dog.", "A b c.", "End."]


def test_a_run_is_told_when_its_terminal_closes(monkeypatch):
    for handler, n in ((signal.SIG_IGN, 0), (signal.SIG_DFL, 1)):  # nohup; a terminal
        before = signal.signal(signal.SIGHUP, handler)
        last = pytest.raises(KeyboardInterrupt) if n else nullcontext()  # no step hears it any more
        with last, devices.catch_interrupts() as stops:
            if signal.getsignal(signal.SIGHUP) != signal.SIG_DFL:
                signal.raise_signal(signal.SIGHUP)
        assert len(stops) == n and signal.signal(signal.SIGHUP, before) == handler


def test_recordings_like_held_out_sentences_are_not_learned_from(pocket, tmp_path, monkeypatch):
    texts = ["The dog sleeps.", "the dog sleeps", "The cat sleeps."]
    known = [recordings.Recording(data.Sentence("en", text), torch.zeros(9, 2), None)
             for text in texts]
    monkeypatch.setattr(recordings, "read_manifest", lambda *_: ([None] * 3, []))
    monkeypatch.setattr(recordings, "encode_folder", lambda *_: (known, []))
    monkeypatch.setattr(data, "HELD_OUT", 0)
    held_out = [data.Sentence("en", texts[0])]
    found, notes = recordings.load_recordings(tmp_path, pocket, held_out)
    assert [r.sentence.text for r in found] == texts[2:] and "2 of held-out" in notes[-1]
    with pytest.raises(BadInput, match="no usable recording; all 3 are of held-out sentences"):
        recordings.load_recordings(tmp_path, pocket, [*held_out, data.Sentence("en", texts[2])])
    monkeypatch.setattr(recordings, "encode_folder", lambda *_: ([], ["a.mp3: no audio"]))
    with pytest.raises(BadInput, match="no usable recording; a.mp3: no audio"):
        recordings.load_recordings(tmp_path, pocket, held_out)


def test_every_letter_has_a_frame():
    for text in ("Donaudampfschifffahrt 1", "Kapitän 123456789", "狗" * 30, "no"):
        durations = char_durations(data.Sentence("de", text), 1.7)
        assert min(n for n, c in zip(durations, text) if c != " ") > 0.99


def test_digits_last_as_long_as_they_are_spoken():
    assert n_frames(data.Sentence("en", "It was in 1984.")) == n_frames(
        data.Sentence("en", "It was in one nine eight four."))
    assert char_durations(data.Sentence("fa", "می\u200cخواهم"))[2] == 0  # a joiner
    durations = char_durations(data.Sentence("en", "Ah, 5 é."))
    assert np.allclose(durations / durations[0], [1, 1, 0.5, 0.5, 4, 0.5, 1, 0.5])


# ---- flags and runs --------------------------------------------------------------------------


@pytest.mark.parametrize("command, words", [
    ("train --steps many", "invalid int value: 'many'; --help"),
    ("train --steps 1000000000000000000", "at least 1 and below 1e+09"),
    ("train --learning_rate inf", "--learning_rate inf cannot be used; at least 1e-09 and"),
    ("train --flow_weight nan", "--flow_weight nan cannot be used"),
    ("train --batch_size 100000000", "at least 1 and below 100000"),
    ("train --device meta", "device 'meta' cannot be used"),
    ("train --device hpu", "device 'hpu' cannot be used"),
    ("train --data en={0}/x.jsonl", "no .jsonl is read; give lines of text"),
    ("train --data en={0}/a\u2028b.txt", "No such file"),
    ("train --speed 0.1 --data en={0}/long.txt", "cannot be cut"),
    ("train --data 1e308*builtin", "--data '1e308*builtin' cannot be used"),
    ("train --stepz 5", "unrecognized arguments: --stepz 5; --help lists"),
    ("sample -hello", "give texts last, after -- if one begins with -"),
    ("sample one --language en two", "unrecognized arguments: two; give texts last"),
    ("sample x --guidance nan", "--guidance nan cannot be used"),
    ("sample x --out {0}", "is a folder of shards; it needs --text_file"),
    ("sample x --out {0}/long.txt/a.npz", "long.txt cannot be a folder (File exists)"),
    ("sample x --text_file y.txt", "texts and --text_file were given"),
    ("sample  y", "text 1, '': there is no word in it"),
    ("sample {0}/long.txt", "it is a file, which belongs after --text_file"),
    ("train --out_dir=", "--out_dir is empty"), ("train --speech=", "--speech is empty; give"),
    ("sample x --language=", "--language is empty; give something, or leave it out"),
    ("sample --text_file -", "standard input is read where there is no --text_file"),
    ("train --data 30%*builtin", "--data '30%*builtin' cannot be used"),
    ("sample x --part 7/2 --out {0}/new/a.npz", "belong to --out FOLDER"),
    ("sample x --language en_on.wav", "does not know the language 'en_on.wav'"),
    ("sample x --language xx-YY", "does not know the language 'xx-YY'; it knows en,"),
    ("sample x --ckpt {0}/outt", "/outt/ckpt.pt; `python train.py --out_dir "),
    ("sample x --wav=", "--wav: it is empty; give something"),
    ("sample --text_file=", "'' is no file; give a path"),
    ("sample --text_file fr=x.txt", "there is no file 'fr=x.txt'; --language says the language"),
    ("sample --text_file x.txt y.txt", "such as 'y.txt'; give one of them, and each file its"),
    ("sample --text_file ftp://a/b.txt", "'ftp://a/b.txt' is no file; give a path, or an address"),
    ("sample x --ckpt {0}/mel --wav {0}/folder.wav", "folder.wav is no FILE.wav"),
    ("train --data it=builtin", "does not know the language 'it'"),
    ("train --data en=tatoeba:fr", "tatoeba:fr is 'fr', not 'en'; leave out en="),
    ("train --data -1*builtin", "expected at least one argument that does not begin with -"),
    ("train --resume=yes", "it takes no value, not 'yes'"),
])
def test_flags_that_cannot_be_used(runs, command, words):
    (runs[0] / "long.txt").write_text("\n".join(c * 60 for c in "abcdefgh"))
    (runs[0] / "folder.wav").mkdir(exist_ok=True)
    program, *argv = command.format(runs[0]).replace("\u2028", "\n").split(" ")
    before = sorted(runs[0].rglob("*"))
    with pytest.raises(BadInput) as error:
        if program == "train":
            train.main([*FLAGS, "--out_dir", str(runs[0] / "o"), *argv])
        else:
            sample.main(["--ckpt", str(runs[0] / "features"), *argv])
    assert words in str(error.value) and sorted(runs[0].rglob("*")) == before


def nan(checkpoint):
    next(iter(checkpoint["ema"].values())).fill_(float("nan"))


@pytest.mark.parametrize("spoil, words", [
    (lambda c: c.pop("step"), "'step'"), (lambda c: c.pop("config"), "'config'"),
    (lambda c: c["config"].update(foo=1), "unexpected keyword argument 'foo'"),
    (lambda c: c["ema"].update(no_text=torch.zeros(1)), "Error(s) in loading"),
    (lambda c: c["ema"].pop("position_out"), "Missing key(s) in state_dict: \"posi"),
    (nan, "weights that are not finite"), (lambda c: c.update(step=10**6), "an impossible step"),
    (lambda c: c["model"].pop("token_in.bias"), "Missing key(s) in state_dict: \"token_in"),
    (lambda c: c.update(step="two"), "an impossible step"),
    (lambda c: c.update(step=1.5), "an impossible step"),
    (lambda c: c.update(optimizer={}), "'param_groups'"),
    (lambda c: c["optimizer"].update(param_groups=[]), "an impossible step or optimizer"),
    (lambda c: c["optimizer"]["param_groups"][0]["params"].pop(), "impossible step or optimizer"),
    (lambda c: c.update(origin={}), "'whisper'"), (lambda c: c.update(rhythm={"x": 1}), "'chars'"),
    (lambda c: c["origin"].update(whisper="0"), "pocket is not the Whisper that the checkpoint"),
])
def test_checkpoints_that_are_none(runs, tmp_path, spoil, words):
    checkpoint = torch.load(runs[0] / "features" / "ckpt.pt", weights_only=True)
    spoil(checkpoint)
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(BadInput) as error:
        sample.main(["The dog.", "--ckpt", str(tmp_path)])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_whispers_that_cannot_read_are_told(runs, tmp_path):
    path = random_whisper(tmp_path / "none.pt")
    checkpoint = torch.load(path)
    checkpoint["model_state_dict"]["decoder.token_embedding.weight"].fill_(0.1)
    torch.save(checkpoint, path)
    with pytest.raises(BadInput, match="none.pt was never trained: its weights are all alike"):
        FrozenWhisper(path)
    other = random_whisper(tmp_path / "other.pt", n_mels=128)
    with pytest.raises(BadInput, match="makes 80 channels a frame and .*other.pt reads 128"):
        load_judge(train.load_checkpoint(runs[0] / "mel"), torch.device("cpu"), other)


def test_a_checkpoint_for_which_there_is_no_memory_is_not_called_damaged(runs, monkeypatch):
    def full(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        train.load_checkpoint(runs[0] / "features")


def test_flags_are_checked_before_anything_is_read(runs, monkeypatch):
    monkeypatch.setattr(sample, "load_flow", lambda *_: pytest.fail("it was loaded"))
    for flags, words in (["--steps", "0"], "steps 0"), (["--wav", "x.wav"], "have no sound"):
        with pytest.raises(BadInput, match=words):
            sample.main(["--ckpt", str(runs[0] / "features"), *flags])


def test_speed_is_that_of_the_training_unless_another_is_given(runs, tmp_path, capsys):
    checkpoint = torch.load(runs[0] / "features" / "ckpt.pt", weights_only=True)
    checkpoint["config"]["speed"] = 2.0
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    for flags, seconds in ([], "0.64 s, 32 frames"), (["--speed", "1"], "1.26 s, 63 frames"):
        sample.main(["The children sleep today.", "--ckpt", str(tmp_path), *flags])
        assert f"flow         {seconds}" in capsys.readouterr().out


def test_a_language_that_the_checkpoint_never_heard_is_noted(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("The dog.\nThe cat.\nThe bird.\nThe cow.\nThe horse.\n")
    argv = [*FLAGS[:-4], "--data", f"en={tmp_path}/t.txt", "--steps", "1"]
    train.main([*argv, "--out_dir", str(tmp_path)])
    sample.main(["Le chien.", "--language", "fr", "--ckpt", str(tmp_path), "--steps", "1"])
    assert "was not trained in 'fr'" in capsys.readouterr().err


def test_a_run_goes_on_with_the_text_and_the_whisper_that_it_had(tmp_path):
    text, weights = tmp_path / "t.txt", tmp_path / "w.pt"
    text.write_text("The dog.\nThe cat.\nThe bird.\nThe cow.\nThe horse.\n")
    shutil.copy(ROOT / "pocket" / "pocket.pt", weights)
    argv = [*FLAGS[:-4], "--data", f"en={text}", "--whisper", str(weights), "--out_dir",
            str(tmp_path / "out"), "--steps", "1"]
    train.main(argv)
    with locked(tmp_path / "out"), pytest.raises(BadInput, match="another run writes to"):
        train.main([*argv, "--resume", "--whisper", "x.pt"])  # before anything is loaded
    with pytest.raises(BadInput, match="begun with no --init_from, not with --init_from x.pt"):
        train.main([*argv, "--resume", "--init_from", "x.pt"])  # it began, and saved nothing
    shutil.copy(ROOT / "pocket" / "judge.pt", weights)
    with pytest.raises(BadInput, match="begun with another whisper"):
        train.main([*argv, "--resume"])
    with pytest.raises(BadInput, match="begun with --data en=[^ ]*t.txt, not with --data builtin;"):
        train.main([*FLAGS[:-4], *argv[len(FLAGS[:-4]) + 2 :], "--data", "builtin", "--resume"])
    shutil.copy(ROOT / "pocket" / "pocket.pt", weights)
    text.write_text(text.read_text() + "The fish.\n")
    with pytest.raises(BadInput, match="begun with another text"):
        train.main([*argv, "--resume"])


def test_flags_are_known_and_repeated(capsys):
    with pytest.raises(BadInput, match="--latent 'wav' is none of features, mel"):
        train.Config(latent="wav")
    with pytest.raises(SystemExit):
        parse_flags(train.Config, "", ["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in vars(train.Config()))
    argv = ["--steps", "7", "--resume", "--data", "builtin", "en=a.txt", "--data", "fr=b.txt"]
    config = train.Config(steps=7, resume=True, data=("builtin", "en=a.txt", "fr=b.txt"))
    assert parse_flags(train.Config, "", argv) == config


# ---- the system ------------------------------------------------------------------------------


def test_files_stay_whole_and_those_of_an_earlier_run_are_kept(tmp_path):
    path, checkpoint = tmp_path / "log.csv", tmp_path / "ckpt.pt"
    for file in path, checkpoint, tmp_path / "result.txt":
        file.write_text("earlier")
    (tmp_path / "ckpt.pt.1.tmp").write_text("of a run that was killed")
    with locked(tmp_path):
        pass
    log = Log(path, "step,loss", 0)  # of a run that fails before its first checkpoint
    log.write(0, 0.5)
    assert path.read_text() == checkpoint.read_text() == "earlier"
    for _ in range(2):
        log.keep(checkpoint)
        checkpoint.write_text("now")
    for error, words in (
            (OSError(28, "No space left"), r"x cannot be written \(No space left\); make room"),
            (RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed"),
             "x cannot be written"),  # torch.save on a full disk
            (OSError(104, "Connection reset"), "reset$"), (OSError("it is empty"), "^it is empty")):
        with pytest.raises(OSError, match=words), atomic_write(tmp_path / "x") as part:
            part.write_text("half")
            raise error
    for why in ("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 9 bytes", "MPS backend out of memory (9 GiB)",
                "[enforce fail at alloc_cpu.cpp:98] data. DefaultCPUAllocator: not enough memory",
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"):
        with pytest.raises(RuntimeError, match=f"^{re.escape(why)}$"):  # no full disk
            with atomic_write(tmp_path / "x") as part:
                raise RuntimeError(why)
        assert is_out_of_memory(RuntimeError(why))
    (tmp_path / "part.csv").write_bytes(b"step,loss\n3,1\n\0,1\n\xff,1\n4,1\n5,1\n")
    Log(tmp_path / "part.csv", "step,loss", 5)  # of a log that was gone, and is damaged
    assert (tmp_path / "part.csv").read_text() == "step,loss\n3,1\n4,1\n"
    (tmp_path / "part.csv").unlink()
    for wrong in (tmp_path, checkpoint / "x"):  # a folder; below a file
        with pytest.raises(OSError, match="a place that you"), atomic_write(wrong) as part:
            part.write_text("half")
    contents = {x.name: x.read_text() for x in tmp_path.glob("[!.]*")}
    assert contents == {"log.csv": "step,loss\n0,0.5\n", "ckpt.pt": "now", "log.old": "earlier",
                        "ckpt.old": "earlier", "result.old": "earlier"}
    for n in 2, 3:  # the second had no result.txt
        log = Log(path, "step,loss", 0)
        log.keep(checkpoint)
        checkpoint.write_text(f"of run {n}")
    assert sorted(x.name for x in tmp_path.glob("*.old")) == ["ckpt.old", "log.old"]
    assert (tmp_path / "ckpt.old").read_text() == "of run 2"
    checkpoint.unlink()  # the user keeps the .old
    Log(path, "step,loss", 0).keep(checkpoint)
    assert (tmp_path / "ckpt.old").read_text() == "of run 2"
    with locked(tmp_path), pytest.raises(BadInput, match="another run writes to"):
        with locked(tmp_path):
            pass
    log = Log(path, "step,loss", 0)
    log.file = open("/dev/full", "w", buffering=1)
    with pytest.raises(SystemExit, match="No space left on device: .*log.new; make room"):
        guard(lambda: log.write(0, 0.5))


def test_a_kill_between_two_renames_leaves_an_earlier_run_whole(tmp_path, monkeypatch):
    names, replace, calls = ("ckpt", "result", "log"), os.replace, []
    paths = [tmp_path / f"{name}{end}" for name, end in zip(names, (".pt", ".txt", ".csv"))]
    for path in paths:
        path.write_text("earlier")

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*args)

    log = Log(paths[2], "step,loss", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        log.keep(paths[0])
    Log(paths[2], "step,loss", 0).keep(paths[0])  # of the next run
    assert [(tmp_path / f"{name}.old").read_text() for name in names] == ["earlier"] * 3


def test_a_lock_that_was_just_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "flock", lambda lock, _: os.unlink(lock.name))
    with pytest.raises(BadInput, match="another run writes to"), locked(tmp_path):
        pass


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(BadInput, match="new cannot be written; give a place that you may write to"):
        files.make_folder(tmp_path / "new")


def test_a_new_folder_goes_with_a_run_that_wrote_nothing(tmp_path):
    (tmp_path / "old").mkdir()
    for name, writes in (("empty", False), ("old", False), ("full", True)):
        with pytest.raises(KeyboardInterrupt), locked(tmp_path / name):
            if writes:
                (tmp_path / name / "x").touch()
            raise KeyboardInterrupt
    assert sorted(x.name for x in tmp_path.iterdir()) == ["full", "old"]


def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch, capsys):
    (tmp_path / ".lock-1").mkdir()  # such as another user's file
    with pytest.raises(BadInput, match="cannot be written .*; give a place that you may write to"):
        with locked(tmp_path, part="-1"):
            pass
    def cannot(*_):
        raise OSError(errno.ENOLCK, "No locks available")  # as some clusters have it
    monkeypatch.setattr(files, "flock", cannot)
    with locked(tmp_path):
        assert "cannot be locked (No locks available), so see to" in capsys.readouterr().err


def test_a_first_checkpoint_that_cannot_be_written_leaves_an_earlier_run_alone(
        pocket, tmp_path, monkeypatch):
    names = ("ckpt.pt", "log.csv", "result.txt")
    for name in names:
        (tmp_path / name).write_text("earlier")
    run = train.Run(train.Config(depth=1, out_dir=str(tmp_path)), pocket)
    log = Log(tmp_path / "log.csv", "step", 0)

    def full(number):
        raise OSError(122, "Disk quota exceeded")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="quota exceeded.; make room"):
        patch.setattr(os, "fsync", full)
        run.save(log)
    assert all((tmp_path / name).read_text() == "earlier" for name in names)
    (tmp_path / "ckpt.pt").unlink()  # moved by the user: his log stays nevertheless
    run.save(log)
    assert (tmp_path / "log.old").read_text() == (tmp_path / "result.old").read_text() == "earlier"


def test_a_run_outlives_the_reader_of_its_output(tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "train.py", *FLAGS, "--out_dir", str(tmp_path)],
                          cwd=ROOT, stdout=write, stderr=write)
    assert done.returncode == 0 and (tmp_path / "result.txt").exists()


@pytest.mark.parametrize("error, is_gone", [(errno.EIO, True), (errno.ENOSPC, False)])
def test_a_terminal_that_was_closed_stops_nothing(tmp_path, error, is_gone):
    class Stream(io.TextIOWrapper):
        def flush(self):
            raise OSError(error, os.strerror(error))
    stream = Stream(open(tmp_path / "terminal", "wb", buffering=0))
    stream.mode = "w"
    if is_gone:
        return Outliving(stream).write("a")
    with pytest.raises(OSError, match="terminal cannot be written .No space left"):
        Outliving(stream).write("a")


@pytest.mark.parametrize("samples, words", [
    (np.zeros((100, 1)), "no sound in it"), (np.tile([[0.5, -0.5]], (100, 1)), "no sound in it"),
    (np.full((100, 1), 1e-30), "no sound"), (np.full((100, 1), 1e18), "samples of up to 1e"),
    (np.full((100, 1), np.nan), "samples of up to nan"), (np.zeros((0, 1)), "no sound in it")])
def test_recordings_without_a_sound(tmp_path, samples, words):
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(BadInput, match=words):
        read_audio(tmp_path / "a.wav")


def test_a_recording_that_was_cut_short(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(1000, 0.5), 16000)
    assert len(read_audio(tmp_path / "a.wav")) == 1000
    whole = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(whole[:-500])
    with pytest.raises(BadInput, match="it was cut short after 1,544 bytes; copy it again"):
        read_audio(tmp_path / "a.wav")
    (tmp_path / "a.wav").write_bytes(whole[:4] + bytes.fromhex("24f0ff7f") + whole[8:])
    assert len(read_audio(tmp_path / "a.wav")) == 1000  # as `espeak-ng --stdout > a.wav` writes it


def test_command_line_prints_one_line_for_an_error():
    command = [sys.executable, "train.py", "--whisper", "nosuch"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith("train.py: no Whisper 'nosuch'")
    assert done.stderr.count("\n") == 1


def test_a_package_that_is_missing_is_named():
    code = ("import runpy, sys\nsys.modules['matplotlib'] = None\nsys.argv = ['bars.py']\n"
            "runpy.run_path('experiments/bars.py')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and re.fullmatch("bars.py: .*'matplotlib' is not a package; `pip "
                                                 "install -r requirements-test.txt`\n", done.stderr)


def test_whatever_goes_wrong_is_one_sentence(monkeypatch):
    def fail(error):
        raise error

    page = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", page)
    monkeypatch.setattr(sys, "stderr", None)  # closed
    assert guard(lambda: print("dogs, 狗", tqdm.tqdm([7]).total) or 7) == 7
    page.flush()
    assert page.buffer.getvalue() == b"dogs, \\u72d7 1\n"
    for error, words in ((KeyboardInterrupt(), "stopped; what is written is whole"),
                         (BadInput("no text"), "no text"), (OSError("No space left"), "No space"),
                         (OSError(36, "Name too long", "a" * 300), "Name too long: a{100}$"),
                         (torch.OutOfMemoryError(), "in training a smaller --batch_size"),
                         (OSError(28, "No space left"), "No space left; make room"),
                         (RuntimeError("can't allocate memory"), "out of memory")):
        with pytest.raises(SystemExit, match=words):
            guard(lambda: fail(error))
    with pytest.raises(BadInput, match="x .it is no file of torch.save, or has more .*; give y"):
        with as_bad_input("x", "give y"):
            torch.load(io.BytesIO(b"The dog."), weights_only=True)
    with pytest.raises(ZeroDivisionError):  # ours, not the user's
        guard(lambda: 1 / 0)


def test_ctrl_c_while_modules_are_imported_is_no_traceback():
    code = ("import plumbing.errors, signal, time\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # `nohup &` ignores it
            "print(flush=True)\ntime.sleep(60)")
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.readline()
    run.send_signal(signal.SIGINT)
    assert run.communicate()[1] == "-c: stopped; nothing had begun\n" and run.returncode
    for program in ("train.py", "sample.py"):
        imports = re.findall("^(?:from|import) .*", (ROOT / program).read_text("utf-8"), re.M)
        assert imports[0].startswith("from plumbing.errors import")


def test_a_full_standard_output_is_told(runs):
    command = [sys.executable, "sample.py", "The dog.", "--ckpt", str(runs[0] / "features")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "sample.py: <stdout> cannot be written (No sp" in done.stderr


def test_builtin_sentences_of_one_language_and_of_so_many_lines(pocket, monkeypatch):
    shares, notes = load_data(["fr=builtin"], pocket, max_lines=30)
    assert {s.language for s in shares} == {"fr"} and 20 < len(shares) <= 30 and not notes
    monkeypatch.setattr(pocket, "name", "base")
    for source in ("builtin", "fr=builtin", "0.5*builtin"):
        assert "have a few hundred words" in load_data([source], pocket, max_lines=30)[1][0]


def test_a_folder_that_is_moved_during_a_run_is_told(tmp_path, capsys):
    folder = tmp_path / "a"
    folder.mkdir()
    log = Log(folder / "log.csv", "step,loss", 0)
    for step, move in enumerate((False, True, True)):
        log.write(step, 0.5)
        if move:
            folder.rename(tmp_path / str(step))
        with atomic_write(folder / "ckpt.pt") as part:
            part.write_text("now")
            log.keep(folder / "ckpt.pt")
        assert ("is gone; it goes on in a new" in capsys.readouterr().err) == move
    log.write(3, 0.5)
    assert (folder / "log.csv").read_text() == "step,loss\n3,0.5\n"


def test_cells_of_a_spreadsheet_lose_their_quotes(pocket, tmp_path):
    (tmp_path / "t.tsv").write_text('en\t"He says: ""The dog sleeps."""\n\ufeffen\t"a" and "b"\n'
                                    '"en"\t"Yes."\n')
    assert [s.text for s in read_file(tmp_path / "t.tsv", None, pocket)[0]] == [
        'He says: "The dog sleeps."', '"a" and "b"', "Yes."]


@pytest.mark.parametrize("content", ["é.\n".encode("utf-16"), b"caf\xe9\n", "é".encode()[:1]])
def test_a_text_that_is_not_utf_8_is_told_how_to_become_so(pocket, tmp_path, monkeypatch, content):
    cut = "if it was cut short, delete it and fetch it again; else " * (content == b"\xc3")
    for name, packed in ("t.tsv", content), ("t.gz", gzip.compress(content)):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(BadInput, match=f"{name} is not UTF-8 .*; {cut}`iconv -f cp1252 -t"):
            read_file(tmp_path / name, "de", pocket)
    (tmp_path / "t.gz").write_bytes(gzip.compress(1000 * content)[:-4])  # cut off
    with pytest.raises(BadInput, match="t.gz (is not UTF-8 |.* comes again when it is deleted)"):
        read_file(tmp_path / "t.gz", "de", pocket)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(BadInput, match="standard input is not UTF-8 .*`iconv -f cp1252 -t"):
        read_texts([], [], None, pocket)


def test_what_is_not_read_in_a_folder_is_noted(pocket, tmp_path):
    (tmp_path / "en.txt").mkdir()
    for name in ("a.csv", "notes", "en.txt/a.txt", "fr.txt", ".hidden"):
        (tmp_path / name).write_text("Le chien dort.\nLe chat dort.\n")
    shares, notes = load_data([str(tmp_path)], pocket)
    assert len(shares) == 2 and notes == [
        f"of {tmp_path} only .txt and .tsv are read, not a.csv, en.txt, notes"]


def test_a_file_of_another_script_is_noted(pocket, tmp_path):
    (tmp_path / "t.txt").write_text("老师在教室里。\nYes.\n", "utf-8")
    for language, n in ((None, 1), ("zh", 0), ("en", 0)):
        assert len(read_texts([], [str(tmp_path / "t.txt")], language, pocket)[1]) == n


def test_every_process_tells_what_is_wrong_with_it(pocket, monkeypatch):
    for rank, name in (("0", "x.py"), ("1", "x.py, process 1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(sys, "argv", ["x.py"])
        with pytest.raises(SystemExit, match=f"^{name}: .*no word in it$"):
            guard(lambda: read_texts([""], [], "en", pocket))


def test_headers_of_tables_and_empty_columns_are_no_sentences(pocket, tmp_path):
    (tmp_path / "t.tsv").write_text("client_id\tpath\tSentence\tlocale\n1\ta.mp3\tThe dog.\ten\n"
                                    "language\ttext\nen\t\npath\tThe text.\nword\ttext\n"
                                    "couch\tsentence\n"
                                    '"One ""column""."\n'
                                    "en\tText\n")
    counts, notes = read_file(tmp_path / "t.tsv", "en", pocket)
    assert [s.text for s in counts] == ["en", "The text.", "sentence", 'One "column".', "Text"]
    assert "line 1 is left out, and 2 more: it is the header of a table" in notes[0]
    assert "the last of 2 columns, the text, has no word in it" in notes[1]
    (tmp_path / "t.txt").write_text("Yes.\n" * 9)
    with pytest.raises(BadInput, match=r"1 different sentences \('Yes.'\) are too few"):
        load_data([f"en={tmp_path}/t.txt"], pocket)


def test_studies_say_what_of_a_text_cannot_be_used(pocket, tmp_path, capsys):
    (tmp_path / "t.tsv").write_text("en\tYes.\nen\tNo.\nenn\tWell.\n")
    config = asdict(train.Config())
    for sources in ([str(tmp_path / "t.tsv")], None):
        found = split_of(config | dict(data=[str(tmp_path / "t.tsv")]), pocket, sources)
        assert sum(map(len, found)) == 2 and "'enn'" in capsys.readouterr().err


def test_of_every_language_a_sentence_is_held_out():
    sentences = [data.Sentence(code, f"{code} {i}")
                 for code, n in (("en", 50), ("fr", 2), ("de", 3), ("zh", 1)) for i in range(n)]
    alone = (data.Sentence("ja", f"{i}") for i in range(99))  # of its language
    sentences.append(next(s for s in alone if data.hash_share(s) < data.HELD_OUT))
    training, held_out = data.split(sentences)
    assert {s.language for s in held_out} == {"en", "fr", "de"} < {s.language for s in training}
    assert sorted(training + held_out) == sorted(sentences)


def test_one_sentence_has_no_other_to_compare_with(pocket):
    result = train.evaluate(train.Run(train.Config(depth=1, eval_sentences=1), pocket),
                            [data.Sentence("en", "The dog sleeps.")])
    assert math.isnan(result["cer_shuffled_text"]) and math.isfinite(result["val_cer_4step"])


def test_lines_that_say_another_language_are_noted(pocket, tmp_path):
    (tmp_path / "t.tsv").write_text("EN\tThe dog.\nfr-FR\tLe chien.\nA dog.\tUn chien.\n"
                                    "Spanish\tEl perro.\n")
    for language in ("fr", "French"):
        counts, (note,) = read_file(tmp_path / "t.tsv", language, pocket)
        assert len(counts) == 4 and note.startswith("2 lines name a language; one begins with 'en'")
    assert not read_file(tmp_path / "t.tsv", None, pocket)[1][1:]
    (tmp_path / "t.tsv").write_text("The dog.\ten\nA cat.\tNo.\n")  # the columns are swapped
    note, = read_file(tmp_path / "t.tsv", "en", pocket)[1]
    assert note.startswith("1 lines name a language; one ends with 'en'. The text is read in the")


def test_gradients_that_are_none_are_no_mean(monkeypatch):
    model, seen = torch.nn.Linear(2, 2), []
    model.weight.grad = torch.ones(2, 2)
    monkeypatch.setattr(devices.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(devices.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(devices.dist, "all_reduce", lambda x: seen.append(x.mul_(2)))
    assert not devices.average_gradients(model, False) and devices.average_gradients(model, True)
    assert len(seen) == 4 and model.weight.grad.eq(1).all()
