"""Which character sounds when: forced alignment of recordings, and the rhythm that they show.

T frames (20 ms), S characters of `data.characters`, N spoken symbols, K kinds, C channels.
"""
from collections import Counter
from typing import Callable, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from data import Sentence
from text.durations import char_durations
from text.spelling import JOINERS, is_letter, letters, strip_unspoken

PAUSE, EDGE = " ", "\n"  # between words; before the first and after the last character
ROUNDS = 10  # of Viterbi training
STRAY = 0.06  # standard deviation of a symbol from even spacing; 1: the whole utterance
CONTEXT = 4  # characters on both sides that decide how long one lasts
RIDGE = 3.0  # strength of the regression's penalty
MOST_CHARS = 300  # of a language, the most frequent, are told apart
ENOUGH = 30  # characters; a language with fewer keeps the length rule
SHORTEST = 0.7  # frames of a letter


def symbols(text: str) -> str:
    """The characters of `data.characters` in lower case, length S."""
    return "".join(c.lower()[0] for c in strip_unspoken(text))


# ---- forced alignment ------------------------------------------------------------------------


def spoken_symbols(text: str) -> tuple[str, list[int]]:
    """What is spoken of a text: letters, a pause after each word; their positions among S (N,).

    Of several signs in a row the first is the pause; the others, joiners and signs in front take
    no time. Without a sign at the end the last letter counts as the pause, too.
    """
    spelling = letters(symbols(text))  # and pauses
    positions = [i for i, c in enumerate(spelling) if c not in JOINERS
                 and (c != PAUSE or i and spelling[i - 1] != PAUSE)]
    spoken = "".join(spelling[i] for i in positions)
    is_ended = spoken.endswith(PAUSE)  # with a pause
    return (spoken, positions) if is_ended else (spoken + PAUSE, [*positions, positions[-1]])


def best_path(score: np.ndarray) -> np.ndarray:
    """Viterbi: scores of symbols in frames (T, N) -> the symbol of each frame (T,), none left out.

    Rabiner 1989, III.B, where a symbol is followed by itself or by the next one only.
    """
    n_frames, n_symbols = score.shape
    best, moved = np.full(n_symbols, -np.inf), np.zeros(score.shape, bool)
    best[0] = score[0, 0]
    for t in range(1, n_frames):
        from_before = np.concatenate([[-np.inf], best[:-1]])
        moved[t] = from_before > best
        best = np.maximum(best, from_before) + score[t]
    path = np.full(n_frames, n_symbols - 1)
    for t in range(n_frames - 1, 0, -1):
        path[t - 1] = path[t] - moved[t, path[t]]
    return path


