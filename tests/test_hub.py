"""Saved folders and Hub repositories that stand alone, and publishing that never leaves half a repository.

The real huggingface_hub client talks to a stand-in Hub on 127.0.0.1. What is loaded, is loaded in processes of their own
with fresh caches; "bare" ones cannot import this package.
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

import huggingface_hub
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from standin_hub import HubState, StandInHub

from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline
from pixelrepa_diffusers.commands.publish import main as publish
from pixelrepa_diffusers.hub import (
    CARD_MARKER,
    BackgroundPusher,
    PublishError,
    card_for_folder,
    pipeline_files,
    publish_command,
    publish_folder,
)


ROOT = Path(__file__).parents[1]


def save_pipeline(folder: Path, seed: int = 0, num_layers: int = 2, **options) -> Path:
    """A tiny pipeline, every weight random: a fresh adaLN-zero model ignores its labels."""
    torch.manual_seed(seed)
    transformer = JiTTransformer2DModel(
        sample_size=8, patch_size=4, num_layers=num_layers, num_attention_heads=2, attention_head_dim=8,
        bottleneck_dim=8, in_context_len=2, in_context_start=1, num_classes=4,
    )  # fmt: skip
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if options.get("variant") == "fp16":
        transformer.half()
    names = {0: "zero, nought", 1: "one", 2: "two", 3: "three"}
    PixelREPAPipeline(transformer, JiTFlowMatchScheduler(), names, guidance_scale=2.0).save_pretrained(
        folder, **options
    )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained pipeline's folder. Tests that change it work on a copy."""
    folder = save_pipeline(tmp_path_factory.mktemp("saved") / "pipeline")
    facts = {"objective": "pixelrepa", "steps": 5, "hub_model_id": "me/digits"}
    (folder / "training_arguments.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def shared_hub():
    with StandInHub() as hub:
        yield hub


def log_in(hub: StandInHub, monkeypatch) -> None:
    """Makes `hub` the Hub of the client in this process, which has read the environment long ago."""
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", hub.token)


@pytest.fixture
def hub(shared_hub, monkeypatch):
    """A stand-in Hub without repositories, which the client in this process is logged in to."""
    shared_hub.reset()
    shared_hub.state.repos.clear()
    shared_hub.state.lfs.clear()
    log_in(shared_hub, monkeypatch)
    # The client waits 1, 2, 4 and 8 seconds between its own tries; ours keep their waits.
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(0.001)})
    monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
    return shared_hub


# ------------------------------------------------------------------------------------------- what a published folder does

# R1 ... R7 name the behaviours of a saved pipeline: loaded without the package, with it, with it through DiffusionPipeline,
# loaded and pushed again, as a single model, from diffusers' command line, and with variants of saving.
PRELUDE = """
import json, os, sys
if IS_BARE:
    sys.modules["pixelrepa_diffusers"] = None  # "import pixelrepa_diffusers" now raises ImportError
import torch
from diffusers import AutoModel, DiffusionPipeline, UniPCMultistepScheduler
TRUST = {"trust_remote_code": True}
results = {}

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return pipe(["nought", 3], num_inference_steps=3, generator=seeds, output_type="pt").images

def look(model):
    sample = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    return model(sample, 0.5, torch.tensor([2])).sample.detach()

def check(function):
    try:
        results[function.__name__] = function()
    except BaseException as error:
        results[function.__name__] = f"{type(error).__name__}: {error}"
"""

