"""Measure FID, Inception Score, precision, recall, FD-DINOv2 or a Fréchet distance in any teacher's space.

    accelerate launch pipelines/evaluate.py --pipeline FOLDER_OR_HUB_ID --metrics fid inception_score \\
        --inception_reference jit_in256_stats.npz --batch_size 128 --dtype bfloat16 --output_dir evaluation

Several values of a sampling flag make a sweep: one folder per cell, sweep.csv, sweep.json and plots. Run the same command
again after an interruption: finished cells are kept, a started one resumes after its last --chunk_size images.
"""

import contextlib
import csv
import hashlib
import itertools
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .. import JiTTransformer2DModel, PixelREPAPipeline
from ..cli import check_launch, flag, parse, run
from ..evaluation import (
    HIGHER_IS_BETTER,
    METRICS,
    InceptionNetwork,
    MakeImages,
    VisionEncoderNetwork,
    accumulate,
    file_images,
    finished_record,
    open_spaces,
    pipeline_images,
    results,
)
from ..files import only_writer, remove_incomplete, write_atomically, write_json
from ..hub import weights_sha256
from ..images import list_images, make_grid
from ..sampling import (
    DTYPES,
    SCHEDULERS,
    compile_transformer,
    describe_pipeline,
    device_name,
    fetch_pipeline,
    load_pipeline,
    transformer_folder,
    versions,
)


@dataclass
class EvaluateArguments:
    output_dir: Path = flag(help="Receives metrics.json and grid.png, or those of every cell and the sweep's tables.")
    pipeline: str | None = flag(None, "Saved pipeline or training checkpoint (checkpoint-N), or a Hub id.")
    revision: str | None = flag(None, "Branch, tag or commit of a Hub id.")
    images: str | None = flag(
        None, "Instead of a pipeline: a folder of images (grid.png is skipped), or a pattern such as out/0*.png."
    )

    metrics: list[str] = flag(["fid", "inception_score"], "Metrics to compute.", choices=list(METRICS))
    inception_weights: str | None = flag(None, "torch-fidelity's Inception weights; downloaded by default.")
    inception_reference: str | None = flag(None, "Reference statistics of fid and precision_recall.")
    dinov2: str = flag("facebook/dinov2-large", "Network of the dinov2 metrics.")
    dinov2_reference: str | None = flag(None, "Reference statistics of the dinov2 metrics.")
    teacher: str | None = flag(None, "Network of the teacher metrics: folder or Hub id of any vision encoder.")
    teacher_reference: str | None = flag(None, "Reference statistics of the teacher metrics.")
    teacher_image_size: int = flag(224, "Side that images are resized to for the teacher.", ge=1)
    teacher_pooling: str = flag("class", "Teacher feature: class token or mean patch.", choices=["class", "patches"])

    num_samples: int | None = flag(
        None, "Number of images, a multiple of the classes. Default: 50000, or all of --images.", ge=1
    )
    seed: int = flag(0, "Image i starts from the noise of seed + i.")
    transformers: list[str] | None = flag(None, "Transformer folders to sample instead, e.g. a checkpoint's EMAs.")
    schedulers: list[str] | None = flag(None, "Replace the saved scheduler.", choices=list(SCHEDULERS))
    num_inference_steps: list[int] | None = flag(None, "Sampling steps. Default: 50.", ge=1)
    guidance_scales: list[float] | None = flag(None, "Default: the saved scale.")
    guidance_intervals: list[str] | None = flag(None, "LOW:HIGH, guide where LOW < t < HIGH. Default: as saved.")
    self_guidance_scales: list[float] | None = flag(None, "Scales of the guidance head. Default: the saved scale.")
    self_guidance_intervals: list[str] | None = flag(None, "LOW:HIGH, likewise. Default: as saved.")
    autoguidance_scales: list[float] | None = flag(None, "Scales of the second transformer. Default: the saved scale.")
    guidance_transformer: str | None = flag(None, "Folder of a second transformer, for autoguidance.")

    dtype: str = flag("float32", "Data type of the transformer.", choices=DTYPES)
    compile: bool = flag(False, "Compile the transformer's blocks.")
    batch_size: int = flag(64, "Images per batch and process.", ge=1)
    chunk_size: int = flag(5000, "Images between saves of a started evaluation.", ge=1)
    max_grid_images: int = flag(64, "First images, drawn to grid.png; 0 for no grid.", ge=0)
    overwrite: bool = flag(False, "Measure again what --output_dir already holds.")


