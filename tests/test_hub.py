"""Published pipelines stand alone, and publishing never leaves half a repository.

The real huggingface_hub client talks to a stand-in Hub on 127.0.0.1. Published pipelines are also loaded in a process with a
fresh cache, which cannot import this package.
"""

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from standin_hub import StandInHub, log_in
from tiny import files

from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline
from pixelrepa_diffusers.commands.publish import main as publish
from pixelrepa_diffusers.hub import (
    CARD_MARKER,
    BackgroundPusher,
    PublishError,
    card_for_folder,
    publish_folder,
    published_files,
    weights_sha256,
)


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
METRICS = {"metrics": {"fid": 7.25}, "num_samples": 10, "reference": "r.npz", "device": "cpu"}


def save_pipeline(folder: Path, seed: int = 0, num_layers: int = 2, **options) -> Path:
    """Save a tiny pipeline with random weights (a freshly initialized adaLN-zero model ignores its labels)."""
    torch.manual_seed(seed)
    transformer = JiTTransformer2DModel(
        sample_size=8, patch_size=4, num_layers=num_layers, num_attention_heads=2, attention_head_dim=8,
        bottleneck_dim=8, in_context_len=2, in_context_start=1, num_classes=4,
    )  # fmt: skip
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    names = {0: "zero, nought", 1: "one", 2: "two", 3: "three"}
    pipeline = PixelREPAPipeline(transformer, JiTFlowMatchScheduler(), names, guidance_scale=2.0)
    pipeline.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pipeline of a training run. Tests that change it work on a copy."""
    folder = save_pipeline(tmp_path_factory.mktemp("saved") / "pipeline")
    (folder / "training_arguments.json").write_text(json.dumps({"objective": "pixelrepa", "steps": 5}))
    return folder


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    """A later state of the pipeline: other weights, another number of layers, and shards."""
    folder = tmp_path_factory.mktemp("later") / "pipeline"
    return save_pipeline(folder, seed=1, num_layers=3, max_shard_size="60KB")


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def hub(monkeypatch):
    """An empty stand-in Hub, which the client in this process is logged in to."""
    # The client waits for seconds between its own tries.
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(0.001)})
    monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
    monkeypatch.setattr("pixelrepa_diffusers.hub.RETRY_WAITS", (0,))
    with StandInHub() as hub:
        log_in(hub, monkeypatch)
        yield hub


# ------------------------------------------------------------------------------------------- loading what is published

CLIENT = """
import json, os, re, sys
from functools import partial
import torch
from diffusers import AutoModel, DiffusionPipeline, ModularPipeline

results = {}

def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    arguments = dict(class_labels=["nought", 3], num_inference_steps=3, generator=seeds, output_type="pt")
    return pipe(**arguments, output="images") if isinstance(pipe, ModularPipeline) else pipe(**arguments).images

def predict(model):
    return model(torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8), 0.5, torch.tensor([2])).sample.detach()

def load_everything():
    for load, kind in ((load_standard, ""), (load_modular, "modular ")):
        results[kind + "local"] = sample(load(FOLDER))
        results[kind + "remote"] = sample(load("me/digits"))
        results[kind + "branch"] = sample(load("me/digits", revision="checkpoint-5"))
        results[kind + "pushed"] = sample(load("me/pushed"))
"""

BARE = """
sys.modules["pixelrepa_diffusers"] = None  # importing it raises ImportError from here on
from diffusers.commands.diffusers_cli import main
from huggingface_hub import constants, snapshot_download
from PIL import Image

load_standard = partial(DiffusionPipeline.from_pretrained, trust_remote_code=True)

def load_modular(name, **options):
    pipe = ModularPipeline.from_pretrained(name, trust_remote_code=True, **options)
    pipe.load_components()
    return pipe

load_everything()
load_standard("me/digits").push_to_hub("me/again")
results["pushed again"] = sample(load_standard("me/again"))
load_modular("me/digits").push_to_hub("me/modular")
results["modular pushed again"] = sample(load_modular("me/modular"))
results["model"] = predict(AutoModel.from_pretrained("me/model", trust_remote_code=True))

card = open(os.path.join(snapshot_download("me/digits"), "README.md"), encoding="utf-8").read()
exec(re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1], {})
results["snippet"] = Image.open("image.png").size

