"""Text in, sound-token features and what the frozen Whisper reads in them out.

    python sample.py "The dog sleeps." --language en
    python sample.py --text_file sentences.tsv --steps 4 --seed 1 --out features.npz
    echo "El perro duerme." | python sample.py --language es
"""
import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import flow
from data import Batch, Sentence, clean, load, make_batch, noise, read_file, split_long, unheard_words
from model import DiT, DiTConfig
from whisper_decoder import BadInput, FrozenWhisper, Transcription, error_rates


class Settings(NamedTuple):
    """How to solve the ODE; see flow.py."""

    steps: int = 4
    method: str = "euler"
    guidance: float = 1.0
    sway: float = 0.0
    sigma_min: float = 0.0
    seed: int = 0


def load_checkpoint(path: Path, device: torch.device) -> dict:
    """What train.py saved; BadInput if it is missing or something else."""
    if not path.is_file():
        raise BadInput(f"no checkpoint {path}; make one with `python train.py`, or give --ckpt")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        checkpoint["model_config"], checkpoint["ema"], checkpoint["config"]
        return checkpoint
    except Exception as error:
        reason = str(error).splitlines()[0][:100]
        raise BadInput(f"{path} is not a checkpoint of train.py: {reason}") from error


def load_model(checkpoint: dict, device: torch.device) -> DiT:
    """The averaged weights of a checkpoint as a network, ready to sample."""
    model = DiT(DiTConfig(**checkpoint["model_config"])).to(device).eval()
    model.load_state_dict(checkpoint["ema"])
    return model


@torch.no_grad()
def generate(model: DiT, whisper: FrozenWhisper, batch: Batch, settings: Settings) -> Tensor:
    """A batch of text -> the trajectory of latents, (steps + 1, B, T, C), noise first."""
    velocity = flow.model_velocity(model, batch.cond, settings.guidance, settings.sigma_min)
    x0 = noise(batch, whisper.channels, settings.seed)
    return flow.sample(velocity, x0, settings.steps, settings.method, settings.sway, True)
