"""Where the training images come from, and the order in which they arrive.

    source = open_source(DataArguments(train_data_dir="photos"))             # classes and names known, nothing decoded
    loader = ImageLoader(source, resolution=256, batch_size=32, seed=0)
    for batch in loader:                                                     # endless; `loader.position` says where
        images = to_float(batch["pixel_values"].to(device, non_blocking=True))

Sources (`DataArguments`): a folder of images with one sub-folder per class; anything `datasets` can load from the Hub or
from disk; a stream of it, WebDataset-style tar shards included; and the folder that `prepare_dataset.py` writes.

**Every draw is a pure function of (seed, epoch, index)**: the order of an epoch, each crop and each flip come from a
counter-based generator (Philox) with that triple as its key and counter. The number of workers, the number of processes,
gradient accumulation and a restart in mid-epoch therefore change nothing. One *global batch* is what one optimizer step
sees, over all processes and accumulation steps; an epoch is a permutation cut into global batches, the last incomplete
one dropped, and process r takes its part of each. The loader is not to be passed through `accelerator.prepare`, which would
divide it again.

**Streams** follow the same rule with `index` = position in the epoch's stream, whose order is the shuffle buffer of
`datasets` keyed by (seed, epoch) (it may change with the version of `datasets`). To keep the promise, and so that all
processes end an epoch at the same batch, every process reads the whole stream but decodes only its own images, and a
resume reads (without decoding) up to where it stopped. Where that reading is the bottleneck, run `prepare_dataset.py` once.

**Odd images** become RGB as `images.to_rgb` says (orientation, transparency, 16 bits, …); an image smaller than the
resolution is enlarged by the same bicubic filter that shrinks the others, as in ADM. What cannot be decoded completely, is in a floating point or 32-bit mode, or has more
pixels than `PIL.Image.MAX_IMAGE_PIXELS` (before or after resizing), is a *bad image*: with `--on_bad_image error` the run
stops and names the file; with `skip` the next good image takes its place (the next index; in a stream the next of the
same global batch), a warning names the file, and `batch["skipped"]` counts them. A wrong label or a file that
cannot be read at all (missing, no permission) is always an error.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ..images import DECODING_ERRORS, center_crop_adm, to_rgb
from ..stored_images import (
    check_source,
    is_prepared,
    open_data_set,
    open_prepared,
    scan_folder,
    stored_crop,
)


__all__ = [
    "BadImageError",
    "DataArguments",
    "ImageLoader",
    "ImageSource",
    "StreamSource",
    "decode_image",
    "draws",
    "measure_throughput",
    "open_source",
    "to_float",
]

logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """Which images to train on. Give exactly one of `train_data_dir` and `dataset_name`."""

    train_data_dir: str | None = field(
        default=None,
        metadata={"help": "A folder with one sub-folder of images per class, or what prepare_dataset.py wrote."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A dataset on the Hub, a folder written by `save_to_disk`, or anything else `datasets.load_dataset` "
            "takes as its first argument (with --data_files: `webdataset`, `parquet`, …)."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    data_files: list[str] | None = field(
        default=None, metadata={"help": "Files of the dataset: paths, patterns or URLs, e.g. 'shards/*.tar'."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where `datasets` keeps downloads."})
    image_column: str = field(default="image", metadata={"help": "Column with the images (WebDataset: jpg, png, …)."})
    label_column: str = field(default="label", metadata={"help": "Column with the classes (WebDataset: cls)."})
    unconditional: bool = field(default=False, metadata={"help": "Ignore classes: all images are of class 0."})
    num_classes: int | None = field(
        default=None,
        metadata={"help": "Number of classes where the data do not tell (integer labels without names), or more."},
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Use at most this many images, evenly spaced over the data (of a stream: the first)."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read --dataset_name as a stream."})
    shuffle_buffer_size: int = field(default=1000, metadata={"help": "Images among which a stream is shuffled."})
    on_bad_image: Literal["error", "skip"] = field(
        default="error", metadata={"help": "A damaged image stops the run, or the next good one takes its place."}
    )


class BadImageError(ValueError):
    """An image that cannot be decoded; the message names it and says why."""


class Example(NamedTuple):
    """One image as it is stored: encoded bytes, a path or URL, or `uint8` pixels (3, resolution, resolution)."""

    image: bytes | str | np.ndarray
    label: int
    name: str


def draws(seed: int, epoch: int, index: int, purpose: int = 0, count: int = 1) -> np.ndarray:
    """`count` random `uint64` that depend on the arguments and on nothing else.

    The raw output of the Philox4x64-10 counter-based generator (Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", 2011) with key (seed, epoch) and counters (1, index, purpose, 0), (2, index, purpose, 0), …, four values from each. numpy promises that raw
    streams never change between versions, unlike those of `Generator` methods.
    """
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, index, purpose, 0], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def to_float(pixel_values: torch.Tensor) -> torch.Tensor:
    """`uint8` images to `float32` in [-1, 1], on whatever device they are: x / 255 · 2 − 1, as the published code rounds."""
    return pixel_values.float().div_(255).mul_(2).sub_(1)


def decode_image(image: bytes | str, name: str) -> Image.Image:
    """Decode to 8-bit RGB, as `images.to_rgb` does.

    Args:
        image: the encoded bytes, or a path or URL (anything `fsspec` opens).
        name: what to call the image in an error.

    Raises:
        BadImageError: when the bytes are not a complete image of a kind that is defined here, or it is too large.
        OSError: when the file cannot be read.
    """
    if isinstance(image, str):
        with fsspec.open(image, "rb") if "://" in image else open(image, "rb") as file:
            image = file.read()
    # The bytes have been read: an OSError of the file system is not mistaken for a damaged image.
    try:
        picture = Image.open(io.BytesIO(image))
        check_pixels(picture.width * picture.height)
        return to_rgb(picture)
    except DECODING_ERRORS as error:
        raise BadImageError(f"Bad image {name}: {error}") from error


def check_pixels(count: float) -> None:
    # Pillow itself only warns between its limit and twice its limit.
    if count > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{count:.0f} pixels are more than the limit of {Image.MAX_IMAGE_PIXELS}")


def crop_image(picture: Image.Image, resolution: int, name: str, offset: float | None = None) -> np.ndarray:
    """Cut a square of `resolution` pixels out of an RGB image → `uint8` (3, resolution, resolution).

    Args:
        picture: RGB.
        resolution: side in pixels.
        name: what to call the image in an error.
        offset: None for the centre crop of ADM. Otherwise the place of the square along the longer side, 0 at its
            start and 1 at its end; the square is resized with ADM's filters.
    """
    short, long = sorted(picture.size)
    try:
        check_pixels(resolution * resolution * long / short)
    except Image.DecompressionBombError as error:
        raise BadImageError(f"Bad image {name}: resized from {picture.width}×{picture.height}, {error}") from error
    if offset is not None:
        left, top = round(offset * (picture.width - short)), round(offset * (picture.height - short))
        picture = picture.crop((left, top, left + short, top + short))
    return np.ascontiguousarray(np.asarray(center_crop_adm(picture, resolution)).transpose(2, 0, 1))


class ImageSource:
    """A source with random access: `source[i]` is an `Example`, `len(source)` the number of images.

    Attributes:
        num_classes: number of classes.
        id2label: `{"0": name, …}`, the string keys that JSON keeps; None where classes have no names.
        resolution: side in pixels of images stored as centre crops by prepare_dataset.py; None for encoded images.
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
        if not len(images):
            raise ValueError("The data set holds no images.")
        if max_samples is not None and max_samples < len(images):
            chosen = np.arange(max_samples) * len(images) // max_samples
            images, labels = images.select(chosen), labels[chosen]
        # Rows come as Arrow memory, so that stored pixels are copied once: from the memory map into the batch.
        self._images = images.with_format("arrow")
        self._labels = labels
        self.resolution = resolution
        self.num_classes = num_classes or (len(class_names) if class_names else int(labels.max()) + 1)
        self.id2label = name_classes(class_names, self.num_classes)
        wrong = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if len(wrong):
            raise wrong_label(labels[wrong[0]], self.num_classes, self[int(wrong[0])].name)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        row = self._images[index]
        label = int(self._labels[index])
        if self.resolution is not None:
            pixels = stored_crop(row["pixels"][0].as_buffer(), self.resolution, index)
            return Example(pixels, label, row["name"][0].as_py())
        image = row.column(0)[0].as_py()
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise ValueError(f"Row {index} of the data has no image.")
        if image["bytes"] is None:
            return Example(image["path"], label, image["path"])
        return Example(image["bytes"], label, f"row {index}" + (f" ({image['path']})" if image["path"] else ""))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))


