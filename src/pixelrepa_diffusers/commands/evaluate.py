"""FID, Inception Score, precision and recall, FD-DINOv2, or a Fréchet distance in any teacher's space, of a pipeline.

The papers' numbers (ImageNet at 256 pixels, 50,000 images, guidance as saved with the pipeline), on all GPUs:

    accelerate launch pipelines/evaluate.py --pipeline FOLDER_OR_HUB_ID --metrics fid inception_score \\
        --inception_reference jit_in256_stats.npz --batch_size 128 --dtype bfloat16 --output_dir evaluation

The demo's digits, on any CPU (the reference is made by pipelines/prepare_reference.py):

    python pipelines/evaluate.py --pipeline outputs/demo/run/pipeline --metrics fd_teacher \\
        --teacher outputs/demo/teacher --teacher_image_size 28 --teacher_reference outputs/demo/test.npz \\
        --num_samples 1000 --num_inference_steps 10 --output_dir outputs/demo/evaluation

A sweep: give several values, e.g. `--guidance_scales 1 1.5 2 3 --guidance_intervals 0:1 0.1:1` or
`--transformers run/checkpoint-600/transformer_ema_0.99 run/checkpoint-600/transformer_ema_0.995`. Images that exist
already: `--images FOLDER` instead of `--pipeline`.

--output_dir receives metrics.json, which says all that is needed to measure again and is read by pipelines/publish.py,
and grid.png; of a sweep a folder with both for each cell, sweep.csv, sweep.json and heatmap.png. Run it again after an
interruption: finished cells are kept and a started one goes on from its last --chunk_size images.

Images depend on seed, class and settings alone and are rounded to 8 bits before they are measured. The number of
processes changes a metric by rounding only (about 1e-12); another --batch_size may move a pixel by one of 255 levels.
"""

import contextlib
import csv
import hashlib
import itertools
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from .. import JiTTransformer2DModel, PixelREPAPipeline
from ..cli import parse, run
from ..evaluation import (
    HIGHER_IS_BETTER,
    METRICS,
    FeatureSpace,
    InceptionNetwork,
    VisionEncoderNetwork,
    accumulate,
    file_images,
    finished_record,
    open_spaces,
    pipeline_images,
    results,
)
from ..files import only_writer, remove_incomplete, write_atomically
from ..hub import weights_sha256
from ..images import list_images, make_grid
from ..sampling import SCHEDULERS, check_launch, describe_pipeline, device_name, fetch_pipeline, versions


