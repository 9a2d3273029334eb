"""Training data: image sources, streams, and a loader that resumes.

source = open_source(DataArguments(train_data_dir="photos"))  # classes are known, nothing is decoded
loader = ImageLoader(source, resolution=256, batch_size=32, seed=0)
for batch in loader:  # endless; `loader.state_dict()` is where to resume
    images = to_float(batch["pixel_values"].to(device, non_blocking=True))
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
SHARD_STRIDE = 10**6  # index of an image in a stream: shard · SHARD_STRIDE + position in the shard


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
        None, "Use at most this many images, evenly spaced over the data (of a stream: the first of each shard).", ge=1
    )
    streaming: bool = flag(False, "Read --dataset_name as a stream, every image by one process.")
    stream_readers: int | None = flag(
        None,
        "Number of readers among which the shards of a stream are divided, a multiple of the number of processes (default: "
        "the largest power of two up to the number of shards, at most 64).",
        ge=1,
    )
    shuffle_buffer_size: int = flag(1000, "Number of images among which the readers together shuffle.", ge=1)
    on_bad_image: Literal["error", "skip"] = flag(
        "error", "A damaged image stops the run (error), or the next good image replaces it (skip)."
    )


class Example(NamedTuple):
    """
    A stored image and its label.

    `image` is encoded bytes, a path or URL, `uint8` pixels (3, resolution, resolution), or the error of a missing image.
    """

    image: bytes | str | np.ndarray | BadImageError
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
        wrong = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if wrong.size:
            check_label(labels[wrong[0]], self.num_classes, self[int(wrong[0])].name)

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
    """
    Shards that are read in sequence, with the attributes of [`ImageSource`]; the number of images is unknown.

    Attributes:
        stream (`datasets.IterableDataset`): The data.
        shard_names (`list[str]`): Names of its shards.
        num_readers (`int`): Number of readers among which the shards are divided.
        shuffle_buffer_size (`int`): Number of images among which the readers together shuffle.
    """

    stream: datasets.IterableDataset
    shard_names: list[str]
    num_readers: int
    shuffle_buffer_size: int
    image_column: str
    label_column: str | None
    num_classes: int
    id2label: dict[str, str] | None
    resolution: ClassVar[None] = None

    def read_shard(self, shard: int, start: int = 0) -> Iterator[Example]:
        """
        Yield the examples of a shard from position `start`. One bad example stands for the rest of a damaged shard.

        Raises:
            OSError: If the shard is missing or cannot be read.
        """
        name, rows = self.shard_names[shard], self.stream.shard(len(self.shard_names), shard)
        try:
            # `iter` is the same everywhere; plain iteration would divide the rows inside a DataLoader worker.
            for position, row in enumerate(rows.skip(start).iter(batch_size=1), start):
                label = 0 if self.label_column is None else row[self.label_column][0]
                example = encoded_example(row[self.image_column][0], label, f"example {position} of {name}")
                if label is None:
                    example = Example(BadImageError(f"There is no label of {example.name}."), 0, example.name)
                check_label(example.label, self.num_classes, example.name)
                yield example
        except (tarfile.TarError, EOFError, pa.ArrowInvalid) as error:
            yield Example(BadImageError(f"Shard {name} is damaged: {error}"), 0, name)

    def __iter__(self) -> Iterator[Example]:
        return itertools.chain.from_iterable(map(self.read_shard, range(len(self.shard_names))))


def encoded_example(image: dict | None, label: int, place: str) -> Example:
    """Example of an undecoded `datasets.Image`, which holds bytes, a path, or both."""
    content, path = (image["bytes"], image["path"]) if image else (None, None)
    if content is not None:
        return Example(content, label, f"{place} ({path})" if path else place)
    return Example(path or BadImageError(f"There is no image in {place}."), label, path or place)


def name_classes(names: list[str] | None, num_classes: int) -> dict[str, str] | None:
    """Return `{"0": name, …}`, or None for classes without names."""
    return names and {str(label): name for label, name in enumerate(names[:num_classes])}


def check_label(label: int, num_classes: int, name: str) -> None:
    """Raise ValueError unless the label is in [0, num_classes)."""
    if not 0 <= label < num_classes:
        raise ValueError(f"Label {label} of image {name} is outside [0, {num_classes}): correct it, or --num_classes.")


def open_source(args: DataArguments) -> ImageSource | StreamSource:
    """
    Find the images and their classes; no image is decoded.

    Classes are numbered by the sorted names of the sub-folders of `train_data_dir`, by the `ClassLabel` feature of a data
    set, by its integers, or by the sorted order of its strings.

    Raises:
        ValueError: If arguments contradict each other or the data, or a label is out of range.
        FileNotFoundError: If there are no images.
    """
    if (args.train_data_dir is None) == (args.dataset_name is None):
        raise ValueError("Give exactly one source of images: --train_data_dir FOLDER or --dataset_name NAME.")
    if args.dataset_name is not None:
        return open_data_set(args)
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


def load_data_set(args: DataArguments) -> tuple[datasets.Dataset | datasets.IterableDataset, list[str]]:
    """Open what `save_to_disk` wrote, or anything that `datasets.load_dataset` takes; return it and its files, if known."""
    name, split = args.dataset_name, args.dataset_split
    if any((Path(name) / file).exists() for file in ("state.json", "dataset_dict.json")):
        data = datasets.load_from_disk(name)
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise ValueError(f"{name} has no split {split!r}, only {sorted(data)}: set --dataset_split.")
            data = data[split]
        return data.to_iterable_dataset(num_shards=min(64, len(data))) if args.streaming else data, []
    options = {"name": args.dataset_config_name, "data_files": args.data_files, "cache_dir": args.cache_dir}
    if not args.streaming:
        return datasets.load_dataset(name, **options, split=split), []
    builder = datasets.load_dataset_builder(name, **options)
    return builder.as_streaming_dataset(split=split), list((builder.config.data_files or {}).get(split, []))


def open_data_set(args: DataArguments) -> ImageSource | StreamSource:
    """Find the images and classes of `dataset_name`."""
    data, files = load_data_set(args)
    label_column = None if args.unconditional else args.label_column
    columns = [args.image_column] + ([label_column] if label_column else [])
    if unknown := set(columns).difference(data.features or ()):
        raise ValueError(
            f"{args.dataset_name} has no column {unknown.pop()!r}, only {', '.join(data.features or ())}: set "
            "--image_column and --label_column."
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
    num_shards = data.num_shards
    if len(files) != num_shards:
        files = [f"{number} of {num_shards}" for number in range(num_shards)]
    return StreamSource(
        stream=data if args.max_train_samples is None else data.take(args.max_train_samples),
        shard_names=files,
        num_readers=args.stream_readers or 2 ** (min(64, num_shards).bit_length() - 1),
        shuffle_buffer_size=args.shuffle_buffer_size,
        image_column=args.image_column,
        label_column=label_column,
        num_classes=num_classes,
        id2label=name_classes(class_names, num_classes),
    )


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


def random_words(seed: int, epoch: int, index: int, purpose: int = 0, count: int = 1) -> np.ndarray:
    """
    Return `count` random `uint64`, a pure function of the arguments.

    These are the raw words of Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with key
    (seed, epoch) and counters (1, index, purpose, 0), (2, index, purpose, 0), …, four words each. numpy guarantees that raw
    words never change between versions, unlike the methods of `Generator`.

    Purposes: 0 flip and crop, 1 order of images or shards, 2 size of a shard's first block, 3 order in a block.
    """
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, index, purpose, 0], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def random_order(size: int, seed: int, epoch: int, index: int = 0, purpose: int = 1) -> np.ndarray:
    """Return a permutation of `range(size)`, a pure function of the arguments."""
    return np.argsort(random_words(seed, epoch, index, purpose, size), kind="stable")


def to_float(pixel_values: torch.Tensor) -> torch.Tensor:
    """Convert `uint8` images to `float32` in [-1, 1] on their device: x / 255 · 2 − 1, rounded as in the published code."""
    return pixel_values.float().div_(255).mul_(2).sub_(1)


def read_pixels(example: Example, resolution: int, offset: float | None = None) -> torch.Tensor:
    """Pixels of an example, uint8 (3, resolution, resolution); see [`~images.read_image`] for `offset`."""
    if isinstance(example.image, BadImageError):
        raise example.image
    if isinstance(example.image, np.ndarray):
        return torch.from_numpy(example.image.copy())
    return read_image(example.image, resolution, offset, example.name)


def read_ahead(values: Iterator, pool: ThreadPoolExecutor) -> Iterator:
    """Iterate over endless `values` while a thread computes the next one; the first one starts at once."""
    following = pool.submit(next, values)

    def take() -> Iterator:
        nonlocal following
        while True:
            value, following = following.result(), pool.submit(next, values)
            yield value

    return take()


class IndexedBatches(Dataset):
    """Batches of an [`ImageSource`]: key (position after the batch, epoch, indices) → (that position, batch)."""

    def __init__(self, loader: ImageLoader):
        self.loader = loader

    def __getitem__(self, key: tuple[dict, int, list[int]]) -> tuple[dict, dict[str, torch.Tensor]]:
        position, epoch, indices = key
        batch = default_collate([self.loader.find_item(epoch, index) for index in indices])
        transform = self.loader.batch_transform
        return position, batch if transform is None else transform(batch)


class StreamedBatches(IterableDataset):
    """
    Batches of a [`StreamSource`] for one process, which takes images from its readers in turn.

    Yields (position after the batch, batch). The position of a reader is [pass over the data, number of the shard among its
    own in this pass, images taken from that shard]. Threads read and decode: file systems and Pillow release Python's lock.
    """

    def __init__(self, loader: ImageLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[dict, dict[str, torch.Tensor]]]:
        loader, position = self.loader, self.loader.position
        mine = range(loader.rank, loader.source.num_readers, loader.world_size)
        with (
            ThreadPoolExecutor(max(1, loader.num_workers)) as decoders,
            ThreadPoolExecutor(min(16, len(mine))) as openers,
        ):
            blocks = [read_ahead(self.read_blocks(reader, *position["readers"][reader]), openers) for reader in mine]
            depth = 1 + 2 * loader.batch_size // len(mine)  # together, the readers decode two batches ahead
            items = [self.decode(itertools.chain.from_iterable(part), depth, decoders) for part in blocks]
            taken = position["batch"] * loader.accumulation_steps * loader.batch_size
            turns = itertools.islice(itertools.cycle(zip(mine, items, strict=True)), taken % len(mine), None)
            while True:
                readers = list(position["readers"])
                for step in range(1, loader.accumulation_steps + 1):
                    batch = []
                    for reader, reader_items in itertools.islice(turns, loader.batch_size):
                        readers[reader], item = next(reader_items)
                        batch.append(item)
                    if step == loader.accumulation_steps:
                        position = {"batch": position["batch"] + 1, "readers": readers}
                    yield position, default_collate(batch)

    def decode(self, examples: Iterator[tuple], depth: int, pool: ThreadPoolExecutor) -> Iterator[tuple[list, dict]]:
        """Yield the good examples of a reader, decoded, with the positions after them; decode `depth` examples ahead."""
        jobs, skipped, good_pass = deque(), 0, None
        for position, index, example in examples:
            jobs.append((position, pool.submit(self.loader.make_item, position[0], index, example)))
            if len(jobs) <= depth:
                continue
            position, job = jobs.popleft()
            if (item := job.result()) is not None:
                yield position, {**item, "skipped": skipped}
                skipped, good_pass = 0, position[0]
                continue
            skipped += 1
            if good_pass is None:
                good_pass = position[0]
            if position[0] > good_pass + 1:
                raise BadImageError(f"None of {skipped} images in succession can be decoded.")

    def read_blocks(self, reader: int, epoch: int, number: int, taken: int) -> Iterator[list[tuple]]:
        """Yield shuffled blocks of (position after the example, index, example), endlessly, from a position."""
        source, seed = self.loader.source, self.loader.seed
        size, empty = max(1, source.shuffle_buffer_size // source.num_readers), 0
        while empty <= 2 * len(source.shard_names):
            # The shards are reassigned in every pass, so that uneven ones do not bias the sampling.
            shards = random_order(len(source.shard_names), seed, epoch).tolist()
            shards = shards[(reader + epoch) % source.num_readers :: source.num_readers]
            while number < len(shards):
                offset = shards[number] * SHARD_STRIDE
                # Every pass has other boundaries between the blocks.
                first = 1 + int(random_words(seed, epoch, offset, purpose=2)[0] % size)
                start = 0 if taken < first else first + (taken - first) // size * size
                examples = source.read_shard(shards[number], start)
                while block := list(itertools.islice(examples, size if start else first)):
                    order = random_order(len(block), seed, epoch, offset + start, purpose=3)
                    rows = [
                        ([epoch, number, start + done], offset + start + place, block[place])
                        for done, place in enumerate(order.tolist(), start=1)
                    ]
                    yield rows[max(0, taken - start) :]
                    start, empty = start + len(block), 0
                number, taken, empty = number + 1, 0, empty + 1
            epoch, number = epoch + 1, 0
        raise ValueError(f"None of {empty} shards holds an image.")


# ------------------------------------------------------------------------------------------------------------- loader


class ImageLoader:
    """
    Endless batches of training images for one process, starting at `position`.

    **Every random choice is a function of (seed, epoch, index)**: the order of an epoch, crops and flips. The number of
    workers and processes, gradient accumulation and a restart in mid-epoch change nothing. An epoch is a permutation cut
    into global batches (one per optimizer step, over all processes and accumulation steps); the last incomplete one is
    dropped. Each process takes its part of a global batch: do not pass the loader through `accelerator.prepare`, which would
    divide it again.

    **Streams** are read by a fixed number of readers. Each pass over the data permutes the shards by (seed, pass) and divides
    them among the readers; image p of the run is the next one of reader p mod `num_readers`. Process r of n serves the
    readers r, r + n, …, so each image is read by one process, and any number of processes that divides the readers gives the
    same run. Readers start their next pass independently, so no process waits for another. A resume reads only the open
    shards again.

    A batch is a dictionary of CPU tensors, in pinned memory if there is a CUDA device:

    - `pixel_values`: `uint8` (batch_size, 3, resolution, resolution), see [`to_float`];
    - `class_labels`: `int64` (batch_size,);
    - `index`: `int64` (batch_size,), position in the source (in a stream: shard · 10⁶ + position in the shard);
    - `flipped`: `bool` (batch_size,);
    - `skipped`: `int64` (batch_size,), number of bad images that the image replaces.

    Args:
        source (`ImageSource` or `StreamSource`): From [`open_source`].
        resolution (`int`): Side of the images in pixels.
        batch_size (`int`): Images per process and accumulation step.
        seed (`int`): Seed of the order, the crops and the flips.
        center_crop (`bool`, defaults to `True`): ADM's centre crop; otherwise a random square of the full short side.
        random_flip (`bool`, defaults to `True`): Flip half of the images horizontally.
        on_bad_image (`str`, defaults to `"error"`): `"error"` stops the run at an image that cannot be decoded; `"skip"`
            replaces it by the next good one (in a stream: of the same reader). Both name the image. The unreadable rest of a
            shard counts as one bad image.
        accumulation_steps (`int`, defaults to 1): Batches per optimizer step.
        rank (`int`, defaults to 0): This process.
        world_size (`int`, defaults to 1): Number of processes.
        num_workers (`int`, defaults to 0): Worker processes; for a stream, decoding threads in one worker.

    Attributes:
        position (`dict`): The next global batch: `{"epoch": e, "batch": b}`; for a stream the number of batches and the
            positions of all readers, of which each process advances its own, see [`merge_states`]. It advances with the last
            accumulation step, so it is valid for any division of the same global batch.
        batches_per_epoch (`int`, *optional*): Global batches (optimizer steps) per epoch; None for a stream.
        batch_transform (`Callable`, *optional*): Applied to every batch in the worker that made it, not to streams; set it
            before iterating.

    Raises:
        ValueError: If prepared images have another resolution or would need random crops, the images do not fill one global
            batch, or the processes do not divide the readers of a stream.
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
                f"The images were prepared as centre crops of {source.resolution} pixels: set that --resolution and "
                "--center_crop, or prepare them again."
            )
        self.source, self.resolution, self.seed = source, resolution, seed
        self.center_crop, self.random_flip, self.on_bad_image = center_crop, random_flip, on_bad_image
        self.batch_size, self.accumulation_steps, self.num_workers = batch_size, accumulation_steps, num_workers
        self.rank, self.world_size = rank, world_size
        self.batch_transform: Callable[[dict], dict] | None = None
        self.global_batch_size = batch_size * accumulation_steps * world_size
        self.batches_per_epoch = None
        self.order = {"seed": seed, "global_batch_size": self.global_batch_size, "num_images": None}
        if isinstance(source, ImageSource):
            check_global_batch(len(source), batch_size, accumulation_steps, world_size)
            self.order["num_images"], self.batches_per_epoch = len(source), len(source) // self.global_batch_size
            self.position = {"epoch": 0, "batch": 0}
            return
        num_shards, num_readers = len(source.shard_names), source.num_readers
        if num_readers % world_size or num_readers > num_shards:
            raise ValueError(
                f"{num_readers} readers cannot divide {num_shards} shards among {world_size} processes: set --stream_readers "
                f"to a multiple of {world_size} up to {num_shards}, or write more shards."
            )
        self.order |= {"num_shards": num_shards, "stream_readers": num_readers}
        self.order["shuffle_buffer_size"] = source.shuffle_buffer_size
        self.position = {"batch": 0, "readers": [[0, 0, 0]] * num_readers}

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the settings that determine the order of the data."""
        return {**self.position, **self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Continue at a saved position; call it before iterating.

        Raises:
            ValueError: If the seed, the global batch or the number of images has changed, and with it the order.
        """
        before = {key: state.get(key, "unknown") for key in self.order}
        changed = [f"{key} was {before[key]} and is {now}" for key, now in self.order.items() if before[key] != now]
        if changed:
            raise ValueError(
                f"The data cannot continue at the saved position: {', '.join(changed)}. Restore these, or start a new run "
                "from the saved weights."
            )
        self.position = {key: state[key] for key in self.position}

    def make_item(self, epoch: int, index: int, example: Example) -> dict[str, Any] | None:
        """Decode, crop and flip an image with the random words of (seed, epoch, index); None for a bad one to skip."""
        flip, offset = random_words(self.seed, epoch, index, count=2) / 2.0**64
        try:
            pixels = read_pixels(example, self.resolution, None if self.center_crop else offset)
        except BadImageError as error:
            if self.on_bad_image == "error":
                raise
            logger.warning("%s; the next image replaces it.", error)
            return None
        flipped = self.random_flip and bool(flip < 0.5)
        pixels = pixels.flip(-1) if flipped else pixels
        return {"pixel_values": pixels, "class_labels": example.label, "index": index, "flipped": flipped}

    def find_item(self, epoch: int, index: int) -> dict[str, Any]:
        """Return the item of the first good image from `index` on."""
        size = len(self.source)
        for skipped in range(size):
            found = (index + skipped) % size
            if (item := self.make_item(epoch, found, self.source[found])) is not None:
                return {**item, "skipped": skipped}
        raise BadImageError(f"None of the {size} images can be decoded.")

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        streamed = self.batches_per_epoch is None
        loader = DataLoader(
            StreamedBatches(self) if streamed else IndexedBatches(self),
            sampler=None if streamed else self._shuffled_keys(**self.position),
            batch_size=None,
            num_workers=min(1, self.num_workers) if streamed else self.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_process_group,
            generator=torch.Generator(),  # seeds the workers without a draw from the global generator
        )
        for self.position, items in loader:
            yield items

    def _shuffled_keys(self, epoch: int, batch: int) -> Iterator[tuple[dict, int, list[int]]]:
        while True:
            order = random_order(len(self.source), self.seed, epoch)
            for number in range(batch, self.batches_per_epoch):
                for step in range(self.accumulation_steps):
                    # One past the last batch of an epoch means the start of the next.
                    position = {"epoch": epoch, "batch": number + (step + 1 == self.accumulation_steps)}
                    start = ((number * self.accumulation_steps + step) * self.world_size + self.rank) * self.batch_size
                    yield position, epoch, order[start : start + self.batch_size].tolist()
            epoch, batch = epoch + 1, 0


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the states of all processes: the position of a reader comes from the process that serves it."""
    if "readers" not in states[0]:
        return states[0]
    readers = [states[reader % len(states)]["readers"][reader] for reader in range(len(states[0]["readers"]))]
    return {**states[0], "readers": readers}


def leave_process_group(worker_id: int) -> None:
    """Move a worker to a process group of its own, so that Ctrl-C and SIGTERM reach only the training process."""
    os.setpgid(0, 0)


def check_global_batch(num_images: int, batch_size: int, accumulation_steps: int, world_size: int) -> None:
    """Raise ValueError if an epoch would have no optimizer step."""
    size, factors = batch_size * accumulation_steps * world_size, f"{batch_size} × {accumulation_steps} × {world_size}"
    if num_images < size:
        raise ValueError(
            f"{num_images} images do not fill one global batch of {size} = {factors} (batch × accumulation × processes)."
        )
