"""The figures of a run, printed and kept."""
from pathlib import Path

import numpy as np

from plumbing.files import atomic_write


def block(result: dict) -> str:
    """A line `key: value` for each."""
    return "".join(f"{key}: {value:.4f}\n" if isinstance(value, float) else f"{key}: {value}\n"
                   for key, value in result.items())


def report(path: Path, **result) -> dict:
    """Print a block of lines and write it; of over eight languages print the worst five only."""
    shown = dict(result)
    for steps in (1, 4):
        cers = {key: v for key, v in result.items() if key.startswith(f"val_cer_{steps}step_")}
        if len(cers) > 8:
            for key in sorted(cers, key=cers.get)[:-5]:
                del shown[key]
            shown[f"val_cer_{steps}step_mean"] = np.mean([*cers.values()])
            shown[f"val_cer_{steps}step_median"] = np.median([*cers.values()])
    print(block(shown), end="")
    with atomic_write(path) as part:
        part.write_text(block(result))
    return result
