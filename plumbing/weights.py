"""Whisper's weights, by name or from a file."""
from pathlib import Path
from typing import Iterable

import torch
import whisper
from torch import Tensor

from plumbing.errors import BadInput, as_bad_input
from plumbing.files import fingerprint

POCKET = Path(__file__).parent.parent / "pocket"


def load_whisper(name: str, device: torch.device) -> whisper.model.Whisper:
    """`whisper.load_model`, with one clear sentence, a BadInput, where it fails."""
    names = ["pocket", *whisper.available_models()]
    if name not in names and not Path(name).is_file():
        raise BadInput(f"no Whisper {name!r}: neither a file nor one of {', '.join(names)}; "
                       "--whisper says where a file is now")
    hint = ("a Whisper checkpoint has `dims` and `model_state_dict` as openai-whisper saves them"
            if Path(name).is_file() else "check the network, or use the embedded pocket")
    with as_bad_input(f"cannot load Whisper {name!r}", hint):
        model = whisper.load_model(str(POCKET / "pocket.pt") if name == "pocket" else name, "cpu")
        d = model.dims
        whole = not (d.n_audio_state % d.n_audio_head or d.n_text_state % d.n_text_head)
        if not (whole and d.n_audio_state == d.n_text_state and d.n_mels in (80, 128)
                and d.n_vocab >= 51864):
            raise ValueError(f"no Whisper has such sizes: {d}")
    if device.type == "mps":  # has no sparse tensors; only word times need these
        model.alignment_heads = model.alignment_heads.to_dense()
    return model.to(device)


def weights_fingerprint(weights: Iterable[Tensor]) -> str:
    """It changes with the weights, the first 1,000 of each tensor."""
    first = torch.cat([x.flatten()[:1000].float().cpu() for x in weights])
    return fingerprint(first.numpy().tobytes())


def distinct_rows(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An embedding (V, E) -> its different rows (R, E), or all if few are equal; which of them each
    token has (V,), how many tokens each has (R,), whether a token has one of its own (V,), on CPU.

    In pocket all tokens that it never uses share a row, and so one logit: 1,900, not 51,865.
    """
    rows, row_of, count = weight.cpu().unique(dim=0, return_inverse=True, return_counts=True)
    is_own = count[row_of] == 1
    if len(rows) > len(weight) / 2:  # an official checkpoint: no second copy
        rows, row_of, count = weight, torch.arange(len(weight)), torch.ones(len(weight))
    return *(x.to(weight.device) for x in (rows, row_of, count)), is_own