def viterbi_training(texts: Sequence[str], clips: Sequence[Tensor]) -> list[np.ndarray]:
    """Spoken texts (N,) and their frames (T, C), T >= N -> frames that each symbol lasts (N,).

    A hidden Markov model: in turn the mean frame of every symbol, around which all have one
    covariance, and the best path through every utterance. Flat start: all symbols are equally long,
    and no path may stray far from that, or one symbol would take all that fits none.
    """
    names = sorted(set("".join(texts)))
    states = [np.array([names.index(c) for c in text]) for text in texts]
    paths = [np.arange(len(x)) * len(s) // len(x) for s, x in zip(states, clips)]
    n_frames = sum(map(len, clips))
    square = sum((x := clip.float().numpy()).T @ x for clip in clips) / n_frames
    for _ in range(ROUNDS):
        total, count = np.zeros((len(names), len(square))), np.zeros((len(names), 1))
        for s, path, clip in zip(states, paths, clips):
            np.add.at(total, s[path], clip.float().numpy())
            np.add.at(count, s[path], 1)
        mean = (total + 3 * total.sum(0) / n_frames) / (count + 3)  # a prior of three frames
        cov = square - (total / count.clip(1)).T @ total / n_frames  # within symbols
        cov += 0.1 * cov.trace() / len(cov) * np.eye(len(cov))
        weight = np.linalg.solve(cov, mean.T).astype(np.float32)  # (C, K)
        offset = -0.5 * (mean.T * weight).sum(0)
        for i, (s, clip) in enumerate(zip(states, clips)):
            score = (clip.float().numpy() @ weight + offset)[:, s]  # log-density + constant (T, N)
            position = (np.arange(len(clip)) + 0.5)[:, None] / len(clip)  # of frames (T, 1)
            even = (np.arange(len(s)) + 0.5) / len(s)  # of symbols, were they equally long (N,)
            paths[i] = best_path(score - 0.5 * np.square((position - even) / STRAY))
    return [np.bincount(path, minlength=len(s)) for s, path in zip(states, paths)]


def align_characters(sentences: Sequence[Sentence], x1: Sequence[Tensor]) -> list[np.ndarray]:
    """What recordings say, and their latents (T, C) -> frames that each character lasts (S,)."""
    durations = [np.zeros(len(symbols(s.text)), int) for s in sentences]
    for language in {s.language for s in sentences}:
        items = [i for i, s in enumerate(sentences) if s.language == language]
        texts, positions = zip(*(spoken_symbols(sentences[i].text) for i in items))
        n_frames = viterbi_training(texts, [x1[i] for i in items])
        for i, of_symbols, n in zip(items, positions, n_frames):
            np.add.at(durations[i], of_symbols, n)
    return durations


# ---- rhythm ----------------------------------------------------------------------------------


def neighbours(text: str, chars: str) -> np.ndarray:
    """Numbers of each symbol and those around it (S, 2 CONTEXT + 1); 0: not among the chars."""
    numbers = [chars.find(c) + 1 for c in EDGE * CONTEXT + text + EDGE * CONTEXT]
    return sliding_window_view(numbers, 2 * CONTEXT + 1)


def fit_rhythm(sentences: Sequence[Sentence], durations: Sequence[np.ndarray]) -> dict:
    """How long characters last in recordings, given their neighbours: sentences and their durations
    (S,) -> of each language chars, the n that are told apart, and frames, what each adds by its
    place to a duration, (2 CONTEXT + 1, n + 1).

    Ridge regression in each language, y = mean + X w, where a row of X says by 0 and 1 which
    character stands where around one: (X^T X + RIDGE) w = X^T (y - mean).
    """
    chars, tables = {}, {}
    for code in dict.fromkeys(s.language for s in sentences):
        items = [(symbols(s.text), n) for s, n in zip(sentences, durations) if s.language == code]
        frames = np.concatenate([n for _, n in items])
        if len(frames) < ENOUGH:
            continue
        counts = Counter(c for text, _ in items for c in text)
        chars[code] = EDGE + "".join(c for c, _ in counts.most_common(MOST_CHARS))
        shape = 2 * CONTEXT + 1, len(chars[code]) + 1
        gram, moment = RIDGE * np.eye(shape[0] * shape[1]), np.zeros(shape[0] * shape[1])
        for text, n in items:
            ones = neighbours(text, chars[code]) + shape[1] * np.arange(shape[0])  # of X
            np.add.at(gram, (ones[:, :, None], ones[:, None]), 1)
            np.add.at(moment, ones, (n - frames.mean())[:, None])
        table = np.linalg.solve(gram, moment).reshape(shape)
        table[CONTEXT] += frames.mean()
        tables[code] = (table.round(4) + 0).tolist()  # + 0: no -0.0
    return dict(chars=chars, frames=tables)


def durations_by(rhythm: dict | None) -> Callable:
    """(sentence, speed) -> frames of its characters (S,), as `fit_rhythm` says; by the length rule
    where that says nothing."""
    if not rhythm:
        return char_durations
    chars = rhythm["chars"]
    frames = {code: np.array(table) for code, table in rhythm["frames"].items()}

    def durations(sentence: Sentence, speed: float = 1.0) -> np.ndarray:
        code, text = sentence.language, symbols(sentence.text)
        rule = char_durations(sentence, speed)  # BadInput where the speed is out of range
        if code not in chars:
            return rule
        added = np.arange(2 * CONTEXT + 1), neighbours(text, chars[code])
        shortest = [SHORTEST if is_letter(c) else 0.0 for c in text]
        return frames[code][added].sum(1).clip(shortest) / speed

    return durations
