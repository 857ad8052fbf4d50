"""Files are whole or not there, and those of an earlier run are kept."""
import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(file: Path):
    """A temporary name that becomes `file` when all is written; if not, nothing stays."""
    part = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def open_log(path: Path, header: str, n_rows: int):
    """A .csv that rows are added to, cut back to its first n_rows: those before a checkpoint."""
    rows = path.read_text().splitlines()[1 : n_rows + 1] if n_rows and path.exists() else []
    with atomic_write(path) as part:
        part.write_text("\n".join([header, *rows, ""]))
    return open(path, "a", buffering=1)


def keep_earlier_run(checkpoint: Path, log: Path) -> None:
    """Where there is a checkpoint, it and its log become .old files."""
    for file in (checkpoint, log) if checkpoint.exists() else ():
        if file.exists():
            os.replace(file, file.with_suffix(".old"))
            print(f"note: {file} of an earlier run is kept as {file.with_suffix('.old')}")
