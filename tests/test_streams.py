"""Streams: a fixed number of readers divides the shards, whatever the number of processes."""

import itertools
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from pictures import encoded, make_image, write_shards

from pixelrepa_diffusers.images import BadImageError, read_image
from pixelrepa_diffusers.training.data import SHARD_STRIDE, DataArguments, ImageLoader, merge_states, open_source


SIZE = 8


def make_shards(folder: Path, sizes: tuple[int, ...] = (10,) * 8) -> Path:
    return write_shards(folder, [encoded(make_image(number)) for number in range(sum(sizes))], sizes)


@pytest.fixture
def shards(tmp_path) -> Path:
    return make_shards(tmp_path / "shards")


def open_stream(folder: Path, protocol: str = "", **options):
    columns = {"image_column": "png", "label_column": "cls", "num_classes": 5, "shuffle_buffer_size": 24}
    files = {"dataset_name": "webdataset", "data_files": [f"{protocol}{folder}/*.tar"], "streaming": True}
    return open_source(DataArguments(**{**files, **columns, **options}))


def loaders(source, world_size: int = 1, batch: int = 16, accumulation: int = 1, state: dict | None = None, **options):
    """The loaders of all processes of a run."""
    shape = {"batch_size": batch // world_size // accumulation, "accumulation_steps": accumulation}
    run = [
        ImageLoader(source, SIZE, seed=3, rank=rank, world_size=world_size, **shape, **options)
        for rank in range(world_size)
    ]
    for loader in run if state else []:
        loader.load_state_dict(json.loads(json.dumps(state)))
    return run


def read(run: list[ImageLoader], steps: int) -> list[dict]:
    """The global batches of a run, each sorted by image."""
    count = run[0].accumulation_steps
    parts = [list(itertools.islice(loader, steps * count)) for loader in run]
    batches = []
    for step in range(steps):
        micro = [part for of_rank in parts for part in of_rank[step * count : (step + 1) * count]]
        batch = {key: torch.cat([part[key] for part in micro]) for key in micro[0]}
        order = batch["index"].argsort()
        batches.append({key: value[order] for key, value in batch.items()})
    return batches


def assert_equal(left: list[dict], right: list[dict]) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def images(batches: list[dict]) -> list[int]:
    return sorted(torch.cat([batch["index"] for batch in batches]).tolist())


def merged(run: list[ImageLoader]) -> dict:
    return merge_states([loader.state_dict() for loader in run])


class CountedFileSystem(LocalFileSystem):
    """Local files that count the bytes read from each."""

    protocol, bytes_read = "counted", Counter()

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("counted://").lstrip("/")

    def unstrip_protocol(self, name):
        return "counted://" + self._strip_protocol(name)

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        read = file.f.read

        def counted_read(size=-1):
            content = read(size)
            self.bytes_read[Path(path).name] += len(content)
            return content

        file.read = counted_read
        return file


fsspec.register_implementation("counted", CountedFileSystem)


# ---------------------------------------------------------------------------------------------------------- the order


def test_every_pass_reads_every_image_once_in_an_order_of_its_own(shards):
    source = open_stream(shards)
    batches = read(loaders(source, batch=80, random_flip=False), 2)
    for batch in batches:
        assert images([batch]) == [shard * SHARD_STRIDE + place for shard in range(8) for place in range(10)]
    for index, label, pixels in zip(
        *(batches[0][key] for key in ("index", "class_labels", "pixel_values")), strict=True
    ):
        number = int(index // SHARD_STRIDE * 10 + index % SHARD_STRIDE)
        assert label == number % 5
        assert torch.equal(pixels, read_image(encoded(make_image(number)), SIZE))
    orders = [batch["index"].reshape(10, 8) for batch in itertools.islice(loaders(source, batch=80)[0], 2)]
    assert not torch.equal(*orders)
    assert (orders[0].diff(dim=0) != 1).any(dim=0).all()  # within each shard


def test_any_number_of_processes_that_divides_the_readers_gives_the_same_run(shards):
    source = open_stream(shards)
    whole = read(loaders(source), 8)
    for options in ({"world_size": 4, "num_workers": 2}, {"world_size": 2, "accumulation": 4}):
        assert_equal(read(loaders(source, **options), 8), whole)


def test_all_processes_together_read_the_data_once(tmp_path):
    folder = make_shards(tmp_path / "shards", (40,) * 8)
    CountedFileSystem.bytes_read.clear()
    source = open_stream(folder, "counted://", shuffle_buffer_size=8)
    seen = images(read(loaders(source, world_size=2, batch=8), 80))
    assert sorted(Counter(seen).values()) == [2] * 320
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert 0.9 < CountedFileSystem.bytes_read.total() / (2 * size) < 1.05


def test_uneven_shards_favour_no_image(tmp_path):
    source = open_stream(make_shards(tmp_path / "shards", (2, 6, 10, 14, 40)), stream_readers=2)
    counts = Counter(images(read(loaders(source, batch=72), 20)))
    assert len(counts) == 72 and min(counts.values()) >= 17 and max(counts.values()) <= 23


# ------------------------------------------------------------------------------------------------------------- resume


def test_resume_on_any_number_of_processes_equals_straight_through(shards):
    source = open_stream(shards)
    straight = read(loaders(source), 12)
    for before, after, stop in ((1, 2, 3), (4, 1, 7)):
        run = loaders(source, before, accumulation=2)
        assert_equal(read(run, stop), straight[:stop])
        rest = loaders(source, after, state=merged(run), num_workers=1)
        assert_equal(read(rest, 12 - stop), straight[stop:])


def test_resume_reads_the_open_shard_again_and_no_other(tmp_path):
    folder = make_shards(tmp_path / "shards", (30,) * 8)
    source = open_stream(folder, "counted://", stream_readers=1, shuffle_buffer_size=4)
    run = loaders(source, batch=10)
    read(run, 10)  # 3 shards and a third of the next
    CountedFileSystem.bytes_read.clear()
    read(loaders(source, batch=10, state=merged(run)), 10)  # to the end of shard 6, and what is read ahead
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    reads = CountedFileSystem.bytes_read
    assert len(reads) == 5 and all(reads[name] <= sizes[name] for name in reads)


def test_positions_of_another_order_are_refused(shards):
    source = open_stream(shards)
    state = merged(loaders(source))
    for name, before, now in (("stream_readers", 8, 4), ("shuffle_buffer_size", 24, 7)):
        with pytest.raises(ValueError, match=f"{name} was {before} and is {now}"):
            loaders(open_stream(shards, **{name: now}), state=state)
    earlier_version = {"epoch": 0, "batch": 3, "seed": 3, "global_batch_size": 16, "num_images": None}
    with pytest.raises(ValueError, match=r"num_shards was unknown and is 8, .*start a new run"):
        loaders(source, state=earlier_version)


# -------------------------------------------------------------------------------------------------------------- options


def test_unconditional_and_max_train_samples(shards):
    one_class = open_stream(shards, unconditional=True, num_classes=None)
    assert (one_class.num_classes, one_class.id2label) == (1, None)
    assert [example.label for example in one_class] == [0] * 80
    few = open_stream(shards, max_train_samples=12)
    assert [example.label for example in few] == [0, 1] * 4 + [0] * 4  # the first of each of the 8 shards


def test_number_of_readers(shards, tmp_path):
    assert open_stream(make_shards(tmp_path / "five", (1,) * 5)).num_readers == 4
    assert open_stream(shards, stream_readers=6).num_readers == 6
    for readers, world_size in ((None, 3), (6, 4), (16, 2)):
        with pytest.raises(
            ValueError, match=rf"cannot divide 8 shards among {world_size} processes: .*--stream_readers"
        ):
            loaders(open_stream(shards, stream_readers=readers), world_size)
    saved = datasets.Dataset.from_dict({"image": ["a"] * 9, "label": [0] * 9})
    saved.save_to_disk(tmp_path / "saved")
    columns = {"image_column": "image", "label_column": "label"}
    assert open_stream(shards, dataset_name=str(tmp_path / "saved"), **columns).num_readers == 8


# ------------------------------------------------------------------------------------------------- what can be missing


def test_labels_are_checked_as_they_are_read(shards):
    with pytest.raises(ValueError, match=r"Label 4 of image .*\d+.png.* is outside \[0, 4\)"):
        read(loaders(open_stream(shards, num_classes=4), on_bad_image="skip"), 5)


def test_bad_images_are_left_out_whatever_the_number_of_processes(tmp_path, caplog):
    images = [encoded(make_image(number)) if number % 4 else b"damaged" for number in range(32)]
    source = open_stream(write_shards(tmp_path / "shards", images, (8,) * 4))
    with pytest.raises(BadImageError, match=r"Bad image .*shards/\d\.tar \(000\d\d\.png\)"):
        read(loaders(source), 2)
    whole = read(loaders(source, on_bad_image="skip", batch=24), 3)
    assert [int(batch["skipped"].sum()) for batch in whole] == [8, 8, 8]
    assert not any(index % SHARD_STRIDE % 4 == 0 for batch in whole for index in batch["index"])
    assert_equal(read(loaders(source, world_size=4, on_bad_image="skip", batch=24, num_workers=1), 3), whole)


def test_a_damaged_shard_is_a_bad_image_in_the_place_of_its_rest(shards, caplog):
    damaged = shards / "3.tar"
    with tarfile.open(damaged) as tar:
        os.truncate(damaged, tar.getmember("00035.png").offset_data + 100)
    source = open_stream(shards)
    with pytest.raises(BadImageError, match=rf"Shard {damaged} is damaged: .+"):
        read(loaders(source), 5)
    whole = read(loaders(source, on_bad_image="skip"), 20)
    assert {index // SHARD_STRIDE for index in images(whole)} == set(range(8))
    assert sum(batch["skipped"].sum() for batch in whole) > 0 and str(damaged) in caplog.text
    assert_equal(read(loaders(source, 2, on_bad_image="skip"), 20), whole)


def test_a_missing_shard_stops_the_run_and_is_named(shards):
    source = open_stream(shards)
    os.remove(shards / "5.tar")
    with pytest.raises(FileNotFoundError, match=r"5\.tar"):
        read(loaders(source, on_bad_image="skip"), 5)


def test_streams_without_a_usable_image_end(tmp_path):
    write_shards(tmp_path / "bad", [b"damaged"] * 6, (3, 3))
    with pytest.raises(BadImageError, match=r"None of .* images in succession"):
        read(loaders(open_stream(tmp_path / "bad"), on_bad_image="skip"), 1)
    with pytest.raises(ValueError, match=r"None of .* shards holds an image"):
        read(loaders(open_stream(make_shards(tmp_path / "good"), max_train_samples=0)), 1)
