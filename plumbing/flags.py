"""A dataclass becomes a command line: every field is a flag, with its help and its limits."""
import argparse
import math
from dataclasses import field, fields

from plumbing.errors import BadInput


def flag(default, help: str, low=None, below=math.inf, choices=None):
    """A field: a number must be at least low, and below `below`; anything else one of choices."""
    metadata = dict(help=help, low=low, below=below, choices=choices)
    return field(default=default, metadata=metadata)


def check_flags(config) -> None:
    """BadInput for the first field that is out of its limits."""
    for f in fields(config):
        low, below, choices = (f.metadata[name] for name in ("low", "below", "choices"))
        value = getattr(config, f.name)
        if low is not None and not low <= value < below:
            limit = f" and below {below}" if below < math.inf else ""
            raise BadInput(f"--{f.name} {value} cannot be used; at least {low}{limit}")
        if choices and value not in choices:
            raise BadInput(f"--{f.name} {value!r} is none of {', '.join(choices)}")


def parse_flags(kind: type, description: str, argv=None):
    """Command line -> a `kind`."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    special = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(nargs="+")}
    for f in fields(kind):
        how = special.get(type(f.default), dict(type=type(f.default)))
        help = f"{f.metadata['help']} (default: {f.default})"
        parser.add_argument(f"--{f.name}", default=f.default, help=help, **how)
    args = vars(parser.parse_args(argv))
    return kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in args.items()})
