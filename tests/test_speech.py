"""Forced alignment, rhythm and recordings: `python -m pytest tests/test_speech.py`."""
import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data
import train
from data import Sentence
from plumbing import devices
from plumbing.errors import BadInput
from plumbing.weights import weights_fingerprint
from pocket.clips import spoken_clips
from speech import align, recordings, sound
from speech.align import durations_by
from speech.ear import Ear
from text.durations import char_durations
from text.sources import builtin
from whisper_decoder import FrozenWhisper

TEXTS = ["The dog sleeps in the garden.", "He drinks some cold milk.", "My mother works a lot.",
         "We walk to the old school."]  # none of them held out


@pytest.fixture(scope="module")
def spoken(pocket):
    """espeak-ng in English, Spanish, German and French -> sentences, samples."""
    sentences, mels = zip(*spoken_clips(pocket)[:161:40])
    samples = [sound.griffin_lim(mel[:, :300]).numpy() for mel in mels]
    return sentences, [x / np.abs(x).max() for x in samples]


@pytest.fixture
def folder(tmp_path, spoken):
    """Recordings of texts that nobody said in them."""
    (tmp_path / "speech").mkdir()
    for i, samples in enumerate(spoken[1]):
        soundfile.write(tmp_path / f"speech/{i}.wav", samples, 16000)
    manifest = "".join(f"{i}.wav\ten\t{text}\n" for i, text in enumerate(TEXTS))
    (tmp_path / "speech/manifest.tsv").write_text(manifest)
    return tmp_path / "speech"


def test_viterbi_finds_the_best_of_all_paths():
    rng = np.random.default_rng(0)
    for n_frames, n_symbols in itertools.product((5, 7), (1, 2, 4)):
        score = rng.normal(size=(n_frames, n_symbols))
        ways = itertools.combinations(range(1, n_frames), n_symbols - 1)
        paths = [np.searchsorted(way, np.arange(n_frames), side="right") for way in ways]
        best = max(paths, key=lambda path: score[np.arange(n_frames), path].sum())
        assert align.best_path(score).tolist() == best.tolist()


def test_letters_are_found_in_speech_that_nobody_aligned():
    places = [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert align.spoken_symbols('¡"Ah", he: l\'Été 天.. !') == ("ah he l été 天 ", places)
    one_word = align.spoken_symbols("می\u200cخواهم")
    assert one_word == ("میخواهم ", [0, 1, 3, 4, 5, 6, 7, 7])
    rng, sentences, x1, durations = np.random.default_rng(0), [], [], []
    look = {c: rng.normal(size=16) for c in "abcdefgh "}  # the same wherever a letter stands
    for i in range(60):
        text = " ".join("".join(rng.choice([*"abcdefgh"], 4, replace=False)) for _ in range(3))
        n = np.append(rng.integers(1, 9, len(text)), 10)  # a pause ends it
        x = np.repeat([look[c] for c in f"{text} "], n, axis=0)
        durations.append(n if i % 2 else np.append(n[:-2], n[-2] + 10))
        x1.append(torch.from_numpy(x + 0.1 * rng.normal(size=x.shape)).half())
        sentences.append(Sentence("en", text.capitalize() + "." * (i % 2)))
    for found, true in zip(align.align_characters(sentences, x1), durations):
        assert found.tolist() == true.tolist()
    same = [torch.ones(50, 4) + 0.01 * torch.randn(50, 4) for _ in range(9)]  # tells nothing
    for found in align.align_characters([Sentence("de", "abcd")] * 9, same):
        assert (abs(np.cumsum(found) - [10, 20, 30, 50]) < 6).all()


def test_rhythm_is_that_of_the_recordings():
    """Each letter has a duration of its own; it is longer before a g, and at the end."""
    def truth(text):
        longer = [2.0 * (text[i + 1 : i + 2] == "g") + 3.0 * (i == len(text) - 1)
                  for i in range(len(text))]
        return np.array([1 + "abcgn,".index(c) for c in text]) + longer

    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice([*"abcgn,"], 30)) for _ in range(150)]
    sentences, french = ([Sentence(code, text) for text in texts] for code in ("de", "fr"))
    rhythm = durations_by(align.fit_rhythm(
        sentences + french, [*map(truth, texts), *[np.full(30, 7)] * 150]))
    for text in ("ngnanbanagang", "cab,baganga"):
        found = rhythm(Sentence("de", text.upper()), 2.0)
        assert np.abs(2 * found - truth(text)).max() < 0.5
    assert 2 < rhythm(Sentence("de", "x" * 9))[4] < 7  # never heard: about the mean
    assert np.allclose(rhythm(Sentence("fr", "ang,c")), 7)
    other = Sentence("es", "nananga")
    assert rhythm(other).tolist() == char_durations(other).tolist()
    short = durations_by(align.fit_rhythm(sentences, [np.zeros(30)] * 150))
    assert np.allclose(short(Sentence("de", "an,")), [align.SHORTEST, align.SHORTEST, 0])
    assert not align.fit_rhythm([Sentence("de", "abc")], [np.ones(3)])["chars"]  # too little


