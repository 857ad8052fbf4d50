"""Texts too long for the decoder are cut into pieces that fit; long and short ones are learned."""
import re
from typing import Callable, Sequence

import numpy as np
import torch

import data
from data import Sentence
from plumbing.errors import BadInput
from text.durations import char_durations, count_frames
from text.spelling import TWO_I, UNSPACED, between_words, words
from whisper_decoder import FrozenWhisper

EVERY = 4  # batches: one of them is of long texts, and one of a few words each
WINDOW = 1000  # frames: a Whisper that hears less at once, as pocket, gets single sentences
FEW = 4  # words of a short text, at most
SPELLED = 3  # one short text in so many has a spelled word
LETTERS = 6  # of a word that is spelled, at most

# Where a text may be cut, the best place first. Never before a combining mark. A sentence ends with
# its quotes and brackets, and not at "3. " or "Dr. ".
END, CLOSE = ".!?…。！？।؟", "\"'”“’»«)\\]」』）"
SENTENCES = (rf"(?:(?<=[{END}]\s)|(?<=[{END}][{CLOSE}]\s)|(?<=[{END}][{CLOSE}]{{2}}\s)|"
             rf"(?<=[{END}]\s»\s))"
             r"(?<!\b\w[.]\s)(?<!\d[.]\s)(?<!\b(?:Mr|Ms|Dr|St|Mt|Lt|vs|Sr|EE|Pr|Hl)[.]\s)"
             r"(?<!\b(?:Mrs|Rev|Sra|Dra|Mme)[.]\s)(?<!\b(?:Prof|Mlle)[.]\s)"
             rf"(?![»”’)\]」』）{END}])|(?<=[。！？।؟])(?![\s\"'”’»«)\]」』）{END}])|"
             rf"(?<=[。！？][」』”’）])(?![」』”’）{END}])")
CUTS = (SENTENCES, r"(?<=[,;:]\s)|(?<=[，、；：،])", r"(?<=\s)",
        r"(?<=.)(?=[\w\U00010000-\U0010ffff])")


def fits(sentence: Sentence, whisper: FrozenWhisper, speed: float,
         durations: Callable = char_durations) -> bool:
    """Whether the decoder can hear and write it at once."""
    language, text = sentence
    return (count_frames(durations(sentence, speed)) <= whisper.max_frames
            and (len(text.encode()) < whisper.max_tokens  # a token is a byte or more
                 or len(whisper.tokenize(text, language)) <= whisper.max_tokens))


def split_long(sentence: Sentence, whisper: FrozenWhisper, speed: float = 1.0,
               durations: Callable = char_durations) -> list[Sentence]:
    """A text too long for the decoder -> pieces that fit: sentences, else as long as possible.

    A Whisper that hears less than WINDOW, which learned no two sentences at once, gets each alone;
    one of a single word (zh: character) goes with the next (for others: of one or two words).
    """
    language, text = sentence
    is_short = fits(sentence, whisper, speed, durations)
    if is_short and whisper.max_frames >= WINDOW:
        return [sentence]
    for cut in [SENTENCES] if is_short else CUTS:
        if len(parts := re.split(f"(?:{cut})(?!$)", text)) > 1:
            break
    else:
        if not is_short:
            raise BadInput(f"{text[:60]!r} at speed {speed:.2g} is longer than {whisper.name} can "
                           "hear, and cannot be cut; shorten it, or raise --speed")
    pieces, few = parts[:1], 1 if whisper.max_frames < WINDOW else 2
    for part in parts[1:]:
        first = next(filter(str.isalpha, part), "")  # "Go!" he said.
        is_whole = (cut == SENTENCES and not first.islower()
                    and len(words(pieces[-1], language)) > few)  # "Yes. I do."
        longer = Sentence(language, pieces[-1] + part)
        if is_whole or not fits(longer, whisper, speed, durations):
            pieces.append(part)
        else:
            pieces[-1] = longer.text
    if len(pieces) == 1:  # it fits
        return [sentence]
    return [short for piece in pieces if any(map(str.isalnum, piece))  # not a lonely bracket
            for short in split_long(Sentence(language, piece.strip()), whisper, speed, durations)]


