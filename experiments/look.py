"""A picture: the states of the flow from noise to x1, and under each what the frozen Whisper reads.

    python experiments/look.py out/ckpt.pt --out docs/flow.png     # or out/mel/ckpt.pt

Beside them the x1 of real speech. The sentence is the first spoken one of pocket/speech.npz in the
language, which training never saw.
"""
import sys
import textwrap
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import flow  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from plumbing.errors import BadInput, as_bad_input, guard  # noqa: E402
from plumbing.files import atomic_write  # noqa: E402
from plumbing.flags import Parser, file_path  # noqa: E402
from pocket.clips import spoken_clips  # noqa: E402
from speech.recordings import speech_span  # noqa: E402
from text.durations import FRAMES_PER_SECOND  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


def picture(panels: list[tuple[str, torch.Tensor, str]], path: Path) -> None:
    """Title, latent (T, C) and what was read of each -> heat maps in a row, channels upwards."""
    figure = Figure((2 * len(panels), 3), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, x, read) in zip(axes, panels):
        axis.imshow(x.T.numpy(), origin="lower", aspect="auto", vmin=-3, vmax=3, cmap="magma",
                    extent=(0, len(x) / FRAMES_PER_SECOND, 0, x.shape[1]))
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("\n".join(textwrap.wrap(read, 26)), fontsize=8, loc="left", va="top")
    axes[0].set_ylabel("channel", fontsize=8)
    with atomic_write(path) as part, as_bad_input(f"{path} cannot be drawn", "give a .png"):
        figure.savefig(part, format=path.suffix[1:], dpi=80)


def main(argv=None) -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=file_path, help="of train.py")
    parser.add_argument("--language", default="en", help="of the sentence (default: en)")
    parser.add_argument("--out", type=file_path, default=Path("out/flow.png"))
    args = parser.parse_args(argv)
    checkpoint = train.load_checkpoint(args.checkpoint)
    model, whisper, durations, speed = sample.load_flow(checkpoint, torch.device("cpu"))
    language = whisper.check_language(args.language)
    spoken = [pair for pair in spoken_clips(whisper) if pair[0].language == language]
    if not spoken:
        raise BadInput(f"no spoken sentence in {args.language!r} of {whisper.dims.n_mels} mel "
                       "bins; try --language en")
    sentence, mel = spoken[0]
    batch = data.make_batch([sentence], whisper, [durations(sentence, speed)]).to(whisper)
    real = whisper.latents(mel[None])[:, : speech_span(mel).stop]  # what is behind is silence
    times = [f"t = {t:.2f}" for t in flow.schedule(flow.Solver().steps)]
    states, panels = train.generate(model, whisper, batch, flow.Solver()), []
    for title, x in zip([*times, "real speech (espeak-ng)"], [*states, real]):
        features = whisper.features(x, torch.tensor([x.shape[1]]))
        panels.append((title, x[0], whisper.transcribe(features, [language])[0].text))
    picture(panels, args.out)
    print(f"wrote {args.out}: {sentence.text}")


if __name__ == "__main__":
    guard(main)
