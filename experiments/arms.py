"""What so many minutes of recordings teach the flow: alone, and before text.

    python experiments/arms.py flow-7 both-7        # trains out/arms/NAME/ckpt.pt
    python experiments/arms.py flow-7 --steps 500           # other flags go to train.py

espeak-ng speaks sentences of the training set, in voices of the pocket decoder's training.
"""
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Sequence

import torch
from whisper.audio import HOP_LENGTH

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402
from experiments.human import write_manifest  # noqa: E402
from plumbing.errors import BadInput, guard  # noqa: E402
from plumbing.files import fingerprint  # noqa: E402
from plumbing.flags import parse_flags  # noqa: E402
from pocket import make_pocket  # noqa: E402
from speech import recordings, sound  # noqa: E402
from text.sources import builtin  # noqa: E402

MEAN_SECONDS = 2.25  # of a spoken sentence
FIRST_SEED = 2000  # of speech; realism.py's voices have others
LONGEST = HOP_LENGTH * make_pocket.MEL_FRAMES  # samples that pocket hears at once
# minutes of speech, share of the steps for speech alone, steps: 4,200 of speech in both kinds
ARMS = {f"{kind}-{minutes}": (minutes, *arm) for minutes in (1, 7, 30, 110)
        for kind, arm in dict(flow=(1.0, 4200), both=(0.75, 4800)).items()}


def choose(minutes: float) -> list[data.Sentence]:
    """About so many minutes of sentences, in equal parts of a language, all among the 110."""
    sentences = data.split(builtin())[0]
    random.Random(2).shuffle(sentences)
    most = data.per_language(sentences, round(110 * 60 / MEAN_SECONDS))
    return most[:: max(1, round(110 / minutes))]


def write_speech(folder: Path, sentences: Sequence[data.Sentence]) -> None:
    """Speak sentences once each, into .wav files and a manifest.tsv."""
    def write(sentence: data.Sentence) -> Path:
        path = folder / f"{fingerprint(sentence)}.wav"
        if not path.exists():
            samples = make_pocket.random_samples(
                sentence, make_pocket.VARIANTS, FIRST_SEED, LONGEST, lead=0.1)
            sound.write_samples(path, torch.from_numpy(samples))
        return path

    with ThreadPoolExecutor(2) as pool:
        files = [*pool.map(write, sentences)]
    write_manifest(folder, [(file.name, *s) for file, s in zip(files, sentences)])


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        return print(__doc__)
    n_names = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    names, flags = argv[:n_names], argv[n_names:]
    if not names or set(names) - set(ARMS):
        raise BadInput(f"{' '.join(names) or 'nothing'} cannot be used; give some of "
                       f"{', '.join(ARMS)}")
    if {"--speech", "--out_dir"} & {flag.partition("=")[0] for flag in flags}:
        raise BadInput("each run has its own folder, out/arms/NAME; leave out --speech, --out_dir")
    parse_flags(train.Config, __doc__, flags)  # a wrong one fails now, not after the speech
    make_pocket.need_espeak()
    for name in names:
        minutes, share, steps = ARMS[name]
        recordings.SPEECH_ALONE = share
        folder = Path("out/arms") / name
        write_speech(folder / "speech", choose(minutes))
        train.main(["--speech", str(folder / "speech"), "--out_dir", str(folder), "--device", "cpu",
                    "--steps", str(steps), *flags])


if __name__ == "__main__":
    guard(main)
