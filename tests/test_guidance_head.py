"""Training a guidance head: the loss falls, the transformer stays, interrupted runs resume bit-exactly."""

import json
import signal
from functools import partial

import pytest
from diffusers import DiffusionPipeline
from training_runs import assert_equal, in_two_processes, load_script, read_metrics, weights

from pixelrepa_diffusers import PixelREPAPipeline
from pixelrepa_diffusers.cli import as_words, parse
from pixelrepa_diffusers.hub import weights_sha256
from pixelrepa_diffusers.training import loop
from pixelrepa_diffusers.training.guidance_head import GuidanceHeadArguments


SCRIPT = "training/train_guidance_head.py"


def train_head(source, output_dir, **overrides):
    settings = {
        "pipeline": source,
        "output_dir": output_dir,
        "num_generated_images": 30,
        "generation_batch_size": 10,
        "num_inference_steps": 2,
        "train_batch_size": 4,
        "max_train_steps": 6,
        "learning_rate": 1e-2,
        "lr_warmup_steps": 0,
        "ema_decays": 0.5,
        "checkpointing_steps": 3,
        "validation_steps": 3,
        "num_validation_images": 4,
        "logging_steps": 2,
        "dataloader_num_workers": 0,
        **overrides,
    }
    return load_script(SCRIPT).main(parse(GuidanceHeadArguments, "", as_words(settings)))


@pytest.fixture(scope="module")
def source(make_pipeline, tmp_path_factory):
    """Folder of a pipeline without a head; read-only."""
    folder = tmp_path_factory.mktemp("source") / "pipeline"
    make_pipeline(guidance_scale=1.5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """Output folder of a finished run; read-only."""
    folder = tmp_path_factory.mktemp("head") / "run"
    train_head(source, folder)
    return folder


def test_a_run_learns_and_writes_a_pipeline_with_the_same_transformer(source, finished):
    folder = finished / "pipeline"
    pipeline = PixelREPAPipeline.from_pretrained(folder)
    assert pipeline.config.self_guidance_scale == 0.5 and pipeline.guidance_head.config.depth == 2
    remote = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    assert (remote([1], num_inference_steps=2, output_type="np").images >= 0).all()
    assert weights_sha256(source / "transformer") == weights_sha256(folder / "transformer")
    losses = [row["denoising_loss"] for row in read_metrics(finished)]
    assert losses[-1] < losses[0]
    assert {path.name for path in finished.iterdir()} >= {"generated", "curves.png", "samples", "checkpoint-6"}
    assert json.loads((folder / "guidance_head/training_arguments.json").read_text())["pipeline"] == "a local folder"


def test_resume_after_a_signal_is_bit_exact(source, finished, tmp_path, monkeypatch):
    take_step = loop.take_step
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(loop, "take_step", lambda *args: (take_step(*args), signal.raise_signal(signal.SIGTERM))[0])
        train_head(source, tmp_path)
    assert stopped.value.code == 128 + signal.SIGTERM and (tmp_path / "pipeline/guidance_head").is_dir()
    images = {path: path.stat().st_mtime_ns for path in tmp_path.glob("generated/*/*.png")}
    train_head(source, tmp_path, resume_from_checkpoint="latest")
    assert len(images) == 30 and all(path.stat().st_mtime_ns == time for path, time in images.items())
    assert_equal(weights(finished / "checkpoint-6"), weights(tmp_path / "checkpoint-6"))


def test_two_processes_train_the_same_head_as_one(source, finished, tmp_path):
    in_two_processes(partial(train_head, train_batch_size=2, max_train_steps=3), source, tmp_path)
    record = json.loads((tmp_path / "pipeline/guidance_head/training_arguments.json").read_text())
    assert record["num_processes"] == 2
    for path in finished.glob("generated/*/*.png"):
        assert path.read_bytes() == (tmp_path / path.relative_to(finished)).read_bytes()
    one, two = weights(finished / "checkpoint-3"), weights(tmp_path / "checkpoint-3")
    # Adam divides tiny gradients by themselves, so rounding moves single weights.
    difference = sum((one[name] - two[name]).abs().sum() for name in one)
    assert difference < 1e-2 * sum(weight.abs().sum() for weight in one.values())


def test_wrong_settings_are_refused(source, image_folder, finished, tmp_path):
    with pytest.raises(ValueError, match="has 3 classes, the transformer 10"):
        train_head(source, tmp_path / "a", train_data_dir=image_folder)
    with pytest.raises(ValueError, match=r"after 9 blocks.*\[0, 3\]"):
        train_head(source, tmp_path / "b", depth=9)
    with pytest.raises(ValueError, match="images of other settings"):
        train_head(source, finished, guidance_scale=3, resume_from_checkpoint="latest")
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint latest"):
        train_head(source, finished)
