"""Train the checkpoints that the table of experiments/README.md compares, each with its speech.

    python experiments/arms.py text pairs-7         # writes out/arms/NAME/ckpt.pt
    python experiments/arms.py pairs-7 --steps 500         # other flags go to train.py

espeak-ng speaks, in voices of the pocket decoder's training, sentences that are not in the test.
"""
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "pocket")]
import data  # noqa: E402
import make_pocket  # noqa: E402
import train  # noqa: E402
from whisper_decoder import BadInput, FrozenWhisper  # noqa: E402

MEAN_SECONDS = 2.25  # of a spoken sentence
FIRST_SEED = 2000  # of speech; realism.py's voices have others
# minutes of speech, is its text given, flags of train.py
ARMS = {
    "text": (0, True, "--prior none"),
    "prior": (0, True, "--transport_weight 0.3 --steps 2000"),
}
for minutes in (1, 7, 30, 110):
    ARMS |= {
        f"pairs-{minutes}": (minutes, True, "--speech_share 1 --steps 2000"),
        f"unlabelled-{minutes}": (minutes, False, "--steps 4800"),
        f"both-{minutes}": (minutes, True, "--steps 4800"),
    }


def speak(minutes: float, has_text: bool, sentences: list,
          whisper: FrozenWhisper) -> data.Corpus | None:
    """So many minutes of sentences that are spoken once, in equal parts of every language."""
    if not minutes:
        return None
    make_pocket.need_espeak()
    work = ROOT / "out" / "arms"
    work.mkdir(parents=True, exist_ok=True)
    random.Random(2).shuffle(sentences)
    most = train.balanced(sentences, round(110 * 60 / MEAN_SECONDS))
    said = most[:: max(1, round(110 / minutes))]
    clips = make_pocket.speak_all(said, make_pocket.VARIANTS, FIRST_SEED, work, "speech")
    heard = data.hear_all(list(zip(clips, [s if has_text else None for s in said])),
                          lambda clip: data.stack_clips([clip], whisper), whisper)
    if n_failed := len(heard["problems"]):  # what Whisper does not understand is left out
        print(f"{n_failed} of {len(said)} utterances were not understood: left out")
    if n_failed == len(said):
        raise BadInput(f"{whisper.name} understood none of {n_failed} utterances; give their text")
    return data.speech_corpus(heard)


def names_and_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """A command line, cut before its first flag."""
    n_names = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    return argv[:n_names], argv[n_names:]


def main(argv):
    names, given = names_and_flags(argv)
    if not names or set(names) - set(ARMS):
        raise BadInput(f"give arms, some of {', '.join(ARMS)}")
    for name in names:
        minutes, has_text, flags = ARMS[name]
        whisper = FrozenWhisper("pocket")
        training, _ = data.split(data.builtin())
        flags = ["--out_dir", f"out/arms/{name}", *flags.split(), *given]
        speech = speak(minutes, has_text, training, whisper)
        train.main([*flags, "--device", "cpu"], speech, whisper)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (BadInput, ValueError) as error:
        sys.exit(f"arms.py: {error}")
