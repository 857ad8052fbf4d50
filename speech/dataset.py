"""Data sets: small ones in one .npz, and those of any size in numbered shards.

    python sample.py --text_file TEXT --out FOLDER --best_of 4 --max_cer 0.1 --part 2/8

    FOLDER/shard-00012.npz    `frames` (N,), and of all N pieces of text, one after another, what
                              --write names: `features` (frames, E), `mel` (2 * frames, M), fp16
    FOLDER/wav/00012/*.wav    or .flac
    FOLDER/shard-00012.jsonl  a row for each text or piece; with it the shard is whole
    FOLDER/manifest.jsonl     the rows of all shards, once all are there; in left_out.jsonl the rest

A shard is made of the same TEXTS_A_SHARD texts whatever the part, and does not depend on others, so
a run that was killed goes on at the first that is missing, and ends with the same bytes.
"""
import io
import json
import math
import re
from collections import Counter
from contextlib import ExitStack, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from whisper.audio import SAMPLE_RATE

from data import Sentence
from flow import MAX_STEPS, Solver
from plumbing import flags
from plumbing.errors import BadInput, as_bad_input
from plumbing.files import Busy, atomic_write, fingerprint, locked
from plumbing.weights import weights_fingerprint
from speech.sound import griffin_lim, log_mel, write_samples
from text.durations import FRAMES_PER_SECOND, count_frames
from text.error_rates import error_rates
from text.sources import (
    is_not_latin, kind, lines_of, local_file, note_english, note_odd, odd_columns, print_notes,
    read_line,
)
from text.spelling import language_code
from whisper_decoder import FrozenWhisper

TEXTS_A_SHARD = 200
READ_AT_ONCE = 16  # sounds
SEED_STEP = 1000  # between the seeds that --best_of tries, so that no other --seed tries them too
SOUNDS = ("wav", "flac")
KINDS = ("features", "mel", *SOUNDS)
SCORES = ("avg_logprob", "no_speech_prob", "compression_ratio")  # of Whisper's DecodingResult
MAX_REASONS = 1000  # why texts are left out, counted apart
CHANGED = "the texts have changed since the start; put them back, or give another --out"

Cut = Callable[[Sentence], list[tuple[Sentence, np.ndarray]]]  # a text -> pieces, durations (S,)
Make = Callable[[Sequence[Sentence], Sequence[np.ndarray], Solver], Iterator]  # -> round trips


def is_set(path: Path | None) -> bool:
    """Whether --out is a folder of shards."""
    return bool(path) and path.suffix.lower() != ".npz"


def add_flags(add: Callable) -> None:
    """Flags of sample.py, by `add` of its parser."""
    add("--out", type=flags.file_path, help="write features here: FILE.npz, or a FOLDER of shards")
    add("--write", nargs="+", action="extend", default=[], choices=KINDS,
        help="to the FOLDER (default: features)")
    add("--best_of", type=int, default=1, help="so many seeds are tried, the best read is written")
    add("--max_cer", type=float, help="largest CER that stays in the FOLDER, 0.05 is 5 %%; where "
        "sounds are written, theirs counts too")
    add("--part", default="1/1", help="2/8: the second of eight processes that write the FOLDER")


