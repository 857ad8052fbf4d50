"""What went wrong is told in one sentence.

Import it first: from then on Ctrl-C is no traceback, also while torch is being imported.
"""
import errno
import os
import pickle
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Callable


def excepthook(kind: type, error: BaseException, traceback) -> None:
    """In place of Python's own excepthook: what goes wrong while modules are imported."""
    if issubclass(kind, KeyboardInterrupt):
        why = "stopped; nothing had begun"
    elif issubclass(kind, BadInput):
        why = str(error)
    elif issubclass(kind, ModuleNotFoundError):
        why = f"{error}; `pip install -r requirements-test.txt`"
    else:
        return sys.__excepthook__(kind, error, traceback)
    print(f"{Path(sys.argv[0]).name}: {why}", file=sys.stderr)


sys.excepthook = excepthook


class BadInput(ValueError):
    """What the user gave cannot be used; the message names it and a way out."""


def first_line(error: Exception) -> str:
    """What an exception says first, short enough for a sentence; after a ":" the next line too."""
    if isinstance(error, pickle.UnpicklingError):  # PyTorch's own text is of its versions
        return "it is no file of torch.save, or has more than plain data in it"
    lines = re.sub(r":\s*\n\s*", ": ", str(error)).splitlines() or [type(error).__name__]
    return shorten(lines[0], 150, placeholder=" ...")


def is_out_of_memory(error: Exception) -> bool:
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or bool(re.search("(allocate|out of|not enough) memory|ALLOC_FAILED", str(error))))


@contextmanager
def as_bad_input(what: str, way_out: str):
    """Whatever fails inside, such as a download, becomes a BadInput, except lack of memory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise BadInput(f"{what} ({first_line(error)}); {way_out}") from error


class Outliving:
    """A stream that outlives its reader (`| head`, a terminal): training does not end with it."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            if not isinstance(error, BrokenPipeError) and error.errno != errno.EIO:
                raise OSError(f"{self.stream.name} cannot be written ({error.strerror})") from error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # from now on nowhere


def guard(main: Callable) -> None:
    """Run a command: what the user or the system did wrong becomes one sentence."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None: closed
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):  # not a notebook's
            stream.reconfigure(errors="backslashreplace")  # for a console's code page
            setattr(sys, name, Outliving(stream))
    try:
        return main()
    except BadInput as error:
        why = str(error)
    except UnicodeError as error:
        why = f"{error}; give UTF-8"
    except OSError as error:
        why = f"{error.strerror}: {str(error.filename)[:100]}" if error.filename else str(error)
        why += "; make room, or write elsewhere" * (error.errno == errno.ENOSPC)
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        why = ("out of memory; try fewer or shorter texts at once; in training a smaller "
               "--batch_size (also with --resume, if there is a checkpoint), or anew --depth")
    except KeyboardInterrupt:
        why = "stopped; what is written is whole"
    rank = os.environ.get("RANK", "0")  # of torchrun's processes all tell what is wrong with them
    sys.exit(f"{Path(sys.argv[0]).name}{f', process {rank}' * (rank != '0')}: {why}")