WITH_PACKAGE = """
from pixelrepa_diffusers import JiTTransformer2DModel, PixelREPAPipeline

@check
def local():
    return draw(PixelREPAPipeline.from_pretrained(FOLDER))

@check
def remote():
    pipe = PixelREPAPipeline.from_pretrained("me/digits")
    assert type(pipe) is PixelREPAPipeline and type(pipe.transformer) is JiTTransformer2DModel
    return draw(pipe)

@check
def branch():
    return draw(PixelREPAPipeline.from_pretrained("me/digits", revision="checkpoint-5"))

@check
def plain_class_local():
    return draw(DiffusionPipeline.from_pretrained(FOLDER))

@check
def plain_class_remote():
    return draw(DiffusionPipeline.from_pretrained("me/digits"))

@check
def model_of_a_pipeline():
    return look(JiTTransformer2DModel.from_pretrained("me/digits", subfolder="transformer"))

@check
def model():
    return look(JiTTransformer2DModel.from_pretrained("me/model"))

@check
def pushed():
    return draw(PixelREPAPipeline.from_pretrained("me/pushed"))

@check
def pushed_again():
    pipe = PixelREPAPipeline.from_pretrained("me/again")
    assert type(pipe) is PixelREPAPipeline
    return draw(pipe)

@check
def saved_again():
    return draw(PixelREPAPipeline.from_pretrained("again"))

@check
def swapped_scheduler():
    pipe = PixelREPAPipeline.from_pretrained("me/unipc")
    assert type(pipe.scheduler) is UniPCMultistepScheduler
    return draw(pipe)

@check
def sharded():
    return draw(PixelREPAPipeline.from_pretrained("me/sharded"))

@check
def variant():
    pipe = PixelREPAPipeline.from_pretrained("me/fp16", variant="fp16", dtype=torch.float16)
    return draw(pipe)

@check
def bfloat16():
    return draw(PixelREPAPipeline.from_pretrained("me/digits", dtype=torch.bfloat16))

@check
def from_pipe():
    pipe = PixelREPAPipeline.from_pretrained("me/digits")
    other = PixelREPAPipeline.from_pipe(pipe)
    assert other.transformer is pipe.transformer
    return draw(other)

@check
def full_disk():
    import resource
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # less than the weights: every write beyond it fails
    try:
        PixelREPAPipeline.from_pretrained("me/digits", cache_dir="full")
        message = "loaded"
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return message, draw(PixelREPAPipeline.from_pretrained("me/digits", cache_dir="full"))
"""

BARE = """
@check
def package_is_out_of_reach():
    try:
        import pixelrepa_diffusers
    except ImportError:
        return True

@check
def local():
    return draw(DiffusionPipeline.from_pretrained(FOLDER, **TRUST))

@check
def remote():
    pipe = DiffusionPipeline.from_pretrained("me/digits", **TRUST)
    assert type(pipe).__name__ == "PixelREPAPipeline" and type(pipe).__module__.startswith("diffusers_modules")
    return draw(pipe)

@check
def pushed():
    return draw(DiffusionPipeline.from_pretrained("me/pushed", **TRUST))

@check
def branch():
    return draw(DiffusionPipeline.from_pretrained("me/digits", revision="checkpoint-5", **TRUST))

@check
def saved_again():
    DiffusionPipeline.from_pretrained("me/digits", **TRUST).save_pretrained("again")
    return draw(DiffusionPipeline.from_pretrained("again", **TRUST))

@check
def pushed_again():
    DiffusionPipeline.from_pretrained("me/digits", **TRUST).push_to_hub("me/again")
    return draw(DiffusionPipeline.from_pretrained("me/again", **TRUST))

@check
def auto_model():
    return look(AutoModel.from_pretrained("me/model", **TRUST))

@check
def swapped_scheduler():
    pipe = DiffusionPipeline.from_pretrained("me/unipc", **TRUST)
    assert type(pipe.scheduler) is UniPCMultistepScheduler
    return draw(pipe)

@check
def sharded():
    return draw(DiffusionPipeline.from_pretrained("me/sharded", **TRUST))

@check
def variant():
    return draw(DiffusionPipeline.from_pretrained("me/fp16", variant="fp16", dtype=torch.float16, **TRUST))

@check
def bfloat16():
    return draw(DiffusionPipeline.from_pretrained("me/digits", dtype=torch.bfloat16, **TRUST))

@check
def from_pipe():
    pipe = DiffusionPipeline.from_pretrained("me/digits", **TRUST)
    other = type(pipe).from_pipe(pipe)  # DiffusionPipeline.from_pipe knows no class from outside diffusers
    assert other.transformer is pipe.transformer
    return draw(other)

@check
def snippet():
    import re
    from huggingface_hub import snapshot_download
    card = open(os.path.join(snapshot_download("me/digits"), "README.md"), encoding="utf-8").read()
    exec(re.search(r"```python\\n(.*?)```", card, re.DOTALL)[1], {})
    from PIL import Image
    return Image.open("image.png").size

@check
def command_line():
    from diffusers.commands.diffusers_cli import main
    kwargs = json.dumps({"class_labels": [0, 3], "num_inference_steps": 3})
    sys.argv = ["diffusers-cli", "run", "-m", "me/digits", "--trust-remote-code"]
    sys.argv += ["--pipeline-kwargs", kwargs, "-o", "out/"]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, stop
    return sorted(os.listdir("out"))
"""

