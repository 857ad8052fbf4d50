"""An arm that needs no recording: the flow makes a spectrogram, the frozen encoder hears it.

    python experiments/arms.py spectrogram             # trains it
    python experiments/spectrogram.py                  # measures statistics.npz anew

Features are encoder outputs by construction. x1 (B, T, C) are the first C cosines of the log-mel
spectrum ("cepstra"), each 20 ms, in units of their spread in speech: little room for what only a
network would notice. In training every item is heard in another voice, and means and covariances
of a few frames in a row are held to those of speech (statistics.npz, measured once: the idea of
DeepInversion, arXiv 1912.08795).

B batch, T latent frames, C cepstra.
"""
import argparse
import math
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "pocket")]
import data  # noqa: E402
import make_pocket  # noqa: E402
import train  # noqa: E402
from whisper_decoder import FrozenWhisper  # noqa: E402

STATISTICS = ROOT / "experiments" / "statistics.npz"
WEIGHT = 1.0  # of the statistics beside the cross-entropy
N_CEPSTRA, WINDOW, N_SENTENCES, SEED = 13, 4, 1500, 1000


class SpectralWhisper(FrozenWhisper):
    """A Whisper whose latent is a spectrogram; the whole of it, encoder and decoder, is frozen."""

    def __init__(self, name: str = "pocket", device: str | torch.device = "cpu"):
        super().__init__(name, device)
        with np.load(STATISTICS) as file:
            found = {key: torch.from_numpy(file[key]).to(self.device) for key in file.files}
        self.window_mean, self.window_cov = found["window_mean"], found["window_cov"]
        self.channels, self.sphere = N_CEPSTRA, False
        self.voices = torch.Generator().manual_seed(0)
        n_mels = self.dims.n_mels  # the statistics are of 80
        self.mean, self.spread = (found[key] * (n_mels / 80) ** 0.5 for key in ("mean", "spread"))
        self.cosines = cosines(self.channels, n_mels).to(self.device)

    def latents(self, mel: Tensor) -> Tensor:
        """Log-mel (B, n_mels, 2T) -> x1 (B, T, C): cepstra, averaged over two hops."""
        return (to_cepstra(mel.to(self.device)) - self.mean) / self.spread

    def spectrogram(self, x1: Tensor) -> Tensor:
        """The way back, smoothed: x1 (B, T, C) -> log-mel (B, n_mels, 2T)."""
        mel = (x1.float() * self.spread + self.mean) @ self.cosines
        return F.interpolate(mel.transpose(1, 2), scale_factor=2, mode="linear")

    def hear(self, x1: Tensor, frames: Tensor, rng: torch.Generator | None) -> Tensor:
        """x1 (B, T, C) -> encoder output (B, T, n_state); with rng, each item in another voice."""
        last = torch.arange(x1.shape[1], device=x1.device).minimum(frames[:, None] - 1)
        mel = self.spectrogram(x1.gather(1, last[:, :, None].expand_as(x1)))  # end at the end
        mel = change_voice(mel, rng) if rng else mel
        # In training a short window saves time, but official checkpoints know 30 seconds only.
        window = x1.shape[1] + 32 if rng and self.name == "pocket" else self.max_frames
        window = 2 * min(window, self.max_frames)
        mel = F.pad(mel, (0, window - mel.shape[2]))
        is_speech = (torch.arange(window, device=mel.device) < 2 * frames[:, None])[:, None]
        loudest = mel.detach().masked_fill(~is_speech, -9).amax((1, 2), keepdim=True)
        mel = torch.where(is_speech, mel, loudest - 2).maximum(loudest - 2)  # as log_mel clamps
        return self.encode_speech(mel)[:, : x1.shape[1]]

    def features(self, x1: Tensor, frames: Tensor) -> Tensor:
        """x1 (B, T, C) -> what the decoder sees (B, n_audio_ctx, n_state)."""
        return super().features(self.hear(x1, frames, None), frames)

    def reading_loss(self, x1: Tensor, cond: dict[str, Tensor], targets: Tensor) -> Tensor:
        """The cross-entropy in random voices, and the distance of the batch from speech, (B,)."""
        frames = cond["frames"]
        features = super().features(self.hear(x1, frames, self.voices), frames)
        nats = self.cross_entropy(features, targets)
        return nats + WEIGHT * self.unlike_speech(x1, frames)

    def unlike_speech(self, x1: Tensor, frames: Tensor) -> Tensor:
        """Distance of a batch from the statistics of speech, (B, T, C), (B,) -> number.

        Mean squared difference of the means, and ten times that of the covariances.
        """
        length = len(self.window_mean) // self.channels
        items = [x[:n] for x, n in zip(x1, frames.tolist()) if n >= length]
        windows = torch.cat([x.unfold(0, length, 1).flatten(1) for x in items]).float()
        mean = (windows.mean(0) - self.window_mean).square().mean()
        return mean + 10 * (torch.cov(windows.T) - self.window_cov).square().mean()


