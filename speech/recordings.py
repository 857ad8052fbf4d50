"""Recordings teach the flow by plain flow matching; text alone teaches it the rest.

    python train.py --speech DIR --steps 4800       # needs `pip install soundfile`

DIR/manifest.tsv has lines path<TAB>language<TAB>text; the layout of LJSpeech (English) has
metadata.csv with lines id|text|text as spoken, and wavs/id.wav. With neither, the frozen Whisper
writes the text of every recording, and is believed where it is sure.

B batch, S characters, T latent frames (20 ms), C latent channels, M mel bins, P positions.
"""
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import flow
from data import Sentence
from plumbing.errors import BadInput, first_line
from plumbing.files import atomic_write, fingerprint
from speech.align import (
    ROUNDS, STRAY, align_characters, durations_by, fit_rhythm, spoken_symbols,
)
from speech.ear import MEL_STD
from speech.sound import log_mel, resample
from text.durations import FRAMES_PER_SECOND
from text.sources import MAX_NOTES, make_sentence, not_utf8
from whisper_decoder import FrozenWhisper

try:
    import soundfile
except (ImportError, OSError) as error:
    raise BadInput("to learn from recordings, `pip install soundfile`") from error

SPEECH_ALONE = 0.75  # share of the run, at its beginning, that has recordings only
TEXT_WEIGHT = 0.2  # of the cross-entropy, in the other steps of text
SOLVER_STEPS = flow.Solver().steps  # of the round trip, as many as `sample.py` takes
MIN_LOGPROB, MAX_NO_SPEECH = -0.3, 0.5  # of a hypothesis that is taken as the text
DECIBELS = 40.0  # below the loudest, at which speech ends
TAIL = 10  # frames behind the last sound: without them an official decoder may repeat itself
MAX_SECONDS = 60  # of a recording; a Whisper hears 30, and a whole book would fill the memory
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")  # of recordings that no manifest names

Entry = tuple[Path, Sentence | None]  # a recording, and what it says if that is known


class Recording(NamedTuple):
    sentence: Sentence
    x1: Tensor  # (T, C) fp16
    durations: np.ndarray  # frames that each character lasts (S,)


# ---- files -----------------------------------------------------------------------------------


def read_manifest(folder: Path, whisper: FrozenWhisper) -> tuple[list[Entry], list[str]]:
    """A folder -> its recordings, notes on lines left out; BadInput if there is no folder."""
    if not folder.is_dir():
        raise BadInput(f"no folder {folder}; give one with recordings and a manifest.tsv")
    is_table = (folder / "manifest.tsv").exists()
    manifest = folder / ("manifest.tsv" if is_table else "metadata.csv")
    if not manifest.exists():
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        note = f"{folder} has no manifest.tsv or metadata.csv, so {whisper.name} writes the texts"
        return [(path, None) for path in paths], [note] * bool(paths)
    try:
        lines = manifest.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise not_utf8(manifest, error) from error
    entries, notes = {}, []
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = line.split("\t", 2) if is_table else line.split("|")
        try:
            if len(fields) < 3 or is_table and "\t" in fields[2].strip():
                raise BadInput(f"3 fields are expected, not {line[:60]!r}")
            path, code = fields[:2] if is_table else (f"wavs/{fields[0]}.wav", "en")
            sentence = make_sentence(fields[2], code, whisper)
            if folder / path in entries:
                raise BadInput(f"{path} has a text already")
            entries[folder / path] = sentence
        except BadInput as error:
            form = "path<TAB>language<TAB>text" if is_table else "id|text|text as spoken"
            notes.append(f"{manifest}, line {i}: {error}; a line is {form}")
    if not (entries or notes):
        raise BadInput(f"{manifest} is empty; fill it, or delete it, and {whisper.name} writes the "
                       "texts")
    if entries and not is_table:
        notes.insert(0, f"{manifest} is read as English; a manifest.tsv says another language")
    return [*entries.items()], notes


def read_audio(path: Path) -> np.ndarray:
    """What soundfile reads -> 16 kHz, mono, (n,); BadInput if there is nothing."""
    if not os.path.isfile(path):
        raise BadInput("no audio that can be read (no such file)")
    try:
        with open(path, "rb") as file:
            head, size = file.read(8), os.path.getsize(path)
        said = 8 + int.from_bytes(head[4:], "little")  # nearly 2**31 or more in a .wav from a pipe
        if head[:4] == b"RIFF" and size < said < 0x7fff0000:
            raise BadInput(f"it was cut short after {size:,} bytes; copy it again")
        if (seconds := soundfile.info(path).duration) > MAX_SECONDS:
            raise BadInput(f"it lasts {seconds:.0f} s; cut it")
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (PermissionError, RuntimeError, TypeError) as error:  # another OSError stops the run
        raise BadInput(f"no audio that can be read ({first_line(error)})") from error
    samples = samples.mean(1)
    loudest = abs(samples).max(initial=0)  # nan, if one is
    if not 1e-6 < loudest < 100:
        raise BadInput("no sound in it" if loudest <= 1e-6 else f"samples of up to {loudest:.3g}; "
                       "1 is the loudest")
    return resample(samples, rate)


