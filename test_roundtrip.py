"""Tests: text comes back through the frozen Whisper; closed forms, known equations, bad input.

    python -m pytest -q               # minutes; these and those in tests/
    python -m pytest -q -m slow       # the ear learns four sentences; official widths
"""
import functools
import io
import itertools
import math
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import whisper as openai_whisper
from whisper.decoding import DecodingOptions
from whisper.model import ModelDimensions, Whisper

import data
import flow
import sample
import train
from data import Sentence
from flow import Solver
from model import REACH, DiT, DiTConfig
from plumbing.errors import BadInput
from pocket.clips import spoken_clips
from speech.ear import Ear, Room
from text.durations import char_durations
from text.error_rates import error_rates
from whisper_decoder import FrozenWhisper

ROOT = Path(train.__file__).parent
SENTENCES = [Sentence("en", "The dog sleeps."), Sentence("zh", "老师在教室里吃饺子。"),
             Sentence("de", "Die Kinder möchten am Sonntag im Garten spielen."),
             Sentence("es", "¿Dónde está tu chaqueta?")]
FLAGS = ("--device cpu --steps 6 --batch_size 4 --depth 1 --eval_every 2 --eval_sentences 5 "
         f"--data {ROOT / 'pocket' / 'sentences'} --max_lines 40").split()
close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="session")
def pocket():
    return FrozenWhisper("pocket")


@pytest.fixture(scope="session")
def ear():
    return Ear("pocket")


@pytest.fixture(params=["pocket", "ear"])
def critic(request):
    return request.getfixturevalue(request.param)


def random_whisper(path: Path, **changes) -> str:
    """A checkpoint with random weights in OpenAI's format -> its path."""
    dims = dict(n_mels=80, n_audio_ctx=1500, n_audio_state=32, n_audio_head=2, n_audio_layer=1,
                n_vocab=51865, n_text_ctx=448, n_text_state=32, n_text_head=2, n_text_layer=1)
    model = Whisper(ModelDimensions(**dims | changes))
    torch.nn.init.normal_(model.decoder.positional_embedding)  # torch.empty in a fresh model
    torch.save(dict(dims=dims | changes, model_state_dict=model.state_dict()), path)
    return str(path)


