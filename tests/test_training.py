"""What a training run promises: what it writes, what it refuses, and that a restart changes nothing."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline
from PIL import Image
from standin_hub import StandInHub
from tiny import TEACHER_IMAGE_SIZE, encoder, reference_of
from training_runs import ROOT, TEACHER, arguments, launch_two, weights, write_images

from pixelrepa_diffusers import JiTTransformer2DModel, PixelREPAPipeline
from pixelrepa_diffusers.adapter import MaskedTransformerAdapter
from pixelrepa_diffusers.evaluation import evaluate_pipeline, list_images, open_spaces, read_image
from pixelrepa_diffusers.teacher import SemanticTeacher


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "train")


@pytest.fixture
def train(data, monkeypatch):
    """train(output_dir, **arguments) runs the script's main in this process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from arguments import parse_arguments
    from train_pixelrepa import main

    def run(output_dir, train_data_dir=data, **overrides):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return main(parse_arguments(arguments(train_data_dir, output_dir, **overrides)))

    yield run
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def assert_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


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


def test_the_final_pipeline_holds_the_first_ema(train, tmp_path):
    folder = train(tmp_path / "run")
    published = PixelREPAPipeline.from_pretrained(folder).transformer.state_dict()
    averaged = JiTTransformer2DModel.from_pretrained(tmp_path / "run/checkpoint-6/transformer_ema_0.9").state_dict()
    assert_equal(published, averaged)


def test_a_resumed_run_equals_one_straight_through(train, tmp_path):
    # mid-epoch, with worker processes and accumulation: 24 images are 3 steps of 8 an epoch, the stop is after 2
    settings = {
        "train_batch_size": 2, "gradient_accumulation_steps": 4, "dataloader_num_workers": 2, "checkpointing_steps": 2,
        "dropout": 0.5,
    }  # fmt: skip
    train(tmp_path / "straight", **settings)
    train(tmp_path / "stopped", **{**settings, "max_train_steps": 2, "lr_scheduler": "constant_with_warmup"})
    train(tmp_path / "stopped", **settings, resume_from_checkpoint="latest")
    assert_equal(weights(tmp_path / "straight/checkpoint-6"), weights(tmp_path / "stopped/checkpoint-6"))
    rows = [json.loads(line)["loss"] for line in (tmp_path / "straight/metrics.jsonl").read_text().splitlines()]
    resumed = [json.loads(line)["loss"] for line in (tmp_path / "stopped/metrics.jsonl").read_text().splitlines()]
    assert rows == resumed


def train_on_two(data: Path, output_dir: Path, **overrides) -> None:
    record = output_dir / "pipeline/training_arguments.json"
    launch_two(ROOT / "training/train_pixelrepa.py", arguments(data, output_dir, **overrides), record)


def test_two_processes_resume_exactly_and_follow_one_process_with_the_whole_batch(train, data, tmp_path):
    # With its usual ε Adam divides vanishing gradients, of which a fresh adaLN-zero has many, by themselves: it would
    # compare the signs of rounding errors.
    settings = {
        "gradient_accumulation_steps": 2,
        "checkpointing_steps": 2,
        "adam_epsilon": 1e-3,
        "learning_rate": 1e-3,
        "train_batch_size": 2,
    }
    train_on_two(data, tmp_path / "straight", **settings)
    train_on_two(data, tmp_path / "stopped", **{**settings, "max_train_steps": 2})
    train_on_two(data, tmp_path / "stopped", **settings, resume_from_checkpoint="latest")
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
    from reporting import Exporter

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Exporter, "write_samples", die)
        train(tmp_path / "run", validation_steps=6)
    train(tmp_path / "run", validation_steps=6, resume_from_checkpoint="latest")
    assert [path.name for path in (tmp_path / "run/samples").iterdir()] == ["step-0000006.png"]
    assert (tmp_path / "run/pipeline/samples.png").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_before_it_stops(data, tmp_path, number):
    words = arguments(data, tmp_path / "run", max_train_steps=100_000, checkpointing_steps=100_000, logging_steps=1)
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


def test_cached_teacher_features_make_the_same_run(train, data, tmp_path, monkeypatch):
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

    changed = data.parent / "changed"
    shutil.copytree(data, changed)
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
def reference(data, tmp_path_factory) -> Path:
    """Statistics of the training images in the teacher's space."""
    path = tmp_path_factory.mktemp("reference") / "train.npz"
    reference_of(encoder(), torch.stack([read_image(path, 16) for path in list_images(data)])).save(path)
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


