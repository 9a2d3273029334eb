"""Training runs: what they write, measure, publish and refuse."""

import json
import re
import shutil

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from standin_hub import StandInHub, log_in
from tiny import TEACHER_IMAGE_SIZE, encoder, reference_of
from training_runs import (
    ROOT,
    TEACHER,
    arguments,
    assert_equal,
    in_two_processes,
    read_metrics,
    stopped,
    train_in_fork,
    weights,
)

from pixelrepa_diffusers import JiTTransformer2DModel, PixelREPAPipeline
from pixelrepa_diffusers.adapter import MaskedTransformerAdapter
from pixelrepa_diffusers.evaluation import evaluate_pipeline, open_spaces
from pixelrepa_diffusers.files import FolderInUseError, only_writer
from pixelrepa_diffusers.hub import PublishError, card_for_folder
from pixelrepa_diffusers.images import list_images, read_image
from pixelrepa_diffusers.teacher import SemanticTeacher
from pixelrepa_diffusers.training.reporting import MetricLogger, NonFiniteLossError


# ------------------------------------------------------------------------------------------------------------- outputs


def test_run_writes_loadable_checkpoints_and_pipeline(finished_run):
    pipeline = DiffusionPipeline.from_pretrained(finished_run / "pipeline", trust_remote_code=True)
    assert pipeline("class1", num_inference_steps=2).images[0].size == (16, 16)
    assert json.loads((finished_run / "pipeline/training_arguments.json").read_text())["steps"] == 6
    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        for name in ("transformer", "transformer_ema_0.9", "transformer_ema_0.5"):
            JiTTransformer2DModel.from_pretrained(finished_run / checkpoint / name)
        MaskedTransformerAdapter.from_pretrained(finished_run / checkpoint / "adapter")


def test_run_writes_metrics_curves_samples_and_tracker_events(finished_run):
    rows = read_metrics(finished_run)
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {"denoising_loss", "alignment_cosine", "grad_norm", "images_per_second", "memory_GiB"} <= rows[0].keys()
    assert all(row["mfu"] > 0 and row["host_ms"] > 0 and row["forward_ms"] > 0 <= row["data_ms"] for row in rows)
    assert {path.name for path in (finished_run / "samples").iterdir()} == {"step-0000003.png", "step-0000006.png"}
    assert Image.open(finished_run / "curves.png").width > 500
    assert list((finished_run / "logs").rglob("events*"))


def test_pipeline_contains_the_first_ema_and_the_settings_of_the_checkpoint(finished_run):
    pipeline = PixelREPAPipeline.from_pretrained(finished_run / "pipeline")
    ema = JiTTransformer2DModel.from_pretrained(finished_run / "checkpoint-6/transformer_ema_0.9")
    assert_equal(pipeline.transformer.state_dict(), ema.state_dict())
    saved = json.loads((finished_run / "checkpoint-6/progress.json").read_text())["pipeline"]
    config = PixelREPAPipeline.load_config(finished_run / "pipeline")
    assert saved == {name: config[name] for name in ("id2label", "guidance_scale", "guidance_interval")}


def test_published_facts_contain_no_token_and_no_local_path(finished_run):
    assert not [path for path in finished_run.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    facts = (finished_run / "pipeline/training_arguments.json").read_text()
    assert '"objective": "pixelrepa"' in facts
    assert str(finished_run.parent) not in facts and str(ROOT) not in facts
    assert str(finished_run) in (finished_run / "arguments.json").read_text()
    assert json.loads(facts)["teacher_model_name_or_path"] == "a local folder"
    assert "a frozen teacher (an image encoder)" in str(card_for_folder(finished_run / "pipeline", "me/mine"))


def test_pipeline_contains_samples_of_its_own_run(train, finished_run, tmp_path):
    run = stopped(finished_run, tmp_path / "run")
    train(run, max_train_steps=4, resume_from_checkpoint="latest")
    assert (run / "pipeline/samples.png").read_bytes() == (run / "samples/step-0000003.png").read_bytes()
    for number in (3, 4):
        shutil.rmtree(run / f"checkpoint-{number}")
    train(run, max_train_steps=1)
    assert not (run / "pipeline/samples.png").exists()


def test_run_in_the_folder_of_another_run_is_refused(train, tmp_path):
    with only_writer(tmp_path / "run"), pytest.raises(FolderInUseError, match="Another run is writing to"):
        train(tmp_path / "run")


def test_non_finite_metrics_are_logged_as_null(tmp_path):
    metrics = MetricLogger(Accelerator(cpu=True), tmp_path, 0)
    metrics.log(1, {"loss": 0.5, "grad_norm": float("inf")})
    metrics.log(2, {"loss": float("nan"), "grad_norm": 2.0})
    rows = [json.loads(line, parse_constant=pytest.fail) for line in metrics.path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.5, "grad_norm": None}, {"step": 2, "loss": None, "grad_norm": 2.0}]
    assert metrics.plot().exists()


