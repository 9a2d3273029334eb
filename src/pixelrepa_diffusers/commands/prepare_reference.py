"""Reference statistics of a set of images, which FID, FD-DINOv2, precision and recall are measured against.

    python pipelines/prepare_reference.py --train_data_dir imagenet/train --resolution 256 --output_file in256.npz
    python pipelines/prepare_reference.py --dataset_name ylecun/mnist --network teacher_folder --image_size 70 \\
        --resolution 32 --keep_features --output_file mnist.npz

On several GPUs: `accelerate launch pipelines/prepare_reference.py ...`. On two CPU processes:
`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no
--dynamo_backend no pipelines/prepare_reference.py ...`. The number of processes and the batch size change the statistics by
rounding only.

The images are a folder, a data set of the Hub, or what training/prepare_dataset.py or `save_to_disk` wrote. Every one
is made RGB, cropped as in ADM to 8-bit --resolution pixels, and resized further only as the feature network does: the
images a model is trained on. The file holds `mu` and `sigma`, as every FID program reads them, with the number of
images, the network and its hash; `--keep_features` adds half-precision features (2 bytes each), without which
precision and recall cannot be measured.
"""

from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..cli import check_launch, parse, run
from ..evaluation import (
    FeatureBank,
    FeatureMoments,
    FeatureStatistics,
    InceptionNetwork,
    VisionEncoderNetwork,
    extract,
    gather,
    network_name,
    network_sha256,
    stack_images,
)
from ..images import DECODING_ERRORS, center_crop_adm, to_rgb
from ..stored_images import (
    check_source,
    is_prepared,
    open_data_set,
    open_prepared,
    scan_folder,
    stored_crop,
)


