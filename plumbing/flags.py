"""A dataclass becomes a command line: every field is a flag, with its help and its limits."""
import argparse
import json
import os
from dataclasses import field, fields
from itertools import chain
from pathlib import Path
from typing import Container
from uuid import uuid4

from plumbing.errors import BadInput, as_bad_input
from plumbing.files import atomic_write


class Parser(argparse.ArgumentParser):
    """Whole names of flags only, and one sentence where something is wrong."""

    def __init__(self, description: str, hint: str = ""):
        super().__init__(description=description, allow_abbrev=False)
        self.hint = hint

    def parse_args(self, *args) -> argparse.Namespace:
        flags = super().parse_args(*args)
        for name, value in vars(flags).items():
            if value == "":  # a variable of the shell that is not set
                raise BadInput(f"--{name} is empty; give something, or leave it out")
        return flags

    def error(self, message: str) -> None:
        message = message.replace("ignored explicit argument", "it takes no value, not")
        if "expected at least one argument" in message:
            message += " that does not begin with -"
        raise BadInput(f"{message}; {self.hint}--help lists all flags")


def file_path(text: str) -> Path:
    """A path, also where the shell has left its ~, as in --out=~/x."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give something, or leave it out")
    return Path(os.path.expanduser(text))


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def seed_number(text: str) -> int:
    """A whole number from 0 on, below 2**31."""
    if not (text.isdecimal() and int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; give 0, 1, 2 ...")
    return int(text)


def flag(default, help: str, low=None, below=1e9, choices=None):
    """A field: a number must be at least low, and below `below`; anything else one of choices."""
    metadata = dict(help=help, low=low, below=below, choices=choices)
    return field(default=default, metadata=metadata)


def check_flags(config) -> None:
    """BadInput for the first field that is out of its limits."""
    for f in fields(config):
        low, below, choices = (f.metadata[name] for name in ("low", "below", "choices"))
        value = getattr(config, f.name)
        if low is not None and not low <= value < below:
            raise BadInput(f"--{f.name} {value} cannot be used; at least {low} and below {below:g}")
        if choices and value not in choices:
            raise BadInput(f"--{f.name} {value!r} is none of {', '.join(choices)}")


def read_settings(file: Path, way_out: str) -> dict:
    """What a folder was begun with; BadInput if the file is damaged."""
    with as_bad_input(f"{file} is damaged, so nobody knows how its folder was made", way_out):
        return dict(json.loads(file.read_text("utf-8")))


def check_same(path: Path, before: dict, now: dict, way_out: str, things: Container = ()) -> None:
    """BadInput if a flag, or one of things, such as a text, is not what a run began with."""
    for name, value in now.items():
        if (was := before.get(name)) != value:
            was, value = (f"no --{name}" if x in (None, "") else
                          f"--{name} {' '.join(x) if isinstance(x, (list, tuple)) else x}"
                          for x in (was, value))
            difference = (f"another {name}, which has changed since" if name in things
                          else f"{was}, not with {value}")
            raise BadInput(f"{path} was begun with {difference}; give the same, or another "
                           f"{way_out}")


def keep_settings(file: Path, settings: dict, damaged: str, way_out: str,
                  things: Container) -> None:
    """Write what a folder is begun with, or BadInput if it was begun with something else."""
    if not file.exists():
        own = file.with_name(f"{file.name}.{uuid4().hex[:12]}.tmp")
        with atomic_write(own) as part:
            part.write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
        try:
            os.link(own, file)  # unlike os.replace it never overwrites
        except FileExistsError:  # another part has just begun, too
            pass
        except OSError:  # no hard links: the last one decides
            os.replace(own, file)
        own.unlink(missing_ok=True)
    now = json.loads(json.dumps(settings))
    check_same(file.parent, read_settings(file, damaged), now, way_out, things)


def parse_flags(kind: type, description: str, argv=None):
    """Command line -> a `kind`."""
    parser = Parser(description)
    special = {bool: dict(action=argparse.BooleanOptionalAction),
               tuple: dict(nargs="+", action="append"), str: dict(type=os.path.expanduser)}
    for f in fields(kind):
        how = special.get(type(f.default), dict(type=type(f.default)))
        help = f"{f.metadata['help']} (default: {f.default})"
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=help, **how)
    args = vars(parser.parse_args(argv))
    return kind(**{k: tuple(chain(*x)) if isinstance(x, list) else x for k, x in args.items()})
