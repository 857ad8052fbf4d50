"""Text in; sound-token features or a .wav file, and what the frozen Whisper reads in them, out.

    python sample.py "The dog sleeps." --language en
    python sample.py --text_file sentences.tsv --steps 4 --seed 1 --out features.npz
    echo "El perro duerme." | python sample.py --language es
    python sample.py "The dog sleeps." --wav dog.wav        # of a checkpoint of --latent mel
"""
import argparse
import math
import sys
import wave
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.audio import HOP_LENGTH, N_FFT, SAMPLE_RATE, mel_filters
from whisper.decoding import DecodingResult

import flow
from data import (
    FRAMES_PER_SECOND, Batch, Sentence, kind, letter_lengths, make_batch, noise, read_file,
    read_line, sentence_generator, split_long, to_text, unheard_words, writing,
)
from model import DiT, DiTConfig
from whisper_decoder import (
    VOICE, BadInput, Ear, ErrorRates, FrozenWhisper, Room, choose_device, error_rates, first_line,
)

LATENTS = dict(features=FrozenWhisper, mel=Ear)  # --latent of train.py -> what reads it


class Settings(NamedTuple):
    """How to solve the ODE (see flow.py), and how different the voices of an Ear may be."""

    steps: int = 4
    method: str = "euler"
    guidance: float = 1.0
    sway: float = 0.0
    seed: int = 0
    rooms: float = 0.0  # 0: as the flow speaks; 1: voices as different as in training


def load_checkpoint(path: Path) -> dict:
    """What train.py saved; BadInput if it is missing or something else."""
    if not path.is_file():
        raise BadInput(f"no checkpoint {path}; `python train.py` makes one")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["model_config"], checkpoint["ema"], checkpoint["prior"]
        checkpoint["config"]["latent"], checkpoint["config"]["whisper"]
        return checkpoint
    except Exception as error:
        raise BadInput(f"{path} is not a checkpoint of train.py, or of an older one: "
                       f"{first_line(error)}") from error


def load_model(checkpoint: dict, device: torch.device) -> DiT:
    """The averaged weights of a checkpoint as a network, ready to sample."""
    model = DiT(DiTConfig(**checkpoint["model_config"]), checkpoint["prior"]).to(device).eval()
    model.load_state_dict(checkpoint["ema"])
    return model


def load_critic(checkpoint: dict, device: torch.device, name: str = "") -> FrozenWhisper:
    """The Whisper that a checkpoint was trained with; or another, by name, to read x1 only.

    The flow itself needs the first, whose embeddings are its condition.
    """
    name = name or checkpoint["config"]["whisper"]
    whisper = LATENTS[checkpoint["config"]["latent"]](name, device)
    if (made := checkpoint["model_config"]["channels"]) != whisper.channels:
        raise BadInput(f"the checkpoint makes {made} channels a frame and {name} reads "
                       f"{whisper.channels}; give a Whisper of the same kind")
    return whisper


def pace(sentence: Sentence, seed: int, rooms: float) -> float:
    """How much faster a seed says a sentence in rooms: up to a quarter, or as much slower."""
    share = torch.rand((), generator=sentence_generator(sentence, seed)).item()
    return 1.25 ** (rooms * (2 * share - 1))


@torch.no_grad()
def generate(model: DiT, whisper: FrozenWhisper, batch: Batch, settings: Settings) -> Tensor:
    """A batch of text -> all states of the latents, noise first, (steps + 1, B, T, C)."""
    velocity = flow.model_velocity(model, batch.cond, settings.guidance)
    x0 = noise(batch, whisper.channels, settings.seed)
    states = flow.sample(velocity, x0, settings.steps, settings.method, settings.sway, True)
    if settings.rooms:
        rooms = [Room(settings.rooms, sentence_generator(s, settings.seed, whisper.device), VOICE)
                 for s in batch.sentences]
        states[-1] = whisper.move(states[-1], batch.cond["frames"], rooms)
    return states


class RoundTrip(NamedTuple):
    features: np.ndarray  # (N, n_audio_ctx, C) float32
    frames: np.ndarray  # (N,)
    read: list[DecodingResult]
    x1: list[Tensor]  # (T, C) each


