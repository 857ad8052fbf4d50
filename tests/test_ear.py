"""Spectrograms: the ear, its rooms, and what they sound like."""
import math
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from whisper.audio import log_mel_spectrogram

from data import Sentence
from speech import sound
from speech.ear import MEL_STD, NEAR, ROOM, VOICE, Ear, Room, random_room
from test_roundtrip import SENTENCES, batch_of, cer_of, close, randn, sampled, spoken
from text.durations import char_durations


def test_ear_without_a_room_hears_what_whisper_hears(ear):
    sentences, mel = spoken(ear, 10)
    real, whole = cer_of(ear, ear.features_of_mel(mel), sentences), torch.full((len(mel),), 256)
    assert cer_of(ear, ear.features(ear.latents(mel), whole), sentences) < real + 0.04
    x1, frames = ear.latents(mel)[:3, :100], torch.tensor([40, 70, 100])
    behind = 9 * (torch.arange(100) >= frames[:, None])[..., None]
    for window in (100, 140, 256):
        out = ear.spectrogram(x1, frames, window)
        assert torch.equal(ear.spectrogram(x1 + behind, frames, window), out)
        for item, x, n in zip(out, x1, frames.tolist()):
            assert item.shape == (80, 2 * window) and item.min() >= item.max() - 2
            assert (item[:, 2 * n :] == item.max() - 2).all()
            close(ear.spectrogram(x[None, :n], torch.tensor([n]), window)[0], item)
    close(ear.features(x1, frames), ear.model.encoder(out))
    batch = batch_of(ear, sentences[:3])
    batch.cond["frames"], targets, middles = frames, batch.targets, batch.token_frames
    heard = ear.encode_mel(ear.spectrogram(x1, frames, 140))
    loss, nll = ear.text_loss(x1, batch)
    assert torch.equal(loss, nll)
    close(nll, ear.nll(ear.teacher_force(ear.model.encoder.ln_post(heard), targets), targets))
    rng, nothing = torch.Generator().manual_seed(0), dict.fromkeys(ROOM, 0.0)  # only a delay
    loss, nll = ear.text_loss(x1, batch, Room(1.0, rng, nothing, 2.0))
    shift = int(torch.randint(25, (), generator=rng.manual_seed(0)))
    heard = ear.encode_mel(ear.spectrogram(x1, frames, 140).roll(shift, 2))
    late = middles + (middles >= 0) * shift / 2
    assert shift > 9 and (ear.lens(heard, targets, middles) - ear.lens(
        heard, targets, late)).abs().max() > 1e-3
    close(loss, nll + 2 * nll * ear.lens(heard, targets, late))
    x = x1.clone().requires_grad_()
    loss, nll = ear.text_loss(x, batch, Room(1.0, rng.manual_seed(0), nothing, 2.0))
    heard = ear.encode_mel(ear.spectrogram(x, frames, 140).roll(shift, 2))
    expected = nll + 2 * nll.detach() * ear.lens(heard, targets, late)  # a constant factor
    close(*(torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (loss, expected)))
    losses = [ear.text_loss(x1, batch, Room(1.0, torch.Generator().manual_seed(seed)))[1]
              for seed in (0, 0, 1)]
    assert torch.equal(*losses[:2]) and (losses[0] - losses[2]).abs().max() > 0.01
    ramp = torch.linspace(-1, 1, 50)[None, :, None].expand(1, 50, 80)  # it stays one
    mel = ear.spectrogram(ramp, torch.tensor([50]), 50)[0, 0, 5:-5]
    close(mel.diff(), torch.full((89,), MEL_STD / 49))
    checks = (-1.0) ** (torch.arange(50)[:, None] + torch.arange(80))[None]
    mel = ear.spectrogram(checks, torch.tensor([50]), 50)[0, 1:-1, 5:-5]  # 3 bins, 5 hops: means
    close(mel.abs(), torch.full_like(mel, MEL_STD / 3 / 10))


def in_room(mel, seed=0, amount=1.0, **strength):
    """A log-mel in a room that has these transformations alone."""
    room = Room(amount, torch.Generator().manual_seed(seed), dict.fromkeys(ROOM, 0.0) | strength)
    return random_room(mel, room)


def some_mel(n_items=6, n=200):
    return 1.5 * torch.rand(n_items, 80, n, generator=torch.Generator().manual_seed(0)) - 0.75


