"""Training data: the order and every draw depend on (seed, epoch, index) only."""

import itertools
import json
import multiprocessing
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from pictures import encoded, make_image, write_photos
from PIL import Image

from pixelrepa_diffusers.images import BadImageError, read_image
from pixelrepa_diffusers.training.data import DataArguments, ImageLoader, open_source, random_words, to_float


SIZE = 8
FORK = multiprocessing.get_context("fork")  # a fresh interpreter would spend seconds on imports


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


def folder_source(folder: Path, **options):
    return open_source(DataArguments(train_data_dir=str(folder), **options))


def batches(source, count: int, state: dict | None = None, batch_size: int = 4, **options) -> list[dict]:
    loader = ImageLoader(source, SIZE, batch_size, **{"seed": 3, **options})
    if state is not None:
        loader.load_state_dict(state)
    return list(itertools.islice(loader, count))


def joined(parts: list[dict]) -> dict:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def assert_equal(left: list[dict], right: list[dict]) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------- the order


def test_an_epoch_has_every_image_once_and_an_order_of_its_own(folder):
    seen = joined(batches(folder_source(folder), 10, random_flip=False))
    pixels = seen["pixel_values"].flatten(1)
    assert (pixels.dtype, seen["flipped"].dtype) == (torch.uint8, torch.bool)
    assert seen["class_labels"].dtype == seen["index"].dtype == torch.int64
    assert seen["skipped"].sum() == 0
    for epoch in (slice(0, 20), slice(20, 40)):
        assert len(seen["index"][epoch].unique()) == len(pixels[epoch].unique(dim=0)) == 20
    assert not torch.equal(pixels[:20], pixels[20:])


def test_number_of_workers_changes_nothing(folder):
    source = folder_source(folder)
    options = {"center_crop": False, "accumulation_steps": 2, "batch_size": 2}
    assert_equal(batches(source, 14, num_workers=2, **options), batches(source, 14, num_workers=0, **options))


def test_processes_and_accumulation_steps_divide_the_same_global_batches(folder):
    source = folder_source(folder)
    ranks = [batches(source, 14, batch_size=1, rank=rank, world_size=2, accumulation_steps=2) for rank in range(2)]
    micro = [joined(parts) for parts in zip(*ranks, strict=True)]
    steps = [joined(micro[i : i + 2]) for i in range(0, 14, 2)]
    assert_equal(steps, batches(source, 7, batch_size=4))


@pytest.mark.parametrize("stop, num_workers", [(3, 0), (5, 2)])
def test_resume_equals_straight_through(folder, stop, num_workers):
    source = folder_source(folder)
    straight = batches(source, 9)
    loader = ImageLoader(source, SIZE, 4, seed=3, num_workers=num_workers)
    before = list(itertools.islice(loader, stop))
    state = json.loads(json.dumps(loader.state_dict()))
    assert_equal(before + batches(source, 9 - stop, state, num_workers=num_workers), straight)


def test_the_position_advances_with_the_optimizer_step_and_fits_any_number_of_accumulation_steps(folder):
    source = folder_source(folder)
    loader = ImageLoader(source, SIZE, 2, seed=3, accumulation_steps=2)
    positions = [loader.state_dict()["batch"] for _ in itertools.islice(loader, 4)]
    assert positions == [0, 1, 1, 2]
    assert_equal(batches(source, 1, loader.state_dict()), batches(source, 3)[2:])


def test_resume_decodes_no_earlier_image(folder):
    source = folder_source(folder)
    loader = ImageLoader(source, SIZE, 4, seed=3)
    seen = joined(list(itertools.islice(loader, 3)))["index"]
    expected = batches(source, 5)[3:]
    for index in seen.tolist():
        os.remove(source[index].name)
    assert_equal(batches(source, 2, loader.state_dict()), expected)


@pytest.mark.parametrize("change", ["seed", "global_batch_size", "num_images"])
def test_a_position_of_another_order_is_refused(folder, change):
    loader = ImageLoader(folder_source(folder), SIZE, 4, seed=3)
    with pytest.raises(ValueError, match=f"{change} was 99 and is"):
        loader.load_state_dict({**loader.state_dict(), change: 99})


def test_loading_leaves_the_global_generators_alone(folder):
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches(folder_source(folder), 2, num_workers=1)
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert (np.random.get_state()[1] == expected[1]).all()


