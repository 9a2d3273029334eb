"""Interrupted runs: resumed, killed, signalled and damaged runs end like an uninterrupted one, or say why not."""

import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import timedelta

import datasets
import pytest
import torch
from training_runs import (
    ROOT,
    TRAINER,
    arguments,
    assert_equal,
    in_two_processes,
    launch_two,
    load_script,
    read_metrics,
    stopped,
    train_in_fork,
    weights,
    write_manifest,
)

from pixelrepa_diffusers import PixelREPAPipeline
from pixelrepa_diffusers.training import loop
from pixelrepa_diffusers.training.arguments import parse_arguments
from pixelrepa_diffusers.training.checkpoints import Checkpointer
from pixelrepa_diffusers.training.export import Exporter


# ------------------------------------------------------------------------------------------------------------ equality


def test_resume_is_bit_exact(train, tmp_path):
    # mid-epoch, with worker processes and accumulation: 24 images are 3 steps of 8 per epoch, the stop is after 4
    settings = {
        "train_batch_size": 2, "gradient_accumulation_steps": 4, "dataloader_num_workers": 2, "checkpointing_steps": 2,
        "num_layers": 4, "dropout": 0.5,  # active in the middle half of the blocks
    }  # fmt: skip
    train(tmp_path / "straight", **settings)
    train(stopped(tmp_path / "straight", tmp_path / "resumed"), **settings, resume_from_checkpoint="latest")
    assert_equal(weights(tmp_path / "straight/checkpoint-6"), weights(tmp_path / "resumed/checkpoint-6"))
    straight, resumed = ([row["loss"] for row in read_metrics(tmp_path / run)] for run in ("straight", "resumed"))
    assert straight == resumed


def test_resume_on_a_stream_is_bit_exact(train, image_folder, tmp_path):
    paths = sorted(image_folder.glob("*/*.png"))
    names = sorted(path.name for path in image_folder.iterdir())
    columns = {"image": list(map(str, paths)), "label": [names.index(path.parent.name) for path in paths]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "hub/train.parquet")

    # 24 images are 3 steps per epoch: the stop is within the second
    settings = {"dataset_name": tmp_path / "hub", "streaming": True, "shuffle_buffer_size": 5, "train_batch_size": 8}
    settings["checkpointing_steps"] = 4
    folder = train(tmp_path / "straight", None, **settings)
    train(stopped(tmp_path / "straight", tmp_path / "resumed"), None, **settings, resume_from_checkpoint="latest")
    assert_equal(weights(tmp_path / "straight/checkpoint-6"), weights(tmp_path / "resumed/checkpoint-6"))
    assert PixelREPAPipeline.from_pretrained(folder).config.id2label == {str(i): name for i, name in enumerate(names)}