def network(whisper: FrozenWhisper) -> DiT:
    """A small DiT of which no weight is zero, so that every path through it is alive."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(whisper.channels, whisper.dims.n_text_state, 2, bound=whisper.bound))
    for p in (*model.parameters(), model.position_out):
        torch.nn.init.normal_(p, std=0.1)
    return model


def batch_of(whisper: FrozenWhisper, sentences=SENTENCES) -> data.Batch:
    return data.make_batch(sentences, whisper, [*map(char_durations, sentences)]).to(whisper)


def spoken(whisper: FrozenWhisper, every: int):
    """Each `every`-th clip of real speech -> its sentences, log-mel (B, M, 2P)."""
    sentences, mels = zip(*spoken_clips(whisper)[::every])
    return sentences, torch.stack(mels)


def cer_of(whisper: FrozenWhisper, features: torch.Tensor, sentences) -> float:
    read = whisper.transcribe(features, [s.language for s in sentences])
    return error_rates(sentences, [r.text for r in read]).cer


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the idea --------------------------------------------------------------------------------


def overfit(whisper: FrozenWhisper, folder: Path, steps: int, speed_range: float) -> None:
    """Four sentences, learned from text alone, come back letter by letter."""
    latent = "mel" if isinstance(whisper, Ear) else "features"
    config = train.Config(str(folder), latent=latent, steps=steps, batch_size=8, warmup=20,
                          eval_every=1000, depth=3)
    run = train.Run(config, whisper)
    batches = data.Batches(dict.fromkeys(SENTENCES, 1.0), whisper, 8, 0, 1.0, speed_range)
    train.train(run, batches, SENTENCES)
    for n in (1, 4):
        assert run.transcribe_samples(SENTENCES, Solver(n)) == [s.text for s in SENTENCES]


def test_four_sentences_come_back_exactly(pocket, tmp_path):
    overfit(pocket, tmp_path, steps=150, speed_range=1.7)


@pytest.mark.slow
def test_four_sentences_come_back_through_the_ear_and_another_whisper_reads_them(ear, tmp_path):
    overfit(ear, tmp_path, steps=800, speed_range=1.0)
    checkpoint = train.load_checkpoint(tmp_path / "ckpt.pt")
    judge = Ear(str(ROOT / "pocket" / "judge.pt"))
    batch, model = batch_of(ear), sample.load_flow(checkpoint, torch.device("cpu")).model
    x1 = flow.last(train.generate(model, ear, batch, Solver()))
    assert cer_of(judge, judge.features(x1, batch.cond["frames"]), SENTENCES) <= 0.5


# ---- flow ------------------------------------------------------------------------------------


def test_path_velocity_and_loss():
    x0, x1, t = randn(5, 7, 3), randn(5, 7, 3, seed=2), torch.linspace(0, 0.9, 5)
    for end, x in ((0, x0), (1, x1)):
        close(flow.path(x0, x1, torch.full((5,), float(end))), x)
    close(10 * (flow.path(x0, x1, t + 0.1) - flow.path(x0, x1, t)), x1 - x0)
    close(flow.velocity_from_endpoint(x1, flow.path(x0, x1, t), t), x1 - x0)
    frames = [7, 3, 5, 1, 7]
    mask = torch.arange(7) < torch.tensor(frames)[:, None]
    loss = flow.cfm_loss(lambda x, t, cond: 2 * x, x0, x1, t, {}, mask)
    for i, (n, s) in enumerate(zip(frames, t.tolist())):  # 2 x_t - x1, in own frames alone
        close(loss[i], (2 * (1 - s) * x0[i, :n] + (2 * s - 1) * x1[i, :n]).square().mean())


@pytest.mark.parametrize("method, order, grown", [
    ("euler", 1, 1.5), ("midpoint", 2, 1.625)])
def test_solver_has_its_order(method, order, grown):
    """dx/dt = x cos(2t) has the solution x0 exp(sin(2t) / 2)."""
    x0 = torch.ones(1, 1, 1, dtype=torch.float64)
    error = [flow.last(flow.sample(lambda x, t: x * torch.cos(2 * t), x0, n, method)).item()
             - math.exp(math.sin(2) / 2) for n in (40, 80)]
    assert abs(math.log2(error[0] / error[1]) - order) < 0.15
    states = [*flow.sample(lambda x, t: x, x0, 2, method)]
    assert states[1].item() == grown  # dx/dt = x, h = 1/2


@pytest.mark.parametrize("method", flow.ORDER)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_guided_endpoint_is_reached_in_any_number_of_steps(method, guidance):
    (x0, with_text, without), calls = (randn(2, 3, 4, seed=seed) for seed in range(3)), []

    def model(x_t, t, cond):
        calls.append(len(x_t) / 2)
        ends = (x.repeat(len(x_t) // 2, 1, 1) for x in (without, with_text))
        return torch.where(cond["drop"][:, None, None], *ends)

    velocity = flow.model_velocity(model, dict(drop=torch.zeros(2, dtype=torch.bool)), guidance)
    v_null, v_cond = 2 * (without - x0), 2 * (with_text - x0)  # half of the time is left
    close(velocity(x0, torch.full((2,), 0.5)), v_null + guidance * (v_cond - v_null))
    for steps in (1, 3):
        calls.clear()
        states = [*flow.sample(velocity, x0, steps, method)]
        assert len(states) == steps + 1 and torch.equal(states[0], x0)
        close(states[-1], without + guidance * (with_text - without))
        assert sum(calls) == Solver(steps, method, guidance).nfe


def test_schedule():
    close(flow.schedule(4), torch.linspace(0, 1, 5))
    for word, arguments in dict(steps=(0,), solver=(4, "rk9")).items():
        with pytest.raises(ValueError, match=word):
            flow.last(flow.sample(lambda x, t: x, torch.zeros(1, 1, 1), *arguments))


# ---- model -----------------------------------------------------------------------------------


@torch.no_grad()
def test_an_item_depends_neither_on_its_batch_nor_on_what_is_behind_its_end(critic):
    model, batch, t = network(critic), batch_of(critic), torch.tensor([0.1, 0.3, 0.5, 0.7])
    x0 = data.noise(batch, critic.channels, 0)
    together = model(x0, t, batch.cond)
    for i, sentence in enumerate(SENTENCES):
        alone = batch_of(critic, [sentence])
        n, x = alone.cond["frames"].item(), data.noise(alone, critic.channels, 0)
        assert torch.equal(x[0], x0[i, :n]) and not together[i, n:].any()
        x1_hat = model(x, t[i : i + 1], alone.cond)[0]
        close(x1_hat, together[i, :n])
        if critic.bound == "sphere":
            close(x1_hat.mean(1), torch.zeros(n))
            close(x1_hat.var(1, correction=0), torch.ones(n), atol=1e-2)
        assert critic.bound == "sphere" or x1_hat.abs().max() <= REACH
    behind = ~batch.mask
    cond = batch.cond | dict(alignment=batch.cond["alignment"] + 2 * behind)
    close(model(x0 + 9 * behind[..., None], t, cond), together)


CHANGES = dict(
    order=lambda c: dict(alignment=torch.cat([c["alignment"][:, [3, 2, 1, 0]],
                                              c["alignment"][:, 4:]], 1)),
    phase=lambda c: dict(alignment=c["alignment"].floor()),  # or "ll" would be a long "l"
    spelling=lambda c: dict(chars=c["chars"].roll(1, 1)),
    tokens=lambda c: dict(tokens=c["tokens"].roll(3, 1)),
    language=lambda c: dict(language=c["language"].roll(1, 0)),
)


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_each_condition_counts_unless_it_is_dropped(pocket, name):
    model, batch, t = network(pocket), batch_of(pocket), torch.full((4,), 0.3)
    x, cond = data.noise(batch, pocket.channels, 0), batch.cond
    model.token_out.weight.zero_()  # past the shortcut, too
    cond["alignment"][:, :4] = torch.arange(4)
    changed, drop = cond | CHANGES[name](cond), dict(drop=torch.ones(4, dtype=torch.bool))
    for other in (model(x, t, changed), model(x, t + 0.3, cond)):
        assert ((other - model(x, t, cond)).abs().amax((1, 2)) > 1e-2).all()
    close(model(x, t, changed | drop), model(x, t, cond | drop))


@torch.no_grad()
def test_a_token_goes_straight_into_the_endpoint_of_its_frames(pocket):
    model, batch = network(pocket), batch_of(pocket)
    for p in model.latent_out.parameters():  # nothing comes from the blocks
        p.zero_()
    x1_hat = model(data.noise(batch, pocket.channels, 0), torch.zeros(4), batch.cond)
    for x, tokens, where, n in zip(x1_hat, batch.cond["tokens"], batch.cond["alignment"],
                                   batch.cond["frames"]):
        said = F.linear(tokens[where[:n].long()], model.token_out.weight)
        close(x[:n], F.layer_norm(said + model.position_out[:n], said.shape[-1:]))


def test_objective_is_its_formula_and_trains_the_whole_flow_and_no_whisper(critic):
    model, batch = network(critic), batch_of(critic)
    x0, t, drop = data.noise(batch, critic.channels, 0), torch.rand(4), torch.arange(4) > 1
    room = Room(0.0, torch.Generator(), lens_weight=5.0)  # of the ear
    loss, nll, cfm = train.objective(model, critic, batch, x0, t, drop, room, 0.3)
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(loss, parameters)
    assert all(g.abs().sum() > 0 for g in found), [n for n, g in zip(names, found) if not g.any()]
    x1 = model(x0, torch.zeros(4), batch.cond)
    read, expected_nll = critic.text_loss(x1, batch, room)
    close(nll, expected_nll)
    expected = read.mean()
    target, s = x1.detach(), t[:, None, None]
    x1_hat = model((1 - s) * x0 + s * target, t, batch.cond | dict(drop=drop))
    for x, y, n in zip(x1_hat, target, batch.cond["frames"]):
        expected = expected + 0.3 / 4 * (x[:n] - y[:n]).square().mean()
    close(loss, expected)
    close(loss, read.mean() + 0.3 * cfm.mean())
    for ours, plain in zip(found, torch.autograd.grad(expected, parameters)):
        close(ours, plain)
    assert not any(p.requires_grad for p in critic.model.parameters())


# ---- the frozen Whisper ----------------------------------------------------------------------


def test_encoder_is_whispers_own_and_features_end_in_silence(pocket):
    _, mel = spoken(pocket, 70)
    x1, real, frames = pocket.latents(mel), pocket.model.encoder(mel), torch.tensor([20, 10, 1, 20])
    close(x1.mean(-1), torch.zeros(x1.shape[:2]))
    close(x1.var(-1, correction=0), torch.ones(x1.shape[:2]), atol=1e-3)
    close(pocket.features_of_mel(mel), real)
    assert pocket.encode_mel(mel[:, :, :60]).shape == (len(mel), 30, 128)
    for ours, theirs, n in zip(pocket.features(x1[:, :20], frames), real, frames):
        close(ours[:n], theirs[:n], atol=1e-3)
        assert torch.equal(ours[n:], pocket.silence[n:])
    close(pocket.silence, pocket.model.encoder(torch.full((1, 80, 512), -1.5))[0])  # no power
    assert pocket.transcribe(pocket.silence[None], ["en"])[0].no_speech_prob > 0.5


def test_real_speech_is_understood_and_its_language_detected(pocket):
    sentences, mel = spoken(pocket, 10)
    features = pocket.features_of_mel(mel)
    assert cer_of(pocket, features, sentences) < 0.05
    read = pocket.transcribe(features[::5], [None] * len(features[::5]))
    assert sum(r.language == s.language for r, s in zip(read, sentences[::5])) >= len(read) - 1
    # In one call as alone, with languages that are not theirs, and detected ones.
    codes = ["de", "en", None, "zh", "fr"]
    for read, x, code in zip(pocket.transcribe(features[:5], codes), features, codes):
        options = DecodingOptions(language=code, without_timestamps=True, fp16=False)
        alone = openai_whisper.decode(pocket.model, x, options)
        assert (read.tokens, read.language) == (alone.tokens, alone.language)


def test_nll_is_the_full_softmax(pocket):
    targets, n_prompt = batch_of(pocket).targets, pocket.n_prompt
    features = randn(4, pocket.max_frames, 128).requires_grad_()
    logits = pocket.model.decoder(targets[:, :-1].clamp(min=0), features)
    said = targets[:, 1:].clone()
    said[:, 1 : n_prompt - 1] = -1  # of the prompt only the language is said by the speech
    plain = F.cross_entropy(logits.transpose(1, 2), said, ignore_index=-1, reduction="none")
    nll = pocket.nll(pocket.teacher_force(features, targets), targets)
    plain = plain.sum(1) / (said >= 0).sum(1)
    close(nll, plain)
    weight = torch.tensor([1.0, 2, 3, 4])
    close(*(torch.autograd.grad(weight @ x, features)[0] for x in (nll, plain)), atol=1e-4)


# ---- training --------------------------------------------------------------------------------


@functools.cache  # several files import the fixture
def train_both(folder: Path) -> tuple[Path, dict]:
    return folder, {latent: train.main([*FLAGS, "--latent", latent, "--out_dir",
                                        str(folder / latent)]) for latent in train.LATENTS}


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with a run of six steps of each latent, their figures."""
    return train_both(tmp_path_factory.getbasetemp() / "runs")


