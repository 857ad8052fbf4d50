"""The DiT (diffusion transformer): noise, text and time in, the endpoint of the flow out.

Peebles and Xie 2022 (arXiv 2212.09748) with rotary positions. Every frame knows which unit of the
text sounds in it, as in ZipVoice (arXiv 2506.13053), and how far into the unit it is; Whisper's
embedding of its token also goes straight into the endpoint.

B batch, U units of text (a character is one, or k if it is k tokens), T latent frames (50
per second), C latent channels, D model width, H heads, N = ceil(T / patch) patches, E width of the
frozen token embeddings, P positions of Whisper's window.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

REACH = 3.0  # tanh: |x1_hat| is smaller; times ear.MEL_STD: log-mel over -1.5, Whisper's lowest
BYTES = 4  # most bytes of a character in UTF-8
CAPITAL = 1 + 256 * BYTES  # id that every capital has too, behind those of all bytes
OF_WHISPER = "token_in", "language_in", "token_out", "position_out"  # these fit one Whisper only


@dataclass(frozen=True)
class DiTConfig:
    channels: int  # C
    embedding: int  # E
    depth: int  # number of layers, and of heads, each 32 wide
    patch: int = 4  # frames per patch, 20 ms each
    bound: str = "sphere"  # endpoint: sphere: mean 0, variance 1 in every frame; tanh: +-REACH
    max_frames: int = 1500  # P

    @property
    def width(self) -> int:
        return 32 * self.depth


def sinusoids(t: Tensor, width: int) -> Tensor:
    """Times in [0, 1] -> features at frequencies from 1000 down to 0.1, (B,) -> (B, width)."""
    frequencies = 1000 * torch.exp(torch.linspace(0, -math.log(1e4), width // 2, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotations(n: int, head_width: int, device: torch.device) -> Tensor:
    """cos and sin by which `rotate` turns n patches, (2, N, head_width / 2)."""
    frequencies = 1e4 ** -(torch.arange(head_width // 2, device=device) / (head_width // 2))
    angles = torch.arange(n, device=device)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary position embedding, (..., N, D/H) -> (..., N, D/H). RoFormer, arXiv 2104.09864."""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), turns.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def bounded(x: Tensor, bound: str) -> Tensor:
    """Where an endpoint may lie, (B, T, C) -> (B, T, C): see DiTConfig.bound."""
    return F.layer_norm(x, x.shape[-1:]) if bound == "sphere" else REACH * torch.tanh(x / REACH)


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

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor, turns: Tensor) -> Tensor:
        """(B, N, D), (B, 1, D), (B, 1, 1, N), (2, N, D / (2H)) -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        qkv = self.qkv(modulate(x, shift1, scale1)).unflatten(-1, (3, self.heads, -1))
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D/H) each
        q, k = rotate(qkv[:2], turns)
        y = F.scaled_dot_product_attention(q, k, qkv[2], attn_mask=mask)
        x = x + gate1 * self.out(y.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


class DiT(nn.Module):
    """model(x_t, t, cond) -> x1_hat, the network of flow.py's contract.

    cond["chars"]     (B, U, BYTES + 2)  ids of UTF-8 bytes, Latin letter, CAPITAL; 0: none
    cond["tokens"]    (B, U, E)          Whisper's embedding of the token, layer-normed
    cond["alignment"] (B, T)             where in the text each frame is: the index of its unit
                                         plus how far into the unit it is, in [0, 1)
    cond["frames"]    (B,)               length of each item; what is behind it changes nothing
    cond["language"]  (B, E)             the same of the language's token
    cond["drop"]      (B,)               True: ignore text and language (for guidance)
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch
        self.latent_in = nn.Linear(patch * config.channels, width)
        self.token_in = nn.Linear(config.embedding, width)
        self.letter_in = nn.Embedding(CAPITAL + 1, width, padding_idx=0)
        self.unit_conv = nn.Conv1d(width, width, 9, padding=4)  # a unit and its neighbours
        self.phase_in = nn.Linear(2, width)  # how far into its unit a frame is
        self.order_in = nn.Linear(patch * width, width, bias=False)  # of the frames in a patch
        self.time_in = mlp(width, width, width)
        self.language_in = nn.Linear(config.embedding, width)
        self.no_text = nn.Parameter(torch.zeros(width))
        self.no_language = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, config.depth) for _ in range(config.depth))
        self.condition_out = nn.Linear(width, 2 * width)
        self.latent_out = nn.Linear(width, patch * config.channels)
        self.token_out = nn.Linear(config.embedding, config.channels, bias=False)
        self.register_buffer("position_out", torch.zeros(config.max_frames, config.channels))
        # At first only ASCII bytes (ids 1 to 128) and CAPITAL have an embedding: "ж" has that of
        # "z", the Latin letter in its row of `data.characters`, Chinese characters have none.
        nn.init.zeros_(self.letter_in.weight[129:CAPITAL])
        nn.init.zeros_(self.order_in.weight)
        nn.init.zeros_(self.token_out.weight)

    @torch.no_grad()
    def init_shortcut(self, token_out: Tensor, position_out: Tensor) -> None:
        """W to begin with (C, E), and m (P, C), from `FrozenWhisper.shortcut`."""
        self.token_out.weight.copy_(token_out)
        self.position_out.copy_(position_out)

    def embed_text(self, cond: dict, mask: Tensor) -> Tensor:
        """The embedding of each frame's unit, mask (B, N * patch) -> (B, N * patch, D)."""
        text = self.letter_in(cond["chars"]).sum(2) + self.token_in(cond["tokens"])  # (B, U, D)
        text = text * cond["chars"].any(2, keepdim=True)  # padding has token 0, which is "!"
        text = text + F.silu(self.unit_conv(text.transpose(1, 2))).transpose(1, 2)
        alignment = F.pad(cond["alignment"], (0, mask.shape[1] - cond["alignment"].shape[1]))
        which, phase = alignment.long(), math.pi * alignment.frac()  # (B, N * patch)
        text = text.take_along_dim(which[:, :, None], 1)
        text = text + self.phase_in(torch.stack([phase.cos(), phase.sin()], 2))
        return torch.where(cond["drop"][:, None, None], self.no_text, text) * mask[:, :, None]

    def embed_condition(self, t: Tensor, cond: dict) -> Tensor:
        """Time and language in one vector, (B,), (B, E) -> (B, 1, D)."""
        language = self.language_in(cond["language"])
        language = torch.where(cond["drop"][:, None], self.no_language.to(language.dtype), language)
        return (self.time_in(sinusoids(t, self.config.width)) + language)[:, None]

    def token_shortcut(self, cond: dict) -> Tensor:
        """W e of each frame's token, around the blocks (D may be less than C), (B, T, C)."""
        unit = cond["alignment"].long()[:, :, None]
        return self.token_out(cond["tokens"]).take_along_dim(unit, 1) * ~cond["drop"][:, None, None]

    def forward(self, x_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        """(B, T, C), (B,) -> x1_hat (B, T, C), bounded in every frame, 0 behind each item's end."""
        n_frames, patch = x_t.shape[1], self.config.patch
        padding = -n_frames % patch
        mask = torch.arange(n_frames + padding, device=x_t.device) < cond["frames"][:, None]
        x_t = F.pad(x_t, (0, 0, 0, padding)) * mask[:, :, None]  # (B, T + padding, C)
        text = self.embed_text(cond, mask).unflatten(1, (-1, patch))  # (B, N, patch, D)
        # A mean over the patch is learned faster; order_in, zero at first, tells "ab" from "ba".
        x = text.mean(2) + self.order_in(text.flatten(2))  # (B, N, D)
        x = x + self.latent_in(x_t.unflatten(1, (-1, patch)).flatten(2))
        attention_mask = mask[:, None, None, ::patch]  # (B, 1, 1, N), by its first frame
        condition = self.embed_condition(t, cond)
        turns = rotations(x.shape[1], self.config.width // self.config.depth, x.device)
        for block in self.blocks:
            x = block(x, condition, attention_mask, turns)  # (B, N, D)
        shift, scale = self.condition_out(F.silu(condition)).chunk(2, dim=-1)
        x = self.latent_out(modulate(x, shift, scale))  # (B, N, patch * C)
        x = x.unflatten(-1, (patch, -1)).flatten(1, 2)[:, :n_frames].float()  # (B, T, C)
        x = x + self.token_shortcut(cond) + self.position_out[:n_frames]
        return bounded(x, self.config.bound) * mask[:, :n_frames, None]
