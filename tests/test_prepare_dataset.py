"""The prepared format: the training data of the raw images, complete or absent."""

import hashlib
import itertools
import json
import os
from pathlib import Path

import datasets
import pytest
import torch
from pictures import write_photos

from pixelrepa_diffusers.commands import prepare_dataset
from pixelrepa_diffusers.commands.prepare_dataset import PrepareArguments, main
from pixelrepa_diffusers.training.data import DataArguments, ImageLoader, open_source


SIZE = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


@pytest.fixture
def prepare(tmp_path):
    """prepare(**arguments) returns the prepared folder."""

    def run(**options) -> Path:
        options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        settings = {"output_dir": str(tmp_path / "small"), "resolution": SIZE, "num_threads": 2}
        main(PrepareArguments(**{**settings, **options}))
        return tmp_path / "small"

    return run


def source(folder: Path, **options):
    return open_source(DataArguments(train_data_dir=str(folder), **options))


def assert_same_training_data(left: Path, right: Path, **options) -> None:
    loaders = ImageLoader(source(left), SIZE, 3, seed=1), ImageLoader(source(right), SIZE, 3, seed=1, **options)
    for one, other in itertools.islice(zip(*loaders, strict=True), 9):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_prepared_images_are_bit_identical_training_data(folder, prepare, monkeypatch):
    monkeypatch.setattr(prepare_dataset, "FILE_BYTES", 8 * 3 * SIZE * SIZE)  # several files
    prepared = prepare(train_data_dir=folder)
    assert_same_training_data(folder, prepared, num_workers=1)
    assert (source(prepared).num_classes, source(prepared).id2label) == (2, {"0": "ant", "1": "cat"})
    assert source(prepared)[0].name == os.path.join("ant", "sub", "00.JPG")
    few = source(prepared, max_train_samples=2, unconditional=True)
    assert (len(few), few.num_classes, few.id2label) == (2, 1, None)
    names = [f"data-0000{number}.arrow" for number in range(3)] + ["prepared.json"]
    sums = [f"{hashlib.sha256((prepared / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    assert (prepared / "SHA256SUMS").read_text() == "".join(sums)


def test_a_stream_can_be_prepared(folder, prepare, tmp_path):
    examples = list(source(folder))
    table = {"image": [Path(example.name).read_bytes() for example in examples], "label": [e.label for e in examples]}
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "hub" / "train.parquet")
    prepared = prepare(dataset_name=tmp_path / "hub", streaming=True, num_classes=3)
    assert (source(prepared).num_classes, source(prepared).id2label) == (3, None)
    assert_same_training_data(folder, prepared)


def test_prepared_images_serve_only_their_own_use(folder, prepare, tmp_path):
    prepared = prepare(train_data_dir=folder)
    for options in ({"resolution": 16}, {"resolution": SIZE, "center_crop": False}):
        with pytest.raises(ValueError, match="centre crops of 8 pixels"):
            ImageLoader(source(prepared), batch_size=2, seed=0, **options)
    with pytest.raises(ValueError, match="prepared already"):
        prepare(train_data_dir=prepared, output_dir=tmp_path / "again")


def test_skipped_images_are_left_out_and_listed(folder, prepare, capsys):
    (folder / "cat/05.png").write_bytes(b"damaged")
    prepared = prepare(train_data_dir=folder, on_bad_image="skip")
    names = [Path(example.name).name for example in source(prepared)]
    assert len(names) == 21 and "05.png" not in names
    manifest = json.loads((prepared / "prepared.json").read_text())
    assert manifest["num_images"] == 21
    assert len(manifest["skipped"]) == 1 and "cat/05.png" in manifest["skipped"][0]
    assert "skipped 1." in capsys.readouterr().out


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 100), os.remove])
def test_an_incomplete_copy_is_refused(folder, prepare, damage):
    prepared = prepare(train_data_dir=folder)
    damage(prepared / "data-00000.arrow")
    with pytest.raises(ValueError, match=r"data-00000.arrow is missing or not \d+ bytes long"):
        source(prepared)