def log_of(folder: Path, name: str = "log.csv") -> list[list[str]]:
    """The log without its header and seconds."""
    rows = [line.split(",") for line in (folder / name).read_text().splitlines()[1:]]
    return [row[:1] + row[2:] for row in rows]


@pytest.mark.parametrize("latent", train.LATENTS)
def test_resumed_run_equals_straight_run(runs, tmp_path, monkeypatch, latent):
    flags = [*FLAGS, "--latent", latent, "--out_dir", str(tmp_path)]
    show, handler = train.show_samples, signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:  # Ctrl-C after step 4: step 5 ends, and is saved
        patched.setattr(train, "show_samples", lambda run, held_out: (
            show(run, held_out), run.step == 4 and signal.raise_signal(signal.SIGINT)))
        with pytest.raises(BadInput, match="saved at step 5; --resume goes on"):
            train.main(flags)
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(BadInput, match="begun with --depth 1, not with --depth 2; give the same"):
        train.main([*flags, "--depth", "2", "--resume"])
    shutil.copytree(tmp_path, tmp_path / "again")  # out of memory: it goes on with another batch
    other = ["--out_dir", str(tmp_path / "again"), "--batch_size", "8", "--resume"]
    assert train.main([*flags, *other])["steps"] == 6
    result = train.main([*flags, "--resume"])
    times = dict.fromkeys(("seconds", "evaluation_seconds", "peak_memory_gb"), 0)
    assert result | times == runs[1][latent] | times
    a, b = (train.load_checkpoint(x / "ckpt.pt") for x in (runs[0] / latent, tmp_path))
    for part, name in itertools.product(("model", "ema"), a["model"]):
        assert torch.equal(a[part][name], b[part][name])
    assert log_of(tmp_path) == log_of(runs[0] / latent) and a["step"] == b["step"] == 6


