"""A long training run, watched from outside: memory, open files, threads, disk and time per step must not grow.

    python tests/soak.py --steps 5000 --output_dir soak

The smallest preset at a width of 16, with a loader process, checkpoints, sample grids and online evaluation on, on any CPU in
minutes. Prints the figures and writes soak.png and soak.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from tiny import encoder, random_images, reference_of
from training_runs import ROOT, arguments, write_images


UNITS = {
    "memory": "MiB",
    "open files": "",
    "threads": "",
    "disk": "MiB",
    "step time": "ms",  # on the clock, checkpoints, samples and evaluations left out
    "processor time per step": "ms",  # all included; other work on the machine changes the clock, but hardly this
}


def rows(journal: Path) -> list[dict]:
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def watch(command: list[str], run: Path, log: Path, steps: int, batch_size: int) -> dict[str, list]:
    """Runs `command` and returns for each quantity pairs (step, value) of its main process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    series: dict[str, list[tuple[int, float]]] = {name: [] for name in UNITS}
    marks: list[tuple[int, float]] = []
    with log.open("w") as output:
        training = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=output, stderr=output)
        while training.poll() is None:
            time.sleep(0.5)
            found = rows(run / "metrics.jsonl")
            if not found:
                continue
            step = found[-1]["step"]
            try:
                main = psutil.Process(training.pid)
                used = main.cpu_times()
                sample = {
                    "memory": main.memory_info().rss / 2**20,
                    "open files": main.num_fds(),
                    "threads": main.num_threads(),
                    "disk": sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) / 2**20,
                }
            except (psutil.NoSuchProcess, FileNotFoundError):  # a file was renamed, or the run has ended, meanwhile
                continue
            if training.poll() is not None:
                break
            for name, value in sample.items():
                series[name].append((step, value))
            if not marks or step >= marks[-1][0] + steps // 20:  # as often as all that is done now and then
                marks.append((step, 1000 * (used.user + used.system)))
    if training.returncode:
        raise RuntimeError(f"The run failed:\n{log.read_text()[-4000:]}")
    speeds = [(row["step"], row["images_per_second"]) for row in rows(run / "metrics.jsonl") if "loss" in row]
    series["step time"] = [(step, 1000 * batch_size / speed) for step, speed in speeds]
    series["processor time per step"] = [
        (step, (used - used_before) / (step - before))
        for (before, used_before), (step, used) in itertools.pairwise(marks)
    ]
    return series


def figures(points: list[tuple[int, float]], steps: int) -> dict[str, float]:
    """Medians of the first and of the last third after a tenth of warm-up, and the slope of a line through both."""
    step, value = np.array([point for point in points if point[0] > steps / 10], dtype=float).T
    start, length = steps / 10, (steps - steps / 10) / 3
    return {
        "first third": float(np.median(value[step <= start + length])),
        "last third": float(np.median(value[step > steps - length])),
        "per 1000 steps": float(np.polyfit(step / 1000, value, 1)[0]),
        "maximum": float(value.max()),
    }


def draw(path: Path, series: dict, steps: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), layout="constrained")
    for axis, (name, points) in zip(figure.subplots(3, 2).flat, series.items(), strict=True):
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set_title(f"{name} [{UNITS[name]}]" if UNITS[name] else name)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("optimizer step")
        axis.axvspan(0, steps / 10, alpha=0.1)
        axis.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)


def soak(output_dir: Path, steps: int) -> dict[str, dict[str, float]]:
    """Trains, writes soak.png and soak.json, and returns the figures of each quantity."""
    output_dir.mkdir(parents=True)
    data = write_images(output_dir / "data")
    reference_of(encoder(), random_images(40)).save(output_dir / "reference.npz")  # of which images does not matter
    words = arguments(
        data,
        output_dir / "run",
        max_train_steps=steps,
        lr_warmup_steps=100,
        learning_rate=1e-4,
        logging_steps=max(1, steps // 200),
        checkpointing_steps=max(1, steps // 40),
        checkpoints_total_limit=2,
        validation_steps=max(1, steps // 20),
        eval_steps=max(1, steps // 20),
        eval_reference=output_dir / "reference.npz",
        eval_num_samples=24,
        eval_inference_steps=3,
        eval_image_size=28,
        dataloader_num_workers=1,
        report_to="tensorboard",
    )
    command = [sys.executable, str(ROOT / "training/train_pixelrepa.py"), *words]
    series = watch(command, output_dir / "run", output_dir / "log.txt", steps, batch_size=4)
    draw(output_dir / "soak.png", series, steps)
    report = {name: figures(points, steps) for name, points in series.items()}
    (output_dir / "soak.json").write_text(json.dumps({"figures": report, "series": series}, indent=1))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="New; receives the run, soak.png and soak.json."
    )
    args = parser.parse_args()
    started = time.perf_counter()
    report = soak(args.output_dir.resolve(), args.steps)
    print("| | first third | last third | per 1000 steps | maximum |\n|---|---|---|---|---|")
    for name, row in report.items():
        print(f"| {name} {UNITS[name]} | " + " | ".join(f"{value:.4g}" for value in row.values()) + " |")
    print(f"{args.steps} steps, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