@pytest.mark.parametrize("name", ROOM)
def test_each_transformation_has_its_seed_and_lets_the_gradient_pass(name):
    mel = some_mel().requires_grad_()
    close(in_room(mel, amount=0.0, **ROOM), mel)  # no room
    out, same, other = (in_room(mel, seed, **{name: ROOM[name]}) for seed in (0, 0, 1))
    assert torch.equal(out, same) and min(x.abs().max() for x in (out - mel, out - other)) > 0.05
    (out * randn(*mel.shape)).sum().backward()
    assert mel.grad.isfinite().all() and ((mel.grad != 0).float().mean((1, 2)) > 0.05).all()
    a, b = in_room(mel[:1].expand(2, -1, -1), **{name: ROOM[name]})
    assert (a - b).abs().max() > 0.01  # each item is in its own


def test_transformations_against_closed_forms():
    mel, bins = some_mel(400, 8), torch.linspace(-1, 1, 80)[:, None]
    gain, tilt, curve = (in_room(mel, **{s: 0.2}) - mel for s in ("gain", "tilt", "equaliser"))
    for x, same in ((gain, gain[:, :1, :1]), (tilt, tilt[:, -1:, :1] * bins),
                    (curve, curve[:, :, :1])):
        close(x, same.expand_as(x))  # at every time
        assert abs(x[:, -1].mean()) < 0.04 and abs(x[:, -1, 0].std() - 0.2) < 0.03
    assert (curve[:, :, 0].diff().diff().abs() > 1e-4).sum(1).max() <= 2 * 4  # six nodes
    mel, mean = some_mel(40), some_mel(40).mean((1, 2), keepdim=True)
    level = (in_room(mel, noise=0.3) - mel).std((1, 2))
    assert 0.25 < level.max() < 0.31 and level.std() > 0.05
    masked = in_room(mel, mask=0.2)
    is_masked = ((masked - mel).abs() > 1e-4).any(2)  # (B, M): one band
    edges, width = F.pad(is_masked.int(), (1, 1)).diff().abs().sum(1), is_masked.sum(1)
    assert (edges <= 2).all() and 10 < width.max() <= 0.2 * 80 and width.min() < 5
    close(masked, torch.where(is_masked[..., None], mean, mel))
    covered = in_room(mel, cover=1.0)
    floor = covered.amin((1, 2), keepdim=True)
    assert 0 < (floor - mel.amin((1, 2), keepdim=True)).min() < 0.2 and floor.std() > 0.1
    close(covered, mel.maximum(floor))
    bins, hops = torch.arange(80.0)[:, None], torch.linspace(0, 1, 200)
    longer, uneven = in_room(bins.expand(40, 80, 200), vocal_tract=0.12), in_room(
        hops.expand(40, 80, 200), tempo=0.3)
    scale = longer[:, 1:2, :1]  # of bin 1
    close(longer, (scale * bins).clamp(max=79).expand_as(longer), atol=1e-3)
    assert 0.88 < scale.min() < 0.92 and 1.08 < scale.max() < 1.12
    assert (uneven.diff() > 0).all()  # nothing is said twice or backwards
    close(uneven[:, :, [0, -1]], hops[[0, -1]].expand(40, 80, 2))
    assert 0.01 < (uneven - hops).abs().amax((1, 2)).min() and (uneven - hops).abs().max() < 0.25


def read_wav(path: Path) -> np.ndarray:
    """Samples of a 16 kHz, 16 bit file of one channel."""
    with wave.open(str(path)) as file:
        assert file.getparams()[:3] == (1, 2, 16000)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / np.float32(2**15)


def test_sound(ear, runs, tmp_path):
    """Griffin-Lim of real speech is read from the file; a file is as long as its texts."""
    sentences, mel = spoken(ear, 25)
    real, mels, wav = cer_of(ear, ear.features_of_mel(mel), sentences), [], tmp_path / "x.wav"
    for x1 in ear.latents(mel):
        sound.write_wav(wav, ear, [x1])
        assert len(read_wav(wav)) == 320 * len(x1)
        mels.append(log_mel_spectrogram(read_wav(wav), 80))
    assert cer_of(ear, ear.features_of_mel(torch.stack(mels)), sentences) < real + 0.05
    batch, alone = batch_of(ear), batch_of(ear, SENTENCES[1:2])
    x1 = ear.latents(mel)[:4, : batch.mask.shape[1]]
    one, other = (sound.another_voice(x1, batch, ear, seed, 1.0) for seed in (0, 1))
    assert all((x - y).abs().mean() > 0.1 for x, y in zip(one, other))
    close(sound.another_voice(x1[1:2], alone, ear, 0, 1.0)[0], one[1])
    assert torch.equal(sound.another_voice(x1, batch, ear, 0, 0.0), x1)
    run = runs[0] / "mel"
    f = sampled(tmp_path, run, "The old man sleeps in the garden. " * 4, "Yes.", "--wav", str(wav))
    assert len(read_wav(wav)) == 320 * f["frames"].sum() and len(f["frames"]) == 5
    assert read_wav(wav).std() > 1e-3
    voices = [sampled(tmp_path, run, "Yes.", "--wav", str(wav), "--rooms", amount, "--seed", seed)
              for amount, seed in (("0", "0"), ("1", "0"), ("1", "0"), ("1", "1"))]
    assert len(read_wav(wav)) == 320 * voices[-1]["frames"][0]
    plain, one, same, other = (v["features"] for v in voices)
    assert np.array_equal(one, same) and len({v["frames"][0] for v in voices}) == 3
    assert all(np.abs(x - y).mean() > 0.01 for x, y in ((plain, one), (one, other)))