def test_rhythm_is_ridge_regression():
    rng = np.random.default_rng(0)
    texts, y = ["".join(rng.choice([*"ab"], 20)) for _ in range(5)], rng.normal(3, 1, (5, 20))
    fields = align.fit_rhythm([Sentence("en", text) for text in texts], list(y))
    rows = np.concatenate([align.neighbours(text, fields["chars"]["en"]) for text in texts])
    x = np.concatenate([rows == k for k in range(4)], 1)
    x = np.concatenate([x, align.RIDGE**0.5 * np.eye(36)])
    best = np.linalg.lstsq(x, np.append(y.ravel() - y.mean(), np.zeros(36)), rcond=None)[0]
    best = best.reshape(4, 9).T + y.mean() * np.eye(9)[align.CONTEXT][:, None]
    assert np.allclose(fields["frames"]["en"], best, atol=1e-4)


def test_resampling_keeps_a_tone():
    for rate in (8000, 22050, 44100):
        tone, same = (np.sin(2 * np.pi * 440 * np.arange(n) / n) for n in (rate, 16000))
        assert np.allclose(recordings.resample(tone.astype("f"), rate), same, atol=1e-4)


def test_every_bad_recording_is_named(tmp_path, pocket, monkeypatch):
    for name, seconds in (("a.flac", 1.0), ("long.wav", 9.0), ("none.wav", 0.0)):
        samples = np.random.default_rng(0).normal(0, 0.1, (int(seconds * 22050), 2))
        samples[:, 0] = 0  # the other channel counts as well
        samples = np.pad(samples, ((11025 * (name == "a.flac"),), (0,)))  # in silence
        soundfile.write(tmp_path / name, samples, 22050)
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    held_out = "\t".join(data.split(builtin())[1][0])
    lines = [f"a.flac\ten\t{TEXTS[0]}", "no tab", "a.flac\txx\tunknown", "a.flac\ten\t...", "",
             "long.wav\ten\tA long one.", "none.wav\ten\tNothing.", "broken.wav\ten\tBroken.",
             "missing.wav\ten\tMissing.", f"{'Columns ' * 40}\ten\tswapped.",
             f"b.flac\ten\t{'Too fast. ' * 6}", f"c.flac\t{held_out}", "c.flac\ten\tTwice.",
             "a.flac\ten\tA dog.\tJohn"]
    for copy in ("b.flac", "c.flac"):
        shutil.copy(tmp_path / "a.flac", tmp_path / copy)
    (tmp_path / "manifest.tsv").write_text("\n".join(lines))
    found, notes = recordings.load_recordings(tmp_path, pocket)
    assert [r.sentence.text for r in found] == TEXTS[:1] and abs(len(found[0].x1) - 60) <= 2
    assert found[0].durations.sum() == len(found[0].x1) and found[0].x1.shape[1] == pocket.channels
    wrong = ["line 2: 3 fields", "line 3: pocket does not", "line 4: there is no word", "already",
             "line 14: 3 fields", "long.wav: it lasts 9.00 s", "none.wav: no sound in it",
             "broken.wav: no audio", "missing.wav: no audio", "no audio", "frames are too few",
             "1 recordings, 0.0 minutes of speech; 1 of held-out"]
    assert [w in note for w, note in zip(wrong, notes, strict=True)] == [True] * len(wrong)
    monkeypatch.setattr(recordings, "MAX_NOTES", 2)
    few = recordings.load_recordings(tmp_path, pocket)[1]
    assert few == [*notes[:2], "3 more are left out", *notes[5:7],
                   "4 more are left out", notes[-1]]
    assert notes[0].endswith("a line is path<TAB>language<TAB>text")


