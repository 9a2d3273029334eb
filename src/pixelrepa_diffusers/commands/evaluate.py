"""Measure FID, Inception Score, precision, recall, FD-DINOv2 or a Fréchet distance in any teacher's space.

    accelerate launch pipelines/evaluate.py --pipeline FOLDER_OR_HUB_ID --metrics fid inception_score \\
        --inception_reference jit_in256_stats.npz --batch_size 128 --dtype bfloat16 --output_dir evaluation

Several values of a sampling flag make a sweep: one folder per cell, sweep.csv, sweep.json and a plot. Run the same command
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
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from .. import PixelREPAPipeline
from ..cli import check_launch, flag, parse, run
from ..evaluation import (
    HIGHER_IS_BETTER,
    METRICS,
    accumulate,
    file_images,
    finished_record,
    open_network,
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
    class_names,
    compile_transformer,
    describe_pipeline,
    device_name,
    fetch_pipeline,
    load_pipeline,
    saved_guidance,
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
    self_guidance_intervals: list[str] | None = flag(None, "LOW:HIGH, the same for self-guidance. Default: as saved.")
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
# Axes of a sweep, and their prefixes in the names of the cells.
AXES = {
    "transformer": "",
    "scheduler": "",
    "num_inference_steps": "steps-",
    "guidance_interval": "interval-",
    "guidance_scale": "guidance-",
    "self_guidance_interval": "self-interval-",
    "self_guidance_scale": "self-",
    "autoguidance_scale": "auto-",
}

# One combination of a sweep by axis. The value is None for the pipeline's own transformer and scheduler, and for guidance
# that the pipeline does not have.
Cell = dict[str, Any]


def sampling(cell: Cell) -> dict[str, Any]:
    """Arguments of the pipeline's call."""
    return {
        axis: value for axis, value in cell.items() if axis not in ("transformer", "scheduler") and value is not None
    }


def labels(cell: Cell) -> dict[str, str]:
    """Position on each axis, as a text."""
    folder = cell["transformer"]
    return {
        "transformer": "-".join(Path(folder).resolve().parts[-2:]).replace("-transformer_", "-") if folder else "own",
        "scheduler": cell["scheduler"] or "own",
        **{axis: "-".join(f"{number:g}" for number in np.ravel(value)) for axis, value in sampling(cell).items()},
    }


def cell_name(cell: Cell, axes: Sequence[str]) -> str:
    """Short name by the given axes, such as "heun_steps-50_guidance-1.5"."""
    return "_".join(AXES[axis] + label for axis, label in labels(cell).items() if axis in axes)


def main(args: EvaluateArguments) -> list[dict[str, Any]]:
    """Measure and return the metrics.json of every cell, in the order of the sweep."""
    accelerator = Accelerator()
    check_launch(accelerator.num_processes)
    if (args.pipeline is None) == (args.images is None):
        raise ValueError("Give either --pipeline or --images.")
    return measure_images(args, accelerator) if args.pipeline is None else measure_sweep(args, accelerator)


def measure_images(args: EvaluateArguments, accelerator: Accelerator) -> list[dict[str, Any]]:
    if given := [name for name in SAMPLING if getattr(args, name) is not None]:
        raise ValueError(f"--{given[0]} concerns sampling and has no effect on --images.")
    paths = [path for path in list_images(args.images) if path.name != "grid.png"]
    num_samples = args.num_samples or len(paths)
    if num_samples > len(paths):
        raise ValueError(f"--num_samples {num_samples}: there are {len(paths)} images at {args.images}.")
    paths = paths[:num_samples]
    make_images = file_images(paths)
    listing = [(path.name, path.stat().st_size) for path in paths]
    source = {
        "images": Path(args.images).name,
        "listing_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),  # names and sizes
    }
    evaluator = Evaluator(args, accelerator, num_samples)
    with evaluator.only_writer():
        return [evaluator.measure(args.output_dir, make_images, source)]