def test_two_processes_resume_bit_exactly_and_in_one_process_to_the_same_weights(train, image_folder, tmp_path):
    # With its usual ε Adam divides vanishing gradients, of which a fresh adaLN-zero has many, by themselves: it would
    # compare the signs of rounding errors. After an odd step half a batch more or less would show.
    settings = {"checkpointing_steps": 3, "adam_epsilon": 1e-3, "learning_rate": 1e-3}
    split = {**settings, "train_batch_size": 2, "gradient_accumulation_steps": 2}

    words = arguments(image_folder, tmp_path / "straight", **split)
    launch_two(ROOT / TRAINER, words, tmp_path / "straight/pipeline/training_arguments.json")
    two = stopped(tmp_path / "straight", tmp_path / "two")
    words = arguments(image_folder, two, **split, resume_from_checkpoint="latest")
    in_two_processes(train_in_fork, words, tmp_path / "log.txt")
    assert_equal(weights(tmp_path / "straight/checkpoint-6"), weights(two / "checkpoint-6"))

    one = stopped(tmp_path / "straight", tmp_path / "one")
    train(one, **settings, train_batch_size=8, resume_from_checkpoint="latest")
    torch.testing.assert_close(weights(one / "checkpoint-6"), weights(two / "checkpoint-6"), atol=1e-5, rtol=1e-4)
    assert {row["slowest_rank"] for row in read_metrics(two)} <= {0, 1}
    losses = [[row["loss"] for row in read_metrics(run)] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_checkpoint_of_an_earlier_version_resumes_bit_exactly(train, finished_run, tmp_path, monkeypatch):
    save, run = Checkpointer.save, tmp_path / "run"

    def also_as_before(checkpointer, step, loader_state):
        torch.save(checkpointer.optimizer.state_dict(), tmp_path / "optimizer.bin")
        save(checkpointer, step, loader_state)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", also_as_before)
        train(run, max_train_steps=3, lr_warmup_steps=0)
    shutil.rmtree(run / "checkpoint-3/optimizer")
    shutil.move(tmp_path / "optimizer.bin", run / "checkpoint-3")
    write_manifest(run / "checkpoint-3")
    train(run, lr_warmup_steps=0, resume_from_checkpoint="latest")
    assert_equal(weights(finished_run / "checkpoint-6"), weights(run / "checkpoint-6"))


# --------------------------------------------------------------------------------------------------- kills and signals


def test_killed_runs_resume_bit_exactly(tmp_path):
    command = [sys.executable, str(ROOT / "tests/training_runs.py"), str(tmp_path), "4", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["kills"] == 4 and report["kills_amid_writing"] >= 2 and report["equal_runs"] >= 1


def test_leftovers_of_a_kill_are_removed_by_the_next_run(train, tmp_path):
    run = tmp_path / "run"
    train(run, max_train_steps=2, validation_steps=2)
    for name in (".checkpoint-4.incomplete", ".checkpoint-2.discarded", "hub/.checkpoint-2.incomplete"):
        (run / name / "transformer").mkdir(parents=True)
    for name in (".curves.png.7.incomplete", ".metrics.jsonl.7.incomplete", "samples/.step-4.png.7.incomplete"):
        (run / name).write_bytes(b"half")
    train(run, max_train_steps=4, resume_from_checkpoint="latest", validation_steps=2)
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]


def test_run_killed_while_sampling_repeats_the_samples(train, tmp_path, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Exporter, "write_samples", die)
        train(tmp_path / "run", validation_steps=6)
    train(tmp_path / "run", validation_steps=6, resume_from_checkpoint="latest")
    assert [path.name for path in (tmp_path / "run/samples").iterdir()] == ["step-0000006.png"]
    assert (tmp_path / "run/pipeline/samples.png").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_stops_the_run_with_checkpoint_pipeline_and_curves(train, tmp_path, monkeypatch, caplog, number):
    run = tmp_path / "run"
    take_step = loop.take_step
    monkeypatch.setattr(loop, "take_step", lambda *args: (take_step(*args), signal.raise_signal(number))[0])
    with pytest.raises(SystemExit) as end:
        train(run, max_train_steps=100, checkpointing_steps=100, logging_steps=1)
    assert end.value.code == 128 + number and "--resume_from_checkpoint latest" in caplog.text
    assert json.loads((run / "checkpoint-1/progress.json").read_text())["step"] == 1
    PixelREPAPipeline.from_pretrained(run / "pipeline")
    assert (run / "curves.png").exists()


def test_processes_wait_for_the_one_that_writes_longer_than_by_default(image_folder, tmp_path):
    accelerator = load_script(TRAINER).create_accelerator(parse_arguments(arguments(image_folder, tmp_path)))
    assert accelerator.init_handler.timeout == timedelta(hours=1)


# --------------------------------------------------------------------------------------------- choice of a checkpoint


def test_earlier_checkpoint_is_not_continued_beside_later_ones(train, finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    with pytest.raises(FileExistsError, match="Move checkpoint-6 away"):
        train(run, resume_from_checkpoint="checkpoint-3")
    (tmp_path / "elsewhere").mkdir()
    (run / "checkpoint-6").rename(tmp_path / "elsewhere/checkpoint-6")
    with pytest.raises(FileExistsError, match="Move checkpoint-6 away"):
        train(tmp_path / "elsewhere", resume_from_checkpoint=run / "checkpoint-3")
    assert train(run, resume_from_checkpoint="checkpoint-3", max_train_steps=4) is not None


def test_damaged_checkpoint_is_refused_by_name_and_passed_over_by_latest(train, finished_run, tmp_path, caplog):
    run = shutil.copytree(finished_run, tmp_path / "run")
    file = run / "checkpoint-6/transformer/diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10] + bytes([content[-10] ^ 1]) + content[-9:])
    with pytest.raises(ValueError, match=r"checkpoint-6 is damaged: transformer/diffusion_pytorch_model.safetensors"):
        train(run, resume_from_checkpoint="checkpoint-6")

    limited = {"resume_from_checkpoint": "latest", "checkpoints_total_limit": 1, "lr_warmup_steps": 0}
    train(run, max_train_steps=4, **limited)
    assert "checkpoint-6 is damaged" in caplog.text
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}  # the limit skips it
    train(run, **limited)
    assert_equal(weights(finished_run / "checkpoint-6"), weights(run / "checkpoint-6"))
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train_batch_size": 2}, "global_batch_size was 4 and is 2"),
        ({"objective": "none"}, "--objective pixelrepa → none"),
        ({"adapter_layers": 2}, "--adapter_layers 1 → 2"),
        ({"ema_decays": [0.9, 0.7]}, "--ema_decays"),
        ({"max_train_steps": 5}, "beyond the 5 steps"),
    ],
    ids=str,
)
def test_resume_that_does_not_fit_is_refused_by_name(train, finished_run, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(finished_run, **{"resume_from_checkpoint": "latest", "max_train_steps": 9, **overrides})
    assert not (finished_run / "checkpoint-9").exists()
