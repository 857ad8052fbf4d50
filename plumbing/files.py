"""Files are whole or not there, an earlier run's are kept, and a run has its folder alone."""
import errno
import hashlib
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Callable
from uuid import uuid4

from tqdm import tqdm

from plumbing.errors import BadInput, as_bad_input, first_line, is_out_of_memory

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows
    flock = None

OURS = ("ckpt.pt", "log.csv", "log.new", "result.txt", "settings.json", "manifest.jsonl",
        "left_out.jsonl")  # files that a run replaces
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST,
             errno.ENAMETOOLONG}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def fingerprint(things: object) -> str:
    """A digest of their `repr`; not of tensors, whose `repr` leaves values out."""
    return hashlib.sha256(repr(things).encode()).hexdigest()[:16]


@contextmanager
def atomic_write(file: Path, ready: Callable = lambda file: None):
    """Yields a temporary path; if all goes well, calls ready(file) and renames the path to `file`,
    else deletes it."""
    part = file.with_name(f"{file.name}.{uuid4().hex[:12]}.tmp")  # machines share folders
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with open(part, "rb+") as written:
            os.fsync(written.fileno())  # or a loss of power could leave an empty file
        ready(file)
        os.replace(part, file)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's, where the disk is full
        if (error.errno not in FORBIDDEN | FULL if isinstance(error, OSError)  # a download's
                else "enforce fail" not in str(error) or is_out_of_memory(error)):  # torch.save's
            raise
        why = getattr(error, "strerror", first_line(error))
        way = ("give a place that you may write to" if getattr(error, "errno", None) in FORBIDDEN
               else "make room")
        raise OSError(f"{file} cannot be written ({why}); {way}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def make_folder(folder: Path) -> None:
    """BadInput if there cannot be one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{folder} cannot be a folder ({error.strerror}); give a place that you may "
                       "write to") from error
    if not os.access(folder, os.W_OK):
        raise BadInput(f"{folder} cannot be written; give a place that you may write to")


class Busy(BadInput):
    """Another run has the folder."""


@contextmanager
def locked(folder: Path, rank: int = 0, part: str = ""):
    """One run at a time may write to a folder, by its first process, or one of each part; without
    parts, what a killed run left half-written goes. Raises Busy."""
    if rank > 0:
        yield
        return
    is_new = not folder.exists()
    make_folder(folder)
    with as_bad_input(f"{folder} cannot be written", "give a place that you may write to"):
        # A file, as NFS locks no folders; it stays where something was written.
        lock = open(folder / f".lock{part}", "w")
    with lock:
        try:
            if flock:
                flock(lock, LOCK_EX | LOCK_NB)
                if not os.path.exists(lock.name):  # whoever had it has just deleted it
                    raise BlockingIOError
        except BlockingIOError as error:
            raise Busy(f"another run writes to {folder}; give another folder") from error
        except OSError as error:  # of a cluster, perhaps
            print(f"note: {folder} cannot be locked ({error.strerror}), so see to it that no other "
                  "run writes there", file=sys.stderr)
        for name in OURS if not part else ():
            for half in folder.glob(f"{name}.*.tmp"):
                half.unlink()
        try:
            yield
        finally:
            with suppress(OSError):
                if is_new and [*folder.iterdir()] == [Path(lock.name)]:  # nothing came of it
                    os.unlink(lock.name)
                    folder.rmdir()


class Log:
    """A .csv, a row a step. A new run's is .new until `keep`, and an earlier one stays."""

    def __init__(self, path: Path, header: str, n_rows: int):
        """It goes on behind the rows of steps below n_rows: those before a checkpoint."""
        lines = path.read_text(errors="replace").splitlines() if n_rows and path.exists() else []
        rows = [row for row in lines[1 : n_rows + 1]
                if (step := row.partition(",")[0]).isdecimal() and int(step) < n_rows]
        self.path, self.now = path, path if n_rows else path.with_suffix(".new")
        self.header = header
        with atomic_write(self.now) as part:
            part.write_text("\n".join([header, *rows, ""]))
        self.file = open(self.now, "a", buffering=1)

    def write(self, step: int, *values: float) -> None:
        try:
            print(step, *(f"{x:.6g}" for x in values), sep=",", file=self.file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.now)) from error

    def keep(self, checkpoint: Path) -> None:
        """Call it when a checkpoint is ready: those of an earlier run become .old, once."""
        if not self.now.exists():
            tqdm.write(f"note: {self.now} is gone; it goes on in a new {checkpoint.parent}, with "
                       "the steps that come now", file=sys.stderr)
            self.file = open(self.now, "a", buffering=1)
            print(self.header, file=self.file)
        if self.now != self.path:
            was_run = checkpoint.exists()
            for file in checkpoint, checkpoint.with_name("result.txt"), self.path:
                if file.exists():
                    os.replace(file, file.with_suffix(".old"))
                    tqdm.write(f"note: {file} of an earlier run is now its .old", file=sys.stderr)
                elif was_run:  # it has none, so an .old is of a run before that
                    file.with_suffix(".old").unlink(missing_ok=True)
            self.file.close()  # Windows renames no open file
            os.replace(self.now, self.path)
            self.now, self.file = self.path, open(self.path, "a", buffering=1)
