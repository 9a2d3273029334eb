"""Measure whether alignment pulls images towards what the teacher finds typical (the probe of PixelREPA, arXiv 2603.14366).

    pixelrepa-probe-alignment --pipelines jit-b-16 repa-b-16 pixelrepa-b-16 --data_dir imagenet/train \\
        --teacher facebook/dinov2-base --network inception --output_dir probe

Per class, the training images nearest to the class centroid in the teacher's space and those farthest from it are noised to
t = 0.2 and denoised by each pipeline. The result is the Fréchet distance between denoised and original images, per subset.
"""

import json
import random
from collections.abc import Callable, Sequence
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
    InceptionNetwork,
    VisionEncoderNetwork,
    accumulate,
    extract,
    feature_statistics,
    network_name,
)
from ..files import write_atomically, write_json
from ..images import list_classes, read_image, to_uint8
from ..objective import interpolate
from ..sampling import (
    DTYPES,
    describe_pipeline,
    device_name,
    fetch_pipeline,
    load_pipeline,
    seeded,
    versions,
)


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
        # Heun's method evaluates an interior point twice; the second evaluation starts a step.
        first = round(self.start_time * num_inference_steps) * self.order
        self.timesteps, self.sigmas = self.timesteps[first:], self.sigmas[first:]


@dataclass(frozen=True)
class Item:
    """A training image, its class, and its number in the data set, which seeds its noise."""

    path: Path
    label: int
    number: int


def find_classes(args: ProbeArguments) -> tuple[dict[int, list[Item]], int]:
    """Return the images of the probed classes, and the number of all classes."""
    folders = list_classes(args.data_dir)
    chosen = range(len(folders))
    if len(folders) > args.max_classes:
        chosen = sorted(random.Random(args.seed).sample(chosen, args.max_classes))
    classes, number = {}, 0
    for label, (name, paths) in enumerate(folders.items()):
        if label in chosen:
            if len(paths) < 2 * args.images_per_class:
                raise ValueError(
                    f"Class {name} has {len(paths)} images: near and far images would overlap. Give --images_per_class "
                    f"at most {len(paths) // 2}."
                )
            classes[label] = [Item(path, label, number + index) for index, path in enumerate(paths)]
        number += len(paths)
    return classes, len(folders)


def image_size(args: ProbeArguments, num_classes: int) -> int:
    """The one image size of all pipelines, which must fit the data."""
    sizes = set()
    for name in args.pipelines:
        config = describe_pipeline(name).transformer.config
        if config.num_classes != num_classes or config.in_channels != 3:
            raise ValueError(
                f"{name} makes {config.in_channels}-channel images of {config.num_classes} classes; {args.data_dir} has "
                f"RGB images of {num_classes} classes. Give the data it was trained on."
            )
        sizes.add(config.sample_size)
    if len(sizes) > 1:
        raise ValueError(f"The pipelines make images of {sorted(sizes)} pixels; compare those of one size.")
    return sizes.pop()


def split_by_distance(
    args: ProbeArguments, accelerator: Accelerator, classes: dict[int, list[Item]], size: int, teacher
) -> dict[str, list[Item]]:
    """
    Near and far images of every class, by Euclidean distance to the mean feature of the class.

    Each class is processed by one process, so the split does not depend on their number.
    """
    mine = list(classes.items())[accelerator.process_index :: accelerator.num_processes]
    split = {}
    for label, items in tqdm(mine, desc="centroids", disable=not accelerator.is_main_process or None):
        features = []
        for start in range(0, len(items), args.batch_size):
            images = torch.stack([read_image(item.path, size) for item in items[start : start + args.batch_size]])
            features.append(extract(teacher, images)["features"].cpu().double())
        features = torch.cat(features)  # (images of the class, D)
        order = (features - features.mean(dim=0)).norm(dim=1).argsort(stable=True).tolist()
        nearest, farthest = order[: args.images_per_class], order[-args.images_per_class :]
        split[label] = {"near": sorted(nearest), "far": sorted(farthest)}
    split = dict(pair for part in gather_object([split]) for pair in part.items())
    return {name: [classes[label][index] for label in classes for index in split[label][name]] for name in SUBSETS}


