"""Sound tokens and the language model of them: experiments/tokens.py, speech_lm.py, speed.py."""
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import sample
from data import Sentence
from experiments import speech_lm, speed, tokens, utterances
from experiments.student import Speech, letters
from experiments.utterances import generate
from flow import Solver
from plumbing.errors import BadInput
from plumbing.files import locked
from plumbing.weights import POCKET
from pocket import make_pocket
from speech import dataset
from speech.ear import SILENT_FRAMES
from speech.recordings import TAIL, soundfile
from test_roundtrip import close, randn, random_whisper
from text.sources import builtin, load_sentences
from whisper_decoder import FrozenWhisper


@pytest.fixture(scope="module")
def real(pocket):
    speech = tokens.real_test(pocket, pocket.languages)
    return Speech(speech.sentences[::10], speech.x1[::10])


@pytest.fixture(scope="module")
def quantiser(real, pocket):
    """A quantiser that learned nothing, but with codes of real speech."""
    torch.manual_seed(0)
    quantiser = tokens.Quantiser(pocket).eval()
    quantiser.languages = ["de", "en"]
    quantiser.begin(tokens.features_of([torch.cat(real.x1)], pocket)[0][0])
    return quantiser


@pytest.fixture
def make_set(runs, tmp_path, monkeypatch):
    """`make_set("mel", "--write", "mel")` -> a folder of shards that this flow made."""
    monkeypatch.setattr(dataset, "TEXTS_A_SHARD", 3)
    lines = ["en\tThe dog sleeps.", "xx\tNo.", "de\tDie Sonne scheint.", "xx\t1", "xx\t2", "xx\t3",
             "de\tHallo.", "en\tThe dog sleeps near the door.", "en\t" + "a" * 300]  # it is cut
    (tmp_path / "text.tsv").write_text("\n".join(lines), "utf-8")

    def call(latent: str, *flags: str) -> Path:
        sample.main(["--text_file", str(tmp_path / "text.tsv"), "--ckpt", str(runs[0] / latent),
                     "--out", str(tmp_path / latent), *flags])
        return tmp_path / latent
    return call


def read_rows(files) -> list[dict]:
    """Rows of .parquet or .jsonl."""
    rows = []
    for file in files:
        if file.suffix == ".parquet":
            import pyarrow.parquet
            rows += pyarrow.parquet.read_table(file).to_pylist()
        else:
            rows += map(json.loads, file.read_text("utf-8").splitlines())
    return rows


def test_languages_that_no_clip_has(pocket):
    german = tokens.real_test(pocket, ["de", "it"]).sentences
    assert {s.language for s in german} == {"de"}
    rest = tokens.real_test(pocket, ["de"], {*map(letters, german[:5])}).sentences
    assert rest == [s for s in german if letters(s) not in map(letters, german[:5])]
    with pytest.raises(BadInput, match="pocket can hear no clip .* not learned in it; give --rec"):
        tokens.real_test(pocket, ["it"])


def test_forms_of_other_projects(tmp_path):
    assert tokens.sound([3, 314]) == ("<|sound_start|><|sound_0003|><|sound_0314|><|sound_end|>")
    # As `convert_ids_to_tokens` of janhq/ichigo-experiments writes them.
    assert tokens.run_lengths([7, 7, 194]) == (
        "<|sound_start|><|duration_02|><|sound_0007|><|sound_0194|><|sound_end|>")
    assert tokens.run_lengths([5] * 50) == (
        "<|sound_start|><|duration_49|><|sound_0005|><|sound_0005|><|sound_end|>")
    task, heard = "<|reserved_special_token_69|>", "<|sound_start|><|sound_0511|><|sound_end|>"
    ichigo = tokens.row("ichigo", 7, "A dog\nsleeps.", [511])
    assert ichigo == dict(
        index=7, tokens=[511], text_prompt="A dog sleeps.", answer="A dog sleeps.", length=1,
        prompt=heard, conversations=[dict(content=task + heard, role="user"),
                                     dict(content="A dog sleeps.", role="assistant")])
    assert tokens.row("speechless", 7, "A dog\nsleeps.", [2, 2]) == dict(
        index=7, prompt=task + "A dog sleeps.",
        answer="<|sound_start|><|duration_02|><|sound_0002|><|sound_end|>")
    for suffix in {tokens.TABLE, ".jsonl"}:
        tokens.write_rows([ichigo, ichigo], tmp_path / f"x{suffix}")
        assert read_rows([tmp_path / f"x{suffix}"]) == [ichigo, ichigo]


