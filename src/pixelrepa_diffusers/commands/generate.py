"""Images from a PixelREPA or JiT pipeline: one PNG for every class and seed, and a labelled grid of them.

    python pipelines/generate.py --pipeline FOLDER_OR_HUB_ID --class_labels "golden retriever" 360 --seeds 0-7 \\
        --output_dir images

On several GPUs, with the same images as on one: `accelerate launch pipelines/generate.py ...`. On two CPU processes:
`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no
--dynamo_backend no pipelines/generate.py ...`.

Every image starts from the noise of its own seed, drawn on the CPU, so it does not depend on the other images of the
run. Batches are the same however many processes share them, hence so are the bits. Another `--batch_size` starts from
the same noise but may sum floating-point numbers in another order, which can move a pixel by one of 255 levels.

Each PNG holds text chunks that say how to make it again, `arguments.json` every argument after defaults are filled in.
"""

import contextlib
import json
import re
import shlex
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image, PngImagePlugin
from tqdm.auto import tqdm

from .. import PixelREPAPipeline
from ..cli import parse, run
from ..files import only_writer, write_atomically
from ..images import make_grid
from ..sampling import (
    SCHEDULERS,
    check_cuda_graphs,
    check_launch,
    compile_transformer,
    describe_pipeline,
    device_name,
    fetch_pipeline,
    seeded,
    versions,
)


