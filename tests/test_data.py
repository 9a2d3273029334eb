"""Training data: the order and every draw are functions of (seed, epoch, index), and odd input has a defined outcome."""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import signal
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from pixelrepa_diffusers.images import center_crop_adm
from pixelrepa_diffusers.training import data as training_data
from pixelrepa_diffusers.training.data import (
    BadImageError,
    DataArguments,
    ImageLoader,
    decode_image,
    draws,
    open_source,
    to_float,
)


SIZE = 8
FORK = multiprocessing.get_context("fork")  # a fresh interpreter would spend seconds on imports


def make_image(number: int, width: int = 20, height: int = 12) -> Image.Image:
    """Smooth, distinct, and different under a flip."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 12 + number, y * 20 + 2 * number, x * y + 5 * number], axis=-1) % 256
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """22 images of two classes, some nested, PNG and JPEG."""
    for number in range(22):
        suffix = ".png" if number % 3 else ".JPG"
        below = "cat" if number % 2 else "ant/sub"
        path = tmp_path / "photos" / below / f"{number:02d}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image(number, 20 + number, 12 + number % 5).save(path)
    return tmp_path / "photos"


def write_shards(folder: Path, images: list[bytes]) -> str:
    """The images in three WebDataset-style shards, labelled 0 … 4 in turn → a pattern for their paths."""
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for key in range(shard * len(images) // 3, (shard + 1) * len(images) // 3):
                for suffix, content in (("png", images[key]), ("cls", str(key % 5).encode())):
                    info = tarfile.TarInfo(f"{key:05d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(folder / "*.tar")


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """23 images in three shards."""
    return write_shards(tmp_path / "shards", [encoded(make_image(number)) for number in range(23)])


def folder_source(folder: Path, **options):
    return open_source(DataArguments(train_data_dir=str(folder), **options))


def shards_source(shards: str, num_classes: int = 5, **options):
    columns = {"image_column": "png", "label_column": "cls", "num_classes": num_classes, "shuffle_buffer_size": 6}
    arguments = {"dataset_name": "webdataset", "data_files": [shards], "streaming": True, **columns, **options}
    return open_source(DataArguments(**arguments))


@pytest.fixture(params=["folder", "stream"])
def source(request, folder, shards):
    return folder_source(folder) if request.param == "folder" else shards_source(shards)


def batches(source, count: int, state: dict | None = None, batch_size: int = 4, **options) -> list[dict]:
    loader = ImageLoader(source, SIZE, batch_size, seed=3, **options)
    if state is not None:
        loader.load_state_dict(state)
    return list(itertools.islice(loader, count))


def joined(parts: list[dict]) -> dict:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def assert_equal(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key


# ---------------------------------------------------------------------------------------------------------- the order


def test_a_batch_holds_uint8_images_labels_and_indices(folder):
    (batch,) = batches(folder_source(folder), 1)
    assert batch["pixel_values"].shape == (4, 3, SIZE, SIZE) and batch["pixel_values"].dtype == torch.uint8
    assert batch["class_labels"].dtype == batch["index"].dtype == torch.int64
    assert batch["skipped"].sum() == 0


def test_an_epoch_sees_every_image_once_and_the_next_in_another_order(source):
    seen = [batch["index"].tolist() for batch in batches(source, 10)]
    for epoch in (seen[:5], seen[5:]):
        assert len(set(itertools.chain.from_iterable(epoch))) == 20
    pixels = joined(batches(source, 10, random_flip=False))["pixel_values"].flatten(1)
    assert not torch.equal(pixels[:20], pixels[20:])
    assert len(pixels[:20].unique(dim=0)) == 20


def test_the_number_of_workers_changes_nothing(source):
    options = {"center_crop": False, "accumulation_steps": 2, "batch_size": 2}
    assert_equal(batches(source, 14, num_workers=2, **options), batches(source, 14, num_workers=0, **options))


def test_processes_and_accumulation_steps_divide_the_same_global_batches(source):
    whole = batches(source, 7, batch_size=4)
    ranks = [batches(source, 7, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert_equal([joined(parts) for parts in zip(*ranks, strict=True)], whole)
    steps = batches(source, 14, batch_size=2, accumulation_steps=2)
    assert_equal([joined(steps[i : i + 2]) for i in range(0, 14, 2)], whole)
    both = [batches(source, 14, batch_size=1, rank=rank, world_size=2, accumulation_steps=2) for rank in range(2)]
    micro = [joined(parts) for parts in zip(*both, strict=True)]
    assert_equal([joined(micro[i : i + 2]) for i in range(0, 14, 2)], whole)


@pytest.mark.parametrize("stop", [0, 1, 3, 5, 7])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_stop_and_resume_equals_straight_through(source, stop, num_workers):
    straight = batches(source, 9)
    loader = ImageLoader(source, SIZE, 4, seed=3, num_workers=num_workers)
    before = list(itertools.islice(loader, stop))
    state = json.loads(json.dumps(loader.state_dict()))
    assert_equal(before + batches(source, 9 - stop, state, num_workers=num_workers), straight)


def test_a_position_fits_another_number_of_processes_and_accumulation_steps(source):
    loader = ImageLoader(source, SIZE, 4, seed=3)
    list(itertools.islice(loader, 2))
    resumed = batches(source, 2, loader.state_dict(), batch_size=2, accumulation_steps=2)
    assert_equal([joined(resumed)], batches(source, 3)[2:])


def test_the_position_moves_on_with_the_last_accumulation_step(source):
    loader = ImageLoader(source, SIZE, 2, seed=3, accumulation_steps=2)
    positions = [tuple(loader.position.values()) for _ in itertools.islice(loader, 4)]
    assert positions == [(0, 0), (0, 1), (0, 1), (0, 2)]


def test_what_was_seen_is_not_decoded_again_on_resume(folder):
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
    state = {**loader.state_dict(), change: 99}
    with pytest.raises(ValueError, match=f"{change} was 99 and is"):
        loader.load_state_dict(state)


def test_a_position_beyond_the_end_of_a_stream_is_an_error(shards):
    source = shards_source(shards)
    state = {**ImageLoader(source, SIZE, 4, seed=3).state_dict(), "batch": 50}
    with pytest.raises(ValueError, match="has 5 batches of 4 images, at least 50"):
        batches(source, 1, state)


def test_another_seed_gives_another_order(source):
    first = [next(iter(ImageLoader(source, SIZE, 4, seed=seed))) for seed in (0, 1)]
    assert not torch.equal(first[0]["pixel_values"], first[1]["pixel_values"])


def test_loading_leaves_the_global_generators_alone(source):
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches(source, 2, num_workers=1)
    assert torch.equal(torch.get_rng_state(), expected[0])
    assert (np.random.get_state()[1] == expected[1]).all()


def philox4x64(key: list[int], counter: list[int]) -> list[int]:
    """One block of Philox4x64-10, from its paper."""
    (k0, k1), (c0, c1, c2, c3), mask = key, counter, 2**64 - 1
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b & mask, (a >> 64) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [c0, c1, c2, c3]


def test_draws_are_philox_of_seed_epoch_and_index():
    # A change here would break the resume of every saved run.
    assert philox4x64([0, 0], [0, 0, 0, 0])[0] == 0x16554D9ECA36314C  # the published known answer
    expected = philox4x64([3, 5], [1, 7, 2, 0]) + philox4x64([3, 5], [2, 7, 2, 0])
    assert draws(3, 5, 7, purpose=2, count=8).tolist() == expected


def test_too_few_images_for_one_global_batch_are_an_error(folder, shards):
    with pytest.raises(ValueError, match=r"22 images do not fill one global batch of 24 = 6 per process × 2 .* × 2"):
        ImageLoader(folder_source(folder), SIZE, 6, seed=0, accumulation_steps=2, world_size=2)
    with pytest.raises(ValueError, match="has 0 batches of 24"):
        batches(shards_source(shards), 1, batch_size=24)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"resolution": 0},
        {"accumulation_steps": 0},
        {"rank": 2, "world_size": 2},
        {"seed": -1},
        {"on_bad_image": "ignore"},
    ],
)
def test_settings_outside_their_range_are_named(folder, wrong):
    settings = {"resolution": SIZE, "batch_size": 4, "seed": 0, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImageLoader(folder_source(folder), **settings)


def test_a_signal_to_the_process_group_leaves_the_workers_running(folder):
    def train(results):
        os.setsid()
        caught = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: caught.append(number))
        loader = ImageLoader(folder_source(folder), SIZE, 4, seed=0, num_workers=2)
        for step, _ in enumerate(loader):
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


# ------------------------------------------------------------------------------------------------------- the sources


def test_classes_are_the_sorted_sub_folders_and_nested_images_belong_to_them(folder):
    source = folder_source(folder)
    assert (source.num_classes, source.id2label, len(source)) == (2, {"0": "ant", "1": "cat"}, 22)
    assert [example.label for example in source] == [0] * 11 + [1] * 11
    assert [Path(example.name).name[:2] for example in source][:3] == ["00", "02", "04"]


def test_an_image_folder_and_the_same_as_datasets_give_the_same_batches(folder, tmp_path):
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
    others = [
        DataArguments(dataset_name=str(tmp_path / "saved"), **flags),
        DataArguments(dataset_name=str(tmp_path / "saved_dict"), dataset_split="part", **flags),
        DataArguments(dataset_name=str(tmp_path / "hub"), **flags),
    ]
    for other in map(open_source, others):
        assert (other.num_classes, other.id2label) == (source.num_classes, source.id2label)
        assert_equal(batches(other, 6), batches(source, 6))


def test_a_stream_yields_the_images_and_labels_of_its_shards(shards):
    source = shards_source(shards)
    assert (source.num_classes, source.id2label) == (5, None)
    assert [example.label for example in source] == [number % 5 for number in range(23)]
    batch = batches(source, 1, random_flip=False)[0]
    labels = {make_pixels(number).tobytes(): number % 5 for number in range(23)}
    for pixels, label in zip(batch["pixel_values"].numpy(), batch["class_labels"].tolist(), strict=True):
        assert labels[pixels.tobytes()] == label


def make_pixels(number: int) -> np.ndarray:
    return np.asarray(center_crop_adm(make_image(number), SIZE)).transpose(2, 0, 1)


def test_class_names_of_a_stream_are_kept(tmp_path):
    images = {"image": [encoded(make_image(i)) for i in range(4)], "label": [0, 1, 1, 0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["yes", "no"])})
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict(images).cast(features).to_parquet(tmp_path / "hub" / "train.parquet")
    source = open_source(DataArguments(dataset_name=str(tmp_path / "hub"), streaming=True))
    assert source.id2label == {"0": "yes", "1": "no"}
    assert [example.label for example in source] == [0, 1, 1, 0]


def saved_dataset(path: Path, labels, images=None, **columns) -> DataArguments:
    images = images or [encoded(make_image(number)) for number in range(len(labels))]
    table = {"image": images, "label": labels, **columns}
    datasets.Dataset.from_dict(table).save_to_disk(path)
    return DataArguments(dataset_name=str(path))


def test_string_labels_are_numbered_in_sorted_order(tmp_path):
    source = open_source(saved_dataset(tmp_path / "data", ["wolf", "ant", "wolf", "bee"]))
    assert source.id2label == {"0": "ant", "1": "bee", "2": "wolf"}
    assert [example.label for example in source] == [2, 0, 2, 1]


def test_integer_labels_have_no_names(tmp_path):
    args = saved_dataset(tmp_path / "data", [0, 4, 2])
    assert (open_source(args).num_classes, open_source(args).id2label) == (5, None)
    args.num_classes = 7
    assert open_source(args).num_classes == 7


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [
        ([0, 3, 1], 3, r"Label 3 of image row 1 is outside \[0, 3\)"),
        ([0, 1, -1], None, r"Label -1 of image row 2 is outside \[0, 2\)"),
        ([0, None, 1], None, "1 of 3 rows have no label in column 'label'"),
        ([0.0, 1.0, 2.0], None, "holds double, not integer or string labels"),
    ],
)
def test_a_wrong_label_is_an_error_that_names_it(tmp_path, labels, num_classes, message):
    args = saved_dataset(tmp_path / "data", labels)
    args.num_classes = num_classes
    with pytest.raises(ValueError, match=message):
        open_source(args)


def test_a_wrong_label_in_a_stream_is_an_error_even_where_bad_images_are_skipped(shards):
    with pytest.raises(ValueError, match=r"Label 4 of image \d+.png is outside \[0, 4\)"):
        batches(shards_source(shards, num_classes=4), 5, on_bad_image="skip")


def test_unconditional_is_one_class_from_any_source(folder, shards, tmp_path):
    make_image(40).save(folder / "loose.png")
    sources = [
        folder_source(folder, unconditional=True),
        shards_source(shards, unconditional=True, num_classes=None),
        open_source(
            DataArguments(**{**vars(saved_dataset(tmp_path / "data", ["a", "b", "c", "d"])), "unconditional": True})
        ),
    ]
    for source in sources:
        assert (source.num_classes, source.id2label) == (1, None)
        assert batches(source, 1)[0]["class_labels"].tolist() == [0] * 4
    assert len(sources[0]) == 23


def test_max_train_samples_are_spaced_evenly_and_of_a_stream_the_first(folder, shards):
    few, all_images = folder_source(folder, max_train_samples=4), folder_source(folder)
    assert [example.name for example in few] == [all_images[index].name for index in (0, 5, 11, 16)]
    assert (few.num_classes, few.id2label) == (2, {"0": "ant", "1": "cat"})
    assert len(folder_source(folder, max_train_samples=100)) == 22
    assert [example.label for example in shards_source(shards, max_train_samples=3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one source"),
        ({"train_data_dir": "a", "dataset_name": "b"}, "exactly one source"),
        ({"train_data_dir": "a", "streaming": True}, "belongs to --dataset_name"),
        ({"train_data_dir": "a", "data_files": ["b"]}, "belongs to --dataset_name"),
        ({"train_data_dir": "a", "max_train_samples": 0}, "--max_train_samples must be at least 1, got 0"),
        ({"train_data_dir": "a", "unconditional": True, "num_classes": 2}, "means one class, got --num_classes 2"),
    ],
)
def test_contradicting_arguments_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        open_source(DataArguments(**arguments))


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_source(DataArguments(train_data_dir=str(tmp_path / "nowhere")))


def test_wrong_columns_are_named_with_those_there_are(tmp_path):
    args = saved_dataset(tmp_path / "data", [0, 1], note=["x", "y"])
    for change, message in (
        ({"image_column": "img"}, "no column 'img', only .*note.*--image_column"),
        ({"label_column": "fine"}, "no column 'fine', only .*--label_column"),
        ({"image_column": "note"}, "'note' .* not images"),
        ({"streaming": True}, "save_to_disk.*drop --streaming"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(DataArguments(**{**vars(args), **change}))


def test_a_split_that_is_missing_is_named_with_those_there_are(tmp_path):
    dataset = datasets.Dataset.from_dict({"image": [encoded(make_image(0))], "label": [0]})
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=r"no split 'train', only \['test'\]"):
        open_source(DataArguments(dataset_name=str(tmp_path / "data")))


def test_a_stream_that_cannot_tell_its_classes_asks_for_them(shards):
    with pytest.raises(ValueError, match="pass --num_classes"):
        shards_source(shards, num_classes=None)


def test_an_empty_class_folder_is_named(folder):
    (folder / "bat").mkdir()
    (folder / "bat" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"Class folder .*bat has no images"):
        folder_source(folder)


def test_images_outside_the_class_folders_are_an_error(folder):
    make_image(0).save(folder / "loose.png")
    with pytest.raises(ValueError, match=r"loose.png and 0 other images lie outside the class folders"):
        folder_source(folder)


def test_a_folder_without_sub_folders_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no sub-folders"):
        folder_source(tmp_path)
    with pytest.raises(ValueError, match="no images"):
        folder_source(tmp_path, unconditional=True)


def test_files_that_are_no_images_are_ignored_and_counted_and_hidden_ones_ignored(folder, caplog):
    (folder / "cat" / "list.txt").write_text("x")
    (folder / "cat" / "more.txt").write_text("x")
    (folder / "cat" / "._00.png").write_text("a resource fork")
    (folder / ".cache").mkdir()
    assert len(folder_source(folder)) == 22
    assert "'.txt': 2" in caplog.text


def test_links_are_followed_and_loops_and_broken_links_are_errors(folder, tmp_path):
    (folder / "dog").symlink_to(folder / "cat")
    assert folder_source(folder).id2label == {"0": "ant", "1": "cat", "2": "dog"}
    (folder / "ant" / "sub" / "up").symlink_to(folder / "ant")
    with pytest.raises(ValueError, match="links back to a folder above it"):
        folder_source(folder)
    (folder / "ant" / "sub" / "up").unlink()
    (folder / "ant" / "gone.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"gone.png is a broken link"):
        folder_source(folder)


# -------------------------------------------------------------------------------------------------------- the images


def test_to_float_rounds_as_the_published_arithmetic():
    values = torch.arange(256, dtype=torch.uint8)
    expected = (values.to(torch.float32) / 255) * 2.0 - 1.0
    assert torch.equal(to_float(values), expected)
    assert (to_float(values)[0], to_float(values)[255]) == (-1, 1)


def test_the_centre_crop_is_that_of_adm_and_flips_mirror_it(folder):
    source = folder_source(folder)
    plain, flipped = batches(source, 5, random_flip=False), batches(source, 5)
    for a, b in zip(plain, flipped, strict=True):
        for index, pixels, maybe in zip(a["index"].tolist(), a["pixel_values"], b["pixel_values"], strict=True):
            expected = center_crop_adm(Image.open(source[index].name).convert("RGB"), SIZE)
            assert (pixels.numpy() == np.asarray(expected).transpose(2, 0, 1)).all()
            assert torch.equal(maybe, pixels) or torch.equal(maybe, pixels.flip(-1))


def test_half_of_the_images_are_flipped_and_each_epoch_anew(folder):
    source = folder_source(folder, max_train_samples=2)
    plain = batches(source, 1, batch_size=2, random_flip=False)[0]
    by_index = dict(zip(plain["index"].tolist(), plain["pixel_values"], strict=True))
    seen = joined(batches(source, 200, batch_size=2))
    same = {0: [], 1: []}
    for index, pixels in zip(seen["index"].tolist(), seen["pixel_values"], strict=True):
        same[index].append(torch.equal(by_index[index], pixels))
    for kept in same.values():
        assert 0.35 < np.mean(kept) < 0.65  # 200 draws: four standard deviations


def test_random_crops_are_squares_of_the_full_short_side_anywhere_along_the_long_one(tmp_path):
    (tmp_path / "a").mkdir()
    ramp = np.tile(np.arange(0, 80, 2, dtype=np.uint8)[None, :, None], (8, 1, 3))  # 8 high, 40 wide, brighter by 2
    Image.fromarray(ramp).save(tmp_path / "a" / "0.png")
    source = folder_source(tmp_path)
    crops = batches(source, 200, batch_size=1, center_crop=False, random_flip=False)
    lefts = set()
    for crop in crops:
        left = int(crop["pixel_values"][0, 0, 0, 0]) // 2
        assert torch.equal(crop["pixel_values"][0, 0], torch.arange(2 * left, 2 * left + 16, 2).expand(8, 8).byte())
        lefts.add(left)
    assert min(lefts) == 0 and max(lefts) == 32 and len(lefts) > 25


GRAY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOURS = np.asarray(make_image(9, 8, 8))


def palette() -> Image.Image:
    return Image.fromarray(COLOURS).quantize(16)


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(Image.fromarray(GRAY))
    return image


def over_white(rgb: np.ndarray) -> np.ndarray:
    alpha = GRAY[..., None] / 255
    return rgb * alpha + 255 * (1 - alpha)


def gray_rgb(gray: np.ndarray = GRAY) -> np.ndarray:
    return np.stack([gray] * 3, axis=-1)


ODD_IMAGES = {
    "grayscale": (encoded(Image.fromarray(GRAY)), gray_rgb()),
    "black and white": (encoded(Image.fromarray(GRAY > 99)), gray_rgb((GRAY > 99) * 255)),
    "grayscale with alpha": (encoded(with_alpha(Image.fromarray(255 - GRAY))), over_white(gray_rgb(255 - GRAY))),
    "16 bits": (encoded(Image.fromarray(GRAY.astype(np.uint16) * 257)), gray_rgb()),
    "16 bits, TIFF": (encoded(Image.fromarray(GRAY.astype(np.uint16) * 257), "TIFF"), gray_rgb()),
    "32 bits in the range of 16": (encoded(Image.fromarray(GRAY.astype(np.int32) * 257), "TIFF"), gray_rgb()),
    "palette": (encoded(palette()), np.asarray(palette().convert("RGB"))),
    "palette with a transparent entry": (
        encoded(palette(), transparency=3),
        np.where(np.asarray(palette())[..., None] == 3, 255, np.asarray(palette().convert("RGB"))),
    ),
    "transparent": (encoded(with_alpha(Image.fromarray(COLOURS))), over_white(COLOURS)),
    "a transparent colour": (
        encoded(Image.fromarray(COLOURS), transparency=tuple(COLOURS[2, 3].tolist())),
        np.where((np.abs(COLOURS - COLOURS[2, 3]) > 0).any(-1, keepdims=True), COLOURS, 255),
    ),
    "CMYK": (encoded(Image.new("CMYK", (8, 8), (255, 0, 255, 0)), "JPEG"), np.tile([0, 255, 0], (8, 8, 1))),
    "WebP": (encoded(Image.fromarray(COLOURS), "WEBP", lossless=True), COLOURS),
    "BMP": (encoded(Image.fromarray(COLOURS), "BMP"), COLOURS),
    "animation": (
        encoded(Image.fromarray(COLOURS), "PNG", save_all=True, append_images=[Image.new("RGB", (8, 8))]),
        COLOURS,
    ),
}


@pytest.mark.parametrize("kind", ODD_IMAGES)
def test_odd_images_become_rgb_as_documented(kind):
    stored, expected = ODD_IMAGES[kind]
    decoded = decode_image(stored, kind)
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded).astype(float) - expected).max() <= 1  # rounding of the compositing


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation):
    upright = Image.fromarray(np.asarray(make_image(5, 8, 6)))
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = upright if stored is None else upright.transpose(stored)
    assert (np.asarray(decode_image(encoded(turned, exif=exif), "turned")) == np.asarray(upright)).all()


def test_a_small_image_is_enlarged_as_adm_does(tmp_path):
    (tmp_path / "a").mkdir()
    make_image(0, 5, 3).save(tmp_path / "a" / "0.png")
    pixels = batches(folder_source(tmp_path), 1, batch_size=1, random_flip=False)[0]["pixel_values"][0]
    expected = make_image(0, 5, 3).resize((13, 8), Image.Resampling.BICUBIC).crop((2, 0, 10, 8))
    assert (pixels.permute(1, 2, 0).numpy() == np.asarray(expected)).all()


def damaged_exif(place: int, value: int) -> bytes:
    """A JPEG of which one byte of the EXIF block is wrong."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    damaged = bytearray(encoded(make_image(0), "JPEG", exif=exif))
    damaged[damaged.find(b"Exif") + place] = value
    return bytes(damaged)


