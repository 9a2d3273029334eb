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

from accelerate import Accelerator
from PIL import Image, PngImagePlugin
from tqdm.auto import tqdm

from .. import PixelREPAPipeline
from ..cli import as_words, check_launch, flag, parse, run
from ..files import only_writer, write_atomically, write_json
from ..images import make_grid
from ..sampling import (
    DTYPES,
    GUIDANCE_NAMES,
    SCHEDULERS,
    check_cuda_graphs,
    class_names,
    compile_transformer,
    describe_pipeline,
    device_name,
    fetch_pipeline,
    load_pipeline,
    sampling_settings,
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
    num_inference_steps: int = flag(50, "Sampling steps; N steps of heun take 2N - 1 NFE.", ge=1)
    guidance_scale: float | None = flag(None, "Default: the scale saved with the pipeline.")
    guidance_interval: list[float] | None = flag(None, "Guide where LOW < t < HIGH. Default: as saved.", nargs=2)
    self_guidance_scale: float | None = flag(None, "Scale of the guidance head; 0 turns it off. Default: as saved.")
    self_guidance_interval: list[float] | None = flag(None, "LOW HIGH, likewise. Default: as saved.", nargs=2)
    autoguidance_scale: float | None = flag(None, "Scale of the second transformer; 1 turns it off. Same default.")
    autoguidance_interval: list[float] | None = flag(None, "LOW HIGH, likewise. Default: as saved.", nargs=2)
    guidance_transformer: str | None = flag(None, "Folder of a second transformer, for autoguidance.")

    dtype: str = flag("float32", "Data type of the network.", choices=DTYPES)
    compile: bool = flag(False, "Compile the transformer's blocks: slow start, then faster.")
    cuda_graphs: bool = flag(False, "Compile the whole network into CUDA graphs: fastest for small batches on a GPU.")
    batch_size: int = flag(8, "Images per batch and process.", ge=1)
    max_grid_images: int = flag(256, "No grid.png for more images than this.", ge=0)
    overwrite: bool = flag(False, "Replace files of an earlier run in --output_dir.")


def parse_numbers(texts: list[str], name: str) -> list[int]:
    """Parse texts such as "3", "0-7" (both ends included) and "0-3,9" into distinct numbers, in the order given."""
    numbers: dict[int, None] = {}
    for text in ",".join(texts).split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"--{name}: {text!r} is neither a number such as 3 nor an ascending range such as 0-7.")
        numbers |= dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1))
    return list(numbers)


def select_classes(texts: list[str] | None, pipeline: PixelREPAPipeline) -> list[int]:
    """Return the distinct class ids of --class_labels."""
    num_classes = pipeline.transformer.config.num_classes
    if texts is None and num_classes > 1:
        raise ValueError(f"Name some of the {num_classes} classes with --class_labels; --list_classes prints them.")
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
    names = class_names(plan)
    if args.list_classes:
        for label, name in enumerate(names):
            accelerator.print(label, name)
        return []

    seeds, labels = parse_numbers(args.seeds, "seeds"), select_classes(args.class_labels, plan)
    given = {name: getattr(args, name) for name in GUIDANCE_NAMES}
    sampling = sampling_settings(plan, labels, args.num_inference_steps, given)
    images = {args.output_dir / f"{label:04d}_{seed:06d}.png": (label, seed) for label in labels for seed in seeds}
    grid_path, record_path = args.output_dir / "grid.png", args.output_dir / "arguments.json"
    existing = [path for path in (*images, grid_path, record_path) if path.exists()]
    if existing and not args.overwrite:
        raise FileExistsError(f"{existing[0]} exists. Choose another --output_dir, or pass --overwrite to replace it.")
    accelerator.wait_for_everyone()  # every process looks before any writes

    with only_writer(args.output_dir) if accelerator.is_main_process else contextlib.nullcontext():
        with accelerator.local_main_process_first():  # the main process downloads, the others read the cache
            folder, revision = fetch_pipeline(args.pipeline, args.revision)
        pipe = load_pipeline(folder, args.dtype, guidance_transformer=args.guidance_transformer)
        if args.scheduler:
            pipe.scheduler = SCHEDULERS[args.scheduler]()
        if args.compile or args.cuda_graphs:
            compile_transformer(pipe.transformer, args.cuda_graphs)
        settings = describe_run(pipe, args, revision, sampling)
        if accelerator.is_main_process:
            record = {
                **asdict(args),
                **settings,
                "output_dir": str(args.output_dir),
                "class_labels": {label: names[label] for label in labels},
                "seeds": seeds,
                "num_processes": accelerator.num_processes,
                "device": device_name(accelerator.device),
                "versions": versions(),
            }
            write_json(record_path, record)

        items = list(images.items())
        batches = [items[start : start + args.batch_size] for start in range(0, len(items), args.batch_size)]
        # Processes share whole batches, so the bits of a batch do not depend on their number.
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        share = f"batches of process 0 of {accelerator.num_processes}"
        for batch in tqdm(mine, desc=share, disable=None if accelerator.is_main_process else True):
            generators = seeded(seed for _, (_, seed) in batch)
            made = pipe([label for _, (label, _) in batch], generator=generators, **sampling).images
            for (path, (label, seed)), image in zip(batch, made, strict=True):
                facts = {"class_id": label, "class_name": names[label], "seed": seed}
                info = png_info({**settings, **facts}, args.scheduler)
                write_atomically(path, lambda file, image=image, info=info: image.save(file, "PNG", pnginfo=info))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and len(images) <= args.max_grid_images:
            pictures = [Image.open(path).convert("RGB") for path in images]  # convert() reads and closes the file
            captions = [f"{names[label].split(',')[0]} · {seed}" for label, seed in images.values()]
            grid = make_grid(pictures, captions, columns=len(seeds) if 1 < len(seeds) <= 16 else None)
            write_atomically(grid_path, lambda file: grid.save(file, "PNG"))
    skipped = "" if len(images) <= args.max_grid_images else " (no grid.png: more than --max_grid_images)"
    accelerator.print(f"{args.output_dir}: {len(images)} images{skipped}.")
    return list(images)


def describe_run(pipe: PixelREPAPipeline, args: Any, revision: str | None, sampling: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that the images of a run share; `args` are those of this command or of the page."""
    return {
        **sampling,
        "pipeline": args.pipeline,
        "revision": revision,
        "scheduler": {"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config},
        "dtype": args.dtype,
        "guidance_transformer": args.guidance_transformer,
    }


def png_info(facts: dict[str, Any], scheduler: str | None) -> PngImagePlugin.PngInfo:
    """Write an image's settings, library versions and the command that makes it again as text chunks of a PNG."""
    same = ("pipeline", "revision", "num_inference_steps", *GUIDANCE_NAMES, "guidance_transformer", "dtype")
    flags = {name: facts.get(name) for name in same}
    flags |= {"class_labels": facts["class_id"], "seeds": facts["seed"], "scheduler": scheduler, "output_dir": "again"}
    command = ["pixelrepa-generate", *as_words(flags)]
    info = PngImagePlugin.PngInfo()
    for key, value in {**facts, "command": shlex.join(command), "versions": versions()}.items():
        if value is not None:
            info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    return info


def cli() -> None:
    run(lambda: main(parse(GenerateArguments, __doc__.partition("\n")[0])))