@dataclass
class EvaluateArguments:
    output_dir: Path = field(metadata={"help": "Receives metrics.json and grid.png, or a sweep's."})
    pipeline: str | None = field(default=None, metadata={"help": "A saved pipeline's folder, or its id on the Hub."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub id."})
    images: str | None = field(
        default=None, metadata={"help": "Instead of a pipeline: a folder of images, or a pattern such as out/0*.png."}
    )

    metrics: list[str] = field(
        default_factory=lambda: ["fid", "inception_score"],
        metadata={"help": "What to measure.", "choices": list(METRICS)},
    )
    inception_weights: str | None = field(
        default=None, metadata={"help": "torch-fidelity's Inception weights; downloaded when not given."}
    )
    inception_reference: str | None = field(default=None, metadata={"help": "Statistics for fid, precision_recall."})
    dinov2: str = field(default="facebook/dinov2-large", metadata={"help": "Network of the metrics in dinov2."})
    dinov2_reference: str | None = field(default=None, metadata={"help": "Statistics for the metrics in dinov2."})
    teacher: str | None = field(
        default=None, metadata={"help": "Network of the metrics in teacher: any vision encoder's folder or Hub id."}
    )
    teacher_reference: str | None = field(default=None, metadata={"help": "Statistics for the metrics in teacher."})
    teacher_image_size: int = field(default=224, metadata={"help": "Side the teacher's images are resized to."})
    teacher_pooling: str = field(
        default="class", metadata={"help": "Its class token, or the mean of its patches.", "choices": ["class", "patches"]}
    )  # fmt: skip

    num_samples: int | None = field(
        default=None, metadata={"help": "Images, a multiple of the classes. Default: 50000, or all of --images."}
    )
    seed: int = field(default=0, metadata={"help": "Image i starts from the noise of seed + i."})
    transformers: list[str] | None = field(
        default=None, metadata={"help": "Transformer folders in the pipeline's place, e.g. a checkpoint's EMAs."}
    )
    schedulers: list[str] | None = field(
        default=None, metadata={"help": "Replace the saved scheduler.", "choices": list(SCHEDULERS)}
    )
    num_inference_steps: list[int] | None = field(default=None, metadata={"help": "Sampling steps. Default: 50."})
    guidance_scales: list[float] | None = field(default=None, metadata={"help": "Default: the saved scale."})
    guidance_intervals: list[str] | None = field(
        default=None, metadata={"help": "LOW:HIGH, the times guidance acts in. Default: as saved."}
    )

    dtype: str = field(
        default="float32", metadata={"help": "Of the transformer.", "choices": ["float32", "bfloat16", "float16"]}
    )
    compile: bool = field(default=False, metadata={"help": "Compile the transformer's blocks."})
    batch_size: int = field(default=64, metadata={"help": "Images per batch and process."})
    chunk_size: int = field(default=5000, metadata={"help": "Images after which a started evaluation is kept."})
    max_grid_images: int = field(default=64, metadata={"help": "The first images, drawn to grid.png; 0 for no grid."})
    overwrite: bool = field(default=False, metadata={"help": "Measure again what --output_dir holds already."})


SAMPLING = ("transformers", "schedulers", "num_inference_steps", "guidance_scales", "guidance_intervals", "revision")
AXES = ("transformer", "scheduler", "num_inference_steps", "guidance_interval", "guidance_scale")


@dataclass(frozen=True)
class Cell:
    """One combination of a sweep. `transformer` and `scheduler` are None for the pipeline's own."""

    transformer: str | None
    scheduler: str | None
    num_inference_steps: int
    guidance_interval: tuple[float, float]
    guidance_scale: float

    def labels(self) -> dict[str, str]:
        """The position on each axis, in words that also make a file name."""
        low, high = self.guidance_interval
        return {
            "transformer": "-".join(Path(self.transformer).resolve().parts[-2:]) if self.transformer else "own",
            "scheduler": self.scheduler or "own",
            "num_inference_steps": str(self.num_inference_steps),
            "guidance_interval": f"{low:g}-{high:g}",
            "guidance_scale": f"{self.guidance_scale:g}",
        }

    @property
    def name(self) -> str:
        words = ("transformer", "scheduler", "steps", "interval", "guidance")
        return "_".join(f"{word}-{label}" for word, label in zip(words, self.labels().values(), strict=True))


def parse_interval(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise ValueError(f"--guidance_intervals: {text!r} is not LOW:HIGH, such as 0.1:1.0.") from None
    return low, high


def plan_cells(args: EvaluateArguments, plan: PixelREPAPipeline, num_samples: int) -> list[Cell]:
    """Every combination, each checked against the pipeline's description."""
    intervals = [tuple(plan.config.guidance_interval)]
    if args.guidance_intervals is not None:
        intervals = [parse_interval(text) for text in args.guidance_intervals]
    cells = [
        Cell(*values)
        for values in itertools.product(
            args.transformers or [None],
            args.schedulers or [None],
            args.num_inference_steps or [50],
            intervals,
            args.guidance_scales or [plan.config.guidance_scale],
        )
    ]
    names = [cell.name for cell in cells]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"The sweep has {repeated[0]} more than once: give each value once.")
    for cell in cells:
        pipeline_images(
            plan, num_samples, args.seed, cell.num_inference_steps, cell.guidance_scale, cell.guidance_interval
        )
    own = plan.transformer.config
    for folder in args.transformers or []:
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"--transformers: {folder} is no transformer folder, it has no config.json.")
        config = JiTTransformer2DModel.load_config(folder)
        for name in ("num_classes", "sample_size", "in_channels", "noise_scale"):
            if config[name] != own[name]:
                raise ValueError(
                    f"--transformers: {folder} has {name} {config[name]}, the pipeline's transformer {own[name]}."
                )
    return cells


def evaluate_cell(
    args: EvaluateArguments,
    accelerator: Accelerator,
    folder: Path,
    spaces: list[FeatureSpace],
    make_images,
    num_samples: int,
    settings: dict,
    facts: dict,
    labels: list[str] | None,
) -> dict:
    """Measures one set of images into `folder`, unless that is done, and returns its metrics.json."""
    path, grid_path, state_path = folder / "metrics.json", folder / "grid.png", folder / "state.npz"
    record = None if args.overwrite else finished_record(path, settings)
    # Every process has looked before any writes.
    accelerator.wait_for_everyone()
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
        num_samples,
        spaces,
        args.batch_size,
        num_shown=args.max_grid_images,
        state_path=state_path,
        settings=settings,
        chunk_size=args.chunk_size,
        description=folder.name,
    )
    record = {
        "metrics": results(tally, spaces),
        **facts,
        **settings,
        "num_processes": accelerator.num_processes,
        "seconds": round(time.perf_counter() - start, 2),  # of this start: a resumed evaluation took longer
    }
    if accelerator.is_main_process:
        pictures = tally.pictures()
        if pictures:
            grid = make_grid(pictures, labels and labels[: len(pictures)])
            write_atomically(grid_path, lambda temporary: grid.save(temporary, "PNG"))
        write_json(path, record)
        state_path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return record