class StreamSource:
    """A source that can only be read from its start: iterate `source.shuffled(seed, epoch)`, or the source itself.

    Attributes: see `ImageSource`; the number of images is unknown.
    """

    resolution = None

    def __init__(
        self,
        stream: datasets.IterableDataset,
        image_column: str,
        label_column: str | None,
        num_classes: int,
        class_names: list[str] | None = None,
        shuffle_buffer_size: int = 1000,
    ):
        self._stream = stream
        self._image_column, self._label_column = image_column, label_column
        self._shuffle_buffer_size = shuffle_buffer_size
        self.num_classes = num_classes
        self.id2label = name_classes(class_names, num_classes)

    def shuffled(self, seed: int, epoch: int) -> Iterator[Example]:
        """The stream in the order that (seed, epoch) gives it: shards first, then a shuffle buffer."""
        stream = self._stream.shuffle(seed=seed, buffer_size=self._shuffle_buffer_size)
        stream.set_epoch(epoch)
        return self._examples(stream)

    def __iter__(self) -> Iterator[Example]:
        return self._examples(self._stream)

    def _examples(self, stream: datasets.IterableDataset) -> Iterator[Example]:
        # `iter` reads the same order everywhere; plain iteration changes it inside a DataLoader worker, even a single one.
        for position, rows in enumerate(stream.iter(batch_size=1)):
            image = rows[self._image_column][0]
            if image is None or (image["bytes"] is None and image["path"] is None):
                raise ValueError(f"Example {position} of the stream has no image.")
            name = image["path"] or f"example {position} of the stream"
            label = 0 if self._label_column is None else rows[self._label_column][0]
            if label is None or not 0 <= label < self.num_classes:
                raise wrong_label(label, self.num_classes, name)
            yield Example(image["path"] if image["bytes"] is None else image["bytes"], label, name)