def test_schedules_of_a_run(pocket):
    config = train.Config(steps=150, warmup=50, learning_rate=1.0)
    rates = [train.learning_rate(step, 128, config) for step in (0, 49, 100, 150)]
    np.testing.assert_allclose(rates, [1 / 50, 1, 0.05 + 0.95 / 2, 0.05])
    assert train.learning_rate(60, 32, config) == 4 * train.learning_rate(60, 512, config)
    most = [max(Ear.room_of_step(step, 100, data.generator(0, i)).amount for i in range(200))
            for step in (8, 23, 50)]
    lens = [Ear.room_of_step(step, 99, torch.Generator()).lens_weight for step in (0, 11, 33, 98)]
    np.testing.assert_allclose(lens, [5, 10 / 3, 0, 0], atol=1e-9)
    assert most[0] == 0 and 0.45 < most[1] <= 0.5 and 0.9 < most[2] < 1
    assert train.Run(train.Config(), pocket).model.config.width == pocket.channels  # depth 0
    ema, model = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    for step, decay in ((0, 0.1), (10_000, 0.99)):
        torch.nn.init.zeros_(ema.weight)
        torch.nn.init.ones_(model.weight)
        train.update_ema(ema, model, step, 0.99)
        assert math.isclose(ema.weight.item(), 1 - decay, rel_tol=1e-5)
    x0, t, drop = train.draw_noise(batch_of(pocket, SENTENCES * 100), 2, 0.25, data.generator(0, 0))
    assert ((t.sort().values * 400).floor() == torch.arange(400)).all()  # one t in each 400th
    assert 0.2 < drop.float().mean() < 0.3 and abs(x0.std() - 1) < 0.01


