"""make_pocket.py and the studies: `python -m pytest tests/test_experiments.py`, a minute."""
import argparse
import functools
import re
import shutil
import statistics
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
import whisper as openai_whisper

import data
import flow
import sample
import train
from data import Sentence
from experiments import (
    arms, bars, benchmark, engine, lens, look, pace, prompts, realism, rooms, seeds, sphinx,
    student, sweep, two_ears, utterances,
)
from plumbing.errors import BadInput
from plumbing.files import Log
from plumbing.weights import POCKET
from pocket.clips import mel_from_bytes, spoken_clips
from speech import sound
from speech.ear import ROOM, SILENT_FRAMES, VOICE, Ear, Room
from speech.recordings import read_audio, read_manifest, speech_span
from test_roundtrip import batch_of
from text import spelling
from text.durations import LANGUAGE_ROWS, PACE, char_durations, n_frames
from text.sources import builtin
from whisper_decoder import FrozenWhisper

make_pocket = realism.make_pocket
needs_espeak = pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng is missing")
TEXTS = [Sentence("en", "The dog sleeps."), Sentence("zh", "老师在教室里吃饺子。"),
         Sentence("de", "Die Kinder möchten am Sonntag im Garten spielen.")]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """--latent -> a checkpoint that has learned nothing."""
    paths = {}
    for name, kind in train.LATENTS.items():
        config = train.Config(str(tmp_path_factory.mktemp(name)), latent=name, depth=1,
                              data=(str(POCKET / "sentences"),), max_lines=400)
        run = train.Run(config, kind("pocket"))
        run.save(Log(run.path.with_name("log.csv"), train.COLUMNS, 0))
        paths[name] = str(run.path)
    return paths


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_sentences_are_those_of_the_grammars_and_phases_follow_each_other(tmp_path, monkeypatch):
    shutil.copytree(make_pocket.HERE / "grammar", tmp_path / "grammar")
    monkeypatch.setattr(make_pocket, "HERE", tmp_path)
    monkeypatch.setattr(make_pocket, "SENTENCES", tmp_path)
    make_pocket.write_sentences()
    for path in (POCKET / "sentences").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    # Short sentences are spoken more often.
    takes = [make_pocket.takes(s) for s in sorted(builtin(400), key=n_frames)]
    assert takes == sorted(takes, reverse=True)
    assert takes[0] == make_pocket.MAX_TAKES and takes[-1] == 1
    (n, *first), (_, *second) = make_pocket.PHASES[:2]
    phases = [list(make_pocket.phase_at(step)) for step in (0, n - 1, n, make_pocket.LAST_STEP - 1)]
    assert phases == [first, first, second, list(make_pocket.PHASES[-1][1:])]
    rates = [make_pocket.rate_at(share * make_pocket.LAST_STEP) for share in (0, 0.5, 1)]
    assert np.allclose(rates, [1 / 300, 0.5, 0.01], atol=1e-6)


def test_a_byte_keeps_half_a_decibel_and_a_warp_moves_little():
    mel = 2 * torch.rand(80, 50, generator=rng()) - 1
    back = mel_from_bytes(make_pocket.quantize(mel), 70)
    assert (back[:, :50] - mel).abs().max() < 0.5 / 85 + 1e-6
    assert (back[:, 50:] == back.max() - 2).all()
    bins = np.arange(80, dtype=np.uint8)[:, None].repeat(100, 1)
    warped = [make_pocket.warp(bins, 105, rng(seed)) for seed in range(40)]
    lengths, scale = [x.shape[1] for x in warped], np.array([x[40, 50] for x in warped]) / 40
    assert 90 <= min(lengths) < 93 and max(lengths) == 105 and {len(x) for x in warped} == {80}
    assert 0.88 < scale.min() < 0.95 and 1.05 < scale.max() < 1.13


def test_small_vocabulary_is_the_full_softmax_and_its_file_loads(tmp_path, ear):
    vocabulary = make_pocket.Vocabulary(TEXTS)
    targets = ear.target_tokens([s.text for s in TEXTS], [s.language for s in TEXTS])
    rows = [vocabulary.tokens(*s) for s in TEXTS]
    assert [[t for t in row if t >= 0] for row in targets.tolist()] == rows
    model, path = make_pocket.new_model(vocabulary), tmp_path / "new.pt"
    torch.nn.init.normal_(model.decoder.token_embedding.weight, std=0.1, generator=rng())
    make_pocket.save_deflated(dict(dims=asdict(make_pocket.DIMS),
                                   model_state_dict=vocabulary.expand(model)), path)
    assert path.stat().st_size < 1e7  # the full vocabulary alone has 27 MB
    full, mel = openai_whisper.load_model(str(path), "cpu"), torch.randn(3, 80, 512)
    head = torch.nn.Linear(128, len(vocabulary.used) + 1)
    plain, corrupt, ctc = (make_pocket.loss_of(
        model, head, vocabulary, mel, vocabulary.batch(rows), *args, rng())
        for args in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.3)))
    logits = full.decoder(targets[:, :-1].clamp(min=0), full.encoder(mel))
    expected = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-1)
    torch.testing.assert_close(plain, expected)
    assert corrupt != plain
    texts = [[vocabulary.small[token] + 1 for token in row[4:-1]] for row in rows]
    log_probs = head(full.encoder(mel)).log_softmax(2).transpose(0, 1)
    expected = F.ctc_loss(log_probs, torch.tensor(sum(texts, [])), [256] * 3, [*map(len, texts)])
    torch.testing.assert_close(ctc - plain, 0.3 * expected)


