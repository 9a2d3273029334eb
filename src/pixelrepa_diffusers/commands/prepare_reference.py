"""Reference statistics of a set of images, for FID, Fréchet distances, precision and recall.

    pixelrepa-prepare-reference --train_data_dir imagenet/train --resolution 256 --output_file in256.npz
    pixelrepa-prepare-reference --dataset_name ylecun/mnist --network teacher_folder --image_size 70 \\
        --resolution 32 --keep_features --output_file mnist.npz

Images are read and center-cropped (ADM) as in training, and then resized by the feature network. The .npz file holds `mu` and
`sigma`, as every FID program reads them, the number of images, and the name and hash of the network. With several processes
(`accelerate launch -m pixelrepa_diffusers.commands.prepare_reference ...`) the statistics change by rounding only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from ..cli import check_launch, flag, parse, run
from ..evaluation import FeatureBank, FeatureMoments, FeatureStatistics, extract, gather, open_network
from ..training.data import DataArguments, Example, ImageSource, open_source, read_pixels


@dataclass
class ReferenceArguments:
    output_file: Path = flag(help="The .npz file to write; it must not exist.")
    train_data_dir: str | None = flag(
        None, "Folder of images, also in sub-folders, or one of pixelrepa-prepare-dataset."
    )
    dataset_name: str | None = flag(
        None, "Instead of a folder: data set on the Hub, its folder, or one of `save_to_disk`."
    )
    dataset_config_name: str | None = flag(None, "Configuration of the data set.")
    dataset_split: str = flag("train", "Split of the data set.")
    cache_dir: str | None = flag(None, "Cache of `datasets`.")
    image_column: str = flag("image", "Column of the images.")
    num_samples: int | None = flag(None, "Number of images, evenly spaced over the data. Default: all.", ge=2)
    resolution: int = flag(256, "Side of the center crop in pixels, as in training.", ge=1)

    network: str = flag("inception", "inception, or the folder or Hub id of a transformers vision encoder.")
    inception_weights: str | None = flag(None, "torch-fidelity's Inception weights; downloaded by default.")
    image_size: int = flag(224, "Side in pixels that images are resized to for a vision encoder.", ge=1)
    pooling: str = flag(
        "class", "Class token of a vision encoder, or mean of its patches.", choices=["class", "patches"]
    )
    keep_features: bool = flag(False, "Also store half-precision features, which precision and recall need.")

    batch_size: int = flag(64, "Images per batch and process.", ge=1)
    dataloader_num_workers: int = flag(4, "Workers per process that read images.", ge=0)


def read_batch(resolution: int, examples: Sequence[Example]) -> torch.Tensor:
    """Center crops, uint8 (B, 3, resolution, resolution)."""
    return torch.stack([read_pixels(example, resolution) for example in examples])


def open_images(args: ReferenceArguments) -> ImageSource:
    """Open the images of `args` as training does."""
    names = ("train_data_dir", "dataset_name", "dataset_config_name", "dataset_split", "cache_dir", "image_column")
    same = {name: getattr(args, name) for name in names}
    source = open_source(DataArguments(**same, unconditional=True, max_train_samples=args.num_samples))
    if source.resolution not in (None, args.resolution):
        raise ValueError(
            f"--resolution is {args.resolution}, but {args.train_data_dir} was prepared at {source.resolution} pixels."
        )
    if args.num_samples not in (None, len(source)):
        raise ValueError(f"--num_samples is {args.num_samples}, but there are only {len(source)} images.")
    return source


def main(args: ReferenceArguments) -> FeatureStatistics:
    """Write the statistics and return them, on every process."""
    accelerator = Accelerator()
    check_launch(accelerator.num_processes)
    if args.output_file.suffix != ".npz" or args.output_file.exists():
        raise FileExistsError(f"--output_file must be a new file that ends in .npz, got {args.output_file}.")
    accelerator.wait_for_everyone()  # all processes check before one writes

    with accelerator.main_process_first():
        source = open_images(args)
        network = open_network(args.network, args.inception_weights, args.image_size, args.pooling)
    network.to(accelerator.device)

    # Strided by hand: a loader prepared by accelerate repeats images to make the processes even.
    loader = DataLoader(
        Subset(source, range(accelerator.process_index, len(source), accelerator.num_processes)),
        collate_fn=partial(read_batch, args.resolution),
        batch_size=args.batch_size,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    moments, bank = FeatureMoments(), FeatureBank()
    # A bar around the loader would start its workers twice: tqdm.auto calls `iter` when it is created, too.
    with tqdm(total=len(loader), desc="batches", disable=None if accelerator.is_main_process else True) as bar:
        for batch in loader:
            features = extract(network, batch)["features"]
            moments.update(features)
            if args.keep_features:
                bank.update(features)
            bar.update()

    statistics = FeatureStatistics.from_moments(gather(moments), gather(bank) if args.keep_features else None, network)
    if accelerator.is_main_process:
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        statistics.save(args.output_file)
        print(f"{args.output_file}: {statistics.count} images, {statistics.network}, sha256 {statistics.sha256[:12]}")
    accelerator.wait_for_everyone()
    return statistics


def cli() -> None:
    run(lambda: main(parse(ReferenceArguments, __doc__.partition("\n")[0])))


if __name__ == "__main__":
    cli()
