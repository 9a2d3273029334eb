"""Store a data set once at training resolution, to be read by memory map without decoding.

    pixelrepa-prepare-dataset --train_data_dir photos --resolution 256 --num_threads 16 --output_dir photos-256
    pixelrepa-prepare-dataset --dataset_name webdataset --data_files 'shards/*.tar' --streaming \\
        --image_column jpg --label_column cls --num_classes 1000 --output_dir shards-256

Then train with `--train_data_dir photos-256`: batches are bit-identical to those of the raw images with the centre crop. It
accepts every source that training accepts. With `--on_bad_image skip` bad images are left out and listed in the manifest.

The folder takes 3 · resolution² bytes per image. It holds `data-00000.arrow`, … (columns `pixels`: `uint8` (3, resolution,
resolution) as bytes, `label`, `name`), which `datasets` also loads; `prepared.json` with the resolution, classes, file sizes
and skipped images; and `SHA256SUMS` for `sha256sum -c`. The folder is written as `.NAME.incomplete` and renamed when complete.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from ..cli import flag, parse, run
from ..files import write_folder, write_json
from ..images import BadImageError
from ..training.data import MANIFEST, DataArguments, Example, open_source, read_pixels


FEATURES = datasets.Features(
    {"pixels": datasets.Value("binary"), "label": datasets.Value("int64"), "name": datasets.Value("string")}
)
FILE_BYTES = 1 << 30
BATCH_BYTES = 1 << 24


@dataclass(kw_only=True)
class PrepareArguments(DataArguments):
    output_dir: str = flag(help="Folder to write; it must not exist.")
    resolution: int = flag(256, "Side of the stored images in pixels.", ge=1)
    num_threads: int = flag(os.cpu_count() or 1, "Threads that decode and crop (default: one per core).", ge=1)


def crop_example(example: Example, resolution: int) -> dict | BadImageError:
    """A row to store. A bad image is returned, not raised, because the main thread decides what to do with it."""
    try:
        pixels = read_pixels(example, resolution)
    except BadImageError as error:
        return error
    return {"pixels": pixels.numpy().tobytes(), "label": example.label, "name": example.name}


def crop_all(examples: Iterable[Example], resolution: int, num_threads: int) -> Iterator[dict | BadImageError]:
    """Crop in threads, in the order of the examples and a few examples ahead of the consumer."""
    with ThreadPoolExecutor(num_threads) as pool:
        pending = collections.deque()
        for example in examples:
            pending.append(pool.submit(crop_example, example, resolution))
            if len(pending) > 8 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def write_rows(rows: Iterable[dict], folder: Path, resolution: int) -> tuple[dict[str, int], int]:
    """Write `data-*.arrow` files of about 1 GiB; return the size of each and the number of rows."""
    image_bytes = 3 * resolution * resolution
    rows_per_file = max(1, FILE_BYTES // image_bytes)
    batch_size = max(1, BATCH_BYTES // image_bytes)
    rows, files, count = iter(rows), {}, 0
    for row in rows:
        path = folder / f"data-{len(files):05d}.arrow"
        with ArrowWriter(features=FEATURES, path=str(path), writer_batch_size=batch_size) as writer:
            for member in itertools.chain([row], itertools.islice(rows, rows_per_file - 1)):
                writer.write(member)
            written, _ = writer.finalize()
        files[path.name] = path.stat().st_size
        count += written
    return files, count


def checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def main(args: PrepareArguments) -> None:
    output = Path(args.output_dir)
    if output.exists():
        raise ValueError(f"--output_dir {output} exists already: remove it or choose another.")
    source = open_source(args)
    if source.resolution is not None:
        raise ValueError(f"{args.train_data_dir} is prepared already, at resolution {source.resolution}.")

    class_names = None if source.id2label is None else list(source.id2label.values())
    manifest = {
        "resolution": args.resolution,
        "num_classes": source.num_classes,
        "class_names": class_names,
        "skipped": [],
    }

    def good_rows() -> Iterator[dict]:
        total = len(source) if hasattr(source, "__len__") else None
        for row in tqdm(crop_all(source, args.resolution, args.num_threads), total=total, unit="image", disable=None):
            if isinstance(row, BadImageError):
                if args.on_bad_image == "error":
                    raise row
                tqdm.write(f"Skipped: {row}")
                manifest["skipped"].append(str(row))
                continue
            if args.train_data_dir is not None:
                row["name"] = os.path.relpath(row["name"], args.train_data_dir)
            yield row

    def write(folder: Path) -> None:
        manifest["files"], manifest["num_images"] = write_rows(good_rows(), folder, args.resolution)
        if not manifest["num_images"]:
            raise ValueError("No image could be stored: the source is empty or all its images are bad.")
        write_json(folder / MANIFEST, manifest)
        sums = [f"{checksum(folder / name)}  {name}\n" for name in (*manifest["files"], MANIFEST)]
        (folder / "SHA256SUMS").write_text("".join(sums))

    write_folder(output, write)
    print(
        f"Stored {manifest['num_images']} images of {source.num_classes} classes in {output}, "
        f"skipped {len(manifest['skipped'])}."
    )


def cli() -> None:
    run(lambda: main(parse(PrepareArguments, __doc__.partition("\n")[0])))