# ---- latents ---------------------------------------------------------------------------------


def speech_span(mel: Tensor, tail: int = TAIL) -> slice:
    """Log-mel (M, 2P) -> its latent frames within DECIBELS of the loudest, and `tail` behind."""
    loud = (mel.amax(0) > mel.max() - DECIBELS / 40).nonzero()[:, 0].tolist()  # 1 is 40 dB
    return slice(loud[0] // 2, min(loud[-1] // 2 + 1 + tail, mel.shape[1] // 2))


def encode(mel: Tensor, sentence: Sentence | None, whisper: FrozenWhisper) -> tuple:
    """Log-mel (1, M, 2P) -> its sentence (transcribed if None), x1 (T, C) fp16."""
    if sentence is None:
        read = whisper.transcribe(whisper.features_of_mel(mel), [None])[0]
        if read.avg_logprob < MIN_LOGPROB or read.no_speech_prob > MAX_NO_SPEECH:
            raise BadInput(f"{whisper.name} is not sure of what it says: {read.text!r}")
        sentence = make_sentence(read.text, read.language, whisper)
    x1 = whisper.latents(mel)[0, speech_span(mel[0])].half().cpu()
    if len(spoken_symbols(sentence.text)[1]) > len(x1) - TAIL:
        raise BadInput(f"{len(x1)} frames are too few for {sentence.text[:60]!r}")
    return sentence, x1


def encode_recording(path: Path, sentence: Sentence | None, whisper: FrozenWhisper) -> list:
    """Its sentence and x1 (T, C), or a note that it is left out."""
    try:
        sentence, x1 = encode(log_mel(read_audio(path), whisper), sentence, whisper)
        return [tuple(sentence), x1]
    except BadInput as error:
        return [f"{path}: {error}"]


def content_key(path: Path, sentence: Sentence | None, whisper: FrozenWhisper) -> str:
    """It changes with a recording, its text, and who encodes it how."""
    stat = path.stat() if os.path.isfile(path) else None
    state = stat and (stat.st_size, stat.st_mtime_ns, os.access(path, os.R_OK))
    constants = (DECIBELS, TAIL, MEL_STD, MIN_LOGPROB, MAX_NO_SPEECH,
                 soundfile.__libsndfile_version__)
    return fingerprint((sentence, state, whisper.fingerprint, constants))


def cached(file: Path, key: str, make: Callable[[], list], notes: list[str]) -> list:
    """What `make` makes, from a file that is written anew if its key is another."""
    with suppress(Exception):  # there is none, or one that cannot be read
        if (kept := torch.load(file, weights_only=True))["key"] == key:
            return kept["made"]
    made = make()
    try:
        with atomic_write(file) as part, open(part, "wb") as out:
            torch.save(dict(key=key, made=made), out)
    except OSError as error:
        notes[:] = [f"{file.parent} cannot be kept ({first_line(error)})"]
    return made


def encode_folder(folder: Path, entries: Sequence[Entry], whisper: FrozenWhisper
                  ) -> tuple[list[Recording], list[str]]:
    """Recordings and notes on those that are left out. In the folder they stay encoded, each in a
    file of its own: a run that is stopped, or another recording, costs nothing else."""
    cache = folder / f"encoded_{type(whisper).__name__}_{whisper.fingerprint[:8]}"
    keys, notes, encoded = [], [], []
    for path, sentence in tqdm(entries, "encoding recordings"):
        name = fingerprint(os.path.relpath(path, folder))
        keys.append(content_key(path, sentence, whisper))
        encoded.append(cached(cache / f"{name}.pt", keys[-1], lambda: (
            encode_recording(path, sentence, whisper)), notes))
    names = {fingerprint(os.path.relpath(path, folder)) for path, _ in entries}
    for file in cache.glob("*.pt"):  # of recordings that are gone
        if file.stem not in names | {"aligned"}:
            file.unlink(missing_ok=True)
    left_out = [x[0] for x in encoded if len(x) == 1]  # notes alone
    known = [x for x in encoded if len(x) == 2]
    sentences, x1 = [Sentence(*s) for s, _ in known], [x for _, x in known]
    key = fingerprint((keys, sentences, [*map(len, x1)], ROUNDS, STRAY))
    durations = cached(cache / "aligned.pt", key, lambda: [
        torch.from_numpy(n) for n in align_characters(sentences, x1)], notes)
    return [*map(Recording, sentences, x1, (n.numpy() for n in durations))], [*notes, *left_out]


def load_recordings(folder: Path, whisper: FrozenWhisper, held_out: Sequence[Sentence] = ()
                    ) -> tuple[list[Recording], list[str]]:
    """A folder -> recordings of sentences that are neither held out nor like one, notes."""
    entries, notes = read_manifest(folder, whisper)
    if not entries:
        raise BadInput(f"{folder} has no recording; {(notes or ['add ' + ' '.join(SUFFIXES)])[-1]}")
    known, unusable = encode_folder(folder, entries, whisper)
    keys = set(map(data.key, held_out))
    training = [r for r in known if data.hash_share(r.sentence) > data.HELD_OUT
                and data.key(r.sentence) not in keys]
    if not training:
        why = f"all {len(known)} are of held-out sentences, so add others"
        reasons = [*notes, *unusable, *[why] * bool(known)]
        raise BadInput(f"{folder} has no usable recording; {reasons[-1]}")
    minutes = sum(len(r.x1) for r in training) / FRAMES_PER_SECOND / 60
    return training, [*first_few(notes), *first_few(unusable),
                      f"{len(training)} recordings, {minutes:.1f} minutes of speech; "
                      f"{len(known) - len(training)} of held-out sentences are left out"]


def first_few(notes: list[str]) -> list[str]:
    """The first MAX_NOTES, and how many more there are."""
    more = len(notes) - MAX_NOTES
    return notes[:MAX_NOTES] + [f"{more} more are left out"] * (more > 0)


# ---- training --------------------------------------------------------------------------------


class RecordingBatches(torch.utils.data.Dataset):
    """Batches of recordings; in the last quarter every other one of text: data.Batches of both."""

    def __init__(self, recordings: Sequence[Recording], text: data.Batches, n_steps: int):
        self.recordings, self.text, self.n_steps = recordings, text, n_steps
        self.frames = torch.tensor([len(r.x1) for r in recordings])
        often = self.frames.double() ** -2  # more of short ones, as in text.sources.load_data
        self.sums = often.cumsum(0)

    def __getitem__(self, step: int) -> data.Batch:
        if step >= SPEECH_ALONE * self.n_steps and step % 2:
            return self.text[step // 2]  # all kinds of its batches come
        rng, n = data.generator(self.text.seed, step), self.text.batch_size
        batch = [self.recordings[i] for i in data.draw_similar(self.sums, self.frames, n, rng)]
        sentences, x1, durations = zip(*batch)
        return data.make_batch(sentences, self.text.whisper, durations, x1)


def objective(model, critic: FrozenWhisper, batch: data.Batch, x0: Tensor, t: Tensor, drop: Tensor,
              room, flow_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> the loss of a step, a scalar; of each item its cross-entropy and flow loss, (B,) both.

    Recordings have their x1, so this is flow matching proper, without cross-entropy. They say where
    every t points, so text has no flow loss (and no use for t, drop and the weight). Its
    cross-entropy passes all steps of the sampler, at a weight that bends the path only a little.
    """
    if batch.x1 is not None:
        cond = batch.cond | dict(drop=drop)
        cfm = flow.cfm_loss(model, x0, batch.x1, t, cond, batch.mask)
        return cfm.mean(), t * math.nan, cfm
    x1 = flow.last(flow.sample(flow.model_velocity(model, batch.cond), x0, SOLVER_STEPS))
    _, nll = critic.text_loss(x1, batch, room)
    return TEXT_WEIGHT * nll.mean(), nll, t * math.nan


def with_recordings(text: data.Batches, held_out: Sequence[Sentence], config) -> tuple:
    """Batches of text, train.Config -> batches of recordings and text, objective, rhythm, notes.

    Text lasts as long as the recordings say, in their languages.
    """
    if config.flow_weight != type(config).flow_weight:
        raise BadInput(f"--flow_weight {config.flow_weight} does nothing with --speech; leave "
                       "one of them out")
    recordings, notes = load_recordings(Path(config.speech), text.whisper, held_out)
    rhythm = fit_rhythm([r.sentence for r in recordings], [r.durations for r in recordings])
    text.set_durations(durations_by(rhythm))
    if not {r.sentence.language for r in recordings} & {s.language for s in text.sentences}:
        notes.append("text and recordings have no language in common")
    return RecordingBatches(recordings, text, config.steps), objective, rhythm, notes
