"""The cache of teacher features never changes a result."""

import errno
import os

import pytest
import torch
from training_runs import TEACHER

from pixelrepa_diffusers.teacher import SemanticTeacher
from pixelrepa_diffusers.training.data import DataArguments, ImageLoader, open_source, to_float
from pixelrepa_diffusers.training.teacher_cache import CachedTeacher


SIZE, NUM_IMAGES = 16, 6


@pytest.fixture(scope="module")
def teacher() -> SemanticTeacher:
    return SemanticTeacher.from_pretrained(TEACHER, grid_size=4, image_size=SIZE)


@pytest.fixture
def counted(teacher):
    """Number of images that went through the teacher."""
    counts = []
    handle = teacher.model.register_forward_hook(lambda model, args, output: counts.append(1))
    yield counts
    handle.remove()


def make_batch(index: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    images = torch.randint(0, 256, (NUM_IMAGES, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))
    flipped = torch.tensor(index) % 2 == 1
    pixels = images[index].to(torch.uint8)
    pixels[flipped] = pixels[flipped].flip(-1)
    return {"pixel_values": pixels, "index": torch.tensor(index), "flipped": flipped}


def features_of(teacher, batch: dict) -> torch.Tensor:
    pixel_values = to_float(batch["pixel_values"])
    if not isinstance(teacher, CachedTeacher):
        return teacher(pixel_values)
    features = teacher(pixel_values, teacher.file.read_into(batch))
    teacher.wait()
    return features


def test_cached_features_are_the_teachers_and_need_no_teacher(teacher, counted, tmp_path):
    first, second = make_batch([0, 1, 2]), make_batch([2, 5, 1])
    expected = [features_of(teacher, batch) for batch in (first, second)]
    for _ in range(2):  # filling, then reading with a new object
        cached = CachedTeacher(teacher, tmp_path, NUM_IMAGES)
        for batch, features in zip((first, second), expected, strict=True):
            torch.testing.assert_close(features_of(cached, batch), features)
    assert len(counted) == 4


def test_stale_damaged_and_truncated_records_are_computed_again(teacher, counted, tmp_path):
    batch = make_batch([0, 1, 2])
    cached = CachedTeacher(teacher, tmp_path, NUM_IMAGES)
    expected = features_of(cached, batch)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    for damaged in (content, file.read_bytes()[:-1]):
        file.write_bytes(damaged)
        counted.clear()
        for _ in range(2):  # the second call finds the record repaired
            torch.testing.assert_close(features_of(cached, batch), expected)
            assert len(counted) == 1
    changed = make_batch([0, 1, 2], seed=1)
    torch.testing.assert_close(features_of(cached, changed), features_of(teacher, changed))


def test_other_settings_use_another_file(teacher, tmp_path):
    other = SemanticTeacher.from_pretrained(TEACHER, grid_size=4, image_size=SIZE, mode="resize")
    settings = ((teacher, NUM_IMAGES), (teacher, NUM_IMAGES + 1), (other, NUM_IMAGES))
    paths = {CachedTeacher(teacher, tmp_path, num_images).file.path for teacher, num_images in settings}
    assert len(paths) == 3


def test_a_full_disk_ends_the_caching_not_the_run(teacher, tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    batch = make_batch([0, 1, 2])
    cached = CachedTeacher(teacher, tmp_path, NUM_IMAGES)
    monkeypatch.setattr(os, "pwrite", refuse)
    torch.testing.assert_close(features_of(cached, batch), features_of(teacher, batch))
    assert "no longer cached" in caplog.text


def test_workers_read_the_features(teacher, counted, image_folder, tmp_path):
    cached, batches = CachedTeacher(teacher, tmp_path, 24), []
    for num_workers in (0, 1):
        loader = ImageLoader(open_source(DataArguments(image_folder)), SIZE, 24, seed=0, num_workers=num_workers)
        loader.batch_transform = cached.file.read_into
        batches.append(next(iter(loader)))
        features = cached(to_float(batches[-1]["pixel_values"]), batches[-1])
        cached.wait()
    assert "records" in batches[1] and len(counted) == 1
    torch.testing.assert_close(features, teacher(to_float(batches[0]["pixel_values"])))
