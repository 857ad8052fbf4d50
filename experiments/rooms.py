"""Which transformation of a room matters? Spectrograms by gradient alone, read by another Whisper.

    python experiments/rooms.py                                  # pocket, judged by pocket/judge.pt
    python experiments/rooms.py --whisper tiny.en --judge base --data en=FILE.txt --sentences 8

No network: x1 of some held-out sentences is a parameter, and Adam lowers the cross-entropy of the
first Whisper, in rooms of which one transformation is left out, or is the only one (a random delay
of up to a quarter of a second stays, in "no room" too). Then both Whispers read the spectrograms
greedily, without rooms. The second has no part in what they are.
"""
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from data import per_language  # noqa: E402
from experiments.student import greedy_cer  # noqa: E402
from model import bounded  # noqa: E402
from plumbing.devices import choose_device  # noqa: E402
from plumbing.errors import BadInput, guard  # noqa: E402
from plumbing.flags import Parser, positive  # noqa: E402
from plumbing.weights import POCKET  # noqa: E402
from speech.ear import ROOM, Ear, Room  # noqa: E402
from text.durations import FRAMES_PER_SECOND, char_durations, n_frames  # noqa: E402
from text.sources import load_sentences  # noqa: E402

RATE = 0.1  # of Adam, on x1
LONGEST = 4.0  # seconds of a sentence
JUDGE = POCKET / "judge.pt"


def rows(names: list[str]) -> dict[str, dict[str, float]]:
    """Name of a row -> the strengths of its transformations."""
    none = dict.fromkeys(ROOM, 0.0)
    strengths = {"no room": none, "all": ROOM}
    strengths |= {f"without {name}": ROOM | {name: 0.0} for name in ROOM}
    strengths |= {f"{name} alone": none | {name: ROOM[name]} for name in ROOM}
    if unknown := [name for name in names if name not in strengths]:
        raise BadInput(f"no row {', '.join(unknown)}; there are {', '.join(strengths)}")
    return {name: strengths[name] for name in names or strengths}


def optimise(ear: Ear, batch: data.Batch, strength: dict, steps: int) -> Tensor:
    """x1 (B, T, C) that the ear reads in such rooms; they grow in the second third of the steps."""
    shape = (*batch.mask.shape, ear.channels)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(ear.device)
    optimizer = torch.optim.Adam([x.requires_grad_()], RATE)
    for step in tqdm(range(steps), leave=False):
        amount = min(1.0, max(0.01, 3 * step / steps - 1))
        room = Room(amount, data.generator(0, step, ear.device), strength)
        x1 = bounded(x, ear.bound)
        _, nll = ear.text_loss(x1, batch, room)
        loss = nll.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return bounded(x, ear.bound).detach()


def main(argv=None) -> dict[str, tuple[float, float]]:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help="such as: 'no room' all 'without noise'")
    parser.add_argument("--whisper", default="pocket", help="the critic")
    parser.add_argument("--judge", default=str(JUDGE), help="another Whisper")
    parser.add_argument("--data", nargs="+", default=["builtin"], help="as for train.py")
    parser.add_argument("--sentences", type=positive, default=25, help="of held-out text")
    parser.add_argument("--steps", type=positive, default=300, help="of Adam")
    args = parser.parse_args(argv)
    strengths, device = rows(args.rows), choose_device("auto")
    ear, judge = Ear(args.whisper, device), Ear(args.judge, device)
    if ear.channels != judge.channels:
        raise BadInput(f"{args.whisper} hears {ear.channels} bins and {args.judge} {judge.channels}"
                       "; give a judge that hears as many")
    held_out = data.split(load_sentences(args.data, ear))[1]
    longest = min(FRAMES_PER_SECOND * LONGEST, judge.max_frames)
    short = [s for s in held_out if n_frames(s) <= longest and s.language in judge.languages]
    if not short:
        raise BadInput(f"no held-out sentence lasts at most {LONGEST:g} seconds; give other --data")
    sentences, rates = per_language(short, args.sentences), {}
    batch = data.make_batch(sentences, ear, [char_durations(s) for s in sentences]).to(ear)
    print(f"| {len(sentences)} held-out sentences | {args.whisper} | {args.judge} |\n"
          "| --- | --- | --- |")
    for name, strength in strengths.items():
        x1 = optimise(ear, batch, strength, args.steps)
        rates[name] = tuple(greedy_cer(x, sentences, [x.features(x1, batch.cond["frames"])])
                            for x in (ear, judge))
        print(f"| {name} | {rates[name][0]:.1%} | {rates[name][1]:.1%} |", flush=True)
    return rates


if __name__ == "__main__":
    guard(main)
