"""A student: a small convolutional network that learns letters (CTC) from features of utterances.

It has no language model, and learns until it reads utterances set aside no better.

B batch, T frames, C channels, P positions of Whisper's window.
"""
import copy
import math
import random
from typing import Iterable, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import train
from model import mlp
from plumbing.errors import BadInput
from text import spelling
from text.error_rates import edit_distance, error_rates
from whisper_decoder import FrozenWhisper

VALIDATION = 0.1  # share of a student's sentences that say when it has learned enough
CHECK, PATIENCE, BETTER = 100, 3, 0.95  # steps; checks; what counts as better
RATE = 6e-3  # of learning


def update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """One step: backward, clip, step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()


class Speech(NamedTuple):
    """Utterances of one kind, real or generated."""

    sentences: list
    x1: list[Tensor]  # (T, C) each


def resample(x1: Tensor, times) -> Tensor:
    """Frames at other times, between two of them linearly, (T, C), (T',) -> (T', C)."""
    times = torch.as_tensor(times, dtype=torch.float32).clamp(0, len(x1) - 1)
    before = times.long().clamp(max=max(0, len(x1) - 2))
    x1 = x1[before].lerp(x1[(before + 1).clamp(max=len(x1) - 1)], (times - before)[:, None])
    return F.layer_norm(x1, x1.shape[-1:])


def letters(sentence) -> str:
    """What the student writes: words in lower case, no punctuation."""
    language, text = sentence
    return spelling.between_words(language).join(spelling.letters(text.lower()).split())


class Block(nn.Module):
    """One filter per channel, 9 frames of 40 ms wide, then a perceptron in each frame."""

    def __init__(self, width: int):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(9, width) / 3)
        self.mlp = mlp(width, 2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.shape[1]
        x = F.pad(x, (0, 0, 4, 4))  # shifted sums: faster than Conv1d here
        x = sum(x[:, i : i + frames] * tap for i, tap in enumerate(self.filter))
        return self.mlp(F.layer_norm(x, x.shape[-1:]))


class Student(nn.Module):
    """Six blocks, 2 s wide, over pairs of frames; each pair writes up to two letters."""

    def __init__(self, channels: int, n_letters: int, width: int = 160):
        super().__init__()
        self.first = nn.Linear(2 * channels, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(6))
        self.last = nn.Linear(width, 2 * (n_letters + 1))  # 0 is CTC's blank

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        """(B, T, C), (B,) -> log-probabilities (B, T or T + 1, letters + 1)."""
        x = F.pad(x, (0, 0, 0, x.shape[1] % 2)).unflatten(1, (-1, 2)).flatten(2)
        is_speech = (torch.arange(x.shape[1]) < (frames[:, None] + 1) // 2)[:, :, None]
        x = self.first(x)
        for block in self.blocks:
            y = block(F.layer_norm(x, x.shape[-1:]) * is_speech)
            x = x + F.dropout(y, 0.05, self.training)
        x = self.last(F.layer_norm(x, x.shape[-1:])).unflatten(2, (2, -1)).flatten(1, 2)
        return x.log_softmax(-1)


def student_loss(student: Student, x1: list[Tensor], texts: list[Tensor]) -> Tensor:
    """CTC in nats per letter, mean over the items."""
    frames, n_letters = (torch.tensor([len(x) for x in items]) for items in (x1, texts))
    log_probs = student(nn.utils.rnn.pad_sequence(x1, batch_first=True), frames)
    return F.ctc_loss(log_probs.transpose(0, 1), torch.cat(texts), frames, n_letters,
                      zero_infinity=True)


def vary(x: Tensor, rng: random.Random) -> Tensor:
    """(T, C) at another pace, with an offset and noise: for voices that were not heard."""
    x = resample(x, np.linspace(0, len(x) - 1, round(len(x) * rng.uniform(0.8, 1.2))))
    offset, noise = 0.3 * rng.random(), 0.3 * rng.random()
    return x + offset * torch.randn(x.shape[1]) + noise * torch.randn(x.shape)


def train_student(speech: Speech, alphabet: dict, seed: int, steps: int) -> Student:
    """A student of these utterances: its averaged weights at the least loss on those set aside.

    It stops when PATIENCE checks in a row were hardly BETTER than one before; or after `steps`.
    Its attribute `steps` tells when.
    """
    torch.manual_seed(seed)
    texts = [torch.tensor([alphabet[c] for c in letters(s)]) for s in speech.sentences]
    student = Student(speech.x1[0].shape[1], len(alphabet))
    average, rng = copy.deepcopy(student).eval(), random.Random(seed)
    different = list(dict.fromkeys(speech.sentences))  # of which there may be several utterances
    order = torch.randperm(len(different)).tolist()
    n_validation = max(1, min(200, round(VALIDATION * len(order))))
    aside = {different[i] for i in order[:n_validation]}
    validation = [i for i, s in enumerate(speech.sentences) if s in aside]
    training = [i for i, s in enumerate(speech.sentences) if s not in aside]
    optimizer = torch.optim.AdamW(student.parameters(), RATE, (0.9, 0.98), weight_decay=0.01)
    best, lowest, good, since = None, math.inf, math.inf, 0
    for step in (bar := tqdm(range(1, steps + 1), desc="student", leave=False)):
        pool = sorted(rng.choices(training, k=48), key=lambda i: len(speech.x1[i]))
        first = rng.randrange(0, 48, 12)  # 12 of like length, so that little is padded
        picks = pool[first : first + 12]
        loss = student_loss(student, [vary(speech.x1[i], rng) for i in picks],
                            [texts[i] for i in picks])
        update(student, optimizer, loss, RATE * min(1, step / 50))
        with torch.no_grad():
            for averaged, new in zip(average.parameters(), student.parameters()):
                averaged.lerp_(new, max(0.01, 1 / step))
            if step % CHECK and step < steps:
                continue
            held_out = student_loss(average, *([kind[i] for i in validation]
                                               for kind in (speech.x1, texts))).item()
        bar.set_postfix(validation=f"{held_out:.3f}")
        if best is None or held_out < lowest:
            best, lowest = copy.deepcopy(average), held_out
        if held_out < BETTER * good:
            good, since = held_out, step
        if step - since >= PATIENCE * CHECK:
            break
    else:
        print(f"note: after {steps} steps a student was still learning; give it more --steps")
    best.steps = step
    return best


@torch.no_grad()
def student_cer(student: Student, speech: Speech, alphabet: dict) -> float:
    """Edits per letter that the sentences have, of the best path: repeats joined, no blanks."""
    letter_of, edits = {i: letter for letter, i in alphabet.items()}, 0
    for sentence, x in zip(*speech):
        logits = student(x[None], torch.tensor([len(x)]))[0, : len(x)]
        best = logits.argmax(-1).unique_consecutive()
        edits += edit_distance(letters(sentence), "".join(letter_of[i] for i in best.tolist() if i))
    return edits / sum(len(letters(s)) for s in speech.sentences)


def load_judge(checkpoint: dict, device: torch.device, name: str) -> FrozenWhisper:
    """Another Whisper, to read x1 of a checkpoint; BadInput if it is of another kind."""
    judge = train.LATENTS[checkpoint["config"]["latent"]](name, device)
    channels = checkpoint["model_config"]["channels"]
    if channels != judge.channels:
        raise BadInput(f"the checkpoint makes {channels} channels a frame and {judge.name} reads "
                       f"{judge.channels}; give a Whisper of the same kind")
    return judge


def check_hears(name: str, other: FrozenWhisper, critic: FrozenWhisper) -> None:
    """BadInput unless another Whisper, which goes by a name, hears whatever the critic does."""
    has, needed = ((w.dims.n_mels, w.max_frames) for w in (other, critic))
    if has[0] != needed[0] or has[1] < needed[1]:
        raise BadInput(f"{name} has {has[0]} mel bins and {has[1]} frames, the critic {needed[0]} "
                       f"and {needed[1]}; give one with as many")


@torch.no_grad()
def greedy_cer(whisper: FrozenWhisper, sentences: list, features: Iterable[Tensor]) -> float:
    """Character error rate of a Whisper in features of some sentences at a time, (B, P, E)."""
    read = []
    for part in features:
        codes = [s.language for s in sentences[len(read) : len(read) + len(part)]]
        read += [result.text for result in whisper.transcribe(part, codes)]
    return error_rates(sentences, read).cer


def others(sentences: list) -> list:
    """In place of each sentence the next one of its language."""
    after, first = list(sentences), {}
    for i in reversed(range(len(sentences))):
        code = sentences[i].language
        after[i], first[code] = first.get(code), sentences[i]
    return [s or first[old.language] for s, old in zip(after, sentences)]


@torch.no_grad()
def language_accuracy(whisper: FrozenWhisper, sentences: list, features: Iterable[Tensor]) -> float:
    """How often a Whisper hears the right language in features of some sentences, (B, P, E)."""
    guesses = [p for part in features for p in whisper.model.detect_language(part)[1]]
    return sum(max(p, key=p.get) == s.language for p, s in zip(guesses, sentences)) / len(sentences)