def test_a_set_has_tokens_of_its_own_features(make_set, quantiser, pocket, tmp_path, monkeypatch,
                                              capsys):
    monkeypatch.setattr(tokens, "TABLE", ".jsonl")
    tokens.save_quantiser(quantiser, tmp_path / "quantiser.pt", pocket)
    folder = make_set("features")
    argv = ["--quantiser", str(tmp_path / "quantiser.pt"), "--set", str(folder)]
    tokens.main(argv)
    files = [folder / "tokens" / f"ichigo-0000{i}.jsonl" for i in (0, 2)]  # 1: all is left out
    assert sorted(folder.glob("tokens/*")) == [*files, folder / "tokens" / "settings.json"]
    rows = read_rows(files)
    pieces = [*map(json.loads, (folder / "manifest.jsonl").read_text("utf-8").splitlines())]
    for i, (row, piece) in enumerate(zip(rows, pieces, strict=True)):
        shard = np.load(folder / piece["shard"])
        start = shard["frames"][: piece["index"]].sum()
        x, n = torch.from_numpy(shard["features"][start:]).float(), piece["frames"]
        x = torch.cat([x[:n], pocket.silence[n : n + TAIL]])  # as behind real speech
        ids = quantiser.tokens(x[None], torch.tensor([len(x)]))[0].tolist()
        assert len(ids) == (min(n + TAIL, pocket.max_frames) + 1) // 2
        expected = tokens.row("ichigo", i, piece["text"], ids)
        expected |= dict(id=piece["id"], language=piece["language"], cer=piece["cer"])
        assert row == expected and [*row] == [*expected]
    assert len({str(row["tokens"]) for row in rows}) == len(rows) > 5
    assert f"wrote {folder / 'tokens'}: {len(rows)} rows" in capsys.readouterr().out
    before = [(f.read_bytes(), f.stat().st_ino, f.stat().st_mtime_ns) for f in files]
    for f in files:
        f.unlink()
    for part, made in ("2/2", files[1::2]), ("1/2", files):
        tokens.main([*argv, "--part", part])
        assert [f for f in files if f.exists()] == made
        n_own = len([r for f in files[int(part[0]) - 1 :: 2] for r in read_rows([f])])
        assert f"wrote {folder / 'tokens'}: {n_own} rows" in capsys.readouterr().out
    assert [f.read_bytes() for f in files] == [whole for whole, *_ in before]
    before = [(f.read_bytes(), f.stat().st_ino, f.stat().st_mtime_ns) for f in files]
    files[1].unlink()
    tokens.main(argv)  # as after a run that was killed
    after = [(f.read_bytes(), f.stat().st_ino, f.stat().st_mtime_ns) for f in files]
    assert after[0] == before[0] and after[1][0] == before[1][0] and after[1][2] > before[1][2]
    assert f"wrote {folder / 'tokens'}: {len(rows)} rows" in capsys.readouterr().out
    halves = [folder / "tokens" / f"ichigo-0000{i}.jsonl.1.tmp" for i in (0, 2)]
    for half in halves:
        half.write_text("half")
    monkeypatch.setattr(tokens, "TABLE", ".parquet")  # pyarrow was installed meanwhile
    shard = folder / "shard-00002.npz"
    os.utime(shard, ns=(0, after[1][2] + 10**9))  # it was made anew
    tokens.main(argv)
    again = [(f.read_bytes(), f.stat().st_ino, f.stat().st_mtime_ns) for f in files]
    assert again[0] == after[0] and again[1][0] == after[1][0] and again[1][1:] != after[1][1:]
    assert sorted(folder.glob("tokens/*-*")) == [files[0], halves[0], files[1]]  # that is another's
    halves[0].unlink()
    with locked(folder, part="-tokens-ichigo"), pytest.raises(BadInput, match="another run wr"):
        tokens.main(argv)
    monkeypatch.setattr(tokens, "TABLE", ".jsonl")
    capsys.readouterr()
    tokens.main([*argv, "--form", "speechless"])
    others = read_rows(sorted(folder.glob("tokens/speechless-*")))
    assert [*others[0]] == ["index", "prompt", "answer", "id", "language", "cer"]
    assert [row["answer"] for row in others] == [tokens.run_lengths(row["tokens"]) for row in rows]
    assert [row["index"] for row in others] == [*range(len(rows))]
    quantiser.languages, before = ["de"], quantiser.languages
    tokens.write_set(folder, "ichigo", quantiser, pocket)
    quantiser.languages = before
    assert "the quantiser never heard en, only de" in capsys.readouterr().err


