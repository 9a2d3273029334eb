"""Tiny real training runs for the tests: data, teacher and arguments; and, run as a script, a run that is killed.

    python tests/training_runs.py FOLDER TRIALS SEED

forks TRIALS children that train the same run, each killed by SIGKILL at a random moment and resumed by the next, until one
finishes, over and over; prints a JSON report. Forking after the imports makes a trial cost what it trains.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image


ROOT = Path(__file__).parent.parent
TRAINER = "training/train_pixelrepa.py"
TEACHER = Path(__file__).parent / "fixtures" / "reference_a" / "teacher"


def load_script(path: str) -> ModuleType:
    """A script of the repository as a module, found as Python finds it: with its own folder first on the path."""
    file = ROOT / path
    if file.stem not in sys.modules:
        specification = importlib.util.spec_from_file_location(file.stem, file)
        sys.modules[file.stem] = module = importlib.util.module_from_spec(specification)
        sys.path.insert(0, str(file.parent))
        try:
            specification.loader.exec_module(module)
        finally:
            sys.path.remove(str(file.parent))
    return sys.modules[file.stem]


def write_images(folder: Path, classes: int = 3, per_class: int = 8, size: int = 20) -> Path:
    """An image folder of random PNG files."""
    draw = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(per_class):
            pixels = draw.integers(0, 256, (size, size + label, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{index}.png")
    return folder


def arguments(data: Path, output_dir: Path, **overrides) -> list[str]:
    """The command line of a run of seconds."""
    values = {
        "train_data_dir": data,
        "output_dir": output_dir,
        "preset": "JiT-Digits/4",
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "bottleneck_dim": 8,
        "in_context_len": 2,
        "in_context_start": 1,
        "adapter_layers": 1,
        "teacher_model_name_or_path": TEACHER,
        "train_batch_size": 4,
        "max_train_steps": 6,
        "learning_rate": 1e-2,
        "lr_warmup_steps": 2,
        "ema_decays": [0.9, 0.5],
        "checkpointing_steps": 3,
        "validation_steps": 0,
        "num_validation_images": 4,
        "validation_inference_steps": 2,
        "logging_steps": 2,
        "dataloader_num_workers": 0,
        "report_to": "none",
        **overrides,
    }
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def weights(checkpoint: Path) -> dict:
    """Every tensor of a checkpoint, the optimizer's included, by a readable name."""
    import torch
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted(checkpoint.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors[f"{file.parent.name}.{name}"] = tensor
    state = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    for index, entries in state.items():
        tensors.update({f"optimizer.{index}.{name}": value for name, value in entries.items()})
    return tensors


def assert_equal(one: dict, other: dict) -> None:
    """Of what `weights` gives: the same names, and the same bits."""
    import torch

    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def fork(task: Callable[[], object], log: Path) -> int:
    """Runs `task` on the CPU in a child that leads a process group of its own and appends what it prints to `log`."""
    import torch

    child = os.fork()
    if child:
        with contextlib.suppress(PermissionError, ProcessLookupError):  # it has done so itself, or is gone
            os.setpgid(child, child)
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        # Neither the threads nor a GPU of the parent live on in a child.
        torch.set_num_threads(1)
        os.environ["ACCELERATE_USE_CPU"] = "true"
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job started with & would ignore it
        sys.stdout = sys.stderr = log.open("a", buffering=1)  # of Python
        os.dup2(sys.stdout.fileno(), 1)  # and of everything else
        os.dup2(sys.stdout.fileno(), 2)
        task()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child: int, seconds: float) -> int | None:
    """The exit status of a child (negative: the signal that ended it), None when it still runs after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def train(words: list[str]) -> None:
    main = load_script(TRAINER).main

    from pixelrepa_diffusers.training.arguments import parse_arguments

    main(parse_arguments(words))


def two_process_command(script: Path, words: list[str]) -> tuple[list[str], dict[str, str]]:
    """(command, environment) that start a script on two CPU processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "training/accelerate/cpu_2processes.yaml"), "--main_process_port", "0", str(script), *words]
    return command, {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launch_two(script: Path, words: list[str], record: Path) -> None:
    """Runs a script on two CPU processes; `record` is the JSON file in which it says how many they were."""
    command, environment = two_process_command(script, words)
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-4000:]
    num_processes = json.loads(record.read_text())["num_processes"]
    assert num_processes == 2, (
        f"{script.name} was to run on 2 processes and ran on {num_processes}:\n{run.stderr[-4000:]}"
    )


def kill_trials(folder: Path, trials: int, seed: int) -> dict:
    load_script(TRAINER)  # the children inherit the imports

    draw = random.Random(seed)
    data = write_images(folder / "data")

    def words(output_dir: Path) -> list[str]:
        return arguments(
            data,
            output_dir,
            max_train_steps=12,
            checkpointing_steps=2,
            checkpoints_total_limit=2,
            resume_from_checkpoint="latest",
        )

    log = folder / "log.txt"
    started = time.perf_counter()
    assert ended(fork(lambda: train(words(folder / "undisturbed")), log), 300) == 0, log.read_text()
    duration = time.perf_counter() - started

    kills, finishes, run = 0, [], 0
    while kills < trials or not finishes:
        output_dir = folder / f"run{run}"
        child = fork(lambda output_dir=output_dir: train(words(output_dir)), log)
        status = ended(child, draw.uniform(0.1, 1.0) * duration if kills < trials else 300)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
        elif status == 0:
            finishes.append(str(output_dir))
            run += 1
        else:
            raise RuntimeError(f"A resumed run failed:\n{log.read_text()[-4000:]}")
    return {"kills": kills, "finished_runs": finishes, "undisturbed": str(folder / "undisturbed"), "seconds": duration}


if __name__ == "__main__":
    print(json.dumps(kill_trials(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
