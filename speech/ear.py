"""The ear: x1 is a log-mel spectrogram, which the whole frozen Whisper hears in random rooms.

    x1 (50 frames a second) -> log-mel (100) -> random room -> encoder -> decoder -> cross-entropy

Features mean something to one decoder only. A spectrogram can be looked at and listened to, but one
that pleases an official Whisper may mean less to others (experiments/rooms.py). In rooms the text
has to survive a random change of the log-mel in each step, as it does in speech: expectation over
transformations, Athalye et al. 2018 (arXiv 1707.07397). Without them an official critic reads
a flow about as well, but PocketSphinx makes 1.7 to 2.7 times the errors (README.md).

B batch, L prompt + text + end tokens, T latent frames (20 ms), M mel bins, which are the channels
of x1, n frames of a log-mel (10 ms), P positions of Whisper's window, E width of the encoder.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from whisper_decoder import FrozenWhisper, mean_per_item

MEL_STD = 0.5  # standard deviation of Whisper's log-mel in speech, about
SILENT_FRAMES = 40  # of silence behind the speech in training; otherwise it fills the window
# At full strength: standard deviations of tempo, gain, tilt and equaliser, maxima of the others.
# 1 of Whisper's log-mel units is 40 dB; vocal_tract, tempo and mask are relative.
ROOM = dict(vocal_tract=0.12, tempo=0.3, cover=1.0, gain=0.15, tilt=0.3, equaliser=0.15, noise=0.3,
            mask=0.2)
RAMP = (0.08, 0.38)  # of a run, while rooms grow: first the flow learns to be read at all
LENS = 5.0  # weight of nll * `Ear.lens` at first; it fades in the first third of a run
NEAR = 6  # frames: standard deviation of where a token may be heard, around its middle
VOICE = ROOM | dict(cover=0.0, mask=0.0)  # nothing is covered: `sample.py --rooms`


class Room(NamedTuple):
    """Augmentation of a step, and the weight of its lens."""

    amount: float  # 0: none, 1: as strong as they get
    rng: torch.Generator  # on the device of what is heard
    strength: dict[str, float] = ROOM  # of each transformation
    lens_weight: float = 0.0  # of `Ear.lens`; without a room there is no lens


class Ear(FrozenWhisper):
    """A frozen Whisper that hears: x1 (B, T, M) is Whisper's own log-mel / MEL_STD."""

    bound = "tanh"
    speed_range = 1.25  # as people do; more cannot be heard in rooms

    def __init__(self, name: str = "pocket", device: str | torch.device = "cpu"):
        super().__init__(name, device)
        self.channels = self.dims.n_mels

    @staticmethod
    def room_of_step(step: int, n_steps: int, rng: torch.Generator) -> Room:
        """The augmentation of a step: its strength ramps up, the lens weight falls to 0."""
        most = float(np.interp(step / n_steps, RAMP, (0, 1)))
        # Weaker by a random factor: a flow trained in strong rooms only is read worse without one.
        amount = most * torch.rand((), generator=rng, device=rng.device).item()
        return Room(amount, rng, lens_weight=LENS * max(0, 1 - 3 * step / n_steps))

    def shortcut(self) -> tuple[Tensor, Tensor]:
        """Zeros, (M, E), (P, M): the weights do not tell which spectrogram a token has."""
        zeros = self.rows.new_zeros  # on this device
        return zeros(self.channels, self.dims.n_text_state), zeros(self.max_frames, self.channels)

    def latents(self, mel: Tensor) -> Tensor:
        """x1 of real speech, (B, M, 2T) -> (B, T, M)."""
        return F.avg_pool1d(mel.to(self.device), 2).transpose(1, 2) / MEL_STD

    def spectrogram(self, x1: Tensor, frames: Tensor, window: int) -> Tensor:
        """x1 (B, T, M), lengths (B,) -> log-mel with silence behind, (B, M, 2 * window).

        What is below its silence (`silence_of`) is raised to it. The last frame is repeated, so
        that `upsample` smooths nothing behind the end into it.
        """
        last = torch.arange(x1.shape[1] + 1, device=x1.device).minimum(frames[:, None] - 1)
        mel = x1.float().gather(1, last[:, :, None].expand(-1, -1, self.channels)).transpose(1, 2)
        mel = upsample(MEL_STD * mel)  # (B, M, 2T + 2)
        mel = F.pad(mel, (0, 2 * window - mel.shape[2]))  # a negative number cuts
        mask = (torch.arange(2 * window, device=mel.device) < 2 * frames[:, None])[:, None]
        loudest = mel.detach().masked_fill(~mask, -torch.inf).amax((1, 2), keepdim=True)
        floor = silence_of(loudest)
        return torch.where(mask, mel, floor).maximum(floor)

    def log_mel_of(self, x1: Tensor) -> Tensor:
        """The spectrogram of one item and nothing behind it, (T, M) -> (M, 2T)."""
        return self.spectrogram(x1[None], torch.tensor([len(x1)], device=x1.device), len(x1))[0]

    def features(self, x1: Tensor, frames: Tensor) -> Tensor:
        """What the decoder sees in the official window, (B, T, M), (B,) -> (B, P, E)."""
        return self.features_of_mel(self.spectrogram(x1, frames, self.max_frames))

    def text_loss(self, x1: Tensor, batch, room: Room | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy of language, text and end, where the encoder hears x1 in a random room.

        x1 (B, T, M), a data.Batch -> the loss, nll + lens_weight * nll * lens, and nll alone, (B,)
        each. nll as a factor is detached: what the decoder can read needs no lens. The window
        is little longer than the speech, which in a room begins up to 240 ms late. Token positions
        follow that delay; the time warp of a room, which moves them too, is ignored.
        """
        window, middles = min(x1.shape[1] + SILENT_FRAMES, self.max_frames), batch.token_frames
        mel = self.spectrogram(x1, batch.cond["frames"], window)
        if room and room.amount:
            spare = min(2 * (window - x1.shape[1]), 24)  # hops of silence that may stand in front
            shift = int(torch.randint(spare + 1, (), generator=room.rng, device=room.rng.device))
            mel = random_room(mel.roll(shift, 2), room)  # only silence comes round
            middles = middles + shift / 2 * (middles >= 0)
        encoded = self.encode_mel(mel)
        states = self.teacher_force(self.model.encoder.ln_post(encoded), batch.targets)
        nll = self.nll(states, batch.targets)
        if not (room and room.lens_weight):
            return nll, nll
        lens = self.lens(encoded, batch.targets, middles)
        return nll + room.lens_weight * nll.detach() * lens, nll

    def lens(self, encoded: Tensor, targets: Tensor, token_frames: Tensor) -> Tensor:
        """How badly a logit lens (W₀) tells tokens apart, (B, T, E), (B, L), (B, L) -> (B,).

        Cross-entropy in nats per token, among the different tokens of the batch (of this process).
        Logits: the mean encoder output near a token, less the mean over all tokens, times W₀ e.
        Against posterior collapse: an official decoder predicts so well from previous tokens that
        it ignores an untrained flow; here there are none. Real speech: experiments/lens.py.
        """
        mask = token_frames >= 0  # of text tokens
        distance = torch.arange(encoded.shape[1], device=encoded.device) - token_frames[..., None]
        near = torch.exp(-((distance / NEAR) ** 2) / 2)  # (B, L, T)
        tokens, which = targets[mask].unique(return_inverse=True)
        with torch.autocast(encoded.device.type, enabled=False):  # bf16 hides small differences
            mean = (near @ encoded.float() / near.sum(2, keepdim=True))[mask]  # (text tokens, E)
            shown = F.linear(self.embed(tokens), self.token_direction)  # W₀ e
            logits = (mean - mean.mean(0)) @ shown.T / shown.shape[1] ** 0.5
        return mean_per_item(F.cross_entropy(logits, which, reduction="none"), mask)


def silence_of(peak: Tensor) -> Tensor:
    """The silence of a log-mel with such a peak, as Whisper clips its own: 80 dB (2.0) below it, or
    at 1e-10 of full power (-1.5)."""
    return (peak - 2).clamp(min=-1.5)


def smooth(mel: Tensor) -> Tensor:
    """Mean over three bins and 50 ms, (B, M, n) -> (B, M, n): voices do not flicker."""
    return F.avg_pool2d(mel[:, None], (3, 5), 1, (1, 2), count_include_pad=False)[:, 0]


def upsample(mel: Tensor) -> Tensor:
    """From 50 to 100 frames a second, smoothly, (B, M, T) -> (B, M, 2T)."""
    return smooth(F.interpolate(mel, scale_factor=2, mode="linear"))


def random_room(mel: Tensor, room: Room) -> Tensor:
    """Each item of a log-mel in another voice and room, (B, M, n) -> (B, M, n)."""
    (n_items, n_mels, n), device = mel.shape, mel.device
    uniform = lambda *size: torch.rand(*size, generator=room.rng, device=device)  # noqa: E731
    normal = lambda *size: torch.randn(*size, generator=room.rng, device=device)  # noqa: E731
    curve = lambda nodes, size: F.interpolate(  # noqa: E731  (B, 1, size), smooth
        normal(n_items, 1, nodes), size, mode="linear", align_corners=True)
    s = {name: room.amount * value for name, value in room.strength.items()}
    bins = torch.arange(n_mels, device=device)[:, None]

    # Vocal tract length perturbation (Jaitly and Hinton 2013), and time warping.
    y = bins / (n_mels - 1) * (1 + s["vocal_tract"] * (2 * uniform(n_items, 1, 1) - 1))
    x = (s["tempo"] * curve(2 + n // 25, n)).exp().cumsum(2)
    x = (x - x[:, :, :1]) / (x[:, :, -1:] - x[:, :, :1])
    grid = 2 * torch.stack([x.expand_as(mel), y.expand_as(mel)], -1) - 1
    on = "cpu" if device.type == "mps" else device  # which had no such padding before torch 2.13
    mel = F.grid_sample(mel[:, None].to(on), grid.to(on), padding_mode="border",
                        align_corners=True)[:, 0].to(device)
    # Steady noise covers what is quieter.
    floor = mel.amin((1, 2), keepdim=True).detach()
    mel = mel.maximum(floor + s["cover"] * uniform(n_items, 1, 1))
    # Distance, microphones and loudspeakers: loudness, tilt, a smooth curve over the frequencies.
    mel = mel + s["gain"] * normal(n_items, 1, 1)
    mel = mel + s["tilt"] * normal(n_items, 1, 1) * (2 * bins / (n_mels - 1) - 1)
    mel = mel + s["equaliser"] * curve(6, n_mels).transpose(1, 2)
    # Hiss of a random level: no single value may matter (randomised smoothing, arXiv 1902.02918).
    mel = mel + s["noise"] * uniform(n_items, 1, 1) * normal(*mel.shape)
    # A band is missing, so no band may say it all (SpecAugment, arXiv 1904.08779).
    width = s["mask"] * n_mels * uniform(n_items, 1, 1)
    low = uniform(n_items, 1, 1) * (n_mels - width)
    is_masked = (low <= bins) & (bins < low + width)
    return torch.where(is_masked, mel.mean((1, 2), keepdim=True).detach(), mel)
