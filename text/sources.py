"""Where text comes from: the built-in sentences, files, folders of files, URLs, Tatoeba.

train.py calls `load_data`, studies `load_sentences` or `split_of`, sample.py `read_texts`.
"""
import bz2
import gzip
import hashlib
import os
import re
import shutil
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Iterable, Iterator, Sequence
from urllib.parse import quote
from urllib.request import urlopen

from tqdm import tqdm

from data import Sentence, split
from plumbing.errors import BadInput, first_line
from plumbing.files import atomic_write
from plumbing.weights import POCKET
from text.durations import LANGUAGE_ROWS, n_frames
from text.long import split_long
from text.spelling import JOINERS, TWO_I, is_letter, language_code, words
from whisper_decoder import FrozenWhisper

MAX_CHARACTERS = 20_000  # of a text
MAX_NOTES = 10  # on the lines of a file, on recordings
SMALL_I = {ord("I"): "ı", ord("İ"): "i"}  # in TWO_I
URL = "(?i)https?://"
TATOEBA = "https://downloads.tatoeba.org/exports/per_language/{0}/{0}_sentences.tsv.bz2"
ISO_639_3 = {code: iso for code, iso, *_ in LANGUAGE_ROWS}
NO_TEXT = set(".csv .json .jsonl .parquet .arrow .srt .vtt .xml .html .pdf .zip .xz .zst .7z .tar "
              ".tgz .pt .npy .npz .png .jpg .wav .flac .mp3 .ogg .docx .xlsx .odt .ods .doc .xls "
              ".epub .rtf".split())
# Fillers, and selectors of variants such as that of an emoji, which count as letters and marks.
INVISIBLE = "[\u034f\u115f\u1160\u180b-\u180d\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]"
BLANK = "[\u3164\uffa0]"  # Hangul's, which count as letters
OPEN = {".gz": gzip.open, ".bz2": bz2.open}  # others: as they are
HEADER = set("audio client_id file filename id key lang language locale name path phrase sentence "
             "source speaker text transcript transcription wav word".split())

Texts = tuple[Counter[Sentence], list[str]]  # sentences with their counts, notes on the rest


# ---- one text --------------------------------------------------------------------------------


def make_sentence(text: str, language: str, whisper: FrozenWhisper) -> Sentence:
    """Unicode NFC, single blanks, nothing invisible, no shouting; BadInput: what cannot be used."""
    code = whisper.check_language(language)
    if len(text.rstrip()) > MAX_CHARACTERS:
        raise BadInput(f"it has more than {MAX_CHARACTERS:,} characters; cut it into several lines")
    if re.search("[\ud800-\udfff]", text):
        raise BadInput("there is a byte in it that is no UTF-8; give UTF-8")
    if "\0" in text:
        raise BadInput("there is a byte in it that is no text; `iconv -f utf-16le` (or utf-16be) "
                       "converts UTF-16")
    if "\t" in text and any(text.startswith(f"{code}\t") for code, *_ in LANGUAGE_ROWS):
        raise BadInput("it begins with a language and a tab; such lines belong in a .tsv file")
    text = re.sub(BLANK, " ", re.sub(INVISIBLE, "", text))
    if not text.isprintable():  # soft hyphens, zero-width blanks, control characters
        text = "".join(c for c in text if c.isprintable() or c.isspace() or c in JOINERS)
        text = "".join(c for before, c in zip(" " + text, text)
                       if c not in JOINERS or is_letter(before))  # not those of emojis
    text = " ".join(unicodedata.normalize("NFC", text).split())
    with_letters = ([word for word in text.split() if re.search(r"[^\W\d_]", word)]
                    if text == text.upper() else [])  # hardly ever, and there may be millions
    if (len(with_letters) > 1 and all(map(str.isupper, with_letters))
            and not re.fullmatch(r"\W*(\w(\W+|$))+", text)):
        # Whisper writes what is said; letters that are spelled stay capitals.
        end = re.search(r"[^\W\d_]", text).end()
        small = text.translate(SMALL_I) if code in TWO_I else text
        text = text[:end] + small.lower()[len(small[:end].lower()):]  # whole: Σ depends on it
        text = unicodedata.normalize("NFC", text)  # some letters are in one piece only when small
    if not any(c.isalnum() for c in text):
        raise BadInput("there is no word in it")
    return Sentence(code, text)


