"""Train the flow from text alone: noise -> DiT -> frozen Whisper decoder -> text.

    python train.py                     # minutes on a laptop, offline, with the embedded decoder
    python train.py --data fr=livre.txt builtin --whisper tiny --depth 12
    python train.py --resume            # go on where Ctrl-C stopped it
    python train.py --help              # every field of Config is a flag
"""
import argparse
import copy
import csv
import dataclasses
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import flow
from model import DiT, DiTConfig
from sample import Settings, load_checkpoint, read_back
from whisper_decoder import BadInput, FrozenWhisper, Transcription, error_rates


def setting(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    out_dir: str = setting("out", "folder for ckpt.pt and log.csv")
    whisper: str = setting("pocket", "frozen decoder: pocket, an official name, or a checkpoint file")
    data: tuple = setting(("builtin",), "sources: builtin, FILE.tsv, LANGUAGE=FILE.txt")
    speed: float = setting(1.0, "pace of the speech; 1 is natural")
    depth: int = setting(4, "size of the DiT: layers and heads; the width is 32 times that")
    steps: int = setting(1000, "training steps")
    batch_size: int = setting(24, "sentences per step")
    learning_rate: float = setting(1e-3, "peak of the schedule")
    warmup: int = setting(50, "steps to the peak; a cosine leads down from there")
    weight_decay: float = setting(0.01, "AdamW")
    clip: float = setting(1.0, "largest norm of the gradient")
    ema: float = setting(0.99, "decay of the averaged weights, which are what is evaluated")
    sigma_min: float = setting(0.0, "width of the path's end, see flow.py")
    sampler_steps: int = setting(1, "ODE steps that the round-trip loss runs through")
    flow_weight: float = setting(1.0, "weight of the flow loss beside the cross-entropy")
    drop_text: float = setting(0.1, "share of items whose text is dropped, for guidance")
    eval_every: int = setting(250, "steps between evaluations and checkpoints")
    eval_sentences: int = setting(250, "held-out sentences of the final evaluation")
    seed: int = setting(0, "of everything random")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    compile: bool = setting(False, "torch.compile the DiT")
    resume: bool = setting(False, "go on from out_dir/ckpt.pt")


def parse_config(argv=None) -> Config:
    """The command line is made from the fields of Config."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for f in dataclasses.fields(Config):
        kind = dict(type=type(f.default))
        if isinstance(f.default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(f.default, tuple):
            kind = dict(nargs="+")
        help = f"{f.metadata['help']} (default: {f.default})"
        parser.add_argument(f"--{f.name}", default=f.default, help=help, **kind)
    args = vars(parser.parse_args(argv))
    return Config(**{**args, "data": tuple(args["data"])})


def choose_device(name: str) -> torch.device:
    """auto: cuda, mps or cpu, the first that is there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if torch.backends.mps.is_available() else name
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"device {name!r} cannot be used ({reason}); try --device cpu") from error


# ---- one step --------------------------------------------------------------------------------


def losses(model, whisper: FrozenWhisper, batch: data.Batch, x0: Tensor, t: Tensor, drop: Tensor,
           config: Config) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the round trip and flow loss, each per item (B,).

    The flow's own sample is what the path is regressed on: text alone gives no other x1. So every
    t learns to point where the sampler arrived, and any number of steps can be taken afterwards.
    """
    velocity = flow.model_velocity(model, batch.cond, sigma_min=config.sigma_min)
    x1 = flow.sample(velocity, x0, config.sampler_steps)
    frames = batch.cond["frames"]
    cross_entropy = whisper.cross_entropy(whisper.features(x1, frames), batch.targets)

    x1 = x1.detach()
    x1_hat = model(flow.path(x0, x1, t, config.sigma_min), t, {**batch.cond, "drop": drop})
    is_speech = torch.arange(x0.shape[1], device=x0.device) < frames[:, None]
    return cross_entropy, flow.cfm_loss(x1_hat, x1, is_speech)


def learning_rate(step: int, config: Config) -> float:
    """Linear warm-up, then half a cosine down to a twentieth."""
    progress = max(0, step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1, progress)))
    return config.learning_rate * min((step + 1) / config.warmup, cosine)


def draw(step: int, sentences: list, whisper: FrozenWhisper, config: Config):
    """Batch, noise, times and dropped conditions of one step; they depend on seed and step alone."""
    rng = torch.Generator().manual_seed(config.seed * 2**32 + step)
    n = config.batch_size
    picks = torch.randint(len(sentences), (n,), generator=rng).tolist()
    batch = data.make_batch([sentences[i] for i in picks], whisper, config.speed)
    x0 = torch.randn(*batch.cond["token"].shape, whisper.channels, generator=rng)
    t = (torch.randperm(n, generator=rng) + torch.rand(n, generator=rng)) / n  # spread over [0, 1]
    drop = torch.rand(n, generator=rng) < config.drop_text
    return batch, *(x.to(whisper.device) for x in (x0, t, drop))


@torch.no_grad()
def update_ema(ema: DiT, model: DiT, step: int, config: Config) -> None:
    """ema += (1 - decay) (model - ema), in place; young averages forget faster."""
    decay = min(config.ema, (1 + step) / (10 + step))
    for averaged, now in zip(ema.parameters(), model.parameters()):
        averaged.lerp_(now, 1 - decay)