def name_classes(names: list[str] | None, num_classes: int) -> dict[str, str] | None:
    return names and {str(label): name for label, name in enumerate(names[:num_classes])}


def wrong_label(label: int | None, num_classes: int, name: str) -> ValueError:
    return ValueError(
        f"Label {label} of image {name} is outside [0, {num_classes}). Correct the data, "
        "or pass --num_classes with the real number of classes."
    )


def open_source(args: DataArguments) -> ImageSource | StreamSource:
    """Find the images and their classes without decoding any; labels with random access are all checked here.

    Classes are numbered by: the sorted names of the sub-folders of `train_data_dir`; the `ClassLabel` feature of a data
    set; its integers as they are; the sorted order of its strings.

    Raises:
        ValueError: when the arguments contradict each other or the data, an empty class folder, a label out of range, …;
            the message says what to change.
        FileNotFoundError: when `train_data_dir` does not exist.
    """
    of_data_sets = ("streaming", "data_files", "dataset_config_name", "dataset_split", "image_column", "label_column")
    check_source(args, of_data_sets)
    for name in ("num_classes", "max_train_samples", "shuffle_buffer_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.unconditional and (args.num_classes or 1) != 1:
        raise ValueError(f"--unconditional means one class, got --num_classes {args.num_classes}.")
    if args.dataset_name is not None:
        return open_dataset(args)
    folder = Path(args.train_data_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"--train_data_dir {folder} is not a folder.")
    if is_prepared(folder):
        return prepared_source(folder, args)

    paths, labels, names = scan_folder(folder, args.unconditional)
    images = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image(decode=False))
    return ImageSource(images, np.array(labels), args.num_classes, names, max_samples=args.max_train_samples)