def test_random_words_are_those_of_saved_runs():
    # Philox4x64-10 with key (3, 5) and counters (1, 7, 2, 0), (2, 7, 2, 0). A change would break the resume of every run.
    assert random_words(3, 5, 7, purpose=2, count=8).tolist() == [
        6633872033145547437, 9945253047806271291, 16853659496618548682, 13598503813494889094,
        13633824307597156835, 18002514691671299005, 11656352653524899569, 2050011676164569700,
    ]  # fmt: skip


def test_a_signal_to_the_process_group_leaves_the_workers_running(folder):
    def train(results):
        os.setsid()
        caught = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: caught.append(number))
        for step, _ in enumerate(ImageLoader(folder_source(folder), SIZE, 4, seed=0, num_workers=2)):
            if step in (1, 3):
                os.killpg(0, signal.SIGINT if step == 1 else signal.SIGTERM)
            if step == 40:
                break
        results.put((step, caught))

    results = FORK.Queue()
    process = FORK.Process(target=train, args=(results,))
    process.start()
    assert results.get(timeout=60) == (40, [signal.SIGINT, signal.SIGTERM])
    process.join(timeout=60)
    assert process.exitcode == 0


# ------------------------------------------------------------------------------------------------- crops, flips, pixels


def test_to_float_rounds_as_the_published_arithmetic():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(values), (values.to(torch.float32) / 255) * 2.0 - 1.0)


def test_crops_are_those_of_read_image_and_flips_mirror_them(folder):
    source = folder_source(folder)
    seen = joined(batches(source, 5))
    for pixels, index, flipped in zip(seen["pixel_values"], seen["index"], seen["flipped"], strict=True):
        expected = read_image(source[int(index)].name, SIZE)
        assert torch.equal(pixels, expected.flip(-1) if flipped else expected)
    assert 5 < seen["flipped"].sum() < 15  # of 20 images


def test_random_crops_lie_anywhere_along_the_longer_side(tmp_path):
    (tmp_path / "a").mkdir()
    ramp = np.tile(np.arange(0, 80, 2, dtype=np.uint8)[None, :, None], (8, 1, 3))  # 8 high, 40 wide, brighter by 2
    Image.fromarray(ramp).save(tmp_path / "a" / "0.png")
    crops = batches(folder_source(tmp_path), 200, batch_size=1, center_crop=False, random_flip=False)
    lefts = {int(crop["pixel_values"][0, 0, 0, 0]) // 2 for crop in crops}
    assert min(lefts) == 0 and max(lefts) == 32 and len(lefts) > 25


# --------------------------------------------------------------------------------------------------------- bad images


def test_skipping_puts_the_next_image_in_its_place_and_counts(folder, caplog):
    source = folder_source(folder)
    good = joined(batches(source, 1, batch_size=22, random_flip=False))
    for index in (3, 4, 21):
        Path(source[index].name).write_bytes(b"damaged")
    seen = joined(batches(source, 1, batch_size=22, on_bad_image="skip", random_flip=False))
    replaced = {3: (5, 2), 4: (5, 1), 21: (0, 1)}
    expected = [replaced.get(index, (index, 0)) for index in good["index"].tolist()]
    assert list(zip(seen["index"].tolist(), seen["skipped"].tolist(), strict=True)) == expected
    by_index = dict(zip(good["index"].tolist(), good["pixel_values"], strict=True))
    for index, pixels in zip(seen["index"].tolist(), seen["pixel_values"], strict=True):
        assert torch.equal(pixels, by_index[index])
    assert all(f"Bad image {source[index].name}" in caplog.text for index in (3, 4, 21))


def test_only_bad_images_and_missing_files_are_errors_even_if_skipped(tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(3):
        (tmp_path / "a" / f"{number}.png").write_bytes(b"damaged")
    source = folder_source(tmp_path)
    with pytest.raises(BadImageError, match="None of the 3 images"):
        batches(source, 1, batch_size=1, on_bad_image="skip")
    os.remove(source[2].name)
    with pytest.raises(FileNotFoundError, match=r"2\.png"):
        batches(source, 1, batch_size=1, on_bad_image="skip")


# ------------------------------------------------------------------------------------------------------------ sources


def test_classes_are_the_sorted_sub_folders(folder):
    source = folder_source(folder)
    assert (source.num_classes, source.id2label, len(source)) == (2, {"0": "ant", "1": "cat"}, 22)
    examples = [(example.label, Path(example.name).name[:2]) for example in source]
    assert examples == [(number % 2, f"{number:02d}") for number in (*range(0, 22, 2), *range(1, 22, 2))]


def test_a_folder_and_data_sets_of_its_images_give_the_same_batches(folder, tmp_path):
    source = folder_source(folder)
    columns = {
        "picture": [Path(example.name).read_bytes() for example in source],
        "kind": [example.label for example in source],
    }
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["ant", "cat"])})
    dataset = datasets.Dataset.from_dict(columns).cast(features)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"part": dataset}).save_to_disk(tmp_path / "saved_dict")
    (tmp_path / "hub").mkdir()
    dataset.to_parquet(tmp_path / "hub" / "train.parquet")

    flags = {"image_column": "picture", "label_column": "kind", "cache_dir": str(tmp_path / "cache")}
    for name, split in (("saved", {}), ("saved_dict", {"dataset_split": "part"}), ("hub", {})):
        other = open_source(DataArguments(dataset_name=str(tmp_path / name), **split, **flags))
        assert (other.num_classes, other.id2label) == (source.num_classes, source.id2label)
        assert_equal(batches(other, 6), batches(source, 6))
    with pytest.raises(ValueError, match=r"no split 'train', only \['part'\]"):
        open_source(DataArguments(dataset_name=str(tmp_path / "saved_dict"), **flags))
    for name in ("saved", "hub"):
        stream = open_source(DataArguments(dataset_name=str(tmp_path / name), streaming=True, **flags))
        assert stream.id2label == source.id2label
        assert [example[:2] for example in stream] == list(zip(*columns.values(), strict=True))