def test_a_set_of_spectrograms_is_heard_as_its_flow_is(make_set, quantiser, pocket, runs, ear):
    folder = make_set("mel", "--write", "mel", "features")
    n_rows = tokens.write_set(folder, "ichigo", quantiser, pocket)
    rows, pieces = read_rows(sorted(folder.glob("tokens/ichigo-*"))), [*tokens.rows_of(folder)]
    flow, same = utterances.open_source(str(runs[0] / "mel"), [], pocket), []
    for row, piece in zip(rows, pieces, strict=True):
        sentence = Sentence(piece["language"], piece["text"])
        speech = generate(flow, [sentence], Solver(), hears=pocket)  # in the same window
        ids = tokens.tokenise(quantiser, speech, pocket)[0]
        assert len(row["tokens"]) == len(ids) and row["text_prompt"] == sentence.text
        same += [a == b for a, b in zip(row["tokens"], ids)]
    assert n_rows == len(rows) and np.mean(same) > 0.97  # the set has 16 bits a value
    for loudness in 0.5, 3.0:  # below and above a peak of 0.5
        x1, frames, n = loudness * randn(1, 30, 80), torch.tensor([30]), 30 + SILENT_FRAMES
        speech, whole = (ear.spectrogram(x1, frames, window) for window in (30, n))
        assert (speech.max() > 0.6) == (loudness > 1)
        close(tokens.speech_features(speech[0], pocket),
              pocket.features_of_mel(whole)[0, : 30 + TAIL])