def round_trip(model: DiT, whisper: FrozenWhisper, sentences: Sequence[Sentence],
               settings: Settings, lasting: Sequence[np.ndarray],
               batch_size: int = 50) -> RoundTrip:
    """Sentences, frames that their letters last -> features, and what the decoder reads there."""
    features, frames, read, latents = [], [], [], []
    for start in range(0, len(sentences), batch_size):
        part = slice(start, start + batch_size)
        batch = make_batch(sentences[part], whisper, lasting[part], prior=model.prior)
        x1 = generate(model, whisper, batch, settings)[-1]
        seen = whisper.features(x1, batch.cond["frames"])
        read += whisper.transcribe(seen, [s.language for s in batch.sentences])
        features.append(seen.cpu())
        frames.append(batch.cond["frames"].cpu())
        latents += [x[:n] for x, n in zip(x1.cpu(), frames[-1].tolist())]
    return RoundTrip(torch.cat(features).numpy(), torch.cat(frames).numpy(), read, latents)


def rates(sentences: Sequence[Sentence], read: Sequence[DecodingResult]) -> ErrorRates:
    """Error rates of what the decoder read."""
    return error_rates([s.text for s in sentences], [r.text for r in read],
                       [s.language for s in sentences])


def join(whole: str, pieces: Sequence[str], read: Sequence[str]) -> str:
    """What was read in the pieces of a text, joined where they were cut: in or between words."""
    joined, end = "", 0
    for piece, text in zip(pieces, read):
        start = whole.index(piece, end)
        joined += (" " if " " in whole[end:start] else "") + text
        end = start + len(piece)
    return joined


def show(text: Sentence, found: str, frames: np.ndarray, read: Sequence[DecodingResult],
         settings: Settings) -> None:
    """Print the round trip of a text: what was found, and lengths and scores of its pieces."""
    cer, wer, _ = error_rates([text.text], [found], [text.language])
    nfe = flow.nfe(settings.steps, settings.method, settings.guidance)
    pieces = f" in {len(read)} pieces" if len(read) > 1 else ""
    print(f"text         {text.text}  [{text.language}]")
    print(f"read back    {found}")
    print(f"errors       CER {cer:.1%}, WER {wer:.1%}")
    print(f"confidence   mean log-probability {np.mean([r.avg_logprob for r in read]):.2f}, no "
          f"speech {max(r.no_speech_prob for r in read):.2f}, compression "
          f"{max(r.compression_ratio for r in read):.2f}")
    print(f"flow         {sum(frames) / FRAMES_PER_SECOND:.2f} s, {sum(frames)} frames{pieces}, "
          f"{settings.steps} {settings.method} steps, NFE {nfe}, seed {settings.seed}")


def show_forming(model, whisper, sentence: Sentence, lasting: np.ndarray,
                 settings: Settings) -> None:
    """Print what the decoder reads at every step of the ODE, from x0 to x1."""
    batch = make_batch([sentence], whisper, [lasting], prior=model.prior)
    times = flow.schedule(settings.steps, settings.sway).tolist()
    for t, x in zip(times, generate(model, whisper, batch, settings)):
        read = whisper.transcribe(whisper.features(x, batch.cond["frames"]), [sentence.language])[0]
        print(f"  t = {t:.2f}     {read.text[:70]}")


def save_features(path: Path, trip: RoundTrip, pieces: Sequence[Sentence],
                  text_of: Sequence[int]) -> None:
    """Write the data set, whole or not at all; text_of: which text each piece is a part of."""
    language, text = map(np.array, zip(*pieces))
    hypothesis = np.array([read.text for read in trip.read])
    with writing(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, features=trip.features, frames=trip.frames, text=text,
                            language=language, hypothesis=hypothesis, text_of=np.array(text_of))