def open_dataset(args: DataArguments) -> ImageSource | StreamSource:
    data = open_data_set(
        args.dataset_name,
        args.dataset_config_name,
        args.dataset_split,
        args.cache_dir,
        data_files=args.data_files,
        streaming=args.streaming,
    )
    label_column = None if args.unconditional else args.label_column
    for flag, column in (("image_column", args.image_column), ("label_column", label_column)):
        if column is not None and column not in (data.features or ()):
            raise ValueError(f"{args.dataset_name} has no column {column!r}, only {data.features}: set --{flag}.")
    if not args.streaming and not len(data):
        raise ValueError("The data set holds no images.")
    image_feature = data.features[args.image_column]
    encoded = isinstance(image_feature, datasets.Image) or image_feature in (
        datasets.Value("binary"),
        {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
    )
    if not encoded:
        raise ValueError(
            f"Column {args.image_column!r} of {args.dataset_name} holds {image_feature}, not images or encoded bytes: "
            f"choose another with --image_column from {data.features}."
        )
    label_feature = None if label_column is None else data.features[label_column]
    class_names = label_feature.names if isinstance(label_feature, datasets.ClassLabel) else None
    num_classes = 1 if args.unconditional else args.num_classes

    data = data.select_columns([args.image_column] + ([label_column] if label_column else []))
    data = data.cast_column(args.image_column, datasets.Image(decode=False))
    if not args.streaming:
        labels = np.zeros(len(data), np.int64)
        if label_column is not None:
            labels, class_names = number_labels(data, label_column, class_names)
        images = data.select_columns([args.image_column])
        return ImageSource(images, labels, num_classes, class_names, max_samples=args.max_train_samples)

    if num_classes is None and class_names is None:
        raise ValueError(
            f"A stream does not tell how many classes {label_column!r} ({label_feature}) has: pass --num_classes."
        )
    if label_feature is not None and not pa.types.is_integer(label_feature.pa_type):
        raise ValueError(f"In a stream, {label_column!r} must hold integers, not {label_feature}.")
    if args.max_train_samples is not None:
        data = data.take(args.max_train_samples)
    num_classes = num_classes or len(class_names)
    return StreamSource(data, args.image_column, label_column, num_classes, class_names, args.shuffle_buffer_size)


def number_labels(
    data: datasets.Dataset, column: str, class_names: list[str] | None
) -> tuple[np.ndarray, list[str] | None]:
    """A label column as `int64` (n,), with class names where there are any: strings are numbered in sorted order."""
    labels = data.select_columns([column]).with_format("arrow")[:][column]
    if labels.null_count:
        raise ValueError(f"{labels.null_count} of {len(labels)} rows have no label in column {column!r}.")
    if pa.types.is_integer(labels.type):
        return labels.to_numpy().astype(np.int64), class_names
    if pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type):
        class_names, labels = np.unique(labels.to_numpy(), return_inverse=True)
        return labels, class_names.tolist()
    raise ValueError(f"Column {column!r} holds {labels.type}, not integer or string labels: choose another.")


def prepared_source(folder: Path, args: DataArguments) -> ImageSource:
    images, manifest = open_prepared(folder)
    if args.unconditional:
        labels, num_classes, class_names = np.zeros(len(images), np.int64), 1, None
    else:
        labels, _ = number_labels(images, "label", None)
        num_classes, class_names = args.num_classes or manifest["num_classes"], manifest["class_names"]
    return ImageSource(images, labels, num_classes, class_names, manifest["resolution"], args.max_train_samples)


