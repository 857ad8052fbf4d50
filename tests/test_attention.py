"""Where the decoder attends, and where x1 leans: silence, alignment heads, guided attention."""
import math

import numpy as np
import torch
import torch.nn.functional as F
import whisper

import data
import train
import whisper_decoder
from data import Sentence
from test_roundtrip import batch_of, close, pocket, randn  # noqa: F401


def test_silence_is_attended_as_if_it_stood_behind_the_speech(pocket):
    batch = batch_of(pocket)
    frames, targets, x1 = batch.cond["frames"], batch.targets, randn(4, 200, 128).requires_grad_()
    nll, _ = pocket.text_loss(x1, frames, targets, batch.token_frames)
    plain = pocket.nll(pocket.teacher_force(pocket.features(x1, frames), targets)[0], targets)
    close(nll, plain)
    weight = torch.tensor([1.0, 2, 3, 4])
    close(*(torch.autograd.grad(weight @ x, x1)[0] for x in (nll, plain)))


def test_attention_is_that_of_whispers_alignment_heads(pocket, monkeypatch):
    heads = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1.0]])
    monkeypatch.setattr(pocket, "alignment_heads", heads)
    batch, seen = batch_of(pocket), []
    frames, targets, x1 = batch.cond["frames"], batch.targets, randn(4, 200, 128)
    hooks = [block.cross_attn.register_forward_hook(lambda *args: seen.append(args[2][1]))
             for block in pocket.model.decoder.blocks]
    with whisper.model.disable_sdpa():
        pocket.model.decoder(targets[:, :-1].clamp(min=0), features := pocket.features(x1, frames))
    [hook.remove() for hook in hooks]
    plain = torch.stack([qk.softmax(3) for qk in seen])  # (layers, B, H, L - 1, P)
    plain = plain.transpose(1, 2)[heads > 0]  # (alignment heads, B, L - 1, P)
    close(pocket.teacher_force(features, targets)[1], plain.mean(0))
    short = pocket.teacher_force(pocket.model.encoder.ln_post(x1), targets, frames)[1]
    for ours, theirs, n in zip(short, plain.mean(0), frames):
        close(ours[:, :n], theirs[:, :n])
        assert not ours[:, n:].any()
    first = batch_of(pocket, [Sentence("en", "The dog sleeps.")])  # tokens of 3, 4, 7 and 1 letters
    ends = np.cumsum([0, *data.char_durations(first.sentences[0])])
    middles = np.interp([1.5, 5, 10.5, 14.5], range(16), ends)
    close(first.token_frames[0], torch.tensor([-1] * 4 + middles.tolist() + [-1]))


def test_stray_is_attention_far_from_the_token():
    frames = torch.tensor([[-1, 20, 60, -1], [-1, 30, -1, -1.0]])  # of an end token and padding: -1
    attention = F.one_hot(torch.tensor([[20, 60, 0], [90, 0, 0]]), 100).float()
    near = math.exp(-((40 / whisper_decoder.NEAR) ** 2) / 2)
    close(whisper_decoder.stray(attention, frames), torch.tensor([0, 1.0]))
    attention[0, 0] = (attention[0, 0] + attention[0, 1]) / 2
    close(whisper_decoder.stray(attention, frames)[0], torch.tensor((1 - near) / 4))


@torch.no_grad()
def test_the_frozen_weights_tell_where_x1_leans(pocket):
    w, marks = pocket.directions()
    e, x, decoder = randn(128), randn(128, seed=2).requires_grad_(), pocket.model.decoder
    with torch.enable_grad():  # what attention to x adds to the logit of e
        added = sum(F.linear(F.linear(x * pocket.model.encoder.ln_post.weight,
                                      b.cross_attn.value.weight), b.cross_attn.out.weight)
                    for b in decoder.blocks)
        gradient, = torch.autograd.grad(added @ (decoder.ln.weight * e), x)
    close(F.cosine_similarity(w @ e, gradient, dim=0), torch.tensor(1.0))
    close(marks.mean(0), torch.zeros(128))
    close(marks.square().mean(), torch.tensor(0.25))
    run, batch, losses = train.Run(train.Config(), pocket), batch_of(pocket), []
    for model in run.model, run.ema:
        assert torch.equal(model.token_out.weight, w) and torch.equal(model.marks, marks)
    for lean in ((w, marks), (w, 0 * marks), (0 * w, 0 * marks)):
        run.model.begin(*lean)
        x1 = run.model(data.noise(batch, 128, 0), torch.zeros(4), batch.cond)
        losses.append(pocket.text_loss(x1, batch.cond["frames"], batch.targets,
                                       batch.token_frames)[0].mean().item())
    assert losses[0] < 0.8 * losses[1] < 0.6 * losses[2], losses
