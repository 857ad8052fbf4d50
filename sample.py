"""Text in, sound-token features and what the frozen Whisper reads in them out.

    python sample.py "The dog sleeps." --language en
    python sample.py --text_file sentences.tsv --steps 4 --seed 1 --out features.npz
    echo "El perro duerme." | python sample.py --language es
"""
import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor
from whisper.decoding import DecodingResult

import flow
from data import (
    FRAMES_PER_SECOND, Batch, Sentence, make_batch, noise, read_file, read_line, split_all,
    unheard_words,
)
from model import DiT, DiTConfig
from whisper_decoder import (
    LATENTS, BadInput, ErrorRates, FrozenWhisper, choose_device, error_rates, first_line,
)


class Settings(NamedTuple):
    """How to solve the ODE (see flow.py), and how fast the speech is."""

    steps: int = 4
    method: str = "euler"
    guidance: float = 1.0
    sway: float = 0.0
    seed: int = 0
    speed: float = 1.0


def load_checkpoint(path: Path) -> dict:
    """What train.py saved; BadInput if it is missing or something else."""
    if not path.is_file():
        raise BadInput(f"no checkpoint {path}; `python train.py` makes one")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["model_config"], checkpoint["ema"], checkpoint["config"]["latent"]
        return checkpoint
    except Exception as error:
        raise BadInput(f"{path} is not a checkpoint of train.py, or of an older one: "
                       f"{first_line(error)}") from error


def load_whisper_of(checkpoint: dict, device: torch.device) -> FrozenWhisper:
    """The frozen Whisper with which a checkpoint was trained."""
    config = checkpoint["config"]
    return LATENTS[config["latent"]](config["whisper"], device)


def load_model(checkpoint: dict, device: torch.device) -> DiT:
    """The averaged weights of a checkpoint as a network, ready to sample."""
    model = DiT(DiTConfig(**checkpoint["model_config"])).to(device).eval()
    model.load_state_dict(checkpoint["ema"])
    return model


@torch.no_grad()
def generate(model: DiT, whisper: FrozenWhisper, batch: Batch, settings: Settings) -> Tensor:
    """A batch of text -> all states of the latents, noise first, (steps + 1, B, T, C)."""
    velocity = flow.model_velocity(model, batch.cond, settings.guidance)
    x0 = noise(batch, whisper.channels, settings.seed)
    return flow.sample(velocity, x0, settings.steps, settings.method, settings.sway, True)


class RoundTrip(NamedTuple):
    features: np.ndarray  # (N, n_audio_ctx, C) float32
    frames: np.ndarray  # (N,)
    read: list[DecodingResult]


def round_trip(model: DiT, whisper: FrozenWhisper, sentences: Sequence[Sentence],
               settings: Settings, batch_size: int = 50) -> RoundTrip:
    """Sentences -> features, and the text that the frozen decoder reads in them."""
    features, frames, read = [], [], []
    for start in range(0, len(sentences), batch_size):
        batch = make_batch(sentences[start : start + batch_size], whisper, settings.speed)
        x1 = generate(model, whisper, batch, settings)[-1]
        seen = whisper.features(x1, batch.cond["frames"])
        read += whisper.transcribe(seen, [s.language for s in batch.sentences])
        features.append(seen.cpu())
        frames.append(batch.cond["frames"].cpu())
    return RoundTrip(torch.cat(features).numpy(), torch.cat(frames).numpy(), read)


def rates(sentences: Sequence[Sentence], read: Sequence[DecodingResult]) -> ErrorRates:
    """Error rates of what the decoder read."""
    return error_rates([s.text for s in sentences], [r.text for r in read],
                       [s.language for s in sentences])


def show(sentence: Sentence, frames: int, read: DecodingResult, settings: Settings) -> None:
    """Print one round trip."""
    cer, wer, _ = rates([sentence], [read])
    seconds = frames / FRAMES_PER_SECOND
    nfe = flow.nfe(settings.steps, settings.method, settings.guidance)
    print(f"text         {sentence.text}  [{sentence.language}]")
    print(f"read back    {read.text}")
    print(f"errors       CER {cer:.1%}, WER {wer:.1%}")
    print(f"confidence   mean log-probability {read.avg_logprob:.2f}, no speech "
          f"{read.no_speech_prob:.2f}, compression {read.compression_ratio:.2f}")
    print(f"flow         {seconds:.2f} s, {frames} frames, {settings.steps} {settings.method} "
          f"steps, NFE {nfe}, seed {settings.seed}")


