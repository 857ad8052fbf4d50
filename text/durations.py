"""The length rule: how long each character of a text is spoken, and so how many frames it lasts."""
import math
import unicodedata
from functools import lru_cache

import numpy as np

from plumbing.errors import BadInput
from plumbing.weights import POCKET
from text.spelling import JOINERS, UNSPACED, strip_unspoken, words

FRAMES_PER_SECOND = 50  # of latents: two 10 ms hops each (whisper.audio: TOKENS_PER_SECOND)
MIN_SECONDS = 0.6
DIGIT, BLANK = 4.0, 0.5  # how long digits, and blanks and signs, are said; a letter: 1
# All languages of Whisper: its code, that of ISO 639-3 (as Tatoeba writes it), words per second
# (characters in UNSPACED; "-": not known), a sentence. experiments/pace.py measures the pace.
LANGUAGE_ROWS = [line.split("\t") for line in
                 (POCKET / "languages.tsv").read_text("utf-8").splitlines()]
PACE = {code: float(pace) for code, _, pace, _ in LANGUAGE_ROWS if pace != "-"}
DEFAULT_WORDS, DEFAULT_CHARACTERS = 2.7, 7.0  # per second, where it is not known: a mean; a guess


@lru_cache(2**12)  # it is asked for wherever a length is needed
def char_durations(sentence: tuple[str, str], speed: float = 1.0) -> np.ndarray:
    """(language, text) -> frames that each character lasts (S,), at speed 2 half as many, but a
    letter at least one.

    Raises BadInput for a speed that is out of range.
    """
    if not 0.1 <= speed <= 10:
        raise BadInput(f"speed {speed} is out of range; 1 is natural, 0.1 to 10 is possible")
    language, text = sentence
    weight = dict(L=1.0, M=1.0, N=DIGIT)  # letters, their marks, digits
    weights = np.array([0.0 if c in JOINERS else weight.get(unicodedata.category(c)[0], BLANK)
                        for c in strip_unspoken(text)])
    pace = PACE.get(language, DEFAULT_CHARACTERS if language in UNSPACED else DEFAULT_WORDS)
    # A digit is said as a word.
    n_words = sum(max(1, sum(map(str.isdigit, word))) for word in words(text, language))
    seconds = max(n_words / pace, MIN_SECONDS) / speed
    frames = math.ceil(max(seconds * FRAMES_PER_SECOND, weights.sum()))
    durations = weights / weights.sum() * frames
    durations.flags.writeable = False  # the cache keeps it
    return durations


def count_frames(durations: np.ndarray) -> int:
    """Whole frames that durations (S,) need."""
    return math.ceil(round(float(durations.sum()), 3))  # no frame more for a rounding error


def n_frames(sentence: tuple[str, str], speed: float = 1.0) -> int:
    """Frames that (language, text) lasts by the length rule."""
    return count_frames(char_durations(sentence, speed))