def test_sets_that_have_no_tokens(make_set, quantiser, pocket, tmp_path, monkeypatch):
    file = tmp_path / "quantiser.pt"
    tokens.save_quantiser(quantiser, file, pocket)
    features, mel = make_set("features"), make_set("mel", "--write", "mel")

    def fails(words: str, *argv) -> None:
        with pytest.raises(BadInput, match=words):
            tokens.main([*map(str, argv)])
    fails("mel/x has no manifest.jsonl; `python sample.py --text_file TEXT --out .*mel/x` makes it",
          "--quantiser", file, "--set", features, mel / "x")
    assert not (features / "tokens").exists()  # all are looked at before the work
    narrow, bands, short = (FrozenWhisper(random_whisper(tmp_path / f"{name}.pt", **dims)) for
                            name, dims in (("narrow", {}), ("bands", dict(n_mels=128)),
                                           ("short", dict(n_audio_ctx=20))))
    for folder, whisper, words in (
            (features, narrow, "features has features of width 128 .*narrow.pt takes 32 and"),
            (mel, bands, "mel has mel of width 80 .*bands.pt takes 128 .* give the --whisper of"),
            (mel, short, r"to \d+ frames, and .*short.pt takes 80 and at most 20")):
        with pytest.raises(BadInput, match=words):
            tokens.check_set(folder, whisper)
    tokens.check_set(mel, narrow)  # whoever made it
    judge = FrozenWhisper(str(POCKET / "judge.pt"))  # as wide as pocket
    with pytest.raises(BadInput, match="features of another Whisper than .*judge.pt; give the --"):
        tokens.check_set(features, judge)
    tokens.check_set(mel, judge)
    tokens.main(["--quantiser", str(file), "--set", str(features)])
    settings = features / "tokens" / "settings.json"
    whole = settings.read_text()
    for text, words in (whole[:9], "is damaged.*; move the folder away"), (
            json.dumps(json.loads(whole) | dict(tail=0)), "another tail, which has changed"):
        settings.write_text(text)
        fails(f"tokens(/settings.json)? .*{words}", "--quantiser", file, "--set", features)
    settings.write_text(whole)
    of_set = features / "settings.json"
    now = of_set.read_text()
    of_set.write_text(now.replace('"speed": 1.0', '"speed": 0.9'))  # another set, in its place
    fails("tokens was begun with another set, which has", "--quantiser", file, "--set", features)
    of_set.write_text(now)
    with locked(tmp_path / "new"):
        fails("another run writes to .*new", "espeak", "--out", tmp_path / "new")
    with torch.no_grad():
        quantiser.codes.neg_()
        tokens.save_quantiser(quantiser, tmp_path / "other.pt", pocket)
        quantiser.codes.neg_()
    fails("features/tokens was begun with another quantiser, .* or another --set",
          "--quantiser", tmp_path / "other.pt", "--set", features)
    fails("--part 1/2 belongs to --set, without a source", "espeak", "--part", "1/2", "--out",
          tmp_path / "new")
    fails("--part '3/2' cannot be used", "--quantiser", file, "--set", mel, "--part", "3/2")
    both = ["--set", mel, "--quantiser", file]
    for argv in [], both[:2], both[2:], ["espeak", *both], [*both, "--recordings", tmp_path]:
        fails("give espeak or a checkpoint, whose speech is quantised, or --set FOLDER", *argv)
    shard = mel / "shard-00002.npz"
    damaged = bytearray(shard.read_bytes())
    damaged[damaged.index(b"PK\1\2") + 10] = 99  # as if packed in a way that is not known
    for content in damaged, shard.read_bytes()[:-9], (mel / "shard-00000.npz").read_bytes():
        shard.write_bytes(content)
        fails("mel/shard-00002.npz is damaged .*; the command of sample.py that made it makes it",
              "--quantiser", file, "--set", mel)
    manifest = (mel / "manifest.jsonl").read_bytes()
    (mel / "manifest.jsonl").write_bytes(manifest[:-9])  # a copy that broke off
    fails("mel/manifest.jsonl is damaged .*; the command of sample.py that made it makes it again",
          "--quantiser", file, "--set", mel)
    only_sound = tmp_path / "sound"
    monkeypatch.setattr(dataset, "griffin_lim", lambda mel: torch.zeros(160 * mel.shape[1]))
    make_set("mel", "--write", "wav", "--out", str(only_sound))
    fails("sound has neither mel nor features of any text; make another with `sample.py --write",
          "--quantiser", file, "--set", only_sound)