def test_no_checkpoint_holds_the_teacher(train, tmp_path):
    train(tmp_path / "run", max_train_steps=2)
    names = [name for name in weights(tmp_path / "run/checkpoint-2") if "teacher" in name or "dinov2" in name]
    assert not names


@pytest.mark.parametrize(
    "overrides",
    [
        {"mixed_precision": "bf16"},
        {"gradient_checkpointing": True},
        {"use_ema": False},
        {"max_grad_norm": 0.1},
        {"unconditional": True},
        {"compile": True, "objective": "none", "num_layers": 2, "validation_steps": 0},
    ],
    ids=str,
)
def test_a_switch_trains_to_finite_losses(train, tmp_path, overrides, data):
    folder = train(tmp_path / "run", max_train_steps=2, **{"validation_steps": 2, **overrides})
    assert torch.isfinite(torch.tensor(json.loads((tmp_path / "run/metrics.jsonl").read_text())["loss"]))
    PixelREPAPipeline.from_pretrained(folder)


def test_gradient_checkpointing_does_not_change_the_run(train, tmp_path):
    train(tmp_path / "plain", max_train_steps=3)
    train(tmp_path / "checkpointed", max_train_steps=3, gradient_checkpointing=True)
    assert_equal(weights(tmp_path / "plain/checkpoint-3"), weights(tmp_path / "checkpointed/checkpoint-3"))


def test_training_goes_on_from_a_pipeline_with_other_classes(train, tmp_path):
    first = train(tmp_path / "first", max_train_steps=2)
    more = write_images(tmp_path / "more", classes=5)
    folder = train(
        tmp_path / "second", more, max_train_steps=1, pretrained_model_name_or_path=first, learning_rate=1e-9
    )
    before, after = (PixelREPAPipeline.from_pretrained(path).transformer for path in (first, folder))
    assert after.config.num_classes == 5
    torch.testing.assert_close(before.final_layer.linear.weight, after.final_layer.linear.weight)


def test_a_non_finite_loss_stops_the_run_and_names_the_step_the_images_and_the_checkpoint(train, tmp_path):
    from train_pixelrepa import NonFiniteLossError

    train(tmp_path / "run", max_train_steps=1, checkpointing_steps=1, lr_warmup_steps=0)
    with pytest.raises(NonFiniteLossError, match=r"step \d+ is not finite. Its images .*\[\d.*checkpoint-1"):
        train(tmp_path / "run", resume_from_checkpoint="latest", learning_rate=1e30, lr_warmup_steps=0)
    assert not (tmp_path / "run/checkpoint-3").exists()


def test_a_non_finite_step_is_skipped_on_request(train, tmp_path):
    train(tmp_path / "run", on_nonfinite="skip", learning_rate=1e30, lr_warmup_steps=0, max_train_steps=4)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["skipped_steps"] > 0
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run/checkpoint-3").values())


def test_the_oldest_checkpoints_go_beyond_the_limit(train, tmp_path):
    train(tmp_path / "run", checkpointing_steps=1, checkpoints_total_limit=2, max_train_steps=4)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_a_folder_with_checkpoints_is_not_started_over(train, tmp_path):
    train(tmp_path / "run", max_train_steps=1)
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint latest"):
        train(tmp_path / "run")


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


@pytest.mark.parametrize("config", sorted((ROOT / "training/configs").glob("*_[blh][13]?.yaml")), ids=lambda p: p.stem)
def test_every_recipe_passes_a_dry_run_of_eight_processes(config, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from arguments import parse_arguments
    from train_pixelrepa import main

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
    from arguments import parse_arguments

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


def test_wrong_guidance_is_refused_before_the_first_step(train, tmp_path):
    with pytest.raises(ValueError, match="0 ≤ low < high ≤ 1"):
        train(tmp_path / "run", guidance_interval=[0.9, 0.1])
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_checkpoints_and_the_pipeline_reach_the_hub(data, tmp_path):
    words = arguments(data, tmp_path / "run", hub_model_id="me/tiny", validation_steps=3)
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


def test_the_token_is_saved_nowhere(train, tmp_path):
    train(tmp_path / "run", hub_token="hf_secret", max_train_steps=1, report_to="tensorboard")
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