def test_frozen_weights_find_words_in_real_speech(capsys, monkeypatch):
    rates = lens.main(["pocket", "--languages", "fr", "German"])
    assert list(rates) == ["fr", "de"] and min(rates.values())[0] > 0.7
    assert all(0.4 < chance < 0.6 for _, *chances in rates.values() for chance in chances)
    assert capsys.readouterr().out.startswith(
        "fr  50 clips: {:.1%}, other tokens {:.1%}, random rotations {:.1%}\nde  50 clips"
        .format(*rates["fr"]))
    whisper = FrozenWhisper("pocket")
    sentences = [Sentence("en", text) for text in ("The dog.", "The horse.", "The horse.")]
    dog, = set(whisper.tokenize("dog", "en")) - set(whisper.tokenize("horse", "en"))
    horse, = set(whisper.tokenize("horse", "en")) - {dog}
    directions = whisper.embed(torch.tensor([dog, horse])) @ whisper.token_direction.T
    inverse = torch.linalg.pinv(directions).T

    def area(*clips):  # of how much dog and horse are in each frame
        x1 = [torch.tensor(clip, dtype=torch.float) @ inverse for clip in clips]
        return lens.token_aucs(student.Speech(sentences, x1), whisper)[0]

    peak, both = [[9, 0]] + [[0, 0]] * 8, [[1, 1]] * 9
    assert area(peak, both, both) == 1  # by its highest frame, not by its mean
    assert area([[9, 9]], both, both) == 0.5 and area([[0, 1]], peak, peak) == 0
    silent = torch.zeros(9, 128)
    same = [Sentence("en", "The dog.")] * 2
    assert np.isnan(lens.token_aucs(student.Speech(same, [silent, silent]), whisper)).all()
    monkeypatch.setattr(FrozenWhisper, "token_direction", torch.randn(128, 128, generator=rng()))
    rate, *chances = lens.main(["pocket", "--languages", "de"])["de"]
    assert abs(rate - 0.5) < 0.1 and max(abs(chance - 0.5) for chance in chances) < 0.1
    with pytest.raises(BadInput, match="rooms has no texts of its recordings; give it a manifest"):
        lens.main(["pocket", "--recordings", str(POCKET.parent / "docs/samples/rooms")])


def test_an_adversary_raises_the_loss_by_a_small_smooth_change(ear):
    sentences, mels = zip(*spoken_clips(ear)[::25])
    targets = ear.target_tokens([s.text for s in sentences], [s.language for s in sentences])
    mel, size = torch.stack(mels), torch.linspace(0, 0.08, len(mels))[:, None, None]
    read = lambda mel: ear.teacher_force(ear.features_of_mel(mel), targets)  # noqa: E731
    loss = lambda mel: ear.nll(read(mel), targets).sum()  # noqa: E731
    change = make_pocket.adversary(loss, mel, size, rng()) - mel
    rms = change.square().mean((1, 2)).sqrt()
    torch.testing.assert_close(rms, size[:, 0, 0], atol=1e-4, rtol=1e-3)
    assert change.diff(dim=2).square().mean() < 0.3 * change.square().mean()  # of white noise: 2
    shuffled = change[:, torch.randperm(80, generator=rng())]
    assert loss(mel + change) > 2 * max(loss(mel - change), loss(mel + shuffled))


def test_training_picks_up_its_state(tmp_path, monkeypatch, ear):
    sentences, mels = zip(*spoken_clips(ear)[:8])
    clips, models = [make_pocket.quantize(mel) for mel in mels], []
    monkeypatch.setattr(make_pocket, "PHASES", ((2, 0.1, 0.3, 1.0, 0.08),))
    monkeypatch.setattr(make_pocket, "SILENT_SHARE", 0.5)
    vocabulary = make_pocket.Vocabulary(sentences)
    monkeypatch.setattr(make_pocket, "BATCH", 2)
    args = argparse.Namespace(work_dir=tmp_path, seed=0)
    for last in (1, 1, 2):  # one step; none; one more
        monkeypatch.setattr(make_pocket, "LAST_STEP", last)
        models.append(make_pocket.train(sentences, clips, vocabulary, args).parameters())
    once, again, twice = (torch.cat([p.flatten() for p in model]) for model in models)
    assert torch.equal(once, again) and not torch.equal(once, twice) and twice.isfinite().all()
    state, = (torch.load(file, weights_only=True) for file in tmp_path.glob("state_*.pt"))
    assert state["muon"]["param_groups"][0]["lr"] == 4e-3 * make_pocket.rate_at(1)


@needs_espeak
def test_espeak_speaks_once_and_in_the_time_there_is(tmp_path, monkeypatch):
    variants = make_pocket.VARIANTS
    one, same, other, short = (make_pocket.random_samples(TEXTS[0], variants, *args) for args in (
        (0, 10**6), (0, 10**6), (1, 10**6), (0, 14000)))
    assert np.array_equal(one, same) and len(one) != len(other) and len(short) <= 14000 < len(one)
    dash = make_pocket.random_samples(Sentence("en", "-so what."), variants, 0, 10**6)
    assert len(dash) > 8000  # said, and no option of espeak-ng
    assert make_pocket.voiceless({"zh", "ru", "nn", "ja", "xx"}) == ["ja", "xx"]
    a, b = (make_pocket.speak_all(TEXTS, variants, seed, tmp_path, "x") for seed in (0, 1))
    monkeypatch.setattr(make_pocket, "random_clip", None)
    again = make_pocket.speak_all(TEXTS, variants, 1, tmp_path, "x")
    assert all(map(np.array_equal, b, again)) and not any(map(np.array_equal, a, b))
    monkeypatch.undo()
    for file in tmp_path.glob("x_*.npz"):
        file.write_bytes(file.read_bytes()[:-99])  # a copy that broke off
    again = make_pocket.speak_all(TEXTS, variants, 1, tmp_path, "x")
    assert all(map(np.array_equal, b, again))
    text = next(text for code, *_, text in LANGUAGE_ROWS if code == "fi")
    assert abs(len(spelling.words(text, "fi")) / pace.seconds(text, "fi") / PACE["fi"] - 1) < 0.1


