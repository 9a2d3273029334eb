"""The prepared format: the training data of the raw images, complete or absent."""

import hashlib
import itertools
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from pixelrepa_diffusers.commands import prepare_dataset
from pixelrepa_diffusers.commands.prepare_dataset import PrepareArguments, main
from pixelrepa_diffusers.images import BadImageError
from pixelrepa_diffusers.training.data import DataArguments, ImageLoader, open_source


SIZE = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """11 images of two classes and different sizes."""
    random = np.random.default_rng(0)
    for number in range(11):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02d}.{'png' if number % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (9 + number, 30 - number, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def prepare(output: Path, **options) -> Path:
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    main(PrepareArguments(**{"output_dir": str(output), "resolution": SIZE, "num_threads": 2, **options}))
    return output


def source(folder: Path, **options):
    return open_source(DataArguments(train_data_dir=str(folder), **options))


def batches(folder: Path, **options) -> list[dict]:
    return list(itertools.islice(ImageLoader(source(folder), SIZE, 3, seed=1, **options), 7))


def assert_same_training_data(left: Path, right: Path, **options) -> None:
    for a, b in zip(batches(left), batches(right, **options), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("num_threads, num_workers", [(1, 0), (3, 1)])
def test_prepared_images_are_bit_identical_training_data(folder, tmp_path, monkeypatch, num_threads, num_workers):
    monkeypatch.setattr(prepare_dataset, "FILE_BYTES", 4 * 3 * SIZE * SIZE)  # several files
    prepared = prepare(tmp_path / "small", train_data_dir=folder, num_threads=num_threads)
    assert len(list(prepared.glob("data-0000?.arrow"))) == 3
    assert_same_training_data(folder, prepared, num_workers=num_workers)
    assert (source(prepared).num_classes, source(prepared).id2label) == (2, {"0": "a", "1": "b"})
    assert source(prepared)[0].name == os.path.join("a", "00.jpg")


def test_a_stream_can_be_prepared(folder, tmp_path):
    table = {
        "image": [Path(example.name).read_bytes() for example in source(folder)],
        "label": [example.label for example in source(folder)],
    }
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "hub" / "train.parquet")
    prepared = prepare(tmp_path / "small", dataset_name=tmp_path / "hub", streaming=True, num_classes=3)
    assert (source(prepared).num_classes, source(prepared).id2label) == (3, None)
    assert_same_training_data(folder, prepared)


def test_data_arguments_apply_to_prepared_images(folder, tmp_path):
    prepared = prepare(tmp_path / "small", train_data_dir=folder)
    few = source(prepared, max_train_samples=2, unconditional=True)
    assert (len(few), few.num_classes, few.id2label) == (2, 1, None)
    with pytest.raises(ValueError, match=r"Label 1 of image b.* is outside \[0, 1\)"):
        source(prepared, num_classes=1)


def test_prepared_images_serve_only_their_own_use(folder, tmp_path):
    prepared = prepare(tmp_path / "small", train_data_dir=folder)
    for options in ({"resolution": 16}, {"resolution": SIZE, "center_crop": False}):
        with pytest.raises(ValueError, match="centre crops of 8 pixels"):
            ImageLoader(source(prepared), batch_size=2, seed=0, **options)
    with pytest.raises(ValueError, match="prepared already"):
        prepare(tmp_path / "again", train_data_dir=prepared)
    with pytest.raises(ValueError, match="pass it as --train_data_dir"):
        open_source(DataArguments(dataset_name=str(prepared)))
    with pytest.raises(ValueError, match="small exists already"):
        prepare(prepared, train_data_dir=folder)


def test_checksums_are_those_of_sha256sum(folder, tmp_path):
    prepared = prepare(tmp_path / "small", train_data_dir=folder)
    expected = {
        f"{hashlib.sha256((prepared / name).read_bytes()).hexdigest()}  {name}"
        for name in ("data-00000.arrow", "prepared.json")
    }
    assert set((prepared / "SHA256SUMS").read_text().splitlines()) == expected


def test_a_bad_image_stops_the_preparation(folder, tmp_path):
    (folder / "b" / "05.png").write_bytes(b"damaged")
    with pytest.raises(BadImageError, match=r"b/05.png"):
        prepare(tmp_path / "small", train_data_dir=folder)
    assert not (tmp_path / "small").exists()


def test_skipped_images_are_left_out_and_listed(folder, tmp_path, capsys):
    (folder / "b" / "05.png").write_bytes(b"damaged")
    prepared = prepare(tmp_path / "small", train_data_dir=folder, on_bad_image="skip")
    names = [Path(example.name).name for example in source(prepared)]
    assert len(names) == 10 and "05.png" not in names
    manifest = json.loads((prepared / "prepared.json").read_text())
    assert manifest["num_images"] == 10
    assert len(manifest["skipped"]) == 1 and "b/05.png" in manifest["skipped"][0]
    assert "skipped 1." in capsys.readouterr().out


def test_only_bad_images_are_an_error(folder, tmp_path):
    for path in folder.rglob("*.*"):
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="No image could be stored"):
        prepare(tmp_path / "small", train_data_dir=folder, on_bad_image="skip")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign", "manifest"])
def test_a_damaged_copy_is_refused(folder, tmp_path, damage):
    prepared = prepare(tmp_path / "small", train_data_dir=folder)
    path = prepared / "data-00000.arrow"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        path.unlink()
    elif damage == "foreign":
        path.write_bytes(b"x" * path.stat().st_size)
    else:
        (prepared / "prepared.json").write_text("{")
    with pytest.raises(ValueError, match="small is damaged: "):
        source(prepared)
