"""Tiny real training runs: data, teacher, arguments, processes; and, as a script, a run that is killed again and again.

python tests/training_runs.py FOLDER TRIALS SEED
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

from pixelrepa_diffusers.cli import as_words
from pixelrepa_diffusers.training.arguments import parse_arguments
from pixelrepa_diffusers.training.checkpoints import read_tensors


ROOT = Path(__file__).parent.parent
TRAINER = "training/train_pixelrepa.py"
TEACHER = Path(__file__).parent / "fixtures" / "reference_a" / "teacher"


def load_script(path: str) -> ModuleType:
    """Import a script of the repository as a module, with its own folder first on the path."""
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


SETTINGS = {  # of a run of seconds
    "preset": "JiT-Digits/4",
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "bottleneck_dim": 8,
    "in_context_len": 2,
    "in_context_start": 1,
    "adapter_layers": 1,
    "teacher_model_name_or_path": str(TEACHER),
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
}


def arguments(data: Path, output_dir: Path, **overrides) -> list[str]:
    return as_words({"train_data_dir": data, "output_dir": output_dir, **SETTINGS, **overrides})


def train(words: list[str]) -> None:
    load_script(TRAINER).main(parse_arguments(words))


def stopped(run: Path, copy: Path) -> Path:
    """A copy of a run of 6 steps, as if it had been stopped before its last checkpoint."""
    return shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoint-6"))


def read_metrics(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(checkpoint: Path) -> dict:
    """Every tensor of a checkpoint, the optimizer's included, by a readable name."""
    folders = sorted({file.parent for file in checkpoint.rglob("*.safetensors")})
    return {f"{folder.name}.{name}": value for folder in folders for name, value in read_tensors(folder).items()}


def assert_equal(one: dict, other: dict) -> None:
    """The same names and the same bits."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def write_manifest(checkpoint: Path) -> None:
    """Make the manifest match the files of an altered checkpoint."""
    from pixelrepa_diffusers.files import MANIFEST, _fingerprint

    names = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
    manifest = {name: _fingerprint(checkpoint / name) for name in names if name != MANIFEST}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def fork(task: Callable[[], object], log: Path) -> int:
    """Run `task` on the CPU in a child that leads its own process group and appends its output to `log`."""
    child = os.fork()
    if child:
        with contextlib.suppress(PermissionError, ProcessLookupError):  # the child has done so, or is gone
            os.setpgid(child, child)
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        # Neither the threads nor a GPU of the parent exist in a child.
        torch.set_num_threads(1)
        os.environ["ACCELERATE_USE_CPU"] = "true"
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        sys.stdout = sys.stderr = log.open("a", buffering=1)
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        task()
        status = 0
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child: int, seconds: float, condition: Callable[[], bool] = lambda: True) -> int | None:
    """
    Exit status of a child (negative: the signal that ended it), or None if it still runs after `seconds`, once the
    condition holds.
    """
    deadline = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline and condition():
            return None
        time.sleep(0.002)


def launch_two(script: Path, words: list[str], record: Path) -> None:
    """Run a script on two CPU processes; it writes their number to the JSON file `record`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "training/accelerate/cpu_2processes.yaml"), "--main_process_port", "0", str(script), *words]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-4000:]
    assert json.loads(record.read_text())["num_processes"] == 2, run.stderr[-4000:]


def in_two_processes(main: Callable, *args) -> None:
    """Call `main(*args)` in two CPU processes, forked: interpreters of their own would spend seconds on imports."""
    debug_launcher(_in_fork, args=(main, args), num_processes=2)


def _in_fork(main: Callable, args: tuple) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # forked from the parent, which has one process
    assert PartialState(cpu=True).num_processes == 2
    main(*args)


def train_in_fork(words: list[str], log: Path) -> None:
    """Train in a process of accelerate's `debug_launcher`, which forks; log lines go to `log`."""
    AcceleratorState._reset_state(reset_partial_state=True)  # forked from the parent, which has one process
    logging.getLogger().addHandler(logging.FileHandler(log))
    train(words)


def kill_trials(folder: Path, trials: int, seed: int) -> dict:
    """
    Kill forked runs by SIGKILL at random moments, every other one amid the writing of a checkpoint, and resume them, until
    `trials` kills and one finished run. Every finished run must equal an undisturbed one.
    """
    load_script(TRAINER)  # the children inherit the imports
    draw, data, log = random.Random(seed), write_images(folder / "data"), folder / "log.txt"

    def start(name: str) -> int:
        settings = {"max_train_steps": 6, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
        words = arguments(data, folder / name, **settings, resume_from_checkpoint="latest")
        return fork(lambda: train(words), log)

    started = time.perf_counter()
    assert ended(start("undisturbed"), 300) == 0, log.read_text()
    duration = time.perf_counter() - started

    def writing() -> bool:
        return any((folder / name).glob(".checkpoint-*.incomplete"))

    kills, kills_amid_writing, finished = 0, 0, []
    while kills < trials or not finished:
        name = f"run{len(finished)}"
        child = start(name)
        delay = draw.uniform(0.1, 1.0) * duration if kills < trials else 300
        status = ended(child, delay, writing if kills % 2 else lambda: True)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            kills_amid_writing += writing()
        else:
            assert status == 0, f"A resumed run failed:\n{log.read_text()[-4000:]}"
            finished.append(folder / name)
            assert_equal(weights(folder / "undisturbed/checkpoint-6"), weights(finished[-1] / "checkpoint-6"))
            assert not [path for path in finished[-1].rglob(".*") if path.name != ".lock"]
    return {"kills": kills, "kills_amid_writing": kills_amid_writing, "equal_runs": len(finished)}


if __name__ == "__main__":
    print(json.dumps(kill_trials(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
