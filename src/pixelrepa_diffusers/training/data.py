"""Where the training images come from, and the order in which they arrive.

source = open_source(DataArguments(train_data_dir="photos"))  # classes are known, nothing is decoded
loader = ImageLoader(source, resolution=256, batch_size=32, seed=0)
for batch in loader:  # endless; `loader.position` is where to resume
    images = to_float(batch["pixel_values"].to(device, non_blocking=True))
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ..cli import flag
from ..images import BadImageError, list_classes, list_images, read_image


logger = logging.getLogger(__name__)

MANIFEST = "prepared.json"


@dataclass
class DataArguments:
    """Data (changes results). Give exactly one of `train_data_dir` and `dataset_name`."""

    train_data_dir: str | None = flag(
        None,
        "Folder with one sub-folder of images per class, or the output of pixelrepa-prepare-dataset. Transparent images are "
        "laid over white.",
    )
    dataset_name: str | None = flag(
        None,
        "Data set on the Hub, a folder written by `save_to_disk`, or anything else `datasets.load_dataset` takes as its "
        "first argument (with --data_files: `webdataset`, `parquet`, …).",
    )
    dataset_config_name: str | None = flag(None, "Configuration of the data set.")
    dataset_split: str = flag("train", "Split of the data set.")
    data_files: list[str] | None = flag(
        None, "Files of the data set: paths, patterns or URLs, for example 'shards/*.tar'."
    )
    cache_dir: str | None = flag(None, "Folder where `datasets` keeps downloads.")
    image_column: str = flag("image", "Column with the images (WebDataset: jpg, png, …).")
    label_column: str = flag("label", "Column with the classes (WebDataset: cls).")
    unconditional: bool = flag(False, "Ignore classes: every image has class 0.")
    num_classes: int | None = flag(
        None, "Number of classes, if the data do not define it (integer labels without names).", ge=1
    )
    max_train_samples: int | None = flag(
        None, "Use at most this many images, evenly spaced over the data (the first ones of a stream).", ge=1
    )
    streaming: bool = flag(False, "Read --dataset_name as a stream.")
    shuffle_buffer_size: int = flag(1000, "Number of images among which a stream is shuffled.", ge=1)
    on_bad_image: Literal["error", "skip"] = flag(
        "error", "A damaged image stops the run (error), or the next good image replaces it (skip)."
    )


class Example(NamedTuple):
    """A stored image: encoded bytes, a path or URL, or `uint8` pixels (3, resolution, resolution)."""

    image: bytes | str | np.ndarray
    label: int
    name: str


# ------------------------------------------------------------------------------------------------------------ sources


class ImageSource:
    """
    Images with random access: `source[i]` is an [`Example`], `len(source)` the number of images.

    Attributes:
        num_classes (`int`): Number of classes.
        id2label (`dict[str, str]`, *optional*): Class names, `{"0": name, …}` as in JSON; None for classes without names.
        resolution (`int`, *optional*): Side of images stored by pixelrepa-prepare-dataset; None for encoded images.
    """

    def __init__(
        self,
        images: datasets.Dataset,
        labels: np.ndarray,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        resolution: int | None = None,
        max_samples: int | None = None,
    ):
        if max_samples is not None and max_samples < len(images):
            chosen = np.arange(max_samples) * len(images) // max_samples
            images, labels = images.select(chosen), labels[chosen]
        # Rows stay in Arrow memory, so that stored pixels are copied once: from the memory map into the batch.
        self._images = images.with_format("arrow")
        self._labels = labels
        self.resolution = resolution
        self.num_classes = num_classes or (len(class_names) if class_names else int(labels.max(initial=0)) + 1)
        self.id2label = name_classes(class_names, self.num_classes)
        for index in np.flatnonzero((labels < 0) | (labels >= self.num_classes))[:1]:
            check_label(labels[index], self.num_classes, self[int(index)].name)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        row = self._images[index]
        label = int(self._labels[index])
        if self.resolution is not None:
            pixels = np.frombuffer(row["pixels"][0].as_buffer(), np.uint8).reshape(3, self.resolution, self.resolution)
            return Example(pixels, label, row["name"][0].as_py())
        return encoded_example(row.column(0)[0].as_py(), label, f"row {index}")

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


@dataclass
class StreamSource:
    """Images that can only be read in sequence. Same attributes as [`ImageSource`]; the number of images is unknown."""

    stream: datasets.IterableDataset
    image_column: str
    label_column: str | None
    num_classes: int
    id2label: dict[str, str] | None
    shuffle_buffer_size: int
    resolution: ClassVar[None] = None

    def shuffled(self, seed: int, epoch: int) -> StreamSource:
        """The stream of an epoch: `datasets` shuffles shards, then images in a buffer, by (seed, epoch)."""
        stream = self.stream.shuffle(seed=seed, buffer_size=self.shuffle_buffer_size)
        stream.set_epoch(epoch)
        return replace(self, stream=stream)

    def __iter__(self) -> Iterator[Example]:
        # `iter` has the same order everywhere; plain iteration changes it inside a DataLoader worker.
        for position, rows in enumerate(self.stream.iter(batch_size=1)):
            label = 0 if self.label_column is None else rows[self.label_column][0]
            example = encoded_example(rows[self.image_column][0], label, f"example {position} of the stream")
            check_label(label, self.num_classes, example.name)
            yield example


def encoded_example(image: dict | None, label: int, place: str) -> Example:
    """Example of an undecoded `datasets.Image`, which holds bytes, a path, or both."""
    content, path = (image["bytes"], image["path"]) if image else (None, None)
    if content is not None:
        return Example(content, label, f"{place} ({path})" if path else place)
    if path is None:
        raise ValueError(f"There is no image in {place}.")
    return Example(path, label, path)


def name_classes(names: list[str] | None, num_classes: int) -> dict[str, str] | None:
    return names and {str(label): name for label, name in enumerate(names[:num_classes])}


def check_label(label: int | None, num_classes: int, name: str) -> None:
    if label is None or not 0 <= label < num_classes:
        raise ValueError(
            f"Label {label} of image {name} is outside [0, {num_classes}). Correct the data, or pass --num_classes with "
            "the real number of classes."
        )


def open_source(args: DataArguments) -> ImageSource | StreamSource:
    """
    Find the images and their classes without decoding any.

    Classes are numbered by the sorted names of the sub-folders of `train_data_dir`, by the `ClassLabel` feature of a data
    set, by its integers, or by the sorted order of its strings.

    Raises:
        ValueError: If arguments contradict each other or the data, or a label is out of range.
        FileNotFoundError: If there are no images.
    """
    if (args.train_data_dir is None) == (args.dataset_name is None):
        raise ValueError("Give exactly one source of images: --train_data_dir FOLDER or --dataset_name NAME.")
    if args.dataset_name is not None:
        return open_data_set_source(args)
    for name in ("dataset_config_name", "dataset_split", "data_files", "image_column", "label_column", "streaming"):
        if getattr(args, name) != DataArguments.__dataclass_fields__[name].default:
            raise ValueError(f"--{name} belongs to --dataset_name; --train_data_dir is read as it is.")

    folder, resolution, num_classes = Path(args.train_data_dir), None, args.num_classes
    if (folder / MANIFEST).exists():
        images, manifest = open_prepared(folder)
        labels, _ = number_labels(images, "label")
        class_names, resolution = manifest["class_names"], manifest["resolution"]
        num_classes = num_classes or manifest["num_classes"]
    else:
        classes = {"": list_images(folder)} if args.unconditional else list_classes(folder)
        paths = [str(path) for members in classes.values() for path in members]
        images = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image(decode=False))
        labels = np.repeat(np.arange(len(classes)), [len(members) for members in classes.values()])
        class_names = list(classes)
    if args.unconditional:
        labels, num_classes, class_names = np.zeros(len(images), np.int64), 1, None
    return ImageSource(images, labels, num_classes, class_names, resolution, args.max_train_samples)


def open_prepared(folder: Path) -> tuple[datasets.Dataset, dict]:
    """Memory-map the output of pixelrepa-prepare-dataset; return its columns `pixels`, `label`, `name`, and its manifest."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    paths = [folder / name for name in manifest["files"]]
    for path, size in zip(paths, manifest["files"].values(), strict=True):
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{path} is missing or not {size} bytes long: prepare or copy the data again.")
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(path)) for path in paths]), manifest


