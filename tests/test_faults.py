"""A short form of kill_matrix.py: what faults leave is whole, and a restart ends like an undisturbed run."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_killed_stopped_and_starved_runs_leave_nothing_broken_and_end_like_undisturbed_ones(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("kill_matrix.py")), str(tmp_path / "matrix")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, "--trials", "12"], env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-4000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["trials"] == 12
    assert sum(sum(row.values()) for row in report["table"].values()) == 12
