"""Conditional flow matching: path, velocity, loss, guidance, ODE solvers. Pure functions.

The contract
------------
    time      t in [0, 1]; t = 0 is noise x0 ~ N(0, I), t = 1 is data x1
    path      x_t = (1 - t) x0 + t x1                            Lipman et al. 2023, eq. 22
    velocity  u_t = dx_t/dt = x1 - x0                            eq. 23 (sigma_min = 0 in both)
    network   model(x_t, t, cond) -> x1_hat. As far as its bound allows, cfm_loss is least where
              x1_hat = E[x1 | x_t, cond]; then v is the marginal velocity E[u_t | x_t, cond]
    ODE       dx/dt = v(x_t, t) = (x1_hat - x_t) / (1 - t), from t = 0 to t = 1
    cond      dict of tensors (B, ...); cond["drop"] (B,): True where the condition is left out
    guidance  classifier-free: v = v_null + guidance (v_cond - v_null); 1 is off; it is 1 + w of Ho
              and Salimans 2022, eq. 6
    steps     of the solver; NFE, the network evaluations: steps * ORDER[method], twice if guided

One Euler step from t = 0 to t = 1 lands on the endpoint itself: x1 = model(x0, 0, cond).

The path is the conditional optimal-transport one: straight lines from x0 to x1. It is not the
minibatch coupling of Tong et al. 2024, which is called OT-CFM, too: pairing noise with data inside
a batch skews the prior of every single condition (arXiv 2503.10636), and here each text
is its own condition. In train.py x1 is the network's own one-step output from this x0: pairs as in
reflow (Liu et al. 2022, arXiv 2209.03003), by self-distillation; x0 stays N(0, I) for every text.

x0, x1, x_t, u_t: (B, T, C) for B items, T frames, C channels; t: (B,); mask: (B, T), True in frames
of an item, False behind it.
"""
from collections import deque
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor

Model = Callable[[Tensor, Tensor, dict], Tensor]  # (x_t, t, cond) -> x1_hat
Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> v, (B, T, C), (B,) -> (B, T, C)
ORDER = {"euler": 1, "midpoint": 2}
MAX_STEPS = 1000


class Solver(NamedTuple):
    """How the ODE is solved, and the seed of its x0."""

    steps: int = 4
    method: str = "euler"
    guidance: float = 1.0
    seed: int = 0

    @property
    def nfe(self) -> int:
        """Number of network evaluations per item."""
        return self.steps * ORDER[self.method] * (1 if self.guidance == 1 else 2)


def path(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """The point x_t of the straight path, (B, T, C), (B, T, C), (B,) -> (B, T, C). Eq. 22."""
    t = t[:, None, None]
    return (1 - t) * x0 + t * x1


def velocity_from_endpoint(x1_hat: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The velocity that leads from x_t to x1_hat in the time left, t < 1. Lipman, eq. 21."""
    return (x1_hat - x_t) / (1 - t[:, None, None])


def cfm_loss(model: Model, x0: Tensor, x1: Tensor, t: Tensor, cond: dict, mask: Tensor) -> Tensor:
    """Mean square error of the endpoint over the frames of an item, (B, T, C) ... -> (B,).

    That is eq. 23 times (1 - t)^2, and so finite at t = 1.
    """
    error = model(path(x0, x1, t), t, cond) - x1
    return (error.square().mean(2) * mask).sum(1) / mask.sum(1)


def schedule(steps: int) -> Tensor:
    """Times from 0 to 1, (steps + 1,). Raises ValueError."""
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be between 1 and {MAX_STEPS}, not {steps}")
    return torch.linspace(0, 1, steps + 1)


def model_velocity(model: Model, cond: dict, guidance: float = 1.0) -> Velocity:
    """Network and condition -> the velocity field of the ODE, guided if guidance is not 1."""
    if guidance == 1:
        return lambda x, t: velocity_from_endpoint(model(x, t, cond), x, t)
    null = {**cond, "drop": torch.ones_like(cond["drop"])}
    both = {key: torch.cat([cond[key], null[key]]) for key in cond}

    def guided(x: Tensor, t: Tensor) -> Tensor:
        x1_cond, x1_null = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        # The weights of guidance sum to 1, so mixing endpoints is mixing velocities.
        return velocity_from_endpoint(x1_null + guidance * (x1_cond - x1_null), x, t)

    return guided


def sample(velocity: Velocity, x0: Tensor, steps: int, method: str = "euler") -> Iterator[Tensor]:
    """Solve dx/dt = velocity(x, t) from x0 -> its steps + 1 states, noise first, (B, T, C) each.

    Gradients pass through. A wrong method or schedule is a ValueError at the first state.
    """
    if method not in ORDER:
        raise ValueError(f"unknown solver {method!r}; choose one of {', '.join(ORDER)}")
    times, x = schedule(steps).to(x0.device), x0
    yield x
    for now, later in zip(times, times[1:]):
        t, h = now.expand(len(x)), later - now
        v = velocity(x, t)
        if method == "midpoint":
            v = velocity(x + h / 2 * v, t + h / 2)
        yield (x := x + h * v)


def last(states: Iterator[Tensor]) -> Tensor:
    """x1 of `sample`; no other state is kept."""
    return deque(states, maxlen=1).pop()
