"""Where images come from, for training and for reference statistics: folders, data sets, and what prepare_dataset.py wrote."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa


__all__ = ["MANIFEST", "check_source", "is_prepared", "open_data_set", "open_prepared", "scan_folder", "stored_crop"]

logger = logging.getLogger(__name__)

MANIFEST = "prepared.json"
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def check_source(args, of_data_sets: Sequence[str]) -> None:
    """
    Refuses arguments about the source of images that do not go together.

    Args:
        args: a dataclass with `train_data_dir` and `dataset_name`.
        of_data_sets: those of its fields that mean something with `dataset_name` alone.

    Raises:
        ValueError: not exactly one source; one of `of_data_sets` beside a folder of images; a folder of the other kind.
    """
    if (args.train_data_dir is None) == (args.dataset_name is None):
        raise ValueError(
            "Give exactly one source of images: --train_data_dir FOLDER or --dataset_name NAME; "
            f"got train_data_dir={args.train_data_dir!r} and dataset_name={args.dataset_name!r}."
        )
    if args.dataset_name is not None:
        if is_prepared(Path(args.dataset_name)):
            raise ValueError(
                f"--dataset_name: {args.dataset_name} was written by prepare_dataset.py, give it as --train_data_dir."
            )
        return
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    given = [name for name in of_data_sets if getattr(args, name) != defaults[name]]
    if given:
        raise ValueError(f"--{given[0]} belongs to --dataset_name; --train_data_dir is read as it is.")
    if is_saved(Path(args.train_data_dir)):
        raise ValueError(
            f"--train_data_dir: {args.train_data_dir} was written by `save_to_disk`, give it as --dataset_name."
        )


def is_prepared(folder: Path) -> bool:
    """Whether prepare_dataset.py wrote `folder`."""
    return (folder / MANIFEST).exists()


def open_prepared(folder: Path) -> tuple[datasets.Dataset, dict]:
    """
    What prepare_dataset.py wrote.

    Returns:
        A memory-mapped data set with the columns `pixels` (bytes of a uint8 (3, resolution, resolution)), `label` and
        `name`; and the manifest: `resolution`, `num_classes`, `class_names`, `files`.

    Raises:
        ValueError: the manifest, or a file that it lists, is not as it was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {error} Prepare or copy {folder} again.") from error
    kinds = {"resolution": int, "num_classes": int, "class_names": list | None, "files": dict}
    if not isinstance(manifest, dict) or not all(
        name in manifest and isinstance(manifest[name], kind) for name, kind in kinds.items()
    ):
        raise ValueError(
            f"{folder / MANIFEST} must hold {', '.join(kinds)}, as prepare_dataset.py writes them: prepare {folder} again."
        )
    for name, size in manifest["files"].items():
        path = folder / name
        if Path(name).name != name:
            raise ValueError(
                f"{folder / MANIFEST} names {name!r}, which lies outside its folder: prepare {folder} again."
            )
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{path} is missing or not {size} bytes long: prepare or copy {folder} again.")
    try:
        parts = [datasets.Dataset.from_file(str(folder / name)) for name in manifest["files"]]
        images = datasets.concatenate_datasets(parts).select_columns(["pixels", "label", "name"])
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(f"The files of {folder} are damaged: {error} Prepare or copy it again.") from error
    return images, manifest


def stored_crop(pixels: bytes | pa.Buffer, resolution: int, row: int) -> np.ndarray:
    """
    A row of `pixels` as the uint8 (3, resolution, resolution) it is; no copy is made.

    Raises:
        ValueError: it has another size.
    """
    flat = np.frombuffer(pixels, np.uint8)
    if len(flat) != 3 * resolution**2:
        raise ValueError(
            f"Row {row} of the prepared data holds {len(flat)} bytes, an image of {resolution} pixels has "
            f"{3 * resolution**2}: prepare the data again."
        )
    return flat.reshape(3, resolution, resolution)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of a data set, or of one with several splits, wrote `folder`."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def open_saved(folder: Path, split: str) -> datasets.Dataset:
    """
    What `save_to_disk` wrote; `split` matters where it wrote several.

    Raises:
        ValueError: the folder is damaged, or has no such split.
    """
    try:
        data = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, TypeError, LookupError, RecursionError, pa.ArrowException) as error:
        raise ValueError(
            f"{folder} cannot be read as a data set ({type(error).__name__}: {error}): it is damaged or empty."
        ) from error
    if not isinstance(data, datasets.DatasetDict):
        return data
    if split not in data:
        raise ValueError(f"{folder} has no split {split!r}, only {sorted(data)}: --dataset_split.")
    return data[split]


def open_data_set(
    name: str,
    config_name: str | None,
    split: str,
    cache_dir: str | None,
    data_files: list[str] | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """
    What `save_to_disk` wrote, or anything that `datasets.load_dataset` takes.

    Raises:
        ValueError: see [`open_saved`]; or what `save_to_disk` wrote is to be read in a way that it cannot be.
    """
    saved = Path(name)
    if not is_saved(saved):
        return datasets.load_dataset(
            name, config_name, data_files=data_files, split=split, cache_dir=cache_dir, streaming=streaming
        )
    flags = {"--streaming": streaming, "--data_files": data_files, "--dataset_config_name": config_name}
    given = [flag for flag, value in flags.items() if value]
    if given:
        raise ValueError(f"{saved} was written by `save_to_disk` and is read where it lies: drop {', '.join(given)}.")
    return open_saved(saved, split)


def scan_folder(folder: Path, unconditional: bool) -> tuple[list[str], list[int], list[str] | None]:
    """List the images below `folder` → paths, labels, class names, sorted by class and by path within it.

    Names that begin with a dot are ignored, files without an image suffix are ignored and counted in one warning.
    Links are followed; one that is broken or leads back to a folder above it is an error.
    """
    ignored = collections.Counter()

    def images_below(parent: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[str]:
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in ancestors:
            raise ValueError(f"{parent} links back to a folder above it: remove the link.")
        for entry in sorted(os.scandir(parent), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from images_below(entry.path, (*ancestors, (status.st_dev, status.st_ino)))
            elif not entry.name.lower().endswith(IMAGE_SUFFIXES):
                ignored[Path(entry.name).suffix or entry.name] += 1
            elif entry.is_file():
                yield entry.path
            else:
                raise ValueError(f"{entry.path} is a broken link or no regular file: remove it.")

    if unconditional:
        paths, names = list(images_below(str(folder), ())), None
        if not paths:
            raise ValueError(f"There are no images ({', '.join(IMAGE_SUFFIXES)}) in {folder}.")
        labels = [0] * len(paths)
    else:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        loose = [entry for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.is_dir()]
        if loose:
            raise ValueError(
                f"{loose[0]} and {len(loose) - 1} other images lie outside the class folders of {folder}: "
                "move them into one sub-folder per class, or pass --unconditional."
            )
        names = [entry.name for entry in entries if entry.is_dir()]
        if not names:
            raise ValueError(f"{folder} has no sub-folders: it needs one per class, or --unconditional.")
        paths, labels = [], []
        for label, name in enumerate(names):
            found = list(images_below(str(folder / name), ()))
            if not found:
                raise ValueError(
                    f"Class folder {folder / name} has no images ({', '.join(IMAGE_SUFFIXES)}): fill or remove it."
                )
            paths += found
            labels += [label] * len(found)
    if ignored:
        logger.warning("Ignored in %s, not images by their suffix: %s", folder, dict(ignored))
    return paths, labels, names
