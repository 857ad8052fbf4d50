"""The paces of pocket/languages.tsv: words per second of espeak-ng, reading its sentences.

    python experiments/pace.py          # prints code, ISO 639-3, pace; needs espeak-ng

The sentences were written for this project. The file has other paces for en, es, de, fr, zh (of
pocket's own clips, in many voices) and ja (6.3, of the same sentence in kana); nn has nb's.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.errors import guard  # noqa: E402
from plumbing.flags import Parser  # noqa: E402
from pocket import make_pocket  # noqa: E402
from text.durations import LANGUAGE_ROWS  # noqa: E402
from text.spelling import words  # noqa: E402

# Letters that espeak-ng names in place of reading them, and how it reads them.
RESPELLED = {"as": {"\u09af\u09bc": "\u09df", "\u09a2\u09bc": "\u09f0"},
             "mt": {"l-": "l", "is-s": "iss"}}


def seconds(text: str, voice: str) -> float:
    """How long the voice speaks, between the silences (40 dB)."""
    samples, rate = make_pocket.read_aloud(text, voice)
    power = np.square(samples[: len(samples) // 100 * 100].reshape(-1, 100).astype(float)).mean(1)
    loud = np.flatnonzero(power > power.max() / 1e4)
    return (loud[-1] + 1 - loud[0]) * 100 / rate


def main() -> None:
    Parser(__doc__.splitlines()[0]).parse_args()
    voiceless = make_pocket.voiceless(code for code, *_ in LANGUAGE_ROWS)
    for code, iso, _, text in LANGUAGE_ROWS:
        spelled = text
        for sign, letters in RESPELLED.get(code, {}).items():
            spelled = spelled.replace(sign, letters)
        print(code, iso, "-" if code in voiceless else
              f"{len(words(text, code)) / seconds(spelled, make_pocket.voice_of(code)):.1f}")


if __name__ == "__main__":
    guard(main)
