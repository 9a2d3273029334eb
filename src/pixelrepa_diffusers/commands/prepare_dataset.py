"""Store a data set once at training resolution, to be read back by memory map without decoding.

    python training/prepare_dataset.py --train_data_dir photos --resolution 256 --num_threads 16 --output_dir photos-256
    python training/prepare_dataset.py --dataset_name webdataset --data_files 'shards/*.tar' --streaming \\
        --image_column jpg --label_column cls --num_classes 1000 --output_dir shards-256

Then train with `--train_data_dir photos-256`: every batch equals, to the bit, what the raw images give with the centre
crop. Takes every source that training takes (`data.py` says which, and what becomes of odd images). With
`--on_bad_image skip` bad images are left out and listed in the manifest.

The folder holds `data-00000.arrow`, … (columns `pixels`: `uint8` (3, resolution, resolution) as bytes, `label`, `name`),
which `datasets` also loads by itself; `prepared.json` with resolution, classes, file sizes and what was skipped; and
`SHA256SUMS` for `sha256sum -c`. It takes 3 · resolution² bytes per image. It is written beside its place and renamed when
complete, so an interrupted run leaves at most a folder whose name begins with `.partial-`.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm
from transformers import HfArgumentParser

from ..cli import run
from ..stored_images import MANIFEST
from ..training.data import BadImageError, DataArguments, Example, ItemMaker, open_source


FEATURES = datasets.Features(
    {"pixels": datasets.Value("binary"), "label": datasets.Value("int64"), "name": datasets.Value("string")}
)
FILE_BYTES = 1 << 30
BATCH_BYTES = 1 << 24


@dataclass
class PrepareArguments:
    """Where to and how."""

    output_dir: str = field(metadata={"help": "The folder to write; it must not exist."})
    resolution: int = field(default=256, metadata={"help": "Side of the stored images in pixels."})
    num_threads: int = field(
        default=os.cpu_count() or 1,
        metadata={"help": "Threads that decode and crop; Pillow lets them run side by side. Default: one per core."},
    )


def crop_example(make_item: ItemMaker, example: Example) -> dict | BadImageError:
    """One row to store; a bad image is handed back, not raised, so that the main process decides."""
    try:
        pixels = make_item.read_pixels(example, offset=None)
    except BadImageError as error:
        return error
    return {"pixels": pixels.tobytes(), "label": example.label, "name": example.name}


def crop_all(examples: Iterable[Example], resolution: int, num_threads: int) -> Iterator[dict | BadImageError]:
    """Rows in the order of the examples, a few of them ahead of their use."""
    make_item = ItemMaker(resolution, seed=0)
    with ThreadPoolExecutor(num_threads) as pool:
        waiting = collections.deque()
        for example in examples:
            waiting.append(pool.submit(crop_example, make_item, example))
            if len(waiting) > 8 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def write_rows(rows: Iterable[dict], folder: Path, resolution: int) -> tuple[dict[str, int], int]:
    """Write `data-*.arrow` files of about 1 GiB → their names and sizes, and the number of rows."""
    image_bytes = 3 * resolution * resolution
    rows_per_file = max(1, FILE_BYTES // image_bytes)
    rows, files, count = iter(rows), {}, 0
    for row in rows:
        path = folder / f"data-{len(files):05d}.arrow"
        batch_size = max(1, BATCH_BYTES // image_bytes)
        with ArrowWriter(features=FEATURES, path=str(path), writer_batch_size=batch_size) as writer:
            for member in itertools.chain([row], itertools.islice(rows, rows_per_file - 1)):
                writer.write(member)
            written, _ = writer.finalize()
        files[path.name] = path.stat().st_size
        count += written
    return files, count


def checksum(path: Path) -> str:
    """SHA-256 of a file, which is also forced to the disk before the folder gets its final name."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        os.fsync(file.fileno())
    return digest.hexdigest()


def main(data_args: DataArguments, args: PrepareArguments) -> None:
    output = Path(args.output_dir)
    if os.path.lexists(output):
        raise ValueError(f"--output_dir {output} exists already: remove it or choose another.")
    for name in ("resolution", "num_threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    source = open_source(data_args)
    if source.resolution is not None:
        raise ValueError(f"{data_args.train_data_dir} is prepared already, at resolution {source.resolution}.")

    skipped = []

    def good_rows() -> Iterator[dict]:
        total = len(source) if hasattr(source, "__len__") else None
        for row in tqdm(crop_all(source, args.resolution, args.num_threads), total=total, unit="image"):
            if isinstance(row, BadImageError):
                if data_args.on_bad_image == "error":
                    raise row
                tqdm.write(f"Skipped: {row}")
                skipped.append(str(row))
                continue
            if data_args.train_data_dir is not None:
                row["name"] = os.path.relpath(row["name"], data_args.train_data_dir)
            yield row

    folder = output.with_name(f".partial-{output.name}-{secrets.token_hex(4)}")
    folder.mkdir(parents=True)
    try:
        files, count = write_rows(good_rows(), folder, args.resolution)
        if not count:
            raise ValueError("No image could be stored: the source is empty or all its images are bad.")
        names = None if source.id2label is None else list(source.id2label.values())
        manifest = {
            "resolution": args.resolution,
            "num_images": count,
            "num_classes": source.num_classes,
            "class_names": names,
            "files": files,
            "skipped": skipped,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        sums = "".join(f"{checksum(folder / name)}  {name}\n" for name in (*files, MANIFEST))
        (folder / "SHA256SUMS").write_text(sums)
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder)
        raise
    print(f"Stored {count} images of {source.num_classes} classes in {output}, skipped {len(skipped)}.")


def cli() -> None:
    run(lambda: main(*HfArgumentParser((DataArguments, PrepareArguments)).parse_args_into_dataclasses()))
