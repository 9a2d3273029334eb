"""Does aligning with a teacher draw images towards what the teacher finds typical? The probe of PixelREPA (arXiv 2603.14366).

For each class the training images nearest to the class's centroid in the teacher's space, and those farthest from it, are
noised to t = 0.2 and denoised by each pipeline from there. The Fréchet distance between the denoised images and the images
themselves is measured for both subsets. The paper finds plain REPA worse than no alignment on the near subset (its
features are matched at the cost of pixels) and better on the far one.

    python pipelines/probe_alignment.py --pipelines jit-b-16 repa-b-16 pixelrepa-b-16 --data_dir imagenet/train \\
        --teacher facebook/dinov2-base --network inception --output_dir probe

The demo's digits, on any CPU:

    python pipelines/probe_alignment.py --pipelines outputs/demo/run/pipeline --data_dir outputs/demo/train \\
        --teacher outputs/demo/teacher --image_size 28 --images_per_class 50 --num_inference_steps 10 \\
        --output_dir outputs/demo/probe

--data_dir has one sub-folder per class, numbered by their sorted names as in training. --output_dir receives probe.json,
probe.md and probe.png. On several GPUs, with the same images as on one: `accelerate launch pipelines/probe_alignment.py`.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from .. import JiTFlowMatchScheduler, PixelREPAPipeline
from ..cli import parse, run
from ..evaluation import (
    FeatureSpace,
    InceptionNetwork,
    VisionEncoderNetwork,
    accumulate,
    extract,
    feature_statistics,
    network_name,
)
from ..files import write_atomically
from ..images import list_images, read_image, to_uint8
from ..sampling import check_launch, describe_pipeline, device_name, fetch_pipeline, seeded, versions


@dataclass
class ProbeArguments:
    pipelines: list[str] = field(metadata={"help": "Saved pipelines: folders or Hub ids."})
    data_dir: Path = field(metadata={"help": "Training images, one sub-folder per class."})
    teacher: str = field(metadata={"help": "The vision encoder (folder or Hub id) in whose space typical is meant."})
    output_dir: Path = field(metadata={"help": "Receives probe.json, probe.md and probe.png."})
    names: list[str] | None = field(default=None, metadata={"help": "What to call the pipelines. Default: as given."})

    network: str = field(
        default="teacher",
        metadata={"help": "Space of the Fréchet distance: teacher, inception, or another encoder's folder or Hub id."},
    )
    inception_weights: str | None = field(default=None, metadata={"help": "torch-fidelity's; downloaded by default."})
    image_size: int = field(default=224, metadata={"help": "Side that images are resized to for vision encoders."})
    pooling: str = field(
        default="patches",
        metadata={"help": "A vision encoder's vector of an image: the mean patch, as aligned to, or the class token.",
                  "choices": ["patches", "class"]},
    )  # fmt: skip

    images_per_class: int = field(default=100, metadata={"help": "Nearest, and as many farthest."})
    max_classes: int = field(default=100, metadata={"help": "Classes, drawn at random where there are more."})
    time: float = field(default=0.2, metadata={"help": "t that images are noised to; 0 is noise, 1 the image."})
    num_inference_steps: int = field(default=50, metadata={"help": "Steps from 0 to 1; t must lie on their grid."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Equal for all pipelines; 1 turns guidance off."})
    seed: int = field(
        default=0, metadata={"help": "Of the choice of classes, and of the noise with the image's number."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Of the transformers.", "choices": ["float32", "bfloat16", "float16"]}
    )
    batch_size: int = field(default=64, metadata={"help": "Images per batch and process."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier probe in --output_dir."})


SUBSETS = ("near", "far")


class LateScheduler(JiTFlowMatchScheduler):
    """The method's solver from a grid point on: what comes before `start_time` is not evaluated."""

    start_time = 0.0

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        # Of an interior point's two evaluations by Heun's method the second starts a step.
        first = round(self.start_time * num_inference_steps) * self.order
        self.timesteps, self.sigmas = self.timesteps[first:], self.sigmas[first:]


@dataclass(frozen=True)
class Item:
    """A training image, its class, and its number, which keys its noise."""

    path: Path
    label: int
    number: int


