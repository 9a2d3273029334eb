"""Measure everything that needs a GPU with one command; without one, a small version of every stage.

    python benchmarks/gpu_report.py                              # all stages, each at most ten minutes
    python benchmarks/gpu_report.py --stages training sampling   # some of them; measured cells are kept
    python benchmarks/gpu_report.py --docs                       # write the report into docs/performance.md

Stages consist of cells. Each is written to report.json as soon as it is measured, so a stage that is interrupted, or that
reaches `--minutes`, continues with its next cell when it is run again.

- *tests*: the tests marked `gpu`.
- *host*: CPU time per training step at the depth of JiT-B/16 with adapter and teacher, but width 8 and one image of four
  tokens, which takes the device's work away; and CPU time of the draws of a batch of 128 without pixels.
- *training*: images/s, memory and MFU of the trainer's step and of the published arithmetic.
- *sampling*: images/s of the pipeline and of the published way.
- *images*: a run on `--train_data_dir` (without it, random pictures), killed after its first checkpoint and resumed.
- *demo*: the digits demo with five seeds, and its ablation.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import sampling
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

import training
from pixelrepa_diffusers.cli import flag, parse, run
from pixelrepa_diffusers.ema import ConstantDecayEMA
from pixelrepa_diffusers.files import write_atomically, write_json
from pixelrepa_diffusers.sampling import device_name, versions
from pixelrepa_diffusers.teacher import SemanticTeacher
from pixelrepa_diffusers.training.arguments import TrainingArguments
from pixelrepa_diffusers.training.builders import (
    apply_switches,
    build_objective,
    build_optimizer,
    build_projector,
    build_transformer,
)
from pixelrepa_diffusers.training.draws import BatchDraws
from pixelrepa_diffusers.training.step import PreparedBatches, take_step


ROOT = Path(__file__).parent.parent
DEVICE, ON_GPU = training.DEVICE, training.DEVICE.type == "cuda"
STAGES = ("tests", "host", "training", "sampling", "images", "demo")
PAGE, DOCS = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance"
BEGIN, END = "<!-- written by benchmarks/gpu_report.py --docs -->\n", "<!-- end -->"


@dataclass
class ReportArguments:
    stages: list[str] = flag(list(STAGES), "Stages to run.", choices=list(STAGES))
    cells: str = flag("", "Only cells whose name matches this regular expression.")
    minutes: float = flag(9.5, "A stage starts no cell after this many minutes.", gt=0)
    train_data_dir: Path | None = flag(None, "Image folder of the images stage.")
    image_steps: int = flag(4000 if ON_GPU else 20, "Steps of the images stage.", ge=4)
    docs: bool = flag(False, "Only write what was measured into docs/performance.md.")
    output_dir: Path = flag(Path("outputs/gpu_report"), "Receives report.json, the plots, and the runs.")


def gpu_tests(args: ReportArguments) -> dict[str, Callable[[], dict]]:
    def test() -> dict:
        file = args.output_dir.absolute() / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={file}", "tests"]
        subprocess.run(command, cwd=ROOT, stdout=(args.output_dir / "tests.log").open("w"))
        suite = next(ElementTree.parse(file).iter("testsuite"))
        return {name: int(suite.get(name)) for name in ("tests", "skipped", "failures", "errors")}

    return {"marked gpu": test}


def host_work(args: ReportArguments) -> dict[str, Callable[[], dict]]:
    cells = {
        "step, eager": host_of_a_step,
        "step, compiled": lambda: host_of_a_step(compile=True),
        "draws of 128 images": host_of_draws,
    }
    if ON_GPU:
        cells["step, CUDA graphs"] = lambda: host_of_a_step(compile=True, cuda_graphs=True)
    return cells


def host_of_a_step(steps: int = 20, **switches: bool) -> dict:
    """Median CPU milliseconds of the trainer's `take_step` with the launches; on a CPU also the toy kernels."""
    precision = "bf16" if ON_GPU else "no"  # CPUs without bf16 units emulate it
    args = TrainingArguments(
        preset="JiT-B/16", num_attention_heads=1, attention_head_dim=8, bottleneck_dim=2, resolution=32,
        in_context_len=1, train_batch_size=1, mixed_precision=precision, **switches,
    )  # fmt: skip
    transformer = build_transformer(args, 10)
    config = transformer.config
    encoder = Dinov2Model(Dinov2Config(hidden_size=4, num_attention_heads=1, image_size=28))
    mean_and_std = (training.IMAGENET_MEAN, training.IMAGENET_STD)
    teacher = SemanticTeacher(encoder, config.sample_size // config.patch_size, config.sample_size, *mean_and_std)
    objective = build_objective(args, transformer, build_projector(args, config, teacher.feature_dim))
    apply_switches(args, objective)
    teacher.to(DEVICE)
    if args.compile:
        teacher.compile()
    accelerator = Accelerator(mixed_precision=precision, cpu=not ON_GPU)
    objective, optimizer = accelerator.prepare(objective, build_optimizer(args, objective, 1e-4))
    ema = ConstantDecayEMA(transformer)
    loader = training.RepeatedBatch(1, config.sample_size, config.num_classes, seed=0)
    draw = BatchDraws.from_arguments(args, config)
    batches = PreparedBatches(args, loader, draw, lambda pixels, batch: teacher(pixels), 0, DEVICE)
    step = 0

    def take() -> None:
        nonlocal step
        take_step(args, accelerator, objective, optimizer, ema, batches, step, False)
        step += 1

    return {"host ms": cpu_milliseconds(take, steps)}


def host_of_draws() -> dict:
    index = torch.arange(128, device=DEVICE)
    draw = BatchDraws(0, 1000, 256, -0.8, 0.8, 0.1, 0.2)
    return {"host ms": cpu_milliseconds(lambda: draw(0, index, index, torch.Size((3, 1, 1))), 20)}


def cpu_milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median CPU time of this process on one core, after three calls that warm up."""
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for _ in range(3 + repeats):
        training.synchronize(DEVICE)  # an empty queue never blocks the host
        begin = time.process_time()
        function()
        seconds.append(time.process_time() - begin)
    torch.set_num_threads(threads)
    return 1000 * statistics.median(seconds[3:])


def training_steps(args: ReportArguments) -> dict[str, Callable[[], list[dict]]]:
    cells = {}
    presets, batch_sizes = (("JiT-B/16", "JiT-L/16"), (128, 32, 64, 256)) if ON_GPU else (("JiT-Digits/4",), (4,))
    for preset in presets:
        for batch_size in batch_sizes:
            for teacher, checkpointing in (("random", "no"), ("none", "no"), ("none", "yes")):
                for compiled in ("graphs", "ours", "no") if ON_GPU else ("no",):
                    options = training.BenchmarkArguments(
                        presets=[preset], batch_sizes=[batch_size], num_classes=[1000 if ON_GPU else 10],
                        mixed_precision=["bf16" if ON_GPU else "no"], gradient_checkpointing=[checkpointing],
                        compile=[compiled], teacher=teacher, memory="yes" if ON_GPU else "no",
                        num_rounds=3 if ON_GPU else 1,
                    )  # fmt: skip
                    name = f"{preset}, batch {batch_size}, {'with' if teacher == 'random' else 'no'} teacher"
                    name += ", checkpointed" * (checkpointing == "yes") + ", compiled" * (compiled == "ours")
                    name += ", CUDA graphs" * (compiled == "graphs")
                    cells[name] = lambda options=options: training.measure_all(options)
    return cells


def sampling_speed(args: ReportArguments) -> dict[str, Callable[[], list[dict]]]:
    def measure(options: sampling.BenchmarkArguments) -> list[dict]:
        try:
            return sampling.measure_speed(options, sampling.build_pipeline(options))
        finally:
            torch._dynamo.reset()

    cells = {}
    for batch_size in (16, 1, 64) if ON_GPU else (2,):
        modes = {"eager": {}, "compiled": {"compile": "ours"}, "CUDA graphs": {"cuda_graphs": True}}
        for mode, switches in modes.items() if ON_GPU else [("eager", {})]:
            options = sampling.BenchmarkArguments(
                preset="JiT-B/16" if ON_GPU else "JiT-Digits/4", batch_size=batch_size, num_rounds=3 if ON_GPU else 1,
                num_inference_steps=50 if ON_GPU else 4, dtype="bfloat16" if ON_GPU else "float32", **switches,
            )  # fmt: skip
            cells[f"{options.preset}, batch {batch_size}, {mode}"] = lambda options=options: measure(options)
    return cells


def image_run(args: ReportArguments) -> dict[str, Callable[[], dict]]:
    def train() -> dict:
        folder, data = args.output_dir / "images", args.train_data_dir
        if data is None:
            data = args.output_dir / "pictures"
            write_pictures(data)
        command = [
            "training/train_pixelrepa.py", "--train_data_dir", data.absolute(), "--output_dir", folder.absolute(),
            "--preset", "JiT-B/16" if ON_GPU else "JiT-Digits/4", "--objective", "none", "--patch_size", 4,
            "--resolution", 64 if ON_GPU else 16, "--train_batch_size", 128 if ON_GPU else 8,
            "--max_train_steps", args.image_steps, "--lr_warmup_steps", args.image_steps // 10, "--ema_decays", 0.999,
            "--checkpointing_steps", args.image_steps // 4, "--validation_steps", args.image_steps,
            "--validation_inference_steps", 50 if ON_GPU else 4, "--logging_steps", max(1, args.image_steps // 40),
            "--mixed_precision", "bf16" if ON_GPU else "no", "--compile", ON_GPU, "--report_to", "none",
            "--dataloader_num_workers", 8 if ON_GPU else 0, "--resume_from_checkpoint", "latest",
        ]  # fmt: skip
        command = [sys.executable, *map(str, command)]
        with (args.output_dir / "images.log").open("a") as log:
            killed = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            while killed.poll() is None and not list(folder.glob("checkpoint-*/progress.json")):
                time.sleep(0.05)
            killed.kill()
            killed.wait()
            resumed = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode
        shutil.copy(max(folder.glob("samples/step-*.png")), args.output_dir / "images_samples.png")
        shutil.copy(folder / "curves.png", args.output_dir / "images_curves.png")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return {
            "killed": killed.returncode < 0,
            "resumed": resumed == 0,
            "steps": rows[-1]["step"],
            "denoising loss, first": rows[0]["denoising_loss"],
            "last": rows[-1]["denoising_loss"],
            "images/s": statistics.median(row["images_per_second"] for row in rows),
        }

    return {"killed and resumed": train}


def write_pictures(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for label in range(2):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        for index in range(64):
            colours = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(colours).resize((64, 64)).save(folder / f"class{label}" / f"{index}.png")


def demo_runs(args: ReportArguments) -> dict[str, Callable[[], dict]]:
    folder, small = args.output_dir.absolute() / "demo", [] if ON_GPU else ["--max_train_steps", "4"]

    def script(*words) -> None:
        with (args.output_dir / "demo.log").open("a") as log:
            subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, stdout=log, stderr=log, check=True)

    def one(seed: int) -> dict:
        if not (folder / "teacher").exists():
            steps = [] if ON_GPU else ["--steps", 2]
            script("examples/digits/prepare_teacher.py", "--output_dir", folder, *steps)
        data = ["--train_data_dir", folder / "train", "--teacher_model_name_or_path", folder / "teacher"]
        output = ["--output_dir", folder / f"run{seed}", "--seed", seed, "--resume_from_checkpoint", "latest"]
        script("training/train_pixelrepa.py", "--config", "training/configs/digits.yaml", *data, *output, *small)
        count = [] if ON_GPU else ["--num_images", 10, "--num_inference_steps", 2]
        run = folder / f"run{seed}"
        script("examples/digits/score_digits.py", "--pipeline", run / "pipeline", "--data_dir", folder, *count)
        return json.loads((run / "scores.json").read_text())["guidance 2"]

    def ablation() -> dict:
        script("examples/digits/run_ablation.py", "examples/digits/ablation.yaml")
        return {"finished": True}

    cells = {f"seed {seed}": lambda seed=seed: one(seed) for seed in range(5 if ON_GPU else 1)}
    return cells | ({"ablation": ablation} if ON_GPU else {})


CELLS = dict(zip(STAGES, (gpu_tests, host_work, training_steps, sampling_speed, image_run, demo_runs), strict=True))


def measure(args: ReportArguments) -> dict:
    """Measure the cells that report.json lacks; one of another device is replaced."""
    file, report = args.output_dir / "report.json", {}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if file.exists():
        report = json.loads(file.read_text(encoding="utf-8"))
    about = {"device": device_name(DEVICE), "cores": os.cpu_count(), "versions": versions()}
    if {name: report.get(name) for name in about} != about:
        report = {**about, "stages": {}}
    for stage in args.stages:
        started, done = time.perf_counter(), report["stages"].setdefault(stage, {})
        for name, cell in CELLS[stage](args).items():
            if name in done or not re.search(args.cells, name):
                continue
            if time.perf_counter() - started > 60 * args.minutes:
                print(f"{stage}: run it again for the cells from {name!r} on.")
                break
            print(f"{stage}: {name}", flush=True)
            begin = time.perf_counter()
            rows = cell()
            done[name] = {"seconds": time.perf_counter() - begin, "rows": rows if isinstance(rows, list) else [rows]}
            # Above the number of cores, the machine was busy.
            report |= {"date": date.today().isoformat(), "load_average": round(os.getloadavg()[0], 1)}
            write_json(file, report)
    return report


def plot(report: dict, folder: Path) -> None:
    """A bar chart of images/s for each stage that has them."""
    for stage, cells in report["stages"].items():
        bars = {}
        for name, cell in cells.items():
            for row in cell["rows"]:
                rate = row.get("images/s") or (1 / row["s/image"] if "s/image" in row else None)
                if rate is not None:
                    bars[f"{name} ({row['arithmetic']})" if "arithmetic" in row else name] = rate
        if bars:
            figure = Figure(figsize=(9, 1 + 0.25 * len(bars)), layout="constrained")
            axis = figure.subplots()
            axis.barh(list(bars), list(bars.values()))
            axis.invert_yaxis()
            axis.set_xlabel("images/s")
            axis.set_title(f"{stage}, {report['device']}")
            write_atomically(folder / f"{stage}.png", lambda path, figure=figure: figure.savefig(path, format="png"))


COLUMNS = (
    "arithmetic", "host ms", "images/s", "s/image", "GiB", "MFU", "ratio", "tests", "skipped", "failures", "errors",
    "killed", "resumed", "steps", "denoising loss, first", "last", "recognised",
    "precision (k=3)", "recall (k=3)", "reason",
)  # fmt: skip


def render(report: dict) -> str:
    """The report in Markdown."""
    libraries = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    machine = f"{report['device']} ({report['cores']} CPU cores, load average {report['load_average']})"
    lines = [f"Measured on {machine}, {report['date']}; {libraries}.", ""]
    for stage in [name for name in STAGES if report["stages"].get(name)]:
        cells = report["stages"][stage]
        rows = [{"cell": name, **row} for name, cell in cells.items() for row in cell["rows"]]
        columns = ["cell", *(name for name in COLUMNS if any(row.get(name) is not None for row in rows))]
        lines += [f"**{stage}**", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for row in rows:
            values = ("" if (value := row.get(name)) is None else value for name in columns)
            texts = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in values)
            lines.append(f"| {' | '.join(texts)} |")
        lines.append("")
    return "\n".join(lines)


def write_docs(report: dict, folder: Path) -> None:
    """Replace the part of docs/performance.md between the markers; copy the report and its plots beside it."""
    DOCS.mkdir(exist_ok=True)
    for file in (folder / "report.json", *folder.glob("*.png")):
        shutil.copy(file, DOCS)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    text = f"{before}{BEGIN}{render(report)}{END}{rest.partition(END)[2]}"
    write_atomically(PAGE, lambda path: path.write_text(text, encoding="utf-8"))


def main(args: ReportArguments) -> dict:
    if args.docs:
        report = json.loads((args.output_dir / "report.json").read_text(encoding="utf-8"))
        write_docs(report, args.output_dir)
        return report
    report = measure(args)
    plot(report, args.output_dir)
    print(render(report))
    return report


if __name__ == "__main__":
    run(lambda: main(parse(ReportArguments, __doc__.partition("\n")[0])))