def test_a_quantiser_learns_and_padding_changes_nothing(pocket, real):
    before, after = tokens.Quantiser(pocket).eval(), tokens.train_quantiser(real, pocket, 40, 0)
    texts = pocket.target_tokens(*zip(*((s.text, s.language) for s in real.sentences[:8])))
    loss = [sum(tokens.quantiser_loss(q, real.x1[:8], pocket, texts).values()).item()
            for q in (before, after)]
    assert loss[1] < 0.2 * loss[0]
    figures, worse = (tokens.judge(quantiser, real, pocket) for quantiser in (after, before))
    german = Speech(*zip(*(pair for pair in zip(*real) if pair[0].language == "de")))
    only = tokens.judge(after, german, pocket)
    assert only["cer_quantised"] == only["cer_quantised_de"] == figures["cer_quantised_de"]
    assert figures["cer_plain"] < 0.05 and figures["cer_quantised"] < 0.2 < worse["cer_quantised"]
    assert figures["codes"] > 30 and 3 < figures["entropy"] <= 9
    with pytest.raises(BadInput, match="63 frames of speech are too few for codes of 64"):
        tokens.train_quantiser(real._replace(x1=[x[:9] for x in real.x1[:7]]), pocket, 1, 0)
    cut = [x[:n] for x, n in zip(real.x1, (60, 44, *range(21, 43, 2)))]
    features, frames = tokens.features_of(cut, pocket)
    made = after(features, frames)
    for x, y, ids, n in zip(features, made.features, made.tokens, frames):
        alone = after(x[None, :n], n[None])
        assert torch.equal(ids[: (n + 1) // 2], alone.tokens[0])  # of an odd length too
        close(y[:n], alone.features[0], atol=1e-3)
    (made.features.square().mean() + made.commitment).backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in after.parameters())


def test_codes_that_nothing_uses_move(pocket):
    quantiser, x = tokens.Quantiser(pocket), torch.nn.functional.normalize(randn(40, 64), dim=1)
    quantiser.uses.zero_()
    quantiser.update(x, torch.zeros(40, dtype=torch.long))
    assert quantiser.uses[0] > 1 and (quantiser.codes @ x.T).amax(1).gt(0.999).sum() == 40


def test_a_language_model_reads_on_where_it_was():
    torch.manual_seed(0)
    model = speech_lm.SpeechLM(600).eval()
    ids = torch.randint(0, 600, (2, 20))
    whole, caches = model(ids), [[] for _ in model.blocks]
    parts = [model(ids[:, :12], 0, caches)]
    parts += [model(ids[:, i : i + 1], i, caches) for i in range(12, 20)]
    close(torch.cat(parts, 1), whole, atol=1e-4)
    ids[:, 10:] = 0
    close(model(ids)[:, :10], whole[:, :10])  # nothing comes from the future


def test_a_language_model_learns_tokens_and_their_text():
    sounds = [[[i, i, 100 + i]] * 3 for i in range(8)]
    versions, texts = [[s[k] for s in sounds] for k in range(2)], list("abcdefgh")
    alphabet = {c: speech_lm.END + 1 + i for i, c in enumerate(texts)}
    model = speech_lm.train_model(versions, texts, alphabet, randn(512, 64), 150, 0)
    cer, perplexity = speech_lm.test(model, versions[0], texts, alphabet)
    assert cer == 0 and 1 <= perplexity < 3
    again = speech_lm.test(model, [*versions[0], [3]], [*texts, ""], alphabet)  # no pair of sounds
    assert abs(again[1] - perplexity) < 1e-3
    cer, other = speech_lm.test(model, [[200, 3, 77]] * 8, texts, alphabet)
    assert cer > 0.5 and other > 10 * perplexity


def test_commands(runs, make_set, pocket, tmp_path, monkeypatch, capsys):
    ear, features = (str(runs[0] / name) for name in ("mel", "features"))
    few = [Sentence("en", "The dog sleeps."), Sentence("de", "Die Sonne scheint.")]
    for code in ("en", "de"):
        (tmp_path / f"{code}.txt").write_text("\n".join(
            s.text for s in builtin(400) if s.language == code), "utf-8")
    text = ["--data", *(f"{code}={tmp_path}/{code}.txt" for code in ("en", "de"))]
    held_out, judge_it, judged, known = [Sentence("fr", "Le chien dort.")], tokens.judge, [], []
    monkeypatch.setattr(tokens.data, "per_language", lambda _, n: held_out if n == 100 else few)
    monkeypatch.setattr(tokens, "judge", lambda quantiser, speech, whisper: judged.append(
        speech.sentences) or judge_it(quantiser, speech, whisper))

    def speak(source, sentences, whisper):
        flow = utterances.open_source(source, sentences, whisper)
        return utterances.speak(flow, sentences, whisper, tmp_path)

    speech = speak(features, few, pocket)
    judge = FrozenWhisper("pocket/judge.pt")
    heard = [speak(ear, few, whisper).x1[0] for whisper in (pocket, judge)]
    assert heard[0].shape == heard[1].shape and (heard[0] - heard[1]).abs().mean() > 0.1
    with pytest.raises(BadInput, match="whose features are not those of pocket/judge.pt"):
        utterances.open_source(features, few, judge)
    monkeypatch.setattr(tokens, "real_test", lambda *args: known.append(args[2]) or speech)
    monkeypatch.setattr(speech_lm, "real_test", tokens.real_test)
    made = make_set("features")
    tokens.main([ear, "--steps", "2", "--out", str(tmp_path), *text])
    tokens.main(["--quantiser", str(tmp_path / "quantiser.pt"), "--set", str(made), "--form",
                 "speechless"])
    out = capsys.readouterr().out
    assert "espeak-ng, unheard voices: " in out and f"wrote {made}/tokens: " in out
    assert re.search(r"\n  CER: .*% of the speech, .*% of its tokens\n  CER de: ", out)
    assert judged == [few, held_out] and known == [{"the dog sleeps", "die sonne scheint"}]
    with pytest.raises(BadInput, match="--seed: '9{20}' is no seed; give 0, 1, 2"):
        tokens.main([ear, "--seed", "9" * 20])
    with pytest.raises(BadInput, match="quantiser.pt is there already; --quantiser .* uses it"):
        tokens.main([ear, "--out", str(tmp_path)])
    with pytest.raises(BadInput, match="is no quantiser of pocket .'whisper'.; "):
        tokens.main([ear, "--quantiser", str(runs[0] / "mel" / "ckpt.pt"), *text])
    with pytest.raises(BadInput, match="is no quantiser of pocket/judge.pt .it is of another.; "):
        tokens.load_quantiser(tmp_path / "quantiser.pt", judge)
    with pytest.raises(BadInput, match="hears at most 20 frames, and a sentence has"):
        monkeypatch.setattr(judge, "max_frames", 20)
        speak(ear, few, judge)
    monkeypatch.setattr(make_pocket, "need_espeak", lambda: None)
    with pytest.raises(BadInput, match="espeak-ng cannot read ja; give --data in others"):
        utterances.open_source("espeak", [Sentence("ja", "犬が眠る。")], pocket)
    with pytest.raises(BadInput, match="is too long for pocket, with which .*mel was trained"):
        utterances.open_source(ear, [Sentence("en", "The dog sleeps. " * 20)], judge)
    with pytest.raises(BadInput, match="never learned it; give --data in de, en"):
        utterances.open_source(ear, [Sentence("it", "Ciao.")], pocket)
    given = ["--quantiser", str(tmp_path / "quantiser.pt")]
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="no checkpoint .*nix"):
        patch.setattr(speech_lm, "speak", None)  # before the work
        speech_lm.main([ear, str(tmp_path / "nix"), *given, *text])
    speech_lm.main([ear, features, "--quantiser", str(tmp_path / "quantiser.pt"), "--steps", "2",
                    "--chance", *text])
    out, err = capsys.readouterr()
    assert "never heard" not in err
    assert out.count("% | ") == 6 and f"| {ear}, with other texts | " in out
    assert known[-1] == {*map(letters, data.split(load_sentences(text[1:], pocket))[0])}
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", randn(24000).numpy() / 10, 16000)
    (tmp_path / "manifest.tsv").write_text("a.wav\ten\tA cat.\nb.wav\ten\tThe dog sleeps.\n")
    tested = []
    monkeypatch.setattr(speech_lm, "test", lambda *args: tested.append(args[2]) or (0, 1))
    speech_lm.main([features, "--quantiser", str(tmp_path / "quantiser.pt"), "--steps", "2",
                    "--languages", "en", "--data", "en=builtin", "--recordings", str(tmp_path)])
    assert tested[0] == ["a cat"]  # the other was learned from
    capsys.readouterr()
    tokens.main([features, "--quantiser", str(tmp_path / "quantiser.pt"), "--recordings",
                 str(tmp_path), *text])
    out, err = capsys.readouterr()
    assert "\npeople: " in out and "never heard" not in err
    tokens.note_unheard(tokens.load_quantiser(tmp_path / "quantiser.pt", pocket), held_out)
    assert "never heard fr, only de, en; what" in capsys.readouterr().err
    monkeypatch.setattr(speed, "griffin_lim", lambda mel: None)
    speed.main([features, ear, "--device", "cpu"])
    out = capsys.readouterr().out
    assert out.count("one token after the other | ") == 4 and "wav, 4 steps | 2 |" in out
    assert out.count("tokens, 1 steps | ") == 4
