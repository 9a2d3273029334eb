"""Files from outside: no code in them runs, nothing outside their folder is read, and no secret or local path is published."""

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import TEACHER, write_manifest

from pixelrepa_diffusers import load_original_checkpoint
from pixelrepa_diffusers.evaluation import FeatureStatistics, InceptionNetwork
from pixelrepa_diffusers.hub import published_files
from pixelrepa_diffusers.images import BadImageError, read_image


PUBLISHED = TEACHER.parent / "checkpoint-last.pth"


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def payload(tmp_path):
    """An object whose code would run if it were unpickled; the test fails if it did."""
    marker = tmp_path / "payload-ran"
    torch.save(Payload(marker), tmp_path / "control.pt")
    torch.load(tmp_path / "control.pt", weights_only=False)
    marker.rmdir()  # raises if the payload does nothing
    yield Payload(marker)
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_published_checkpoint_with_code_is_refused(tmp_path, payload, zipped):
    checkpoint = torch.load(PUBLISHED, weights_only=False)
    vars(checkpoint["args"])["epoch"] = payload
    torch.save(checkpoint, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read" + ".*mkdir" * zipped):
        load_original_checkpoint(tmp_path / "evil.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_inception_weights_with_code_are_refused(tmp_path, payload):
    torch.save({"weights": payload}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="is not a file of Inception weights"):
        InceptionNetwork(tmp_path / "evil.pth")


def test_reference_statistics_with_code_are_refused(tmp_path, payload):
    np.savez(tmp_path / "evil.npz", mu=np.array([payload], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match=r"evil\.npz cannot be read"):
        FeatureStatistics.load(tmp_path / "evil.npz")


@pytest.mark.parametrize("file", ["optimizer.bin", "scaler.pt"])  # of earlier versions
def test_training_checkpoint_with_code_is_refused(file, train, finished_run, tmp_path, payload):
    checkpoint = tmp_path / "run" / "checkpoint-3"
    shutil.copytree(finished_run / "checkpoint-3", checkpoint)
    torch.save({"state": {}}, checkpoint / "optimizer.bin")
    torch.save({"state": payload}, checkpoint / file)
    write_manifest(checkpoint)  # which whoever writes the file can do, too
    with pytest.raises(ValueError, match="checkpoint-3"):
        train(tmp_path / "run", resume_from_checkpoint="latest", lr_warmup_steps=0)


def test_links_out_of_the_folder_are_not_published(make_pipeline, tmp_path):
    folder = tmp_path / "pipeline"
    make_pipeline().save_pretrained(folder)
    (tmp_path / "secret.json").write_text("{}")
    (folder / "transformer" / "config.json").unlink()
    (folder / "transformer" / "config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ValueError, match="out of the folder"):
        published_files(folder, "me/tiny")


def test_image_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    Image.new("1", (300, 300)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    with pytest.raises(BadImageError, match=r"bomb\.png"):
        read_image(tmp_path / "bomb.png")