def check(args, latent: str) -> None:
    """BadInput for flags out of range, or that do not go with each other or the checkpoint."""
    if (args.wav or args.rooms or {*args.write} - {"features"}) and latent != "mel":
        raise BadInput(f"{args.ckpt} makes features, which have no sound, so --wav, --rooms and "
                       "--write mel cannot be used; `python train.py --latent mel` makes spectra")
    if args.wav and (args.wav.suffix.lower() != ".wav" or args.wav.is_dir()):
        raise BadInput(f"--wav {args.wav} is no FILE.wav; for one of each text, give --text_file "
                       "FILE --out FOLDER --write wav")
    out, folder = args.out, is_set(args.out)
    if folder and out.suffix and not out.is_dir():
        raise BadInput(f"--out {out} is neither FILE.npz nor a folder; a new one has no dot")
    if folder and (out.is_file() or not args.text_file or args.wav):
        raise BadInput(f"--out {out} is a folder of shards; it needs --text_file, no --wav, and no "
                       "file of its name")
    if not folder and (args.write or args.best_of != 1 or args.max_cer is not None
                       or args.part != "1/1"):
        raise BadInput("--write, --best_of, --max_cer and --part belong to --out FOLDER")
    if "flac" in args.write:
        with as_bad_input("--write flac needs soundfile", "`pip install soundfile`"):
            import soundfile  # noqa: F401
    for name, low, high in (("steps", 1, MAX_STEPS), ("best_of", 1, 100), ("max_cer", 0, 1),
                            ("speed", 0.1, 10), ("guidance", -100, 100), ("rooms", 0, 1)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise BadInput(f"--{name} {value} cannot be used; {low} to {high}"
                           + ", 0.05 is 5 %" * (name == "max_cer"))
    if folder and not 0 <= args.seed < SEED_STEP:
        raise BadInput(f"--seed {args.seed} cannot be used for a set, as --best_of tries "
                       f"{SEED_STEP} more each time; 0 to {SEED_STEP - 1}")
    if out and not folder and out.is_dir():
        raise BadInput(f"--out {out} is a folder; give FILE.npz, or a name without .npz")


def write_npz(path: Path, trips: Sequence, text_of: np.ndarray) -> None:
    """A small set: features (N, P, E), the first `frames` are speech; see docs/usage.md."""
    sentences, latents, features, read = zip(*trips)
    languages, texts = zip(*sentences)
    scores = {name: [getattr(r, name) for r in read] for name in SCORES}
    with atomic_write(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, features=torch.stack(features), language=languages, text=texts,
                            frames=[len(x) for x in latents], hypothesis=[r.text for r in read],
                            text_of=text_of, **scores)


# ---- one shard -------------------------------------------------------------------------------


class Piece(NamedTuple):
    row: dict  # of the manifest
    arrays: dict[str, Tensor]  # what --write names; of sounds, the log-mel, and later the samples


def describe(trip, seed: int, whisper: FrozenWhisper, kinds: Sequence[str]) -> Piece:
    """A round trip with the arrays of these kinds alone: features of a window are megabytes."""
    n, read, arrays = len(trip.x1), trip.read, {}
    row = dict(language=trip.sentence.language, text=trip.sentence.text,
               seconds=n / FRAMES_PER_SECOND, frames=n, seed=seed, hypothesis=read.text,
               cer=round(error_rates([trip.sentence], [read.text]).cer, 4),
               **{name: round(getattr(read, name), 4) for name in SCORES})
    if "features" in kinds:
        arrays["features"] = trip.features[:n].half().cpu()
    if set(kinds) - {"features"}:
        arrays["mel"] = whisper.log_mel_of(trip.x1.to(whisper.device)).T.half().cpu()
    return Piece(row, arrays)


def best_pieces(pieces: list, make: Make, solvers: Sequence[Solver], whisper: FrozenWhisper,
                kinds: Sequence[str]) -> list[Piece]:
    """Of each piece of text the seed that is read best: fewest errors, then surest."""
    order = sorted(range(len(pieces)), key=lambda i: count_frames(pieces[i][1]))  # less padding
    rank = lambda piece: (-piece.row["cer"], piece.row["avg_logprob"])  # noqa: E731
    best = {}
    for solver in solvers:
        trips = make(*zip(*(pieces[i] for i in order)), solver) if order else ()
        for i, trip in zip(order, trips):
            now = describe(trip, solver.seed, whisper, kinds)
            best[i] = max(best.get(i, now), now, key=rank)  # the first of equals
    return [best[i] for i in range(len(pieces))]


def read_sounds(pieces: Sequence[Piece], whisper: FrozenWhisper) -> None:
    """Log-mels -> samples, and what is read in these: `cer_sound` of each row."""
    for piece in pieces:
        mel = piece.arrays["mel"].float().T.to(whisper.device)
        samples = griffin_lim(mel).cpu()
        piece.arrays["samples"] = samples / samples.abs().max().clamp(min=1)  # as it is written
    for start in range(0, len(pieces), READ_AT_ONCE):
        group = pieces[start : start + READ_AT_ONCE]
        mels = torch.cat([log_mel(piece.arrays["samples"], whisper) for piece in group])
        sentences = [Sentence(piece.row["language"], piece.row["text"]) for piece in group]
        features = whisper.features_of_mel(mels.to(whisper.device))
        read = whisper.transcribe(features, *zip(*sentences))
        for piece, sentence, result in zip(group, sentences, read):
            piece.row["cer_sound"] = round(error_rates([sentence], [result.text]).cer, 4)


def write_sound(path: Path, samples: Tensor) -> None:
    """Samples (n,) as .wav, or as .flac by soundfile."""
    if path.suffix == ".wav":
        return write_samples(path, samples)
    import soundfile
    file = io.BytesIO()
    soundfile.write(file, samples.numpy(), SAMPLE_RATE, format="FLAC")
    with atomic_write(path) as part:  # soundfile ignores a full disk
        part.write_bytes(file.getvalue())


def make_shard(name: str, lines: Sequence, first: int, args, kinds: Sequence[str],
               whisper: FrozenWhisper, cut: Cut, make: Make) -> None:
    """Lines of text, the number of the first -> a shard on the disk."""
    ids, texts, left_out = cut_texts(lines, first, cut, whisper)
    solvers = [args.solver._replace(seed=args.seed + SEED_STEP * i) for i in range(args.best_of)]
    pieces = [piece._replace(row=dict(id=id_of) | piece.row)
              for id_of, piece in zip(ids, best_pieces(texts, make, solvers, whisper, kinds))]
    if {*kinds} & {*SOUNDS}:
        read_sounds(pieces, whisper)
    limit, good = math.inf if args.max_cer is None else args.max_cer, []
    for piece in pieces:
        if max(piece.row["cer"], piece.row.get("cer_sound", 0)) <= limit:
            good.append(piece)
        else:
            left_out.append(piece.row | dict(why=f"its CER is over --max_cer {limit:g}"))
    write_shard(name, args.out, good, left_out, kinds)


def write_shard(name: str, folder: Path, pieces: list[Piece], left_out: list[dict],
                kinds: Sequence[str]) -> None:
    """Its arrays and sounds, and last its rows: then it is whole."""
    for sound in [x for x in SOUNDS if x in kinds]:
        for piece in pieces:
            piece.row[sound] = f"{sound}/{name.removeprefix('shard-')}/{piece.row['id']}.{sound}"
            write_sound(folder / piece.row[sound], piece.arrays["samples"])
    if kept := sorted({*kinds} - {*SOUNDS}):
        arrays = {kind: np.concatenate([x.arrays[kind] for x in pieces]) for kind in kept if pieces}
        with atomic_write(folder / f"{name}.npz") as part, open(part, "wb") as file:
            np.savez(file, frames=[piece.row["frames"] for piece in pieces], **arrays)
    rows = [piece.row | dict(shard=f"{name}.npz", index=i) if kept else piece.row
            for i, piece in enumerate(pieces)]
    with atomic_write(folder / f"{name}.jsonl") as part:
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n"
                                for row in [*rows, *left_out]), "utf-8", newline="\n")


