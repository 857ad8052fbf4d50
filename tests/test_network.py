"""The DiT, the path and the sampler, piece by piece: closed forms and symmetries."""
import math

import pytest
import torch

import data
import flow
import train
from data import Sentence
from flow import Solver
from model import REACH, Block, bounded, sinusoids
from test_roundtrip import SENTENCES, batch_of, close, network, randn


def test_sinusoids_and_bounds():
    angle = 1000 * 0.3
    close(sinusoids(torch.tensor([0.3]), 8)[0, [0, 4]],
          torch.tensor([math.cos(angle), math.sin(angle)]))
    close(bounded(torch.tensor([[[2.0]]]), "tanh").item(), REACH * math.tanh(2 / REACH))
    x = bounded(randn(1, 2, 64), "sphere")
    close(x.mean(2), torch.zeros(1, 2))
    close(x.square().mean(2), torch.ones(1, 2))


@torch.no_grad()
def test_a_new_block_is_the_identity():
    block, x, mask = Block(64, 2), randn(2, 5, 64), torch.ones(2, 1, 1, 5, dtype=torch.bool)
    turns = torch.zeros(2, 5, 16)
    assert torch.equal(block(x, randn(2, 1, 64), mask, turns), x)
    torch.nn.init.normal_(block.modulation[1].weight, std=0.1)
    assert not torch.allclose(block(x, randn(2, 1, 64), mask, turns), x)


@torch.no_grad()
def test_blocks_know_the_order_of_patches(pocket):
    """All frames have one text and the same order inside a patch, and only rotations differ."""
    model, batch = network(pocket), batch_of(pocket, [Sentence("en", "A long word sleeps.")])
    model.position_out.zero_()
    n = batch.mask.shape[1] // 4 * 4
    cond = batch.cond | dict(alignment=torch.zeros(1, n), frames=torch.tensor([n]))
    x, t = randn(1, n, pocket.channels), torch.zeros(1)
    turned = x.unflatten(1, (-1, 4)).flip(1).flatten(1, 2)
    out, of_turned = (model(y, t, cond).unflatten(1, (-1, 4)) for y in (x, turned))
    assert (out - of_turned.flip(1)).abs().max() > 1e-3


def test_gradients_pass_through_the_solver():
    x0 = torch.ones(1, 1, 1, requires_grad=True)
    flow.last(flow.sample(lambda x, t: x, x0, 2)).backward()
    assert x0.grad.item() == 1.5 ** 2


def test_samples_are_made_by_the_solver_that_is_asked_for(pocket):
    batch, solver, calls = batch_of(pocket), Solver(3, "midpoint", 2.0, seed=4), []

    def model(x, t, cond):
        calls.append(len(x))
        return x / 2 + t[:, None, None] + cond["drop"][:, None, None]

    states = [*train.generate(model, pocket, batch, solver)]
    assert calls == [2 * len(SENTENCES)] * 6  # 3 steps of order 2, and each with and without text
    velocity = flow.model_velocity(model, batch.cond, 2.0)
    expected = [*flow.sample(velocity, data.noise(batch, pocket.channels, 4), 3, "midpoint")]
    assert len(states) == 4
    for state, other in zip(states, expected):
        close(state, other)


@pytest.mark.parametrize("seed", [0, 1])
def test_times_do_not_grow_with_the_length_of_items(pocket, seed):
    _, t, _ = train.draw_noise(batch_of(pocket, SENTENCES * 10), 2, 0.1, data.generator(seed, 0))
    assert not torch.equal(t.argsort(), torch.arange(40))


def test_long_items_are_drawn_as_often_as_short_ones():
    sums, frames = torch.ones(400, dtype=torch.double).cumsum(0), torch.arange(400.0)
    rng = data.generator(0, 0)
    picks = torch.tensor([data.draw_similar(sums, frames, 8, rng) for _ in range(200)]).flatten()
    shares = (picks[:, None] // 100 == torch.arange(4)).double().mean(0)
    assert (shares - 0.25).abs().max() < 0.08


def test_held_out_sentences_are_those_of_published_figures():
    share = data.hash_share(Sentence("en", "The dog sleeps."))
    assert share == pytest.approx(0.2867604464, abs=1e-9)