def plan_cells(args: EvaluateArguments, plan: PixelREPAPipeline, num_samples: int) -> list[Cell]:
    """All combinations, each checked against the pipeline's description before any weights are read."""
    saved = {name: list(value) if isinstance(value, tuple) else value for name, value in saved_guidance(plan).items()}
    values = {
        "transformer": args.transformers or [None],
        "scheduler": args.schedulers or [None],
        "num_inference_steps": args.num_inference_steps or [50],
        "guidance_interval": parse_intervals(args, "guidance_intervals"),
        "guidance_scale": args.guidance_scales,
        "self_guidance_interval": parse_intervals(args, "self_guidance_intervals"),
        "self_guidance_scale": args.self_guidance_scales,
        "autoguidance_scale": args.autoguidance_scales,
    }
    choices = [chosen or [saved.get(axis)] for axis, chosen in values.items()]
    cells = [dict(zip(AXES, combination, strict=True)) for combination in itertools.product(*choices)]
    if len({cell_name(cell, AXES) for cell in cells}) < len(cells):
        raise ValueError("Two cells of the sweep have the same name: give each value once.")
    for cell in cells:
        if cell["transformer"] and not Path(cell["transformer"]).is_dir():
            raise FileNotFoundError(f"--transformers: there is no folder {cell['transformer']}.")
        pipeline_images(plan, num_samples, args.seed, **sampling(cell))
    return cells


def parse_intervals(args: EvaluateArguments, name: str) -> list[list[float]]:
    try:
        bounds = [text.partition(":") for text in getattr(args, name) or []]
        return [[float(low), float(high)] for low, _, high in bounds]
    except ValueError:
        raise ValueError(f"--{name}: give LOW:HIGH, such as 0.1:1.0.") from None


class Evaluator:
    """Feature networks, references and settings that all cells share."""

    def __init__(self, args: EvaluateArguments, accelerator: Accelerator, num_samples: int):
        if args.teacher is None and any(METRICS[metric][0] == "teacher" for metric in args.metrics):
            raise ValueError("A metric in the teacher's space needs --teacher.")
        self.args, self.accelerator, self.num_samples = args, accelerator, num_samples
        references = {name: getattr(args, f"{name}_reference") for name in ("inception", "dinov2", "teacher")}
        networks = {
            "inception": partial(open_network, "inception", args.inception_weights),
            "dinov2": partial(open_network, args.dinov2),
            "teacher": partial(open_network, args.teacher, None, args.teacher_image_size, args.teacher_pooling),
        }
        with accelerator.local_main_process_first():  # the main process downloads, the others read the cache
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
        described = [
            f"{Path(references[name]).name} (sha256 {compared[name].sha256[:12]}, {name})" for name in compared
        ]
        self.facts = {
            "reference": ", ".join(described) or "none is needed",
            "device": device_name(accelerator.device),
            "versions": versions(),
            "arguments": json.loads(json.dumps(asdict(args), default=str)),
            "command": shlex.join(["pixelrepa-evaluate", *sys.argv[1:]]),
            "num_processes": accelerator.num_processes,
        }

    def only_writer(self) -> contextlib.AbstractContextManager:
        """Lock --output_dir, on the main process."""
        return only_writer(self.args.output_dir) if self.accelerator.is_main_process else contextlib.nullcontext()

    def measure(self, folder: Path, make_images, settings: dict, names: Sequence[str] = ()) -> dict[str, Any]:
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
                captions = [name.split(",")[0] for name, _ in zip(itertools.cycle(names), pictures)]
                grid = make_grid(pictures, captions or None, columns=len(names) if 1 < len(names) <= 16 else None)
                write_atomically(folder / "grid.png", lambda temporary: grid.save(temporary, "PNG"))
            write_json(path, record)
            state_path.unlink(missing_ok=True)
        accelerator.print(f"{folder.name}: {json.dumps(record['metrics'])}")
        accelerator.wait_for_everyone()
        return record