@dataclass
class ReferenceArguments:
    output_file: Path = field(metadata={"help": "The .npz to write; it must not exist."})
    train_data_dir: str | None = field(
        default=None,
        metadata={"help": "A folder of images, with sub-folders or not, or one that prepare_dataset.py wrote."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Instead of a folder: a data set's id on the Hub, its folder, or one of `save_to_disk`."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the data set."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where `datasets` keeps its files."})
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    num_samples: int | None = field(
        default=None, metadata={"help": "Images, evenly spaced over the data. Default: all of them."}
    )
    resolution: int = field(default=256, metadata={"help": "Side of the centre crop in pixels: the model's images."})

    network: str = field(
        default="inception", metadata={"help": "inception, or a transformers vision encoder's folder or Hub id."}
    )
    inception_weights: str | None = field(
        default=None, metadata={"help": "torch-fidelity's Inception weights; downloaded when not given."}
    )
    image_size: int = field(default=224, metadata={"help": "Side a vision encoder's images are resized to."})
    pooling: str = field(
        default="class",
        metadata={"help": "A vision encoder's class token, or mean of its patches.", "choices": ["class", "patches"]},
    )
    keep_features: bool = field(default=False, metadata={"help": "Keep the features, for precision and recall."})

    batch_size: int = field(default=64, metadata={"help": "Images per batch and process."})
    dataloader_num_workers: int = field(default=4, metadata={"help": "Processes per process that read images."})


class CroppedImages(Dataset):
    """The images at `indices` of a `datasets` data set, as uint8 (3, resolution, resolution)."""

    def __init__(self, images: datasets.Dataset, indices: list[int], resolution: int):
        self.images, self.indices, self.resolution = images, indices, resolution

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> torch.Tensor:
        index = self.indices[position]
        try:
            row = self.images[index]
            if "pixels" in row:
                return torch.from_numpy(stored_crop(row["pixels"], self.resolution, index).copy())
            image = row["image"]
            if image is None:
                raise ValueError("there is none")
            # Pillow itself only warns between its limit and twice its limit.
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}×{image.height} pixels are more than {Image.MAX_IMAGE_PIXELS}")
            image = to_rgb(image)
        except DECODING_ERRORS as error:
            raise ValueError(f"Image {index} of the data set cannot be read: {error}") from error
        return stack_images([center_crop_adm(image, self.resolution)])[0]


def open_images(args: ReferenceArguments) -> datasets.Dataset:
    """The data set of `args` with one column: `image`, or of a folder that prepare_dataset.py wrote `pixels`."""
    if args.train_data_dir and is_prepared(folder := Path(args.train_data_dir)):
        data, manifest = open_prepared(folder)
        if manifest["resolution"] != args.resolution:
            raise ValueError(
                f"--resolution is {args.resolution}, but {folder} was prepared at {manifest['resolution']} pixels: give that, "
                "or the images it was made from."
            )
        return data.select_columns("pixels")
    if args.dataset_name:
        data = open_data_set(args.dataset_name, args.dataset_config_name, args.dataset_split, args.cache_dir)
    else:
        # Not `datasets`' own reader of folders, which takes a class called "test" or "train" for a split.
        paths, _, _ = scan_folder(Path(args.train_data_dir), unconditional=True)
        data = datasets.Dataset.from_dict({"image": paths})
    column = args.image_column
    if column not in data.column_names:
        raise ValueError(f"--image_column: there is no column {column!r}, there are {data.column_names}.")
    return data.select_columns(column).rename_columns({column: "image"}).cast_column("image", datasets.Image())


def main(args: ReferenceArguments) -> FeatureStatistics:
    """Writes the statistics that `args` ask for and returns them, on every process."""
    accelerator = Accelerator()
    check_launch(accelerator.num_processes)

    # Every refusal that needs no data comes first.
    check_source(args, ("dataset_config_name", "dataset_split", "image_column"))
    if args.train_data_dir is not None and not Path(args.train_data_dir).is_dir():
        raise FileNotFoundError(f"--train_data_dir: no folder {args.train_data_dir}.")
    for name, least in (("batch_size", 1), ("resolution", 1), ("dataloader_num_workers", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    if args.output_file.suffix != ".npz":
        raise ValueError(f"--output_file must end in .npz, got {args.output_file}.")
    if args.output_file.exists():
        raise FileExistsError(f"--output_file: {args.output_file} exists. Remove it or choose another name.")
    accelerator.wait_for_everyone()  # every process looks before any writes

    with accelerator.main_process_first():
        if args.network == "inception":
            network = InceptionNetwork(args.inception_weights)
        else:
            network = VisionEncoderNetwork.from_pretrained(args.network, args.image_size, args.pooling)
        images = open_images(args)
    num_samples = len(images) if args.num_samples is None else args.num_samples
    if not 2 <= num_samples <= len(images):
        raise ValueError(
            f"--num_samples: {num_samples} images asked for, at least 2 are needed and {len(images)} there."
        )
    network.to(accelerator.device)

    # Strided by hand: a loader prepared by accelerate repeats images to make the processes even.
    spaced = [place * len(images) // num_samples for place in range(num_samples)]
    mine = spaced[accelerator.process_index :: accelerator.num_processes]
    loader = DataLoader(
        CroppedImages(images, mine, args.resolution),
        batch_size=args.batch_size,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    moments, bank = FeatureMoments(), FeatureBank()
    with tqdm(
        total=len(mine),
        desc=f"images of process 0 of {accelerator.num_processes}",
        disable=not accelerator.is_main_process,
    ) as progress:
        for batch in loader:
            features = extract(network, batch)["features"]
            moments.update(features)
            if args.keep_features:
                bank.update(features)
            progress.update(len(batch))

    statistics = FeatureStatistics.from_moments(
        gather(moments), gather(bank) if args.keep_features else None, network_name(network), network_sha256(network)
    )
    if accelerator.is_main_process:
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        statistics.save(args.output_file)
        print(f"{args.output_file}: {statistics.count} images, {statistics.network}, sha256 {statistics.sha256[:12]}")
    accelerator.wait_for_everyone()
    return statistics


def cli() -> None:
    run(lambda: main(parse(ReferenceArguments, __doc__.partition("\n")[0])))