@pytest.mark.parametrize("sign", [".", ""])
def test_even_speech_gives_every_letter_the_same_time_and_blanks_half(monkeypatch, sign):
    sentence, n = Sentence("en", "abcd efgh ijkl" + sign), 14 + len(sign)
    lasting = np.array([1, 9, 2, 3, 2, 1, 9, 2, 3, 2, 1, 9, 2, 3, 0][:n])
    tail = torch.eye(15)[14:].repeat(utterances.TAIL, 1)  # of silence
    x1 = torch.eye(15)[:n].repeat_interleave(torch.from_numpy(lasting), dim=0)
    lasting[-1] += len(tail)  # the sign, or the last letter, has it
    monkeypatch.setattr(utterances.align, "align_characters", lambda *_: [lasting])
    speech = student.Speech([sentence], [torch.cat([x1, tail])])
    slow, fast = utterances.even(speech).x1[0], utterances.even(speech, 1.2).x1[0]
    assert torch.equal(slow[-len(tail) :], tail) and torch.equal(fast[-len(tail) :], tail)
    slow, fast = slow[: -len(tail)], fast[: -len(tail)]
    assert len(slow) == n_frames(sentence) > 42
    assert len(fast) == n_frames(sentence, 1.2) < len(slow)
    rule = char_durations(sentence)
    assert rule[4] < 0.6 * rule[0]  # a blank
    frames = rule / rule.sum() * len(slow)
    assert np.abs(np.bincount(slow.argmax(-1), minlength=n) - frames).max() <= 1


def test_even_speech_is_not_heard_backwards(monkeypatch):
    monkeypatch.setattr(utterances.align, "align_characters", lambda *_: [np.array([20, 5])])
    x1 = torch.eye(25)  # the last 10 are silence, more than the "b" lasts
    heard = utterances.even(student.Speech([Sentence("en", "ab")], [x1])).x1[0].argmax(1)
    assert heard[0] == 0 < heard[20] and (heard[: -utterances.TAIL].diff() >= 0).all()


def test_student_reads_the_best_path_whatever_its_batch():
    assert student.letters(Sentence("en", "Öl, oil!")) == "öl oil"
    assert student.letters(Sentence("zh", "吃 饺子。")) == "吃饺子"
    assert student.letters(Sentence("th", "ที่นี่ ๆ")) == "ที่นี่ๆ"  # vowels, tones
    path = F.one_hot(torch.tensor([1, 1, 0, 1, 2, 0, 0, 3]), 4)[None]  # aab, and a c too many
    speech = student.Speech([Sentence("en", "Aab.")], [torch.zeros(8, 1)])
    assert student.student_cer(lambda *_: path, speech, {"a": 1, "b": 2, "c": 3}) == 1 / 3
    speech = speech._replace(x1=[torch.zeros(7, 1)])  # it was trained on no more outputs than 7
    assert student.student_cer(lambda *_: path, speech, {"a": 1, "b": 2, "c": 3}) == 0
    network, texts = student.Student(5, 3).eval(), [torch.tensor([1, 1, 2]), torch.tensor([3])]
    x1, nats = [torch.randn(n, 5, generator=rng(n)) for n in (12, 30)], []
    for x, text in zip(x1, texts):
        log_probs = network(x[None], torch.tensor([len(x)]))[0]
        nats.append(F.ctc_loss(log_probs, text, torch.tensor(len(x)), torch.tensor(len(text))))
    torch.testing.assert_close(student.student_loss(network, x1, texts), sum(nats) / 2)


def test_no_sentence_is_both_learned_and_set_aside(monkeypatch):
    sentences, learned, aside = [Sentence("en", "ab" * n) for n in range(1, 21)] * 2, set(), set()
    x1 = [torch.randn(2 * len(s.text), 3, generator=rng(n)) for n, s in enumerate(sentences)]
    text_of, vary, loss = {id(x): s.text for x, s in zip(x1, sentences)}, student.vary, \
        student.student_loss
    monkeypatch.setattr(student, "vary",
                        lambda x, rng: (learned.add(text_of[id(x)]), vary(x, rng))[1])
    monkeypatch.setattr(student, "student_loss", lambda network, x1, texts: (
        aside.update(text_of.get(id(x)) for x in x1), loss(network, x1, texts))[1])
    student.train_student(student.Speech(sentences, x1), {"a": 1, "b": 2}, 0, 20)
    aside.discard(None)  # varied ones
    assert len(aside) == 2 and len(learned) == 18 and not aside & learned


def test_another_take_has_another_voice_and_pace(checkpoints, ear, monkeypatch):
    checkpoint = train.load_checkpoint(utterances.Path(checkpoints["mel"]))
    spoken = sample.load_flow(checkpoint, ear.device)
    (_, frames), (moved, paced), (again, _) = (
        next(utterances.latents(spoken, TEXTS, flow.Solver(1), rooms)) for rooms in (0.0, 1.0, 1.0))
    assert torch.equal(moved, again) and frames.tolist() != paced.tolist()
    assert frames.tolist() == [n_frames(s) for s in TEXTS]
    assert sound.pace(TEXTS[0], 9.5, 2, 1.0) == 10  # the fastest that is possible
    paces = [sound.pace(TEXTS[0], 1.0, n, 1.0) for n in range(50)]
    assert 0.8 <= min(paces) < 0.85 and 1.2 < max(paces) <= 1.25
    tracts = [torch.rand((), generator=data.sentence_generator(TEXTS[0], n)) for n in range(50)]
    assert abs(np.corrcoef(paces, tracts)[0, 1]) < 0.4  # see ear.random_room: its first number
    seeds, room = [], sound.random_room
    monkeypatch.setattr(sound, "random_room", lambda mel, r: (
        seeds.append(r.rng.initial_seed()), room(mel, r))[1])
    next(utterances.latents(spoken, TEXTS, flow.Solver(1), 1.0))
    noise = [data.sentence_generator(s, 0).initial_seed() for s in TEXTS]
    assert len({*seeds}) == len(TEXTS) and not {*seeds} & {*noise}