def is_whole(name: str, folder: Path, kinds: Sequence[str], numbers: range) -> bool:
    """Whether a shard is there, with rows of all its texts, and what these name (no sound is read:
    `atomic_write` leaves none that is half-written)."""
    try:
        with open(folder / f"{name}.jsonl", "rb") as file:
            rows = [json.loads(line) for line in file]
        if not {*kinds} <= {*SOUNDS}:
            with np.load(folder / f"{name}.npz") as arrays:
                frames = [row["frames"] for row in rows if "why" not in row]
                if arrays["frames"].tolist() != frames or (
                        frames and not {*kinds} - {*SOUNDS} <= {*arrays}):
                    return False
        if not all((folder / row[sound]).exists() for row in rows for sound in SOUNDS
                   if sound in row):
            return False
        return {int(row["id"].split("-")[0]) for row in rows} == {*numbers}
    except Exception:  # it is damaged, in one way or other
        return False


# ---- all shards ------------------------------------------------------------------------------


def read_lines(files: Sequence[str], language: str | None) -> Iterator[tuple[str, str, str | None]]:
    """The lines of files that are not blank: text, kind of file, language."""
    for name in files:
        path = local_file(name)
        code = language or (None if kind(path) == ".tsv" else "en")
        yield from ((line, kind(path), code) for line in lines_of(path, code) if line.strip())


