"""Text and recordings in, batches out: cleaning, split, length rule, tokens -> frames.

B batch, S text tokens, T latent frames (50 per second), E embedding width of the frozen decoder,
L prompt + text + end tokens.
"""
import bz2
import gzip
import hashlib
import math
import os
import random
import re
import shutil
import unicodedata
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import cache, lru_cache
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from ssl import SSLError
from typing import Callable, Iterator, NamedTuple, Sequence
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from whisper.audio import SAMPLE_RATE

try:
    import soundfile  # an extra, for those who have recordings
except (ImportError, OSError):
    soundfile = None

from whisper_decoder import UNSPACED, BadInput, FrozenWhisper, first_line, text_tokens, writable

SENTENCES = Path(__file__).parent / "pocket" / "sentences"
SPEECH = Path(__file__).parent / "pocket" / "speech.npz"
PRIOR = Path(__file__).parent / "pocket" / "prior.pt"
LANGUAGES = Path(__file__).parent / "pocket" / "languages.tsv"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "text_flow_whisper"
TATOEBA = "https://downloads.tatoeba.org/exports/per_language/{0}/{0}_sentences.tsv.bz2"
PACKED = {".gz": gzip.open, ".bz2": bz2.open}
BIG, SHARD = 2**24, 100_000  # of a file of more bytes, only so many lines are in memory
HELD_OUT = 0.1  # share of the sentences that training never sees
FRAMES_PER_SECOND = 50  # Whisper's encoder: one frame for two 10 ms hops

# All languages of Whisper: its code, that of ISO 639-3 (as Tatoeba writes it), pace, a sentence.
LANGUAGE_TABLE = [line.split("\t") for line in LANGUAGES.read_text("utf-8").splitlines()]
ISO_639_3 = {code: iso for code, iso, _, _ in LANGUAGE_TABLE}
# Length rule: words per second, or characters where words are written together (UNSPACED). Paces of
# en, es, de, fr, zh are those of the clips in pocket/speech.npz; the others come from one sentence
# each, read by espeak-ng at its usual speed (experiments/pace.py); "-": it cannot read it.
PACE = {code: float(pace) for code, _, pace, _ in LANGUAGE_TABLE if pace != "-"}
DEFAULT_WORDS, DEFAULT_CHARACTERS = 2.7, 7.0  # mean of the others; a guess
MIN_SECONDS = 0.6
EDGE = "\n"  # what stands beside the first and the last letter
SHORTEST = 0.7  # frames of a letter
CONTEXT = 4  # letters on both sides that decide how long one lasts
RIDGE, ROUNDS = 3.0, 20  # so many values of 0 stand beside those that were measured
SPREAD = 0.5  # standard deviation of x0 around its mean, as a share of that of speech
ENOUGH = 30  # letters of a language, or the length rule remains what it is
ALIGN_ROUNDS = 10  # of Viterbi training
HEARD = 2  # version of what `load_speech` keeps; another one is heard again
STRAY = 0.06  # of a letter's place from even spacing, standard deviation, 1: all of the utterance
MIN_LOGPROB = -0.3  # of a transcript that is taken as the text of a recording

# Where a text that is too long may be cut, the best place first. Never before a combining mark.
CUTS = (
    r"(?<=[.!?…]\s)|(?<=[。！？।؟])", r"(?<=[,;:]\s)|(?<=[，、；：،])", r"(?<=\s)",
    r"(?<=.)(?=[\w\U00010000-\U0010ffff])",
)


class Sentence(NamedTuple):
    language: str  # Whisper's code, such as "en"
    text: str


# ---- sources ---------------------------------------------------------------------------------


def builtin() -> list[Sentence]:
    """The built-in sentences of every language, a file of lines each; make_pocket.py wrote them."""
    files = sorted(SENTENCES.glob("*.txt"))
    return [Sentence(f.stem, line) for f in files for line in f.read_text("utf-8").splitlines()]


def clean(text: str) -> str:
    """Unicode NFC, every run of white space one blank: nothing that carries meaning is lost."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def runs(text: str) -> list[str]:
    """Runs of letters and digits, and of marks that belong to them, such as Hindi's vowel signs."""
    # U+200C and U+200D join or part letters inside a word.
    return "".join(c if unicodedata.category(c)[0] in "LMN" or c in "\u200c\u200d" else " "
                   for c in text).split()


def words(text: str, language: str) -> list[str]:
    """What the length rule counts: words, or characters in languages written without spaces."""
    if language in UNSPACED:
        return [c for c in "".join(runs(text)) if c.isalnum()]
    return runs(text)


@cache
def heard_words(language: str) -> set[str]:
    text = (SENTENCES / f"{language}.txt").read_text("utf-8").lower()
    return set(words(text, language))


def unheard_words(sentence: Sentence) -> list[str]:
    """Words of a sentence that are in no built-in sentence: the pocket decoder never heard them."""
    heard = heard_words(sentence.language)
    return [w for w in words(sentence.text, sentence.language) if w.lower() not in heard]


@contextmanager
def writing(file: Path):
    """A temporary name that becomes `file` when all is written; if not, nothing stays."""
    part = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, file)
    except OSError as error:
        raise BadInput(f"cannot write {file} ({error.strerror or first_line(error)}); free some "
                       "space or name another place") from error
    finally:
        if part.exists():
            part.unlink()


def download(url: str) -> Path:
    """URL, perhaps with #sha256=HEX -> its file in CACHE, fetched unless it is there already."""
    address, _, wanted = url.partition("#sha256=")
    name = re.sub(r"[^\w.-]", "_", address.split("?")[0].rstrip("/").rpartition("/")[2])[-80:]
    file = CACHE / f"{hashlib.sha256(address.encode()).hexdigest()[:8]}_{name}"
    if not file.exists():
        fetch(quote(address, safe=":/?&=%#+,;@~[]"), file)
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while wanted and (block := f.read(2**20)):
            digest.update(block)
    if wanted and digest.hexdigest() != wanted.lower():
        file.unlink()
        raise BadInput(f"{address} has the SHA-256 checksum {digest.hexdigest()}, not {wanted}; "
                       "the file was removed: fetch it again, or correct the checksum")
    return file