@pytest.mark.parametrize("latent", train.LATENTS)
def test_made_speech_has_as_much_silence_behind_as_real_speech(checkpoints, latent):
    checkpoint = train.load_checkpoint(utterances.Path(checkpoints[latent]))
    spoken = sample.load_flow(checkpoint, torch.device("cpu"))
    how, frames = (TEXTS, flow.Solver(1)), [n_frames(s) for s in TEXTS]
    made, tail = utterances.generate(spoken, *how).x1, utterances.TAIL
    assert [len(x) for x in made] == [n + tail for n in frames]
    critic = spoken.critic
    x1, lengths = next(utterances.latents(spoken, *how))
    if latent == "mel":
        window = x1.shape[1] + SILENT_FRAMES
        whole = critic.encode_mel(critic.spectrogram(x1, lengths, window))
    else:
        seen = torch.arange(critic.max_frames) < lengths[:, None]
        whole = F.pad(x1, (0, 0, 0, critic.max_frames - x1.shape[1]))
        whole = torch.where(seen[..., None], whole, critic.encoded_silence)
    for x, n, y in zip(made, frames, whole):
        torch.testing.assert_close(x, y[: n + tail], rtol=1e-4, atol=1e-4)
    long = [Sentence("en", "a" * critic.max_frames)]  # its window ends
    assert [len(x) for x in utterances.generate(spoken, long, *how[1:]).x1] == [critic.max_frames]
    paced = spoken._replace(durations=lambda s, speed: char_durations(s, speed))  # recordings'
    assert [len(x) for x in utterances.generate(paced, *how).x1] == frames


def test_critic_and_judge_read_the_same_sentences_that_both_can_hear(checkpoints, tmp_path):
    spoken = sample.load_flow(train.load_checkpoint(utterances.Path(checkpoints["mel"])),
                              torch.device("cpu"))
    judge, brief = (SimpleNamespace(languages=["en", "de"], max_frames=n) for n in (
        spoken.critic.max_frames, n_frames(TEXTS[0])))
    study = SimpleNamespace(held_out=TEXTS)
    readable = functools.partial(realism.Study.readable, study, spoken)
    assert readable(dict(critic=spoken.critic)) == TEXTS
    assert readable(dict(critic=spoken.critic, judge=judge)) == [TEXTS[0], TEXTS[2]]
    assert readable(dict(critic=spoken.critic, judge=brief)) == TEXTS[:1]


def test_a_voice_changes_the_speech_of_espeak_and_cleans_the_silence(ear, monkeypatch):
    sentence, mel = spoken_clips(ear)[0]
    monkeypatch.setattr(utterances, "plain_espeak", lambda *_: [mel])
    say = functools.partial(utterances.espeak, [sentence], None, 0, ear, None)
    (plain,), (moved,), n = say(), say(1.0), 2 * speech_span(mel).stop
    n -= 2 * utterances.TAIL
    assert torch.equal(plain, mel) and moved.shape == mel.shape
    floor = max(moved[:, :n].max().item() - 2, -1.5)  # clean silence, also in the tail
    assert (moved[:, n:] == floor).all() and (moved[:, n - 1] > floor).any()
    assert (moved - mel)[:, :n].abs().mean() > 0.05


def test_espeak_has_the_accents_of_the_people(ear, monkeypatch):
    said, official = [], SimpleNamespace(dims=SimpleNamespace(n_mels=80), max_frames=1500,
                                     n_samples=480000)
    monkeypatch.setattr(make_pocket, "random_samples", lambda sentence, **_: (
        said.append(sentence), np.zeros(160))[1])
    sentences = [Sentence("en", "Yes."), Sentence("es", "Sí."), Sentence("fr", "Oui.")]
    monkeypatch.setattr(utterances, "log_mel", lambda samples, whisper: [torch.zeros(80, 3000)])
    assert len([*utterances.plain_espeak(sentences, ["m1"], 0, official, None, official)]) == 3
    assert [make_pocket.voice_of(s.language) for s in said] == ["en-us", "es-419", "fr"]
    critics = []  # whose voices are chosen, whoever hears them
    monkeypatch.setattr(utterances, "plain_espeak", lambda *args: critics.append(args[-1]) or [])
    monkeypatch.setattr(realism, "encode", lambda mels, whisper: [*mels])
    study = SimpleNamespace(hears=official, whisper="critic", args=SimpleNamespace(work_dir=None))
    realism.Study.say(study, sentences, 0)
    realism.Study.real_readings(study, sentences, ear)
    assert [*utterances.espeak(sentences, None, 0, official, None)] == []
    assert critics == ["critic", "critic", official]


def test_hiss_of_espeak_is_as_smooth_as_the_flows(checkpoints, ear, monkeypatch):
    monkeypatch.setattr(sound, "VOICE", dict.fromkeys(VOICE, 0.0) | dict(noise=1.0))
    flat = torch.zeros(80, 2 * ear.max_frames)
    flat[:, 200:] = -1.5
    monkeypatch.setattr(utterances, "plain_espeak", lambda *_: [flat])
    moved, = utterances.espeak([TEXTS[0]], None, -utterances.FIRST_SEED, ear, None, 1.0)
    x1 = torch.zeros(1, 100, 80)
    batch = data.make_batch(TEXTS[:1], ear, [np.full(n := len(TEXTS[0].text), 100 / n)])
    x1 = sound.another_voice(x1, batch, ear, 0, 1.0)
    made = ear.spectrogram(x1, torch.tensor([100]), 100)[0]
    inside = slice(10, 190)
    torch.testing.assert_close(moved[:, inside].std(), made[:, inside].std(), rtol=0.1, atol=0)


