"""Utterances, for several studies: as espeak-ng, people, or a checkpoint say the sentences.

x1 of an utterance is here what a frozen encoder makes of it (T, C), before ln_post.
B batch, T frames, C channels, M mel bins, P positions of Whisper's window.
"""
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Callable, Collection, Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from whisper.audio import SAMPLE_RATE

import data
import train
from experiments.student import Speech, letters, resample
from flow import Solver, last
from plumbing.errors import BadInput
from pocket import make_pocket
from pocket.clips import mel_from_bytes, spoken_clips
from sample import Flow, load_flow
from speech import align, recordings, sound
from speech.ear import SILENT_FRAMES, Ear, silence_of, upsample
from speech.recordings import TAIL, speech_span
from speech.sound import log_mel
from text.durations import char_durations, count_frames
from text.long import fits
from text.sources import MAX_NOTES, print_notes
from whisper_decoder import FrozenWhisper

N_PEOPLE = 250  # clips of a test, at most
FIRST_SEED = 1000  # of espeak-ng's voices: pocket was trained on those below
ACCENTS = dict(en="en-us", es="es-419")  # of the people that human.py gets: espeak-ng's voices


# ---- real speech -----------------------------------------------------------------------------


def parts(items: Iterable, whisper: FrozenWhisper) -> Iterator[list]:
    """Lists of so many items as its encoder hears at once in little memory."""
    items = iter(items)
    while part := list(islice(items, max(1, 24000 // whisper.max_frames))):
        yield part


@torch.no_grad()
def encode(mels: Iterable[Tensor], whisper: FrozenWhisper) -> list[Tensor]:
    """Log-mel (M, 2P) each -> the encoder's output of speech and TAIL behind it, (T, C) each.

    In windows hardly longer than the speech, as in training: ten times as fast.
    """
    x1 = []
    for part in parts(mels, whisper):
        spans = [speech_span(mel) for mel in part]
        window = max(span.stop for span in spans) + SILENT_FRAMES
        encoded = whisper.encode_mel(torch.stack(part)[:, :, : 2 * window]).cpu()
        x1 += [x[span].clone() for x, span in zip(encoded, spans)]
    return x1


def espeak(sentences: list, variants, seed: int, whisper: FrozenWhisper, work: Path,
           rooms: float = 0.0, critic: FrozenWhisper | None = None) -> Iterator[Tensor]:
    """espeak-ng says the sentences -> log-mel (M, 2P) each; rooms: as in `sample.py --rooms`.

    Its voices go by the critic, whoever hears them (default: by the Whisper that hears).
    """
    seed += FIRST_SEED
    mels = plain_espeak(sentences, variants, seed, whisper, work, critic or whisper)
    for sentence, mel in zip(sentences, mels):
        if rooms:
            n = 2 * speech_span(mel, 0).stop
            speech = sound.move_voice(mel[:, :n], sentence, seed, rooms)
            # As the flow's: from 50 frames a second, which smooths the hiss, and clean behind.
            speech = upsample(F.avg_pool1d(speech[None], 2))[0]
            floor = silence_of(speech.max()).item()
            mel = F.pad(speech, (0, mel.shape[1] - n), value=floor).clamp(min=floor)
        yield mel


def plain_espeak(sentences: list, variants, seed: int, whisper: FrozenWhisper, work: Path,
                 critic: FrozenWhisper) -> Iterator[Tensor]:
    """espeak-ng says the sentences -> log-mel (M, 2P) each; for a critic of pocket's shape in
    pocket's voices, as its test has them, for others in ACCENTS."""
    if critic.dims.n_mels == 80 and critic.max_frames == make_pocket.DIMS.n_audio_ctx:
        for clip in make_pocket.speak_all(sentences, variants, seed, work, "realism"):
            yield mel_from_bytes(clip, 2 * whisper.max_frames)
        return
    say = partial(make_pocket.random_samples, variants=variants, seed=seed,
                  longest=whisper.n_samples)
    with ThreadPoolExecutor(2) as pool:
        spoken = [s._replace(language=ACCENTS.get(s.language, s.language)) for s in sentences]
        for part in parts(tqdm(spoken, desc="speaking", leave=False), whisper):
            yield from (log_mel(samples, whisper)[0] for samples in pool.map(say, part))


def human_clips(folder: Path, whisper: FrozenWhisper, languages: set[str], n: int,
                is_wanted: Callable = lambda sentence: True) -> list[tuple[data.Sentence, Tensor]]:
    """Clips of people and their log-mels (M, 2P), up to n, rounded up to as many a language.

    Of 1 to 12 seconds, chosen by a hash, without digits: who knows how they are read?
    """
    entries, notes = recordings.read_manifest(folder, whisper)
    if any(s is None for _, s in entries):
        raise BadInput(f"{folder} has no texts of its recordings; give it a manifest.tsv")
    usable = [(s, path) for path, s in entries if s and s.language in languages and is_wanted(s)
              and not any(map(str.isdigit, s.text))]
    clips, counts, most = [], Counter(), n / max(1, len({s.language for s, _ in usable}))
    for s, path in sorted(usable, key=lambda clip: data.hash_share(clip[0])):
        if counts[s.language] >= most:
            continue
        try:
            samples = recordings.read_audio(path)
            if 1 <= len(samples) / SAMPLE_RATE <= 12:
                clips.append((s, log_mel(samples, whisper)[0]))
                counts[s.language] += 1
        except BadInput as error:
            notes.append(f"{path}: {error}")
    if not clips:
        why = (f"{folder} has no usable clip: 1 to 12 seconds in {', '.join(sorted(languages))}, "
               "no digits, no text that is learned")
        raise BadInput("; ".join([why, *notes[:1]]))
    print_notes(notes[:MAX_NOTES])
    print(f"{len(clips)} clips of {folder}", file=sys.stderr)
    return clips


def people(folder: Path, languages: set, known: set, whisper: FrozenWhisper,
           n: int = N_PEOPLE) -> Speech:
    """People as an encoder hears them, in texts that no student learns; known: letters of these."""
    clips = human_clips(folder, whisper, languages, n, lambda s: letters(s) not in known)
    sentences, mels = map(list, zip(*clips))
    return Speech(sentences, encode(mels, whisper))


def real_test(whisper: FrozenWhisper, languages: Collection[str],
              known: Collection[str] = ()) -> Speech:
    """The spoken test sentences of pocket, in voices that nothing heard; known: letters of what is
    learned, which no test has."""
    clips = [clip for clip in spoken_clips(whisper) if clip[0].language in languages
             and letters(clip[0]) not in known]
    if not clips:
        raise BadInput(f"{whisper.name} can hear no clip of pocket's test that is not learned in "
                       f"{', '.join(sorted(languages))}; give --recordings")
    sentences, mels = map(list, zip(*clips))
    return Speech(sentences, encode(mels, whisper))


def even(speech: Speech, speed: float = 1.0) -> Speech:
    """The same, in the rhythm of the length rule at a speed: every letter as long as any other.

    Of several signs in a row one counts. The silence behind the last sound stays as it is.
    """
    x1 = []
    for sentence, x, n in zip(*speech, align.align_characters(*speech)):
        rule = char_durations(sentence, speed)
        frames = count_frames(rule)
        ends, even_ends = (np.cumsum([0, *widths[n > 0]]) for widths in (n, rule))
        last = align.symbols(sentence.text)[np.flatnonzero(n)[-1]]
        if align.is_letter(last):  # no sign has the silence behind
            ends[-1] = max(ends[-1] - TAIL, ends[-2] + 1)
        frame = (np.arange(frames) + 0.5) / frames * even_ends[-1]
        x1.append(torch.cat([resample(x, np.interp(frame, even_ends, ends) - 0.5), x[-TAIL:]]))
    return Speech(speech.sentences, x1)


# ---- generated speech ------------------------------------------------------------------------


@torch.no_grad()
def latents(flow: Flow, sentences: list, solver: Solver,
            rooms: float = 0.0) -> Iterator[tuple[Tensor, Tensor]]:
    """The flow says some sentences at a time -> x1 (B, T, its channels), lengths (B,).

    rooms: other voices and paces, as in `sample.py --rooms`.
    """
    whisper, seed = flow.critic, solver.seed
    for group in parts(sentences, whisper):
        durations = [flow.durations(s, sound.pace(s, flow.speed, seed, rooms)) for s in group]
        batch = data.make_batch(group, whisper, durations).to(whisper)
        x1 = last(train.generate(flow.model, whisper, batch, solver))
        yield sound.another_voice(x1, batch, whisper, seed, rooms), batch.cond["frames"]


@torch.no_grad()
def generate(flow: Flow, sentences: list, solver: Solver, rooms: float = 0.0,
             hears: FrozenWhisper | None = None) -> Speech:
    """The flow says the sentences; spectrograms as the critic's encoder, or another, hears them.

    With as much silence behind as real speech has here; a flow of recordings makes its own.
    """
    critic, encoded = flow.critic, []
    hears, tail = hears or critic, TAIL * (flow.durations is char_durations)
    for x1, frames in latents(flow, sentences, solver, rooms):
        if isinstance(critic, Ear):
            window = min(x1.shape[1] + SILENT_FRAMES, hears.max_frames)
            if frames.max() > window:
                raise BadInput(f"{hears.name} hears at most {window} frames, and a sentence has "
                               f"{int(frames.max())}; give shorter --data")
            x1 = hears.encode_mel(critic.spectrogram(x1, frames, window))
        else:
            x1 = [torch.cat([x[:n], critic.encoded_silence[n:]])
                  for x, n in zip(x1, frames.tolist())]
        encoded += [x[: n + tail].cpu().clone() for x, n in zip(x1, frames.tolist())]
    return Speech(sentences, encoded)


# ---- espeak-ng or a checkpoint --------------------------------------------------------------


def open_source(source: str, sentences: list, whisper: FrozenWhisper) -> Flow | None:
    """A checkpoint that can say the sentences, and is understood by the Whisper; None: espeak-ng,
    if it can say them. Else BadInput, before the work."""
    if source == "espeak":
        return check_espeak(sentences)
    checkpoint = train.load_checkpoint(Path(source))
    learned = checkpoint["origin"]["languages"]
    if unlearned := {s.language for s in sentences} - {*learned}:
        raise BadInput(f"{source} never learned {', '.join(sorted(unlearned))}; give --data in "
                       + ", ".join(learned))
    flow = load_flow(checkpoint, whisper.device)
    critic = flow.critic
    is_heard = isinstance(critic, Ear)  # and by any Whisper with as many bands
    same, other = ((critic.dims.n_mels, whisper.dims.n_mels) if is_heard else
                   (critic.fingerprint, whisper.fingerprint))
    if same != other:
        raise BadInput(f"{source} was trained with {critic.name}, whose "
                       f"{'bands' if is_heard else 'features'} are not those of {whisper.name}")
    if long := [s.text for s in sentences if not fits(s, critic, flow.speed, flow.durations)]:
        raise BadInput(f"{long[0][:60]!r} is too long for {critic.name}, with which {source} was "
                       "trained; give shorter --data")
    return flow


def check_espeak(sentences: list) -> None:
    """Raises BadInput if espeak-ng cannot say them."""
    if voiceless := make_pocket.voiceless({s.language for s in sentences}):
        raise BadInput(f"espeak-ng cannot read {', '.join(voiceless)}; give --data in others")


def speak(flow: Flow | None, sentences: list, whisper: FrozenWhisper, work: Path,
          seed: int = 0, amount: float = 0.0) -> Speech:
    """A flow, or espeak-ng (None), says the sentences: features of this Whisper, or any spectra."""
    if flow is None:
        mels = espeak(sentences, make_pocket.VARIANTS, seed, whisper, work, amount)
        return Speech(sentences, encode(mels, whisper))
    rooms = amount * isinstance(flow.critic, Ear)  # features have no sound to change
    return generate(flow, sentences, Solver(seed=seed), rooms, whisper)