def saved_data_set(path: Path, labels) -> dict:
    images = [encoded(make_image(number)) for number in range(len(labels))]
    datasets.Dataset.from_dict({"image": images, "label": labels}).save_to_disk(path)
    return {"dataset_name": str(path)}


@pytest.mark.parametrize(
    "labels, options, num_classes, id2label, numbers",
    [
        (["wolf", "ant", "wolf", "bee"], {}, 3, {"0": "ant", "1": "bee", "2": "wolf"}, [2, 0, 2, 1]),
        ([0, 4, 2], {}, 5, None, [0, 4, 2]),
        ([0, 4, 2], {"num_classes": 7}, 7, None, [0, 4, 2]),
    ],
)
def test_strings_are_numbered_in_sorted_order_and_integers_kept(
    tmp_path, labels, options, num_classes, id2label, numbers
):
    source = open_source(DataArguments(**saved_data_set(tmp_path / "data", labels), **options))
    assert (source.num_classes, source.id2label) == (num_classes, id2label)
    assert [example.label for example in source] == numbers


def test_unconditional_is_one_class(folder, tmp_path):
    make_image(40).save(folder / "loose.png")
    loose = folder_source(folder, unconditional=True)
    saved = open_source(DataArguments(**saved_data_set(tmp_path / "data", ["a", "b", "c", "d"]), unconditional=True))
    for source, size in ((loose, 23), (saved, 4)):
        assert (len(source), source.num_classes, source.id2label) == (size, 1, None)
        assert batches(source, 1)[0]["class_labels"].tolist() == [0] * 4


def test_max_train_samples_are_evenly_spaced(folder):
    few, whole = folder_source(folder, max_train_samples=4), folder_source(folder)
    assert [example.name for example in few] == [whole[index].name for index in (0, 5, 11, 16)]
    assert (few.num_classes, few.id2label) == (2, {"0": "ant", "1": "cat"})
    assert len(folder_source(folder, max_train_samples=100)) == 22


@pytest.mark.parametrize(
    "labels, options, message",
    [
        ([0, 3, 1], {"num_classes": 3}, r"Label 3 of image row 1 is outside \[0, 3\)"),
        ([0, 1, -1], {}, r"Label -1 of image row 2 is outside \[0, 2\)"),
        ([0, None, 1], {}, "1 of 3 rows have no label"),
        ([0.0, 1.0, 2.0], {}, "not integer or string labels"),
        ([0, 1], {"image_column": "img"}, "no column 'img', .*label.*--image_column"),
        ([0, 1], {"label_column": "fine"}, "no column 'fine', .*label.*--label_column"),
        ([0, 1], {"streaming": True}, "needs integer labels and --num_classes"),
    ],
)
def test_unfit_arguments_and_data_are_errors(tmp_path, labels, options, message):
    with pytest.raises(ValueError, match=message):
        open_source(DataArguments(**{**saved_data_set(tmp_path / "data", labels), **options}))