OFFLINE = """
from huggingface_hub import snapshot_download

@check
def bare():
    folder = snapshot_download("me/digits", local_files_only=True)
    return draw(DiffusionPipeline.from_pretrained(folder, **TRUST))

del sys.modules["pixelrepa_diffusers"]
from pixelrepa_diffusers import PixelREPAPipeline

@check
def package():
    return draw(PixelREPAPipeline.from_pretrained("me/digits"))
"""


def run_client(
    script: str, workdir: Path, home: Path, hub: StandInHub, folder: Path, is_bare: bool = False, **variables
) -> dict:
    """What the checks of a script returned, or the error they raised, in a process with its cache in `home`."""
    code = f"IS_BARE, FOLDER = {is_bare}, {str(folder)!r}\n{PRELUDE}{script}\ntorch.save(results, 'results.pt')\n"
    environment = {**os.environ, **hub.environment(home), "CUDA_VISIBLE_DEVICES": "", **variables}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=workdir, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = torch.load(workdir / "results.pt")
    results["log"] = run.stdout + run.stderr
    return results


@pytest.fixture(scope="module")
def clients(folder, tmp_path_factory):
    """Everything loaded and pushed by one process after another, from and to a Hub of their own."""
    work = tmp_path_factory.mktemp("clients")
    sharded = save_pipeline(work / "sharded", max_shard_size="20KB")
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 1
    half = save_pipeline(work / "half", variant="fp16")
    with StandInHub() as hub, pytest.MonkeyPatch.context() as patch:
        log_in(hub, patch)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(work / "publisher"))
        publish_folder(folder, "me/digits")
        publish_folder(folder, "me/digits", revision="checkpoint-5")
        publish_folder(sharded, "me/sharded")
        publish_folder(half, "me/fp16")
        pipe = PixelREPAPipeline.from_pretrained(folder)
        pipe.push_to_hub("me/pushed")
        pipe.transformer.push_to_hub("me/model")
        pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        pipe.push_to_hub("me/unipc")

        results = {"bare": run_client(BARE, work, work / "bare", hub, folder, is_bare=True)}
        results["package"] = run_client(WITH_PACKAGE, work, work / "package", hub, folder)
        hub.reset()
        results["offline"] = run_client(OFFLINE, work, work / "bare", hub, folder, is_bare=True, HF_HUB_OFFLINE="1")
        results["offline"]["requests"] = hub.requests
    return results


def same(images, reference) -> bool:
    assert isinstance(images, torch.Tensor), images
    assert isinstance(reference, torch.Tensor), reference
    return torch.equal(images, reference)


@pytest.mark.parametrize("source", ["local", "remote", "pushed", "branch"])
def test_r1_without_the_package_the_images_are_the_same_bits(clients, source):
    assert clients["bare"]["package_is_out_of_reach"] is True
    assert same(clients["bare"][source], clients["package"]["local"])


@pytest.mark.parametrize("source", ["remote", "branch"])
def test_r2_the_installed_class_loads_the_repository_without_a_flag(clients, source):
    assert same(clients["package"][source], clients["package"]["local"])


def test_r2_the_installed_class_works_offline_from_the_cache(clients):
    assert same(clients["offline"]["package"], clients["package"]["local"])
    assert clients["offline"]["requests"] == 0


def test_offline_without_the_package_the_cached_snapshot_loads(clients):
    assert same(clients["offline"]["bare"], clients["package"]["local"])


@pytest.mark.parametrize("source", ["plain_class_local", "plain_class_remote"])
def test_r3_diffusion_pipeline_beside_the_package_loads_or_asks_for_trust(clients, source):
    outcome = clients["package"][source]
    if isinstance(outcome, str):
        assert outcome.startswith("ValueError") and "trust_remote_code=True" in outcome, outcome
    else:
        assert same(outcome, clients["package"]["local"])


@pytest.mark.parametrize("step", ["saved_again", "pushed_again"])
def test_r4_what_was_loaded_remotely_and_written_again_loads_with_and_without_the_package(clients, step):
    assert same(clients["bare"][step], clients["package"]["local"])
    assert same(clients["package"][step], clients["package"]["local"])


def test_r4_what_the_package_pushed_itself_loads_with_and_without_it(clients):
    assert same(clients["package"]["pushed"], clients["package"]["local"])
    assert same(clients["bare"]["pushed"], clients["package"]["local"])


