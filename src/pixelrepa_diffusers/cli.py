"""Command-line flags with ranges, and user errors that end a command with one line."""

from __future__ import annotations

import dataclasses
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import diffusers
import psutil
import torch
import transformers
from transformers import HfArgumentParser

from .files import FolderInUseError


Arguments = TypeVar("Arguments")

_BOUNDS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


class _Help(str):
    """Help text that carries the range of its flag: HfArgumentParser passes all other metadata keys to argparse."""

    bounds: dict[str, float]


def flag(default: Any = dataclasses.MISSING, help: str = "", **options: Any) -> Any:
    """
    Define a dataclass field that becomes a command-line flag.

    Args:
        default (*optional*): Default value; a list is copied for every instance. Without it the flag is required.
        help (`str`): Help text.
        options: Bounds `ge`, `gt`, `le`, `lt` of the number, or of every number of a list, checked by [`check_ranges`];
            and arguments of `ArgumentParser.add_argument`, such as `choices` and `nargs`.
    """
    text = _Help(help)
    text.bounds = {name: options.pop(name) for name in _BOUNDS if name in options}
    metadata = {"help": text, **options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_ranges(args: Any) -> None:
    """
    Check the numbers of a dataclass of [`flag`]s against their ranges. NaN is in no range.

    Raises:
        ValueError: Names the flag, its range and the value.
    """
    for field in dataclasses.fields(args):
        bounds = getattr(field.metadata.get("help"), "bounds", {})
        value = getattr(args, field.name)
        for number in value if isinstance(value, list | tuple) else [value]:
            inside = number is None or all(getattr(operator, name)(number, bound) for name, bound in bounds.items())
            if not inside:
                allowed = " and ".join(f"{_BOUNDS[name]} {bound:g}" for name, bound in bounds.items())
                raise ValueError(f"--{field.name} must be {allowed}, got {number}.")


def parse(arguments: type[Arguments], description: str, argv: Sequence[str] | None = None) -> Arguments:
    """
    Parse the command line into a dataclass of [`flag`]s and check its ranges.

    Raises:
        SystemExit: With status 2 and a message, for unknown flags and wrong values.
    """
    parser = HfArgumentParser(arguments, description=description, allow_abbrev=False)
    parsed = arguments(**vars(parser.parse_args(argv)))
    try:
        check_ranges(parsed)
    except ValueError as error:
        parser.error(str(error))
    return parsed


def as_words(flags: Mapping[str, Any]) -> list[str]:
    """The command line of flags by name; those that are `None` are left out."""
    given = {name: value if isinstance(value, list) else [value] for name, value in flags.items() if value is not None}
    return [word for name, values in given.items() for word in (f"--{name}", *map(str, values))]


def check_launch(num_processes: int) -> None:
    """
    Check that accelerate runs as many processes as its launcher was asked for.

    `accelerate launch --cpu --num_processes 2` starts a single process and prints no warning. Its only trace is the
    MASTER_PORT that the launcher adds to the environment.

    Raises:
        ValueError: Says how to start several CPU processes.
    """
    if "WORLD_SIZE" in os.environ:
        missing = int(os.environ["WORLD_SIZE"]) != num_processes
    else:
        launched = {"MASTER_PORT", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys()
        missing = launched and num_processes == 1 and "MASTER_PORT" not in psutil.Process().parent().environ()
    if missing:
        raise ValueError(
            f"The launcher was asked for several processes, but accelerate runs {num_processes}. On a CPU use "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 "
            "--mixed_precision no --dynamo_backend no SCRIPT."
        )


def run(main: Callable[[], object]) -> None:
    """
    Run a command and end it with one line and exit status 2 on a user error.

    User errors are `ValueError`, `OSError`, `ImportError`, [`FolderInUseError`] and `FloatingPointError` (a non-finite
    loss). Other errors, and with `PIXELREPA_TRACEBACK=1` all of them, keep their traceback.
    """
    if not sys.stderr.isatty():  # a bar would write a line per refresh into a log
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    try:
        main()
    except (ValueError, OSError, ImportError, FolderInUseError, FloatingPointError) as error:
        if os.environ.get("PIXELREPA_TRACEBACK"):
            raise
        message = str(error)
        if "Original Traceback" in message:  # a DataLoader worker's; the error's own message is at its end
            message = message.rpartition(f"{type(error).__name__}: ")[2].strip()
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
