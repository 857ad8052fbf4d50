"""Two critics: another Whisper hears a third of the steps. Is the flow more like speech then?

    python experiments/two_ears.py base --whisper tiny.en --init_from out/start2 --steps 1300 ...

What pleases one network may be its own; what two read is likelier to be speech. All flags but the
first are those of train.py, whose --whisper is the critic that the flow takes its tokens from; the
other joins when the lens has faded, after a third of the run. The checkpoint is as any other, but
--resume is for this file.
"""
import sys
from pathlib import Path
from typing import Sequence

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import train  # noqa: E402
from experiments.student import check_hears  # noqa: E402
from plumbing.errors import BadInput, guard  # noqa: E402
from speech.ear import Ear, Room  # noqa: E402


class TwoEars(Ear):
    """An ear in whose place another one hears half of the steps without a lens."""

    other: Ear

    def text_loss(self, x1: Tensor, batch: data.Batch,
                  room: Room | None = None) -> tuple[Tensor, Tensor]:
        """As `Ear.text_loss`, by one of the two."""
        if not room or room.lens_weight or torch.rand(
                (), generator=room.rng, device=room.rng.device) < 0.5:
            return super().text_loss(x1, batch, room)
        codes, texts = zip(*batch.sentences)
        targets = self.other.target_tokens(texts, codes).to(self.device)  # of its tokenizer
        return self.other.text_loss(x1, batch._replace(targets=targets), room)


def main(argv: Sequence[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & {*argv}:
        return print(__doc__)
    if "--latent" in {flag.partition("=")[0] for flag in argv}:
        raise BadInput("an ear is always of spectrograms; leave out --latent")

    def ears(name: str, device: torch.device) -> TwoEars:
        ear = TwoEars(name, device)
        ear.other = Ear(argv[0], device)
        check_hears(argv[0], ear.other, ear)
        ear.languages = [code for code in ear.languages if code in ear.other.languages]
        return ear

    one_ear, train.LATENTS["mel"] = train.LATENTS["mel"], ears
    try:
        return train.main(["--latent", "mel", *argv[1:]])
    finally:
        train.LATENTS["mel"] = one_ear


if __name__ == "__main__":
    guard(main)