def test_r5_the_model_loads_alone(clients):
    assert same(clients["package"]["model_of_a_pipeline"], clients["package"]["model"])
    assert same(clients["bare"]["auto_model"], clients["package"]["model"])


def test_r6_diffusers_command_line_runs_the_repository(clients):
    assert isinstance(clients["bare"]["command_line"], list), clients["bare"]["command_line"]
    assert len([name for name in clients["bare"]["command_line"] if name.endswith((".png", ".jpg", ".webp"))]) == 2


@pytest.mark.parametrize("client", ["package", "bare"])
def test_r7_from_pipe_and_shards_change_nothing(clients, client):
    assert same(clients[client]["from_pipe"], clients["package"]["local"])
    assert same(clients[client]["sharded"], clients["package"]["local"])


def test_r7_a_swapped_scheduler_is_saved_and_loads_with_and_without_the_package(clients):
    assert same(clients["package"]["swapped_scheduler"], clients["bare"]["swapped_scheduler"])
    assert not torch.equal(clients["package"]["swapped_scheduler"], clients["package"]["local"])


@pytest.mark.parametrize("option, tolerance", [("variant", 0.05), ("bfloat16", 0.2)])
def test_r7_variants_and_types_load_with_and_without_the_package(clients, option, tolerance):
    assert same(clients["package"][option], clients["bare"][option])
    difference = (clients["package"][option].float() - clients["package"]["local"]).abs().max()
    assert 0 < difference < tolerance


def test_the_cards_snippet_runs_as_printed(clients):
    assert clients["bare"]["snippet"] == (8, 8)


def test_a_full_disk_on_download_is_an_error_and_the_next_download_is_whole(clients):
    message, images = clients["package"]["full_disk"]
    assert message.startswith("OSError"), message
    assert same(images, clients["package"]["local"])


def test_no_token_in_what_the_clients_printed(clients):
    assert not any(HubState().token in client["log"] for client in clients.values())


# ------------------------------------------------------------------------------------------------------------- publishing


def test_a_repository_holds_the_pipeline_its_card_and_nothing_else(hub, copied):
    (copied / "checkpoint-5").mkdir()
    (copied / "checkpoint-5" / "optimizer.bin").write_bytes(b"state")
    (copied / "transformer" / ".partial.safetensors").write_bytes(b"half")
    (copied / "notes.txt").write_text("mine")
    (copied / "samples.png").write_bytes(b"png")
    before = contents(copied)
    publish_folder(copied, "me/digits")
    remote = hub.files("me/digits")
    expected = {
        "model_index.json", "pipeline_pixelrepa.py", "transformer/config.json", "transformer/transformer_jit.py",
        "transformer/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json",
        "scheduler/scheduling_jit.py", "training_arguments.json", "samples.png",
    }  # fmt: skip
    assert set(remote) == {*expected, "README.md"}
    assert {name: remote[name] for name in expected} == {name: before[name] for name in expected}
    assert remote["README.md"].decode() == str(card_for_folder(copied, "me/digits"))
    assert hub.commits("me/digits") == 1
    assert contents(copied) == before


def test_publishing_twice_without_a_change_uploads_nothing(hub, folder):
    first = publish_folder(folder, "me/digits")
    hub.reset()
    assert publish_folder(folder, "me/digits").oid == first.oid
    assert hub.commits("me/digits") == 1
    assert not [entry for entry in hub.state.log if entry["method"] == "PUT" or "/commit/" in entry["path"]]


def test_a_name_without_a_user_is_the_users_own(hub, folder):
    publish_folder(folder, "digits")
    assert 'from_pretrained("me/digits"' in hub.files("me/digits")["README.md"].decode()


def test_a_private_repository_is_created_private(hub, folder):
    publish_folder(folder, "me/secret", private=True)
    publish_folder(folder, "me/open")
    assert hub.state.repos["model", "me/secret"].private and not hub.state.repos["model", "me/open"].private