def digest(lines: Iterable[tuple]) -> str:
    """It changes with the texts of a shard, as `read_lines` gives them."""
    return fingerprint([(line.rstrip("\n"), suffix, code) for line, suffix, code in lines])


def cut_texts(lines: Sequence, start: int, cut: Cut, whisper: FrozenWhisper) -> tuple[list, ...]:
    """Lines, the number of the first -> ids and pieces of text, rows of what cannot be made."""
    ids, pieces, left_out = [], [], []
    for number, (line, suffix, code) in enumerate(lines, start):
        try:
            parts = cut(read_line(line, suffix == ".tsv", code, whisper))
            ids += [f"{number:08d}" + f"-{i}" * (len(parts) > 1) for i in range(len(parts))]
            pieces += parts
        except BadInput as error:
            first = line.split("\t")[0].strip()[:20]
            left_out.append(dict(id=f"{number:08d}", language=code or first,
                                 text=line.strip()[:200], why=str(error)))
    return ids, pieces, left_out


def check_settings(folder: Path, settings: dict) -> None:
    """BadInput if the folder has a set of other texts, another checkpoint or other flags."""
    file = folder / "settings.json"
    if not file.exists() and any(not path.name.startswith(("settings.json", "."))
                                 for path in folder.iterdir()):
        raise BadInput(f"--out {folder} holds something else; give a new or empty folder")
    flags.keep_settings(file, settings, "give another --out", "--out",
                        ("text", "checkpoint", "whisper"))


def merge(folder: Path, names: Sequence[str], trained: Sequence[str]) -> tuple[int, str]:
    """manifest.jsonl and left_out.jsonl of all shards -> how many pieces, a summary."""
    seconds, kept, left_out, first = 0.0, Counter(), Counter(), {}
    with suppress(BadInput), ExitStack() as parts:
        for lock in folder.glob(".lock-*"):  # no part is still at work
            parts.enter_context(locked(folder, part=lock.name[len(".lock"):]))
        for file in folder.rglob("*.????????????.tmp"):  # of atomic_write
            file.unlink(missing_ok=True)  # of a run that was killed
    with (atomic_write(folder / "manifest.jsonl") as good, open(good, "wb") as manifest,
          atomic_write(folder / "left_out.jsonl") as bad, open(bad, "wb") as rest):
        for line in chain.from_iterable(open(folder / f"{name}.jsonl", "rb") for name in names):
            row = json.loads(line)
            if "why" in row:
                key = row["language"], row["why"]
                if len(left_out) >= MAX_REASONS and key not in left_out:
                    key = "?", "other reasons"
                left_out[key] += 1
                first.setdefault(key, row["id"])
                rest.write(line)
            else:
                kept[row["language"]] += 1
                seconds += row["seconds"]
                manifest.write(line)
    lines = [f"{code}: {n} written" + ", which the checkpoint never learned" * (code not in trained)
             for code, n in sorted(kept.items())]
    lines += [f"{n} left out, the first {first[code, why]}, {code!r}: {why}"
              for (code, why), n in left_out.most_common(10)]
    if len(left_out) > 10:
        lines.append(f"and others for {len(left_out) - 10} more reasons, see left_out.jsonl")
    lines.append(f"wrote {folder}: {kept.total()} pieces of text, {seconds / 3600:.2f} hours")
    return kept.total(), "\n".join(lines)


