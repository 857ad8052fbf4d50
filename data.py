"""Text in, batches out: sentences, hold-out split, characters over frames, batches.

B batch, S characters, U units (a character is one, or k if it is k tokens), T latent
frames, L prompt + text + end tokens, C channels, N sentences.
"""
import hashlib
import math
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model import BYTES, CAPITAL
from plumbing.errors import BadInput
from text.durations import char_durations, count_frames
from text.spelling import latin_letter, letters, strip_unspoken
from whisper_decoder import FrozenWhisper

HELD_OUT = 0.1  # share of the sentences that training never sees


class Sentence(NamedTuple):
    language: str  # Whisper's code, such as "en"
    text: str


# ---- sentences -------------------------------------------------------------------------------


def key(sentence: Sentence) -> tuple:
    """Equal for sentences that differ only in punctuation, spaces and case."""
    return sentence.language, "".join(letters(sentence.text.lower()).split())


def hash_share(sentence: Sentence) -> float:
    """A number in [0, 1) that depends on the sentence alone."""
    return int(hashlib.sha256("\t".join(sentence).encode()).hexdigest()[:12], 16) / 16**12


def split(sentences: Sequence[Sentence]) -> tuple[list[Sentence], list[Sentence]]:
    """Training and held-out sentences, by a hash of each, so that a new line hardly moves others.

    Held out is a tenth, and at least one, of each language that has several sentences. Training
    sentences whose `key` is that of a held-out one are dropped. Raises BadInput.
    """
    hashes = {s: hash_share(s) for s in sentences}
    order = sorted(sentences, key=hashes.get)  # random, but fixed: evaluation takes the first
    first = {s.language: s for s in reversed(order)}  # of each language
    several = {s.language for s in order if s != first[s.language]}
    held_out = [s for s in order if s.language in several
                and (hashes[s] <= HELD_OUT or s == first[s.language])] or order[:1]
    keys = {key(s) for s in held_out}  # of these sentences and their near copies
    training = [s for s in sentences if key(s) not in keys]
    if not training:
        raise BadInput(f"{len(sentences)} usable sentences are too few, as some are held out; give "
                       "more, in languages that Whisper knows")
    return training, held_out


def per_language(sentences: Sequence[Sentence], n: int) -> list[Sentence]:
    """Equally many sentences of every language, n in all (rounded up) or as many as there are."""
    languages = sorted({s.language for s in sentences})
    groups = ([s for s in sentences if s.language == code] for code in languages)
    return [s for group in groups for s in group[: math.ceil(n / len(languages))]]


# ---- batches ---------------------------------------------------------------------------------


def characters(text: str) -> Tensor:
    """Ids of each character, (S, BYTES + 2), whose embeddings are summed; 0 adds nothing."""
    rows = []
    for c in strip_unspoken(text):
        lower = c.lower()[0]  # of the two of "İ".lower() the first will do
        # An id for each UTF-8 byte and its place; "é" and "ж" also have the id of "e" and "z".
        ids = [1 + 256 * i + byte for i, byte in enumerate(lower.encode())]
        latin = "" if lower.isascii() else latin_letter(lower)
        rows.append([*ids, *[0] * (BYTES - len(ids)), 1 + ord(latin) if latin else 0,
                     CAPITAL if c != c.lower() else 0])
    return torch.tensor(rows)


def align_text(sentence: Sentence, durations: np.ndarray, frames: int,
               whisper: FrozenWhisper) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spread a text over its frames; durations (S,): of its characters, relative to each other.

    -> chars (U, BYTES + 2) and token (U,) of each unit; alignment (T,): at the middle of each frame
    the index of its unit plus how far into it (a unit shorter than a frame may have none); the
    middle of each token, in frames.
    A unit is the part of a character in one token: "the" has three, "河", of two tokens, has two.
    """
    language, text = sentence
    tokens = whisper.tokenize(text, language)
    encoding = whisper.tokenizer("en").encoding  # the same for all languages
    token_ends = np.cumsum([len(encoding.decode_single_token_bytes(t)) for t in tokens])
    char_ends = np.cumsum([len(c.encode()) for c in strip_unspoken(text)])  # in bytes
    token_ends -= token_ends[-1] - char_ends[-1]  # the blank that `tokenize` puts in front
    ends = np.union1d(char_ends, token_ends)  # of units
    of_token, of_char = (np.searchsorted(x, ends) for x in (token_ends, char_ends))
    unit_durations = (durations / np.bincount(of_char))[of_char]  # they share that of a character
    times = np.cumsum([0, *unit_durations])
    times *= frames / times[-1]
    alignment = np.interp(np.arange(frames) + 0.5, times, range(len(times)))
    middles = np.interp((token_ends + [0, *token_ends[:-1]]) / 2, [0, *ends], times)
    return (characters(text)[of_char], torch.tensor(tokens)[of_token],
            torch.tensor(alignment).float(), torch.tensor(middles).float())


class Batch(NamedTuple):
    """Padded items; before `to`, cond's tokens (B, U) and language (B,) are ids, not embeddings."""

    sentences: list[Sentence]
    cond: dict[str, Tensor]  # what model.DiT takes
    targets: Tensor  # (B, L) prompt, text and end tokens, padded with -1
    token_frames: Tensor  # (B, L) the middle frame of each text token, -1: none; for the ear's lens
    x1: Tensor | None = None  # (B, T, C) of recordings

    @property
    def mask(self) -> Tensor:
        """True in the frames of an item, (B, T)."""
        position = torch.arange(self.cond["alignment"].shape[1], device=self.targets.device)
        return position < self.cond["frames"][:, None]

    def to(self, whisper: FrozenWhisper) -> "Batch":
        """To Whisper's device; ids become embeddings, so it must not be called twice."""
        cond = {name: x.to(whisper.device) for name, x in self.cond.items()}
        cond |= {name: whisper.embed(cond[name]) for name in ("tokens", "language")}
        x1 = None if self.x1 is None else self.x1.to(whisper.device).float()
        targets, token_frames = (x.to(whisper.device) for x in (self.targets, self.token_frames))
        return Batch(self.sentences, cond, targets, token_frames, x1)


