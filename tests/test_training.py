"""What a training run promises: what it writes, what it refuses, and that a restart changes nothing."""

import errno
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from PIL import Image
from standin_hub import StandInHub
from tiny import TEACHER_IMAGE_SIZE, encoder, reference_of
from training_runs import ROOT, TEACHER, arguments, assert_equal, load_script, weights

from pixelrepa_diffusers import JiTTransformer2DModel, PixelREPAPipeline
from pixelrepa_diffusers.adapter import MaskedTransformerAdapter
from pixelrepa_diffusers.commands import prepare_dataset
from pixelrepa_diffusers.commands.prepare_dataset import PrepareArguments
from pixelrepa_diffusers.evaluation import evaluate_pipeline, open_spaces
from pixelrepa_diffusers.hub import card_for_folder
from pixelrepa_diffusers.images import list_images, read_image
from pixelrepa_diffusers.teacher import SemanticTeacher
from pixelrepa_diffusers.training.arguments import parse_arguments
from pixelrepa_diffusers.training.reporting import Journal
from pixelrepa_diffusers.training.step import NonFiniteLossError


main = load_script("training/train_pixelrepa.py").main


def test_a_run_leaves_checkpoints_samples_curves_and_a_pipeline(train, tmp_path):
    folder = train(tmp_path / "run", validation_steps=3, report_to="tensorboard")
    run = tmp_path / "run"
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert pipeline("class1", num_inference_steps=2).images[0].size == (16, 16)
    assert json.loads((folder / "training_arguments.json").read_text())["steps"] == 6
    for checkpoint in ("checkpoint-3", "checkpoint-6"):
        for name in ("transformer", "transformer_ema_0.9", "transformer_ema_0.5"):
            JiTTransformer2DModel.from_pretrained(run / checkpoint / name)
        MaskedTransformerAdapter.from_pretrained(run / checkpoint / "adapter")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert {"denoising_loss", "alignment_cosine", "grad_norm", "images_per_second", "memory_GiB"} <= rows[0].keys()
    assert [Image.open(path).width > 16 for path in sorted((run / "samples").iterdir())] == [True, True]
    assert Image.open(run / "curves.png").width > 500
    assert list((run / "logs").rglob("events*"))


def test_prepared_images_train_the_same_weights(train, image_folder, tmp_path):
    settings = {"max_train_steps": 3, "lr_warmup_steps": 0}
    prepared = str(tmp_path / "prepared")
    prepare_dataset.main(PrepareArguments(train_data_dir=str(image_folder), output_dir=prepared, resolution=16))
    train(tmp_path / "raw", **settings)
    train(tmp_path / "run", tmp_path / "prepared", **settings)
    assert_equal(weights(tmp_path / "raw/checkpoint-3"), weights(tmp_path / "run/checkpoint-3"))


def test_the_final_pipeline_holds_the_first_ema(train, tmp_path):
    folder = train(tmp_path / "run")
    published = PixelREPAPipeline.from_pretrained(folder).transformer.state_dict()
    averaged = JiTTransformer2DModel.from_pretrained(tmp_path / "run/checkpoint-6/transformer_ema_0.9").state_dict()
    assert_equal(published, averaged)


def test_cached_teacher_features_make_the_same_run(train, image_folder, tmp_path, monkeypatch):
    settings = {"max_train_steps": 9, "train_batch_size": 8, "checkpointing_steps": 9, "logging_steps": 1}
    calls = []
    forward = SemanticTeacher.forward
    monkeypatch.setattr(SemanticTeacher, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    train(tmp_path / "computed", **settings)
    assert calls == [8] * 9
    expected = weights(tmp_path / "computed/checkpoint-9")

    def cached(name: str) -> int:
        calls.clear()
        train(tmp_path / name, teacher_cache_dir=tmp_path / "cache", **settings)
        for key, value in weights(tmp_path / name / "checkpoint-9").items():
            torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-5)
        return len(calls)

    assert 3 < cached("filling") <= 9  # the first of three epochs meets one view of each image
    assert cached("full") == 0

    (file,) = (tmp_path / "cache").iterdir()
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content[:-1])  # a damaged record, and one that was cut off
    assert 1 <= cached("damaged") <= 4
    assert cached("repaired") == 0

    changed = tmp_path / "changed data"
    shutil.copytree(image_folder, changed)
    image = next(changed.glob("*/*.png"))
    Image.open(image).transpose(Image.Transpose.ROTATE_180).save(image)
    calls.clear()
    train(tmp_path / "changed", changed, teacher_cache_dir=tmp_path / "cache", **settings)
    assert calls