SAMPLING = (
    "transformers", "schedulers", "num_inference_steps", "guidance_scales", "guidance_intervals", "revision",
    "self_guidance_scales", "self_guidance_intervals", "autoguidance_scales", "guidance_transformer",
)  # fmt: skip
AXES = (
    "transformer", "scheduler", "num_inference_steps", "guidance_interval", "guidance_scale",
    "self_guidance_interval", "self_guidance_scale", "autoguidance_scale",
)  # fmt: skip
SHORT_NAMES = ("", "", "steps-", "interval-", "guidance-", "self-interval-", "self-", "auto-")


@dataclass(frozen=True)
class Cell:
    """One combination of a sweep. `transformer` and `scheduler` are None for the pipeline's own."""

    transformer: str | None
    scheduler: str | None
    num_inference_steps: int
    guidance_interval: tuple[float, float]
    guidance_scale: float
    self_guidance_interval: tuple[float, float] = (0.0, 1.0)
    self_guidance_scale: float = 0.0
    autoguidance_scale: float = 1.0

    def labels(self) -> dict[str, str]:
        """Position on each axis, as a text."""
        intervals = (self.guidance_interval, self.self_guidance_interval)
        interval, self_interval = (f"{low:g}-{high:g}" for low, high in intervals)
        return {
            "transformer": "-".join(Path(self.transformer).resolve().parts[-2:]) if self.transformer else "own",
            "scheduler": self.scheduler or "own",
            "num_inference_steps": str(self.num_inference_steps),
            "guidance_interval": interval,
            "guidance_scale": f"{self.guidance_scale:g}",
            "self_guidance_interval": self_interval,
            "self_guidance_scale": f"{self.self_guidance_scale:g}",
            "autoguidance_scale": f"{self.autoguidance_scale:g}",
        }

    def model_guidance(self) -> dict[str, Any]:
        """Settings of self-guidance and autoguidance where they apply; evaluations without them name none."""
        settings = {}
        if self.self_guidance_scale != 0:
            settings["self_guidance_scale"] = float(self.self_guidance_scale)
            settings["self_guidance_interval"] = list(self.self_guidance_interval)
        if self.autoguidance_scale != 1:
            settings["autoguidance_scale"] = float(self.autoguidance_scale)
        return settings

    def name(self, axes: Sequence[str]) -> str:
        """Short name by the given axes, such as "heun_steps-50_guidance-1.5"."""
        parts = zip(AXES, SHORT_NAMES, self.labels().values(), strict=True)
        return "_".join(short + label for axis, short, label in parts if axis in axes)


def main(args: EvaluateArguments) -> list[dict[str, Any]]:
    """Measure and return the metrics.json of every cell, in the order of the sweep."""
    accelerator = Accelerator()
    check_launch(accelerator.num_processes)
    if (args.pipeline is None) == (args.images is None):
        raise ValueError("Give either --pipeline or --images.")
    if args.pipeline is not None:
        num_samples = args.num_samples or 50_000
        plan = describe_pipeline(args.pipeline, args.revision, args.guidance_transformer)
        cells = plan_cells(args, plan, num_samples)
    else:
        if given := [name for name in SAMPLING if getattr(args, name) is not None]:
            raise ValueError(f"--{given[0]} concerns sampling and has no effect on --images.")
        paths = [path for path in list_images(args.images) if path.name != "grid.png"]
        num_samples = args.num_samples or len(paths)
        if num_samples > len(paths):
            raise ValueError(f"--num_samples {num_samples}: there are {len(paths)} images at {args.images}.")
        paths = paths[:num_samples]
        make_images = file_images(paths)

    evaluator = Evaluator(args, accelerator, num_samples)
    with only_writer(args.output_dir) if accelerator.is_main_process else contextlib.nullcontext():
        if args.pipeline is not None:
            return measure_cells(args, evaluator, plan, cells)
        listing = [(path.name, path.stat().st_size) for path in paths]
        source = {
            "images": Path(args.images).name,
            "listing_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),  # names and sizes
        }
        record = evaluator.measure(args.output_dir, make_images, source)
        accelerator.print(json.dumps(record["metrics"], indent=1))
        return [record]