def fetch(address: str, file: Path) -> None:
    """Download; what was interrupted is kept as file.part and goes on, if the page is the same."""
    part, tag = (file.with_name(f"{file.name}.{end}") for end in ("part", "tag"))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        start = part.stat().st_size if part.exists() and tag.exists() else 0
        same = {"Range": f"bytes={start}-", "If-Range": tag.read_text()} if start else {}
        with urlopen(Request(address, headers=same), timeout=30) as answer:
            start *= answer.status == 206  # partial content; else it is sent from the beginning
            total = start + int(answer.headers.get("Content-Length") or 0)
            if version := answer.headers.get("ETag") or answer.headers.get("Last-Modified"):
                tag.write_text(version)
            with (open(part, "ab" if start else "wb") as f,
                  tqdm.wrapattr(f, "write", desc=address, total=total, initial=start) as out):
                shutil.copyfileobj(answer, out)
        if part.stat().st_size < total:
            raise ConnectionError(f"broke off after {part.stat().st_size:,} of {total:,} bytes")
        os.replace(part, file)
        tag.unlink(missing_ok=True)
    except (URLError, HTTPException, TimeoutError, ConnectionError, SSLError, ValueError) as error:
        if getattr(error, "code", 0) in (404, 410, 416):  # what is there cannot be finished
            part.unlink(missing_ok=True)
        raise BadInput(f"cannot fetch {address} ({first_line(error)}); check the address and the "
                       "network and run it again (it goes on from there, if the server can), or "
                       "give a file that you have") from error
    except OSError as error:
        if part.exists():
            part.unlink()
        raise BadInput(f"cannot write {file} ({error.strerror}); free some space, or set "
                       "XDG_CACHE_HOME to another folder") from error


def unpack(file: Path) -> Path:
    """A .gz or .bz2 -> the plain file in CACHE, unpacked again when it changes; others: as is."""
    if ".tar" in file.suffixes or ".zip" in file.suffixes:
        raise BadInput(f"{file} is an archive; unpack it, and give the files or the folder")
    if file.suffix not in PACKED or not file.is_file():
        return file
    plain = CACHE / f"{hashlib.sha256(repr(stamp(file)).encode()).hexdigest()[:8]}_{file.stem}"
    if not plain.exists():
        with writing(plain) as part, open(part, "wb") as out:
            try:
                with PACKED[file.suffix](file) as packed:
                    shutil.copyfileobj(packed, out)
            except (EOFError, zlib.error, OSError) as error:
                if getattr(error, "errno", None):  # not of the format, but of the disk
                    raise
                raise BadInput(f"{file} is broken ({first_line(error)}); delete it, and get it "
                               "again") from error
    return plain


def kind(path: Path) -> str:
    """What a text file is, packed or not: .txt, .tsv ..."""
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def read_lines(path: Path, shard: int | None = None) -> Iterator[tuple[str, bytes]]:
    """A file -> (place, line) each; with a shard, of a file over BIG bytes only SHARD lines.

    These stand at random places: memory stays small, and another shard has other lines.
    """
    try:
        with open(path, "rb") as file:
            size = os.path.getsize(path)
            if shard is None or size <= BIG:
                yield from ((f"line {n}", line) for n, line in enumerate(file, 1))
                return
            for place in sorted(random.Random(shard).choices(range(size), k=SHARD)):
                file.seek(place)
                file.readline()  # the rest of a line
                yield f"byte {file.tell()}", file.readline()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error


def to_text(line: bytes, path: Path, place: str) -> str:
    """UTF-8 -> text; BadInput, with file and place, if it is something else."""
    try:
        return line.decode().lstrip("\ufeff").rstrip("\r\n")
    except UnicodeDecodeError as error:
        other = "utf-16" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise BadInput(f"{path}, {place}: byte 0x{line[error.start]:02x} is not UTF-8; convert the "
                       f"file, e.g. `iconv -f {other} -t utf-8 {path}`") from error


def parse_lines(path: Path, parse: Callable, shard: int | None = None) -> tuple[list, list, float]:
    """A text file, packed or not -> [parse(line)], problems, and how many lines each stands for.

    A line that cannot be used becomes one problem "file, line n: why"; blank lines are left out.
    """
    plain, found, problems, n_bytes = unpack(path), [], [], 0
    for place, raw in read_lines(plain, shard):
        n_bytes += len(raw)
        try:
            line = to_text(raw, path, place)
        except BadInput as error:
            if place.startswith("line"):
                raise  # all of the file needs another encoding
            problems.append(str(error))
            continue
        try:
            if line.strip():
                found.append(parse(line))
        except BadInput as error:
            problems.append(f"{path}, {place}: {error}")
    return found, problems, os.path.getsize(plain) / max(n_bytes, 1)


class Text(NamedTuple):
    """What was found in a file, or in all sources."""

    weights: dict[Sentence, float]  # distinct sentences; how often each is drawn
    problems: list[str]  # what was left out or changed, and why


def read_file(path: Path, language: str | None, whisper: FrozenWhisper,
              shard: int | None = None) -> Text:
    """A text file -> its sentences, each weighing as many lines as it stands for.

    FILE.txt has a sentence a line; FILE.tsv language<TAB>text, or, with a language given, the text
    in its last column. Raises BadInput if the file is missing, empty or not UTF-8.
    """
    is_table = kind(path) == ".tsv"
    if path.exists() and not is_table and not language:
        raise BadInput(f"{path}: say its language, as in en={path}")

    def parse(line: str) -> Sentence:
        if not is_table:
            return read_line(line, language, whisper)
        if "\t" not in line:
            raise BadInput(f"no tab between language and text: {clean(line)[:60]!r}")
        first, rest = line.split("\t", 1)
        return read_line(rest.split("\t")[-1] if language else rest, language or first, whisper)

    found, problems, n_lines = parse_lines(path, parse, shard)
    if not found:
        raise BadInput(f"{path} has no usable sentence; {(problems or ['it is empty'])[0]}")
    return Text({s: n * n_lines for s, n in Counter(found).items()}, problems)