def read_pixels(example: Example, resolution: int, offset: float | None = None) -> torch.Tensor:
    """Pixels of an example, uint8 (3, resolution, resolution)."""
    if isinstance(example.image, np.ndarray):
        return torch.from_numpy(example.image.copy())
    picture = decode_image(example.image, example.name)
    return torch.from_numpy(crop_image(picture, resolution, example.name, offset))


@dataclass
class ItemMaker:
    """Turns stored images into training items; picklable, for the workers."""

    resolution: int
    seed: int
    center_crop: bool = True
    random_flip: bool = True
    on_bad_image: str = "error"

    def __call__(self, epoch: int, candidates: Iterable[tuple[int, Example]]) -> dict[str, Any]:
        """The first of `candidates` that can be decoded, cropped and flipped as its (seed, epoch, index) says."""
        skipped = 0
        for index, example in candidates:
            flip, offset = draws(self.seed, epoch, index, count=2) / 2.0**64
            try:
                pixels = self.read_pixels(example, None if self.center_crop else offset)
            except BadImageError as error:
                if self.on_bad_image == "error":
                    raise
                logger.warning("%s; the next image takes its place.", error)
                skipped += 1
                continue
            flipped = self.random_flip and bool(flip < 0.5)
            if flipped:
                pixels = pixels[:, :, ::-1]
            return {
                "pixel_values": torch.from_numpy(pixels.copy()),
                "class_labels": example.label,
                "index": index,
                "flipped": flipped,
                "skipped": skipped,
            }
        raise BadImageError(
            f"None of the {skipped} images that could stand here can be decoded, the last: {example.name}."
        )

    def read_pixels(self, example: Example, offset: float | None) -> np.ndarray:
        if isinstance(example.image, np.ndarray):
            return example.image
        return crop_image(decode_image(example.image, example.name), self.resolution, example.name, offset)


def rotate(items: ImageSource | list[Example], start: int, first_index: int = 0) -> Iterator[tuple[int, Example]]:
    """(index, item) of all items, from the one at `start` on and round the end."""
    for position in itertools.chain(range(start, len(items)), range(start)):
        yield first_index + position, items[position]


class IndexedItems(Dataset):
    """Items by (epoch, index): the epoch travels with the index, so workers need not be told of it."""

    def __init__(self, source: ImageSource, make_item: ItemMaker):
        self.source, self.make_item = source, make_item

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        epoch, index = place
        return self.make_item(epoch, rotate(self.source, index))


class Places:
    """Endless batches of (epoch, index) for one process: the batch sampler of sources with random access."""

    def __init__(self, size: int, seed: int, start: tuple[int, int], parts: list[range], global_batch_size: int):
        self.size, self.seed, self.start = size, seed, start
        self.parts, self.global_batch_size = parts, global_batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_epoch, first_batch = self.start
        for epoch in itertools.count(first_epoch):
            order = np.argsort(draws(self.seed, epoch, 0, purpose=1, count=self.size), kind="stable")
            begin = first_batch * self.global_batch_size if epoch == first_epoch else 0
            for base in range(begin, self.size - self.global_batch_size + 1, self.global_batch_size):
                for part in self.parts:
                    yield [(epoch, int(order[base + offset])) for offset in part]