# ---- one file --------------------------------------------------------------------------------


def download(url: str) -> Path:
    """URL -> its file in the cache, fetched unless it is there already; whole or not at all."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "text_flow_whisper"
    name = re.sub(r"[^\w.-]", "_", url.split("?")[0].rpartition("/")[2])[-80:]
    file = cache / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}"
    if file.exists():
        return file
    url = quote(url, safe=":/?&=%#+,;@~[]")
    try:
        with atomic_write(file) as part, urlopen(url, timeout=30) as answer:
            mime = answer.headers.get_content_type()
            if mime in ("text/html", "application/json"):  # an error page, a login
                raise OSError(f"it is {mime}, not a file of text")
            size = int(answer.headers.get("Content-Length") or 0)
            with open(part, "wb") as out, tqdm.wrapattr(answer, "read", size, desc=url) as bar:
                shutil.copyfileobj(bar, out)
            if part.stat().st_size == 0:
                raise OSError("it is empty")
            if part.stat().st_size < size:
                raise OSError(f"broke off after {part.stat().st_size:,} of {size:,} bytes")
    except (OSError, ValueError, HTTPException) as error:
        raise BadInput(f"cannot fetch {url} ({first_line(error)}); check the address, the network "
                       "and the disk, or give a file that you have") from error
    return file


def local_file(name: str) -> Path:
    """A path, or a URL, which is downloaded."""
    if not name or "://" in name and not re.match(URL, name):
        raise BadInput(f"{name!r} is no file; give a path, or an address of http or https")
    if name == "-":
        raise BadInput("standard input is read where there is no --text_file; leave it out")
    path = Path(os.path.expanduser(name))
    if re.match(r"\w+=", name) and not path.exists():  # a source of train.py
        raise BadInput(f"there is no file {name!r}; --language says the language of a text")
    return download(name) if re.match(URL, name) else path


def kind(path: Path) -> str:
    """What a text file is, packed or not: .txt, .tsv ..."""
    path = Path(path.name.lower())
    return Path(path.stem).suffix if path.suffix in OPEN else path.suffix


def read_line(line: str, is_table: bool, language: str | None, whisper: FrozenWhisper) -> Sentence:
    """A line that is not blank -> its sentence; BadInput says why there is none."""
    if not is_table:
        return make_sentence(line, language, whisper)
    # As spreadsheets write a cell with quotes; files that were joined have a mark inside.
    code, *columns = (cell[1:-1].replace('""', '"') if re.fullmatch('"([^"]|"")*"', cell) else cell
                      for cell in line.strip("\n\ufeff").split("\t"))
    if language and not columns:
        return make_sentence(code, language, whisper)
    if not columns:
        raise BadInput("there is no tab between language and text")
    cells = [cell.strip().lower() for cell in (code, *columns)]
    if len(HEADER & {*cells}) > 1:
        raise BadInput("it is the header of a table")
    if language:
        if not any(map(str.isalnum, columns[-1])):
            raise BadInput(f"the last of {1 + len(columns)} columns, the text, has no word in it")
        return make_sentence(columns[-1], language, whisper)
    if len(columns) > 1:
        raise BadInput(f"{1 + len(columns)} columns, not language<TAB>text; with a language given, "
                       "as in en=FILE.tsv, the last one is the text")
    return make_sentence(columns[0], code, whisper)


def not_utf8(path: Path, error: UnicodeDecodeError) -> BadInput:
    """What is wrong with a file that is no text, and the usual ways out."""
    is_cut = error.reason == "unexpected end of data"
    return BadInput(f"{path} is not UTF-8 ({first_line(error)}); "
                    + "if it was cut short, delete it and fetch it again; else " * is_cut
                    + "`iconv -f cp1252 -t utf-8 OLD > NEW` (or `-f utf-16`) converts text; what "
                    "is packed must be named .gz or .bz2, or be unpacked")


def odd_columns(line: str, language: str | None) -> str:
    """What is odd in a line of a table whose language is given, or ""."""
    cells = [cell.strip().strip('"') for cell in line.split("\t")]
    code, given = map(language_code, (cells[0], language or ""))
    if given and len(cells) == 2 and given != code in ISO_639_3:
        return f"begins with {code!r}"
    is_swapped = given and len(cells) > 1 and language_code(cells[-1]) == given
    return f"ends with {cells[-1]!r}" if is_swapped else ""


def note_odd(counts: Counter[str], language: str | None) -> list[str]:
    """A note on lines of a table in which the name of a language is not where it should be."""
    odd = [what for what in counts if what]
    n = sum(counts[what] for what in odd)
    return odd and [f"{n} lines name a language; one {odd[0]}. The text is read in the last column,"
                    f" as {language!r}"]


def lines_of(path: Path, language: str | None) -> Iterator[str]:
    """The lines of a text file, packed or not; BadInput if it is missing or not UTF-8."""
    if kind(path) in NO_TEXT:
        raise BadInput(f"{path}: no {kind(path)} is read; give lines of text as .txt or .tsv")
    if path.exists() and kind(path) != ".tsv" and not language:
        raise BadInput(f"{path}: say its language, as in en={path}")
    try:
        with OPEN.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"cannot read {path} ({first_line(error)}); put it back (a download comes "
                       "again when it is deleted), or give another") from error


def read_file(path: Path, language: str | None, whisper: FrozenWhisper,
              max_lines: int = 10**6) -> Texts:
    """A text file -> its sentences with their counts, notes on what was left out.

    FILE.txt has a sentence a line; FILE.tsv language<TAB>text, or, with a language given, the text
    in its last column. Raises BadInput if nothing in it can be used.
    """
    counts, left_out, lines = Counter(), defaultdict(list), lines_of(path, language)
    odd, is_table = Counter(), kind(path) == ".tsv"
    for n, line in enumerate(islice(lines, max_lines), 1):
        try:
            if line.strip():
                counts[read_line(line, is_table, language, whisper)] += 1
                odd[odd_columns(line, language) if is_table else ""] += 1
        except BadInput as error:
            left_out[str(error)].append(n)
    if next(filter(str.strip, lines), None):
        left_out[f"--max_lines is {max_lines}; so is the rest"].append(max_lines + 1)
    notes = [f"{path}, line {n[0]} is left out{f', and {len(n) - 1} more' * (len(n) > 1)}: {why}"
             for why, n in left_out.items()]
    if len(notes) > MAX_NOTES:
        notes[MAX_NOTES:] = [f"{path}: others for {len(notes) - MAX_NOTES} more reasons"]
    notes += note_odd(odd, language)
    if not counts:
        raise BadInput(f"{path} has no usable sentence; {(notes or ['it is empty'])[0]}")
    return counts, notes


def is_not_latin(text: str) -> bool:
    """Whether it has letters, but none from a to z."""
    return any(map(str.isalpha, text)) and not re.search("[a-zA-Z]", text)


def note_english(n: int, first: str) -> list[str]:
    """A note on n texts that are not Latin, the first of them, whose language nobody said."""
    return [f"{n} texts such as {first.strip()[:40]!r} are read as English; --language says another"
            ] * (n > 0)


def read_texts(texts: Sequence[str], files: Sequence[str], language: str | None,
               whisper: FrozenWhisper) -> tuple[list[Sentence], list[str]]:
    """Texts of the command line, files or URLs, or lines of standard input -> sentences, notes."""
    counts, notes = Counter(), []
    for name in files:
        file = local_file(name)
        code = language or (None if kind(file) == ".tsv" else "en")
        more, problems = read_file(file, code, whisper, sys.maxsize)
        counts.update(more)
        notes += problems
        foreign = [s.text for s in more if code == "en" != language and is_not_latin(s.text)]
        notes += note_english(len(foreign), "".join(foreign[:1]))
    if files:
        return list(counts), notes
    if not texts and sys.stdin and sys.stdin.isatty():
        print("note: the keyboard is read until Ctrl-D (Windows: Ctrl-Z)", file=sys.stderr)
    try:
        stdin = sys.stdin.buffer.read().decode("utf-8-sig") if sys.stdin and not texts else ""
    except UnicodeDecodeError as error:
        raise not_utf8(Path("standard input"), error) from error
    lines = texts or [line for line in re.split("\r\n|\r|\n", stdin) if line.strip()]
    if not lines:
        raise BadInput("no text; give one, or --text_file, or lines on standard input")
    sentences = []
    for i, line in enumerate(lines, 1):
        try:
            if os.path.splitext(line)[1] and os.path.isfile(line):
                raise BadInput("it is a file, which belongs after --text_file")
            sentences.append(make_sentence(line, language or "en", whisper))
        except BadInput as error:
            raise BadInput(f"text {i}, {line[:40]!r}: {error}") from error
    foreign = [s.text for s in sentences if not language and is_not_latin(s.text)]
    notes += note_english(len(foreign), "".join(foreign[:1]))
    if len(texts) > 2 and all(len(words(s.text, s.language)) == 1 for s in sentences):
        notes.append(f"{len(texts)} texts of a word each; quotes make them one text")
    return sentences, notes


def builtin(max_lines: int = 10**6) -> list[Sentence]:
    """The built-in sentences of every language, a file of lines each; make_pocket.py wrote them."""
    return [Sentence(file.stem, line) for file in sorted((POCKET / "sentences").glob("*.txt"))
            for line in file.read_text("utf-8").splitlines()[:max_lines]]


def note_unheard(texts: Sequence[Sentence], whisper: FrozenWhisper) -> list[str]:
    """A note on words that are in no built-in sentence, if the Whisper is pocket."""
    if whisper.name != "pocket":
        return []
    spoken = lambda some: dict.fromkeys(  # noqa: E731
        (s.language, word) for s in some for word in words(s.text.lower(), s.language))
    known = spoken(builtin())
    unheard = [f"{word!r} ({code})" for code, word in spoken(texts) if (code, word) not in known]
    return [f"pocket never heard {', '.join(unheard[:5])}{' ...' * (len(unheard) > 5)}, and "
            "misreads such words; it knows those of pocket/sentences, and an official Whisper far "
            "more"] * bool(unheard)


# ---- all sources -----------------------------------------------------------------------------


def read_folder(folder: Path, language: str | None, whisper: FrozenWhisper,
                max_lines: int) -> Texts:
    """All .txt and .tsv of a folder, packed or not; with no language given fr.txt is French."""
    counts, files = Counter(), [path for path in sorted(folder.iterdir()) if path.name[0] != "."]
    others = [path.name for path in files if kind(path) not in (".txt", ".tsv") or path.is_dir()]
    rest = ", ".join(others[:5]) + " ..." * (len(others) > 5)
    notes = [f"of {folder} only .txt and .tsv are read, not {rest}"] if others else []
    for file in (path for path in files if path.name not in others):
        code = language or (file.name.partition(".")[0] if kind(file) == ".txt" else None)
        try:
            more, problems = read_file(file, code, whisper, max_lines)
            counts.update(more)
            notes += problems
        except BadInput as error:
            notes.append(str(error))
    if not counts:
        why = "; ".join([f"{folder} has no .txt or .tsv that can be used", *notes[:1]])
        raise BadInput(f"{why}; if all are of one language, say it, as in en={folder}")
    return counts, notes


def read_source(source: str, language: str | None, whisper: FrozenWhisper, max_lines: int) -> Texts:
    """"builtin", a file (see `read_file`), a URL of one, a folder, or tatoeba:LANGUAGE."""
    language = language and whisper.check_language(language)
    if source == "builtin":
        known = [language] if language else whisper.languages
        counts = Counter(s for s in builtin(max_lines) if s.language in known)
        if not counts:
            raise BadInput(f"no built-in sentence is in {', '.join(known)}; give --data others")
        return counts, []
    if source.startswith("tatoeba:"):
        code = whisper.check_language(source.partition(":")[2])
        if language not in (None, code):
            raise BadInput(f"{source} is {code!r}, not {language!r}; leave out {language}=")
        language, source = code, TATOEBA.format(ISO_639_3[code])
    path = local_file(source)
    read = read_folder if path.is_dir() else read_file
    return read(path, language, whisper, max_lines)


def read_pools(sources: Sequence[str], whisper: FrozenWhisper,
               max_lines: int) -> tuple[list[tuple[float, Counter[Sentence]]], list[str]]:
    """[WEIGHT*][LANGUAGE=]SOURCE ... -> weight and sentences with their counts of each, notes.

    Those without a weight are put together, as one pool of weight 1.
    """
    pools, notes = {}, []
    for i, text in enumerate(sources):
        parts = re.fullmatch(r"(?:([^*=:/]*)\*)?(?:([^=:/*]*)=)?(.*)", text, re.DOTALL)
        weight, language, source = parts.groups()
        is_number = weight is None or re.fullmatch(r"\d*\.?\d+(e-?\d+)?", weight)
        if not source or not is_number or not 0 < float(weight or 1) < 1e9:
            raise BadInput(f"--data {text!r} cannot be used; give for example builtin, fr=FILE.txt,"
                           " 0.5*fr=FILE.txt or tatoeba:fr")
        counts, problems = read_source(source, language, whisper, max_lines)
        number = None if weight is None else i
        pools.setdefault(number, (float(weight or 1), Counter()))[1].update(counts)
        notes += problems
    return list(pools.values()), notes


def load_data(sources: Sequence[str], whisper: FrozenWhisper, speed: float = 1.0,
              temperature: float = 1.0, max_lines: int = 10**6) -> tuple[dict, list[str]]:
    """Sources, see `read_pools` -> {Sentence: its share of the draws}, notes.

    Weights, as in 0.5*builtin, are relative to each other. In each pool the share of a language is
    as the number of its sentences to the power of 1 / temperature. Texts too long are split.
    """
    pools, notes = read_pools(sources, whisper, max_lines)
    if any(re.fullmatch(r"(.*[*=])?builtin", x) for x in sources) and whisper.name != "pocket":
        notes.append("the built-in sentences have a few hundred words; give --data more")
    shares, n_long, too_long = Counter(), 0, []
    for weight, pool in pools:
        counts, often, of_language = Counter(), Counter(), Counter()
        for sentence, n in pool.items():
            try:
                parts = split_long(sentence, whisper, speed)
            except BadInput as error:
                too_long.append(str(error))
                continue
            n_long += len(parts) > 1
            for piece in parts:
                # Short sentences are rare in most texts and no easier. Drawn more often, they are
                # about as frequent as long ones.
                x = n / n_frames(piece, speed) ** 2
                counts[piece.language] += n
                often[piece] += x
                of_language[piece.language] += x
        powers = {code: n ** (1 / temperature) for code, n in counts.items()}
        total = sum(powers.values())
        for piece, x in often.items():  # a language's share, and the sentence's share of that
            language_share = powers[piece.language] / total
            shares[piece] += weight * language_share * x / of_language[piece.language]
    notes += [f"{n_long} texts were cut into pieces"] if n_long else []
    notes += [f"{len(too_long)} texts are left out: {too_long[0]}"] if too_long else []
    if len(shares) < 2:
        only = "".join(f" ({s.text[:40]!r})" for s in shares)
        raise BadInput("; ".join([f"{len(shares)} different sentences{only} are too few; give "
                                  "--data more", *notes[-1:]]))
    return dict(shares), notes


def print_notes(notes: Iterable[str]) -> None:
    """A line each, beside the results."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def load_sentences(sources: Sequence[str], whisper: FrozenWhisper, **settings) -> list[Sentence]:
    """The sentences of `load_data`; its notes are printed."""
    shares, notes = load_data(sources, whisper, **settings)
    print_notes(notes)
    return list(shares)


def split_of(config: dict, whisper: FrozenWhisper,
             sources: Sequence[str] | None = None) -> tuple[list[Sentence], list[Sentence]]:
    """Training and held-out text of a checkpoint, by its config, or of other sources; texts are cut
    as they were in its training, or what it learned would be held out."""
    return split(load_sentences(sources or config["data"], whisper, speed=config["speed"],
                                max_lines=config["max_lines"]))