def measure_sweep(args: EvaluateArguments, accelerator: Accelerator) -> list[dict[str, Any]]:
    """Sample and measure every cell. A transformer is loaded once for consecutive cells; tables follow each cell."""
    num_samples = args.num_samples or 50_000
    plan = describe_pipeline(args.pipeline, args.revision, args.guidance_transformer)
    cells = plan_cells(args, plan, num_samples)
    axes = [axis for axis in AXES if len({labels(cell).get(axis) for cell in cells}) > 1]
    evaluator = Evaluator(args, accelerator, num_samples)
    with accelerator.local_main_process_first():
        folder, commit = fetch_pipeline(args.pipeline, args.revision)
    guides = {
        "guidance_head": folder / "guidance_head",
        "guidance_transformer": Path(args.guidance_transformer or folder / "guidance_transformer"),
    }
    common = {
        "pipeline": Path(args.pipeline).name if commit is None else args.pipeline,
        "revision": commit,
        "seeds": f"{args.seed}-{args.seed + num_samples - 1}",
        "dtype": args.dtype,
        **{f"{name}_sha256": weights_sha256(path) for name, path in guides.items() if path.is_dir()},
    }
    records = []
    with evaluator.only_writer():
        for transformer, group in itertools.groupby(cells, key=itemgetter("transformer")):
            source = transformer_folder(folder) if transformer is None else Path(transformer)
            pipe = load_pipeline(folder, args.dtype, source, args.guidance_transformer)
            if args.compile:
                compile_transformer(pipe.transformer)
            own_scheduler, weights = pipe.scheduler, weights_sha256(source)
            for cell in group:
                pipe.scheduler = SCHEDULERS[cell["scheduler"]]() if cell["scheduler"] else own_scheduler
                settings = {
                    **common,
                    "transformer": labels(cell)["transformer"],
                    "weights_sha256": weights,
                    "scheduler": {"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config},
                    **sampling(cell),
                }
                make_images = pipeline_images(pipe, num_samples, args.seed, **sampling(cell))
                target = args.output_dir / cell_name(cell, axes)
                records.append(evaluator.measure(target, make_images, settings, class_names(plan)))
                if axes and accelerator.is_main_process:
                    write_sweep(args.output_dir, axes, cells, records)
    return records


def best(records: list[dict[str, Any]]) -> int:
    """Index of the best cell by the first metric."""
    metric = next(iter(records[0]["metrics"]))
    pick = max if metric.startswith(HIGHER_IS_BETTER) else min
    return pick(range(len(records)), key=lambda index: records[index]["metrics"][metric])


def write_sweep(output_dir: Path, axes: list[str], cells: list[Cell], records: list[dict[str, Any]]) -> None:
    """Tables and plot of the measured cells, which come first in `cells`."""
    rows = [
        {"folder": cell_name(cell, axes), **labels(cell), **record["metrics"], "seconds": record["seconds"]}
        for cell, record in zip(cells, records, strict=False)
    ]

    def write_table(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(output_dir / "sweep.csv", write_table)
    write_json(output_dir / "sweep.json", {"cells": rows, "best": rows[best(records)]})
    if len(records) == len(cells):
        plot(output_dir / "sweep.png", axes, cells, records)
        print(f"The best cell is {rows[best(records)]['folder']}; all are in {output_dir / 'sweep.csv'}.")


def plot(path: Path, axes: list[str], cells: list[Cell], records: list[dict[str, Any]]) -> None:
    """The first metric over a guidance scale or steps; one line per combination of the other axes."""
    from matplotlib.figure import Figure  # slow to import

    metric = next(iter(records[0]["metrics"]))
    scales = ("guidance_scale", "self_guidance_scale", "autoguidance_scale", "num_inference_steps")
    numeric = [axis for axis in scales if axis in axes]
    x_axis = (numeric or axes)[0]
    lines: dict[str, list] = {}
    for cell, record in zip(cells, records, strict=False):
        x = cell[x_axis] if numeric else labels(cell)[x_axis]
        line = cell_name(cell, [axis for axis in axes if axis != x_axis])
        lines.setdefault(line, []).append((x, record["metrics"][metric]))

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for line, points in lines.items():
        axis.plot(*zip(*(sorted(points) if numeric else points), strict=True), marker="o", label=line)
    axis.set(xlabel=x_axis.replace("_", " "), ylabel=metric)
    if len(lines) > 1:
        figure.legend(loc="outside right upper", fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def cli() -> None:
    run(lambda: main(parse(EvaluateArguments, __doc__.partition("\n")[0])))
