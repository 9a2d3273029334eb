"""The command line: flags with ranges, checked in one place, and errors that end a command with one line."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psutil
import torch
from transformers import HfArgumentParser


Arguments = TypeVar("Arguments")

_COMPARISONS = {
    "ge": ("at least", lambda value, bound: value >= bound),
    "gt": ("greater than", lambda value, bound: value > bound),
    "le": ("at most", lambda value, bound: value <= bound),
    "lt": ("less than", lambda value, bound: value < bound),
}


class _Help(str):
    """A help text with the range of its flag. (HfArgumentParser passes every other metadata key on to argparse.)"""

    bounds: dict[str, float]


def flag(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    **options: Any,
) -> Any:
    """
    A dataclass field that becomes a command-line flag.

    Args:
        default: Default value; a list is copied for every instance. Without it the flag is required.
        help: Help text.
        ge, gt, le, lt: Bounds of the number, or of every number of a list, checked by [`check_ranges`].
        options: Further arguments of `ArgumentParser.add_argument`, such as `choices` and `nargs`.
    """
    text = _Help(help)
    text.bounds = {
        name: bound for name, bound in zip(_COMPARISONS, (ge, gt, le, lt), strict=True) if bound is not None
    }
    metadata = {"help": text, **options}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_ranges(args: Any) -> None:
    """
    Check every number of a dataclass of [`flag`]s against its range. NaN lies in no range.

    Raises:
        ValueError: Names the flag, what it allows and the value.
    """
    for field in dataclasses.fields(args):
        bounds = getattr(field.metadata.get("help"), "bounds", {})
        value = getattr(args, field.name)
        for number in value if isinstance(value, list | tuple) else [] if value is None else [value]:
            if not all(_COMPARISONS[name][1](number, bound) for name, bound in bounds.items()):
                allowed = " and ".join(f"{_COMPARISONS[name][0]} {bound:g}" for name, bound in bounds.items())
                raise ValueError(f"--{field.name} must be {allowed}, got {number}.")


def parse(arguments: type[Arguments], description: str, argv: Sequence[str] | None = None) -> Arguments:
    """
    Parse the command line into a dataclass of [`flag`]s and check its ranges.

    Raises:
        SystemExit: With status 2 and a message, for unknown flags and wrong values.
    """
    parser = HfArgumentParser(arguments, description=description, allow_abbrev=False)
    (parsed,) = parser.parse_args_into_dataclasses(None if argv is None else list(argv))
    try:
        check_ranges(parsed)
    except ValueError as error:
        parser.error(str(error))
    return parsed


def check_launch(num_processes: int) -> None:
    """Refuse a launch of several processes that accelerate would run as independent ones."""
    if int(os.environ.get("WORLD_SIZE", 1)) != num_processes:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but accelerate set up {num_processes} process(es): each would "
            "make all images. Two processes on a CPU: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no SCRIPT."
        )


def run(main: Callable[[], object]) -> None:
    """
    Run a command; an error of the user's ends it with one line and exit status 2.

    Errors of use are `ValueError`, `OSError` and `ImportError`; others keep their traceback. Set the environment variable
    `PIXELREPA_TRACEBACK=1` to see the traceback of all.
    """
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("PIXELREPA_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