def open_data_set(args: DataArguments) -> datasets.Dataset | datasets.IterableDataset:
    """Open what `save_to_disk` wrote, or anything that `datasets.load_dataset` takes."""
    name = args.dataset_name
    if not any((Path(name) / file).exists() for file in ("state.json", "dataset_dict.json")):
        return datasets.load_dataset(
            name,
            args.dataset_config_name,
            data_files=args.data_files,
            split=args.dataset_split,
            cache_dir=args.cache_dir,
            streaming=args.streaming,
        )
    data = datasets.load_from_disk(name)
    if isinstance(data, datasets.DatasetDict):
        if args.dataset_split not in data:
            raise ValueError(f"{name} has no split {args.dataset_split!r}, only {sorted(data)}: set --dataset_split.")
        data = data[args.dataset_split]
    return data.to_iterable_dataset() if args.streaming else data


def open_data_set_source(args: DataArguments) -> ImageSource | StreamSource:
    data = open_data_set(args)
    label_column = None if args.unconditional else args.label_column
    columns = [args.image_column] + ([label_column] if label_column else [])
    for column in columns:
        if column not in (data.features or ()):
            raise ValueError(
                f"{args.dataset_name} has no column {column!r}, only {data.features}: set --image_column and --label_column."
            )
    feature = data.features[label_column] if label_column else None
    class_names = getattr(feature, "names", None)
    num_classes = 1 if args.unconditional else args.num_classes
    data = data.select_columns(columns).cast_column(args.image_column, datasets.Image(decode=False))
    if not args.streaming:
        labels, names = number_labels(data, label_column) if label_column else (np.zeros(len(data), np.int64), None)
        images = data.select_columns([args.image_column])
        return ImageSource(images, labels, num_classes, class_names or names, max_samples=args.max_train_samples)

    num_classes = num_classes or len(class_names or ())
    if not num_classes or (feature is not None and not pa.types.is_integer(feature.pa_type)):
        raise ValueError(f"A stream needs integer labels and --num_classes; {label_column!r} holds {feature}.")
    if args.max_train_samples is not None:
        data = data.take(args.max_train_samples)
    id2label = name_classes(class_names, num_classes)
    return StreamSource(data, args.image_column, label_column, num_classes, id2label, args.shuffle_buffer_size)


