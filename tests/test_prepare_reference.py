from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from PIL import Image
from training_runs import TEACHER

from pixelrepa_diffusers.commands import prepare_dataset
from pixelrepa_diffusers.commands.prepare_reference import ReferenceArguments, main
from pixelrepa_diffusers.evaluation import FeatureMoments, FeatureStatistics, VisionEncoderNetwork, extract
from pixelrepa_diffusers.images import center_crop_adm
from pixelrepa_diffusers.training.data import DataArguments, decode_image


@pytest.fixture(scope="module")
def pictures():
    generator = np.random.default_rng(0)
    shapes = [(20, 31), (40, 17), (64, 70), (16, 16), (33, 32)] * 3
    return [Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]


@pytest.fixture
def args(pictures, tmp_path):
    """A folder of 15 images in two sub-folders, of several sizes and modes: gray, transparent, 16 bits, turned."""
    turned = Image.Exif()
    turned[0x0112] = 6
    for number, picture in enumerate(pictures):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number == 4:
            picture = picture.convert("L")
        elif number == 5:
            picture = picture.copy()
            picture.putalpha(picture.convert("L"))
        elif number == 6:
            picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 256)
        picture.save(path, **({"exif": turned} if number == 7 else {}))
    return ReferenceArguments(
        train_data_dir=str(tmp_path / "images"),
        output_file=tmp_path / "out" / "reference.npz",
        cache_dir=str(tmp_path / "cache"),
        resolution=16,
        network=str(TEACHER),
        image_size=28,
        batch_size=4,
        dataloader_num_workers=0,
    )


