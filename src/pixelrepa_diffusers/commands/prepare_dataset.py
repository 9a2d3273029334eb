"""Store a data set once at training resolution, to be read by memory map without decoding.

    pixelrepa-prepare-dataset --train_data_dir photos --resolution 256 --num_threads 16 --output_dir photos-256
    pixelrepa-prepare-dataset --dataset_name webdataset --data_files 'shards/*.tar' --streaming \\
        --image_column jpg --label_column cls --num_classes 1000 --output_dir shards-256

Then train with `--train_data_dir photos-256`: batches are bit-identical to those of the raw images with the centre crop. It
accepts every source that training accepts. With `--on_bad_image skip` bad images are left out and listed in the manifest.

The folder takes 3 · resolution² bytes per image. It holds `data-00000.arrow`, … (columns `pixels`: `uint8` (3, resolution,
resolution) as bytes, `label`, `name`), which `datasets` also loads; `prepared.json` with the resolution, classes, file sizes
and skipped images; and `SHA256SUMS` for `sha256sum -c`. It is written as `.NAME.incomplete` and renamed when complete.
"""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets.arrow_writer import ArrowWriter
from huggingface_hub.utils.sha import sha_fileobj
from tqdm import tqdm

from ..cli import flag, parse, run
from ..files import write_folder, write_json
from ..images import BadImageError
from ..training.data import MANIFEST, DataArguments, Example, open_source, read_pixels


FEATURES = datasets.Features(
    {"pixels": datasets.Value("binary"), "label": datasets.Value("int64"), "name": datasets.Value("string")}
)
FILE_BYTES = 1 << 30


@dataclass(kw_only=True)
class PrepareArguments(DataArguments):
    output_dir: str = flag(help="Folder to write; it must not exist.")
    resolution: int = flag(256, "Side of the stored images in pixels.", ge=1)
    num_threads: int = flag(os.cpu_count() or 1, "Threads that decode and crop (default: one per core).", ge=1)


def crop_all(examples: Iterable[Example], resolution: int, num_threads: int) -> Iterator[tuple[Example, Future]]:
    """Crop in threads, a few examples ahead of the consumer, in the order of the examples."""
    with ThreadPoolExecutor(num_threads) as pool:
        pending = collections.deque()
        for example in examples:
            pending.append((example, pool.submit(read_pixels, example, resolution)))
            if len(pending) > 8 * num_threads:
                yield pending.popleft()
        yield from pending


def write_rows(rows: Iterator[dict], folder: Path, rows_per_file: int) -> dict[str, int]:
    """Write `data-*.arrow` files; return the size of each."""
    files = {}
    for row in rows:
        path = folder / f"data-{len(files):05d}.arrow"
        with ArrowWriter(features=FEATURES, path=str(path), writer_batch_size=100) as writer:
            for member in itertools.chain([row], itertools.islice(rows, rows_per_file - 1)):
                writer.write(member)
            writer.finalize()
        files[path.name] = path.stat().st_size
    return files


def checksum(path: Path) -> str:
    """Return the line of `sha256sum` for a file."""
    with path.open("rb") as file:
        return f"{sha_fileobj(file).hex()}  {path.name}\n"


def main(args: PrepareArguments) -> None:
    output = Path(args.output_dir)
    if output.exists():
        raise ValueError(f"--output_dir {output} exists already: remove it or choose another.")
    source = open_source(args)
    if source.resolution is not None:
        raise ValueError(f"{args.train_data_dir} is prepared already, at resolution {source.resolution}.")
    manifest = {
        "resolution": args.resolution,
        "num_classes": source.num_classes,
        "class_names": source.id2label and list(source.id2label.values()),
        "skipped": [],
        "files": {},
        "num_images": 0,
    }

    def good_rows() -> Iterator[dict]:
        total = len(source) if hasattr(source, "__len__") else None
        crops = crop_all(source, args.resolution, args.num_threads)
        for example, crop in tqdm(crops, total=total, unit="image", disable=None):
            try:
                pixels = crop.result().numpy().tobytes()
            except BadImageError as error:
                if args.on_bad_image == "error":
                    raise
                tqdm.write(f"Skipped: {error}")
                manifest["skipped"].append(str(error))
                continue
            manifest["num_images"] += 1
            name = os.path.relpath(example.name, args.train_data_dir) if args.train_data_dir else example.name
            yield {"pixels": pixels, "label": example.label, "name": name}

    def write(folder: Path) -> None:
        manifest["files"] = write_rows(good_rows(), folder, max(1, FILE_BYTES // (3 * args.resolution**2)))
        write_json(folder / MANIFEST, manifest)
        sums = [checksum(folder / name) for name in (*manifest["files"], MANIFEST)]
        (folder / "SHA256SUMS").write_text("".join(sums))

    write_folder(output, write)
    print(
        f"Stored {manifest['num_images']} images of {source.num_classes} classes in {output}, "
        f"skipped {len(manifest['skipped'])}."
    )


def cli() -> None:
    run(lambda: main(parse(PrepareArguments, __doc__.partition("\n")[0])))