def parse_part(text: str) -> tuple[int, int]:
    """"2/8" -> 2, 8."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= part <= n <= 10_000:
        raise BadInput(f"--part {text!r} cannot be used; 2/8 is the second of eight")
    return part, n


def survey(args, unlearned: set[str]) -> tuple[list[str], int, list[str]]:
    """One pass over all texts -> a digest per shard, how many texts, notes; BadInput if none.

    unlearned: languages that Whisper knows and the checkpoint does not.
    """
    for name in args.text_file:
        if (path := local_file(name)).exists() and not path.is_file():
            raise BadInput(f"--text_file {name} is no file that can be read twice; make it one, "
                           "and give each file of a folder its --text_file")
    digests, odd, unlearned_here = [], Counter(), set()  # no texts: there may be millions
    n_foreign, foreign, lines = 0, "", read_lines(args.text_file, args.language)
    while block := list(islice(lines, TEXTS_A_SHARD)):
        digests.append(digest(block))
        for line, suffix, code in block:
            odd[odd_columns(line, code) if suffix == ".tsv" else ""] += 1
            first = line.partition("\t")[0].strip('"')  # of a table, perhaps in quotes
            unlearned_here |= unlearned & {code or language_code(first)}
            if code == "en" != args.language and is_not_latin(line):
                n_foreign, foreign = n_foreign + 1, foreign or line
    notes = note_english(n_foreign, foreign) + note_odd(odd, args.language)
    if not odd:
        raise BadInput(f"there is no text in {', '.join(args.text_file)}; give lines of text")
    notes += [f"{args.ckpt} was not trained in {code!r}" for code in sorted(unlearned_here)]
    return digests, odd.total(), notes


def write_dataset(args, checkpoint: dict, whisper: FrozenWhisper, cut: Cut, make: Make) -> str:
    """All shards of this part that are not there yet -> what there is then, in words."""
    folder, (part, n_parts), n = args.out, parse_part(args.part), TEXTS_A_SHARD
    kinds, trained = sorted(set(args.write or ["features"])), checkpoint["origin"]["languages"]
    args.language = args.language and whisper.check_language(args.language)
    digests, n_texts, notes = survey(args, {*whisper.languages} - {*trained})
    print_notes(notes)
    settings = dict(language=args.language, text=fingerprint(digests), whisper=whisper.fingerprint,
                    checkpoint=weights_fingerprint(checkpoint["ema"].values()), write=kinds,
                    best_of=args.best_of, max_cer=args.max_cer, speed=args.speed,
                    rooms=args.rooms, **args.solver._asdict(), texts_a_shard=n)
    shards = {f"shard-{first // n:05d}": range(first, min(first + n, n_texts))
              for first in range(0, n_texts, n)}  # the numbers of their texts
    own = {*[*shards][part - 1 :: n_parts]}
    lines = read_lines(args.text_file, args.language)
    with (locked(folder, part=f"-{part}-{n_parts}" if n_parts > 1 else ""),
          tqdm(total=sum(len(shards[name]) for name in own), unit=" texts", smoothing=0) as bar):
        check_settings(folder, settings)
        for (name, numbers), before in zip(shards.items(), digests):
            block = list(islice(lines, n))
            if digest(block) != before:
                raise BadInput(CHANGED)
            if name not in own:
                continue
            if is_whole(name, folder, kinds, numbers):
                bar.initial += len(block)  # the time left follows from the mean of the others
            else:
                make_shard(name, block, numbers[0], args, kinds, whisper, cut, make)
            bar.update(len(block))
        if next(lines, None):
            raise BadInput(CHANGED)
    if missing := sum(not is_whole(name, folder, kinds, numbers)
                      for name, numbers in shards.items() if name not in own):
        return (f"part {args.part} is done; {missing} of {len(shards)} shards are missing in "
                f"{folder}, and the part that ends last writes manifest.jsonl")
    try:
        with locked(folder):
            n_pieces, summary = merge(folder, [*shards], trained)
    except Busy:
        return f"part {args.part} is done; another part is just writing manifest.jsonl"
    if not n_pieces:
        raise BadInput(f"nothing of the set could be kept\n{summary}")
    return summary
