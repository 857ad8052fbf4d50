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
import train  # noqa: E402
from whisper_decoder import BadInput, Ear  # noqa: E402


def picture(panels: dict[str, torch.Tensor], path: Path) -> None:
    """Titles -> log-mel (n_mels, n) each, one below the other on one scale of time and loudness."""
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(8, 2 * len(panels)), sharex=True,
                                   layout="constrained")
    for axis, (title, mel) in zip(axes, panels.items()):
        extent = 0, mel.shape[1] / 100, 0, len(mel)
        axis.imshow(mel.numpy(), origin="lower", aspect="auto", extent=extent, vmin=-1, vmax=1.2,
                    cmap="magma")
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("mel bin")
    axes[-1].set_xlabel("seconds")
    with data.atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=80)
    pyplot.close(figure)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="of train.py --latent mel")
    parser.add_argument("--language", default="en", help="of the sentence (default: en)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "ear.png")
    args = parser.parse_args(argv)
    checkpoint = train.load_checkpoint(args.checkpoint)
    ear = train.load_critic(checkpoint, torch.device("cpu"))
    if not isinstance(ear, Ear):
        raise BadInput(f"{args.checkpoint} makes features; `train.py --latent mel` makes "
                       "spectrograms")
    language = ear.check_language(args.language)
    spoken = [pair for pair in zip(*data.spoken_clips(ear)) if pair[0].language == language]
    if not spoken:
        raise BadInput(f"no spoken sentence in {args.language!r} of {ear.channels} mel bins; try "
                       "--language en")
    sentence, mel = spoken[0]
    durations = train.durations_by(checkpoint["rhythm"])(sentence, checkpoint["config"]["speed"])
    batch = data.make_batch([sentence], ear, [durations]).to(ear)
    model, frames = train.load_model(checkpoint, ear.device), batch.cond["frames"]
    x1 = train.generate(model, ear, batch, train.Settings())[-1]
    n = int(((mel > mel.min()).any(0)).nonzero().max()) + 1  # what is behind is silence
    picture({f"text alone, no audio in training: {sentence.text}":
             ear.spectrogram(x1, frames, x1.shape[1])[0],
             "the same sentence, spoken by espeak-ng": mel[:, :n]}, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    train.guard(main)
