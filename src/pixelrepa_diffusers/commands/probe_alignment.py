"""Measure whether alignment pulls images towards what the teacher finds typical (the probe of PixelREPA, arXiv 2603.14366).

    pixelrepa-probe-alignment --pipelines jit-b-16 repa-b-16 pixelrepa-b-16 --data_dir imagenet/train \\
        --teacher facebook/dinov2-base --network inception --output_dir probe

Per class, the training images nearest to the class centroid in the teacher's space and those farthest from it are noised to
t = 0.2 and denoised by each pipeline. The result is the Fréchet distance between denoised and original images, per subset.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .. import JiTFlowMatchScheduler, PixelREPAPipeline
from ..cli import check_launch, flag, parse, run
from ..evaluation import (
    FeatureSpace,
    accumulate,
    extract,
    feature_statistics,
    file_images,
    network_name,
    open_network,
)
from ..files import write_atomically, write_json
from ..images import list_classes, to_uint8
from ..objective import interpolate
from ..sampling import DTYPES, describe_pipeline, device_name, fetch_pipeline, load_pipeline, seeded, versions


@dataclass
class ProbeArguments:
    pipelines: list[str] = flag(help="Saved pipelines or training checkpoints, or Hub ids.")
    data_dir: Path = flag(help="Training images, one sub-folder per class, numbered by sorted name as in training.")
    teacher: str = flag(help="Folder or Hub id of the vision encoder whose features define near and far.")
    output_dir: Path = flag(help="Receives probe.json, probe.md and probe.png.")
    names: list[str] | None = flag(None, "Names of the pipelines in the results. Default: as given.")

    network: str = flag(
        "teacher", "Features of the Fréchet distance: teacher, inception, or another encoder's folder or Hub id."
    )
    inception_weights: str | None = flag(None, "torch-fidelity's Inception weights; downloaded by default.")
    image_size: int = flag(224, "Side that images are resized to for vision encoders.", ge=1)
    pooling: str = flag(
        "patches", "Feature of a vision encoder: mean patch (which alignment uses) or class token.",
        choices=["patches", "class"],
    )  # fmt: skip

    images_per_class: int = flag(100, "Number of nearest images, and of farthest ones.", ge=1)
    max_classes: int = flag(100, "Number of classes, a random choice where there are more.", ge=1)
    time: float = flag(0.2, "t that images are noised to; 0 is noise, 1 the image.", gt=0, lt=1)
    num_inference_steps: int = flag(50, "Steps from 0 to 1; --time must lie on their grid.", ge=1)
    guidance_scale: float = flag(1.0, "Guidance scale of all pipelines; 1 turns guidance off.", ge=0)
    seed: int = flag(0, "Seed of the choice of classes; image i is noised with seed + i.")
    dtype: str = flag("float32", "Data type of the transformers.", choices=DTYPES)
    batch_size: int = flag(64, "Images per batch and process.", ge=1)
    overwrite: bool = flag(False, "Replace an earlier probe in --output_dir.")


SUBSETS = ("near", "far")


class LateScheduler(JiTFlowMatchScheduler):
    """The method's solver from the grid point `start_time` on."""

    start_time = 0.0

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        # Heun's method calls the model twice at an interior point; the second call starts a step.
        first = round(self.start_time * num_inference_steps) * self.order
        self.timesteps, self.sigmas = self.timesteps[first:], self.sigmas[first:]


@dataclass(frozen=True)
class Item:
    """A training image, its class, and its number in the data set, which seeds its noise."""

    path: Path
    label: int
    number: int


def find_classes(args: ProbeArguments) -> tuple[dict[int, list[Item]], int]:
    """Images of the probed classes, and the image size of the pipelines."""
    folders = list_classes(args.data_dir)
    configs = [describe_pipeline(name).transformer.config for name in args.pipelines]
    size = configs[0].sample_size
    if {(config.num_classes, config.sample_size) for config in configs} != {(len(folders), size)}:
        raise ValueError(f"The pipelines must have one image size, and the {len(folders)} classes of {args.data_dir}.")
    chosen = range(len(folders))
    if len(folders) > args.max_classes:
        chosen = sorted(random.Random(args.seed).sample(chosen, args.max_classes))
    classes, number = {}, 0
    for label, (name, paths) in enumerate(folders.items()):
        if label in chosen:
            if len(paths) < 2 * args.images_per_class:
                raise ValueError(
                    f"Class {name} has {len(paths)} images: give --images_per_class at most {len(paths) // 2}, or near "
                    "and far images overlap."
                )
            classes[label] = [Item(path, label, number + index) for index, path in enumerate(paths)]
        number += len(paths)
    return classes, size


def split_by_distance(
    args: ProbeArguments, accelerator: Accelerator, classes: dict[int, list[Item]], size: int, teacher
) -> dict[str, list[Item]]:
    """Near and far images of every class, by Euclidean distance to the mean feature of the class."""
    # Each class is processed by one process, so the split does not depend on their number.
    mine = list(classes.items())[accelerator.process_index :: accelerator.num_processes]
    split = {}
    for label, items in tqdm(mine, desc="centroids", disable=not accelerator.is_main_process or None):
        read = file_images([item.path for item in items], size)
        batches = torch.arange(len(items)).split(args.batch_size)
        features = [extract(teacher, read(batch.tolist()))["features"].cpu().double() for batch in batches]
        features = torch.cat(features)  # (images of the class, D)
        order = (features - features.mean(dim=0)).norm(dim=1).argsort(stable=True).tolist()
        nearest, farthest = order[: args.images_per_class], order[-args.images_per_class :]
        split[label] = {"near": sorted(nearest), "far": sorted(farthest)}
    split = dict(pair for part in gather_object([split]) for pair in part.items())
    return {name: [classes[label][index] for label in classes for index in split[label][name]] for name in SUBSETS}


