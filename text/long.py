"""Texts too long for the decoder are cut into pieces that fit, and what was read is joined."""
import re
from typing import Callable, Sequence

from data import Sentence, char_durations, count_frames, words
from plumbing.errors import BadInput
from whisper_decoder import FrozenWhisper

# Where a text that is too long may be cut, the best place first. Never before a combining mark.
CUTS = (r"(?<=[.!?…]\s)|(?<=[。！？।؟])", r"(?<=[,;:]\s)|(?<=[，、；：،])", r"(?<=\s)",
        r"(?<=.)(?=[\w\U00010000-\U0010ffff])")


def fits(sentence: Sentence, whisper: FrozenWhisper, speed: float,
         durations: Callable = char_durations) -> bool:
    """Whether the decoder can hear and write it at once."""
    language, text = sentence
    return (count_frames(durations(sentence, speed)) <= whisper.max_frames
            and (len(text.encode()) < whisper.max_tokens  # a token is a byte or more
                 or len(whisper.encode(text, language)) <= whisper.max_tokens))


def split_long(sentence: Sentence, whisper: FrozenWhisper, speed: float = 1.0,
               durations: Callable = char_durations) -> list[Sentence]:
    """A text too long for the decoder -> pieces that fit: sentences, else as long as possible."""
    language, text = sentence
    if fits(sentence, whisper, speed, durations):
        return [sentence]
    for cut in CUTS:
        if len(parts := re.split(f"(?:{cut})(?!$)", text)) > 1:
            break
    else:
        raise BadInput(f"{text[:60]!r} at speed {speed:.2g} is longer than {whisper.name} can "
                       "hear, and cannot be cut; shorten it, or raise --speed")
    pieces = parts[:1]
    for part in parts[1:]:
        is_whole = cut == CUTS[0] and len(words(pieces[-1], language)) > 2  # not just "Dr."
        longer = Sentence(language, pieces[-1] + part)
        if is_whole or not fits(longer, whisper, speed, durations):
            pieces.append(part)
        else:
            pieces[-1] = longer.text
    return [short for piece in pieces if words(piece, language)  # not a lonely bracket
            for short in split_long(Sentence(language, piece.strip()), whisper, speed, durations)]


def join(whole: str, pieces: Sequence[str], hypotheses: Sequence[str]) -> str:
    """What was read in the pieces of a text, joined where they were cut: in or between words."""
    joined, end = "", 0
    for piece, hypothesis in zip(pieces, hypotheses):
        start = whole.index(piece, end)
        joined += (" " if " " in whole[end:start] else "") + hypothesis
        end = start + len(piece)
    return joined