# ---------------------------------------------------------------------------------------------------- data and teacher


def test_cached_teacher_features_train_the_same_weights(train, tmp_path, monkeypatch):
    settings = {"max_train_steps": 9, "train_batch_size": 8, "checkpointing_steps": 9}
    calls, forward = [], SemanticTeacher.forward
    monkeypatch.setattr(SemanticTeacher, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    train(tmp_path / "computed", **settings)
    for name in ("filling", "full"):
        train(tmp_path / name, teacher_cache_dir=tmp_path / "cache", **settings)
        one, other = (weights(tmp_path / run / "checkpoint-9") for run in ("computed", name))
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert 9 + 3 < len(calls) <= 9 + 9  # the first of three epochs sees one view of each image


# ----------------------------------------------------------------------------------------------------------- objective


@pytest.mark.parametrize("objective", ["none", "repa"])  # the others: test_recipe.py
def test_every_objective_trains(train, tmp_path, objective):
    teacher = tmp_path / "missing" if objective == "none" else TEACHER  # plain JiT loads no teacher
    settings = {"objective": objective, "teacher_model_name_or_path": teacher, "mask_ratio": 0, "max_train_steps": 2}
    train(tmp_path / "run", **settings)
    assert ("alignment_loss" in read_metrics(tmp_path / "run")[-1]) == (objective != "none")
    assert (tmp_path / "run/checkpoint-2/adapter").exists() == (objective != "none")


def test_alignment_stops_after_its_step(train, tmp_path):
    train(tmp_path / "run", stop_alignment_after_step=2, logging_steps=1, max_train_steps=4)
    assert ["alignment_loss" in row for row in read_metrics(tmp_path / "run")] == [True, True, False, False]


def test_non_finite_loss_stops_the_run_and_names_step_images_and_checkpoint(train, tmp_path):
    train(tmp_path / "run", max_train_steps=1, checkpointing_steps=1, lr_warmup_steps=0)
    with pytest.raises(NonFiniteLossError, match=r"step \d+ is not finite. Its images .*\[\d.*checkpoint-1"):
        train(tmp_path / "run", resume_from_checkpoint="latest", learning_rate=1e30, lr_warmup_steps=0)
    assert not (tmp_path / "run/checkpoint-3").exists()


def test_weights_that_a_gradient_made_nan_are_not_saved(train, tmp_path, monkeypatch):
    update = torch.optim.AdamW.step

    def poisoned(optimizer, *args, **kwargs):
        update(optimizer, *args, **kwargs)
        if optimizer.state[optimizer.param_groups[0]["params"][0]]["step"] == 3:
            optimizer.param_groups[0]["params"][0].data[0] = torch.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)
    with pytest.raises(NonFiniteLossError, match="weights after step 3"):
        train(tmp_path / "run")
    assert not (tmp_path / "run/checkpoint-3").exists()


def test_non_finite_step_is_skipped_on_request(train, tmp_path):
    train(tmp_path / "run", on_nonfinite="skip", learning_rate=1e30, lr_warmup_steps=0, max_train_steps=4)
    assert read_metrics(tmp_path / "run")[0]["skipped_steps"] > 0
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run/checkpoint-3").values())