# ---- sampling --------------------------------------------------------------------------------


def sampled(tmp_path: Path, run: Path, *flags: str) -> dict:
    """The data set that sample.py writes."""
    out = ["--out", str(tmp_path / "f.npz"), "--ckpt", str(run / "ckpt.pt")]
    sample.main([*flags, *out, "--device", "cpu"])
    with np.load(tmp_path / "f.npz") as file:
        return dict(file)


def test_data_set_is_what_whisper_decode_reads(runs, tmp_path, capsys, monkeypatch):
    run, texts, flags = runs[0] / "features", tmp_path / "t.tsv", "--seed=1 --method=midpoint"
    texts.write_text("en\tThe dog sleeps.\nes\tEl perro duerme.\nde\tDer Hund schläft.\n")
    f = sampled(tmp_path, run, "--text_file", str(texts), *flags.split())
    assert f["features"].shape == (3, 256, 128) and f["frames"].tolist() == [47, 50, 49]
    assert list(f["language"]) == ["en", "es", "de"] and f["text"][2] == "Der Hund schläft."
    model = openai_whisper.load_model(str(ROOT / "pocket" / "pocket.pt"), "cpu")
    for features, code, text in zip(f["features"], f["language"], f["hypothesis"]):
        options = DecodingOptions(language=str(code), without_timestamps=True, fp16=False)
        assert openai_whisper.decode(model, torch.from_numpy(features), options).text == text
    alone = sampled(tmp_path, run, "The dog sleeps.", *flags.split())  # as in a batch
    np.testing.assert_allclose(alone["features"][0], f["features"][0], atol=1e-3)
    out = capsys.readouterr().out
    assert all(x in out for x in ("NFE 8, seed 1", "t = 1.00", f"back    {f['hypothesis'][0]}\n"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("El perro.\n\nÉl.".encode())))
    assert list(sampled(tmp_path, run, "--language", "Spanish")["text"]) == ["El perro.", "Él."]