arguments = json.dumps({"class_labels": [0, 3], "num_inference_steps": 3})
sys.argv = ["diffusers-cli", "run", "-m", "me/digits", "--trust-remote-code"]
sys.argv += ["--pipeline-kwargs", arguments, "-o", "out/"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop
results["command line"] = os.listdir("out")

constants.HF_HUB_OFFLINE = True
results["offline"] = sample(load_standard(snapshot_download("me/digits", local_files_only=True)))
torch.save(results, "results.pt")
"""

PACKAGE = """
from pixelrepa_diffusers import JiTTransformer2DModel, PixelREPAModularPipeline, PixelREPAPipeline

def load_modular(name, **options):
    pipe = PixelREPAModularPipeline.from_pretrained(name, **options)
    pipe.load_components()
    return pipe

load_standard = PixelREPAPipeline.from_pretrained
load_everything()
results["pushed again"] = sample(load_standard("me/again"))
results["modular pushed again"] = sample(load_modular("me/modular"))
results["model"] = predict(JiTTransformer2DModel.from_pretrained("me/model"))
results["model of a pipeline"] = predict(JiTTransformer2DModel.from_pretrained("me/digits", subfolder="transformer"))
"""


@pytest.fixture(scope="module")
def clients(folder, later, tmp_path_factory):
    """Results of a process without the package, and of this one."""
    work = tmp_path_factory.mktemp("clients")
    with StandInHub() as hub, pytest.MonkeyPatch.context() as patch:
        log_in(hub, patch)
        publish_folder(folder, "me/digits")
        publish_folder(later, "me/digits", revision="checkpoint-5")
        pipe = PixelREPAPipeline.from_pretrained(folder)
        pipe.push_to_hub("me/pushed")
        pipe.transformer.push_to_hub("me/model")

        run = subprocess.run(
            [sys.executable, "-c", f"FOLDER = {str(folder)!r}\n{CLIENT}{BARE}"],
            cwd=work,
            env={**os.environ, **hub.environment(work / "home"), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        assert hub.token not in run.stdout + run.stderr
        exec(CLIENT + PACKAGE, scope := {"FOLDER": folder})
        hub.reset()
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        scope["results"]["offline"] = scope["sample"](PixelREPAPipeline.from_pretrained("me/digits"))
        assert hub.requests == 0
    return torch.load(work / "results.pt"), scope["results"]


def test_images_are_bit_identical_with_and_without_the_package(clients):
    bare, package = clients
    for kind in ("", "modular "):
        expected = package[kind + "local"]
        for images in clients:
            for source in ("local", "remote", "pushed", "pushed again"):
                assert torch.equal(images[kind + source], expected), (kind, source)
        assert torch.equal(bare[kind + "branch"], package[kind + "branch"])
        assert not torch.equal(bare[kind + "branch"], expected)
    for images in clients:
        assert torch.equal(images["offline"], package["local"])
    torch.testing.assert_close(bare["modular local"], bare["local"], atol=1e-5, rtol=0)
    torch.testing.assert_close(bare["modular branch"], bare["branch"], atol=1e-5, rtol=0)


def test_model_loads_alone(clients):
    bare, package = clients
    assert torch.equal(package["model of a pipeline"], package["model"])
    assert torch.equal(bare["model"], package["model"])


def test_usage_example_of_the_card_and_the_diffusers_command_line_run(clients):
    bare, _ = clients
    assert bare["snippet"] == (8, 8)
    assert len([name for name in bare["command line"] if name.endswith((".png", ".jpg", ".webp"))]) == 2


# ------------------------------------------------------------------------------------------------------- publishing


def test_repository_holds_the_pipeline_and_its_card_only(hub, copied):
    (copied / "checkpoint-5").mkdir()
    (copied / "checkpoint-5" / "optimizer.bin").write_bytes(b"state")
    (copied / "transformer" / ".partial.safetensors").write_bytes(b"half")
    (copied / "transformer" / "pytorch_model.bin").write_bytes(b"a pickle")
    (copied / "notes.txt").write_text("mine")
    (copied / "samples.png").write_bytes(b"png")
    before = files(copied)
    publish_folder(copied, "me/digits")
    remote = hub.files("me/digits")
    expected = {
        "model_index.json", "pipeline_pixelrepa.py", "transformer/config.json", "transformer/transformer_jit.py", WEIGHTS,
        "scheduler/scheduler_config.json", "scheduler/scheduling_jit.py", "training_arguments.json", "samples.png",
        "modular_config.json", "modular_model_index.json", "modular_pixelrepa.py",
    }  # fmt: skip
    assert set(remote) == {*expected, "README.md"}
    assert {name: remote[name] for name in expected} == {name: before[name] for name in expected}
    assert remote["README.md"].decode() == str(card_for_folder(copied, "me/digits"))
    assert hub.commits("me/digits") == 1
    assert files(copied) == before


def test_publishing_again_without_a_change_makes_no_commit(hub, folder):
    first = publish_folder(folder, "me/digits")
    hub.reset()
    assert publish_folder(folder, "me/digits").oid == first.oid
    assert hub.commits("me/digits") == 1
    assert not [path for method, path in hub.log if method == "PUT" or "/commit/" in path]


def test_replaced_shards_are_deleted_in_the_same_commit(hub, tmp_path):
    publish_folder(save_pipeline(tmp_path / "shards", max_shard_size="20KB"), "me/digits")
    assert f"{WEIGHTS}.index.json" in hub.files("me/digits")
    publish_folder(save_pipeline(tmp_path / "half", variant="fp16"), "me/digits")
    publish_folder(save_pipeline(tmp_path / "whole"), "me/digits")
    assert hub.commits("me/digits") == 3
    weights = {name for name in hub.files("me/digits") if "safetensors" in name}
    assert weights == {WEIGHTS, WEIGHTS.replace(".safetensors", ".fp16.safetensors")}


def test_publishing_to_a_branch_leaves_main_unchanged(hub, folder, later):
    publish_folder(folder, "me/digits")
    main = hub.files("me/digits")
    publish_folder(later, "me/digits", revision="checkpoint-9")
    branch = hub.files("me/digits", "checkpoint-9")
    assert f"{WEIGHTS}.index.json" in branch and WEIGHTS not in branch
    assert 'revision="checkpoint-9"' in branch["README.md"].decode()
    assert hub.files("me/digits") == main


def test_published_metrics_name_no_local_path(hub, folder, tmp_path):
    networks = {"teacher": {"network": "outputs/demo/teacher, class, 28 px"}, "x": ["../data/r.npz", "me/teacher"]}
    record = {
        "pipeline": "/home/me/my run/pipeline",
        "networks": networks,
        "arguments": {"output_dir": "/home/me/out"},
    }
    record["command"] = "pixelrepa-evaluate --pipeline /home/me/my run/pipeline"
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS | record))
    publish_folder(folder, "me/digits", metrics=tmp_path / "metrics.json")
    assert json.loads(hub.files("me/digits")["metrics.json"]) == METRICS | {
        "pipeline": "pipeline",
        "networks": {"teacher": {"network": "teacher, class, 28 px"}, "x": ["r.npz", "me/teacher"]},
    }


def test_published_metrics_are_kept_while_the_weights_stay(hub, folder, copied, later, tmp_path, caplog):
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({**METRICS, "weights_sha256": weights_sha256(folder / "transformer")}))
    publish_folder(folder, "me/digits", metrics=metrics)
    assert "| FID | 7.25 |" in hub.files("me/digits")["README.md"].decode()
    (copied / "samples.png").write_bytes(b"png")
    publish_folder(copied, "me/digits")
    assert "| FID | 7.25 |" in hub.files("me/digits")["README.md"].decode()

    publish_folder(later, "me/digits")
    assert "metrics.json" not in hub.files("me/digits") and "does not name these weights" in caplog.text
    assert "No results" in hub.files("me/digits")["README.md"].decode()


def test_own_card_is_published_unchanged_and_a_written_one_is_renewed(hub, copied):
    own = "---\nlicense: mit\n---\n\n# My digits\n"
    (copied / "README.md").write_text(own)
    publish_folder(copied, "me/digits")
    assert hub.files("me/digits")["README.md"].decode() == own
    (copied / "README.md").write_text(own + CARD_MARKER)
    publish_folder(copied, "me/digits")
    assert "## How to use" in hub.files("me/digits")["README.md"].decode()


def test_metadata_that_the_hub_refuses_changes_nothing(hub, copied):
    publish_folder(copied, "me/digits")
    before = hub.files("me/digits")
    (copied / "README.md").write_text("---\nlicense: nonsense\n---\n")
    with pytest.raises(ValueError, match="license"):
        publish_folder(copied, "me/digits")
    assert hub.files("me/digits") == before


def test_concurrent_commit_never_mixes_two_pipelines(hub, folder, later):
    raced = []

    def race(number, method, path):
        if "/preupload/" in path and not raced:
            raced.append(path)
            publish_folder(later, "me/digits")

    hub.fault = race
    publish_folder(folder, "me/digits")
    assert raced and hub.commits("me/digits") == 2
    assert {name for name in hub.files("me/digits") if "safetensors" in name} == {WEIGHTS}


# ----------------------------------------------------------------------------------------------------------- faults


@pytest.fixture
def update(hub, folder, later, tmp_path):
    """
    A new state to publish, a function that resets the Hub to the old state, the number of requests of an undisturbed
    publication, and the history after it.
    """
    old, new = (Path(shutil.copytree(state, tmp_path / state.parent.name)) for state in (folder, later))
    for state in (old, new):
        (state / "README.md").write_text("# Mine")  # building a card takes longer than publishing
    publish_folder(old, "me/digits")
    start = deepcopy((hub.repos, hub.lfs))

    def begin() -> None:
        hub.reset()
        hub.repos, hub.lfs = deepcopy(start)

    begin()
    publish_folder(new, "me/digits")
    assert sum(method == "PUT" for method, _ in hub.log) == 2
    return new, begin, hub.requests, history(hub)


def history(hub) -> list[dict[str, bytes]]:
    return [hub.files("me/digits", oid) for oid in hub.repos["me/digits"].commits]


@pytest.mark.parametrize("fault", [500, "cut", "lost"])
def test_push_survives_a_fault_at_any_request(hub, update, fault):
    new, begin, requests, states = update
    for failing in range(1, requests + 1):
        begin()
        hub.fault = lambda number, method, path, failing=failing: fault if number == failing else None
        publish_folder(new, "me/digits")
        assert hub.requests >= failing and history(hub) == states, failing


def test_push_that_fails_for_good_leaves_the_repository_unchanged(hub, update, caplog):
    new, begin, requests, states = update
    local = files(new)
    for failing in range(1, requests + 1):
        begin()
        hub.fault = lambda number, method, path, failing=failing: 500 if number >= failing else None
        with pytest.raises(PublishError, match="could not be published to me/digits in 2 tries") as caught:
            publish_folder(new, "me/digits")
        assert hub.token not in str(caught.value) + caplog.text
        assert history(hub) == states[:2] and files(new) == local, failing

    hub.reset()
    publish_folder(new, "me/digits")
    assert history(hub) == states


def test_unreachable_hub_is_a_clear_error(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(PublishError, match="could not be published to me/digits in 2 tries"):
        publish_folder(folder, "me/digits")
    with pytest.raises(PublishError, match="no access to me/digits"):
        BackgroundPusher("me/digits")


@pytest.mark.parametrize(
    "token, exists",
    [("hf_" + "x" * 34, False), (StandInHub.read_token, False), (StandInHub.read_token, True), (None, True)],
)
def test_token_without_write_permission_is_refused_once_and_not_shown(
    hub, folder, monkeypatch, tmp_path, token, exists, caplog
):
    if exists:
        publish_folder(folder, "me/digits")
    before = hub.files("me/digits")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    hub.reset()
    caplog.set_level(logging.DEBUG)
    with pytest.raises(PublishError, match="hf auth login") as caught:
        publish_folder(folder, "me/digits", token=token)
    assert hub.files("me/digits") == before
    assert hub.requests < 10  # no second try
    assert token is None or token not in str(caught.value) + caplog.text
    with pytest.raises(PublishError, match="hf auth login"):
        BackgroundPusher("me/digits", token=token)


# ---------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("model_index.json", None, "no model_index.json"),
        ("transformer/transformer_jit.py", None, "transformer_jit.py"),
        (WEIGHTS, None, "safetensors"),
        ("training_arguments.json", json.dumps({"hub_token": "hf_" + "x" * 34}), "access token"),
        ("README.md", "Log in with hf_" + "x" * 34, "access token"),
    ],
)
def test_folder_that_cannot_be_published_is_refused_before_any_request(hub, copied, name, content, message):
    (copied / name).unlink() if content is None else (copied / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        publish_folder(copied, "me/digits")
    assert hub.requests == 0


def test_adapter_of_a_converted_checkpoint_is_published(copied):
    (copied / "adapter").mkdir()
    save_file({"mask_token": torch.zeros(2)}, copied / "adapter" / "diffusion_pytorch_model.safetensors")
    (copied / "training_arguments.json").unlink()
    files = published_files(copied, "me/digits")
    assert "adapter/diffusion_pytorch_model.safetensors" in files
    assert b"trained with PixelREPA" in files["README.md"] and b"the work of its authors" in files["README.md"]


# --------------------------------------------------------------------------------------------------- background pushes


def test_checkpoints_are_pushed_to_branches_in_the_background(hub, folder, later):
    with BackgroundPusher("digits", private=True, license="mit") as pusher:
        assert hub.repos["me/digits"].private  # created at once
        pushes = [pusher.push(later, revision="checkpoint-5"), pusher.push(folder)]
    pushed = hub.files("me/digits", "checkpoint-5")
    assert files(later) | {"README.md": pushed["README.md"]} == pushed
    card = hub.files("me/digits")["README.md"].decode()
    assert "license: mit" in card and 'from_pretrained("me/digits"' in card
    assert [push.exception() for push in pushes] == [None, None]


def test_checkpoint_is_published_as_a_pipeline(hub, folder, tmp_path):
    checkpoint = tmp_path / "checkpoint-7"
    for part in ("transformer", "transformer_ema_0.9"):
        shutil.copytree(folder / "transformer", checkpoint / part)
    arguments = {"ema_decays": [0.9], "objective": "repa", "output_dir": str(tmp_path), "dataset_name": "me/data"}
    arguments["teacher_model_name_or_path"] = "/elsewhere/teacher"
    progress = {"step": 7, "arguments": arguments, "pipeline": {"guidance_scale": 1.5}}
    (checkpoint / "progress.json").write_text(json.dumps(progress))
    publish([str(checkpoint), "me/digits"])
    files = hub.files("me/digits")
    assert files[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert json.loads(files["model_index.json"])["guidance_scale"] == 1.5
    card = files["README.md"].decode()
    assert "| optimizer steps | 7 |" in card and "| objective | repa |" in card and "datasets:\n- me/data" in card
    assert not [name for name, data in files.items() if str(tmp_path).encode() in data or b"/elsewhere" in data]


def test_failing_hub_neither_stalls_nor_stops_a_run_and_the_logged_command_publishes(hub, folder, tmp_path, caplog):
    with BackgroundPusher("me/digits", license="mit") as pusher:
        hub.fault = lambda number, method, path: 503
        start = time.perf_counter()
        pushes = [pusher.push(folder, revision="checkpoint-5"), pusher.push(tmp_path / "gone")]
        assert time.perf_counter() - start < 0.5
    assert all(push.exception() for push in pushes)
    assert "There is no folder" in caplog.text and hub.token not in caplog.text
    command, other = re.findall("pixelrepa-publish (.*)", caplog.text)
    assert shlex.split(other)[0] == str(tmp_path / "gone")

    hub.reset()
    publish(shlex.split(command))
    assert hub.files("me/digits", "checkpoint-5")[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert b"license: mit" in hub.files("me/digits", "checkpoint-5")["README.md"]


def test_failed_run_does_not_wait_for_pending_pushes(hub, folder, caplog):
    answer = threading.Event()
    start = time.perf_counter()
    with pytest.raises(ZeroDivisionError), BackgroundPusher("me/digits") as pusher:
        hub.fault = lambda number, method, path: answer.wait() and 503  # the Hub hangs
        assert not pusher.push(folder).done()
        raise ZeroDivisionError
    assert time.perf_counter() - start < 5
    assert f"To finish the job: pixelrepa-publish {folder} me/digits" in caplog.text
    answer.set()


# ---------------------------------------------------------------------------------------------------------- command


def test_command_publishes_and_refuses(hub, copied, tmp_path, capsys, caplog):
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    arguments = [str(copied), "me/digits", "--metrics", str(tmp_path / "metrics.json"), "--private"]

    publish([*arguments, "--dry_run"])
    shown = capsys.readouterr().out
    assert "| FID | 7.25 |" in shown and hub.requests == 0
    for name in ("README.md", "metrics.json", "transformer/config.json"):
        assert f"\n  {name}\n" in shown
    assert "--license" in caplog.text and "--dataset" in caplog.text and "--teacher" not in caplog.text

    publish([*arguments, "--license", "mit", "--dataset", "UCI digits"])
    assert re.search(r"/me/digits/commit/\w+", capsys.readouterr().out)
    card = hub.files("me/digits")["README.md"].decode()
    assert "license: mit" in card and "| data set | UCI digits |" in card
    assert hub.repos["me/digits"].private

    hub.fault = lambda number, method, path: 403
    with pytest.raises(PublishError, match="write permission"):
        publish(arguments)
