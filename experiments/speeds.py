"""The round trip at half to twice the natural pace: greedy CER of held-out sentences, 4 steps.

    python experiments/speeds.py out/seed0/ckpt.pt out/seed1/ckpt.pt out/seed2/ckpt.pt
"""
import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from whisper_decoder import BadInput, FrozenWhisper, choose_device  # noqa: E402

SPEEDS = (0.5, 0.6, 0.8, 1.0, 1.25, 1.6, 2.0)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="of train.py, one for each seed")
    args = parser.parse_args(argv)
    found = {speed: [] for speed in SPEEDS}
    for path in args.checkpoints:
        checkpoint = sample.load_checkpoint(path)
        whisper = FrozenWhisper(checkpoint["config"]["whisper"], choose_device("auto"))
        model = sample.load_model(checkpoint, whisper.device)
        text = data.load(checkpoint["config"]["data"], whisper, max(SPEEDS),
                         prior=model.prior)
        sentences = train.balanced(data.split(list(text.weights))[1], 250)
        sentences = [s for s in sentences if data.fits(s, whisper, min(SPEEDS), model.prior)]
        for speed in SPEEDS:
            lasting = [data.letter_lengths(s, speed, model.prior) for s in sentences]
            read = sample.round_trip(model, whisper, sentences, sample.Settings(), lasting).read
            found[speed].append(sample.rates(sentences, read).cer)
    print(f"{len(sentences)} held-out sentences that fit at {min(SPEEDS)}\n\n"
          f"| speed | {' | '.join(map(str, SPEEDS))} |\n| ---{' | ---' * len(SPEEDS)} |")
    cells = []
    for rates in found.values():
        spread = f" ± {statistics.stdev(rates):.2%}" if len(rates) > 1 else ""
        cells.append(f"{statistics.mean(rates):.2%}{spread}")
    print(f"| CER, 4 steps | {' | '.join(cells)} |")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"speeds.py: {error}")