def test_folders_that_cannot_be_used(tmp_path, pocket):
    for wrong in ("no folder", "has no recording; add .wav .flac"):
        with pytest.raises(BadInput, match=wrong):
            recordings.load_recordings(tmp_path / "speech", pocket)
        (tmp_path / "speech").mkdir(exist_ok=True)
    (tmp_path / "speech" / "metadata.csv").touch()
    with pytest.raises(BadInput, match="metadata.csv is empty; fill it, or delete it, and pocket"):
        recordings.load_recordings(tmp_path / "speech", pocket)
    (tmp_path / "metadata.csv").write_text("LJ-1|Dr. No|Doctor No\nLJ-2|two", "utf-8")
    entries, notes = recordings.read_manifest(tmp_path, pocket)
    assert entries == [(tmp_path / "wavs/LJ-1.wav", Sentence("en", "Doctor No"))]
    assert "is read as English" in notes[0]
    assert "metadata.csv, line 2: 3 fields are expected, not 'LJ-2|two'" in notes[1]
    (tmp_path / "manifest.tsv").write_bytes("a.wav\tfr\té".encode("latin1"))
    with pytest.raises(BadInput, match="manifest.tsv is not UTF-8 .*iconv -f cp1252 "):
        recordings.read_manifest(tmp_path, pocket)


def test_recordings_are_encoded_once(folder, pocket, monkeypatch):
    encode, calls, manifest = recordings.encode, [], folder / "manifest.tsv"
    monkeypatch.setattr(recordings, "encode", lambda *a: (calls.append(0), encode(*a))[1])
    found, notes = recordings.load_recordings(folder, pocket)
    ear = recordings.load_recordings(folder, Ear("pocket"))[0]
    assert len(calls) == 8 and ear[0].x1.shape[1] == 80  # each kind has a file of its own
    again, notes_again = recordings.load_recordings(folder, pocket)
    assert len(calls) == 8 and notes == notes_again and len(again) == 4
    assert all(torch.equal(a.x1, b.x1) for a, b in zip(found, again))
    recordings.load_recordings(Path(os.path.relpath(folder)), pocket)
    assert len(calls) == 8
    soundfile.write(folder / "0.wav", soundfile.read(folder / "0.wav")[0][:30000], 16000)
    recordings.load_recordings(folder, pocket)
    assert len(calls) == 9
    manifest.write_text(manifest.read_text().replace("garden", "yard"))
    recordings.load_recordings(folder, pocket)
    assert len(calls) == 10
    align = recordings.align_characters
    monkeypatch.setattr(recordings, "align_characters", lambda *a: (calls.append(0), align(*a))[1])
    recordings.load_recordings(folder, pocket)
    assert len(calls) == 10
    monkeypatch.setattr(recordings, "STRAY", 0.1)  # who aligns otherwise aligns anew
    recordings.load_recordings(folder, pocket)
    assert len(calls) == 11
    assert recordings.speech_span(torch.ones(80, 100)) == slice(0, 50)  # up to its end
    other = FrozenWhisper("pocket")
    next(other.model.parameters()).data.mul_(1.01)
    other.fingerprint = weights_fingerprint(other.model.parameters())
    stale = next(folder.glob("encoded_FrozenWhisper_*")) / "00.pt"  # of a recording that is gone
    stale.touch()
    recordings.load_recordings(folder, pocket)
    assert not stale.exists() and len(calls) == 11
    for whisper in (other, pocket):  # each Whisper has files of its own, too
        recordings.load_recordings(folder, whisper)
        assert len(calls) == 16  # four, and their alignment
    with monkeypatch.context() as patch:
        patch.setattr(recordings, "MEL_STD", 2.0)  # the scale of an ear's latents
        recordings.load_recordings(folder, pocket)
    assert len(calls) == 21
    other.fingerprint = "as never before"
    monkeypatch.setattr(recordings, "atomic_write", lambda file: open(folder / "no" / file.name))
    assert "cannot be kept" in recordings.load_recordings(folder, other)[1][0]
    assert len(calls) == 26