def griffin_lim(mel: Tensor, rounds: int = 60) -> Tensor:
    """Log-mel (n_mels, n) -> 16 kHz samples (160 n,) that sound like it.

    First the power of every frequency, by non-negative multiplicative steps (Lee and Seung 1999),
    then phases that fit each other (Griffin and Lim 1984; with the momentum of Perraudin et al.
    2013). The phases begin at random, always the same.
    """
    filters = mel_filters(mel.device, len(mel))  # (n_mels, N_FFT / 2 + 1)
    target = 10 ** (4 * F.pad(mel.float(), (0, 1), mode="replicate") - 4)  # undoes Whisper's scale
    power = torch.ones(filters.shape[1], target.shape[1], device=mel.device)
    for _ in range(rounds):
        ratio = target / (filters @ power).clamp(min=1e-10)
        power = power * (filters.T @ ratio) / filters.sum(0)[:, None].clamp(min=1e-10)
    magnitude, window = power.sqrt(), torch.hann_window(N_FFT, device=mel.device)
    start = torch.rand(power.shape, generator=torch.Generator().manual_seed(0)).to(mel.device)
    spectrum, before = torch.polar(torch.ones_like(start), 2 * math.pi * start), 0
    for _ in range(rounds):
        unit = spectrum / spectrum.abs().clamp(min=1e-10)
        samples = torch.istft(magnitude * unit, N_FFT, HOP_LENGTH, window=window)
        fitting = torch.stft(samples, N_FFT, HOP_LENGTH, window=window, return_complex=True)
        spectrum, before = fitting + 0.99 * (fitting - before), fitting
    return samples


def write_wav(path: Path, mel: Tensor) -> None:
    """Log-mel (n_mels, n) -> 16 kHz, 16 bit, one channel; whole or not at all."""
    samples = griffin_lim(mel)
    samples = 32767 * samples / samples.abs().max().clamp(min=1)  # nothing is cut off
    with writing(path) as part, wave.open(str(part), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.round().short().cpu().numpy().tobytes())


def check_sound(args, checkpoint: dict, n_texts: int) -> None:
    """BadInput if --rooms or --wav cannot be used."""
    if not 0 <= args.rooms <= 1:
        raise BadInput(f"--rooms {args.rooms} cannot be used; at least 0, at most 1")
    if (args.wav or args.rooms) and checkpoint["config"]["latent"] != "mel":
        raise BadInput(f"{args.ckpt} makes features, which have no sound, so --wav and --rooms "
                       "cannot be used; `python train.py --latent mel` makes spectrograms")
    if not args.wav:
        return
    is_file = args.wav.suffix == ".wav"
    if is_file and n_texts > 1:
        raise BadInput(f"{n_texts} texts cannot be one {args.wav}; give --wav a folder")
    if not is_file and args.wav.suffix and not args.wav.is_dir():
        raise BadInput(f"--wav {args.wav} cannot be used; give FILE.wav, or a folder")
    try:
        (args.wav.parent if is_file else args.wav).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot write --wav {args.wav}: {error.strerror}; name another place"
                       ) from error


def save_sound(args, whisper: Ear, trip: RoundTrip, text_of: np.ndarray) -> None:
    """--wav: a file, or where there are several texts a folder with a file of each."""
    for i in range(text_of.max() + 1):
        pieces = [trip.x1[j] for j in np.flatnonzero(text_of == i)]
        path = args.wav if args.wav.suffix == ".wav" else args.wav / f"{i:04d}.wav"
        write_wav(path, torch.cat([whisper.mel(x) for x in pieces], 1))
    print(f"wrote {args.wav}: {text_of.max() + 1} texts")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("text", nargs="*", help="texts; none: from --text_file or standard input")
    parser.add_argument("--language", default="en", help="of the texts (default: en)")
    parser.add_argument("--text_file", type=Path, help="FILE.txt, or FILE.tsv (language<TAB>text); "
                        "equal lines are read once")
    parser.add_argument("--ckpt", type=Path, default=Path("out/ckpt.pt"), help="of train.py")
    parser.add_argument("--steps", type=int, help="steps of the ODE solver (default: 4)")
    parser.add_argument("--method", choices=list(flow.ORDER), help="solver (default: euler)")
    parser.add_argument("--guidance", type=float, help="1 is off (default: 1)")
    parser.add_argument("--sway", type=float, help="-1: small steps first (default: 0)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--speed", type=float, default=1.0, help="1 is natural, 2 twice as fast")
    length.add_argument("--seconds", type=float, help="that each text lasts, in place of --speed")
    parser.add_argument("--seed", type=int, help="of the noise (default: 0)")
    parser.add_argument("--rooms", type=float, help="of spectrograms: 1: another voice for every "
                        "seed and text; 0.5: less different (default: 0, as the flow speaks)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--out", type=Path, help="write the features here, as .npz")
    parser.add_argument("--wav", type=Path, help="write what it sounds like here: FILE.wav, or a "
                        "folder for a file of each text")
    parser.set_defaults(**Settings()._asdict())
    return parser.parse_args(argv)