def show_forming(model, whisper, sentence: Sentence, settings: Settings) -> None:
    """Print what the decoder reads at every step of the ODE, from noise to speech."""
    batch = make_batch([sentence], whisper, settings.speed)
    times = flow.schedule(settings.steps, settings.sway).tolist()
    for t, x in zip(times, generate(model, whisper, batch, settings)):
        read = whisper.transcribe(whisper.features(x, batch.cond["frames"]), [sentence.language])[0]
        print(f"  t = {t:.2f}     {read.text[:70]}")


def save_features(path: Path, trip: RoundTrip, sentences: Sequence[Sentence]) -> None:
    """Write the data set, whole or not at all."""
    temporary = path.with_suffix(".tmp.npz")
    language, text = map(np.array, zip(*sentences))
    hypothesis = np.array([read.text for read in trip.read])
    np.savez_compressed(temporary, features=trip.features, frames=trip.frames, text=text,
                        language=language, hypothesis=hypothesis)
    os.replace(temporary, path)


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("text", nargs="*", help="texts; none: from --text_file or standard input")
    parser.add_argument("--language", default="en", help="of the texts (default: en)")
    parser.add_argument("--text_file", type=Path, help="FILE.tsv (language<TAB>text) or FILE.txt")
    parser.add_argument("--ckpt", type=Path, default=Path("out/ckpt.pt"), help="of train.py")
    parser.add_argument("--steps", type=int, default=4, help="steps of the ODE solver (default: 4)")
    parser.add_argument("--method", choices=list(flow.ORDER), default="euler", help="solver")
    parser.add_argument("--guidance", type=float, default=1.0, help="1 is off (default: 1)")
    parser.add_argument("--sway", type=float, default=0.0, help="-1: small steps first")
    parser.add_argument("--speed", type=float, help="pace (default: as in training)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--out", type=Path, help="write the features here, as .npz")
    return parser.parse_args(argv)


def read_texts(args, whisper: FrozenWhisper) -> list[Sentence]:
    """Texts of the command line, a file or standard input, in pieces that fit the decoder."""
    problems = []
    if args.text_file:
        sentences, problems = read_file(args.text_file, args.language, whisper)
    else:
        lines = args.text or sys.stdin.read().splitlines()
        sentences = [read_line(line, args.language, whisper) for line in lines if line.strip()]
    if not sentences:
        raise BadInput("no text; give one, or --text_file, or lines on standard input")
    pieces, more = split_all(sentences, whisper, args.speed)
    for problem in problems + more:
        print(f"note: {problem}", file=sys.stderr)
    return pieces


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
    args.speed = checkpoint["config"]["speed"] if args.speed is None else args.speed
    settings = Settings(**{name: getattr(args, name) for name in Settings._fields})
    whisper = load_whisper_of(checkpoint, device)
    model = load_model(checkpoint, device)
    sentences = read_texts(args, whisper)
    trip = round_trip(model, whisper, sentences, settings)
    for sentence, frames, read in zip(sentences, trip.frames, trip.read):
        show(sentence, int(frames), read, settings)
        if whisper.name == "pocket" and (unheard := unheard_words(sentence)):
            print(f"note         the pocket decoder has never heard: {', '.join(unheard)}")
        if sentence is sentences[0] and not args.text_file:
            show_forming(model, whisper, sentence, settings)
    cer, wer, exact = rates(sentences, trip.read)
    print(f"{len(sentences)} texts: CER {cer:.2%}, WER {wer:.2%}, letter by letter {exact:.1%}")
    if args.out:
        save_features(args.out, trip, sentences)
        print(f"wrote {args.out}: features {trip.features.shape}")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"sample.py: {error}")
    except KeyboardInterrupt:
        sys.exit("sample.py: stopped; nothing was written")
