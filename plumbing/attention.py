"""Cross-attention to speech and the silence behind it, which is the same in every item and step.

Its keys and values are computed once. That is exact, and takes a fraction of time and memory.

B batch, L decoder tokens, T latent frames, P positions of Whisper's window, E width, H heads.
"""
import torch
from torch import Tensor, nn


def keys_and_values(decoder: nn.Module, features: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of features (P, E) in each layer of Whisper's decoder, in float32, (P, E) twice."""
    with torch.autocast(features.device.type, enabled=False):
        return [(block.cross_attn.key(features), block.cross_attn.value(features))
                for block in decoder.blocks]


def silence_behind(silence: list[tuple[Tensor, Tensor]], frames: Tensor,
                   n: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For `attend`, in each layer: keys and values of the silence behind the shortest item, and
    the mask (B, 1, 1, n + silence) of n frames of speech and that silence.

    silence: `keys_and_values` of P positions; frames: (B,).
    """
    shortest = int(frames.min())
    is_speech = torch.arange(len(silence[0][0]), device=frames.device) < frames[:, None]
    is_seen = torch.cat([is_speech[:, :n], ~is_speech[:, shortest:]], 1)[:, None, None]
    return [(k[shortest:], v[shortest:], is_seen) for k, v in silence]


def attend(layer: nn.Module, x: Tensor, speech: Tensor, silent_k: Tensor, silent_v: Tensor,
           is_seen: Tensor) -> Tensor:
    """Whisper's cross-attention to speech and silence, (B, L, E), (B, T, E), ... -> (B, L, E).

    Scores of both stand side by side in one softmax.
    """
    split = lambda x: x.unflatten(-1, (layer.n_head, -1)).transpose(-3, -2)  # noqa: E731
    q, k, v = map(split, (layer.query(x), layer.key(speech), layer.value(speech)))
    silent_k, silent_v = split(silent_k), split(silent_v)  # (H, silence, E/H)
    q, n = q / q.shape[-1] ** 0.5, speech.shape[1]  # q (B, H, L, E/H)
    scores = torch.cat([q @ k.mT, torch.einsum("bhld,hpd->bhlp", q, silent_k)], 3)
    weights = scores.masked_fill(~is_seen, -torch.inf).softmax(3)
    y = weights[..., :n] @ v + torch.einsum("bhlp,hpd->bhld", weights[..., n:], silent_v)
    return layer.out(y.transpose(1, 2).flatten(2))