def test_weights_split_otherwise_replace_the_old_ones_in_the_same_commit(hub, tmp_path):
    publish_folder(save_pipeline(tmp_path / "shards", max_shard_size="20KB"), "me/digits")
    assert "transformer/diffusion_pytorch_model.safetensors.index.json" in hub.files("me/digits")
    publish_folder(save_pipeline(tmp_path / "half", variant="fp16"), "me/digits")
    publish_folder(save_pipeline(tmp_path / "whole"), "me/digits")
    assert hub.commits("me/digits") == 3
    weights = {name for name in hub.files("me/digits") if "safetensors" in name}
    assert weights == {f"transformer/diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".fp16")}


def test_a_branch_gets_the_checkpoint_and_main_stays(hub, folder, tmp_path):
    publish_folder(folder, "me/digits")
    main = hub.files("me/digits")
    publish_folder(save_pipeline(tmp_path / "later", seed=1), "me/digits", revision="checkpoint-9")
    branch = hub.files("me/digits", "checkpoint-9")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert branch[weights] == (tmp_path / "later" / weights).read_bytes() != main[weights]
    assert 'revision="checkpoint-9"' in branch["README.md"].decode()
    assert hub.files("me/digits") == main


def test_metrics_given_by_path_are_published_with_the_card(hub, folder, tmp_path):
    metrics = {"metrics": {"fid": 7.25}, "num_samples": 10, "reference": "r.npz", "device": "cpu"}
    (tmp_path / "m.json").write_text(json.dumps(metrics))
    publish_folder(folder, "me/digits", metrics=tmp_path / "m.json")
    assert json.loads(hub.files("me/digits")["metrics.json"]) == metrics
    assert "| fid | 7.25 |" in hub.files("me/digits")["README.md"].decode()


def test_a_card_of_ones_own_is_published_as_it_is_and_a_written_one_is_renewed(hub, copied):
    own = "---\nlicense: mit\n---\n\n# My digits\n"
    (copied / "README.md").write_text(own)
    publish_folder(copied, "me/digits")
    assert hub.files("me/digits")["README.md"].decode() == own
    (copied / "README.md").write_text(own + CARD_MARKER)
    publish_folder(copied, "me/digits")
    assert "## How to use" in hub.files("me/digits")["README.md"].decode()


def test_metadata_the_hub_refuses_is_an_error_and_changes_nothing(hub, copied):
    publish_folder(copied, "me/digits")
    before = hub.files("me/digits")
    (copied / "README.md").write_text("---\nlicense: nonsense\n---\n")
    with pytest.raises(ValueError, match="license"):
        publish_folder(copied, "me/digits")
    assert hub.files("me/digits") == before


def test_a_commit_of_somebody_else_in_between_is_met_by_planning_anew(hub, folder, tmp_path):
    """Otherwise the repository would hold the weights of both, and a loader would take the wrong ones."""
    publish_folder(folder, "me/digits")
    raced = []

    def race(number, method, path):
        if "/preupload/" in path and not raced:
            raced.append(path)
            publish_folder(save_pipeline(tmp_path / "shards", max_shard_size="20KB"), "me/digits")

    hub.fault = race
    publish_folder(save_pipeline(tmp_path / "whole", seed=1), "me/digits", retry_wait=0)
    assert raced and hub.commits("me/digits") == 3
    weights = {name for name in hub.files("me/digits") if "safetensors" in name}
    assert weights == {"transformer/diffusion_pytorch_model.safetensors"}


# ------------------------------------------------------------------------------------------------------------------ faults


@pytest.fixture
def versions(folder, tmp_path):
    """Two complete states of one repository: other weights, another split, another card."""
    return folder, save_pipeline(tmp_path / "second", seed=1, num_layers=3, max_shard_size="60KB")


@pytest.fixture
def begin(hub, versions):
    """Makes the Hub hold the first state and nothing of the second, and returns that state."""
    publish_folder(versions[0], "me/digits")
    first = deepcopy((hub.state.repos, hub.state.lfs))

    def begin() -> dict[str, bytes]:
        hub.reset()
        hub.state.repos, hub.state.lfs = deepcopy(first)
        return hub.files("me/digits")

    return begin


def update(hub, versions, begin) -> tuple[list[str], list[dict]]:
    """The requests of an undisturbed update, and the states the repository went through."""
    before = begin()
    publish_folder(versions[1], "me/digits")
    requests = [f"{entry['method']} {entry['path']}" for entry in hub.state.log]
    assert len(requests) == hub.requests and sum(request.startswith("PUT") for request in requests) == 2
    return requests, [{}, before, hub.files("me/digits")]


def history(hub) -> list[dict[str, bytes]]:
    return [hub.files("me/digits", oid) for oid in hub.state.repos["model", "me/digits"].commits]


@pytest.mark.parametrize("fault", [500, "cut", "lost"])
def test_a_fault_at_any_one_request_of_a_push_is_survived_and_never_halves_the_repository(hub, versions, begin, fault):
    requests, states = update(hub, versions, begin)
    for number, request in enumerate(requests, start=1):
        begin()
        hub.fault = lambda count, method, path, number=number: fault if count == number else None
        publish_folder(versions[1], "me/digits", retry_wait=0)
        assert hub.requests >= number, request  # the fault was met
        assert history(hub) == states, request


@pytest.mark.parametrize("fault", [500, "cut"])
def test_a_hub_that_fails_for_good_from_any_request_on_leaves_the_repository_as_it_was(
    hub, versions, begin, fault, caplog
):
    requests, states = update(hub, versions, begin)
    local = contents(versions[1])
    for number, request in enumerate(requests, start=1):
        begin()
        hub.fault = lambda count, method, path, number=number: fault if count >= number else None
        with pytest.raises(PublishError) as caught:
            publish_folder(versions[1], "me/digits", attempts=2, retry_wait=0)
        assert publish_command(versions[1], "me/digits") in str(caught.value), request
        assert hub.token not in str(caught.value) + caplog.text
        assert history(hub) == states[:2], request
        assert contents(versions[1]) == local

    hub.reset()
    publish_folder(versions[1], "me/digits")
    assert history(hub) == states


def test_a_hub_out_of_reach_is_a_clear_error(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(PublishError, match=r"(?s)could not be published to me/digits in 2 tries.*publish.py"):
        publish_folder(folder, "me/digits", attempts=2, retry_wait=0)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("token", ["hf_" + "x" * 34, "read", None])
def test_a_token_that_may_not_write_is_told_so_once_and_not_shown(
    hub, folder, monkeypatch, tmp_path, token, exists, caplog
):
    if exists:
        publish_folder(folder, "me/digits")
    before = hub.files("me/digits")
    token = hub.read_token if token == "read" else token
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    hub.reset()
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(PublishError, match=r"hf auth login|no write permission") as caught,
    ):
        publish_folder(folder, "me/digits", token=token)
    assert hub.files("me/digits") == before
    assert hub.requests < 10  # refused means refused: no second try
    assert token is None or token not in str(caught.value) + caplog.text


def test_a_name_that_belongs_to_somebody_else_is_refused(hub, folder):
    hub.fault = lambda number, method, path: 403 if "create" in path else None
    with pytest.raises(PublishError, match=r"no write permission|another name"):
        publish_folder(folder, "google/digits")


@pytest.mark.parametrize("repo_id", ["a/b/c", "me/..x", "-me/x", "me/" + "x" * 100])
def test_an_impossible_name_is_refused_before_any_request(hub, folder, repo_id):
    with pytest.raises(ValueError):
        publish_folder(folder, repo_id)
    assert hub.requests == 0


def spoil_index(folder):
    (folder / "model_index.json").unlink()


def spoil_code(folder):
    (folder / "transformer" / "transformer_jit.py").unlink()


def spoil_weights(folder):
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def spoil_shard(folder):
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    save_file(tensors, weights.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    index = {name: f"diffusion_pytorch_model-0000{1 + (name > 'm')}-of-00002.safetensors" for name in tensors}
    weights.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def spoil_layout(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "PixelREPAPipeline"}))