def plan_cells(args: EvaluateArguments, plan: PixelREPAPipeline, num_samples: int) -> list[Cell]:
    """All combinations, each checked against the pipeline's description before any weights are read."""

    def intervals(name: str) -> list[tuple[float, float]]:
        texts = getattr(args, f"{name}s")
        return [tuple(plan.config[name])] if texts is None else [parse_interval(f"{name}s", text) for text in texts]

    combinations = itertools.product(
        args.transformers or [None],
        args.schedulers or [None],
        args.num_inference_steps or [50],
        intervals("guidance_interval"),
        args.guidance_scales or [plan.config.guidance_scale],
        intervals("self_guidance_interval"),
        args.self_guidance_scales or [plan.config.self_guidance_scale],
        args.autoguidance_scales or [plan.config.autoguidance_scale],
    )
    cells = [Cell(*values) for values in combinations]
    names = [cell.name(AXES) for cell in cells]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"The sweep has {repeated[0]} more than once: give each value once.")
    for cell in cells:
        cell_images(plan, num_samples, args.seed, cell)
    own = plan.transformer.config
    for folder in args.transformers or []:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"--transformers: there is no folder {folder}.")
        config = JiTTransformer2DModel.load_config(folder)
        for name in ("num_classes", "sample_size", "in_channels", "noise_scale"):
            if config[name] != own[name]:
                raise ValueError(
                    f"--transformers: {folder} has {name} {config[name]}, the pipeline's transformer has {own[name]}."
                )
    return cells


def cell_images(pipe: PixelREPAPipeline, num_samples: int, seed: int, cell: Cell) -> MakeImages:
    return pipeline_images(
        pipe,
        num_samples,
        seed,
        cell.num_inference_steps,
        cell.guidance_scale,
        cell.guidance_interval,
        self_guidance_scale=cell.self_guidance_scale,
        self_guidance_interval=cell.self_guidance_interval,
        autoguidance_scale=cell.autoguidance_scale,
    )