def main(args: EvaluateArguments) -> list[dict]:
    """Measures what `args` say and returns the metrics.json of every cell, in the order of the sweep."""
    with contextlib.ExitStack() as stack:
        return measure(args, stack)


def measure(args: EvaluateArguments, stack: contextlib.ExitStack) -> list[dict]:
    """See `main`; `stack` holds the output folder until the end."""
    accelerator = Accelerator()
    check_launch(accelerator.num_processes)
    for name, least in (("batch_size", 1), ("chunk_size", 1), ("max_grid_images", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    if (args.pipeline is None) == (args.images is None):
        raise ValueError("Give either --pipeline or --images.")
    if args.images is not None:
        given = [name for name in SAMPLING if getattr(args, name) is not None]
        if given:
            raise ValueError(f"--{given[0]} is about sampling and means nothing for --images.")
        paths = list_images(args.images)
        num_samples = len(paths) if args.num_samples is None else args.num_samples
        if not 1 <= num_samples <= len(paths):
            raise ValueError(f"--num_samples {num_samples}: there are {len(paths)} images at {args.images}.")
        make_images = file_images(paths[:num_samples])
    else:
        num_samples = 50_000 if args.num_samples is None else args.num_samples
        plan = describe_pipeline(args.pipeline, args.revision)
        cells = plan_cells(args, plan, num_samples)

    needed = {METRICS[metric][0] for metric in args.metrics}
    if "teacher" in needed and args.teacher is None:
        raise ValueError("A metric in the teacher's space needs --teacher.")
    references = {name: getattr(args, f"{name}_reference") for name in ("inception", "dinov2", "teacher")}
    networks = {
        "inception": partial(InceptionNetwork, args.inception_weights),
        "dinov2": partial(VisionEncoderNetwork.from_pretrained, args.dinov2),
        "teacher": partial(
            VisionEncoderNetwork.from_pretrained, args.teacher, args.teacher_image_size, args.teacher_pooling
        ),
    }
    with accelerator.local_main_process_first():  # which downloads
        spaces = open_spaces(args.metrics, num_samples, networks, references, accelerator.device)

    if accelerator.is_main_process:
        stack.enter_context(only_writer(args.output_dir))
    accelerator.wait_for_everyone()
    compared = {space.name: space for space in spaces if space.reference is not None}
    facts = {
        "reference": ", ".join(
            f"{Path(references[name]).name} (sha256 {space.reference.sha256[:12]}, {name})"
            for name, space in compared.items()
        )
        or "none is needed",
        "device": device_name(accelerator.device),
        "versions": versions(),
        "arguments": json.loads(json.dumps(asdict(args), default=str)),
        "command": shlex.join(["python", *sys.argv]) if accelerator.is_main_process else None,
    }
    shared = {
        "num_samples": num_samples,
        "batch_size": args.batch_size,
        "wanted": list(args.metrics),
        "networks": {space.name: space.describe() for space in spaces},
        "references": {
            name: {"count": space.reference.count, "sha256": space.reference.sha256}
            for name, space in compared.items()
        },
    }
    if args.images is not None:
        listing = [(path.name, path.stat().st_size) for path in paths[:num_samples]]
        source = {
            "images": Path(args.images).name,
            "listing_sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest(),  # names and sizes
        }
        return [
            evaluate_cell(
                args, accelerator, args.output_dir, spaces, make_images, num_samples, source | shared, facts, None
            )
        ]

    return measure_cells(args, accelerator, spaces, plan, cells, num_samples, shared, facts)


def measure_cells(
    args: EvaluateArguments,
    accelerator: Accelerator,
    spaces: list[FeatureSpace],
    plan: PixelREPAPipeline,
    cells: list[Cell],
    num_samples: int,
    shared: dict,
    facts: dict,
) -> list[dict]:
    """
    Samples and measures every cell, loading a transformer once for the cells in a row that use it; of several cells also
    writes the tables, after each, and the heat map.
    """
    with accelerator.local_main_process_first():
        folder, commit = fetch_pipeline(args.pipeline, args.revision)
    names = plan.config.id2label or {}
    labels = [index % plan.transformer.config.num_classes for index in range(min(args.max_grid_images, num_samples))]
    labels = [names.get(str(label), str(label)).split(",")[0] for label in labels]
    records, pipe, loaded = [], None, None
    for number, cell in enumerate(cells):
        if pipe is None or cell.transformer != loaded:
            source = folder / "transformer" if cell.transformer is None else Path(cell.transformer)
            transformer = JiTTransformer2DModel.from_pretrained(source, dtype=getattr(torch, args.dtype))
            pipe = PixelREPAPipeline.from_pretrained(folder, transformer=transformer).to(accelerator.device)
            pipe.set_progress_bar_config(
                leave=False, position=1, desc="steps", disable=not accelerator.is_local_main_process
            )
            if args.compile:
                pipe.transformer.compile_repeated_blocks(fullgraph=True)
            loaded, own_scheduler, weights = cell.transformer, pipe.scheduler, weights_sha256(source)
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
            "seeds": f"{args.seed}-{args.seed + num_samples - 1}",
            "dtype": args.dtype,
            **shared,
        }
        make_images = pipeline_images(
            pipe, num_samples, args.seed, cell.num_inference_steps, cell.guidance_scale, cell.guidance_interval
        )
        target = args.output_dir / cell.name if len(cells) > 1 else args.output_dir
        records.append(
            evaluate_cell(args, accelerator, target, spaces, make_images, num_samples, settings, facts, labels)
        )
        if accelerator.is_main_process and len(cells) > 1:
            write_tables(args.output_dir, cells[: number + 1], records)
    if len(cells) > 1 and accelerator.is_main_process:
        draw_heatmap(args.output_dir / "heatmap.png", cells, records)
        print_table(cells, records)
    elif accelerator.is_main_process:
        print(json.dumps(records[0]["metrics"], indent=1))
    return records


# -------------------------------------------------------------------------------------------------------- of a sweep


def rows(cells: list[Cell], records: list[dict]) -> Iterator[dict]:
    for cell, record in zip(cells, records, strict=True):
        yield {**cell.labels(), **record["metrics"], "seconds": record["seconds"]}


def best(records: list[dict]) -> int:
    """The place of the best cell by the first metric asked for."""
    name = next(iter(records[0]["metrics"]))
    sign = -1 if name.startswith(HIGHER_IS_BETTER) else 1
    return min(range(len(records)), key=lambda place: sign * records[place]["metrics"][name])


def write_json(path: Path, content) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tables(output_dir: Path, cells: list[Cell], records: list[dict]) -> None:
    table = list(rows(cells, records))

    def write_csv(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)

    write_atomically(output_dir / "sweep.csv", write_csv)
    write_json(output_dir / "sweep.json", {"cells": table, "best": table[best(records)]})


def print_table(cells: list[Cell], records: list[dict]) -> None:
    table = [
        {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        for row in rows(cells, records)
    ]
    widths = {name: max(len(name), *(len(row[name]) for row in table)) for name in table[0]}
    print("  ".join(name.rjust(width) for name, width in widths.items()))
    for place, row in enumerate(table):
        mark = "  ← best" if place == best(records) else ""
        print("  ".join(row[name].rjust(width) for name, width in widths.items()) + mark)


def draw_heatmap(path: Path, cells: list[Cell], records: list[dict]) -> None:
    """The first metric over the two axes with the most values; a panel for each combination of the others."""
    from matplotlib.figure import Figure  # slow to import

    metric = next(iter(records[0]["metrics"]))
    positions = [cell.labels() for cell in cells]
    values = {axis: list(dict.fromkeys(position[axis] for position in positions)) for axis in AXES}
    # Later axes first where equal, so that guidance scale runs along x.
    y_axis, x_axis = sorted(AXES, key=lambda axis: (len(values[axis]), AXES.index(axis)))[-2:]
    others = [axis for axis in AXES if axis not in (x_axis, y_axis) and len(values[axis]) > 1]
    panels = list(itertools.product(*(values[axis] for axis in others)))

    numbers = np.full((len(panels), len(values[y_axis]), len(values[x_axis])), np.nan)
    for position, record in zip(positions, records, strict=True):
        panel = panels.index(tuple(position[axis] for axis in others))
        numbers[panel, values[y_axis].index(position[y_axis]), values[x_axis].index(position[x_axis])] = record[
            "metrics"
        ][metric]

    height, width = 1.5 + 0.6 * len(values[y_axis]), 2.5 + 0.9 * len(values[x_axis])
    figure = Figure(figsize=(width, height * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, panel, grid in zip(axes, panels, numbers, strict=True):
        image = axis.imshow(
            grid,
            aspect="auto",
            vmin=numbers.min(),
            vmax=numbers.max(),
            cmap="viridis" if metric.startswith(HIGHER_IS_BETTER) else "viridis_r",
        )
        for y, row in enumerate(grid.tolist()):
            for x, number in enumerate(row):
                axis.text(x, y, f"{number:.4g}", ha="center", va="center", bbox={"facecolor": "white", "alpha": 0.7})
        axis.set_xticks(range(len(values[x_axis])), values[x_axis])
        axis.set_yticks(range(len(values[y_axis])), values[y_axis])
        axis.set_xlabel(x_axis.replace("_", " "))
        axis.set_ylabel(y_axis.replace("_", " "))
        axis.set_title(", ".join(f"{name} {label}" for name, label in zip(others, panel, strict=True)) or metric)
    figure.colorbar(image, ax=axes, label=metric)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def cli() -> None:
    run(lambda: main(parse(EvaluateArguments, __doc__.partition("\n")[0])))