def add_pickle(folder):
    torch.save({}, folder / "transformer" / "diffusion_pytorch_model.bin")


def add_token(folder):
    (folder / "training_arguments.json").write_text(json.dumps({"hub_token": "something"}))


def add_token_text(folder):
    (folder / "README.md").write_text("Log in with hf_" + "x" * 34)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_index, "no model_index.json"),
        (spoil_code, "transformer_jit.py"),
        (spoil_weights, "damaged"),
        (spoil_shard, "00002-of-00002"),
        (spoil_layout, "own code"),
        (add_pickle, "pickle"),
        (add_token, "access token"),
        (add_token_text, "access token"),
    ],
)
def test_a_folder_that_cannot_be_published_is_refused_before_any_request(hub, copied, spoil, message):
    spoil(copied)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        publish_folder(copied, "me/digits")
    assert hub.requests == 0


def test_an_adapter_of_a_converted_checkpoint_travels_along(copied):
    (copied / "adapter").mkdir()
    save_file({"mask_token": torch.zeros(2)}, copied / "adapter" / "diffusion_pytorch_model.safetensors")
    assert "adapter/diffusion_pytorch_model.safetensors" in pipeline_files(copied)
    (copied / "training_arguments.json").unlink()
    assert "trained with PixelREPA" in str(card_for_folder(copied, "me/digits"))


