"""Data sets on disk that training and reference statistics both read: of prepare_dataset.py, and of `save_to_disk`."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa


__all__ = ["MANIFEST", "is_prepared", "is_saved", "open_prepared", "open_saved"]

MANIFEST = "prepared.json"


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
