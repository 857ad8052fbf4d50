"""Conditional flow matching: path, velocity, loss, guidance, ODE sampler.

The contract
------------
    time      t in [0, 1]; t = 0 is noise x0, t = 1 is data x1
    noise     x0 ~ N(0, I), or with a prior of speech what data.first_state makes of that
    path      x_t = (1 - (1 - sigma_min) t) x0 + t x1            Lipman et al. 2023, eq. 22
    velocity  u_t = dx_t/dt = x1 - (1 - sigma_min) x0            Lipman et al. 2023, eq. 23
    ODE       dx/dt = v(x_t, t), from t = 0 to t = 1
    network   endpoint(x_t, t, cond) -> x1_hat, the point at t = 1 that x_t flows to
    sigma_min width of the noise that is left at t = 1; 0 in all of this repository, so that
              x_t = (1 - t) x0 + t x1 and u_t = x1 - x0
    guidance  v = v_null + guidance (v_cond - v_null); 1 is off; it is 1 + w of Ho and Salimans
              2022, eq. 6; with a prior even v_null knows the text, from x0
    steps     steps of the solver; NFE = steps * ORDER[method] network evaluations, twice if guided

"OT-CFM" means this conditional optimal-transport path: straight lines from x0 to x1. It is not
the minibatch optimal-transport coupling of Tong et al. 2024 that shares the name: pairing noise
with data inside a batch skews the prior of every single condition (arXiv 2503.10636), and here
each text is its own condition.

Everything is a pure function; noise and times come in as arguments.
x0, x1, x_t, u_t: (B, T, C) for B items, T frames, C channels; t: (B,), or (B, 1, 1) inside.
"""
import math
from typing import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> v, (B, T, C), (B,) -> (B, T, C)
ORDER = {"euler": 1, "midpoint": 2, "heun": 2}


def expand(t: Tensor, x: Tensor) -> Tensor:
    """Times next to latents, (B,), (B, T, C) -> (B, 1, 1)."""
    return t.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)


# ---- path ------------------------------------------------------------------------------------


def path(x0: Tensor, x1: Tensor, t: Tensor, sigma_min: float = 0.0) -> Tensor:
    """The point x_t of the straight path, (B, T, C), (B, T, C), (B,) -> (B, T, C). Eq. 22."""
    t = expand(t, x0)
    return (1 - (1 - sigma_min) * t) * x0 + t * x1


def target_velocity(x0: Tensor, x1: Tensor, sigma_min: float = 0.0) -> Tensor:
    """u_t = d path / dt, the same at every t, (B, T, C), (B, T, C) -> (B, T, C). Eq. 23.

    Training regresses the endpoint instead; this is the form of the papers.
    """
    return x1 - (1 - sigma_min) * x0


def velocity_from_endpoint(x1_hat: Tensor, x_t: Tensor, t: Tensor,
                           sigma_min: float = 0.0) -> Tensor:
    """The velocity that leads from x_t to x1_hat, t < 1 if sigma_min is 0. Eq. 21 of Lipman et al.

    Solve the path for x0 and put it into the target velocity.
    """
    t = expand(t, x_t)
    return (x1_hat - (1 - sigma_min) * x_t) / (1 - (1 - sigma_min) * t)


# ---- loss ------------------------------------------------------------------------------------


def cfm_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of each item over its own frames, (B, T, C), (B, T, C), (B, T) -> (B,).

    With velocities this is the CFM loss (eq. 23); with endpoints the same loss weighted by
    (1 - (1 - sigma_min) t)^2, which stays finite as t goes to 1.
    """
    error = (prediction - target).square().mean(-1) * mask
    return error.sum(1) / mask.sum(1)


# ---- sampler ---------------------------------------------------------------------------------


def schedule(steps: int, sway: float = 0.0) -> Tensor:
    """Times from 0 to 1, (steps + 1,): uniform; sway < 0: small steps first, > 0: small ones last.

    t' = t + sway (cos(pi t / 2) - 1 + t), F5-TTS, arXiv 2410.06885, eq. 7.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if not -1 <= sway <= 2 / (math.pi - 2):
        raise ValueError(f"sway must be between -1 and 1.75 (else time runs backwards), not {sway}")
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    t = t + sway * (torch.cos(math.pi / 2 * t) - 1 + t)
    t[-1] = 1
    return t


def nfe(steps: int, method: str = "euler", guidance: float = 1.0) -> int:
    """Number of network evaluations per item that `sample` makes."""
    return steps * ORDER[method] * (1 if guidance == 1 else 2)


def model_velocity(endpoint, cond: dict, guidance: float = 1.0, sigma_min: float = 0.0) -> Velocity:
    """Network and condition -> the velocity field of the ODE, guided if guidance is not 1.

    endpoint(x_t, t, cond) -> x1_hat; cond: tensors whose first dimension is B, among them
    `drop` (B,) bool, which turns an item's condition off. The velocity is affine in the endpoint,
    so mixing two endpoints mixes their velocities.
    """
    if guidance == 1:
        return lambda x, t: velocity_from_endpoint(endpoint(x, t, cond), x, t, sigma_min)
    null = {**cond, "drop": torch.ones_like(cond["drop"])}
    both = {key: torch.cat([cond[key], null[key]]) for key in cond}

    def guided(x: Tensor, t: Tensor) -> Tensor:
        with_text, without = endpoint(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        x1_hat = without + guidance * (with_text - without)
        return velocity_from_endpoint(x1_hat, x, t, sigma_min)

    return guided


def solver_step(velocity: Velocity, x: Tensor, t: Tensor, h: Tensor, method: str) -> Tensor:
    """One explicit Runge-Kutta step, x at t -> x at t + h, (B, T, C) -> (B, T, C)."""
    v = velocity(x, t)
    if method == "euler":
        return x + expand(h, x) * v
    if method == "midpoint":
        return x + expand(h, x) * velocity(x + expand(h / 2, x) * v, t + h / 2)
    return x + expand(h / 2, x) * (v + velocity(x + expand(h, x) * v, t + h))


def sample(velocity: Velocity, x0: Tensor, steps: int = 4, method: str = "euler",
           sway: float = 0.0, trajectory: bool = False) -> Tensor:
    """Solve dx/dt = velocity(x, t) from x0 at t = 0 to t = 1, (B, T, C) -> (B, T, C).

    With trajectory: all states, (steps + 1, B, T, C), noise first. Gradients pass through.
    """
    if method not in ORDER:
        raise ValueError(f"unknown solver {method!r}; choose one of {', '.join(ORDER)}")
    times = schedule(steps, sway).to(x0.dtype).to(x0.device)
    states = [x0]
    for i in range(steps):
        t, h = (time.expand(len(x0)) for time in (times[i], times[i + 1] - times[i]))
        # Heun looks at t = 1, where an endpoint has no velocity; midpoint has the same order.
        method_now = "midpoint" if method == "heun" and i == steps - 1 else method
        states.append(solver_step(velocity, states[-1], t, h, method_now))
    return torch.stack(states) if trajectory else states[-1]
