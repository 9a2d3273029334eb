"""Generate images with a PixelREPA or JiT pipeline: one PNG per class and seed, and a labelled grid of them.

    pixelrepa-generate --pipeline FOLDER_OR_HUB_ID --class_labels "golden retriever" 360 --seeds 0-7 --output_dir images

Each image starts from the noise of its own seed, drawn on the CPU, so it does not depend on the rest of the run. Several
GPUs (`accelerate launch pipelines/generate.py ...`) make the same files as one, bit for bit.
"""

import contextlib
import json
import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image, PngImagePlugin
from tqdm.auto import tqdm

from .. import PixelREPAPipeline
from ..cli import check_launch, flag, parse, run
from ..files import only_writer, write_atomically, write_json
from ..images import make_grid
from ..sampling import (
    DTYPES,
    SCHEDULERS,
    check_cuda_graphs,
    compile_transformer,
    describe_pipeline,
    device_name,
    fetch_pipeline,
    load_pipeline,
    seeded,
    versions,
)


@dataclass
class GenerateArguments:
    pipeline: str = flag(help="Saved pipeline or training checkpoint (checkpoint-N), or a Hub id.")
    class_labels: list[str] | None = flag(
        None, "Class names (quote those with spaces), ids, ranges such as 0-9, or all. Not needed for a single class."
    )
    output_dir: Path = flag(Path("images"), "Receives CLASS_SEED.png, grid.png and arguments.json.")
    revision: str | None = flag(None, "Branch, tag or commit of a Hub id.")
    seeds: list[str] = flag(["0"], "One image per class and seed: 0-7, or 3 5 8, or 0-3,9.")
    list_classes: bool = flag(False, "Print the class ids and names, and stop.")

    scheduler: str | None = flag(None, "Replaces the saved scheduler.", choices=list(SCHEDULERS))
    num_inference_steps: int = flag(50, "Sampling steps; heun evaluates the model 2N - 1 times.", ge=1)
    guidance_scale: float | None = flag(None, "Default: the scale saved with the pipeline.", ge=0, lt=float("inf"))
    guidance_interval: list[float] | None = flag(
        None, "LOW HIGH: guide where LOW < t < HIGH. Default: as saved.", ge=0, le=1
    )
    self_guidance_scale: float | None = flag(
        None, "Scale of the guidance head; 0 turns it off. Default: as saved.", ge=0, lt=float("inf")
    )
    self_guidance_interval: list[float] | None = flag(None, "LOW HIGH, likewise. Default: as saved.", ge=0, le=1)
    autoguidance_scale: float | None = flag(
        None, "Scale of the second transformer; 1 turns it off. Default: as saved.", ge=0, lt=float("inf")
    )
    autoguidance_interval: list[float] | None = flag(None, "LOW HIGH, likewise. Default: as saved.", ge=0, le=1)
    guidance_transformer: str | None = flag(None, "Folder of a second transformer, for autoguidance.")

    dtype: str = flag("float32", "Data type of the network.", choices=DTYPES)
    compile: bool = flag(False, "Compile the transformer's blocks: slow start, then faster.")
    cuda_graphs: bool = flag(False, "Compile the whole network into CUDA graphs: fastest for small batches on a GPU.")
    batch_size: int = flag(8, "Images per batch and process.", ge=1)
    max_grid_images: int = flag(256, "No grid.png for more images than this.", ge=0)
    overwrite: bool = flag(False, "Replace files of an earlier run in --output_dir.")


INTERVALS = ("guidance_interval", "self_guidance_interval", "autoguidance_interval")
CALL_SETTINGS = (
    "num_inference_steps", "guidance_scale", "guidance_interval",
    "self_guidance_scale", "self_guidance_interval", "autoguidance_scale", "autoguidance_interval",
)  # fmt: skip


def parse_numbers(texts: list[str], name: str) -> list[int]:
    """Distinct numbers of texts such as "3", "0-7" (both ends included) and "0-3,9", in the order given."""
    numbers: dict[int, None] = {}
    for text in ",".join(texts).split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"--{name}: {text!r} is neither a number such as 3 nor an ascending range such as 0-7.")
        numbers |= dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1))
    return list(numbers)