def spell(word: str, language: str) -> str:
    """ "sun" -> "S U N"; itself, if it is long, or no word in an alphabet with capitals."""
    dotted = word.replace("i", "İ") if language in TWO_I else word
    capitals = dotted.upper()  # Georgian has them, too, but begins no word with one
    has_capitals = capitals != word.lower() and capitals[:1] == dotted[:1].title()
    is_short = len(word) <= LETTERS and word.isalpha() and capitals.isalpha()  # no lonely marks
    return " ".join(capitals) if is_short and has_capitals else word


def join(whole: str, pieces: Sequence[str], hypotheses: Sequence[str]) -> str:
    """What was read in the pieces of a text, joined where they were cut: in or between words."""
    joined, end = "", 0
    for piece, hypothesis in zip(pieces, hypotheses):
        start = whole.index(piece, end)
        joined += (" " if " " in whole[end:start] else "") + hypothesis
        end = start + len(piece)
    return joined.strip()  # in front of the first there may be signs alone


class MixedBatches(data.Batches):
    """`data.Batches`, but of four in a row the first has long texts, a quarter as many, and the
    third a few words of each sentence.

    Long and short texts are rare. A flow that never learned them repeats itself after ten seconds,
    and says a lonely word twice. Where Whisper hears less than WINDOW, batches are as they were.
    """

    def __init__(self, shares: dict[Sentence, float], whisper: FrozenWhisper, batch_size: int,
                 seed: int, speed: float, speed_range: float, held_out: Sequence[Sentence] = ()):
        super().__init__(shares, whisper, batch_size, seed, speed, speed_range)
        self.held_out = {*map(data.key, held_out)}
        codes = np.array([sentence.language for sentence in self.sentences])
        self.of_language = {c: torch.from_numpy(np.flatnonzero(codes == c)) for c in {*codes}}
        self.sums_of = {code: self.shares[i].cumsum(0) for code, i in self.of_language.items()}

    def draw(self, step: int, rng: torch.Generator) -> list[tuple[Sentence, np.ndarray]]:
        turn = step % EVERY
        if self.whisper.max_frames < WINDOW or turn not in (0, EVERY // 2):
            return super().draw(step, rng)
        size = self.batch_size
        n, change = (size, self.shorten) if turn else (max(1, size // EVERY), self.lengthen)
        picks = data.draw_similar(self.sums, self.frames, n, rng)
        sentences = [change(self.sentences[i], rng) for i in picks]
        return [(s, self.durations_of(s, self.speed)) for s in sentences]

    def shorten(self, sentence: Sentence, rng: torch.Generator) -> Sentence:
        """A few words of it, or characters in UNSPACED; itself, if they are held out or signs.

        Some are spelled: letters by themselves are rare in text, and a flow that never learned them
        makes the decoder repeat one without end.
        """
        language, text = sentence
        parts = re.split(CUTS[-1], text) if language in UNSPACED else text.split()
        draw = lambda n: int(torch.randint(n, (), generator=rng))  # noqa: E731
        n = 1 + draw(min(FEW, len(parts)))
        first = draw(len(parts) - n + 1)
        few = parts[first : first + n]
        if draw(SPELLED) == 0:
            i = draw(n)
            few[i] = spell(few[i], language)
        short = Sentence(language, between_words(language).join(few).strip())
        is_usable = any(map(str.isalnum, short.text)) and data.key(short) not in self.held_out
        return short if is_usable else sentence

    def lengthen(self, sentence: Sentence, rng: torch.Generator) -> Sentence:
        """Others of its language behind it, up to a random length that the decoder can hear."""
        language, text = sentence
        longest = max(0.2, torch.rand((), generator=rng).item()) * self.whisper.max_frames
        picks = self.of_language[language][data.draw(self.sums_of[language], 100, rng)]
        for i in picks.tolist():
            longer = Sentence(language, text + between_words(language) + self.sentences[i].text)
            frames = count_frames(self.durations_of(longer, self.speed))
            if frames > longest or not fits(longer, self.whisper, self.speed, self.durations_of):
                break
            text = longer.text
        return Sentence(language, text)
