"""A picture: the character error rate of every language of a run, from its result.txt.

    python experiments/bars.py out/all/result.txt --out docs/languages.png
"""
import re
import sys
from pathlib import Path

from whisper.tokenizer import LANGUAGES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.errors import BadInput, as_bad_input, guard  # noqa: E402  first: see there
from plumbing.files import atomic_write  # noqa: E402
from plumbing.flags import Parser, file_path  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


def rates_of(result: str) -> dict[str, float]:
    """The text of a result.txt -> {language: CER in percent, 4 steps}, best first."""
    rates = re.findall(r"^val_cer_4step_(\w+): ([\d.]+)$", result, re.MULTILINE)
    return dict(sorted(((code, 100 * float(cer)) for code, cer in rates), key=lambda item: item[1]))


def picture(rates: dict[str, float], title: str, path: Path) -> None:
    figure = Figure((max(4, 0.32 * len(rates)), 3), layout="constrained")
    axis = figure.subplots()
    bars = axis.bar([LANGUAGES[code].title() for code in rates], rates.values(), color="#4477aa")
    axis.bar_label(bars, [f"{rate:.1f}" for rate in rates.values()], fontsize=7)
    axis.set_ylabel("CER, %", fontsize=8)
    axis.set_title(title, fontsize=9)
    axis.tick_params("x", labelrotation=90, labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as part, as_bad_input(f"{path} cannot be drawn", "give a .png"):
        figure.savefig(part, format=path.suffix[1:])


def main(argv=None) -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("result", type=file_path, help="result.txt of train.py")
    parser.add_argument("--out", type=file_path, default=Path("out/languages.png"))
    args = parser.parse_args(argv)
    rates = rates_of(args.result.read_text())
    if not rates:
        raise BadInput(f"{args.result} has no error rates; give the result.txt of train.py")
    mean = sum(rates.values()) / len(rates)
    picture(rates, f"read back, {len(rates)} languages, 4 steps, mean {mean:.1f} %", args.out)
    print(f"wrote {args.out}: mean of {len(rates)} languages {mean:.1f} %")


if __name__ == "__main__":
    guard(main)
