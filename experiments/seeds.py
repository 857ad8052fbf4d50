"""train.py with several seeds: mean and standard deviation of every figure in result.txt.

    python experiments/seeds.py 0 1 2
    python experiments/seeds.py 0 1 2 --steps 500      # other flags go to train.py
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from plumbing.errors import BadInput, guard  # noqa: E402


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        return print(__doc__)
    n_seeds = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    seeds, flags = argv[:n_seeds], argv[n_seeds:]
    if len(seeds) < 2 or not all(map(str.isdecimal, seeds)):
        raise BadInput(f"{' '.join(seeds) or 'nothing'} cannot be used; give at least two seeds, "
                       "such as 0 1 2, and then the flags")
    if len({*map(int, seeds)}) < len(seeds) or {"--seed", "--out_dir"} & {
            flag.partition("=")[0] for flag in flags}:
        raise BadInput("each seed is given once, and its folder is out/seed0, out/seed1 ...; leave "
                       "out --seed, --out_dir and what is given twice")
    results = [train.main([*flags, "--seed", seed, "--out_dir", f"out/seed{seed}"])
               for seed in seeds]
    print("| figure | mean | standard deviation |\n| --- | --- | --- |")
    for name, first in results[0].items():
        if isinstance(first, float) and name != "peak_memory_gb":  # which never falls
            values = [result[name] for result in results]
            print(f"| {name} | {statistics.mean(values):.4f} | {statistics.stdev(values):.4f} |")


if __name__ == "__main__":
    guard(main)
