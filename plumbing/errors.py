"""What went wrong is told in one sentence."""
import os
import sys
from pathlib import Path
from textwrap import shorten
from typing import Callable

import torch


class BadInput(ValueError):
    """What the user gave cannot be used; the message names it and a way out."""


def first_line(error: Exception) -> str:
    """What an exception says, short enough for one sentence."""
    return shorten((str(error).splitlines() or [type(error).__name__])[0], 150, placeholder=" ...")


class Outliving:
    """A stream that loses what cannot be written: an hour of training outlives a closed pipe."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # from now on nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def guard(main: Callable, outlives_output: bool = False) -> None:
    """Run a command: what the user or the system did wrong becomes one sentence."""
    for name in ("stdout", "stderr"):
        if stream := getattr(sys, name):  # None: closed
            stream.reconfigure(errors="backslashreplace")  # a console's code page
            setattr(sys, name, Outliving(stream) if outlives_output else stream)
    try:
        return main()
    except BrokenPipeError:  # `| head`
        return os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (BadInput, UnicodeError) as error:
        why = str(error)
    except OSError as error:
        why = f"{error.strerror or error}: {str(error.filename)[:100]}" if error.filename else error
    except (torch.OutOfMemoryError, MemoryError):
        why = ("out of memory; try a smaller --batch_size (also with --resume, if there is a "
               "checkpoint), or begin anew with a smaller --depth")
    except KeyboardInterrupt:
        why = "stopped; what is written is whole"
    is_main = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun
    sys.exit(f"{Path(sys.argv[0]).name}: {why}" if is_main else 1)