# ------------------------------------------------------------------------------------------------------- in the background


def test_checkpoints_are_pushed_to_branches_in_the_background(hub, folder, tmp_path):
    later = save_pipeline(tmp_path / "later", seed=1)
    with BackgroundPusher("me/digits", private=True) as pusher:
        pusher.push(folder, revision="checkpoint-5")
        pusher.push(later, revision="checkpoint-10")
        pusher.push(later)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    for revision, source in (("checkpoint-5", folder), ("checkpoint-10", later), ("main", later)):
        assert hub.files("me/digits", revision)[weights] == (source / weights).read_bytes()
    assert pusher.pending == set() and pusher.finish() == []
    assert hub.state.repos["model", "me/digits"].private


def test_a_hub_that_is_down_neither_stalls_nor_kills_and_the_reported_command_finishes_the_job(
    hub, folder, tmp_path, monkeypatch, caplog
):
    hub.fault = lambda number, method, path: 503
    pusher = BackgroundPusher("me/digits", attempts=2, retry_wait=0.01)
    start = time.perf_counter()
    pusher.push(folder, revision="checkpoint-5")
    assert time.perf_counter() - start < 0.5
    commands = pusher.finish()
    assert pusher.failed == {folder} and pusher.pending == set()
    assert commands == [publish_command(folder, "me/digits", "checkpoint-5")]
    assert commands[0] in caplog.text and hub.token not in caplog.text

    hub.reset()
    program, *arguments = shlex.split(commands[0])
    assert program == "python"
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert "transformer/config.json" in hub.files("me/digits", "checkpoint-5")
    assert hub.token not in run.stdout + run.stderr


def test_a_push_that_fails_at_first_is_tried_again(hub, folder):
    hub.fault = lambda number, method, path: 503 if number <= 5 else None
    with BackgroundPusher("me/digits", attempts=20, retry_wait=0.01) as pusher:
        pusher.push(folder)
    assert hub.commits("me/digits") == 1


def test_folders_are_pending_until_they_are_pushed_and_leaving_a_failed_run_does_not_wait(hub, folder, caplog):
    answer = threading.Event()
    hub.fault = lambda number, method, path: answer.wait() and 503  # the Hub hangs
    start = time.perf_counter()
    with pytest.raises(ZeroDivisionError), BackgroundPusher("me/digits", attempts=1) as pusher:
        pusher.push(folder)
        assert pusher.pending == {folder}
        raise ZeroDivisionError
    assert time.perf_counter() - start < 5
    assert publish_command(folder, "me/digits") in caplog.text
    answer.set()
    assert len(pusher.finish()) == 1 and pusher.pending == set()


def test_a_folder_that_is_gone_is_reported_and_later_ones_are_pushed(hub, folder, tmp_path, caplog):
    pusher = BackgroundPusher("me/digits")
    pusher.push(tmp_path / "gone", revision="checkpoint-1")
    pusher.push(folder)
    assert pusher.finish() == [publish_command(tmp_path / "gone", "me/digits", "checkpoint-1")]
    assert "model_index.json" in caplog.text and hub.commits("me/digits") == 1


# ------------------------------------------------------------------------------------------------------------- publish.py


def test_publish_py_publishes_and_refuses(hub, copied, tmp_path, capsys):
    metrics = {"metrics": {"fid": 7.25}, "num_samples": 10, "reference": "r.npz", "device": "cpu"}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    arguments = [
        str(copied),
        "me/digits",
        "--metrics",
        str(tmp_path / "metrics.json"),
        "--license",
        "mit",
        "--private",
    ]

    publish([*arguments, "--dry_run"])
    shown = capsys.readouterr().out
    assert "| fid | 7.25 |" in shown and "transformer/config.json" in shown and hub.requests == 0

    publish(arguments)
    assert re.search(r"/me/digits/commit/\w+", capsys.readouterr().out)
    assert "license: mit" in hub.files("me/digits")["README.md"].decode()
    assert hub.state.repos["model", "me/digits"].private

    hub.fault = lambda number, method, path: 403
    with pytest.raises(SystemExit, match="no write permission"):
        publish(arguments)