class StreamedBatches(IterableDataset):
    """Endless ((epoch, batch), collated items) for one process of a stream."""

    def __init__(
        self,
        source: StreamSource,
        make_item: ItemMaker,
        start: tuple[int, int],
        parts: list[range],
        global_batch_size: int,
        num_threads: int,
    ):
        self.source, self.make_item, self.start, self.parts = source, make_item, start, parts
        self.global_batch_size, self.num_threads = global_batch_size, num_threads

    def __iter__(self) -> Iterator[tuple[tuple[int, int], dict[str, torch.Tensor]]]:
        # Pillow releases the interpreter lock while it decodes and resizes: threads share that work, and the stream is
        # read once per process whatever their number. One batch is decoded while the next is read.
        with ThreadPoolExecutor(self.num_threads) as pool:
            ahead = None
            for epoch, batch, examples in self.read_global_batches():
                for part in self.parts:
                    first_index = batch * self.global_batch_size
                    jobs = [pool.submit(self.make_item, epoch, rotate(examples, i, first_index)) for i in part]
                    if ahead is not None:
                        yield ahead[0], default_collate([job.result() for job in ahead[1]])
                    ahead = (epoch, batch), jobs

    def read_global_batches(self) -> Iterator[tuple[int, int, list[Example]]]:
        first_epoch, first_batch = self.start
        for epoch in itertools.count(first_epoch):
            begin = first_batch if epoch == first_epoch else 0
            stream = self.source.shuffled(self.make_item.seed, epoch)
            for batch in itertools.count():
                examples = list(itertools.islice(stream, self.global_batch_size))
                if len(examples) < self.global_batch_size:
                    break
                if batch >= begin:
                    yield epoch, batch, examples
            if batch < max(begin, 1):
                raise ValueError(
                    f"Epoch {epoch} of the stream has {batch} batches of {self.global_batch_size} images, "
                    f"at least {max(begin, 1)} are needed: the stream is too short, or not the one that was saved."
                )


