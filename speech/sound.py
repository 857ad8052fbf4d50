"""Sound: sampling rates, another voice and room, Griffin-Lim, .wav files.

B batch, T latent frames (20 ms), M mel bins, n frames of 10 ms, N samples.
"""
import math
import wave
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.audio import HOP_LENGTH, N_FFT, SAMPLE_RATE, log_mel_spectrogram, mel_filters

from data import Batch, Sentence, sentence_generator
from plumbing.errors import BadInput
from plumbing.files import atomic_write
from speech.ear import VOICE, Ear, Room, random_room
from whisper_decoder import FrozenWhisper


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Samples (N,) at any rate -> 16 kHz, by cutting or padding the spectrum: no aliasing."""
    n = round(len(samples) * SAMPLE_RATE / rate)
    if n == 0 or rate == SAMPLE_RATE:
        return samples
    return (np.fft.irfft(np.fft.rfft(samples), n) * n / len(samples)).astype(np.float32)


def log_mel(samples: np.ndarray, whisper: FrozenWhisper) -> Tensor:
    """16 kHz samples (N,) -> log-mel, then silence up to the window (1, M, 2P), or BadInput."""
    window = whisper.n_samples
    if len(samples) > window:
        raise BadInput(f"it lasts {len(samples) / SAMPLE_RATE:.2f} s and {whisper.name} hears at "
                       f"most {window / SAMPLE_RATE:.2f} s; cut it")
    # One clip at a time: Whisper clamps at 8 decades below the maximum of what it is given.
    return log_mel_spectrogram(samples, whisper.dims.n_mels, window - len(samples))[None]


def move_voice(mel: Tensor, sentence: Sentence, seed: int, amount: float) -> Tensor:
    """A log-mel (M, n) as another speaker of this seed would say the sentence."""
    rng = sentence_generator(sentence, seed + 2 * 10**6, mel.device)  # not that of its noise
    return random_room(mel[None], Room(amount, rng, VOICE))[0]


def another_voice(x1: Tensor, batch: Batch, ear: Ear, seed: int, amount: float) -> Tensor:
    """x1 (B, T, M) as another speaker would say it: vocal tract, pace, loudness, tilt, hiss."""
    if not amount:
        return x1
    moved = torch.zeros_like(x1)
    for i, (n, sentence) in enumerate(zip(batch.cond["frames"].tolist(), batch.sentences)):
        mel = move_voice(ear.log_mel_of(x1[i, :n]), sentence, seed, amount)
        moved[i, :n] = ear.latents(mel[None])[0]
    return moved


def pace(sentence: Sentence, speed: float, seed: int, amount: float) -> float:
    """How fast a seed says a sentence, up to a quarter from its speed: nobody keeps one pace."""
    rng = sentence_generator(sentence, seed + 10**6)  # neither its noise's nor its voice's
    share = torch.rand((), generator=rng).item()
    return min(max(speed * 1.25 ** (amount * (2 * share - 1)), 0.1), 10)


def griffin_lim(mel: Tensor, rounds: int = 60) -> Tensor:
    """Log-mel (M, n) -> 16 kHz samples (160 n,) that sound like it.

    First the power of every frequency, by non-negative multiplicative steps (Lee and Seung 1999),
    then phases that fit each other (Griffin and Lim 1984; with the momentum of Perraudin et al.
    2013). The phases begin at random, always the same.
    """
    filters = mel_filters(mel.device, len(mel))  # (M, N_FFT / 2 + 1)
    target = 10 ** (4 * F.pad(mel.float(), (0, 1), mode="replicate") - 4)  # undoes Whisper's scale
    power = torch.ones(filters.shape[1], target.shape[1], device=mel.device)
    for _ in range(rounds):
        ratio = target / (filters @ power).clamp(min=1e-10)
        power = power * (filters.T @ ratio) / filters.sum(0)[:, None].clamp(min=1e-10)
    magnitude, window = power.sqrt(), torch.hann_window(N_FFT, device=mel.device)
    start = torch.rand(power.shape, generator=torch.Generator().manual_seed(0)).to(mel.device)
    spectrum, before = torch.polar(torch.ones_like(start), 2 * math.pi * start), 0
    for _ in range(rounds):
        unit = spectrum / spectrum.abs().clamp(min=1e-10)
        samples = torch.istft(magnitude * unit, N_FFT, HOP_LENGTH, window=window)
        fitting = torch.stft(samples, N_FFT, HOP_LENGTH, window=window, return_complex=True)
        spectrum, before = fitting + 0.99 * (fitting - before), fitting
    return samples


def write_wav(path: Path, ear: Ear, latents: Sequence[Tensor]) -> None:
    """What x1 (T, M) of pieces of text sound like, one after another."""
    write_samples(path, torch.cat([griffin_lim(ear.log_mel_of(x1)) for x1 in latents]))


def write_samples(path: Path, samples: Tensor) -> None:
    """Samples (N,) -> 16 kHz, 16 bit, one channel; whole or not at all."""
    samples = 32767 * samples / samples.abs().max().clamp(min=1)  # nothing is cut off
    with atomic_write(path) as part, open(part, "wb") as out, wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.round().short().cpu().numpy().tobytes())