def parse_interval(name: str, text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise ValueError(f"--{name}: {text!r} is not LOW:HIGH, such as 0.1:1.0.") from None
    return low, high


class Evaluator:
    """Feature networks, references and settings that all cells share."""

    def __init__(self, args: EvaluateArguments, accelerator: Accelerator, num_samples: int):
        if args.teacher is None and any(METRICS[metric][0] == "teacher" for metric in args.metrics):
            raise ValueError("A metric in the teacher's space needs --teacher.")
        self.args, self.accelerator, self.num_samples = args, accelerator, num_samples
        references = {name: getattr(args, f"{name}_reference") for name in ("inception", "dinov2", "teacher")}
        networks = {
            "inception": partial(InceptionNetwork, args.inception_weights),
            "dinov2": partial(VisionEncoderNetwork.from_pretrained, args.dinov2),
            "teacher": partial(
                VisionEncoderNetwork.from_pretrained, args.teacher, args.teacher_image_size, args.teacher_pooling
            ),
        }
        with accelerator.local_main_process_first():  # which downloads
            self.spaces = open_spaces(args.metrics, num_samples, networks, references, accelerator.device)
        compared = {space.name: space.reference for space in self.spaces if space.reference is not None}
        # A stored evaluation is reused only if its settings are the same; facts may differ.
        self.settings = {
            "num_samples": num_samples,
            "batch_size": args.batch_size,
            "wanted": list(args.metrics),
            "networks": {space.name: space.describe() for space in self.spaces},
            "references": {
                name: {"count": reference.count, "sha256": reference.sha256} for name, reference in compared.items()
            },
        }
        descriptions = [
            f"{Path(references[name]).name} (sha256 {reference.sha256[:12]}, {name})"
            for name, reference in compared.items()
        ]
        self.facts = {
            "reference": ", ".join(descriptions) or "none is needed",
            "device": device_name(accelerator.device),
            "versions": versions(),
            "arguments": json.loads(json.dumps(asdict(args), default=str)),
            "command": shlex.join(["pixelrepa-evaluate", *sys.argv[1:]]),
            "num_processes": accelerator.num_processes,
        }

    def measure(self, folder: Path, make_images, settings: dict, labels: list[str] | None = None) -> dict[str, Any]:
        """Measure one set of images into `folder`, unless that is done, and return its metrics.json."""
        args, accelerator, settings = self.args, self.accelerator, {**settings, **self.settings}
        path, state_path = folder / "metrics.json", folder / "state.npz"
        record = None if args.overwrite else finished_record(path, settings)
        accelerator.wait_for_everyone()  # every process looks before any writes
        if record is not None:
            accelerator.print(f"{path} is finished: kept.")
            return record
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            remove_incomplete(folder)
            if args.overwrite:
                state_path.unlink(missing_ok=True)
        accelerator.wait_for_everyone()

        start = time.perf_counter()
        tally = accumulate(
            make_images,
            self.num_samples,
            self.spaces,
            args.batch_size,
            num_shown=args.max_grid_images,
            state_path=state_path,
            settings=settings,
            chunk_size=args.chunk_size,
            description=folder.name,
        )
        record = {
            "metrics": results(tally, self.spaces),
            **self.facts,
            **settings,
            "seconds": round(time.perf_counter() - start, 2),  # since this start: a resumed evaluation took longer
        }
        if accelerator.is_main_process:
            if pictures := tally.pictures():
                grid = make_grid(pictures, labels and labels[: len(pictures)])
                write_atomically(folder / "grid.png", lambda temporary: grid.save(temporary, "PNG"))
            write_json(path, record)
            state_path.unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        return record


def measure_cells(
    args: EvaluateArguments, evaluator: Evaluator, plan: PixelREPAPipeline, cells: list[Cell]
) -> list[dict[str, Any]]:
    """Sample and measure every cell. A transformer is loaded once for consecutive cells; tables follow each cell."""
    accelerator, num_classes = evaluator.accelerator, plan.transformer.config.num_classes
    with accelerator.local_main_process_first():
        folder, commit = fetch_pipeline(args.pipeline, args.revision)
    names = plan.config.id2label or {}
    labels = [index % num_classes for index in range(min(args.max_grid_images, evaluator.num_samples))]
    labels = [names.get(str(label), str(label)).split(",")[0] for label in labels]
    records, is_sweep = [], len(cells) > 1
    for transformer, group in itertools.groupby(cells, key=lambda cell: cell.transformer):
        source = transformer_folder(folder) if transformer is None else Path(transformer)
        pipe = load_pipeline(folder, getattr(torch, args.dtype), source, args.guidance_transformer)
        pipe.to(accelerator.device)
        # None disables the bar outside a terminal: nested bars would write a line per refresh into a log.
        pipe.set_progress_bar_config(
            leave=False, position=1, desc="steps", disable=not accelerator.is_local_main_process or None
        )
        if args.compile:
            compile_transformer(pipe.transformer)
        own_scheduler, weights = pipe.scheduler, weights_sha256(source)
        for cell in group:
            pipe.scheduler = SCHEDULERS[cell.scheduler]() if cell.scheduler else own_scheduler
            settings = {
                "pipeline": Path(args.pipeline).name if commit is None else args.pipeline,
                "revision": commit,
                "transformer": cell.labels()["transformer"],
                "weights_sha256": weights,
                "scheduler": {"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config},
                "num_inference_steps": cell.num_inference_steps,
                "guidance_scale": float(cell.guidance_scale),
                "guidance_interval": list(cell.guidance_interval),
                **cell.model_guidance(),
                "seeds": f"{args.seed}-{args.seed + evaluator.num_samples - 1}",
                "dtype": args.dtype,
            }
            make_images = cell_images(pipe, evaluator.num_samples, args.seed, cell)
            target = args.output_dir / cell.name(varying_axes(cells)) if is_sweep else args.output_dir
            records.append(evaluator.measure(target, make_images, settings, labels))
            if is_sweep and accelerator.is_main_process:
                write_tables(args.output_dir, cells, records)
    if not is_sweep:
        accelerator.print(json.dumps(records[0]["metrics"], indent=1))
    elif accelerator.is_main_process:
        plot_lines(args.output_dir / "sweep.png", cells, records)
        if {"guidance_scale", "guidance_interval"} <= set(varying_axes(cells)):
            plot_heatmap(args.output_dir / "heatmap.png", cells, records)
        print_table(cells, records)
    return records


# Tables and plots of a sweep


def varying_axes(cells: list[Cell]) -> list[str]:
    """Axes with several values."""
    return [axis for axis in AXES if len({getattr(cell, axis) for cell in cells}) > 1]


def best(records: list[dict[str, Any]]) -> int:
    """Index of the best cell by the first metric."""
    metric = next(iter(records[0]["metrics"]))
    pick = max if metric.startswith(HIGHER_IS_BETTER) else min
    return pick(range(len(records)), key=lambda index: records[index]["metrics"][metric])


def rows(cells: list[Cell], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Folder, position and metrics of the measured cells, which come first in `cells`."""
    axes = varying_axes(cells)
    return [
        {"folder": cell.name(axes), **cell.labels(), **record["metrics"], "seconds": record["seconds"]}
        for cell, record in zip(cells, records, strict=False)
    ]


def write_tables(output_dir: Path, cells: list[Cell], records: list[dict[str, Any]]) -> None:
    table = rows(cells, records)

    def write_csv(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)

    write_atomically(output_dir / "sweep.csv", write_csv)
    write_json(output_dir / "sweep.json", {"cells": table, "best": table[best(records)]})


def print_table(cells: list[Cell], records: list[dict[str, Any]]) -> None:
    table = [
        {
            name: f"{value:.6g}" if isinstance(value, float) else value
            for name, value in row.items()
            if name not in AXES
        }
        for row in rows(cells, records)
    ]
    widths = {name: max(len(name), *(len(row[name]) for row in table)) for name in table[0]}
    for index, row in enumerate([{name: name for name in widths}, *table], start=-1):
        mark = "  ← best" if index == best(records) else ""
        print("  ".join(row[name].rjust(width) for name, width in widths.items()) + mark)


def plot_lines(path: Path, cells: list[Cell], records: list[dict[str, Any]]) -> None:
    """The first metric over guidance scale or steps; one line per combination of the other axes."""
    from matplotlib.figure import Figure  # slow to import

    metric, varying = next(iter(records[0]["metrics"])), varying_axes(cells)
    numeric = [axis for axis in ("guidance_scale", "num_inference_steps") if axis in varying]
    x_axis = numeric[0] if numeric else varying[0]
    lines: dict[str, list] = {}
    for cell, record in zip(cells, records, strict=True):
        x = getattr(cell, x_axis) if numeric else cell.labels()[x_axis]
        name = cell.name([axis for axis in varying if axis != x_axis])
        lines.setdefault(name, []).append((x, record["metrics"][metric]))

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, points in lines.items():
        axis.plot(*zip(*(sorted(points) if numeric else points), strict=True), marker="o", label=name)
    axis.set_xlabel(x_axis.replace("_", " "))
    axis.set_ylabel(metric)
    if len(lines) > 1:
        figure.legend(loc="outside right upper", fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def plot_heatmap(path: Path, cells: list[Cell], records: list[dict[str, Any]]) -> None:
    """The first metric over guidance scale and interval; one panel per combination of the other axes."""
    from matplotlib.figure import Figure  # slow to import

    metric = next(iter(records[0]["metrics"]))
    others = [axis for axis in varying_axes(cells) if not axis.startswith("guidance")]
    scales, intervals = ([cell.labels()[axis] for cell in cells] for axis in ("guidance_scale", "guidance_interval"))
    scales, intervals = list(dict.fromkeys(scales)), list(dict.fromkeys(intervals))
    panels: dict[str, dict] = {}
    for cell, record in zip(cells, records, strict=True):
        position = cell.labels()["guidance_interval"], cell.labels()["guidance_scale"]
        panels.setdefault(cell.name(others), {})[position] = record["metrics"][metric]
    values = [record["metrics"][metric] for record in records]

    width, height = 2.5 + 0.9 * len(scales), 1.5 + 0.6 * len(intervals)
    figure = Figure(figsize=(width, height * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (name, panel) in zip(axes, panels.items(), strict=True):
        image = axis.imshow(
            [[panel[interval, scale] for scale in scales] for interval in intervals],
            aspect="auto",
            vmin=min(values),
            vmax=max(values),
            cmap="viridis" if metric.startswith(HIGHER_IS_BETTER) else "viridis_r",
        )
        for (interval, scale), value in panel.items():
            x, y = scales.index(scale), intervals.index(interval)
            axis.text(x, y, f"{value:.4g}", ha="center", va="center", bbox={"facecolor": "white", "alpha": 0.7})
        axis.set_xticks(range(len(scales)), scales)
        axis.set_yticks(range(len(intervals)), intervals)
        axis.set_xlabel("guidance scale")
        axis.set_ylabel("guidance interval")
        axis.set_title(name or metric)
    figure.colorbar(image, ax=axes, label=metric)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def cli() -> None:
    run(lambda: main(parse(EvaluateArguments, __doc__.partition("\n")[0])))
