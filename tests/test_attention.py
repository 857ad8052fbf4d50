"""What the frozen decoder makes of speech and silence, and where x1 leans."""
import torch
import torch.nn.functional as F

import data
import train
from model import rotate, rotations
from test_roundtrip import batch_of, close, randn


def test_silence_is_attended_as_if_it_stood_behind_the_speech(pocket):
    batch = batch_of(pocket)
    frames, targets, x1 = batch.cond["frames"], batch.targets, randn(4, 200, 128).requires_grad_()
    loss, nll = pocket.text_loss(x1, batch)
    assert torch.equal(loss, nll)
    plain = pocket.nll(pocket.teacher_force(pocket.features(x1, frames), targets), targets)
    close(nll, plain)
    weight = torch.tensor([1.0, 2, 3, 4])
    close(*(torch.autograd.grad(weight @ x, x1)[0] for x in (nll, plain)))


def test_attention_knows_how_far_apart_two_patches_are_and_not_where():
    turns, q, k = rotations(40, 16, "cpu"), randn(16), randn(16, seed=1)
    scores = rotate(q.expand(40, 16), turns) @ rotate(k.expand(40, 16), turns).T
    close(scores[5:, 5:], scores[:-5, :-5])
    assert scores[0].std() > 0.1


@torch.no_grad()
def test_the_frozen_weights_tell_where_x1_leans(pocket):
    w, m = pocket.shortcut()
    e, x, decoder = randn(128), randn(128, seed=2).requires_grad_(), pocket.model.decoder
    with torch.enable_grad():  # what attention to x adds to the logit of e
        added = sum(F.linear(F.linear(x * pocket.model.encoder.ln_post.weight,
                                      b.cross_attn.value.weight), b.cross_attn.out.weight)
                    for b in decoder.blocks)
        gradient, = torch.autograd.grad(added @ (decoder.ln.weight * e), x)
    close(F.cosine_similarity(w @ e, gradient, dim=0), torch.tensor(1.0))
    close(m.mean(0), torch.zeros(128))
    close(m.square().mean(), torch.tensor(0.25))
    run, batch, losses = train.Run(train.Config(), pocket), batch_of(pocket), []
    for model in run.model, run.ema:
        assert torch.equal(model.token_out.weight, w) and torch.equal(model.position_out, m)
    for lean in ((w, m), (w, 0 * m), (0 * w, 0 * m)):
        run.model.init_shortcut(*lean)
        x1 = run.model(data.noise(batch, 128, 0), torch.zeros(4), batch.cond)
        losses.append(pocket.text_loss(x1, batch)[1].mean().item())
    assert losses[0] < 0.8 * losses[1] < 0.6 * losses[2], losses