@dataclass
class GenerateArguments:
    pipeline: str = field(metadata={"help": "A saved pipeline's folder, or its id on the Hub."})
    class_labels: list[str] = field(
        metadata={"help": "Class ids, or names the pipeline knows. Names with spaces quoted."}
    )
    output_dir: Path = field(metadata={"help": "Receives CLASS_SEED.png, grid.png and arguments.json."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub id."})
    seeds: list[str] = field(
        default_factory=lambda: ["0"], metadata={"help": "One image each: 0-7, or 3 5 8, or 0-3,9."}
    )

    scheduler: str | None = field(
        default=None, metadata={"help": "Replaces the saved scheduler.", "choices": list(SCHEDULERS)}
    )
    num_inference_steps: int = field(default=50, metadata={"help": "Steps; heun evaluates the model 2N - 1 times."})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Default: the scale saved with the pipeline."}
    )
    guidance_interval: list[float] | None = field(
        default=None, metadata={"help": "LOW HIGH, the times guidance acts in. Default: as saved."}
    )

    dtype: str = field(
        default="float32", metadata={"help": "Of the network.", "choices": ["float32", "bfloat16", "float16"]}
    )
    compile: bool = field(
        default=False, metadata={"help": "Compile the transformer's blocks: slow start, then faster."}
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={"help": "On a GPU: compile the whole network and replay it as CUDA graphs, for small batches."},
    )
    batch_size: int = field(default=8, metadata={"help": "Images per batch and process."})
    max_grid_images: int = field(default=256, metadata={"help": "grid.png is drawn for at most so many images."})
    overwrite: bool = field(default=False, metadata={"help": "Replace files of an earlier run in --output_dir."})


MOST_SEEDS = 1_000_000


def parse_seeds(texts: list[str]) -> list[int]:
    """Seeds of texts like "3", "0-7" (both ends included) and "0-3,9", in the order given."""
    seeds: list[int] = []
    for text in ",".join(texts).split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
        if match is None:
            raise ValueError(f"--seeds: {text!r} is neither a whole number such as 3 nor a range such as 0-7.")
        first, last = match[1], match[2] or match[1]
        if max(len(first), len(last)) > 19 or max(int(first), int(last)) >= 2**63:
            raise ValueError(f"--seeds: {text!r} is too large, a seed is below 2**63.")
        first, last = int(first), int(last)
        if last < first:
            raise ValueError(f"--seeds: the range {text!r} ends before it starts.")
        if len(seeds) + last - first >= MOST_SEEDS:
            raise ValueError(f"--seeds: with {text!r} they are more than {MOST_SEEDS}; make them in several runs.")
        seeds.extend(range(first, last + 1))
    repeated = sorted(seed for seed, count in Counter(seeds).items() if count > 1)
    if repeated:
        raise ValueError(f"--seeds: {repeated} given more than once; one class and seed is one image.")
    return seeds


def main(args: GenerateArguments) -> list[Path]:
    """Writes the images of `args` and returns their paths, class by class, seed by seed."""
    with contextlib.ExitStack() as stack:
        return generate(args, stack)


def generate(args: GenerateArguments, stack: contextlib.ExitStack) -> list[Path]:
    """See `main`; `stack` holds the output folder until the end."""
    accelerator = Accelerator()
    check_launch(accelerator.num_processes)

    # Every refusal comes before the weights are fetched or read.
    seeds = parse_seeds(args.seeds)
    for name in ("batch_size", "num_inference_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.max_grid_images < 0:
        raise ValueError(f"--max_grid_images must be at least 0, got {args.max_grid_images}.")
    check_cuda_graphs(args.cuda_graphs, accelerator.device)
    plan = describe_pipeline(args.pipeline, args.revision)
    # Longer digits are no id; Python does not even read thousands of them.
    class_labels = [int(text) if text.isdecimal() and len(text) < 19 else text for text in args.class_labels]
    class_labels = plan.get_label_ids(class_labels)
    if len(set(class_labels)) < len(class_labels):
        raise ValueError(f"--class_labels: {args.class_labels} names a class more than once (ids {class_labels}).")
    guidance_scale = plan.config.guidance_scale if args.guidance_scale is None else args.guidance_scale
    guidance_interval = list(args.guidance_interval or plan.config.guidance_interval)
    plan.check_inputs(
        class_labels, guidance_scale, guidance_interval, args.num_inference_steps, None, None, "pil", ["latents"]
    )

    images = {
        args.output_dir / f"{label:04d}_{seed:06d}.png": (label, seed) for label in class_labels for seed in seeds
    }
    draw_grid = len(images) <= args.max_grid_images
    record_path, grid_path = args.output_dir / "arguments.json", args.output_dir / "grid.png"
    if accelerator.is_main_process:
        stack.enter_context(only_writer(args.output_dir))
    accelerator.wait_for_everyone()
    existing = [path for path in (*images, record_path, *([grid_path] if draw_grid else [])) if path.exists()]
    # Every process looks before any writes.
    accelerator.wait_for_everyone()
    if existing and not args.overwrite:
        raise FileExistsError(
            f"{len(existing)} of the files to write exist already, the first is {existing[0]}. Choose another "
            "--output_dir, or pass --overwrite to replace them."
        )

    with accelerator.main_process_first():
        folder, revision = fetch_pipeline(args.pipeline, args.revision)
        pipe = PixelREPAPipeline.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    if args.scheduler:
        pipe.scheduler = SCHEDULERS[args.scheduler]()
    pipe.to(accelerator.device)
    if args.compile or args.cuda_graphs:
        compile_transformer(pipe.transformer, args.cuda_graphs)

    settings = {
        "pipeline": args.pipeline,
        "revision": revision,
        "scheduler": {"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config},
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": guidance_scale,
        "guidance_interval": guidance_interval,
        "dtype": args.dtype,
    }
    names = {label: (pipe.config.id2label or {}).get(str(label), str(label)) for label in class_labels}
    if accelerator.is_main_process:
        record = {
            **asdict(args),
            **settings,
            "output_dir": str(args.output_dir),
            "class_labels": names,
            "seeds": seeds,
            "num_processes": accelerator.num_processes,
            "device": device_name(accelerator.device),
            "versions": versions(),
        }
        text = json.dumps(record, indent=2, default=str) + "\n"
        write_atomically(record_path, lambda path: path.write_text(text, encoding="utf-8"))

    items = list(images.items())
    batches = [items[start : start + args.batch_size] for start in range(0, len(items), args.batch_size)]
    # Whole batches are dealt out: the bits of a batch then do not depend on the number of processes.
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    pipe.set_progress_bar_config(leave=False, position=1, desc="steps", disable=not accelerator.is_local_main_process)
    with tqdm(
        total=sum(map(len, mine)),
        desc=f"images of process 0 of {accelerator.num_processes}",
        disable=not accelerator.is_main_process,
    ) as progress:
        for batch in mine:
            made = pipe(
                [label for _, (label, _) in batch],
                guidance_scale=guidance_scale,
                guidance_interval=guidance_interval,
                num_inference_steps=args.num_inference_steps,
                generator=seeded(seed for _, (_, seed) in batch),
            ).images
            for (path, (label, seed)), image in zip(batch, made, strict=True):
                facts = {**settings, "class_id": label, "class_name": names[label], "seed": seed}
                info = png_info(facts, args.scheduler)
                write_atomically(path, lambda file, image=image, info=info: image.save(file, "PNG", pnginfo=info))
                progress.update()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process and draw_grid:
        drawn = []
        for path in images:
            with Image.open(path) as image:
                drawn.append(image.convert("RGB"))
        labels = [f"{names[label].split(',')[0]} · {seed}" for label, seed in images.values()]
        grid = make_grid(drawn, labels, columns=len(seeds) if 1 < len(seeds) <= 16 else None)
        write_atomically(grid_path, lambda path: grid.save(path, "PNG"))
    elif accelerator.is_main_process:
        print(f"No grid.png: {len(images)} images are more than --max_grid_images {args.max_grid_images}.")
    return list(images)


def png_info(facts: dict, scheduler: str | None) -> PngImagePlugin.PngInfo:
    """The text chunks of one image: its settings, the versions that made it, and the command that makes it again."""
    command = [
        "python", "pipelines/generate.py", "--pipeline", facts["pipeline"],
        "--class_labels", str(facts["class_id"]), "--seeds", str(facts["seed"]),
        "--num_inference_steps", str(facts["num_inference_steps"]), "--guidance_scale", repr(facts["guidance_scale"]),
        "--guidance_interval", *map(repr, facts["guidance_interval"]), "--dtype", facts["dtype"],
    ]  # fmt: skip
    command += ["--revision", facts["revision"]] if facts["revision"] else []
    command += ["--scheduler", scheduler] if scheduler else []
    command += ["--output_dir", "again"]
    info = PngImagePlugin.PngInfo()
    for key, value in {**facts, "command": shlex.join(command), "versions": json.dumps(versions())}.items():
        if value is not None:
            info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    return info


def cli() -> None:
    run(lambda: main(parse(GenerateArguments, __doc__.partition("\n")[0])))