def test_skip_counts_are_summed_across_ranks(train, image_folder, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(image_folder, damaged)
    for path in sorted(damaged.rglob("*.png"))[::2]:
        path.write_bytes(path.read_bytes()[:60])
    settings = {"on_bad_image": "skip", "on_nonfinite": "skip", "learning_rate": 1e30, "lr_warmup_steps": 0}
    settings |= {"max_train_steps": 3, "logging_steps": 1, "checkpointing_steps": 3}
    train(tmp_path / "one", damaged, **settings, train_batch_size=4)
    log = tmp_path / "log.txt"
    words = arguments(damaged, tmp_path / "two", **settings, train_batch_size=2)
    in_two_processes(train_in_fork, words, log)
    one, two = (read_metrics(tmp_path / run)[0] for run in ("one", "two"))
    assert one["skipped_images"] == two["skipped_images"] > 0
    skipped = re.findall(r"Step \d was skipped.*Its images were \[(.*)\]", log.read_text())
    assert skipped and all(len(images.split(",")) == 4 for images in skipped)


# ---------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def evaluation(image_folder, tmp_path_factory) -> dict:
    """Arguments of an evaluation against the training images."""
    reference = tmp_path_factory.mktemp("reference") / "train.npz"
    images = torch.stack([read_image(path, 16) for path in list_images(image_folder)])
    reference_of(encoder(), images).save(reference)
    size = {"eval_num_samples": 12, "eval_inference_steps": 3, "eval_image_size": TEACHER_IMAGE_SIZE}
    return {"eval_steps": 3, "eval_reference": reference, **size}


def test_evaluation_measures_the_first_ema_and_does_not_change_training(train, evaluation, finished_run, tmp_path):
    folder = train(tmp_path / "run", **evaluation, lr_warmup_steps=0)
    rows = read_metrics(tmp_path / "run")
    measured = {row["step"]: row["fd_teacher"] for row in rows if "fd_teacher" in row}
    assert measured.keys() == {3, 6} and measured[3] != measured[6]

    reference = {"teacher": evaluation["eval_reference"]}
    (space,) = open_spaces(["fd_teacher"], 12, {"teacher": encoder}, reference)
    pipeline = PixelREPAPipeline.from_pretrained(folder)
    assert evaluate_pipeline(pipeline, [space], 12, num_inference_steps=3)["fd_teacher"] == measured[6]
    assert_equal(weights(finished_run / "checkpoint-6"), weights(tmp_path / "run/checkpoint-6"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"eval_reference": "missing.npz"}, "missing.npz"),
        ({"eval_reference": None}, "--eval_reference"),
        ({"eval_num_samples": 13}, "multiple of the model's 3 classes"),
        ({"eval_image_size": 17}, "multiple of"),
    ],
)
def test_impossible_evaluation_is_refused_before_the_first_step(train, evaluation, tmp_path, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(tmp_path / "run", **{**evaluation, **overrides})
    assert not (tmp_path / "run/metrics.jsonl").exists()


# ----------------------------------------------------------------------------------------------------------------- Hub


@pytest.fixture
def hub(monkeypatch):
    with StandInHub() as hub:
        log_in(hub, monkeypatch)
        yield hub


PUSH = {"push_to_hub": True, "push_checkpoints": True, "hub_model_id": "me/tiny"}


def test_checkpoints_and_pipeline_are_pushed_to_the_hub(hub, train, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    (tmp_path / "run/hub/checkpoint-1").mkdir(parents=True)  # an earlier start could not push it
    train(tmp_path / "run", **PUSH, validation_steps=3)
    pipeline = {path.name: path.read_bytes() for path in (tmp_path / "run/pipeline").rglob("*") if path.is_file()}
    pushed = {branch: hub.files("me/tiny", branch) for branch in ("checkpoint-3", "checkpoint-6", "main")}
    for files in pushed.values():
        assert {"README.md", "model_index.json", "pipeline_pixelrepa.py", "samples.png"} <= files.keys()
    assert [path.name for path in (tmp_path / "run/hub").iterdir()] == ["checkpoint-1"]
    weights_name = "transformer/diffusion_pytorch_model.safetensors"
    assert pushed["main"][weights_name] == pipeline["diffusion_pytorch_model.safetensors"]
    assert pushed["checkpoint-6"][weights_name] == pushed["main"][weights_name] != pushed["checkpoint-3"][weights_name]
    # Without a terminal: a banner and log lines, no progress bar, no messages of accelerate.
    assert "images: 24" in caplog.text and "Step 2 of 6: denoise" in caplog.text
    assert "steps:  " not in capsys.readouterr().err and "Optimizer state saved" not in caplog.text


def test_missing_login_ends_the_run_before_it_starts(hub, train, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match="hf auth login"):
        train(tmp_path / "run", **PUSH)
    assert not (tmp_path / "run/metrics.jsonl").exists()