def test_people_are_heard_where_the_text_is_new_and_has_no_digits(tmp_path, ear, capsys):
    seconds = {"A new one.": 1.5, "It has 2 digits.": 1.5, "It is short.": 0.5,
               "It is known.": 1.5, "It is long.": 6.0, "It is no sound.": 0.0}
    for text, n in seconds.items():
        soundfile.write(tmp_path / f"{text}wav", np.sin(np.arange(16000 * n) / 9), 16000)
    manifest = "".join(f"{text}wav\ten\t{text}\n" for text in seconds)
    (tmp_path / "manifest.tsv").write_text(manifest)
    found = utterances.people(tmp_path, {"en"}, {"it is known"}, ear)
    assert [s.text for s in found.sentences] == ["A new one."] and 84 <= len(found.x1[0]) <= 87
    err = capsys.readouterr().err
    assert "It is no sound.wav: no sound in it\n" in err and "\n1 clips of " in err
    names = [f"{text}wav" for text in seconds if seconds[text] > 1]
    texts = ["de\tEins.", *(f"en\tNumber {c}." for c in "abc"), "de\tEins."]
    lines = [f"{name}\t{text}\n" for name, text in zip([*names, "missing.wav"], texts)]
    (tmp_path / "manifest.tsv").write_text("".join(lines))
    clips = utterances.human_clips(tmp_path, ear, {"en", "de", "fr"}, 4)
    assert sorted(s.language for s, _ in clips) == ["de", "en", "en"]  # no text goes with its clip
    few = utterances.human_clips(tmp_path, ear, {"en", "de", "fr"}, 2)
    assert sorted(s.language for s, _ in few) == ["de", "en"]  # as many of each


def test_prompts_of_a_clone_are_a_file_for_training(tmp_path, capsys):
    for name, text in {"Norwegian (Bokmål, Norway)_nb-NO/1.txt": "1\tHei.\n2\tHei.\n\n",
                       "Chinese (Cantonese)_zh-HK/1.txt": "\ufeff你好。\n", "Test_test/1.txt": "x",
                       "English (UK)_en-GB/2.txt": f"4\tCafe\u0301 12.\n{'a' * 200}\nNo\n",
                       "English (USA)_en-US/1.txt": f"No\n5\t{'b ' * 31}\n"}.items():
        (file := tmp_path / "clone/prompts" / name).parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")

    def written(*flags):
        prompts.main([str(tmp_path / "clone"), "--out", str(tmp_path / "p.tsv"), *flags])
        return (tmp_path / "p.tsv").read_text("utf-8").splitlines()

    long = "en\t" + " ".join("b" * 31)
    assert written() == ["en\tCafé 12.", "en\tNo", long, "no\tHei.", "yue\t你好。"]
    assert "5 prompts in 3 languages" in capsys.readouterr().out
    assert written("--languages", "en") == ["en\tCafé 12.", "en\tNo", long]
    assert written("--short") == ["en\tNo", long, "no\tHei.", "yue\t你好。"]
    with pytest.raises(BadInput, match="no prompts are in xx; there are en, no, yue"):
        written("--languages", "xx")
    file.write_bytes("1\tcafé".encode("latin-1"))
    with pytest.raises(BadInput, match=f"{file.name} is not UTF-8 .*; fetch the clone again"):
        prompts.main([str(tmp_path / "clone")])
    with pytest.raises(BadInput, match="has no prompts/LANGUAGE_xx-YY"):
        prompts.main([str(tmp_path)])


def table(folder, *flags):
    few = "--seeds 0 --sentences 50 --read 2 --steps 2".split()
    return realism.main([*few, "--work_dir", str(folder), "--out", str(folder / "t"), *flags])