def expected_moments(args):
    """Of the images as the trainer reads them."""
    paths = sorted(Path(args.train_data_dir).rglob("*.png"))
    crops = [center_crop_adm(decode_image(str(path), path.name), 16) for path in paths]
    moments = FeatureMoments()
    moments.update(extract(VisionEncoderNetwork.from_pretrained(TEACHER, image_size=28), crops)["features"])
    return moments


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_folder_becomes_the_statistics_of_its_adm_crops(args, pictures):
    main(replace(args, keep_features=True, dataloader_num_workers=1))
    statistics, expected = FeatureStatistics.load(args.output_file), expected_moments(args)
    np.testing.assert_allclose(statistics.mu, expected.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(statistics.sigma, expected.covariance, rtol=1e-3, atol=1e-5)
    assert statistics.count == 15 and statistics.features.shape == (15, 24)
    assert "class, 28 px" in statistics.network and len(statistics.network_sha256) == 64
    assert [path.name for path in args.output_file.parent.iterdir()] == ["reference.npz"]


def test_a_data_set_gives_the_same_statistics_as_a_folder(args, pictures, tmp_path):
    folder = main(args)
    named = [args.train_data_dir + f"/class{number % 2}/{number:02d}.png" for number in range(len(pictures))]
    datasets.Dataset.from_dict({"photo": named}).cast_column("photo", datasets.Image()).to_parquet(
        tmp_path / "parquet" / "train.parquet"
    )
    data_set = main(
        replace(
            args,
            train_data_dir=None,
            dataset_name=str(tmp_path / "parquet"),
            image_column="photo",
            output_file=tmp_path / "data_set.npz",
        )
    )
    assert data_set.features is None
    np.testing.assert_allclose(data_set.mu, folder.mu, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(data_set.sigma, folder.sigma, rtol=1e-3, atol=1e-5)


def test_what_training_reads_gives_the_same_statistics(args, tmp_path):
    """Folders of prepare_dataset.py and of `save_to_disk`."""
    folder = main(args)
    prepared = tmp_path / "prepared"
    prepare_dataset.main(
        DataArguments(train_data_dir=args.train_data_dir),
        prepare_dataset.PrepareArguments(output_dir=str(prepared), resolution=16),
    )
    again = replace(args, train_data_dir=str(prepared), output_file=tmp_path / "prepared.npz")
    paths = sorted(map(str, Path(args.train_data_dir).rglob("*.png")))
    data = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "saved")
    saved = {"train_data_dir": None, "dataset_name": str(tmp_path / "saved")}
    saved = replace(args, **saved, output_file=tmp_path / "saved.npz")
    for other in (main(again), main(saved)):
        assert other.count == 15
        np.testing.assert_allclose(other.mu, folder.mu, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(other.sigma, folder.sigma, rtol=1e-3, atol=1e-5)

    with pytest.raises(ValueError, match=r"--resolution is 32, but .* was prepared at 16 pixels"):
        main(replace(again, resolution=32, output_file=tmp_path / "third.npz"))
    with pytest.raises(ValueError, match="has no split 'test'"):
        main(replace(saved, dataset_split="test", output_file=tmp_path / "third.npz"))
    with pytest.raises(ValueError, match="drop --dataset_config_name"):
        main(replace(saved, dataset_config_name="all", output_file=tmp_path / "third.npz"))
    mistaken = {"train_data_dir": saved.dataset_name, "dataset_name": None, "output_file": tmp_path / "third.npz"}
    with pytest.raises(ValueError, match="written by `save_to_disk`, give it as --dataset_name"):
        main(replace(saved, **mistaken))
    mistaken |= {"train_data_dir": None, "dataset_name": again.train_data_dir}
    with pytest.raises(ValueError, match=r"written by prepare_dataset\.py, give it as --train_data_dir"):
        main(replace(again, **mistaken))


def test_folders_are_listed_as_the_trainer_lists_them(args, pictures):
    """Whatever they are called; other readers take some names for those of splits, and other files for images."""
    folder = main(args)
    root = Path(args.train_data_dir)
    (root / "class0").rename(root / "train")
    (root / "class1").rename(root / "test")
    pictures[0].save(root / "test" / "no suffix of the trainer.gif")
    renamed = main(replace(args, output_file=args.output_file.with_name("renamed.npz")))
    assert renamed.count == 15
    np.testing.assert_allclose(renamed.mu, folder.mu, rtol=1e-5, atol=1e-6)


def _main_in_a_fork(args):
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, of one process, was forked along
    main(args)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_give_the_statistics_of_one(args, tmp_path):
    one = main(replace(args, keep_features=True))
    two = replace(args, keep_features=True, output_file=tmp_path / "two.npz")
    debug_launcher(_main_in_a_fork, args=(two,), num_processes=2)
    two = FeatureStatistics.load(tmp_path / "two.npz")
    assert two.count == 15 and two.network_sha256 == one.network_sha256
    np.testing.assert_allclose(two.mu, one.mu, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(two.sigma, one.sigma, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.sort(two.features, 0), np.sort(one.features, 0), atol=2e-3)


def test_a_part_of_the_images_is_spread_over_all(args):
    whole = main(replace(args, keep_features=True))
    part = main(replace(args, keep_features=True, num_samples=5, output_file=args.output_file.with_name("part.npz")))
    np.testing.assert_allclose(part.features, whole.features[::3], atol=2e-3)


def test_bad_arguments_are_refused_before_anything_is_written(args, tmp_path):
    for changes, error, message in (
        ({"train_data_dir": None}, ValueError, "exactly one source .* --train_data_dir .* or --dataset_name"),
        ({"image_column": "photo"}, ValueError, "--image_column belongs to --dataset_name"),
        ({"dataset_split": "test"}, ValueError, "--dataset_split belongs to --dataset_name"),
        ({"train_data_dir": str(tmp_path / "nowhere")}, FileNotFoundError, "no folder"),
        ({"batch_size": 0}, ValueError, "--batch_size must be at least 1, got 0"),
        ({"resolution": 0}, ValueError, "--resolution must be at least 1, got 0"),
        ({"output_file": tmp_path / "a.pt"}, ValueError, r"must end in \.npz"),
        ({"num_samples": 16}, ValueError, "16 images asked for, at least 2 are needed and 15 there"),
        ({"num_samples": 1}, ValueError, "1 images asked for"),
        ({"image_size": 30}, ValueError, "multiple of the model's patch of 14"),
    ):
        with pytest.raises(error, match=message):
            main(replace(args, **changes))
    assert not args.output_file.parent.exists()


def test_an_existing_file_is_not_overwritten(args):
    args.output_file.parent.mkdir()
    args.output_file.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"reference\.npz exists"):
        main(args)
    assert args.output_file.read_bytes() == b"precious"


def test_a_damaged_image_is_named_and_leaves_no_file(args):
    path = sorted(Path(args.train_data_dir).rglob("*.png"))[3]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="Image 3 of the data set cannot be read"):
        main(args)
    assert not args.output_file.parent.exists()