def read_line(line: str, language: str, whisper: FrozenWhisper) -> Sentence:
    """One text -> Sentence; BadInput says what is wrong with it."""
    code, text = whisper.check_language(language), clean(line)
    if not words(text, code):
        raise BadInput(f"no word in {text[:60]!r}")
    return Sentence(code, text)


def read_folder(folder: Path, language: str | None, whisper: FrozenWhisper, shard: int) -> Text:
    """All .txt and .tsv of a folder, packed or not; fr.txt is French."""
    weights, problems = Counter(), []
    for path in sorted(folder.iterdir()):
        is_text, code = kind(path) == ".txt", path.name.partition(".")[0].lower()
        if is_text and not language and code not in whisper.languages:
            problems.append(f"{path} was left out: {code!r} is no language of {whisper.name}")
        elif is_text or kind(path) == ".tsv":
            found = read_file(path, language or (code if is_text else None), whisper, shard)
            weights.update(found.weights)
            problems += found.problems
    if not weights:
        raise BadInput("; ".join([f"{folder} has no .txt or .tsv that can be used", *problems[:1]]))
    return Text(weights, problems)


def read_source(source: str, whisper: FrozenWhisper, shard: int) -> tuple[float | None, Text]:
    """One source of `load` -> its weight if it has one, and what it holds."""
    weight, language, place = re.fullmatch(r"(?:([^*]*)\*)?(?:([^=:/*]*)=)?(.*)", source).groups()
    try:
        weight = None if weight is None else float(weight)
    except ValueError:
        weight = -1.0
    if not place or weight is not None and not 0 < weight < math.inf:
        raise BadInput(f"--data {source!r} cannot be used; give for example builtin, fr=FILE.txt, "
                       "0.5*fr=FILE.txt or tatoeba:fr")
    if place == "builtin":
        return weight, Text({s: 1.0 for s in builtin() if s.language in whisper.languages}, [])
    if place.startswith("tatoeba:"):
        language = whisper.check_language(place.partition(":")[2])
        place = TATOEBA.format(ISO_639_3[language])
    language = language and whisper.check_language(language)
    path = download(place) if re.match("(?i)https?://", place) else Path(place)
    read = read_folder if path.is_dir() else read_file
    return weight, read(path, language, whisper, shard)


def load(sources: Sequence[str], whisper: FrozenWhisper, speed: float = 1.0,
         temperature: float = 1.0, prior: dict | None = None, shard: int = 0) -> Text:
    """Sources, each perhaps with a weight as in 0.5*builtin -> distinct sentences that fit.

    A source is "builtin", a file (see `read_file`) or a URL of one, LANGUAGE=FILE, a folder of
    such files, or tatoeba:LANGUAGE. Weights are shares of the draws; the sources without one are
    one together, of weight 1. In each, languages count with the number of their sentences to the
    power of 1 / temperature. Another shard has other lines of big files.
    """
    pools, problems, weights = defaultdict(Counter), [], Counter()
    for i, source in enumerate(sources):
        weight, found = read_source(source, whisper, shard)
        share = (None, 1.0) if weight is None else (i, weight)  # those without one share one
        pools[share].update(found.weights)
        problems += found.problems
    for (_, weight), pool in pools.items():
        pieces, more = split_all(pool, whisper, speed, prior)
        problems += more
        counts = Counter()
        for piece, n in pieces.items():
            counts[piece.language] += n
        # Short sentences are rare in most texts, and no easier: they are drawn more often.
        often = {piece: n * counts[piece.language] ** (1 / temperature - 1)
                 * natural_frames(piece) ** -2 for piece, n in pieces.items()}
        total = sum(often.values())
        for piece, n in often.items():
            weights[piece] += weight * n / total
    return Text(dict(weights), problems)