def noised_and_denoised(args: ProbeArguments, pipeline: PixelREPAPipeline, items: list[Item]):
    """Images by index: the item's image, noised to t = `args.time` and denoised by the pipeline."""
    config = pipeline.transformer.config

    def make_images(indices: Sequence[int]) -> torch.Tensor:
        batch = [items[index] for index in indices]
        images = torch.stack([read_image(item.path, config.sample_size) for item in batch]).float() / 127.5 - 1
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


def load_probed(name: str, folder: Path, args: ProbeArguments) -> PixelREPAPipeline:
    """A pipeline whose solver starts at `args.time`."""
    pipe = load_pipeline(folder, getattr(torch, args.dtype))
    if not isinstance(pipe.scheduler, JiTFlowMatchScheduler):
        raise ValueError(f"{name} has a {type(pipe.scheduler).__name__}; the probe needs a JiTFlowMatchScheduler.")
    pipe.scheduler = LateScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.start_time = args.time
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(args: ProbeArguments) -> dict[str, Any]:
    """Probe the pipelines and return the content of probe.json."""
    accelerator = Accelerator()
    check_launch(accelerator.num_processes)
    steps = args.time * args.num_inference_steps
    if abs(steps - round(steps)) > 1e-6:
        raise ValueError(
            f"--time {args.time} must lie on the grid of {args.num_inference_steps} steps, k/{args.num_inference_steps}."
        )
    names = args.names or args.pipelines
    if len(names) != len(args.pipelines) or len(set(names)) < len(names):
        raise ValueError(f"--names: give one name per pipeline, all different; got {names}.")
    classes, num_classes = find_classes(args)
    size = image_size(args, num_classes)
    path = args.output_dir / "probe.json"
    if path.exists() and not args.overwrite:
        raise FileExistsError(f"{path} exists. Choose another --output_dir, or pass --overwrite to replace it.")
    accelerator.wait_for_everyone()  # every process looks before any writes

    with accelerator.local_main_process_first():  # which downloads
        folders = [fetch_pipeline(name)[0] for name in args.pipelines]
        teacher = VisionEncoderNetwork.from_pretrained(args.teacher, args.image_size, args.pooling)
        network = teacher
        if args.network == "inception":
            network = InceptionNetwork(args.inception_weights)
        elif args.network != "teacher":
            network = VisionEncoderNetwork.from_pretrained(args.network, args.image_size, args.pooling)
    teacher, network = teacher.to(accelerator.device), network.to(accelerator.device)
    subsets = split_by_distance(args, accelerator, classes, size, teacher)
    space = FeatureSpace("teacher", network, ("fd_teacher",))

    def measure(make_images: Callable[[Sequence[int]], torch.Tensor], subset: str, description: str):
        tally = accumulate(
            make_images, len(subsets[subset]), [space], args.batch_size, description=f"{description}, {subset}"
        )
        return feature_statistics(tally, space)

    def originals(items: list[Item]) -> Callable[[Sequence[int]], torch.Tensor]:
        return lambda indices: torch.stack([read_image(items[index].path, size) for index in indices])

    real = {subset: measure(originals(items), subset, "real images") for subset, items in subsets.items()}
    distances = {}
    for name, folder in zip(names, folders, strict=True):
        pipe = load_probed(name, folder, args).to(accelerator.device)
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
    lines = ["| pipeline | near | far |", "|---|---|---|"]
    lines += [
        f"| {name} | {pair['near']:.4g} | {pair['far']:.4g} |" for name, pair in record["frechet_distance"].items()
    ]
    table = "\n".join(lines) + "\n"
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
        bars = axis.bar(
            [group + offset for group in range(2)], [pair[subset] for subset in SUBSETS], width, label=name
        )
        axis.bar_label(bars, fmt="%.3g")
    axis.set_xticks(range(2), ["near the class centroid", "far from it"])
    axis.set_ylabel("Fréchet distance to the originals")
    axis.set_title(f"noised to t = {record['arguments']['time']:g}, denoised", fontsize=10)
    axis.legend(fontsize=8)
    axis.margins(y=0.15)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def cli() -> None:
    run(lambda: main(parse(ProbeArguments, __doc__.partition("\n")[0])))