@pytest.mark.parametrize("flags, seconds", [
    ("", 30 / 3.2), ("--speed 0.6", 50 / 3.2)])
def test_long_texts_are_spoken_in_pieces_and_in_the_time_asked_for(runs, tmp_path, flags, seconds):
    text = "The dog sleeps. The cat eats an apple. The children play football in the park. " * 2
    f = sampled(tmp_path, runs[0] / "features", text, *flags.split())
    assert abs(f["frames"].sum() / 50 - seconds) < 0.15 and max(f["frames"]) <= 256
    assert " ".join(f["text"]) == text.strip() and not f["text_of"].any() and len(f["text"]) > 1


# ---- what users get wrong --------------------------------------------------------------------


@pytest.mark.parametrize("command, words", [
    ("train --whisper nosuch", "no Whisper 'nosuch': neither a file nor one of pocket, tiny.en"),
    ("train --whisper {0}/no.pt", "a Whisper checkpoint has `dims`"),
    ("train --data en={0}/empty.txt", "empty.txt has no usable sentence; it is empty"),
    ("train --data en={0}/one.txt", "1 different sentences ("),
    ("train --data en={0}/latin.txt", "latin.txt is not UTF-8 ("),
    ("train --data en={0}/bad.txt.gz", "bad.txt.gz (Not a gzipped file"),
    ("train --data {0}/one.txt", "say its language, as in en="),
    ("train --data 0*builtin", "--data '0*builtin' cannot be used; give for example"),
    ("train --data tatoeba:it", "pocket does not know the language 'it'; it knows en, "),
    ("train --batch_size 0", "--batch_size 0 cannot be used; at least 1"),
    ("train --resume", "no checkpoint {0}/o/ckpt.pt; `python train.py --out_dir {0}/o`"),
    ("train --steps 40 --learning_rate 1e8 --clip 1e8", "try a smaller --learning_rate"),
    ("sample x --ckpt {0}/no.pt", "no.pt cannot be used as a checkpoint of this train.py"),
    ("sample ... --ckpt {0}/mel/ckpt.pt", "there is no word in it"),
    ("sample x --ckpt {0}/mel/ckpt.pt --steps 0", "--steps 0 cannot be used; 1 to 1000"),
    ("sample x --ckpt {0}/features/ckpt.pt --wav x.wav", "makes features, which have no sound"),
    ("sample x --ckpt {0}/mel/ckpt.pt --wav x.mp3", "--wav x.mp3 is no FILE.wav; for one of"),
    ("sample x --ckpt {0}/mel/ckpt.pt --wav {0}/no.pt/a.wav", "no.pt cannot be a folder"),
])
def test_bad_input_is_told_in_one_sentence(runs, command, words):
    contents = {"empty.txt": b"\n", "one.txt": b"One line.\n", "latin.txt": b"one\ncaf\xe9\n",
                "no.pt": b"no checkpoint", "bad.txt.gz": b"no gzip"}
    for name, content in contents.items():
        (runs[0] / name).write_bytes(content)
    program, *argv = command.format(runs[0]).split()
    if program == "train":
        flags = FLAGS[:-4] if "--data" in argv else FLAGS
        argv = [*flags, "--out_dir", str(runs[0] / "o"), *argv]
    with pytest.raises(BadInput, match=re.escape(words.format(runs[0]))) as error:
        dict(train=train.main, sample=sample.main)[program](argv)
    assert "\n" not in str(error.value) and not list(runs[0].rglob("*.tmp"))