def noised_and_denoised(args: ProbeArguments, pipeline: PixelREPAPipeline, items: list[Item]):
    """Images by index: the item's image, noised to t = `args.time` and denoised by the pipeline."""
    config = pipeline.transformer.config
    read = file_images([item.path for item in items], config.sample_size)

    def make_images(indices: Sequence[int]) -> torch.Tensor:
        batch, images = [items[index] for index in indices], read(indices).float() / 127.5 - 1
        generators = seeded(args.seed + item.number for item in batch)
        noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for generator in generators])
        z = interpolate(images, config.noise_scale * noise, torch.full((len(batch),), args.time))
        made = pipeline(
            [item.label for item in batch],
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
            latents=z / config.noise_scale,  # the pipeline multiplies its latents by noise_scale
            output_type="pt",
        ).images
        return to_uint8(made, (0, 1))

    return make_images


def main(args: ProbeArguments) -> dict[str, Any]:
    """Probe the pipelines and return the content of probe.json."""
    accelerator = Accelerator()
    check_launch(accelerator.num_processes)
    steps = args.time * args.num_inference_steps
    if abs(steps - round(steps)) > 1e-6:
        raise ValueError(f"--time {args.time} must be a step of --num_inference_steps {args.num_inference_steps}.")
    names = args.names or args.pipelines
    if len(names) != len(args.pipelines) or len(set(names)) < len(names):
        raise ValueError(f"--names: give one name per pipeline, all different; got {names}.")
    classes, size = find_classes(args)
    if (args.output_dir / "probe.json").exists() and not args.overwrite:
        raise FileExistsError(f"{args.output_dir} has a probe: choose another --output_dir, or pass --overwrite.")
    accelerator.wait_for_everyone()  # every process looks before any writes

    with accelerator.local_main_process_first():  # the main process downloads, the others read the cache
        folders = [fetch_pipeline(name)[0] for name in args.pipelines]
        teacher = network = open_network(args.teacher, None, args.image_size, args.pooling)
        if args.network != "teacher":
            network = open_network(args.network, args.inception_weights, args.image_size, args.pooling)
    teacher, network = teacher.to(accelerator.device), network.to(accelerator.device)
    subsets = split_by_distance(args, accelerator, classes, size, teacher)
    space = FeatureSpace("teacher", network, ("fd_teacher",))

    def measure(make_images, subset: str, name: str):
        count, description = len(subsets[subset]), f"{name}, {subset}"
        tally = accumulate(make_images, count, [space], args.batch_size, description=description)
        return feature_statistics(tally, space)

    real = {
        subset: measure(file_images([item.path for item in items], size), subset, "real images")
        for subset, items in subsets.items()
    }
    distances = {}
    for name, folder in zip(names, folders, strict=True):
        pipe = load_pipeline(folder, args.dtype)
        pipe.scheduler = LateScheduler(solver=pipe.scheduler.config.get("solver", "heun"))
        pipe.scheduler.start_time = args.time
        distances[name] = {
            subset: measure(noised_and_denoised(args, pipe, items), subset, name).distance(real[subset])
            for subset, items in subsets.items()
        }

    record = {
        "frechet_distance": distances,
        "distance_of_the_real_subsets": real["near"].distance(real["far"]),
        "network": network_name(network),
        "teacher": network_name(teacher),
        "classes": list(classes),
        "images_per_subset": {subset: len(items) for subset, items in subsets.items()},
        "device": device_name(accelerator.device),
        "num_processes": accelerator.num_processes,
        "versions": versions(),
        "arguments": json.loads(json.dumps(asdict(args), default=str)),
        "subsets": {
            subset: [str(item.path.relative_to(args.data_dir)) for item in items] for subset, items in subsets.items()
        },
    }
    if accelerator.is_main_process:
        write_results(args.output_dir, record)
    accelerator.wait_for_everyone()
    return record


def write_results(output_dir: Path, record: dict[str, Any]) -> None:
    """Print the table; write it, the plot and, last because it marks the end, probe.json."""
    output_dir.mkdir(parents=True, exist_ok=True)
    table = "| pipeline | near | far |\n|---|---|---|\n"
    for name, pair in record["frechet_distance"].items():
        table += f"| {name} | {pair['near']:.4g} | {pair['far']:.4g} |\n"
    print(f"Fréchet distance, {record['network']}:\n{table}")
    write_atomically(output_dir / "probe.md", lambda file: file.write_text(table, encoding="utf-8"))
    plot(output_dir / "probe.png", record)
    write_json(output_dir / "probe.json", record)


def plot(path: Path, record: dict[str, Any]) -> None:
    """One group of bars per subset, one bar per pipeline."""
    from matplotlib.figure import Figure  # slow to import

    distances = record["frechet_distance"]
    figure = Figure(figsize=(3 + 1.2 * len(distances), 4), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(distances)
    for index, (name, pair) in enumerate(distances.items()):
        offset = (index - (len(distances) - 1) / 2) * width
        bars = axis.bar([offset, 1 + offset], [pair["near"], pair["far"]], width, label=name)
        axis.bar_label(bars, fmt="%.3g")
    axis.set_xticks([0, 1], ["near the class centroid", "far from it"])
    axis.set_ylabel("Fréchet distance to the originals")
    axis.set_title(f"noised to t = {record['arguments']['time']:g}, denoised")
    axis.legend(fontsize=8)
    axis.margins(y=0.15)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def cli() -> None:
    run(lambda: main(parse(ProbeArguments, __doc__.partition("\n")[0])))
