"""Text -> features or sound, and what the frozen Whisper reads in them.

    python sample.py "The dog sleeps." --language en
    python sample.py --text_file sentences.tsv --steps 4 --seed 1 --out features.npz
    python sample.py --text_file million.tsv --out FOLDER --best_of 4       # of any size, in shards
    echo "El perro duerme." | python sample.py --language es
    python sample.py "The dog sleeps." --wav dog.wav        # of a checkpoint of --latent mel
"""
from plumbing.errors import BadInput, guard  # first, for Ctrl-C
import argparse
import os
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

import flow
from data import Sentence, make_batch
from model import DiT, DiTConfig
from plumbing.devices import choose_device
from plumbing.files import make_folder
from plumbing.flags import Parser, file_path
from speech import dataset
from speech.align import durations_by
from speech.sound import another_voice, pace, write_wav
from text.error_rates import error_rates
from text.long import join, split_long
from text.report import show_round_trip
from text.sources import note_unheard, print_notes, read_texts
from train import LATENTS, generate, load_checkpoint, round_trips
from whisper_decoder import FrozenWhisper


class Flow(NamedTuple):
    """A checkpoint, ready to sample."""

    model: DiT  # of the averaged weights
    critic: FrozenWhisper
    durations: Callable  # (sentence, speed) -> frames of its characters (S,)
    speed: float  # that it was trained at


def load_flow(checkpoint: dict, device: torch.device, whisper: str | None = None) -> Flow:
    """What `train.load_checkpoint` loads -> a Flow; BadInput if its Whisper has changed.

    whisper: where the file of this Whisper is now.
    """
    config = checkpoint["config"]
    critic = LATENTS[config["latent"]](whisper or config["whisper"], device)
    if checkpoint["origin"]["whisper"] != critic.fingerprint:
        raise BadInput(f"{critic.name} is not the Whisper that the checkpoint was trained with; "
                       "give that as --whisper FILE.pt, or train again")
    model = DiT(DiTConfig(**checkpoint["model_config"])).to(device).eval()
    model.load_state_dict(checkpoint["ema"])
    return Flow(model, critic, durations_by(checkpoint["rhythm"]), config["speed"])


def cut(text: Sentence, durations: Callable, whisper, args) -> list[tuple[Sentence, np.ndarray]]:
    """A text -> parts that fit the decoder, each with its durations (S,) at the flags' pace."""
    speed = pace(text, args.speed, args.seed, args.rooms)
    return [(part, durations(part, speed)) for part in split_long(text, whisper, speed, durations)]


def show_forming(model, whisper, sentence: Sentence, durations: np.ndarray, solver) -> None:
    """Print what is read at every step of the ODE, from x0 to x1, before --rooms changes it."""
    batch = make_batch([sentence], whisper, [durations]).to(whisper)
    for t, x in zip(flow.schedule(solver.steps), generate(model, whisper, batch, solver)):
        features = whisper.features(x, batch.cond["frames"])
        read = whisper.transcribe(features, [sentence.language])[0]
        print(f"  t = {t:.2f}     {read.text[:70]}")


def parse_args(argv=None) -> argparse.Namespace:
    parser = Parser(__doc__.splitlines()[0], "give texts last, after -- if one begins with -; ")
    add = parser.add_argument
    add("text", nargs="*", help="texts; none: from --text_file or standard input")
    add("--language", help="of the texts (default: en, or as a .tsv says)")
    add("--text_file", action="append", default=[], help="FILE or URL of .txt or .tsv; equal lines "
        "are read once, except for --out FOLDER")
    add("--ckpt", type=file_path, default=Path("out/ckpt.pt"), help="of train.py")
    add("--whisper", type=os.path.expanduser, help="where the file of its Whisper is now")
    add("--steps", type=int, help="steps of the ODE solver (default: %(default)s)")
    add("--method", choices=list(flow.ORDER), help="solver (default: %(default)s)")
    add("--guidance", type=float, help="1 is off (default: %(default)s)")
    add("--speed", type=float, help="1 is natural, 2 twice as fast (default: as it was trained)")
    add("--seed", type=int, help="of the noise (default: %(default)s)")
    add("--rooms", type=float, default=0.0, help="up to 1: other voices, rooms, paces (mel only)")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    dataset.add_flags(add)
    add("--wav", type=file_path, help="write the sound of all texts here: FILE.wav")
    parser.set_defaults(**flow.Solver()._asdict())
    args = parser.parse_args(argv)
    if args.text and args.text_file:
        raise BadInput(f"texts and --text_file were given, such as {args.text[0][:40]!r}; give one "
                       "of them, and each file its --text_file")
    args.solver = flow.Solver(*(getattr(args, name) for name in flow.Solver._fields))
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    device, checkpoint = choose_device(args.device), load_checkpoint(args.ckpt)
    dataset.check(args, checkpoint["config"]["latent"])
    model, whisper, durations, speed = load_flow(checkpoint, device, args.whisper)
    args.speed = speed if args.speed is None else args.speed
    change = partial(another_voice, ear=whisper, seed=args.seed, amount=args.rooms)
    cut_text = partial(cut, durations=durations, whisper=whisper, args=args)
    if dataset.is_set(args.out):
        make = partial(round_trips, model, whisper, change=change)
        return print(dataset.write_dataset(args, checkpoint, whisper, cut_text, make))
    texts, notes = read_texts(args.text, args.text_file, args.language, whisper)
    for file in filter(None, [args.wav, args.out]):  # a bad folder fails now, not later
        make_folder(file.parent)
    unknown = {t.language for t in texts} - {*checkpoint["origin"]["languages"]}
    notes += [f"{args.ckpt} was not trained in {code!r}" for code in sorted(unknown)]
    print_notes(notes + note_unheard(texts, whisper))
    parts = [*map(cut_text, texts)]
    trips = round_trips(model, whisper, *zip(*chain(*parts)), args.solver, change)
    pieces = [trip._replace(features=trip.features.cpu() if args.out else None,
                            x1=trip.x1 if args.wav else trip.x1[:, :0].clone())  # keeps its length
              for trip in trips]
    if args.out:
        dataset.write_npz(args.out, pieces, np.repeat(range(len(texts)), [*map(len, parts)]))
    hypotheses, remaining = [], iter(pieces)
    for i, text in enumerate(texts):
        group = list(islice(remaining, len(parts[i])))
        hypotheses.append(join(text.text, [piece.sentence.text for piece in group],
                               [piece.read.text for piece in group]))
        show_round_trip(text, hypotheses[-1], group, args.solver)
        if i == 0 and not args.text_file:
            print(f"forming      {group[0].sentence.text[:70]}")
            show_forming(model, whisper, *parts[0][0], args.solver)
    if args.wav:
        write_wav(args.wav, whisper, [piece.x1.to(device) for piece in pieces])
    cer, wer, exact = error_rates(texts, hypotheses)
    print(f"{len(texts)} texts: CER {cer:.2%}, WER {wer:.2%}, letter by letter {exact:.1%}",
          *(f"wrote {to}: {len(texts)} texts" for to in (args.wav, args.out) if to), sep="\n")


if __name__ == "__main__":
    guard(main)
