"""Greedy CER of held-out sentences over a setting of the sampler, speed, judge or length.

    python experiments/sweep.py speed 0.5 1 2 3 --checkpoints out/ckpt.pt
    python experiments/sweep.py guidance 0 0.5 1 2 4 8 --checkpoints out/seed0/ckpt.pt
    python experiments/sweep.py steps 1 2 4 16
    python experiments/sweep.py judge pocket pocket/judge.pt    # who reads it
    python experiments/sweep.py seconds 0-3 3-6 6-10 10-30      # how long the sentences are

Several checkpoints, such as those of several seeds, give mean and standard deviation.
"""
import math
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import flow  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from experiments.student import greedy_cer, load_judge  # noqa: E402
from experiments.utterances import latents  # noqa: E402
from flow import Solver  # noqa: E402
from plumbing.devices import choose_device  # noqa: E402
from plumbing.errors import BadInput, guard  # noqa: E402
from plumbing.flags import Parser, file_path, positive  # noqa: E402
from text.durations import FRAMES_PER_SECOND, count_frames  # noqa: E402
from text.long import fits  # noqa: E402
from text.sources import split_of  # noqa: E402


def interval(text: str) -> tuple[int, int]:
    """"3-6" -> 3, 6 seconds."""
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"{text!r} is no interval of seconds, such as 3-6")
    return int(match[1]), int(match[2])


OF_TEXT = ("data", "max_lines", "speech", "speed", "whisper")  # flags that the sentences follow
KINDS = dict(speed=float, guidance=float, steps=int, method=str, judge=str, seconds=interval)


def sweep(checkpoint: dict, kind: str, values: list, n: int) -> list[tuple[float, int]]:
    """CER of up to n held-out sentences at each value, and how many; 4 Euler steps but for what is
    swept. The sentences are the same at all values, but for their seconds."""
    device, rates = choose_device("auto"), []
    spoken = sample.load_flow(checkpoint, device)
    whisper, durations = spoken.critic, spoken.durations
    readers = [load_judge(checkpoint, device, value) if kind == "judge" else whisper
               for value in values]
    slowest = min(values) if kind == "speed" else spoken.speed
    held_out = [s for s in split_of(checkpoint["config"], whisper)[1]
                if fits(s, whisper, slowest, durations)
                and all(s.language in reader.languages and reader.max_frames
                        >= count_frames(durations(s, slowest)) for reader in readers)]
    if not held_out:
        raise BadInput(f"no held-out sentence can be heard at all of {kind} {values}; give others")
    for value, reader in zip(values, readers):
        solver = Solver(**({kind: value} if kind in Solver._fields else {}))
        speed = value if kind == "speed" else spoken.speed
        low, high = value if kind == "seconds" else (0, math.inf)
        frames = [count_frames(durations(s, speed)) for s in held_out]
        sentences = data.per_language([s for s, x in zip(held_out, frames) if low <= x
                                       / FRAMES_PER_SECOND < high], n)
        if not sentences:
            raise BadInput(f"no held-out sentence lasts {low} to {high} seconds; give others")
        made = latents(spoken._replace(speed=speed), sentences, solver)
        features = (reader.features(*batch) for batch in made)
        rates.append((greedy_cer(reader, sentences, features), len(sentences)))
    return rates


def main(argv=None) -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS, help="what is swept")
    parser.add_argument("values", nargs="+", help="its values")
    parser.add_argument("--checkpoints", nargs="+", type=file_path, default=[Path("out/ckpt.pt")])
    parser.add_argument("--sentences", type=positive, default=100, help="of held-out text")
    args = parser.parse_args(argv)
    try:
        values = [KINDS[args.kind](value) for value in args.values]
        for value in values:  # those that the sampler does not know
            if args.kind == "steps":
                flow.schedule(value)
        if args.kind == "guidance" and not all(abs(value) <= 100 for value in values):
            raise ValueError("-100 to 100, 1 is off")
        if args.kind == "method" and not {*values} <= {*flow.ORDER}:
            raise ValueError(f"choose of {', '.join(flow.ORDER)}")
    except ValueError as error:
        raise BadInput(f"{args.kind} cannot be swept over {args.values}: {error}") from error
    checkpoints, cells = [train.load_checkpoint(path) for path in args.checkpoints], []
    if len({repr([c["config"][name] for name in OF_TEXT]) for c in checkpoints}) > 1:
        raise BadInput(f"the checkpoints differ in --{' or --'.join(OF_TEXT)}, and so in their "
                       "sentences; sweep them one by one")
    swept = [sweep(c, args.kind, values, args.sentences) for c in checkpoints]
    for results in zip(*swept):
        rates = [rate for rate, _ in results]
        spread = f" ± {statistics.stdev(rates):.2%}" if len(rates) > 1 else ""
        cells.append(f"{statistics.mean(rates):.2%}{spread}")
    numbers = [str(n) for _, n in swept[0]]
    print(f"| {args.kind} | {' | '.join(args.values)} |\n| ---{' | ---' * len(values)} |\n"
          f"| CER | {' | '.join(cells)} |\n| sentences | {' | '.join(numbers)} |")


if __name__ == "__main__":
    guard(main)