def test_table_has_a_row_for_each_checkpoint(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(realism, "N_WAV", 1)
    flags = "--no-real --judge pocket --rooms 1".split()
    figures, = table(tmp_path, checkpoints["mel"], *flags)[checkpoints["mel"]]
    assert list(figures) == ["critic", "critic_language", "critic_wav", "judge", "judge_language",
                             "judge_wav", "student", "own", "steps"]
    assert figures["critic"] == figures["judge"] and figures["critic_wav"] == figures["judge_wav"]
    assert (tmp_path / "t.md").read_text() in capsys.readouterr().out
    rows = realism.markdown({"a": [dict(critic=0.1), dict(critic=0.2)], "b": [dict(steps=9)]})
    assert rows.splitlines()[2:] == ["| a | 15.0% ± 7.1% |  |", "| b |  | 9 |"]
    learned, tested, real = [], [], realism.real_test
    monkeypatch.setattr(realism, "train_student", lambda speech, *rest: (
        learned.append(speech), student.train_student(speech, *rest))[1])
    monkeypatch.setattr(realism, "real_test", lambda whisper, *rest: (
        tested.append(whisper.fingerprint), real(whisper, *rest))[1])
    judge = FrozenWhisper(str(POCKET / "judge.pt"))
    table(tmp_path, checkpoints["mel"], "--no-real", "--hears", judge.name)
    spoken = sample.load_flow(train.load_checkpoint(utterances.Path(checkpoints["mel"])),
                              torch.device("cpu"))
    assert {*tested} == {judge.fingerprint}  # by the encoder with which students learn
    how = learned[0].sentences, flow.Solver()
    expected, others = (utterances.generate(spoken, *how, hears=hears) for hears in (judge, None))
    for x, same, other in zip(learned[0].x1, expected.x1, others.x1):
        torch.testing.assert_close(x, same, rtol=1e-3, atol=1e-3)
        assert (x - other).abs().mean() > 0.1
    after = student.others([*TEXTS, Sentence("en", "No."), Sentence("en", "Yes.")])
    assert [s.text[:3] for s in after] == ["No.", TEXTS[1].text[:3], "Die", "Yes", "The"]


@pytest.mark.slow
@needs_espeak
def test_table_has_rows_of_real_speech_and_of_other_texts(checkpoints, tmp_path, monkeypatch):
    learned, learn = [], realism.train_student
    monkeypatch.setattr(realism, "train_student", lambda speech, *rest: (
        learned.append(speech), learn(speech, *rest))[1])
    texts = [f"The {noun} is here." for noun in ("boat", "tree", "goat", "shirt")]
    for text in texts:
        samples = make_pocket.random_samples(Sentence("en", text), ["m8"], 0, 16000 * 5)
        soundfile.write(tmp_path / f"{text}wav", samples, 16000)
    manifest = "".join(f"{text}wav\ten\t{text}\n" for text in texts)
    (tmp_path / "manifest.tsv").write_text(manifest)
    rows = table(tmp_path, path := checkpoints["features"], "--steps", "300", "--recordings",
                 str(tmp_path))
    assert list(rows) == ["espeak-ng", "espeak-ng, letters equally long", path,
                          f"{path}, with other texts"]
    assert learned[3].x1 is learned[2].x1  # of other texts
    assert learned[3].sentences == student.others(learned[2].sentences) != learned[2].sentences
    real, made = rows["espeak-ng"][0], rows[path][0]
    assert list(real) == list(made) and set(made) == set(realism.COLUMNS) - {
        "critic_wav", "judge_wav"}
    assert real["critic"] < 0.1 < made["critic"]
    # Another decoder does not even understand the features of real speech.
    assert real["critic_language"] == 1 and real["judge_language"] < 0.9 and real["judge"] > 0.5
    assert real["student"] + 0.1 < made["student"]  # who learned from what


def test_minutes_of_speech_are_recordings_that_train_reads(pocket, tmp_path, monkeypatch):
    samples, sentences = np.full(800, 0.5, "f4"), arms.choose(1)
    monkeypatch.setattr(make_pocket, "random_samples", lambda *_, **__: samples)
    arms.write_speech(tmp_path, sentences)
    entries, notes = read_manifest(tmp_path, pocket)
    assert [sentence for _, sentence in entries] == sentences and not notes
    assert all(len(read_audio(path)) == 800 for path, _ in entries[:3])


def test_mistakes_are_told_in_one_sentence(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "write_speech", None)  # before the work
    for latent, flags, words in (
            ("features", "--rooms 1", "--rooms 1.0 cannot"), ("mel", "--sentences 9", "too few"),
            ("features", "--hears pocket", "--hears pocket cannot hear features"),
            ("mel", "--seeds 0 0", "some seeds are given twice"),
            ("mel", "--recordings nowhere", "no folder nowhere")):
        with pytest.raises(BadInput, match=words):
            table(tmp_path, checkpoints[latent], *flags.split())
    for study, argv, words in ((look, [checkpoints["mel"], "--language", "it"], "does not know"),
                               (seeds, ["0", "x"], "give at least two seeds"),
                               (rooms, ["echo alone"], "no row echo alone"),
                               (two_ears, ["x", "--latent=features"], "leave out --latent"),
                               (arms, ["flow-8"], "flow-8 cannot be used; give some of flow-1,"),
                               (arms, ["flow-7", "--out_dir=x"], "leave out --speech, --out_dir"),
                               (arms, ["flow-7", "--step", "5"], "unrecognized arguments: --step")):
        with pytest.raises(BadInput, match=words):
            study.main(argv)


def test_gradient_alone_makes_spectrograms_that_are_read(tmp_path, monkeypatch):
    (tmp_path / "en.txt").write_text("\n".join(s.text for s in builtin(400) if s.language == "en"))
    monkeypatch.setattr(rooms, "LONGEST", 2.0)
    flags = "--judge pocket --sentences 2 --steps 60".split()
    flags += ["--data", str(tmp_path)]
    (critic, judge), = rooms.main(["no room", *flags]).values()
    assert critic == judge < 0.1  # the same Whisper
    assert list(rooms.rows(["mask alone", "all"])) == ["mask alone", "all"]
    strengths = rooms.rows([])
    assert len(strengths) == 2 + 2 * len(ROOM) and not any(strengths["no room"].values())
    assert strengths["mask alone"] == strengths["no room"] | dict(mask=ROOM["mask"])


def test_seeds_have_a_mean_and_a_spread(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(train, "main", lambda argv: (
        calls.append(argv), dict(cer=float(argv[-3]) ** 2, steps=5, peak_memory_gb=2.0))[1])
    seeds.main(["1", "2", "5", "--steps", "9"])
    assert calls[1] == ["--steps", "9", "--seed", "2", "--out_dir", "out/seed2"]
    spread = statistics.stdev([1, 4, 25])
    assert capsys.readouterr().out.splitlines()[2:] == [f"| cer | 10.0000 | {spread:.4f} |"]


@pytest.mark.parametrize("latent", train.LATENTS)
def test_sweep_benchmark_and_look_give_their_tables_and_picture(
        latent, checkpoints, tmp_path, monkeypatch, capsys):
    kind, values = (("speed", ["0.5", "2"]) if latent == "features" else
                    ("judge", ["pocket", "pocket/judge.pt"]))
    sweep.main([kind, *values, "--sentences", "5", "--checkpoints", *[checkpoints[latent]] * 2])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"| {kind} | {values[0]} | {values[1]} |"
    _, first, second = lines[2].split(" | ")
    assert lines[2].count(" ± 0.00%") == 2 and first != second.removesuffix(" |")
    for wrong in (["steps", "0"], ["method", "rk4"], ["guidance", "nan"],
                  ["seconds", "6-3"], ["seconds", "3"], ["speed", "1", "--sentences", "0"]):
        with pytest.raises(BadInput, match=wrong[0] if len(wrong) == 2 else "--sentences: .0."):
            sweep.main(wrong + ["--checkpoints", checkpoints[latent]])
    others = train.load_checkpoint(Path(checkpoints[latent]))
    others["config"]["max_lines"] += 1
    torch.save(others, tmp_path / "others.pt")
    with pytest.raises(BadInput, match="differ in --data or --max_lines or --speech or --speed "):
        sweep.main(["steps", "1", "--checkpoints", checkpoints[latent], f"{tmp_path}/others.pt"])
    with pytest.raises(BadInput, match="no held-out sentence can be heard at all of speed .0.1"):
        sweep.main(["speed", "0.1", "--sentences", "5", "--checkpoints", checkpoints[latent]])
    chosen = []
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "greedy_cer", lambda _, sentences, __: chosen.append(sentences) or 0.0)
        sweep.main(["speed", "2", "0.5", "--checkpoints", checkpoints[latent]])
        assert chosen.pop() == chosen.pop()  # those that fit at the slower one
        sweep.main(["seconds", "0-1", "1-2", "--checkpoints", checkpoints[latent]])
    assert [{n_frames(s) // 50 for s in part} for part in chosen] == [{0}, {1}]
    out = capsys.readouterr().out
    assert out.endswith(f"\n| sentences | {len(chosen[0])} | {len(chosen[1])} |\n")
    for wrong in ("--steps", "--batch_size"):
        with pytest.raises(BadInput, match=f"{wrong}: '0' is no whole number of at least 1"):
            benchmark.main(["train", "tiny", wrong, "0"])
    for wrong in ("depth", "warmup", "languages"):
        with pytest.raises(BadInput, match=f"--{wrong} .*-1.* cannot be used; at least 0"):
            benchmark.main(["memory", f"--{wrong}", "-1"])
    benchmark.main(["memory"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split(" | ")[1:5:3] == ["12", "37 M"]
    assert len(lines) == 2 + len(benchmark.SHAPES)
    benchmark.main(["memory", "base", "--depth", "8", "--latent", "mel"])
    assert [x.split(" | ")[:3] for x in capsys.readouterr().out.splitlines()[2:]] == [
        ["| base", "8", "256"]]
    monkeypatch.setitem(benchmark.SHAPES, "tiny", (80, 64, 2, 1, 1, 51865))
    for code in ("de", "en"):
        lines = (POCKET / "sentences" / f"{code}.txt").read_text("utf-8").splitlines()[:400]
        (tmp_path / f"{code}.txt").write_text("\n".join(lines), "utf-8")
    args = argparse.Namespace(device="cpu", latent=latent, depth=0, data=[str(tmp_path)], steps=1,
                              warmup=1, batch_size=[4], words=["3-4"], languages=[2])
    benchmark.measure_training("tiny", False, args)
    assert re.match(r"\| tiny \| 2 \| .* \| 4 \| 3-4 \| \d\.\d \| 2 \|", capsys.readouterr().out)
    kinds, args.words = [], ["all"]  # the batches of train.py
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "MixedBatches", lambda *args: (
            kinds.append("long"), benchmark.data.Batches(*args))[1])
        benchmark.measure_training("tiny", False, args)
    assert kinds == ["long"] and "| all |" in capsys.readouterr().out
    sentences = [("de", "a b"), ("en", "a b c"), ("de", "a b c"), ("de", "a b c d")]
    sentences = [data.Sentence(*s) for s in sentences]
    assert benchmark.choose(sentences, "3-3", 1) == sentences[2:3]
    for wrong in ("3", "9-9"):
        with pytest.raises(BadInput, match=wrong):
            benchmark.choose(sentences, wrong, 0)
    look.main([checkpoints[latent], "--out", str(tmp_path / "flow.png")])
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_differ_and_have_folders_of_their_own():
    for wrong in (["3", "03"], ["0", "1", "--seed", "5"], ["0", "1", "--out_dir=mine"]):
        with pytest.raises(BadInput, match="each seed is given once"):
            seeds.main(wrong)


def test_bars_show_every_language(tmp_path):
    result = tmp_path / "result.txt"
    result.write_text("steps: 3\nval_cer_1step_en: 0.2\nval_cer_4step_fr: 0.5\n"
                      "val_cer_4step: 0.3\nval_cer_4step_en: 0.1\n")
    assert bars.rates_of(result.read_text()) == {"en": 10, "fr": 50}
    bars.main([str(result), "--out", str(tmp_path / "bars.png")])
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "none").write_text("steps: 3\nval_cer_4step_en: 0.x\n")
    with pytest.raises(BadInput, match="none has no error rates; give the result.txt of train.py"):
        bars.main([str(tmp_path / "none")])
    with pytest.raises(BadInput, match="bars.xyz cannot be drawn .*; give a .png"):
        bars.main([str(result), "--out", str(tmp_path / "bars.xyz")])


@pytest.mark.skipif(not engine.ctranslate2, reason="CTranslate2 is not installed")
def test_another_engine_reads_the_same(ear, tmp_path):
    clips = spoken_clips(ear)[::25]
    x1 = ear.latents(torch.stack([mel for _, mel in clips]))
    features = ear.features(x1, torch.full((len(x1),), ear.max_frames))
    read = ear.transcribe(features, [sentence.language for sentence, _ in clips])
    trips = [train.RoundTrip(sentence, *parts)
             for (sentence, _), *parts in zip(clips, x1, features, read)]
    model, texts = engine.convert(ear, str(tmp_path)), [trip.read.text for trip in trips]
    silent = [trip._replace(features=ear.silence, x1=trip.x1[:1]) for trip in trips]
    for critic in (ear, FrozenWhisper("pocket")):  # its encoder and decoder, its decoder alone
        assert engine.transcribe(model, critic, trips) == texts
        assert engine.transcribe(model, critic, silent) != texts


def test_people_are_an_upper_bound(ear, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 24000), 16000)
    (tmp_path / "manifest.tsv").write_text("a.wav\ten\tThe dog sleeps.\n")
    trips = engine.people(tmp_path, ear, {"en"}, 5)
    with pytest.raises(BadInput, match="no usable clip: 1 to 12 seconds in de, no digits, "):
        engine.people(tmp_path, ear, {"de"}, 5)
    assert trips[0].sentence == TEXTS[0] and trips[0].features.shape == (ear.max_frames, 128)
    heard = ear.spectrogram(trips[0].x1[None], torch.tensor([ear.max_frames]), ear.max_frames)
    torch.testing.assert_close(trips[0].features, ear.features_of_mel(heard)[0])  # as transcribe's
    engine.compare("people", trips, [trip.read.text for trip in trips])
    out = capsys.readouterr().out
    assert "people, CTranslate2: CER" in out and "letter by letter the same: 100.0%" in out


def test_two_ears_hear_in_turn(ear, tmp_path, monkeypatch):
    both, other = two_ears.TwoEars("pocket"), Ear(str(POCKET / "judge.pt"))
    both.other, room = other, Room(0.0, rng())
    batches = [batch_of(critic, TEXTS) for critic in (ear, other)]
    x1 = torch.randn(*batches[0].mask.shape, 80, generator=rng())
    targets = batches[1].targets.roll(1, 0)  # of the other's tokenizer
    monkeypatch.setattr(other, "target_tokens", lambda *_: targets)
    first = ear.text_loss(x1, batches[0])[1]
    second = other.text_loss(x1, batches[1]._replace(targets=targets))[1]
    assert (first - second).abs().max() > 0.1
    heard = [both.text_loss(x1, batches[0], room)[1] for _ in range(12)]
    n_second = sum(torch.equal(nll, second) for nll in heard)
    assert 2 < n_second < 10 and sum(torch.equal(nll, first) for nll in heard) == 12 - n_second
    alone = [None, *(Room(0.0, rng(seed), lens_weight=1.0) for seed in range(9))]
    assert all(torch.equal(both.text_loss(x1, batches[0], room)[1], first) for room in alone)
    flags = ["--data", "en=builtin", "--steps", "2", "--batch_size", "4", "--eval_sentences", "2"]
    result = two_ears.main([other.name, *flags, "--out_dir", str(tmp_path)])
    assert result["steps"] == 2 and train.LATENTS["mel"] is Ear
    assert train.load_checkpoint(tmp_path)["config"]["latent"] == "mel"
    for *shape, words in (
            (128, 256, "x has 128 mel bins and 256 frames, the critic 80 and 256; give one"),
            (80, 255, "x has 80 mel bins and 255 frames, the critic 80 and 256; give one"),
            (80, 1500, "does not know the language 'en'; it knows de$")):
        fake = SimpleNamespace(dims=SimpleNamespace(n_mels=shape[0]), max_frames=shape[1],
                               languages=["de"])
        monkeypatch.setattr(two_ears, "Ear", lambda *_: fake)
        with pytest.raises(BadInput, match=words):
            two_ears.main(["x", *flags, "--out_dir", str(tmp_path / "new")])
    assert train.LATENTS["mel"] is Ear


def test_a_recogniser_that_is_no_whisper(runs, checkpoints, tmp_path, ear, monkeypatch, capsys):
    heard, mel, features = [], *(str(runs[0] / name) for name in ("mel", "features"))

    class Decoder:  # it writes the same in every other sound, else nothing
        end_utt = staticmethod(lambda: None)
        known = []  # whether it still knows the sound before

        def reinit_feat(self):
            self.known.append(False)

        def start_utt(self):
            assert not self.known[-1]
            self.known.append(True)

        def __init__(self, **flags):
            assert flags["samprate"] == 16000

        def process_raw(self, raw, full_utt):
            heard.append(np.frombuffer(raw, "<i2").astype(int))

        def hyp(self):
            return SimpleNamespace(hypstr="the dog") if len(heard) % 2 else None

    clips = spoken_clips(ear)[:2]
    monkeypatch.setattr(sphinx, "Decoder", Decoder)
    monkeypatch.setattr(sphinx, "check_espeak", lambda _: None)
    monkeypatch.setattr(sphinx, "espeak", lambda sentences, *_: (clips[0][1] for _ in sentences))
    monkeypatch.setattr(sphinx, "human_clips", lambda *_: clips)
    asked = []  # of espeak-ng: language, variant, speed

    def speak(sentence, variant, speed, pitch):
        asked.append((sentence.language, variant, speed))
        return np.full(ear.n_samples + 180 - speed, 0.1, np.float32)  # at 175 too long

    monkeypatch.setattr(sphinx.make_pocket, "speak", speak)
    flags = ["--sentences", "4", "--recordings", "people", "--work_dir", str(tmp_path)]
    sphinx.main([mel, *flags, "--data", "en=builtin"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| espeak-ng", "| espeak-ng, 22 voices",
                                                    "| people", f"| {mel}"]
    assert [row.split(" | ")[-1] for row in rows] == ["4 |", "4 |", "2 |", "4 |"]
    assert asked == 4 * [("en-us", "", 175), ("en-us", "", 190)]
    spans = [speech_span(mel) for _, mel in clips]
    assert [len(x) for x in heard[8:10]] == [
        320 * (span.stop - utterances.TAIL - span.start) + 6400 for span in spans]
    assert next(sphinx.spoken([torch.ones(80, 90)])).shape == (80, 90)  # up to the window's end
    assert 15000 < abs(heard[8]).max() < 17000 and 0 < abs(heard[8][:3000]).max() < 300
    sentences = [Sentence("en", text) for text in ("The dog!", "A cat.", "Dogs")]
    cer, low, high = sphinx.rates(sentences, ["the dog", "a bat", ""])
    assert cer == 5 / 16 and low < cer < high == 1
    assert not sphinx.rates(sentences, ["THE DOG.", "a cat", "dogs"]).any()
    for argv, words in (([features, *flags], "features, which have no sound"),
                        ([mel, "--sentences", "1"], "--sentences 1 are too few"),
                        ([mel, "--data", "de=builtin"], "knows English alone"),
                        ([mel, checkpoints["mel"], *flags], "never learned en")):
        with pytest.raises(BadInput, match=words):
            sphinx.main(argv)
    monkeypatch.setattr(sphinx, "Decoder", None)
    with pytest.raises(BadInput, match="not installed; `pip install pocketsphinx`"):
        sphinx.main([mel])
