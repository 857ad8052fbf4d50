"""A picture: what the flow says, and the same sentence in real speech, as spectrograms.

    python experiments/look.py out/ckpt.pt --out docs/ear.png      # of train.py --latent mel

The sentence is the first spoken one of pocket/speech.npz in the language, which training never saw.
"""
import argparse
import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import sample  # noqa: E402
from whisper_decoder import BadInput, Ear  # noqa: E402


def picture(panels: dict[str, torch.Tensor], path: Path) -> None:
    """Titles -> log-mel (n_mels, n) each, one below the other on one scale of time and loudness."""
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(8, 2 * len(panels)), sharex=True,
                                   layout="constrained")
    for axis, (title, mel) in zip(axes, panels.items()):
        axis.imshow(mel, origin="lower", aspect="auto", extent=(0, mel.shape[1] / 100, 0, len(mel)),
                    vmin=-1, vmax=1.2, cmap="magma")
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("mel bin")
    axes[-1].set_xlabel("seconds")
    with data.writing(path) as part, open(part, "wb") as file:
        figure.savefig(file, format="png", dpi=80)
    pyplot.close(figure)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="of train.py --latent mel")
    parser.add_argument("--language", default="en", help="of the sentence (default: en)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "ear.png")
    args = parser.parse_args(argv)
    checkpoint = sample.load_checkpoint(args.checkpoint)
    ear = sample.load_critic(checkpoint, torch.device("cpu"))
    if not isinstance(ear, Ear):
        raise BadInput(f"{args.checkpoint} makes features; `train.py --latent mel` makes "
                       "spectrograms")
    spoken = [(s, clip) for s, clip in zip(*data.spoken_sentences(ear))
              if s.language == ear.check_language(args.language)]
    if not spoken:
        raise BadInput(f"no spoken sentence in {args.language!r} of {ear.channels} mel bins; try "
                       "--language en")
    sentence, clip = spoken[0]
    model = sample.load_model(checkpoint, ear.device)
    lasting = [data.letter_lengths(sentence, checkpoint["config"]["speed"], model.prior)]
    x1 = sample.round_trip(model, ear, [sentence], sample.Settings(), lasting).x1[0]
    picture({f"text alone, no audio in training: {sentence.text}": ear.mel(x1),
             "the same sentence, spoken by espeak-ng": data.mel_from_bytes(clip, clip.shape[1])},
            args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        sys.exit(f"look.py: {error}")
