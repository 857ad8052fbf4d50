"""The round trip at half to twice the natural pace: greedy CER of held-out sentences, 4 steps.

    python experiments/speeds.py out/seed0/ckpt.pt out/seed1/ckpt.pt out/seed2/ckpt.pt
"""
import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402
from whisper_decoder import choose_device  # noqa: E402

SPEEDS = (0.5, 0.6, 0.8, 1.0, 1.25, 1.6, 2.0)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="of train.py, one for each seed")
    parser.add_argument("--sentences", type=int, default=250, help="of held-out text")
    args, found = parser.parse_args(argv), {speed: [] for speed in SPEEDS}
    for path in args.checkpoints:
        checkpoint = train.load_checkpoint(path)
        whisper = train.load_critic(checkpoint, choose_device("auto"))
        model = train.load_model(checkpoint, whisper.device)
        durations = train.durations_by(checkpoint["rhythm"])
        shares, _ = data.load_data(checkpoint["config"]["data"], whisper, max(SPEEDS))
        sentences = train.per_language(data.split(list(shares))[1], args.sentences)
        sentences = [s for s in sentences if data.fits(s, whisper, min(SPEEDS))]
        for speed in SPEEDS:
            read = train.transcribe_samples(model, whisper, sentences,
                                            [durations(s, speed) for s in sentences])
            found[speed].append(train.rates(sentences, read).cer)
    print(f"{len(sentences)} held-out sentences that fit at {min(SPEEDS)}\n\n"
          f"| speed | {' | '.join(map(str, SPEEDS))} |\n| ---{' | ---' * len(SPEEDS)} |")
    cells = []
    for rates in found.values():
        spread = f" ± {statistics.stdev(rates):.2%}" if len(rates) > 1 else ""
        cells.append(f"{statistics.mean(rates):.2%}{spread}")
    print(f"| CER, 4 steps | {' | '.join(cells)} |")


if __name__ == "__main__":
    train.guard(main)
