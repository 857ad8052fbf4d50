"""What went wrong is told in one sentence."""
import os
import sys
from pathlib import Path
from typing import Callable

import torch


class BadInput(ValueError):
    """What the user gave cannot be used; the message names it and a way out."""


def first_line(error: Exception) -> str:
    """What an exception says, short enough for one sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def guard(main: Callable) -> None:
    """Run a command: what the user or the system did wrong becomes one sentence."""
    try:
        return main()
    except BrokenPipeError:  # `| head`
        return os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (BadInput, OSError, UnicodeError) as error:
        why = str(error)
    except torch.OutOfMemoryError:
        why = ("out of GPU memory; try a smaller --batch_size (also with --resume, if there is a "
               "checkpoint), or begin anew with a smaller --depth")
    except KeyboardInterrupt:
        why = "stopped; what is written is whole"
    is_main = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun
    sys.exit(f"{Path(sys.argv[0]).name}: {why}" if is_main else 1)
