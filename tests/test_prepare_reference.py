"""pixelrepa-prepare-reference: statistics of the images that training reads."""

from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TEACHER_IMAGE_SIZE, encoder
from training_runs import TEACHER, in_two_processes

from pixelrepa_diffusers.commands import prepare_dataset
from pixelrepa_diffusers.commands.prepare_reference import ReferenceArguments, main
from pixelrepa_diffusers.evaluation import FeatureMoments, FeatureStatistics, extract
from pixelrepa_diffusers.images import list_images, read_image


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """15 images of several sizes and modes in two folders that `datasets` would take for splits."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (15, 64, 70, 3), dtype=np.uint8)
    for number, (height, width) in enumerate([(20, 31), (40, 17), (64, 70), (16, 16), (33, 32)] * 3):
        path = folder / ("train", "test")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(pixels[number, :height, :width])
        image.convert({4: "L", 5: "RGBA", 6: "P"}.get(number, "RGB")).save(path)
    return folder


@pytest.fixture(scope="module")
def crops(image_folder):
    """The images as training reads them."""
    return torch.stack([read_image(path, 16) for path in list_images(image_folder)])


@pytest.fixture
def args(image_folder, tmp_path):
    return ReferenceArguments(
        train_data_dir=str(image_folder),
        output_file=tmp_path / "out" / "reference.npz",
        cache_dir=str(tmp_path / "cache"),
        resolution=16,
        network=str(TEACHER),
        image_size=TEACHER_IMAGE_SIZE,
        batch_size=4,
        dataloader_num_workers=0,
    )


def assert_statistics_of(statistics, crops):
    moments = FeatureMoments()
    moments.update(extract(encoder(), crops)["features"])
    assert statistics.count == len(crops)
    np.testing.assert_allclose(statistics.mu, moments.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(statistics.sigma, moments.covariance, rtol=1e-3, atol=1e-5)


def test_statistics_of_a_folder_are_those_of_its_adm_crops(args, crops, monkeypatch):
    iterate, loaders = torch.utils.data.DataLoader.__iter__, []
    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", lambda self: loaders.append(self) or iterate(self))
    main(replace(args, keep_features=True, dataloader_num_workers=1))
    assert len(loaders) == 1  # workers are started once
    statistics = FeatureStatistics.load(args.output_file)
    assert_statistics_of(statistics, crops)
    assert statistics.features.shape == (15, 24)
    assert "class, 28 px" in statistics.network and len(statistics.network_sha256) == 64
    assert [path.name for path in args.output_file.parent.iterdir()] == ["reference.npz"]


@pytest.mark.parametrize("kind", ["parquet", "save_to_disk", "prepared"])
def test_all_training_data_give_the_same_statistics(args, crops, tmp_path, kind, monkeypatch):
    folder = str(tmp_path / kind)
    if kind == "prepared":
        flags = f"--train_data_dir {args.train_data_dir} --unconditional --output_dir {folder} --resolution 16"
        monkeypatch.setattr("sys.argv", ["pixelrepa-prepare-dataset", *flags.split()])
        prepare_dataset.cli()
        args = replace(args, train_data_dir=folder)
        with pytest.raises(ValueError, match=r"--resolution is 32, but .* at 16 pixels"):
            main(replace(args, resolution=32))
    else:
        paths = sorted(map(str, Path(args.train_data_dir).rglob("*.png")))
        data = datasets.Dataset.from_dict({"photo": paths}).cast_column("photo", datasets.Image())
        if kind == "parquet":
            data.to_parquet(f"{folder}/train.parquet")
        else:
            datasets.DatasetDict({"train": data}).save_to_disk(folder)
        args = replace(args, train_data_dir=None, dataset_name=folder, image_column="photo")
    assert_statistics_of(main(args), crops)


def test_two_processes_give_the_statistics_of_one(args, crops):
    in_two_processes(main, replace(args, keep_features=True))
    statistics = FeatureStatistics.load(args.output_file)
    assert_statistics_of(statistics, crops)
    features = extract(encoder(), crops)["features"].numpy()
    np.testing.assert_allclose(np.sort(statistics.features, 0), np.sort(features, 0), atol=2e-3)


def test_some_images_are_evenly_spaced(args, crops):
    assert_statistics_of(main(replace(args, num_samples=5)), crops[::3])


def test_an_existing_file_is_not_overwritten(args):
    args.output_file.parent.mkdir()
    args.output_file.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"reference\.npz"):
        main(args)
    assert args.output_file.read_bytes() == b"precious"