def find_classes(args: ProbeArguments) -> tuple[dict[int, list[Item]], int]:
    """The images of the classes that are probed, and how many classes there are."""
    if not args.data_dir.is_dir():
        raise FileNotFoundError(f"--data_dir: no folder {args.data_dir}.")
    folders = sorted(path for path in args.data_dir.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ValueError(f"{args.data_dir} has no sub-folders: it needs one per class.")
    chosen = range(len(folders))
    if len(folders) > args.max_classes:
        chosen = sorted(random.Random(args.seed).sample(chosen, args.max_classes))
    classes, number = {}, 0
    for label, folder in enumerate(folders):
        paths = list_images(folder)
        if label in chosen:
            if len(paths) < 2 * args.images_per_class:
                raise ValueError(
                    f"{folder} has {len(paths)} images: --images_per_class {args.images_per_class} nearest and as many "
                    f"farthest would overlap. Choose at most {len(paths) // 2}."
                )
            classes[label] = [Item(path, label, number + place) for place, path in enumerate(paths)]
        number += len(paths)
    return classes, len(folders)


def check_pipeline(args: ProbeArguments, name: str, num_classes: int) -> PixelREPAPipeline:
    """A pipeline's description, refused where the probe would not be what it says."""
    plan = describe_pipeline(name)
    config = plan.transformer.config
    if config.num_classes != num_classes or config.in_channels != 3:
        raise ValueError(
            f"{name} makes {config.in_channels}-channel images of {config.num_classes} classes; {args.data_dir} has RGB "
            f"images of {num_classes} classes. Give the data it was trained on."
        )
    plan.check_inputs(0, args.guidance_scale, (0, 1), args.num_inference_steps, None, None, "pt", [])
    return plan


def split_by_distance(
    args: ProbeArguments, accelerator: Accelerator, classes: dict[int, list[Item]], size: int, teacher
) -> dict[str, list[Item]]:
    """Near and far images of every class by Euclidean distance to the mean of the class's vectors.

    A class is one process's, in batches of its own: the split does not depend on the number of processes.
    """
    mine = list(classes.items())[accelerator.process_index :: accelerator.num_processes]
    split = {}
    for label, items in tqdm(mine, desc="centroids", disable=not accelerator.is_main_process):
        vectors = []
        for start in range(0, len(items), args.batch_size):
            images = torch.stack([read_image(item.path, size) for item in items[start : start + args.batch_size]])
            vectors.append(extract(teacher, images)["features"].cpu().double())
        vectors = torch.cat(vectors)  # (images of the class, D)
        order = (vectors - vectors.mean(dim=0)).norm(dim=1).argsort(stable=True).tolist()
        nearest, farthest = order[: args.images_per_class], order[-args.images_per_class :]
        split[label] = {"near": sorted(nearest), "far": sorted(farthest)}
    split = dict(pair for part in gather_object([split]) for pair in part.items())
    return {name: [classes[label][place] for label in classes for place in split[label][name]] for name in SUBSETS}


def noised_and_denoised(args: ProbeArguments, pipeline: PixelREPAPipeline, items: list[Item]):
    """Images by number: an item's image at t = `args.time`, taken to t = 1 by the pipeline's solver."""
    config = pipeline.transformer.config

    def make_images(indices: Sequence[int]) -> torch.Tensor:
        batch = [items[index] for index in indices]
        images = torch.stack([read_image(item.path, config.sample_size) for item in batch]).float() / 127.5 - 1
        generators = seeded(args.seed + item.number for item in batch)
        noise = torch.stack([torch.randn(images.shape[1:], generator=generator) for generator in generators])
        # z = t·x + (1 − t)·e with e = noise_scale·noise; the pipeline multiplies what it is given by noise_scale.
        latents = args.time * images / config.noise_scale + (1 - args.time) * noise
        made = pipeline(
            [item.label for item in batch],
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
            latents=latents,
            output_type="pt",
        ).images
        return to_uint8(made, (0, 1))

    return make_images


def main(args: ProbeArguments) -> dict:
    """Probes the pipelines of `args` and returns what probe.json holds."""
    accelerator = Accelerator()
    check_launch(accelerator.num_processes)
    for name in ("images_per_class", "max_classes", "num_inference_steps", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    steps = args.time * args.num_inference_steps
    if not 0 < args.time < 1 or abs(steps - round(steps)) > 1e-6:
        raise ValueError(
            f"--time {args.time} must lie between 0 and 1 on the grid of {args.num_inference_steps} steps, "
            f"k/{args.num_inference_steps}."
        )
    names = args.pipelines if args.names is None else args.names
    if len(names) != len(args.pipelines) or len(set(names)) < len(names):
        raise ValueError(f"Give one name for each of the {len(args.pipelines)} pipelines, all different, got {names}.")
    classes, num_classes = find_classes(args)
    plans = [check_pipeline(args, name, num_classes) for name in args.pipelines]
    sizes = {plan.transformer.config.sample_size for plan in plans}
    if len(sizes) > 1:
        raise ValueError(f"The pipelines make images of {sorted(sizes)} pixels; compare those of one size.")
    path = args.output_dir / "probe.json"
    existing = path.exists()
    accelerator.wait_for_everyone()  # every process has looked before any writes
    if existing and not args.overwrite:
        raise FileExistsError(f"{path} exists. Choose another --output_dir, or pass --overwrite to replace it.")

    with accelerator.local_main_process_first():  # which downloads
        folders = [fetch_pipeline(name)[0] for name in args.pipelines]
        teacher = VisionEncoderNetwork.from_pretrained(args.teacher, args.image_size, args.pooling)
        network = teacher
        if args.network == "inception":
            network = InceptionNetwork(args.inception_weights)
        elif args.network != "teacher":
            network = VisionEncoderNetwork.from_pretrained(args.network, args.image_size, args.pooling)
    teacher, network = teacher.to(accelerator.device), network.to(accelerator.device)

    size = sizes.pop()
    subsets = split_by_distance(args, accelerator, classes, size, teacher)
    space = FeatureSpace("teacher", network, ("fd_teacher",))

    def measure(make_images, subset: str, description: str):
        tally = accumulate(
            make_images, len(subsets[subset]), [space], args.batch_size, description=f"{description}, {subset}"
        )
        return feature_statistics(tally, space)

    def real_images(items: list[Item]):
        return lambda indices: torch.stack([read_image(items[index].path, size) for index in indices])

    real = {subset: measure(real_images(items), subset, "real images") for subset, items in subsets.items()}
    distances = {}
    for name, folder in zip(names, folders, strict=True):
        pipe = PixelREPAPipeline.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(accelerator.device)
        if not isinstance(pipe.scheduler, JiTFlowMatchScheduler):
            raise ValueError(f"{name} has a {type(pipe.scheduler).__name__}; the probe needs a JiTFlowMatchScheduler.")
        pipe.scheduler = LateScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler.start_time = args.time
        pipe.set_progress_bar_config(disable=True)
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
        args.output_dir.mkdir(parents=True, exist_ok=True)
        lines = ["| pipeline | near | far |", "|---|---|---|"]
        lines += [f"| {name} | {pair['near']:.4g} | {pair['far']:.4g} |" for name, pair in distances.items()]
        table = "\n".join(lines) + "\n"
        print(f"Fréchet distance, {record['network']}:\n{table}")
        write_atomically(args.output_dir / "probe.md", lambda file: file.write_text(table, encoding="utf-8"))
        plot(args.output_dir / "probe.png", record)
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))  # last: it marks the end
    accelerator.wait_for_everyone()
    return record


def plot(path: Path, record: dict) -> None:
    """A group of bars for each subset, a bar for each pipeline."""
    from matplotlib.figure import Figure  # slow to import

    distances = record["frechet_distance"]
    figure = Figure(figsize=(3 + 1.2 * len(distances), 4), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(distances)
    for place, (name, pair) in enumerate(distances.items()):
        offset = (place - (len(distances) - 1) / 2) * width
        bars = axis.bar(
            [group + offset for group in range(2)], [pair[subset] for subset in SUBSETS], width, label=name
        )
        axis.bar_label(bars, fmt="%.3g")
    axis.set_xticks(range(2), ["near the class centroid", "far from it"])
    axis.set_ylabel("Fréchet distance to the images themselves")
    axis.set_title(f"noised to t = {record['arguments']['time']:g}, denoised", fontsize=10)
    axis.legend(fontsize=8)
    axis.margins(y=0.15)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def cli() -> None:
    run(lambda: main(parse(ProbeArguments, __doc__.partition("\n")[0])))
