"""The DiT: a small diffusion transformer that predicts the endpoint x1_hat of the flow.

    x_t (B, T, C) --patches--> (B, N, D) --+--> blocks, modulated by time and language --> x1_hat
    text (B, S, E) --MLP, spread over the frames, patches--^
    spelling (B, T) --embedding, convolution, patches------^

It predicts the endpoint and not the velocity. Whisper's encoder ends in a LayerNorm, so what the
frozen decoder reads lies on a sphere: every frame has mean 0 and variance 1. A network that points
at the sphere need not carry the noise through its narrow layers only to subtract it at the end.
What x_t has of the endpoint already goes around them: all of it if x0 is likely speech, some when
the flow learns from recordings (`skip`).

Text comes in twice: as the decoder's tokens, which say what is meant, and letter by letter, which
says how words that were never heard may sound: a token is a name without a spelling.

B batch, S text tokens, T latent frames, N patches, C latent channels, E embedding width of the
frozen decoder, D model width, H heads. Peebles and Xie 2023 (arXiv 2212.09748) for the DiT.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

REACH = 3.0  # bound of an endpoint that is no encoder output (sphere=False)


@dataclass(frozen=True)
class DiTConfig:
    """Everything that decides the shape of the network."""

    channels: int  # C, of the frozen encoder
    embedding: int  # E, of the frozen decoder's token embeddings
    depth: int = 4  # the dial: layers, and heads; the width follows
    patch: int = 4  # frames per patch, 20 ms each
    cond_variance: float = 0.0  # of x1, given its text: see `skip`; 0: no skip
    has_prior: bool = False  # x0 is likely speech, and the network corrects it
    sphere: bool = True  # normalise every frame of the endpoint; else keep it within +-REACH

    @property
    def width(self) -> int:
        return 32 * self.depth

    @property
    def heads(self) -> int:
        return self.depth  # 32 channels each


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Times in [0, 1] -> features at frequencies from 1000 down to 0.1, (B,) -> (B, width)."""
    frequencies = 1000 * torch.exp(torch.linspace(0, -math.log(1e4), width // 2, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding, (B, H, N, D/H) -> (B, H, N, D/H). RoFormer, arXiv 2104.09864."""
    half = x.shape[-1] // 2
    frequencies = 1e4 ** -(torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[2], device=x.device)[:, None] * frequencies  # (N, D/2H)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def skip(x_t: Tensor, t: Tensor, cond_variance: float) -> Tensor:
    """What x_t itself adds to the best linear guess of x1, (B, T, C), (B,) -> (B, T, C).

    If x1 varies so much around what the text says: 0 at t = 0, all of x_t at t = 1. That is c_skip
    of Karras et al. 2022 (arXiv 2206.00364, table 1) for x_t / t, whose noise is (1 - t) / t.
    """
    t = t[:, None, None]
    return cond_variance * t / (cond_variance * t.square() + (1 - t).square()) * x_t


def bounded(x: Tensor) -> Tensor:
    """Within +-REACH, smoothly."""
    return REACH * torch.tanh(x / REACH)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: layer norm, then scale and shift by the condition, (B, N, D), (B, 1, D) twice."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def mlp(n_in: int, n_hidden: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, n_hidden), nn.SiLU(), nn.Linear(n_hidden, n_out))


class Block(nn.Module):
    """Attention and MLP with adaLN-Zero: at the start every block is the identity."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = mlp(width, 4 * width, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        nn.init.zeros_(self.modulation[1].weight)
        nn.init.zeros_(self.modulation[1].bias)

    def attention(self, x: Tensor, mask: Tensor) -> Tensor:
        """Self-attention to the patches of the mask, (B, N, D), (B, 1, 1, N) -> (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        """(B, N, D), (B, 1, D), (B, 1, 1, N) -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attention(modulate(x, shift1, scale1), mask)
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


class DiT(nn.Module):
    """endpoint(x_t, t, cond) -> x1_hat, the network of flow.py's contract.

    cond["text"]      (B, S, E)  token embeddings, mean 0 and variance 1 each
    cond["token"]     (B, T)     which token sounds in each frame
    cond["byte"]      (B, T)     which byte of the UTF-8 text sounds in each frame
    cond["frames"]    (B,)       length of each item; what is behind it changes nothing
    cond["language"]  (B, E)     embedding of the language token
    cond["drop"]      (B,)       True: ignore text and language (for guidance)

    prior: what data.py needs to make the condition and x0, kept here: see data.fit_prior.
    """

    def __init__(self, config: DiTConfig, prior: dict | None = None):
        super().__init__()
        self.config, self.prior = config, prior or {}
        width, patch_size = config.width, config.patch * config.channels
        self.latent_in = nn.Linear(patch_size, width)
        self.text_in = mlp(config.embedding, 2 * width, width)
        self.time_in = mlp(width, width, width)
        self.language_in = nn.Linear(config.embedding, width)
        self.byte_in = nn.Embedding(256, width)
        self.spell = nn.Conv1d(width, width, 9, padding=4)  # a letter and its neighbours
        self.odd = nn.Parameter(torch.zeros(width))
        self.no_text = nn.Parameter(torch.zeros(width))
        self.no_language = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.condition_out = nn.Linear(width, 2 * width)
        self.latent_out = nn.Linear(width, patch_size)
        if config.has_prior:  # at the start the endpoint is x_t
            nn.init.zeros_(self.latent_out.weight)
            nn.init.zeros_(self.latent_out.bias)

    def spread_text(self, cond: dict, is_speech: Tensor) -> Tensor:
        """Average upsampling: each frame takes its token and letters, (B, S, E) -> (B, T, D)."""
        text = self.text_in(cond["text"])  # (B, S, D)
        # Every other token is marked: a token twice in a row is not one token of double length.
        text = text + self.odd * (torch.arange(text.shape[1], device=text.device) % 2)[:, None]
        padding = is_speech.shape[1] - cond["token"].shape[1]
        token, byte = (F.pad(cond[name], (0, padding)) for name in ("token", "byte"))
        text = text.gather(1, token[:, :, None].expand(-1, -1, text.shape[-1]))
        letters = self.byte_in(byte) * is_speech[:, :, None]
        text = text + letters + F.silu(self.spell(letters.transpose(1, 2))).transpose(1, 2)
        text = torch.where(cond["drop"][:, None, None], self.no_text.to(text.dtype), text)
        return text * is_speech[:, :, None]

    def condition(self, t: Tensor, cond: dict) -> Tensor:
        """Time and language in one vector, (B,), (B, E) -> (B, 1, D)."""
        language = self.language_in(cond["language"])
        no_language = self.no_language.to(language.dtype)
        language = torch.where(cond["drop"][:, None], no_language, language)
        return (self.time_in(sinusoids(t, self.config.width)) + language)[:, None]

    def forward(self, x_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        """(B, T, C), (B,) -> x1_hat (B, T, C), bounded in every frame, 0 behind each item's end."""
        n_frames, patch = x_t.shape[1], self.config.patch
        padding = -n_frames % patch
        position = torch.arange(n_frames + padding, device=x_t.device)
        is_speech = position < cond["frames"][:, None]  # (B, T + padding)
        x_t = F.pad(x_t, (0, 0, 0, padding)) * is_speech[:, :, None]

        text = self.spread_text(cond, is_speech)
        x = self.latent_in(x_t.unflatten(1, (-1, patch)).flatten(2))  # (B, N, D)
        x = x + text.unflatten(1, (-1, patch)).mean(2)
        mask = is_speech[:, None, None, ::patch]  # (B, 1, 1, N), by its first frame

        condition = self.condition(t, cond)
        for block in self.blocks:
            x = block(x, condition, mask)
        shift, scale = self.condition_out(F.silu(condition)).chunk(2, dim=-1)
        x = self.latent_out(modulate(x, shift, scale))  # (B, N, patch * C)
        x = x.unflatten(-1, (patch, -1)).flatten(1, 2)[:, :n_frames].float()  # (B, T, C)
        if self.config.has_prior:
            x = x + x_t[:, :n_frames]
        if self.config.cond_variance:
            x = x + skip(x_t[:, :n_frames], t, self.config.cond_variance)
        x = F.layer_norm(x, x.shape[-1:]) if self.config.sphere else bounded(x)
        return x * is_speech[:, :n_frames, None]