def number_labels(data: datasets.Dataset, column: str) -> tuple[np.ndarray, list[str] | None]:
    """Read a label column as `int64` (n,). Strings are numbered in sorted order and returned as class names."""
    labels = data.select_columns([column]).with_format("arrow")[:][column]
    if labels.null_count:
        raise ValueError(f"{labels.null_count} of {len(labels)} rows have no label in column {column!r}.")
    if pa.types.is_integer(labels.type):
        return labels.to_numpy().astype(np.int64), None
    if pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type):
        names, labels = np.unique(labels.to_numpy(), return_inverse=True)
        return labels, names.tolist()
    raise ValueError(f"Column {column!r} holds {labels.type}, not integer or string labels: set --label_column.")


# -------------------------------------------------------------------------------------------------------------- items


def draws(seed: int, epoch: int, index: int, purpose: int = 0, count: int = 1) -> np.ndarray:
    """
    Draw `count` random `uint64` that depend on the arguments and on nothing else.

    The raw output of the counter-based generator Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
    3", 2011) with key (seed, epoch) and counters (1, index, purpose, 0), (2, index, purpose, 0), …, four values from each.
    numpy guarantees that raw streams never change between versions, unlike the methods of `Generator`.
    """
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, index, purpose, 0], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Permutation of `size` images that depends on (seed, epoch) only."""
    return np.argsort(draws(seed, epoch, 0, purpose=1, count=size), kind="stable")


def to_float(pixel_values: torch.Tensor) -> torch.Tensor:
    """Convert `uint8` images to `float32` in [-1, 1] on their device: x / 255 · 2 − 1, rounded as in the published code."""
    return pixel_values.float().div_(255).mul_(2).sub_(1)


def read_pixels(example: Example, resolution: int, offset: float | None = None) -> torch.Tensor:
    """Pixels of an example, uint8 (3, resolution, resolution); see [`~images.read_image`] for `offset`."""
    if isinstance(example.image, np.ndarray):
        return torch.from_numpy(example.image.copy())
    return read_image(example.image, resolution, offset, example.name)


def rotate(items: Sequence[Example], start: int, first_index: int = 0) -> Iterator[tuple[int, Example]]:
    """Iterate over (index, item) of all items, from `start` to the end and on from the beginning."""
    for position in itertools.chain(range(start, len(items)), range(start)):
        yield first_index + position, items[position]


class IndexedBatches(Dataset):
    """Collated batches by (epoch, batch, indices). The key holds all state, so that workers need none."""

    def __init__(self, loader: ImageLoader):
        self.loader = loader

    def __getitem__(self, key: tuple[int, int, list[int]]) -> tuple[tuple[int, int], dict[str, torch.Tensor]]:
        epoch, batch, indices = key
        items = [self.loader.make_item(epoch, rotate(self.loader.source, index)) for index in indices]
        collated, transform = default_collate(items), self.loader.batch_transform
        return (epoch, batch), collated if transform is None else transform(collated)


class StreamedBatches(IterableDataset):
    """The same batches from a stream, for the position and the process of `loader`."""

    def __init__(self, loader: ImageLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[tuple[int, int], dict[str, torch.Tensor]]]:
        # Pillow releases the interpreter lock while it decodes and resizes, so threads share that work and the stream is
        # read once per process. One batch is decoded while the next is read.
        with ThreadPoolExecutor(max(1, self.loader.num_workers)) as pool:
            prefetched = None
            for epoch, batch, examples in self.read_global_batches(**self.loader.position):
                for part in self.loader.parts:
                    first_index = batch * self.loader.global_batch_size
                    jobs = [pool.submit(self.loader.make_item, epoch, rotate(examples, i, first_index)) for i in part]
                    if prefetched is not None:
                        yield prefetched[0], default_collate([job.result() for job in prefetched[1]])
                    prefetched = (epoch, batch), jobs

    def read_global_batches(self, epoch: int, batch: int) -> Iterator[tuple[int, int, list[Example]]]:
        size = self.loader.global_batch_size
        while True:
            stream = iter(self.loader.source.shuffled(self.loader.seed, epoch))
            for position in itertools.count():
                examples = list(itertools.islice(stream, size))
                if len(examples) < size:
                    break
                if position >= batch:
                    yield epoch, position, examples
            if position < max(batch, 1):
                raise ValueError(
                    f"Epoch {epoch} of the stream has {position} batches of {size} images, at least {max(batch, 1)} are "
                    "needed: the stream is too short, or not the one of the checkpoint."
                )
            epoch, batch = epoch + 1, 0


# ------------------------------------------------------------------------------------------------------------- loader


class ImageLoader:
    """
    Endless batches of training images for one process, starting at `position`.

    **Every draw is a function of (seed, epoch, index).** The order of an epoch, each crop and each flip come from a
    counter-based generator keyed by that triple, so the number of workers and processes, gradient accumulation and a
    restart in mid-epoch change nothing. An epoch is a permutation cut into global batches (the batches of optimizer steps,
    over all processes and accumulation steps); the last incomplete one is dropped. Each process takes its part of a global
    batch. Do not pass the loader through `accelerator.prepare`, which would divide it again.

    **Streams** follow the same rule: `index` is the position in the epoch's stream, whose order is the shuffle of `datasets`
    by (seed, epoch), which may change with the version of `datasets`. Every process reads the whole stream but decodes only
    its own images, and a resume reads, without decoding, up to the position. If reading is the bottleneck, run
    pixelrepa-prepare-dataset once.

    Batches are dictionaries of CPU tensors, in pinned memory if there is a CUDA device: `pixel_values` `uint8` (batch_size,
    3, resolution, resolution), see [`to_float`], and of shape (batch_size,) `class_labels` `int64`, `index` `int64`, the
    image's position in the source, `flipped` `bool`, and `skipped` `int64`, the number of bad images that the item replaces.

    Args:
        source (`ImageSource` or `StreamSource`): From [`open_source`].
        resolution (`int`): Side of the images in pixels.
        batch_size (`int`): Images per process and accumulation step.
        seed (`int`): Seed of the order, the crops and the flips.
        center_crop (`bool`, defaults to `True`): ADM's centre crop; otherwise a random square of the full short side.
        random_flip (`bool`, defaults to `True`): Flip half of the images horizontally.
        on_bad_image (`str`, defaults to `"error"`): `"error"` stops the run at an image that cannot be decoded; `"skip"`
            replaces it by the next good one (in a stream: of the same global batch). Both name the image.
        accumulation_steps (`int`, defaults to 1): Batches per optimizer step.
        rank (`int`, defaults to 0): This process.
        world_size (`int`, defaults to 1): Number of processes.
        num_workers (`int`, defaults to 0): Worker processes; for a stream, decoding threads in one worker.

    Attributes:
        position (`dict[str, int]`): `{"epoch": e, "batch": b}`, the next global batch. It advances with the last
            accumulation step, so it is valid for any division of the same global batch.
        batches_per_epoch (`int`, *optional*): Global batches (optimizer steps) per epoch; None for a stream.
        batch_transform (`Callable`, *optional*): Applied to every batch in the worker that made it; not used for streams. Set
            it before iterating.

    Raises:
        ValueError: If prepared images have another resolution or need random crops, or do not fill one global batch.
    """

    def __init__(
        self,
        source: ImageSource | StreamSource,
        resolution: int,
        batch_size: int,
        seed: int,
        center_crop: bool = True,
        random_flip: bool = True,
        on_bad_image: str = "error",
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ):
        if source.resolution is not None and (source.resolution != resolution or not center_crop):
            raise ValueError(
                f"The prepared images are centre crops of {source.resolution} pixels: they cannot serve resolution "
                f"{resolution} with center_crop={center_crop}."
            )
        self.source, self.resolution, self.seed = source, resolution, seed
        self.center_crop, self.random_flip, self.on_bad_image = center_crop, random_flip, on_bad_image
        self.accumulation_steps, self.num_workers = accumulation_steps, num_workers
        self.global_batch_size = batch_size * accumulation_steps * world_size
        self.num_images = self.batches_per_epoch = None
        if isinstance(source, ImageSource):
            check_global_batch(len(source), batch_size, accumulation_steps, world_size)
            self.num_images, self.batches_per_epoch = len(source), len(source) // self.global_batch_size
        starts = ((step * world_size + rank) * batch_size for step in range(accumulation_steps))
        self.parts = [range(start, start + batch_size) for start in starts]
        self.position = {"epoch": 0, "batch": 0}
        self.batch_transform: Callable[[dict], dict] | None = None

    def state_dict(self) -> dict[str, int | None]:
        """The position and the settings that determine the order of the data."""
        order = {"seed": self.seed, "global_batch_size": self.global_batch_size, "num_images": self.num_images}
        return {**self.position, **order}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """
        Continue at a saved position. Call before iterating.

        Raises:
            ValueError: If the seed, the global batch or the number of images has changed, and with it the order.
        """
        current = self.state_dict()
        changed = [key for key in current if key not in self.position and state[key] != current[key]]
        if changed:
            raise ValueError(
                "The data cannot continue at the saved position: "
                + ", ".join(f"{key} was {state[key]} and is {current[key]}" for key in changed)
                + ". Restore these, or start a new run from the saved weights."
            )
        self.position = {key: state[key] for key in self.position}

    def make_item(self, epoch: int, candidates: Iterable[tuple[int, Example]]) -> dict[str, Any]:
        """Decode, crop and flip the first good image of `candidates`, with draws of its (seed, epoch, index)."""
        for skipped, (index, example) in enumerate(candidates):
            flip, offset = draws(self.seed, epoch, index, count=2) / 2.0**64
            try:
                pixels = read_pixels(example, self.resolution, None if self.center_crop else offset)
            except BadImageError as error:
                if self.on_bad_image == "error":
                    raise
                logger.warning("%s; the next image replaces it.", error)
                continue
            flipped = self.random_flip and bool(flip < 0.5)
            return {
                "pixel_values": pixels.flip(-1) if flipped else pixels,
                "class_labels": example.label,
                "index": index,
                "flipped": flipped,
                "skipped": skipped,
            }
        raise BadImageError(f"None of the {skipped + 1} images can be decoded, the last: {example.name}.")

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        streamed = self.num_images is None
        loader = DataLoader(
            StreamedBatches(self) if streamed else IndexedBatches(self),
            sampler=None if streamed else self._shuffled_keys(**self.position),
            batch_size=None,
            num_workers=min(1, self.num_workers) if streamed else self.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_process_group,
            generator=torch.Generator(),  # seeds the workers without a draw from the global generator
        )
        for delivered, ((epoch, batch), items) in enumerate(loader, start=1):
            # One past the last batch of an epoch means the start of the next.
            self.position = {"epoch": epoch, "batch": batch + (delivered % self.accumulation_steps == 0)}
            yield items

    def _shuffled_keys(self, epoch: int, batch: int) -> Iterator[tuple[int, int, list[int]]]:
        while True:
            order = epoch_order(self.seed, epoch, self.num_images)
            for number in range(batch, self.batches_per_epoch):
                for part in self.parts:
                    yield epoch, number, [int(order[number * self.global_batch_size + offset]) for offset in part]
            epoch, batch = epoch + 1, 0


def leave_process_group(worker_id: int) -> None:
    """Protect workers from Ctrl-C and a launcher's SIGTERM: the training process decides when to stop."""
    os.setpgid(0, 0)


def check_global_batch(num_images: int, batch_size: int, accumulation_steps: int, world_size: int) -> None:
    """Raise ValueError if an epoch would have no optimizer step."""
    global_batch_size = batch_size * accumulation_steps * world_size
    if num_images < global_batch_size:
        raise ValueError(
            f"{num_images} images do not fill one global batch of {global_batch_size} = {batch_size} per process × "
            f"{accumulation_steps} accumulation steps × {world_size} processes."
        )


def measure_throughput(source: ImageSource, resolution: int, num_images: int = 512, seed: int = 0) -> float:
    """Images per second that this process alone decodes and crops, in training order and without collation."""
    loader = ImageLoader(source, resolution, batch_size=1, seed=seed)
    order = epoch_order(seed, 0, len(source))[:num_images].tolist()
    start = time.perf_counter()
    for index in order:
        loader.make_item(0, rotate(source, index))
    return len(order) / (time.perf_counter() - start)
