"""Two training runs at the same time in one folder: the second is refused, and the first continues."""

import os
import subprocess
import sys

from training_runs import ROOT


TWO_RUNS = """
import os, signal, sys
from pathlib import Path
from training_runs import arguments, ended, fork, train, write_images

folder = Path(sys.argv[1])
data, run = write_images(folder / "images"), folder / "run"
words = arguments(data, run, max_train_steps=100_000, checkpointing_steps=5, resume_from_checkpoint="latest")

def wait_for_checkpoints(number):
    while len(list(run.glob("checkpoint-*"))) < number:
        assert ended(first, 0.05) is None, (folder / "first").read_text()

first = fork(lambda: train(words), folder / "first")
wait_for_checkpoints(1)
assert ended(fork(lambda: train(words), folder / "second"), 60) == 1
assert f"Another run is writing to {run}" in (folder / "second").read_text()
wait_for_checkpoints(len(list(run.glob("checkpoint-*"))) + 1)
os.kill(first, signal.SIGTERM)
assert ended(first, 60) == 128 + signal.SIGTERM
assert "Stopped by SIGTERM" in (folder / "first").read_text()
"""


def test_second_run_in_one_folder_is_refused_and_the_first_continues(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    command = [sys.executable, "-c", TWO_RUNS, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
