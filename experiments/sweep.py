"""Greedy CER of held-out sentences over one setting of the sampler, or over the speed.

    python experiments/sweep.py speed 0.5 1 2 3 --checkpoints out/ckpt.pt
    python experiments/sweep.py guidance 0 0.5 1 2 4 8 --checkpoints out/seed0/ckpt.pt
    python experiments/sweep.py steps 1 2 4 16
    python experiments/sweep.py judge pocket pocket/judge.pt    # who reads it

Several checkpoints, such as those of several seeds, give mean and standard deviation.
"""
import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402
from flow import Solver  # noqa: E402
from plumbing.devices import choose_device  # noqa: E402
from plumbing.errors import BadInput, guard  # noqa: E402
from text.long import fits  # noqa: E402
from text.sources import load_data  # noqa: E402
from whisper_decoder import error_rates  # noqa: E402

KINDS = dict(speed=float, guidance=float, sway=float, steps=int, method=str, judge=str)


def sweep(checkpoint: dict, kind: str, values: list, n: int) -> list[float]:
    """CER of n held-out sentences at each value, 4 Euler steps but for what is swept."""
    device, durations = choose_device("auto"), train.durations_by(checkpoint["rhythm"])
    whisper, model = train.load_critic(checkpoint, device), train.load_model(checkpoint, device)
    shares, _ = load_data(checkpoint["config"]["data"], whisper)
    held_out, rates = data.per_language(data.split(list(shares))[1], n), []
    for value in values:
        reader = train.load_critic(checkpoint, device, value) if kind == "judge" else whisper
        solver = Solver(**({} if kind in ("speed", "judge") else {kind: value}))
        speed = value if kind == "speed" else 1.0
        sentences = [s for s in held_out if fits(s, whisper, speed, durations)]
        lengths = [durations(s, speed) for s in sentences]
        trips = train.round_trips(model, whisper, sentences, lengths, solver)
        x1, hypotheses = zip(*((trip.x1, trip.read.text) for trip in trips))
        if reader is not whisper:
            hypotheses = read(reader, sentences, x1)
        rates.append(error_rates(sentences, hypotheses).cer)
    return rates


def read(whisper, sentences: list, x1: list[torch.Tensor]) -> list[str]:
    """What a Whisper reads in x1, (T, C) each."""
    hypotheses = []
    for i in range(0, len(x1), 50):
        frames = torch.tensor([len(x) for x in x1[i : i + 50]], device=whisper.device)
        features = whisper.features(pad_sequence(x1[i : i + 50], True).to(whisper.device), frames)
        languages = [s.language for s in sentences[i : i + 50]]
        hypotheses += [result.text for result in whisper.transcribe(features, languages)]
    return hypotheses


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("kind", choices=KINDS, help="what is swept")
    parser.add_argument("values", nargs="+", help="its values")
    parser.add_argument("--checkpoints", nargs="+", type=Path, default=[Path("out/ckpt.pt")])
    parser.add_argument("--sentences", type=int, default=100, help="of held-out text")
    args = parser.parse_args(argv)
    try:
        values = [KINDS[args.kind](value) for value in args.values]
    except ValueError as error:
        raise BadInput(f"{args.kind} cannot be swept over {args.values}: {error}") from error
    checkpoints, cells = [train.load_checkpoint(path) for path in args.checkpoints], []
    for rates in zip(*(sweep(c, args.kind, values, args.sentences) for c in checkpoints)):
        spread = f" ± {statistics.stdev(rates):.2%}" if len(rates) > 1 else ""
        cells.append(f"{statistics.mean(rates):.2%}{spread}")
    print(f"| {args.kind} | {' | '.join(args.values)} |\n| ---{' | ---' * len(values)} |\n"
          f"| CER | {' | '.join(cells)} |")


if __name__ == "__main__":
    guard(main)