def cosines(n: int, n_mels: int) -> Tensor:
    """The first n rows of the orthonormal discrete cosine transform (n, n_mels)."""
    angle = math.pi / n_mels * (torch.arange(n_mels) + 0.5) * torch.arange(n)[:, None]
    return F.normalize(angle.cos(), dim=1)


def to_cepstra(mel: Tensor) -> Tensor:
    """Log-mel (B, n_mels, 2T) -> cepstra, averaged over two hops (B, T, C)."""
    table = cosines(N_CEPSTRA, mel.shape[1]).to(mel.device)
    return F.avg_pool1d(table @ mel, 2).transpose(1, 2)


def change_voice(mel: Tensor, rng: torch.Generator) -> Tensor:
    """Another vocal tract, loudness, tilt and some noise for each item, (B, n_mels, n).

    What is to be read has to be read in all of them: the expectation over transformations with
    which Athalye et al. (arXiv 1707.07397) made examples that hold in the real world.
    """
    n_items, n_mels, _ = mel.shape
    draw = lambda f, *size: f(*size, generator=rng).to(mel.device)  # noqa: E731
    length = 0.9 + 0.2 * draw(torch.rand, n_items, 1)  # of the vocal tract
    place = (torch.arange(n_mels, device=mel.device) * length).clamp(max=n_mels - 1.001)
    below, share = place.long()[:, :, None].expand_as(mel), place.frac()[:, :, None]
    mel = mel.gather(1, below) * (1 - share) + mel.gather(1, below + 1) * share
    slope = torch.linspace(-1, 1, n_mels, device=mel.device)[:, None]
    tilt = 0.1 * draw(torch.randn, n_items, 1, 1) + 0.15 * draw(torch.randn, n_items, 1, 1) * slope
    return mel + tilt + 0.05 * draw(torch.randn, *mel.shape)


def main():
    """Measure the statistics of speech that pocket's training has not heard."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    make_pocket.need_espeak()
    sentences, _ = data.split(data.builtin())
    random.Random(1).shuffle(sentences)
    sentences = train.balanced(sentences, N_SENTENCES)
    work = ROOT / "out" / "spectrogram"
    work.mkdir(parents=True, exist_ok=True)
    clips = make_pocket.speak_all(sentences, make_pocket.VARIANTS, SEED, work, "statistics")
    whisper = FrozenWhisper("pocket")
    mels = [data.stack_clips([clip], whisper)[0] for clip in clips]
    cepstra = [to_cepstra(mel[None])[0, data.speech_span(mel)] for mel in mels]  # (T, C) each
    mean, spread = torch.cat(cepstra).mean(0), torch.cat(cepstra).std(0)
    windows = [((x - mean) / spread).unfold(0, WINDOW, 1).flatten(1) for x in cepstra]
    windows = torch.cat(windows)  # (n, C * WINDOW)
    found = dict(mean=mean, spread=spread, window_mean=windows.mean(0),
                 window_cov=torch.cov(windows.T))
    with data.writing(STATISTICS) as part, open(part, "wb") as file:
        np.savez(file, **{name: value.numpy() for name, value in found.items()})
    print(f"{STATISTICS}: {STATISTICS.stat().st_size:,} bytes, from {len(cepstra)} utterances")


if __name__ == "__main__":
    main()