def test_a_full_disk_ends_the_caching_of_features_not_the_run(train, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    assert train(tmp_path / "run", teacher_cache_dir=tmp_path / "cache") is not None


@pytest.fixture(scope="module")
def reference(image_folder, tmp_path_factory) -> Path:
    """Statistics of the training images in the teacher's space."""
    path = tmp_path_factory.mktemp("reference") / "train.npz"
    reference_of(encoder(), torch.stack([read_image(path, 16) for path in list_images(image_folder)])).save(path)
    return path


def test_an_evaluation_in_training_measures_the_first_ema_and_changes_nothing(train, reference, tmp_path):
    evaluation = {
        "eval_reference": reference,
        "eval_num_samples": 12,
        "eval_inference_steps": 3,
        "eval_image_size": TEACHER_IMAGE_SIZE,
    }
    folder = train(tmp_path / "run", eval_steps=3, **evaluation)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row["fd_teacher"] for row in rows if "fd_teacher" in row}
    assert measured.keys() == {3, 6} and measured[3] != measured[6]

    (space,) = open_spaces(["fd_teacher"], 12, {"teacher": encoder}, {"teacher": reference})
    pipeline = PixelREPAPipeline.from_pretrained(folder)
    assert evaluate_pipeline(pipeline, [space], 12, num_inference_steps=3)["fd_teacher"] == measured[6]

    train(tmp_path / "without")
    assert_equal(weights(tmp_path / "without/checkpoint-6"), weights(tmp_path / "run/checkpoint-6"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"eval_reference": None}, "--eval_reference"),
        ({"eval_reference": "missing.npz"}, "missing.npz"),
        ({"eval_num_samples": 13}, "multiple of the model's 3 classes"),
        ({"eval_image_size": 17}, "multiple of the model's patch"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_the_first_step(train, reference, tmp_path, overrides, message):
    evaluation = {
        "eval_reference": reference,
        "eval_num_samples": 12,
        "eval_image_size": TEACHER_IMAGE_SIZE,
        **overrides,
    }
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(tmp_path / "run", eval_steps=3, **evaluation)
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("objective", ["none", "repa", "irepa", "pixelrepa"])
def test_every_objective_trains(train, tmp_path, objective):
    missing = tmp_path / "no teacher is loaded for plain JiT"
    train(
        tmp_path / "run",
        objective=objective,
        teacher_model_name_or_path=missing if objective == "none" else TEACHER,
        mask_ratio=0,
        max_train_steps=2,
    )
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert ("alignment_loss" in row) == (objective != "none")
    assert (tmp_path / "run/checkpoint-2/adapter").exists() == (objective != "none")


def test_alignment_stops_after_its_step(train, tmp_path):
    train(tmp_path / "run", stop_alignment_after_step=2, logging_steps=1, max_train_steps=4)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert ["alignment_loss" in row for row in rows] == [True, True, False, False]


def test_a_non_finite_loss_stops_the_run_and_names_the_step_the_images_and_the_checkpoint(train, tmp_path):
    train(tmp_path / "run", max_train_steps=1, checkpointing_steps=1, lr_warmup_steps=0)
    with pytest.raises(NonFiniteLossError, match=r"step \d+ is not finite. Its images .*\[\d.*checkpoint-1"):
        train(tmp_path / "run", resume_from_checkpoint="latest", learning_rate=1e30, lr_warmup_steps=0)
    assert not (tmp_path / "run/checkpoint-3").exists()


def test_a_non_finite_step_is_skipped_on_request(train, tmp_path):
    train(tmp_path / "run", on_nonfinite="skip", learning_rate=1e30, lr_warmup_steps=0, max_train_steps=4)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["skipped_steps"] > 0
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run/checkpoint-3").values())


def _train_in_a_fork(words, log):
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, of one process, was forked along
    logging.getLogger().addHandler(logging.FileHandler(log))
    main(parse_arguments(words))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_is_skipped_is_told_of_all_processes(train, image_folder, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(image_folder, damaged)
    for path in sorted(damaged.rglob("*.png"))[::2]:
        path.write_bytes(path.read_bytes()[:60])
    settings = {"on_bad_image": "skip", "on_nonfinite": "skip", "learning_rate": 1e30, "lr_warmup_steps": 0}
    settings |= {"max_train_steps": 3, "logging_steps": 1, "checkpointing_steps": 3}
    train(tmp_path / "one", damaged, **settings, train_batch_size=4)
    log = tmp_path / "log.txt"
    words = arguments(damaged, tmp_path / "two", **settings, train_batch_size=2)
    debug_launcher(_train_in_a_fork, args=(words, log), num_processes=2)
    one, two = (json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[0]) for run in ("one", "two"))
    assert one["skipped_images"] == two["skipped_images"] > 0
    told = re.findall(r"Step \d was skipped.*Its images were \[(.*)\]", log.read_text())
    assert told and all(len(images.split(",")) == 4 for images in told)


def test_a_dry_run_refuses_data_of_less_than_a_batch(train, tmp_path):
    with pytest.raises(ValueError, match="24 images do not fill one global batch of 32 = 8 per process"):
        train(tmp_path / "run", dry_run=True, dry_run_processes=4, train_batch_size=8)


def test_a_pipeline_has_samples_of_its_own_run(train, tmp_path):
    run = tmp_path / "run"
    settings = {"validation_steps": 2, "checkpointing_steps": 2}
    train(run, max_train_steps=4, **settings)
    shutil.move(run / "checkpoint-4", tmp_path)
    train(run, max_train_steps=3, resume_from_checkpoint="latest", **settings)
    assert (run / "pipeline/samples.png").read_bytes() == (run / "samples/step-0000003.png").read_bytes()
    for number in (2, 3):
        shutil.rmtree(run / f"checkpoint-{number}")
    train(run, max_train_steps=1, validation_steps=0)
    assert not (run / "pipeline/samples.png").exists()


@pytest.mark.parametrize("config", sorted((ROOT / "training/configs").glob("*_[blh][13]?.yaml")), ids=lambda p: p.stem)
def test_every_recipe_passes_a_dry_run_of_eight_processes(config, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    AcceleratorState._reset_state(True)
    main(parse_arguments(["--config", str(config), "--dry_run", "--dry_run_processes", "8"]))
    AcceleratorState._reset_state(True)
    printed = capsys.readouterr().out
    report = json.loads(printed[printed.index("{") :])
    assert report["global_batch_size"] == 1024
    assert report["learning_rate"] == pytest.approx(2e-4)
    assert report["steps"] == 600 * 1251
    assert report["warmup_steps"] == 5 * 1251
    size = {"b16": 131, "l16": 459, "h16": 953, "b32": 133, "l32": 462, "h32": 956}[config.stem[-3:]]
    assert report["parameters"]["transformer"] / 1e6 == pytest.approx(size, rel=0.01)


def parsed(*words):
    return parse_arguments(list(words))


def test_the_command_line_wins_over_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "learning_rate: 5e-5\nema_decays: [0.9, 0.8]\nuse_ema: false\nmax_grad_norm: null\n"
    )
    args = parsed("--config", str(tmp_path / "c.yaml"), "--learning_rate", "1e-3")
    assert (args.learning_rate, args.ema_decays, args.use_ema, args.max_grad_norm) == (1e-3, [0.9, 0.8], False, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1"], "unknown arguments: --lerning_rate"),
        (["--mask_ratio", "1.5"], "--mask_ratio is a probability"),
        (["--train_batch_size", "0"], "--train_batch_size must be at least 1"),
        (["--preset", "JiT-X/16"], "Known presets: JiT-B/16"),
        (["--learning_rate", "nan"], "--learning_rate must be positive and finite"),
        (["--objective", "repo"], "invalid choice"),
        (["--hub_model_id", "me/x"], "need --push_to_hub"),
        (["--push_to_hub", "--hub_token", "hf_x", "--report_to", "wandb"], "would be recorded by wandb"),
        (["--streaming"], "--max_train_steps and --lr_warmup_steps"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_argument_is_named_with_its_remedy(words, message, capsys):
    with pytest.raises(SystemExit):
        parsed(*words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [("lerning_rate: 1", "unknown arguments: lerning_rate"), ("- a", "`name: value`"), ("seed: x", "invalid int")],
)
def test_a_wrong_file_is_refused(tmp_path, text, message, capsys):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parsed("--config", str(tmp_path / "c.yaml"))
    assert message in capsys.readouterr().err


def test_a_run_without_data_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match="exactly one source"):
        train(tmp_path / "run", train_data_dir=None)


def test_a_tracker_that_is_not_installed_is_refused(train, tmp_path):
    assert importlib.util.find_spec("dvclive") is None
    with pytest.raises(ImportError, match="--report_to dvclive: not installed"):
        train(tmp_path / "run", report_to=["tensorboard", "dvclive"])


@pytest.mark.parametrize(
    ("words", "steps", "warmup", "said"),
    [
        ([], 750_600, 6255, []),
        ([], 5000, 5000, ["outlasts the 5000 steps", r"61% .* 0\.9999\) .* --ema_decays, such as 0\.999\."]),
        (["--use_ema", "false"], 5000, 10, []),
        (["--use_ema", "false", "--lr_scheduler", "constant"], 10, 10, []),
    ],
)
def test_a_run_too_short_for_its_settings_is_doubted(words, steps, warmup, said):
    doubts = parsed(*words).doubts(steps, warmup)
    assert len(doubts) == len(said)
    assert all(re.search(pattern, doubt) for pattern, doubt in zip(said, doubts, strict=True))


def test_what_is_not_finite_is_null_in_the_journal(tmp_path):
    accelerator = Accelerator(cpu=True)
    journal = Journal(accelerator, tmp_path, 0)
    journal.log(1, {"loss": 0.5, "grad_norm": float("inf")})
    journal.log(2, {"loss": float("nan"), "grad_norm": 2.0})
    rows = [json.loads(line, parse_constant=pytest.fail) for line in journal.path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 0.5, "grad_norm": None}, {"step": 2, "loss": None, "grad_norm": 2.0}]
    assert journal.plot().exists()


def test_wrong_guidance_is_refused_before_the_first_step(train, tmp_path):
    with pytest.raises(ValueError, match="0 ≤ low < high ≤ 1"):
        train(tmp_path / "run", guidance_interval=[0.9, 0.1])
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_checkpoints_and_the_pipeline_reach_the_hub(image_folder, tmp_path):
    words = arguments(image_folder, tmp_path / "run", hub_model_id="me/tiny", validation_steps=3)
    command = [
        sys.executable,
        str(ROOT / "training/train_pixelrepa.py"),
        *words,
        "--push_to_hub",
        "--push_checkpoints",
    ]
    with StandInHub() as hub:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **hub.environment(tmp_path / "home")}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-4000:]
        pushed = {branch: hub.files("me/tiny", branch) for branch in ("checkpoint-3", "checkpoint-6", "main")}
    pipeline = {path.name: path.read_bytes() for path in (tmp_path / "run/pipeline").rglob("*") if path.is_file()}
    for files in pushed.values():
        assert {"README.md", "model_index.json", "pipeline_pixelrepa.py", "samples.png"} <= files.keys()
    weights_name = "transformer/diffusion_pytorch_model.safetensors"
    assert pushed["main"][weights_name] == pipeline["diffusion_pytorch_model.safetensors"]
    assert pushed["checkpoint-6"][weights_name] == pushed["main"][weights_name] != pushed["checkpoint-3"][weights_name]


def test_what_is_published_names_no_place_of_this_machine(train, tmp_path):
    folder = train(tmp_path / "run", max_train_steps=1)
    facts = (folder / "training_arguments.json").read_text()
    assert '"objective": "pixelrepa"' in facts
    assert str(tmp_path) not in facts and str(ROOT) not in facts
    assert str(tmp_path) in (tmp_path / "run/arguments.json").read_text()
    # That there was a teacher is no secret.
    assert json.loads(facts)["teacher_model_name_or_path"] == "a local folder"
    assert "a frozen teacher (an image encoder)" in str(card_for_folder(folder, "me/mine"))


def test_the_token_is_saved_nowhere(train, tmp_path):
    train(tmp_path / "run", hub_token="hf_secret", max_train_steps=1, report_to="tensorboard")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
