"""train.py with several seeds: mean and standard deviation of every figure that it prints.

    python experiments/seeds.py 0 1 2
    python experiments/seeds.py 0 1 2 --steps 500      # other flags go to train.py
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from experiments.arms import names_and_flags  # noqa: E402
from whisper_decoder import BadInput  # noqa: E402


def main(argv):
    names, flags = names_and_flags(argv)
    seeds = [int(name) for name in names]
    if len(seeds) < 2:
        raise BadInput("give at least two seeds, such as 0 1 2")
    results = [
        train.main([*flags, "--seed", str(seed), "--out_dir", f"out/seed{seed}"]) for seed in seeds
    ]
    print("| figure | mean | standard deviation |\n| --- | --- | --- |")
    for name, first in results[0].items():
        if isinstance(first, float):
            values = [result[name] for result in results]
            print(f"| {name} | {statistics.mean(values):.4f} | {statistics.stdev(values):.4f} |")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (BadInput, ValueError) as error:
        sys.exit(f"seeds.py: {error}")