def read_texts(args, whisper: FrozenWhisper) -> list[Sentence]:
    """Texts of the command line, a file or standard input."""
    problems = []
    if args.text_file:
        language = None if kind(args.text_file) == ".tsv" else args.language
        weights, problems = read_file(args.text_file, language, whisper)
        sentences = list(weights)
    else:
        lines = args.text or [to_text(line, Path("standard input"), f"line {n}")
                              for n, line in enumerate(sys.stdin.buffer, 1)]
        sentences = [read_line(line, args.language, whisper) for line in lines if line.strip()]
    if not sentences:
        raise BadInput("no text; give one, or --text_file, or lines on standard input")
    for problem in problems:
        print(f"note: {problem}", file=sys.stderr)
    return sentences


def cut(text: Sentence, args, whisper: FrozenWhisper,
        prior: dict) -> list[tuple[Sentence, np.ndarray]]:
    """A text -> pieces that fit the decoder, and how many frames each of their letters lasts."""
    speed = min(max(args.speed * pace(text, args.seed, args.rooms), 0.1), 10)
    if args.seconds is not None:
        natural = letter_lengths(text, 1.0, prior).sum() / FRAMES_PER_SECOND
        if not natural / 10 <= args.seconds <= natural * 10:
            raise BadInput(f"--seconds {args.seconds} cannot be used for {text.text[:60]!r}; "
                           f"{natural:.2f} are natural, a tenth to ten times of that is possible")
        speed = min(max(natural / args.seconds, 0.1), 10)
    return [(piece, letter_lengths(piece, speed, prior))
            for piece in split_long(text, whisper, speed, prior)]


def main(argv=None) -> None:
    args = parse_args(argv)
    if args.out and (args.out.suffix != ".npz" or not args.out.parent.is_dir()):
        raise BadInput(f"--out {args.out} must end in .npz and lie in a folder that exists")
    if args.text and args.text_file:
        raise BadInput("texts and --text_file were given; give one of them")
    if not 0 <= args.seed < 2**31:
        raise BadInput(f"--seed {args.seed} cannot be used; at least 0 and below {2**31}")
    try:
        flow.schedule(args.steps, args.sway)
    except ValueError as error:
        raise BadInput(f"--{error}") from error
    device = choose_device(args.device)
    checkpoint = load_checkpoint(args.ckpt)
    settings = Settings(**{name: getattr(args, name) for name in Settings._fields})
    whisper = load_critic(checkpoint, device)
    model, texts = load_model(checkpoint, device), read_texts(args, whisper)
    check_sound(args, checkpoint, len(texts))
    cuts = [cut(text, args, whisper, model.prior) for text in texts]
    pieces, lasting = zip(*(pair for pairs in cuts for pair in pairs))
    trip = round_trip(model, whisper, pieces, settings, lasting)
    text_of = np.repeat(np.arange(len(texts)), [len(pairs) for pairs in cuts])
    found = []
    for i, text in enumerate(texts):
        where = np.flatnonzero(text_of == i)
        read = [trip.read[j] for j in where]
        found.append(join(text.text, [pieces[j].text for j in where], [r.text for r in read]))
        show(text, found[-1], trip.frames[where], read, settings)
        if whisper.name == "pocket" and (unheard := unheard_words(text)):
            print(f"note         the pocket decoder has never heard: {', '.join(unheard)}")
        if i == 0 and not args.text_file:
            show_forming(model, whisper, *cuts[0][0], settings)
    said, languages = [text.text for text in texts], [text.language for text in texts]
    cer, wer, exact = error_rates(said, found, languages)
    print(f"{len(texts)} texts: CER {cer:.2%}, WER {wer:.2%}, letter by letter {exact:.1%}")
    if args.wav:
        save_sound(args, whisper, trip, text_of)
    if args.out:
        save_features(args.out, trip, pieces, text_of)
        print(f"wrote {args.out}: features {trip.features.shape}")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"sample.py: {error}")
    except KeyboardInterrupt:
        sys.exit("sample.py: stopped; nothing was written")
