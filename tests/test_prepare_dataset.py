"""The prepared format: the same training data as the raw images, complete or not there at all."""

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from pixelrepa_diffusers.commands.prepare_dataset import PrepareArguments, main
from pixelrepa_diffusers.training.data import BadImageError, DataArguments, ImageLoader, open_source


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


def raw(folder: Path, **options) -> DataArguments:
    return DataArguments(train_data_dir=str(folder), **options)


def prepare(args: DataArguments, output: Path, resolution: int = SIZE, num_threads: int = 2) -> DataArguments:
    main(args, PrepareArguments(output_dir=str(output), resolution=resolution, num_threads=num_threads))
    return DataArguments(train_data_dir=str(output))


def batches(args: DataArguments, count: int, **options) -> list[dict]:
    return list(itertools.islice(ImageLoader(open_source(args), SIZE, 3, seed=1, **options), count))


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_prepared_images_train_as_the_raw_ones_to_the_bit(folder, tmp_path, num_threads, num_workers):
    prepared = prepare(raw(folder), tmp_path / "small", num_threads=num_threads)
    left, right = batches(raw(folder), 7), batches(prepared, 7, num_workers=num_workers)
    for a, b in zip(left, right, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    source = open_source(prepared)
    assert (source.num_classes, source.id2label) == (2, {"0": "a", "1": "b"})
    assert source[0].name == os.path.join("a", "00.jpg")


def test_images_in_several_files_are_one_data_set(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("prepare_dataset.FILE_BYTES", 4 * 3 * SIZE * SIZE)
    prepared = prepare(raw(folder), tmp_path / "small")
    assert sorted(path.name for path in (tmp_path / "small").glob("*.arrow")) == [
        f"data-0000{i}.arrow" for i in range(3)
    ]
    for a, b in zip(open_source(raw(folder)), open_source(prepared), strict=True):
        assert a.label == b.label and Path(a.name).name == Path(b.name).name
    assert all(
        torch.equal(a["pixel_values"], b["pixel_values"])
        for a, b in zip(batches(raw(folder), 3), batches(prepared, 3), strict=True)
    )


def test_a_stream_can_be_prepared(folder, tmp_path):
    source = open_source(raw(folder))
    table = {"image": [Path(e.name).read_bytes() for e in source], "label": [e.label for e in source]}
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "hub" / "train.parquet")
    stream = DataArguments(dataset_name=str(tmp_path / "hub"), streaming=True, num_classes=3)
    prepared = prepare(stream, tmp_path / "small")
    assert (open_source(prepared).num_classes, open_source(prepared).id2label) == (3, None)
    assert all(
        torch.equal(a["pixel_values"], b["pixel_values"])
        for a, b in zip(batches(raw(folder), 3), batches(prepared, 3), strict=True)
    )


def test_arguments_apply_to_prepared_images_too(folder, tmp_path):
    prepare(raw(folder), tmp_path / "small")
    few = open_source(raw(tmp_path / "small", max_train_samples=2, unconditional=True))
    assert (len(few), few.num_classes, few.id2label) == (2, 1, None)
    with pytest.raises(ValueError, match=r"Label 1 of image b.* is outside \[0, 1\)"):
        open_source(raw(tmp_path / "small", num_classes=1))


def test_another_resolution_and_random_crops_are_refused(folder, tmp_path):
    source = open_source(prepare(raw(folder), tmp_path / "small"))
    for wrong in ({"resolution": 16}, {"resolution": SIZE, "center_crop": False}):
        with pytest.raises(ValueError, match="centre crops of 8 pixels"):
            ImageLoader(source, batch_size=2, seed=0, **wrong)
    with pytest.raises(ValueError, match="prepared already, at resolution 8"):
        prepare(raw(tmp_path / "small"), tmp_path / "again")


def test_the_checksums_are_those_of_sha256sum(folder, tmp_path):
    prepare(raw(folder), tmp_path / "small")
    lines = (tmp_path / "small" / "SHA256SUMS").read_text().splitlines()
    names = {line.split("  ")[1]: line.split("  ")[0] for line in lines}
    assert names == {
        name: hashlib.sha256((tmp_path / "small" / name).read_bytes()).hexdigest()
        for name in ("data-00000.arrow", "prepared.json")
    }


@pytest.mark.parametrize("existing", ["folder", "file", "link"])
def test_nothing_is_overwritten(folder, tmp_path, existing):
    output = tmp_path / "small"
    {"folder": output.mkdir, "file": output.touch, "link": lambda: output.symlink_to(tmp_path / "gone")}[existing]()
    with pytest.raises(ValueError, match="small exists already"):
        prepare(raw(folder), output)


@pytest.mark.parametrize("wrong", ["resolution", "num_threads"])
def test_settings_outside_their_range_are_named(folder, tmp_path, wrong):
    with pytest.raises(ValueError, match=f"--{wrong} must be at least 1, got 0"):
        prepare(raw(folder), tmp_path / "small", **{wrong: 0})


def test_a_bad_image_stops_the_preparation_and_leaves_nothing(folder, tmp_path):
    (folder / "b" / "05.png").write_bytes(b"damaged")
    with pytest.raises(BadImageError, match=r"b/05.png"):
        prepare(raw(folder), tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_skipped_images_are_left_out_counted_and_listed(folder, tmp_path, capsys):
    (folder / "b" / "05.png").write_bytes(b"damaged")
    prepared = prepare(raw(folder, on_bad_image="skip"), tmp_path / "small")
    names = [Path(example.name).name for example in open_source(prepared)]
    assert len(names) == 10 and "05.png" not in names
    manifest = json.loads((tmp_path / "small" / "prepared.json").read_text())
    assert manifest["num_images"] == 10
    assert len(manifest["skipped"]) == 1 and "b/05.png" in manifest["skipped"][0]
    assert "skipped 1." in capsys.readouterr().out


def test_only_bad_images_are_an_error(folder, tmp_path):
    for path in folder.rglob("*.*"):
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="No image could be stored"):
        prepare(raw(folder, on_bad_image="skip"), tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_an_incomplete_copy_is_refused(folder, tmp_path, damage):
    prepare(raw(folder), tmp_path / "small")
    path = tmp_path / "small" / "data-00000.arrow"
    path.write_bytes(path.read_bytes()[:-1]) if damage == "truncated" else path.unlink()
    with pytest.raises(ValueError, match=r"data-00000.arrow is missing or not \d+ bytes long"):
        open_source(raw(tmp_path / "small"))


def test_a_killed_preparation_leaves_nothing_that_looks_complete(folder, tmp_path):
    for copy in range(400):  # some seconds of work
        (folder / "a" / f"copy{copy}.png").symlink_to(folder / "a" / "02.png")
    # Forked, because a fresh interpreter would spend seconds on imports.
    process = multiprocessing.get_context("fork").Process(
        target=prepare, args=(raw(folder), tmp_path / "small"), kwargs={"resolution": 512, "num_threads": 1}
    )
    process.start()
    while process.is_alive() and not list(tmp_path.glob(".partial-small-*/data-00000.arrow")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "small").exists()
    (partial,) = tmp_path.glob(".partial-small-*")
    assert not (partial / "prepared.json").exists()
