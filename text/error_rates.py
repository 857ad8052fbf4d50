"""How much of a text comes back: Levenshtein distance after Whisper's own normaliser.

Except (but in English) marks: it blanks them; without vowel signs Hindi's "की" and "का" are one.
"""
import sys
import unicodedata
from collections import defaultdict
from functools import cache
from typing import NamedTuple, Sequence

import numpy as np
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

from text.spelling import UNSPACED, between_words, strip_unspoken


if hasattr(sys, "set_int_max_str_digits"):  # Whisper's normaliser fails at 4,301 digits
    sys.set_int_max_str_digits(0)


def keep_marks(text: str) -> str:
    """A blank for each symbol and sign of punctuation, as Whisper has it, but not for marks."""
    return "".join(" " if unicodedata.category(c)[0] in "SP" else c
                   for c in unicodedata.normalize("NFKC", text))


@cache
def normalizer(language: str):
    """Whisper's own, see above: lower case, no punctuation; in English one spelling, digits."""
    if language == "en":
        return EnglishTextNormalizer()
    basic = BasicTextNormalizer(split_letters=language in UNSPACED)
    basic.clean = keep_marks
    return basic


def edit_distance(reference: Sequence, hypothesis: Sequence) -> int:
    """Levenshtein distance: fewest insertions, deletions and substitutions."""
    ids = {token: i for i, token in enumerate({*reference, *hypothesis})}
    hyp, row = np.array([ids[token] for token in hypothesis], int), np.arange(len(hypothesis) + 1)
    insertions = row.copy()
    for i, token in enumerate(reference, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + (hyp != ids[token]))
        # Insertions after the best of all that came before: a running minimum.
        row = np.minimum.accumulate(np.append(i, best) - insertions) + insertions
    return int(row[-1])


class ErrorRates(NamedTuple):
    cer: float  # character error rate: edits / characters of the references
    wer: float  # word error rate; in languages without spaces a character is a word
    exact: float  # share of texts that come back letter by letter, punctuation included


def cer_by_language(sentences: Sequence[tuple[str, str]],
                    hypotheses: Sequence[str]) -> dict[str, float]:
    """The character error rate of each language, in the order of the sentences."""
    pairs = defaultdict(list)
    for sentence, hypothesis in zip(sentences, hypotheses, strict=True):
        pairs[sentence[0]].append((sentence, hypothesis))
    return {code: error_rates(*zip(*group)).cer for code, group in pairs.items()}


def error_rates(sentences: Sequence[tuple[str, str]],  # (language, text)
                hypotheses: Sequence[str]) -> ErrorRates:
    """Corpus error rates after Whisper's normaliser, as fractions (above 1 if too much is read)."""
    edits, total, exact = np.zeros(2), np.zeros(2), 0
    for (language, reference), hypothesis in zip(sentences, hypotheses, strict=True):
        reference = strip_unspoken(reference)  # what it was asked to write
        exact += reference == hypothesis
        normalize = normalizer(language)
        if not normalize(reference):  # of fillers alone, such as "Hmm.", which English's deletes
            normalize = normalizer("")
        ref, hyp = (normalize(text).split() for text in (reference, hypothesis))
        join = between_words(language).join
        letters = join(ref)
        edits += edit_distance(letters, join(hyp)), edit_distance(ref, hyp)
        total += len(letters), len(ref)
    cer, wer = edits / np.maximum(total, 1)
    return ErrorRates(float(cer), float(wer), exact / max(len(sentences), 1))