def test_a_quiet_spectrogram_is_heard_above_no_silence_that_whisper_cannot_make(ear):
    quiet = ear.spectrogram(torch.full((1, 9, 80), -1.0), torch.tensor([9]), 20)
    assert quiet.min() == -1.5 and quiet.max() == -0.5


def test_lens_tells_tokens_apart_near_their_frames(ear):
    batch = batch_of(ear, [Sentence("en", "The dog sleeps.")])  # tokens of 3, 4, 7 and 1 letters
    frames, targets = batch.token_frames, batch.targets
    ends = np.cumsum([0, *char_durations(batch.sentences[0])])
    middles = np.interp([1.5, 5, 10.5, 14.5], range(16), ends)
    close(frames[0], torch.tensor([-1] * 4 + middles.tolist() + [-1]))
    tokens = targets[0, 4:-1]
    directions = ear.embed(tokens) @ ear.token_direction.T
    nearest = (torch.arange(int(ends[-1]))[:, None] - frames[0, 4:-1]).abs().argmin(1)
    right, wrong = directions[nearest][None], directions.roll(1, 0)[nearest][None]
    chance = torch.tensor([math.log(4)])
    close(ear.lens(torch.ones_like(right), targets, frames), chance)
    assert ear.lens(right, targets, frames) < 0.2 * chance
    assert ear.lens(wrong, targets, frames) > 2 * chance
    middles = frames[0, 4:-1].round().long()
    between = (middles[:-1] + middles[1:]) // 2
    losses = []
    for where in (middles[:3], between):  # what is heard in the middle of a token counts most
        heard = right.clone()
        heard[0, where] = 0
        losses.append(ear.lens(heard, targets, frames).item())
    assert losses[0] > losses[1] + 0.001
    two = batch_of(ear, [Sentence("en", text) for text in ("The dog sleeps.", "The dog")])
    heard, expected = randn(2, two.mask.shape[1], 128), []
    tokens = two.targets[two.token_frames >= 0].unique()
    told = {(i, j): sum(math.exp(-((t - m) / NEAR) ** 2 / 2) * x for t, x in enumerate(heard[i]))
            / sum(math.exp(-((t - m) / NEAR) ** 2 / 2) for t in range(len(heard[i])))
            for i, row in enumerate(two.token_frames.tolist()) for j, m in enumerate(row) if m >= 0}
    mean = sum(told.values()) / len(told)
    for i in range(2):
        losses = [F.cross_entropy(torch.stack([(x - mean) @ ear.token_direction @ ear.embed(token)
                                               for token in tokens]) / 128 ** 0.5,
                                  (tokens == two.targets[i, j]).nonzero()[0, 0])
                  for (item, j), x in told.items() if item == i]
        expected.append(sum(losses) / len(losses))
    close(ear.lens(heard, two.targets, two.token_frames), torch.stack(expected))
    states, silence = randn(2, two.targets.shape[1] - 1, 128), Ear("pocket").encoded_silence
    with torch.autocast("cpu", torch.bfloat16):  # not rounded
        fresh = Ear("pocket")
        close(fresh.lens(heard, two.targets, two.token_frames), torch.stack(expected))
        assert torch.equal(fresh.token_direction, ear.token_direction)
        assert torch.equal(fresh.encoded_silence, silence)
        rounded = fresh.nll(states, two.targets)
    assert torch.equal(rounded, ear.nll(states, two.targets))


def test_an_ear_begins_with_nothing_and_a_voice_covers_nothing(ear):
    assert {name for name in ROOM if not VOICE[name]} == {"cover", "mask"}
    direction, m = ear.shortcut()
    assert direction.shape == (80, 128) and m.shape == (256, 80)
    assert not direction.any() and not m.any()