def hash_share(sentence: Sentence) -> float:
    """A number in [0, 1) that depends on the sentence alone."""
    digest = hashlib.sha256("\t".join(sentence).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 256**6


def split(sentences: Sequence[Sentence]) -> tuple[list[Sentence], list[Sentence]]:
    """Training and held-out sentences, by a hash of each: adding lines moves no other line.

    At least one of each (in tiny sets that one may move); BadInput if there are less than two.
    """
    shares = [hash_share(s) for s in sentences]
    limit = max(HELD_OUT, min(shares, default=0))
    training = [s for s, share in zip(sentences, shares) if share > limit]
    if not training:
        raise BadInput(f"{len(sentences)} usable sentences are too few, as some are held out; give "
                       "more, in languages that the decoder knows")
    return training, [s for s, share in zip(sentences, shares) if share <= limit]


# ---- length ----------------------------------------------------------------------------------


def check_speed(speed: float) -> None:
    if not 0.1 <= speed <= 10:
        raise BadInput(f"speed {speed} is out of range; 1 is natural, 0.1 to 10 is possible")


def natural_frames(sentence: Sentence, speed: float = 1.0) -> int:
    """The length rule: how many latent frames the sentence takes when spoken; more when slower."""
    check_speed(speed)
    default = DEFAULT_CHARACTERS if sentence.language in UNSPACED else DEFAULT_WORDS
    pace = PACE.get(sentence.language, default)
    seconds = max(len(words(sentence.text, sentence.language)) / pace, MIN_SECONDS) / speed
    return math.ceil(seconds * FRAMES_PER_SECOND)


def letter_lengths(sentence: Sentence, speed: float = 1.0,
                   prior: dict | None = None) -> np.ndarray:
    """The length rule letter by letter: frames that each letter of `sounds` lasts (letters,).

    As long as recordings said (`fit_prior`), in their languages; else all are equally long.
    """
    check_speed(speed)
    letters = sounds(sentence.text)
    if not prior or sentence.language not in prior:
        return np.full(len(letters), natural_frames(sentence, speed) / len(letters))
    heard = prior[sentence.language]
    where = neighbours(letters, heard["letters"])
    lasting = heard["durations"].numpy()[np.arange(where.shape[1]), where].sum(1)
    return lasting.clip(SHORTEST) / speed


def neighbours(letters: str, known: str) -> np.ndarray:
    """Numbers of each letter and its neighbours (letters, 2 CONTEXT + 1); 0: never heard."""
    edge = EDGE * CONTEXT
    numbers = np.array([known.find(letter) + 1 for letter in edge + letters + edge])
    return numbers[np.arange(len(letters))[:, None] + np.arange(2 * CONTEXT + 1)]


def backfit(numbers: Tensor, values: Tensor, n_rows: int) -> Tensor:
    """Rows of a table whose sums are nearest to the values, (N, F), (N, D) -> (n_rows, D).

    Each value is the sum of the F rows that its numbers name, each column with rows of its own; row
    0 adds nothing. That is ridge regression, nearly solved: in turn for the rows of each column.
    """
    table, residual = torch.zeros(n_rows, values.shape[1], dtype=values.dtype), values.clone()
    for _ in range(ROUNDS):
        for column in numbers.T:
            residual += table[column]
            total = torch.zeros_like(table).index_add_(0, column, residual)
            count = torch.bincount(column, minlength=n_rows)[:, None]
            table = torch.where(count > 0, total / (count + RIDGE), table)
            table[0] = 0
            residual -= table[column]
    return table


def fit_prior(sentences: Sequence[Sentence], lasting: Sequence[np.ndarray]) -> dict:
    """How long letters last in recordings -> the prior: what is known of speech before it is heard.

    {language: {letters: (n) that were heard, durations: what each of its neighbours and a letter
    itself add to its frames (2 CONTEXT + 1, n + 1)}}; experiments/listen.py adds how they sound.
    """
    prior = {}
    for language in dict.fromkeys(s.language for s in sentences):
        mine = [(sounds(s.text), n) for s, n in zip(sentences, lasting) if s.language == language]
        frames = torch.from_numpy(np.concatenate([n for _, n in mine])).double()
        if len(frames) < ENOUGH:
            continue
        letters = "".join(sorted(set(EDGE).union(*(text for text, _ in mine))))
        where = np.concatenate([neighbours(text, letters) for text, _ in mine])
        shape = where.shape[1], len(letters) + 1
        rows = torch.from_numpy(where + shape[1] * np.arange(shape[0]))
        table = backfit(rows, (frames - frames.mean())[:, None], math.prod(shape)).reshape(shape)
        table[CONTEXT] += frames.mean()
        prior[language] = dict(letters=letters, durations=table)
    return prior


def kinds_of_sound(text: str, lasting: np.ndarray, n_frames: int, known: str) -> np.ndarray:
    """What may decide how each frame sounds, as numbers > 0, (T, 2 CONTEXT + 3).

    Its letter and the neighbours, and the two pairs of the letter with one beside it; of what is
    nearest to the frame also in which third of the letter this is. lasting: in any unit. A number
    is letter or pair, third and column in one, so that no column shares one with another.
    """
    ends = np.cumsum(lasting) / np.sum(lasting) * n_frames
    middle = np.arange(n_frames) + 0.5
    letter = np.searchsorted(ends, middle).clip(max=len(ends) - 1)
    starts = np.append(0, ends[:-1])[letter]
    third = (3 * (middle - starts) / (ends[letter] - starts)).astype(int).clip(0, 2)
    where = neighbours(text, known)[letter].T
    before, here, after = where[CONTEXT - 1 : CONTEXT + 2]
    pairs = [before * (len(known) + 1) + here, here * (len(known) + 1) + after]
    kinds = np.array([*where, *pairs])  # (F, T)
    column = np.arange(len(kinds))[:, None]
    is_near = (abs(column - CONTEXT) <= 1) | (column > 2 * CONTEXT)
    return ((kinds * 3 + third * is_near) * len(kinds) + column + 1).T


def rows_of(kinds: np.ndarray, heard: np.ndarray) -> Tensor:
    """Where the kinds are among those that were heard, which are sorted; 0: not there."""
    row = np.searchsorted(heard, kinds).clip(max=len(heard) - 1)
    return torch.from_numpy(np.where(heard[row] == kinds, row, 0))


def has_sounds(prior: dict | None) -> bool:
    """Whether it says how letters sound, or only how long they last."""
    return any("mean" in heard for heard in (prior or {}).values())


def mean_frames(text: str, lasting: np.ndarray, n_frames: int, heard: dict) -> Tensor:
    """What speech is like on average where it says this, heard: of its language, -> (T, C)."""
    kinds = kinds_of_sound(text, lasting, n_frames, heard["letters"])
    rows = rows_of(kinds, heard["kinds"].numpy())
    return heard["mean"] + torch.nn.functional.embedding_bag(rows, heard["added"], mode="sum")


@lru_cache(maxsize=64)
def over_time(n_frames: int, hold: float, decay: float) -> Tensor:
    """Root of the correlation of frames: share `hold` never ends, the rest decays (T, T).

    Lower triangular: its first rows and columns are that of fewer frames.
    """
    apart = (torch.arange(n_frames)[:, None] - torch.arange(n_frames)).abs().double()
    return torch.linalg.cholesky(hold + (1 - hold) * decay**apart).float()


def fits(sentence: Sentence, whisper: FrozenWhisper, speed: float,
         prior: dict | None = None) -> bool:
    is_known = sentence.language in (prior or {})
    frames = (count_frames(letter_lengths(sentence, speed, prior)) if is_known
              else natural_frames(sentence, speed))  # the same, and faster
    if frames > whisper.max_frames:
        return False
    if len(sentence.text.encode()) < whisper.max_tokens:  # a token is a byte or more
        return True
    tokens = text_tokens(sentence.text, whisper.tokenizer(sentence.language))
    return len(tokens) <= whisper.max_tokens


def split_long(sentence: Sentence, whisper: FrozenWhisper, speed: float = 1.0,
               prior: dict | None = None) -> list[Sentence]:
    """A text too long for the decoder -> pieces that fit: sentences, else as long as possible."""
    language, text = sentence
    if fits(sentence, whisper, speed, prior):
        return [sentence]
    for cut in CUTS:
        first, *parts = filter(None, re.split(cut, text))
        if parts:
            break
    else:
        raise BadInput(f"{text[:60]!r} at speed {speed:.2g} is longer than {whisper.name} can "
                       "hear, and cannot be cut; shorten it, or raise --speed")
    pieces = [first]
    for part in parts:
        longer = Sentence(language, pieces[-1] + part)
        whole = cut is CUTS[0] and len(words(pieces[-1], language)) > 2  # not just "Dr."
        if whole or not fits(longer, whisper, speed, prior):
            pieces.append(part)
        else:
            pieces[-1] = longer.text
    return [short for piece in pieces if words(piece, language)  # not a lonely bracket
            for short in split_long(Sentence(language, piece.strip()), whisper, speed, prior)]


def split_all(weights: dict[Sentence, float], whisper: FrozenWhisper, speed: float,
              prior: dict | None = None) -> tuple[Counter, list[str]]:
    """Weights of texts -> those of pieces that fit the decoder, and notes on what was split."""
    pieces, problems, n_split = Counter(), [], 0
    for sentence, n in weights.items():
        try:
            found = split_long(sentence, whisper, speed, prior)
        except BadInput as error:
            problems.append(str(error))
            continue
        n_split += len(found) > 1
        for piece in found:
            pieces[piece] += n
    problems += [f"{n_split} long texts were split into pieces"] if n_split else []
    return pieces, problems


# ---- batches ---------------------------------------------------------------------------------


def token_of_frame(lasting: Sequence[float], n_frames: int) -> Tensor:
    """Average upsampling: how long tokens last (S,) -> the token of each frame (T,), T >= S."""
    i, ends = np.arange(len(lasting)), np.cumsum(lasting)
    ends = np.rint(ends / ends[-1] * n_frames).astype(int)
    # Every token has a frame, or it would be lost: it ends after the one before,
    ends = np.maximum.accumulate(np.maximum(ends - i, 1)) + i
    ends = np.minimum(ends, n_frames - i[::-1])  # and leaves room for those that follow.
    return torch.from_numpy(np.repeat(i, np.diff(ends, prepend=0)))


def sounds(text: str) -> str:
    """What may be heard of a text: lower case, letters, digits, their marks, and blanks."""
    letters = " ".join(runs(writable(text).lower()))
    if not letters:
        raise BadInput(f"no word in {text[:60]!r}")
    return letters


def byte_of_frame(text: str, lasting: Sequence[float], n_frames: int) -> Tensor:
    """The UTF-8 byte that sounds in each frame (T,), if the letters of `sounds` last so long."""
    letters = sounds(text)
    n_bytes = np.array([len(letter.encode()) for letter in letters])
    ends = np.cumsum(np.repeat(np.asarray(lasting) / n_bytes, n_bytes))
    where = np.searchsorted(ends / ends[-1] * n_frames, np.arange(n_frames) + 0.5)
    return torch.tensor(list(letters.encode()))[where.clip(max=len(ends) - 1)]


def token_lengths(text: str, lasting: Sequence[float], n_bytes: Sequence[int]) -> np.ndarray:
    """Frames of the letters of `sounds` -> frames of the tokens, which have so many bytes (S,).

    The bytes of a letter share its time. Punctuation has none, but for the first sign after a
    word, a blank or a comma, which has that of the one blank in `sounds`.
    """
    text, lasting, each = writable(text), iter(lasting), []
    heard = [len("".join(runs(c.lower()))) for c in text]  # letters of `sounds`
    for i, c in enumerate(text):
        n_letters = heard[i] or int(i > 0 and heard[i - 1] > 0)
        n = len(c.encode())
        each += [sum(islice(lasting, n_letters)) / n] * n
    each = [0.0] * (sum(n_bytes) - len(each)) + each  # the blank before the first word
    return np.add.reduceat(each, np.cumsum([0, *n_bytes[:-1]]))


def best_path(score: np.ndarray) -> np.ndarray:
    """Viterbi: scores of letters in frames (T, S) -> the letter of each frame (T,), none left out.

    Rabiner 1989, III.B, where a letter is followed by itself or by the next one only.
    """
    n_frames, n_letters = score.shape
    best, moved = np.full(n_letters, -np.inf), np.zeros(score.shape, bool)
    best[0] = score[0, 0]
    for t in range(1, n_frames):
        from_before = np.concatenate([[-np.inf], best[:-1]])
        moved[t] = from_before > best
        best = np.maximum(best, from_before) + score[t]
    path = np.full(n_frames, n_letters - 1)
    for t in range(n_frames - 1, 0, -1):
        path[t - 1] = path[t] - moved[t, path[t]]
    return path


def viterbi_training(texts: list[str], clips: Sequence[Tensor]) -> list[np.ndarray]:
    """Texts of one language, their frames (T, C) -> frames that each letter lasts (letters,).

    A hidden Markov model whose states are the letters: in turn, the mean frame of every letter,
    around which all have one covariance, and the best path through every utterance. Nothing is
    known at the beginning: all letters are equally long, and no path may stray far from that, or
    one letter would swallow all that none explains.
    """
    names = {letter: k for k, letter in enumerate(sorted(set("".join(texts))))}
    states = [np.array([names[letter] for letter in text]) for text in texts]
    paths = [np.arange(len(clip)) * len(s) // len(clip) for s, clip in zip(states, clips)]
    n_frames = sum(map(len, clips))
    square = sum((x := clip.float().numpy()).T @ x for clip in clips) / n_frames
    for _ in tqdm(range(ALIGN_ROUNDS), desc="aligning letters", leave=False):
        total, count = np.zeros((len(names), len(square))), np.zeros((len(names), 1))
        for s, path, clip in zip(states, paths, clips):
            is_letter = np.eye(len(names))[s[path]]  # (T, names)
            total += is_letter.T @ clip.float().numpy()
            count += is_letter.sum(0)[:, None]
        mean = total / np.maximum(count, 1)
        cov = square - (count * mean).T @ mean / n_frames
        cov += 0.1 * cov.trace() / len(cov) * np.eye(len(cov))
        mean = (total + 3 * total.sum(0) / n_frames) / (count + 3)  # a prior of three frames
        weight = np.linalg.solve(cov, mean.T).astype(np.float32)  # (C, names)
        offset = -0.5 * (mean.T * weight).sum(0)
        for i, (s, clip) in enumerate(zip(states, clips)):
            score = (clip.float().numpy() @ weight + offset)[:, s]  # log-density + constant (T, S)
            place, even = ((np.arange(n) + 0.5) / n for n in (len(clip), len(s)))
            if len(s) <= len(clip):
                paths[i] = best_path(score - 0.5 * np.square((place[:, None] - even) / STRAY))
    return [np.bincount(path, minlength=len(s)) for s, path in zip(states, paths)]


def align_letters(sentences: Sequence[Sentence], x1: Sequence[Tensor]) -> list[np.ndarray]:
    """Recordings and what they say -> how many frames each letter of `sounds` lasts."""
    found = {}
    for language in dict.fromkeys(s.language for s in sentences):
        where = [i for i, s in enumerate(sentences) if s.language == language]
        texts = [sounds(sentences[i].text) for i in where]
        found.update(zip(where, viterbi_training(texts, [x1[i] for i in where])))
    return [found[i] for i in range(len(x1))]


class Corpus(NamedTuple):
    """What a step may draw: sentences, their lengths, and their latents if they were recorded."""

    sentences: list[Sentence]
    weights: Tensor  # (N,) of their draws
    lasting: list[np.ndarray]  # frames that each letter lasts, at natural speed or as recorded
    frames: Tensor  # (N,) that all of them last
    x1: list[Tensor] | None = None  # (T, C) each
    prior: dict | None = None  # see fit_prior


def text_corpus(sentences: list[Sentence], weights: dict[Sentence, float] | None = None,
                prior: dict | None = None) -> Corpus:
    lasting = [letter_lengths(s, 1.0, prior) for s in sentences]
    drawn = torch.tensor([weights[s] if weights else 1.0 for s in sentences], dtype=torch.double)
    frames = torch.tensor([count_frames(n) for n in lasting])
    return Corpus(sentences, drawn, lasting, frames, prior=prior)


def speech_corpus(heard: dict, held_out: float = 0.0) -> Corpus:
    """What `hear_all` gives -> what may be drawn; this share of it is held out, as in `split`."""
    spoken = [(sentence, x1, lasting.numpy()) for sentence, x1, lasting in
              zip(map(Sentence._make, heard["texts"]), heard["x1"], heard["lasting"])
              if hash_share(sentence) > held_out]
    sentences, x1, lasting = map(list, zip(*spoken)) if spoken else ([], [], [])
    frames = torch.tensor([len(x) for x in x1])
    return Corpus(sentences, frames.double() ** -2, lasting, frames, x1)  # short ones more often


class Gaussian(NamedTuple):
    """Speech of a text, as far as it can be known: mean + over_time @ noise @ over_channels.T."""

    mean: Tensor  # (T, C)
    over_time: Tensor  # (T, T)
    over_channels: Tensor  # (C, C)


class Batch(NamedTuple):
    sentences: list[Sentence]
    cond: dict[str, Tensor]  # what model.DiT takes after `to_device`; "frames" (B,) are the lengths
    targets: Tensor  # (B, L) prompt, text and end tokens, padded with -1
    x1: Tensor | None  # (B, T, C) of recordings
    likely: list[Gaussian | None]  # around which the flow begins; None: at white noise


def count_frames(lasting: np.ndarray) -> int:
    """Whole frames for letters that last so long."""
    return math.ceil(round(float(np.sum(lasting)), 3))  # 110.00000000000001 is 110


def make_batch(sentences: Sequence[Sentence], whisper: FrozenWhisper,
               lasting: Sequence[np.ndarray] | None = None,
               x1: Sequence[Tensor] | None = None, prior: dict | None = None) -> Batch:
    """Sentences -> condition of the flow and targets of the decoder, padded, on the device."""
    return to_device(collate(sentences, whisper, lasting, x1, prior), whisper)


def to_device(batch: Batch, whisper: FrozenWhisper) -> Batch:
    """What `collate` made, where the decoder is; tokens become their embeddings."""
    cond = {name: x.to(whisper.device) for name, x in batch.cond.items()}
    cond |= {name: whisper.embed(cond[name]) for name in ("text", "language")}
    x1 = None if batch.x1 is None else batch.x1.float().to(whisper.device)
    return batch._replace(cond=cond, targets=batch.targets.to(whisper.device), x1=x1)


def collate(sentences: Sequence[Sentence], whisper: FrozenWhisper,
            lasting: Sequence[np.ndarray] | None = None,
            x1: Sequence[Tensor] | None = None, prior: dict | None = None) -> Batch:
    """The same on the CPU, with tokens in place of their embeddings: other processes can do it.

    lasting: frames that each letter lasts, else those of the length rule; a sentence has a frame
    a token in any case, and no more than the decoder hears. x1: latents of recordings (T, C) each.
    prior: see fit_prior.
    """
    lasting = [letter_lengths(s) for s in sentences] if lasting is None else lasting
    tokens = [whisper.encode(s.text, s.language) for s in sentences]
    frames = [min(max(count_frames(n), len(row)), whisper.max_frames)
              for n, row in zip(lasting, tokens)]
    encoding = whisper.tokenizer("en").encoding  # text tokens are the same in every language
    n_bytes = [[len(encoding.decode_single_token_bytes(t)) for t in row] for row in tokens]
    spread = [token_of_frame(token_lengths(s.text, each, sizes), n)
              for s, each, sizes, n in zip(sentences, lasting, n_bytes, frames)]
    spelled = [byte_of_frame(s.text, each, n) for s, each, n in zip(sentences, lasting, frames)]
    languages = [s.language for s in sentences]
    likely = [likely_speech(s, each, n, prior) for s, each, n in zip(sentences, lasting, frames)]
    cond = dict(
        text=pad_sequence([torch.tensor(row) for row in tokens], True),  # (B, S)
        token=pad_sequence(spread, True),  # (B, T)
        byte=pad_sequence(spelled, True),  # (B, T)
        frames=torch.tensor(frames),  # (B,)
        language=torch.tensor([*map(whisper.language_token, languages)]),  # (B,)
        drop=torch.zeros(len(sentences), dtype=torch.bool),
    )
    x1 = x1 and pad_sequence(x1, True)
    return Batch(list(sentences), cond, whisper.target_tokens(tokens, languages), x1, likely)


def likely_speech(sentence: Sentence, lasting: np.ndarray, n_frames: int,
                  prior: dict | None) -> Gaussian | None:
    """What the prior expects of a text; of a language that it never heard: another's mean frame."""
    if not has_sounds(prior):
        return None
    heard = prior.get(sentence.language, next(iter(prior.values())))
    mean = heard["mean"].expand(n_frames, -1)
    if sentence.language in prior:
        mean = mean_frames(sounds(sentence.text), lasting, n_frames, heard)
    root = over_time(64 * math.ceil(n_frames / 64), heard["hold"], heard["decay"])
    return Gaussian(mean, root[:n_frames, :n_frames], heard["root"])


def first_state(white: Tensor, batch: Batch) -> Tensor:
    """x0 of the flow from white noise, (B, T, C) -> (B, T, C): that itself, or with a prior likely
    speech, which is a draw of each text's Gaussian, of less spread, put on the sphere of x1."""
    x0 = white.clone()
    for i, likely in enumerate(batch.likely):
        if likely:
            mean, over_time, over_channels = (x.to(white.device) for x in likely)
            x = mean + SPREAD * (over_time @ white[i, : len(mean)] @ over_channels.T)
            x0[i, : len(mean)] = torch.nn.functional.layer_norm(x, x.shape[-1:])
    return x0


def generator(seed: int, number: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Random numbers of a seed and a number; torch looks at 32 bits of what it is given only."""
    return torch.Generator(device).manual_seed((2654435761 * seed + number) % 2**32)


def sentence_generator(sentence: Sentence, seed: int,
                       device: str | torch.device = "cpu") -> torch.Generator:
    """Random numbers of a sentence, the same alone or in a batch."""
    return generator(seed, int(hash_share(sentence) * 2**31), device)


def noise(batch: Batch, channels: int, seed: int) -> Tensor:
    """x0 from the seed and each item's own sentence: the same alone or in a batch (B, T, C)."""
    items = [torch.randn(n, channels, generator=sentence_generator(sentence, seed))
             for sentence, n in zip(batch.sentences, batch.cond["frames"].tolist())]
    return first_state(pad_sequence(items, True), batch).to(batch.targets.device)


# ---- speech ----------------------------------------------------------------------------------


def read_audio(path: Path, whisper: FrozenWhisper) -> np.ndarray:
    """A .wav, .flac or other file that soundfile reads -> 16 kHz, mono, (n,) in [-1, 1]."""
    try:
        whisper.check_seconds(soundfile.info(path).duration)
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError, TypeError) as error:
        raise BadInput(f"no audio that can be read ({first_line(error)})") from error
    if not len(samples) or not np.isfinite(samples).all():
        raise BadInput("no samples, or some that are no numbers")
    return resample(samples.mean(1), rate)


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Samples (n,) at any rate -> 16 kHz, by cutting or padding the spectrum: no aliasing."""
    n = round(len(samples) * SAMPLE_RATE / rate)
    if n == 0 or rate == SAMPLE_RATE:
        return samples
    return (np.fft.irfft(np.fft.rfft(samples), n) * n / len(samples)).astype(np.float32)


def read_manifest(folder: Path, whisper: FrozenWhisper):
    """A folder of speech -> [(path, Sentence or None)], problems; None: the text is not known.

    manifest.tsv has lines path<TAB>language<TAB>text, metadata.csv (LJSpeech, English) has
    id|text|text as spoken, and wavs/id.wav; with neither, all .wav and .flac have no text.
    """
    tsv, csv = folder / "manifest.tsv", folder / "metadata.csv"
    file = tsv if tsv.exists() else csv
    if not file.exists():
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".wav", ".flac"))
        return [(path, None) for path in found], []

    def parse(line: str) -> tuple[Path, Sentence]:
        fields = line.split("\t", 2) if file is tsv else line.split("|")
        if len(fields) < 3:
            raise BadInput(f"3 fields expected: {line[:60]!r}")
        name, code, text = fields[:3]
        path, code = (name, code) if file is tsv else (f"wavs/{name}.wav", "en")
        return folder / path, read_line(text, code, whisper)

    return parse_lines(file, parse)[:2]


def speech_span(mel: Tensor) -> slice:
    """The latent frames between silence and silence: within 40 dB, 1 in Whisper's log-mel units."""
    loud = (mel.amax(0) > mel.max() - 1).nonzero()[:, 0].tolist()
    return slice(loud[0] // 2, loud[-1] // 2 + 1)


def hear(mel: Tensor, sentence: Sentence | None, whisper: FrozenWhisper) -> tuple[Sentence, Tensor]:
    """Log-mel (1, n_mels, 2T) -> what is said, x1 (T, C) fp16; no text: the one Whisper reads."""
    if sentence is None:
        read = whisper.transcribe(whisper.features_of_speech(mel), [None])[0]
        if read.avg_logprob < MIN_LOGPROB or read.no_speech_prob > 0.5:
            raise BadInput(f"{whisper.name} is not sure of what it says: {read.text!r}")
        sentence = read_line(read.text, read.language, whisper)
    x1 = whisper.latents(mel)[0, speech_span(mel[0])].half().cpu()
    if len(whisper.encode(sentence.text, sentence.language)) > len(x1):
        raise BadInput(f"{len(x1)} frames are too few for {sentence.text[:60]!r}")
    return sentence, x1


def stamp(path: Path) -> tuple | None:
    """What changes when a file does; None if there is none."""
    try:
        return str(path), path.stat().st_size, path.stat().st_mtime_ns
    except (OSError, ValueError):  # of an odd name
        return None


def hear_all(entries: list, log_mel: Callable, whisper: FrozenWhisper) -> dict[str, list]:
    """[(recording, Sentence or None)], log_mel(recording) -> what `load_speech` keeps."""
    sentences, x1, problems = [], [], []
    for recording, sentence in tqdm(entries, desc="hearing"):
        try:
            sentence, latents = hear(log_mel(recording), sentence, whisper)
            sentences.append(sentence)
            x1.append(latents)
        except BadInput as error:
            problems.append(f"{recording}: {error}")
    lasting = [torch.from_numpy(each) for each in align_letters(sentences, x1)]
    return dict(texts=list(map(tuple, sentences)), x1=x1, problems=problems, lasting=lasting)


def load_speech(folder: Path, whisper: FrozenWhisper) -> tuple[Corpus, list[str]]:
    """A folder of recordings (see read_manifest) -> what they say and sound like, problems.

    What was heard is kept in folder/heard_KEY.pt; KEY depends on recordings, texts and checkpoint.
    Recordings of sentences that `split` holds out are left out.
    """
    if soundfile is None:
        raise BadInput("to learn from recordings, `pip install soundfile`")
    if not folder.is_dir():
        raise BadInput(f"no folder {folder}; give one with recordings and a manifest.tsv")
    entries, problems = read_manifest(folder, whisper)
    key = hashlib.sha256(repr((HEARD, [(stamp(path), s) for path, s in entries])).encode())
    blank = torch.zeros(1, whisper.dims.n_mels, 2 * whisper.max_frames)
    for x in (whisper.latents(blank), *whisper.model.parameters()):  # what x1 is, and who hears
        key.update(x.cpu().numpy().tobytes())
    cache = folder / f"heard_{key.hexdigest()[:12]}.pt"
    try:
        heard = torch.load(cache, weights_only=True)
    except Exception:  # there is none, or one that cannot be read
        heard = hear_all(entries, lambda path: whisper.log_mel(read_audio(path, whisper)), whisper)
        try:
            with writing(cache) as part, open(part, "wb") as file:
                torch.save(heard, file)
        except BadInput as error:
            problems.append(f"what was heard is not kept: {error}")
    problems += heard["problems"]
    speech = speech_corpus(heard, HELD_OUT)
    if not speech.sentences:
        raise BadInput(f"{folder} has no usable recording; {(problems or ['it is empty'])[0]}")
    if n_held_out := len(heard["texts"]) - len(speech.sentences):
        problems.append(f"{n_held_out} recordings are of held-out sentences, left out")
    return speech, problems


def load_prior(path: Path, whisper: FrozenWhisper) -> dict:
    """What experiments/listen.py wrote, see fit_prior."""
    if not path.is_file():
        raise BadInput(f"no file {path}; give one of experiments/listen.py, or --prior none")
    try:
        prior = torch.load(path, weights_only=True)
        heard_by = {(heard["encoder"], len(heard["mean"])) for heard in prior.values()}
    except Exception as error:
        raise BadInput(f"{path} does not say what speech is like ({first_line(error)}); give a "
                       "file that experiments/listen.py wrote, or --prior none") from error
    if heard_by != {(encoder_key(whisper), whisper.channels)}:
        raise BadInput(f"{path} is not about what {whisper.name} hears; give a file that "
                       f"experiments/listen.py --whisper {whisper.name} wrote, or --prior none")
    return prior


def encoder_key(whisper: FrozenWhisper) -> str:
    """The same for the same encoder, on any device."""
    digest = hashlib.sha256()
    for x in whisper.model.encoder.parameters():
        digest.update(x.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def mel_from_bytes(mel: np.ndarray, window: int) -> Tensor:
    """8-bit log-mel of a clip (n_mels, n) -> log-mel and silence behind it (n_mels, window)."""
    mel = torch.from_numpy(mel).float() / 85 - 1.5  # undoes make_pocket.quantize
    # Log-mel spans 8 decades, 2.0 after Whisper's scaling: its floor is silence.
    return torch.nn.functional.pad(mel, (0, window - mel.shape[1]), value=float(mel.max()) - 2)


def stack_clips(clips: Sequence[np.ndarray], whisper: FrozenWhisper) -> Tensor:
    """8-bit log-mel (n_mels, n) each -> log-mel that the encoder takes (B, n_mels, 2T)."""
    return torch.stack([mel_from_bytes(clip, 2 * whisper.max_frames) for clip in clips])


def transcribe_clips(clips: Sequence[np.ndarray], languages: Sequence[str],
                     whisper: FrozenWhisper) -> list:
    """What the decoder reads in 8-bit log-mel of real speech -> its results."""
    read = []
    for i in range(0, len(clips), 25):
        features = whisper.features_of_speech(stack_clips(clips[i : i + 25], whisper))
        read += whisper.transcribe(features, languages[i : i + 25])
    return read


def spoken_sentences(whisper: FrozenWhisper) -> tuple[list[Sentence], list[np.ndarray]]:
    """Test sentences that the checkpoint can hear -> sentences, their 8-bit log-mel (n_mels, n)."""
    sentences, clips = [], []
    with np.load(SPEECH) as file:
        mels = np.split(file["mel"].T, np.cumsum(file["n_frames"])[:-1], axis=1)
        for language, text, mel in zip(file["language"].tolist(), file["text"].tolist(), mels):
            if (language in whisper.languages and len(mel) == whisper.dims.n_mels
                    and mel.shape[1] <= 2 * whisper.max_frames):
                sentences.append(Sentence(language, text))
                clips.append(mel)
    return sentences, clips
