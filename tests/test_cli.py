"""The command line: ranges of flags, process counts, and exit statuses."""

import contextlib
from dataclasses import dataclass

import pytest
import transformers
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from pixelrepa_diffusers.cli import check_launch, flag, parse, run
from pixelrepa_diffusers.files import FolderInUseError


@dataclass
class Arguments:
    ratio: float = flag(0.5, "A ratio.", ge=0, lt=1)
    sizes: list[int] = flag([1, 2], "Sizes.", ge=1, nargs="+")
    limit: int | None = flag(None, "A limit.", gt=0)


def test_values_within_their_range_are_parsed():
    args = parse(Arguments, "", ["--ratio", "0", "--sizes", "3", "4", "--limit", "1"])
    assert args == Arguments(0.0, [3, 4], 1)
    assert parse(Arguments, "", []) == Arguments()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ratio 1", "--ratio must be at least 0 and less than 1, got 1.0"),
        ("--ratio nan", "--ratio must be at least 0"),
        ("--sizes 1 0", "--sizes must be at least 1, got 0"),
        ("--limit 0", "--limit must be greater than 0"),
        ("--rati 0", "unrecognized arguments: --rati 0"),
    ],
)
def test_value_outside_its_range_is_refused_by_name(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse(Arguments, "", words.split())
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, ImportError, FolderInUseError, FloatingPointError])
def test_user_error_ends_a_command_with_one_line_and_status_2(error, capsys, monkeypatch):
    def fail():
        raise error("what is wrong")

    with pytest.raises(SystemExit) as exit:
        run(fail)
    assert exit.value.code == 2 and capsys.readouterr().err == "error: what is wrong\n"
    monkeypatch.setenv("PIXELREPA_TRACEBACK", "1")
    with pytest.raises(error, match="what is wrong"):
        run(fail)


def test_process_count_of_the_launcher_is_checked(monkeypatch):
    check_launch(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch(2)
    with pytest.raises(ValueError, match="accelerate runs 1"):
        check_launch(1)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_cpu_launch_that_drops_processes_is_detected(monkeypatch, num_processes):
    words = (
        f"--cpu --num_processes {num_processes} --num_machines 1 --mixed_precision no --dynamo_backend no script.py"
    )
    _, environment = prepare_simple_launcher_cmd_env(launch_command_parser().parse_args(words.split()))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="asked for several") if num_processes > 1 else contextlib.nullcontext():
        check_launch(1)


def test_commands_show_no_loading_bars_without_a_terminal():
    transformers.utils.logging.enable_progress_bar()
    run(lambda: None)
    assert not transformers.utils.logging.is_progress_bar_enabled()
