"""Stopping and going on: resumed, killed, signalled and damaged runs end like one straight through, or say why not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch
from training_runs import ROOT, arguments, assert_equal, launch_two, weights

from pixelrepa_diffusers import PixelREPAPipeline
from pixelrepa_diffusers.training.checkpoints import find_checkpoint


def test_a_resumed_run_equals_one_straight_through(train, tmp_path):
    # mid-epoch, with worker processes and accumulation: 24 images are 3 steps of 8 an epoch, the stop is after 2
    settings = {
        "train_batch_size": 2, "gradient_accumulation_steps": 4, "dataloader_num_workers": 2, "checkpointing_steps": 2,
        "num_layers": 4, "dropout": 0.5,  # which acts in the middle half of the blocks
    }  # fmt: skip
    train(tmp_path / "straight", **settings)
    train(tmp_path / "stopped", **{**settings, "max_train_steps": 2, "lr_scheduler": "constant_with_warmup"})
    train(tmp_path / "stopped", **settings, resume_from_checkpoint="latest")
    assert_equal(weights(tmp_path / "straight/checkpoint-6"), weights(tmp_path / "stopped/checkpoint-6"))
    rows = [json.loads(line)["loss"] for line in (tmp_path / "straight/metrics.jsonl").read_text().splitlines()]
    resumed = [json.loads(line)["loss"] for line in (tmp_path / "stopped/metrics.jsonl").read_text().splitlines()]
    assert rows == resumed


def test_a_run_goes_on_with_another_number_of_micro_steps(train, tmp_path):
    # the stop is at an odd step, where half a batch more or less would show
    settings = {"adam_epsilon": 1e-3, "learning_rate": 1e-3}
    train(tmp_path / "straight", **settings)
    train(tmp_path / "stopped", **settings, max_train_steps=3)
    split = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    train(tmp_path / "stopped", **settings, **split, resume_from_checkpoint="latest")
    expected, resumed = (weights(tmp_path / run / "checkpoint-6") for run in ("straight", "stopped"))
    for name in expected:
        torch.testing.assert_close(resumed[name], expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_run_on_a_stream_resumes_exactly(train, image_folder, tmp_path):
    paths = sorted(image_folder.glob("*/*.png"))
    names = sorted(path.name for path in image_folder.iterdir())
    columns = {"image": list(map(str, paths)), "label": [names.index(path.parent.name) for path in paths]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "hub/train.parquet")

    # 24 images are 6 steps an epoch: one stop within the first, one within the second
    settings = {"dataset_name": tmp_path / "hub", "streaming": True, "shuffle_buffer_size": 5, "max_train_steps": 10}
    folder = train(tmp_path / "straight", None, **settings, checkpointing_steps=10)
    for stop in (4, 8, 10):
        now = {**settings, "max_train_steps": stop, "lr_scheduler": "constant_with_warmup"}
        train(tmp_path / "stopped", None, **now, checkpointing_steps=10, resume_from_checkpoint="latest")
    assert_equal(weights(tmp_path / "straight/checkpoint-10"), weights(tmp_path / "stopped/checkpoint-10"))
    assert PixelREPAPipeline.from_pretrained(folder).config.id2label == {str(i): name for i, name in enumerate(names)}


def train_on_two(image_folder: Path, output_dir: Path, **overrides) -> None:
    record = output_dir / "pipeline/training_arguments.json"
    launch_two(ROOT / "training/train_pixelrepa.py", arguments(image_folder, output_dir, **overrides), record)


def test_two_processes_resume_exactly_and_follow_one_process_with_the_whole_batch(train, image_folder, tmp_path):
    # With its usual ε Adam divides vanishing gradients, of which a fresh adaLN-zero has many, by themselves: it would
    # compare the signs of rounding errors.
    settings = {
        "gradient_accumulation_steps": 2,
        "checkpointing_steps": 2,
        "adam_epsilon": 1e-3,
        "learning_rate": 1e-3,
        "train_batch_size": 2,
    }
    train_on_two(image_folder, tmp_path / "straight", **settings)
    train_on_two(image_folder, tmp_path / "stopped", **{**settings, "max_train_steps": 2})
    train_on_two(image_folder, tmp_path / "stopped", **settings, resume_from_checkpoint="latest")
    assert_equal(weights(tmp_path / "straight/checkpoint-6"), weights(tmp_path / "stopped/checkpoint-6"))

    train(tmp_path / "one", train_batch_size=8, checkpointing_steps=2, adam_epsilon=1e-3, learning_rate=1e-3)
    one, two = weights(tmp_path / "one/checkpoint-6"), weights(tmp_path / "straight/checkpoint-6")
    for name in one:
        if name.startswith("transformer"):
            torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "straight")
    ]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=0, rtol=1e-5)


def test_a_run_killed_at_twenty_random_moments_ends_like_an_undisturbed_one(tmp_path):
    command = [sys.executable, str(ROOT / "tests/training_runs.py"), str(tmp_path), "20", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["kills"] == 20
    expected = weights(Path(report["undisturbed"]) / "checkpoint-12")
    for run in report["finished_runs"]:
        assert_equal(expected, weights(Path(run) / "checkpoint-12"))
        assert not [path for path in Path(run).rglob(".*") if path.name != ".lock"]


def test_what_a_kill_left_half_written_does_not_stop_the_next_run(train, tmp_path):
    run = tmp_path / "run"
    train(run, max_train_steps=2, validation_steps=2)
    for name in (".checkpoint-4.incomplete", ".checkpoint-2.discarded", "hub/.checkpoint-2.incomplete"):
        (run / name / "transformer").mkdir(parents=True)
    for name in (".curves.png.7.incomplete", ".metrics.jsonl.7.incomplete", "samples/.step-4.png.7.incomplete"):
        (run / name).write_bytes(b"cut")
    train(run, max_train_steps=4, resume_from_checkpoint="latest", validation_steps=2)
    assert not [path for path in run.rglob(".*") if path.name != ".lock"]


def test_a_run_killed_while_it_samples_samples_that_step_after_the_restart(train, tmp_path, monkeypatch):
    from pixelrepa_diffusers.training.reporting import Exporter

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Exporter, "write_samples", die)
        train(tmp_path / "run", validation_steps=6)
    train(tmp_path / "run", validation_steps=6, resume_from_checkpoint="latest")
    assert [path.name for path in (tmp_path / "run/samples").iterdir()] == ["step-0000006.png"]
    assert (tmp_path / "run/pipeline/samples.png").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_before_it_stops(image_folder, tmp_path, number):
    words = arguments(
        image_folder, tmp_path / "run", max_train_steps=100_000, checkpointing_steps=100_000, logging_steps=1
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "training/train_pixelrepa.py"), *words]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_text()):
        time.sleep(0.05)
    process.send_signal(number)
    assert "go on with --resume_from_checkpoint latest" in process.communicate(timeout=120)[1]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert json.loads((checkpoint / "progress.json").read_text())["step"] == int(checkpoint.name.split("-")[1]) > 0


def test_the_oldest_checkpoints_go_beyond_the_limit(train, tmp_path):
    train(tmp_path / "run", checkpointing_steps=1, checkpoints_total_limit=2, max_train_steps=4)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_a_folder_with_checkpoints_is_not_started_over(train, tmp_path):
    train(tmp_path / "run", max_train_steps=1)
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint latest"):
        train(tmp_path / "run")


def test_an_earlier_checkpoint_is_not_continued_beside_later_ones(train, tmp_path):
    train(tmp_path / "run", checkpointing_steps=1, max_train_steps=3)
    earlier = str(tmp_path / "run/checkpoint-1")
    with pytest.raises(FileExistsError, match="Move checkpoint-2, checkpoint-3 away"):
        train(tmp_path / "run", resume_from_checkpoint=earlier)
    (tmp_path / "elsewhere").mkdir()
    for number in (2, 3):
        (tmp_path / f"run/checkpoint-{number}").rename(tmp_path / f"elsewhere/checkpoint-{number}")
    with pytest.raises(FileExistsError, match="Move checkpoint-2, checkpoint-3 away"):
        train(tmp_path / "elsewhere", resume_from_checkpoint=earlier)
    assert train(tmp_path / "run", resume_from_checkpoint=earlier, max_train_steps=2) is not None


def test_later_checkpoints_that_are_damaged_do_not_stand_in_the_way(train, tmp_path, caplog):
    train(tmp_path / "run", checkpointing_steps=1, max_train_steps=2)
    (tmp_path / "run/checkpoint-2/progress.json").write_text("{}")
    earlier = str(tmp_path / "run/checkpoint-1")
    assert train(tmp_path / "run", resume_from_checkpoint=earlier, max_train_steps=2) is not None
    assert "checkpoint-2 is damaged: progress.json is not as it was written" in caplog.text
    find_checkpoint(tmp_path / "run", str(tmp_path / "run/checkpoint-2"), pytest.fail)  # written anew


def test_latest_starts_fresh_where_there_is_nothing(train, tmp_path):
    assert train(tmp_path / "run", resume_from_checkpoint="latest", max_train_steps=1) is not None


def test_a_missing_checkpoint_is_an_error(train, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        train(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run/checkpoint-7"))


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_latest_passes_over_a_damaged_checkpoint_and_a_path_to_it_is_an_error(train, tmp_path, damage, caplog):
    train(tmp_path / "run", checkpointing_steps=1, max_train_steps=2)
    file = tmp_path / "run/checkpoint-2/transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[:-10])
    elif damage == "altered":
        content[-10] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 is damaged: transformer/diffusion_pytorch_model.safetensors"):
        train(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    train(tmp_path / "run", resume_from_checkpoint="latest", max_train_steps=3)
    assert "checkpoint-2 is damaged" in caplog.text
    assert (tmp_path / "run/checkpoint-3").exists()


def test_a_second_run_into_the_same_folder_is_refused(train, tmp_path):
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run/.lock"), pytest.raises(RuntimeError, match="Another run is writing"):
        train(tmp_path / "run")


def test_another_global_batch_cannot_continue_the_data(train, tmp_path):
    train(tmp_path / "run", max_train_steps=1)
    with pytest.raises(ValueError, match="global_batch_size was 4 and is 2"):
        train(tmp_path / "run", resume_from_checkpoint="latest", train_batch_size=2)