def test_what_is_encoded_stays_when_a_run_is_stopped(folder, pocket, monkeypatch):
    encode, calls = recordings.encode, []

    def stop_at_the_fourth(*args):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(*args)

    whole = recordings.load_recordings(folder, pocket)
    shutil.rmtree(next(folder.glob("encoded_*")))
    monkeypatch.setattr(recordings, "encode", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        recordings.load_recordings(folder, pocket)
    found, notes = recordings.load_recordings(folder, pocket)
    assert len(calls) == 5 and notes == whole[1]  # the first three are not encoded again
    for now, before in zip(found, whole[0], strict=True):
        assert now.sentence == before.sentence and torch.equal(now.x1, before.x1)
        assert np.array_equal(now.durations, before.durations)
    manifest = folder / "manifest.tsv"
    manifest.write_text("5.wav\ten\tIt is late.\n" + manifest.read_text())
    (folder / "5.wav").write_bytes((folder / "0.wav").read_bytes()[:999])  # is being copied
    notes = recordings.load_recordings(folder, pocket)[1]
    assert len(calls) == 5 and "5.wav: it was cut short after 999 bytes" in notes[0]

    def copy_the_rest(*args):
        if (folder / "5.wav").stat().st_size == 999:
            shutil.copy(folder / "0.wav", folder / "5.wav")
        return encode(*args)

    (folder / "3.wav").touch()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Stale"):  # not of the file
        patch.setattr(os.path, "getsize", lambda _: (_ for _ in ()).throw(OSError(116, "Stale")))
        recordings.load_recordings(folder, pocket)
    monkeypatch.setattr(recordings, "encode", copy_the_rest)
    for n in 4, 5:  # it is seen by the next run, and aligned then
        found = recordings.load_recordings(folder, pocket)[0]
        assert [int(r.durations.sum()) for r in found] == [len(r.x1) for r in found]
        assert len(found) == n


def test_whisper_writes_the_text_of_what_it_understands(tmp_path, pocket, spoken):
    for i, samples in enumerate(spoken[1]):
        soundfile.write(tmp_path / f"{i}.wav", samples, 16000)
    noise = np.random.default_rng(0).normal(0, 0.01, 16000)
    soundfile.write(tmp_path / "noise.wav", noise, 16000)
    entries, _ = recordings.read_manifest(tmp_path, pocket)
    encoded = [recordings.encode_recording(*entry, pocket) for entry in entries]
    assert [x[0] for x in encoded[:-1]] == [tuple(s) for s in spoken[0]]
    assert "noise.wav: pocket is not sure" in encoded[-1][0]


def join(folder, whisper, speed=1.0, held_out=()):
    config = train.Config(speech=str(folder), steps=16, batch_size=4, speed=speed)
    shares = {Sentence("en", text): 1.0 for text in TEXTS} | {Sentence("fr", "Il dort."): 1.0}
    text = data.Batches(shares, whisper, 4, 0, speed, 1.0)
    return recordings.with_recordings(text, held_out, config)


def test_text_joins_recordings_late_and_in_their_rhythm(folder, pocket):
    steps, _, rhythm, notes = join(folder, pocket, speed=2.0)
    batches = [steps[i] for i in range(16)]
    assert [b.x1 is None for b in batches] == [False] * 13 + [True, False, True]
    assert [b.sentences for b in batches[13::2]] == [steps.text[i].sentences for i in (6, 7)]
    recorded = {r.sentence: r.x1 for r in steps.recordings}
    assert torch.allclose(steps.sums, (steps.frames.double() ** -2).cumsum(0))
    for batch in (b for b in batches if b.x1 is not None):
        for s, n, x1 in zip(batch.sentences, batch.cond["frames"].tolist(), batch.x1):
            assert n == len(recorded[s]) and torch.equal(x1[:n], recorded[s])
        second = devices.shard(batch, 1, 2)
        assert second.sentences == batch.sentences[1::2]
        assert torch.equal(second.x1, batch.x1[1::2]) and len(second.mask) == len(second.targets)
    for s, found in zip(steps.text.sentences, steps.text.durations):
        assert np.array_equal(found, durations_by(rhythm)(s, 2.0))
        assert np.array_equal(found, char_durations(s) / 2) == (s.language == "fr")
        assert found.sum() in steps.text.frames
    assert "4 recordings, 0.2 minutes of speech; 0 of held-out" in notes[-1]
    steps, *_ = join(folder, pocket, held_out=[Sentence("en", TEXTS[0])])
    assert {r.sentence.text for r in steps.recordings} == {*TEXTS[1:]}


@pytest.mark.parametrize("kind", ["features", "mel"])
def test_recordings_teach_the_flow_and_the_decoder_only_the_text(folder, kind):
    whisper = train.LATENTS[kind]("pocket", "cpu")
    steps, objective, _, _ = join(folder, whisper)
    model, rng = train.Run(train.Config(depth=2), whisper).model, torch.Generator().manual_seed(0)
    for step, is_text in ((0, False), (15, True)):
        batch, times = steps[step].to(whisper), []
        noise = train.draw_noise(batch, whisper.channels, 1.0, rng)
        hook = model.register_forward_pre_hook(lambda _, x: times.append(x[1][0].item()))
        room = whisper.room_of_step(step, 16, rng)
        loss, nll, cfm = objective(model, whisper, batch, *noise, room, 0.3)
        hook.remove()
        assert torch.isclose(loss, recordings.TEXT_WEIGHT * nll.mean() if is_text else cfm.mean())
        assert nll.isnan().all() != is_text and cfm.isnan().all() == is_text
        assert nll.shape == cfm.shape == (4,)
        assert times == ([0, 0.25, 0.5, 0.75] if is_text else [noise[1][0].item()])
        model.zero_grad()
        loss.backward()
        assert model.latent_out.weight.grad.norm() > 0
        assert (model.no_text.grad.norm() > 0) != is_text  # drop is for recordings


@pytest.mark.parametrize("kind", ["features", "mel"])
def test_training_with_recordings_goes_on_where_it_stopped(folder, tmp_path, kind, monkeypatch):
    (tmp_path / "en.txt").write_text("\n".join(TEXTS))
    flags = ["--speech", str(folder), "--data", f"en={tmp_path / 'en.txt'}", "--depth", "1",
             "--batch_size", "4", "--steps", "4", "--eval_every", "2", "--eval_sentences", "1",
             "--device", "cpu", "--latent", kind, "--out_dir", str(tmp_path / "out")]
    save, saved, ckpt = train.Run.save, [], tmp_path / "out/ckpt.pt"
    monkeypatch.setattr(train.Run, "save", lambda run, log: (
        save(run, log), saved.append(run.step),
        shutil.copy(ckpt, tmp_path / f"step{run.step}.pt")))
    train.main(flags)
    rows = [row.split(",") for row in (tmp_path / "out/log.csv").read_text().splitlines()]
    is_text = [float(row[rows[0].index("nll")]) > 0 for row in rows[1:]]
    assert is_text == [False, False, False, True]
    straight = train.load_checkpoint(ckpt)
    shutil.copy(tmp_path / "step2.pt", ckpt)
    train.main([*flags, "--resume"])
    assert saved == [2, 4, 4]
    with pytest.raises(BadInput, match="--flow_weight 0.5 does nothing with --speech"):
        train.main([*flags, "--flow_weight", "0.5"])
    resumed = train.load_checkpoint(ckpt)
    for name in ("model", "ema"):
        assert all(torch.equal(x, resumed[name][key]) for key, x in straight[name].items())
    sentence = Sentence("en", TEXTS[0])
    found = durations_by(resumed["rhythm"])(sentence)
    assert not np.allclose(found, char_durations(sentence))
