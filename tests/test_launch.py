"""Two machines on localhost: c10d rendezvous, a killed machine, and streams divided between them."""

import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from pictures import encoded, make_image, write_shards
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from training_runs import ROOT, arguments, ended, fork, train_in_fork, weights


STEPS = 20
LAUNCH_FILES = sorted((ROOT / "training/accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", [*LAUNCH_FILES, ROOT / "training/slurm.sh"], ids=lambda file: file.name)
def test_launch_files_have_only_keys_and_flags_of_accelerate(file):
    if file in LAUNCH_FILES:
        load_config_from_file(str(file))
    parser = launch_command_parser()
    for command in re.findall(r"accelerate launch (.*?)training/train_pixelrepa", file.read_text(), flags=re.S):
        assert set(re.findall(r"--\w+", command)) <= parser._option_string_actions.keys()


def start_node(port: int, words: list[str], log: Path) -> int:
    """Start the agent of one of two machines with one process each, as `torchrun` and `accelerate launch` do."""
    config = LaunchConfig(
        min_nodes=2,
        max_nodes=2,
        nproc_per_node=1,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port}",
        max_restarts=3,
        start_method="fork",  # an interpreter would spend seconds on imports
    )
    return fork(lambda: elastic_launch(config, train_in_fork)(words, log), log)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_run_of_two_machines_survives_the_loss_of_one_and_equals_one_process(train, tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "shards", [encoded(make_image(n)) for n in range(48)], (6,) * 8, num_classes=3)
    settings = {
        "dataset_name": "webdataset", "data_files": folder / "*.tar", "streaming": True, "num_classes": 3,
        "image_column": "png", "label_column": "cls", "shuffle_buffer_size": 16, "max_train_steps": STEPS,
        "checkpointing_steps": 10, "adam_epsilon": 1e-3, "learning_rate": 1e-3, "resume_from_checkpoint": "latest",
    }  # fmt: skip
    run, log = tmp_path / "nodes", tmp_path / "log.txt"
    words = arguments(None, run, **settings)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def listens() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("localhost", port)) == 0

    # torch 2.13 does not tell a machine that joins later where the first one's store is.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    nodes = [start_node(port, words, log)]
    try:
        wait_for(listens)  # the first machine serves the rendezvous
        nodes.append(start_node(port, words, log))
        wait_for((run / "checkpoint-10").exists)
        before = (run / "checkpoint-10").stat().st_ino
        os.killpg(nodes[1], signal.SIGKILL)
        assert ended(nodes[1], 30) == -signal.SIGKILL
        nodes[1] = start_node(port, words, log)
        assert [ended(node, 120) for node in nodes] == [0, 0], log.read_text()[-4000:]
    finally:
        for node in nodes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node, signal.SIGKILL)
    assert (run / "checkpoint-10").stat().st_ino == before, "the run did not resume"

    train(tmp_path / "one", None, **settings, gradient_accumulation_steps=2)
    for step in (10, STEPS):
        one, two = (weights(tmp_path / name / f"checkpoint-{step}") for name in ("one", "nodes"))
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert json.loads((run / "pipeline/training_arguments.json").read_text())["num_processes"] == 2