def make_batch(sentences: Sequence[Sentence], whisper: FrozenWhisper,
               durations: Sequence[np.ndarray], x1: Sequence[Tensor] | None = None) -> Batch:
    """Sentences, their durations (S,), latents of recordings (T, C) -> padded, on the CPU."""
    codes, texts = zip(*sentences)
    frames = [min(count_frames(d), whisper.max_frames) for d in durations]  # sped up to fit
    chars, tokens, alignment, token_frames = zip(
        *(align_text(*item, whisper) for item in zip(sentences, durations, frames)))
    token_frames = [F.pad(x, (whisper.n_prompt, 1), value=-1) for x in token_frames]
    cond = dict(
        chars=pad_sequence(chars, True), tokens=pad_sequence(tokens, True),
        alignment=pad_sequence(alignment, True), frames=torch.tensor(frames),
        language=torch.tensor([whisper.language_token(code) for code in codes]),
        drop=torch.zeros(len(texts), dtype=torch.bool))
    return Batch(list(sentences), cond, whisper.target_tokens(texts, codes),
                 pad_sequence(token_frames, True, padding_value=-1),
                 None if x1 is None else pad_sequence(x1, True))


def draw(sums: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """n items, (n,), by running sums of their weights (N,), as torch.multinomial; O(log N) each."""
    return torch.searchsorted(sums, sums[-1] * torch.rand(n, generator=rng, dtype=torch.double))


def draw_similar(sums: Tensor, frames: Tensor, n: int, rng: torch.Generator) -> list[int]:
    """n items of similar length, frames (N,), to pad less: a quarter of 4n draws, sorted."""
    picks = draw(sums, 4 * n, rng)
    picks = picks[frames[picks].argsort(stable=True)]
    first = n * int(torch.randint(4, (), generator=rng))
    return picks[first : first + n].tolist()


class Batches(torch.utils.data.Dataset):
    """batches[step] follows from seed and step alone; shares: how often a sentence is drawn."""

    def __init__(self, shares: dict[Sentence, float], whisper: FrozenWhisper, batch_size: int,
                 seed: int, speed: float, speed_range: float):
        self.sentences, self.whisper, self.seed = list(shares), whisper, seed
        self.batch_size, self.speed, self.speed_range = batch_size, speed, speed_range
        self.shares = torch.tensor(list(shares.values()), dtype=torch.double)
        self.sums = self.shares.cumsum(0)  # for draw_similar
        self.set_durations(char_durations)

    def set_durations(self, durations: Callable) -> None:
        """How long characters last, by a rule, or by `speech.align.durations_by`."""
        self.durations_of = durations
        self.durations = [durations(s, self.speed) for s in self.sentences]
        self.frames = torch.tensor([d.sum() for d in self.durations])

    def draw(self, step: int, rng: torch.Generator) -> list[tuple[Sentence, np.ndarray]]:
        """The sentences of a step, each with its durations (S,) at `self.speed`."""
        picks = draw_similar(self.sums, self.frames, self.batch_size, rng)
        return [(self.sentences[i], self.durations[i]) for i in picks]

    def __getitem__(self, step: int) -> Batch:
        rng = generator(self.seed, step)
        sentences, durations = zip(*self.draw(step, rng))
        factors = self.speed_range ** (2 * torch.rand(len(sentences), generator=rng) - 1)
        durations = [d / factor for d, factor in zip(durations, factors.tolist())]
        return make_batch(sentences, self.whisper, durations)


def generator(seed: int, number: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator for a pair of numbers, hashed, as torch uses only 32 bits of a seed."""
    return torch.Generator(device).manual_seed((2654435761 * seed + number) % 2**32)


def sentence_generator(sentence: Sentence, seed: int,
                       device: str | torch.device = "cpu") -> torch.Generator:
    """Random numbers of a sentence, the same alone or in a batch."""
    return generator(seed, int(hash_share(sentence) * 2**31), device)


def noise(batch: Batch, channels: int, seed: int) -> Tensor:
    """x0 from the seed and each item's own sentence: the same alone or in a batch (B, T, C)."""
    items = [torch.randn(n, channels, generator=sentence_generator(sentence, seed))
             for sentence, n in zip(batch.sentences, batch.cond["frames"].tolist())]
    return pad_sequence(items, True).to(batch.targets.device)