class ImageLoader:
    """Endless batches of training images for one process, from `position` on.

    Each batch is a dict of CPU tensors, pinned where there is a CUDA device so that `.to(device, non_blocking=True)` overlaps:
    `pixel_values` `uint8` (batch_size, 3, resolution, resolution), see `to_float`; `class_labels` `int64` (batch_size,);
    `index` `int64` (batch_size,), the image's place in the source (of a stream: in its epoch); `flipped` `bool`
    (batch_size,); `skipped` `int64` (batch_size,), how many bad images the item takes the place of.

    `position` is `{"epoch": e, "batch": b}`, the next global batch to be delivered: b counts optimizer steps and moves on
    when the last of its `accumulation_steps` parts is delivered, so a position saved after an optimizer step is right
    for any number of processes, workers and accumulation steps that make the same global batch. `state_dict` and
    `load_state_dict` (before iterating) keep it, together with what the order depends on.

    Args:
        source: from `open_source`.
        resolution: side of the images in pixels.
        batch_size: images per process and accumulation step.
        seed: of the order, the crops and the flips; 0 ≤ seed < 2⁶⁴.
        center_crop: the centre crop of ADM; False cuts a random square of the image's full short side instead.
        random_flip: flip half of the images horizontally.
        on_bad_image: "error" or "skip", see the head of this file.
        accumulation_steps: batches that make one optimizer step.
        rank: this process.
        world_size: number of processes.
        num_workers: worker processes (of a stream: decoding threads, in one worker process); 0 does all in this process.

    Raises:
        ValueError: for settings outside their range, prepared images of another resolution or with random crops, and
            fewer images than one global batch.
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
        for name, value in (
            ("resolution", resolution),
            ("batch_size", batch_size),
            ("accumulation_steps", accumulation_steps),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank {rank} of {world_size}.")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}.")
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f'on_bad_image must be "error" or "skip", got {on_bad_image!r}.')
        if source.resolution is not None and (source.resolution != resolution or not center_crop):
            raise ValueError(
                f"The prepared images are centre crops of {source.resolution} pixels: they serve resolution "
                f"{source.resolution} with center_crop, not resolution {resolution} with center_crop={center_crop}."
            )
        self.source = source
        self.global_batch_size = batch_size * accumulation_steps * world_size
        if isinstance(source, ImageSource):
            check_global_batch(len(source), batch_size, accumulation_steps, world_size)
        self.position = {"epoch": 0, "batch": 0}
        self.accumulation_steps = accumulation_steps
        self.num_workers = num_workers
        starts = ((step * world_size + rank) * batch_size for step in range(accumulation_steps))
        self._parts = [range(start, start + batch_size) for start in starts]
        self._make_item = ItemMaker(resolution, seed, center_crop, random_flip, on_bad_image)

    @property
    def batches_per_epoch(self) -> int | None:
        """Global batches (optimizer steps) per epoch; None for a stream."""
        return len(self.source) // self.global_batch_size if isinstance(self.source, ImageSource) else None

    def state_dict(self) -> dict[str, int | None]:
        """The position and what it is valid for, all JSON."""
        size = len(self.source) if isinstance(self.source, ImageSource) else None
        order = {"seed": self._make_item.seed, "global_batch_size": self.global_batch_size, "num_images": size}
        return {**self.position, **order}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: when the seed, the global batch or the number of images is another, so that the order of the
                data could not be continued.
        """
        mine = self.state_dict()
        positions = [state.get(key) for key in self.position]
        if not mine.keys() <= state.keys() or not all(isinstance(place, int) and place >= 0 for place in positions):
            raise ValueError(f"A data position must hold {', '.join(mine)}, got {state}.")
        changed = [key for key in mine if key not in self.position and state[key] != mine[key]]
        if changed:
            raise ValueError(
                "The data position cannot be continued: "
                + ", ".join(f"{key} was {state[key]} and is {mine[key]}" for key in changed)
                + ". Restore these, or start a new run from the saved weights."
            )
        self.position = {key: state[key] for key in self.position}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        start = self.position["epoch"], self.position["batch"]
        common = {
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": leave_process_group,
            # The loader seeds its workers from this instead of drawing from the global generator.
            "generator": torch.Generator(),
        }
        if isinstance(self.source, ImageSource):
            places = Places(len(self.source), self._make_item.seed, start, self._parts, self.global_batch_size)
            items = IndexedItems(self.source, self._make_item)
            loader = DataLoader(items, batch_sampler=places, num_workers=self.num_workers, **common)
            numbered = zip(self._count_batches(*start), loader, strict=False)
        else:
            threads = max(1, self.num_workers)
            numbered = DataLoader(
                StreamedBatches(self.source, self._make_item, start, self._parts, self.global_batch_size, threads),
                batch_size=None,
                num_workers=min(1, self.num_workers),
                **common,
            )
        for delivered, ((epoch, batch), items) in enumerate(numbered, start=1):
            # One past the last batch of an epoch stands for the start of the next.
            self.position = {"epoch": epoch, "batch": batch + (delivered % self.accumulation_steps == 0)}
            yield items

    def _count_batches(self, epoch: int, batch: int) -> Iterator[tuple[int, int]]:
        while True:
            for number in range(batch, self.batches_per_epoch):
                yield from itertools.repeat((epoch, number), self.accumulation_steps)
            epoch, batch = epoch + 1, 0


def leave_process_group(worker_id: int) -> None:
    """Keep Ctrl-C and a launcher's SIGTERM, which go to the whole process group, from killing the workers.

    The training process decides when to stop, and needs its workers until then; it still ends them one by one.
    """
    if os.name == "posix":
        os.setpgid(0, 0)


def check_global_batch(num_images: int, batch_size: int, accumulation_steps: int, world_size: int) -> None:
    """Raises ValueError where an epoch would have no step."""
    global_batch_size = batch_size * accumulation_steps * world_size
    if num_images < global_batch_size:
        raise ValueError(
            f"{num_images} images do not fill one global batch of {global_batch_size} = "
            f"{batch_size} per process × {accumulation_steps} accumulation steps × {world_size} processes."
        )


def measure_throughput(source: ImageSource, resolution: int, num_images: int = 512, seed: int = 0) -> float:
    """Items per second that this process alone makes out of `source`, in the order of training (without collation)."""
    items = IndexedItems(source, ItemMaker(resolution, seed))
    places = Places(len(source), seed, (0, 0), [range(1)], 1)
    begin = time.perf_counter()
    for (place,) in itertools.islice(places, num_images):
        items[place]
    return num_images / (time.perf_counter() - begin)
