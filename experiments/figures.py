"""Figures are whole .png files."""
from pathlib import Path

from plumbing.errors import BadInput  # first: see there
from plumbing.files import atomic_write
import matplotlib
from matplotlib import pyplot

matplotlib.use("Agg")


def save(figure: pyplot.Figure, path: Path, dpi: int = 100) -> None:
    """BadInput if the name is that of another kind of file."""
    if path.suffix.lower() != ".png":
        raise BadInput(f"{path} is no .png, which is what is written")
    with atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=dpi)
    pyplot.close(figure)