def select_classes(texts: list[str] | None, pipeline: PixelREPAPipeline) -> list[int]:
    """Distinct class ids of --class_labels."""
    num_classes = pipeline.transformer.config.num_classes
    if texts is None and num_classes > 1:
        raise ValueError(
            f"This model has {num_classes} classes: name some with --class_labels (--list_classes prints them all)."
        )
    if texts is None or texts == ["all"]:
        return list(range(num_classes))
    labels: list[int | str] = []
    for text in texts:
        labels += parse_numbers([text], "class_labels") if re.fullmatch(r"[\d,-]+", text) else [text]
    return list(dict.fromkeys(pipeline.get_label_ids(labels)))


def main(args: GenerateArguments) -> list[Path]:
    """Write the images and return their paths, class by class and seed by seed."""
    accelerator = Accelerator()
    check_launch(accelerator.num_processes)
    check_cuda_graphs(args.cuda_graphs, accelerator.device)
    plan = describe_pipeline(args.pipeline, args.revision, args.guidance_transformer)
    names = plan.config.id2label or {}
    if args.list_classes:
        for label in range(plan.transformer.config.num_classes):
            accelerator.print(label, names.get(str(label), ""))
        return []

    for name in INTERVALS:
        interval = getattr(args, name)
        if interval is not None and not (len(interval) == 2 and interval[0] < interval[1]):
            raise ValueError(f"--{name} takes LOW HIGH with LOW < HIGH, got {interval}.")
    seeds = parse_numbers(args.seeds, "seeds")
    labels = select_classes(args.class_labels, plan)
    settings = guidance_settings(args, plan)
    plan.check_inputs(
        labels, **settings, generator=None, latents=None, output_type="pil", callback_on_step_end_tensor_inputs=[]
    )
    images = {args.output_dir / f"{label:04d}_{seed:06d}.png": (label, seed) for label in labels for seed in seeds}
    grid_path = args.output_dir / "grid.png" if len(images) <= args.max_grid_images else None
    record_path = args.output_dir / "arguments.json"
    existing = [path for path in (*images, record_path, grid_path) if path is not None and path.exists()]
    if existing and not args.overwrite:
        raise FileExistsError(
            f"{len(existing)} of the files to write already exist, the first is {existing[0]}. Choose another "
            "--output_dir, or pass --overwrite to replace them."
        )
    accelerator.wait_for_everyone()  # every process looks before any writes

    with only_writer(args.output_dir) if accelerator.is_main_process else contextlib.nullcontext():
        pipe, revision = open_pipeline(args, accelerator)
        settings |= {
            "pipeline": args.pipeline,
            "revision": revision,
            "scheduler": {"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config},
            "dtype": args.dtype,
        }
        if args.guidance_transformer is not None:
            settings["guidance_transformer"] = args.guidance_transformer
        if accelerator.is_main_process:
            record = {
                **asdict(args),
                **settings,
                "output_dir": str(args.output_dir),
                "class_labels": {label: names.get(str(label), str(label)) for label in labels},
                "seeds": seeds,
                "num_processes": accelerator.num_processes,
                "device": device_name(accelerator.device),
                "versions": versions(),
            }
            write_json(record_path, record)
        write_images(args, accelerator, pipe, images, settings)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and grid_path is not None:
            write_grid(grid_path, images, names, columns=len(seeds) if 1 < len(seeds) <= 16 else None)
    grid_note = "grid.png" if grid_path else f"no grid.png (more than --max_grid_images {args.max_grid_images})"
    accelerator.print(f"{args.output_dir}: {len(images)} images, {grid_note}, arguments.json.")
    return list(images)


def guidance_settings(args: GenerateArguments, plan: PixelREPAPipeline) -> dict[str, Any]:
    """Arguments of the pipeline call: those given, else those saved; guidance that the pipeline lacks is left out."""
    names = ["guidance_scale", "guidance_interval"]
    for part, prefix in (("guidance_head", "self_guidance"), ("guidance_transformer", "autoguidance")):
        own = [f"{prefix}_scale", f"{prefix}_interval"]
        if getattr(plan, part) is not None or any(getattr(args, name) is not None for name in own):
            names += own
    given = {name: plan.config[name] if getattr(args, name) is None else getattr(args, name) for name in names}
    settings = {name: list(value) if name in INTERVALS else value for name, value in given.items()}
    return {"num_inference_steps": args.num_inference_steps, **settings}


def open_pipeline(args: GenerateArguments, accelerator: Accelerator) -> tuple[PixelREPAPipeline, str | None]:
    """The pipeline on this process's device, as --dtype, --scheduler and --compile say, and its commit on the Hub."""
    with accelerator.local_main_process_first():
        folder, revision = fetch_pipeline(args.pipeline, args.revision)
    pipe = load_pipeline(folder, getattr(torch, args.dtype), guidance_transformer=args.guidance_transformer)
    pipe.to(accelerator.device)
    if args.scheduler:
        pipe.scheduler = SCHEDULERS[args.scheduler]()
    if args.compile or args.cuda_graphs:
        compile_transformer(pipe.transformer, args.cuda_graphs)
    # None disables the bar outside a terminal: nested bars would write a line per refresh into a log.
    pipe.set_progress_bar_config(
        leave=False, position=1, desc="steps", disable=not accelerator.is_local_main_process or None
    )
    return pipe, revision


def write_images(
    args: GenerateArguments,
    accelerator: Accelerator,
    pipe: PixelREPAPipeline,
    images: dict[Path, tuple[int, int]],
    settings: dict[str, Any],
) -> None:
    """Generate this process's share of the images; `images` maps path to (class id, seed)."""
    items = list(images.items())
    batches = [items[start : start + args.batch_size] for start in range(0, len(items), args.batch_size)]
    # Processes share whole batches, so the bits of a batch do not depend on their number.
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    names = pipe.config.id2label or {}
    share = f"images of process 0 of {accelerator.num_processes}"
    with tqdm(total=sum(map(len, mine)), desc=share, disable=not accelerator.is_main_process or None) as progress:
        for batch in mine:
            made = pipe(
                [label for _, (label, _) in batch],
                **{name: settings[name] for name in CALL_SETTINGS if name in settings},
                generator=seeded(seed for _, (_, seed) in batch),
            ).images
            for (path, (label, seed)), image in zip(batch, made, strict=True):
                facts = {"class_id": label, "class_name": names.get(str(label), str(label)), "seed": seed}
                info = png_info({**settings, **facts}, args.scheduler)
                write_atomically(path, lambda file, image=image, info=info: image.save(file, "PNG", pnginfo=info))
                progress.update()


def png_info(facts: dict[str, Any], scheduler: str | None) -> PngImagePlugin.PngInfo:
    """Text chunks of one image: its settings, library versions, and the command that makes it again."""
    command = [
        "pixelrepa-generate", "--pipeline", facts["pipeline"],
        "--class_labels", str(facts["class_id"]), "--seeds", str(facts["seed"]),
        "--num_inference_steps", str(facts["num_inference_steps"]), "--guidance_scale", repr(facts["guidance_scale"]),
        "--guidance_interval", *map(repr, facts["guidance_interval"]), "--dtype", facts["dtype"],
    ]  # fmt: skip
    for name in CALL_SETTINGS[3:]:
        if name in facts:
            value = facts[name]
            command += [f"--{name}", *map(repr, value if isinstance(value, list) else [value])]
    command += ["--guidance_transformer", facts["guidance_transformer"]] if "guidance_transformer" in facts else []
    command += ["--revision", facts["revision"]] if facts["revision"] else []
    command += ["--scheduler", scheduler] if scheduler else []
    command += ["--output_dir", "again"]
    info = PngImagePlugin.PngInfo()
    for key, value in {**facts, "command": shlex.join(command), "versions": versions()}.items():
        if value is not None:
            info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    return info


def write_grid(path: Path, images: dict[Path, tuple[int, int]], names: dict[str, str], columns: int | None) -> None:
    pictures = []
    for file in images:
        with Image.open(file) as image:
            pictures.append(image.convert("RGB"))
    labels = [f"{names.get(str(label), str(label)).split(',')[0]} · {seed}" for label, seed in images.values()]
    grid = make_grid(pictures, labels, columns=columns)
    write_atomically(path, lambda temporary: grid.save(temporary, "PNG"))


def cli() -> None:
    run(lambda: main(parse(GenerateArguments, __doc__.partition("\n")[0])))