BAD_IMAGES = {
    "EXIF that Pillow answers with TypeError": damaged_exif(31, 1),
    "EXIF that Pillow answers with struct.error": damaged_exif(29, 0),
    "no image": b"hello",
    "empty": b"",
    "truncated PNG": encoded(make_image(0))[:-40],
    "truncated JPEG": encoded(make_image(0, 64, 64), "JPEG")[:-200],
    "truncated WebP": encoded(make_image(0), "WEBP")[:-40],
    "floating point": encoded(Image.fromarray(GRAY.astype(np.float32)), "TIFF"),
    "32 bits": encoded(Image.fromarray(GRAY.astype(np.int32) * 2**20), "TIFF"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_stops_the_run_and_is_named(folder, kind):
    (folder / "cat" / "01.png").write_bytes(BAD_IMAGES[kind])
    with pytest.raises(BadImageError, match=r"Bad image .*cat/01.png: .+"):
        batches(folder_source(folder), 1, batch_size=22)


def test_a_bad_image_in_a_worker_is_named(folder):
    (folder / "cat" / "01.png").write_bytes(b"hello")
    with pytest.raises(BadImageError, match=r"cat/01.png"):
        batches(folder_source(folder), 1, batch_size=22, num_workers=1)


def test_skipping_puts_the_next_image_in_its_place_and_counts(folder, caplog):
    source = folder_source(folder)
    good = joined(batches(source, 1, batch_size=22, random_flip=False))
    bad = [3, 4, 21]
    for index in bad:
        Path(source[index].name).write_bytes(b"damaged")
    caplog.clear()
    seen = joined(batches(source, 1, batch_size=22, on_bad_image="skip", random_flip=False))
    place = {3: (5, 2), 4: (5, 1), 21: (0, 1)}
    expected = [place.get(index, (index, 0)) for index in good["index"].tolist()]
    assert list(zip(seen["index"].tolist(), seen["skipped"].tolist(), strict=True)) == expected
    by_index = dict(zip(good["index"].tolist(), good["pixel_values"], strict=True))
    for index, pixels in zip(seen["index"].tolist(), seen["pixel_values"], strict=True):
        assert torch.equal(pixels, by_index[index])
    for index in bad:
        assert f"Bad image {source[index].name}" in caplog.text


def test_skipping_in_a_stream_does_not_depend_on_processes(tmp_path):
    images = [encoded(make_image(number)) if number % 4 else b"damaged" for number in range(17)]
    source = shards_source(write_shards(tmp_path / "damaged", images))
    whole = batches(source, 4, batch_size=8, on_bad_image="skip")
    assert joined(whole[:2])["skipped"].sum() >= 4
    ranks = [
        batches(source, 4, batch_size=4, on_bad_image="skip", rank=rank, world_size=2, num_workers=rank)
        for rank in range(2)
    ]
    assert_equal([joined(parts) for parts in zip(*ranks, strict=True)], whole)
    with pytest.raises(BadImageError, match=r"Bad image 000\d\d.png"):
        batches(source, 2, batch_size=8)


def test_only_bad_images_are_an_error_even_where_they_are_skipped(tmp_path):
    (tmp_path / "a").mkdir()
    for number in range(3):
        (tmp_path / "a" / f"{number}.png").write_bytes(b"damaged")
    with pytest.raises(BadImageError, match="None of the 3 images"):
        batches(folder_source(tmp_path), 1, batch_size=1, on_bad_image="skip")


def test_a_file_that_cannot_be_read_is_not_taken_for_a_bad_image(folder):
    source = folder_source(folder)
    os.remove(source[7].name)
    with pytest.raises(FileNotFoundError, match=Path(source[7].name).name):
        batches(source, 1, batch_size=22, on_bad_image="skip")


def test_too_many_pixels_are_a_bad_image_before_and_after_resizing(monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode_image(encoded(make_image(0, 25, 40)), "full").size == (25, 40)
    for size in ((25, 41), (60, 60)):
        with pytest.raises(BadImageError, match=r"Bad image bomb: .* limit of"):
            decode_image(encoded(make_image(0, *size)), "bomb")
    (tmp_path / "a").mkdir()
    make_image(0, 40, 2).save(tmp_path / "a" / "strip.png")  # 8 pixels high it would be 160 wide: 1280 in all
    with pytest.raises(BadImageError, match=r"strip.png: resized from 40×2"):
        batches(folder_source(tmp_path), 1, batch_size=1)


@pytest.mark.filterwarnings("ignore")
def test_damage_of_any_kind_gives_an_image_or_a_bad_image_error():
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        whole = encoded(make_image(1, 24, 24), format, **({} if format in ("BMP", "GIF") else {"exif": exif}))
        for _ in range(120):
            damaged = bytearray(whole[: random.integers(1, len(whole) + 1)])
            for place in random.integers(0, len(damaged), size=random.integers(0, 6)):
                damaged[place] = random.integers(256)
            with contextlib.suppress(BadImageError):
                assert decode_image(bytes(damaged), "damaged").mode == "RGB"


def test_throughput_is_measured_over_as_many_images_as_asked(folder):
    assert training_data.measure_throughput(folder_source(folder), SIZE, num_images=50) > 0
