"""FSDP2 with training/accelerate/fsdp2.yaml on two CPU processes."""

from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env
from fsdp import allow_fsdp_on_cpu
from torch.multiprocessing import ProcessRaisedException
from training_runs import ROOT, arguments, assert_equal, stopped, train_in_fork, weights

from pixelrepa_diffusers import PixelREPAPipeline


# A fork of a process with threads is safe here: torch has one.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

# With its usual ε Adam divides vanishing gradients by themselves, which compares the signs of rounding errors.
SETTINGS = {"adam_epsilon": 1e-3, "learning_rate": 1e-3, "train_batch_size": 2}


def _train_sharded(words: list[str], log: Path) -> None:
    allow_fsdp_on_cpu()
    train_in_fork(words, log)


@pytest.fixture(scope="module")
def train_sharded(image_folder):
    """train_sharded(output_dir, **arguments) trains with FSDP2 on two processes."""
    config = ROOT / "training/accelerate/fsdp2.yaml"
    command = launch_command_parser().parse_args(["--config_file", str(config), "script.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(command)[0])
    fsdp = {name: value for name, value in environment.items() if "FSDP" in name}

    def train(output_dir, **overrides):
        words = arguments(image_folder, output_dir, **{**SETTINGS, **overrides})
        with patch_environment(**fsdp):
            debug_launcher(_train_sharded, args=(words, output_dir.parent / "log.txt"), num_processes=2)

    return train


@pytest.fixture(scope="module")
def sharded_run(train_sharded, tmp_path_factory):
    """A run of 6 steps on two processes with samples, checkpoints at 3 and 6, and an export; read-only."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    train_sharded(folder, validation_steps=6)
    return folder


@pytest.fixture(scope="module")
def plain_run(train, tmp_path_factory):
    """The same run in one process; read-only."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(folder, **{**SETTINGS, "train_batch_size": 4})
    return folder


def test_sharded_run_resumes_bit_exactly(sharded_run, train_sharded, tmp_path):
    train_sharded(stopped(sharded_run, tmp_path / "run"), resume_from_checkpoint="latest")
    assert_equal(weights(sharded_run / "checkpoint-6"), weights(tmp_path / "run/checkpoint-6"))


def test_sharded_run_equals_one_process_and_exports_its_pipeline(sharded_run, plain_run):
    one, sharded = (weights(run / "checkpoint-6") for run in (plain_run, sharded_run))
    torch.testing.assert_close(sharded, one, atol=1e-5, rtol=1e-4)
    exported = PixelREPAPipeline.from_pretrained(sharded_run / "pipeline").transformer.state_dict()
    for name, value in exported.items():
        assert torch.equal(value, sharded["transformer_ema_0.9." + name])
    assert (sharded_run / "samples/step-0000006.png").exists()


def test_sharded_and_plain_checkpoints_are_exchanged(sharded_run, plain_run, train, train_sharded, tmp_path):
    resumed = {**SETTINGS, "resume_from_checkpoint": "latest"}
    train_sharded(stopped(plain_run, tmp_path / "plain first"), **resumed)
    train(stopped(sharded_run, tmp_path / "sharded first"), **{**resumed, "train_batch_size": 4})
    expected = weights(sharded_run / "checkpoint-6")
    for name in ("plain first", "sharded first"):
        torch.testing.assert_close(weights(tmp_path / name / "checkpoint-6"), expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_sharded_is_refused_before_training(train_sharded, tmp_path):
    with pytest.raises(ProcessRaisedException, match="none of --ema_offload, --use_8bit_adam and --lora_rank"):
        train_sharded(tmp_path / "run", use_8bit_adam=True)
