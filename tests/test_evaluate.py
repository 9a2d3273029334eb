"""commands/evaluate.py: metrics depend on weights and settings alone."""

import csv
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import TEACHER_IMAGE_SIZE, encoder, random_images, reference_of
from training_runs import TEACHER, in_two_processes

from pixelrepa_diffusers.cli import parse
from pixelrepa_diffusers.commands import evaluate as command
from pixelrepa_diffusers.commands.evaluate import EvaluateArguments, main
from pixelrepa_diffusers.evaluation import FeatureStatistics, pipeline_images
from pixelrepa_diffusers.hub import card_for_folder, weights_sha256


@pytest.fixture(scope="module")
def folder(make_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    names = {index: f"digit {index}" for index in range(10)}
    make_pipeline(id2label=names, guidance_scale=2.0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "real.npz"
    reference_of(encoder(), random_images(40)).save(path)
    return path


def evaluate(folder, reference, output_dir, *options, num_samples=40) -> list[dict]:
    source = ["--pipeline", folder, "--num_inference_steps", 2] if folder else []
    given = [
        *("--output_dir", output_dir, "--metrics", "fd_teacher", "--teacher", TEACHER, "--batch_size", 8),
        *("--teacher_image_size", TEACHER_IMAGE_SIZE, "--teacher_reference", reference, "--num_samples", num_samples),
    ]
    return main(parse(EvaluateArguments, "", [str(word) for word in [*source, *given, *options]]))


def stop_after(monkeypatch, batches: int) -> list:
    """Interrupt the command once it has sampled so many batches."""
    made = []

    def stopping(*args, **kwargs):
        make_images = pipeline_images(*args, **kwargs)

        def make(indices):
            if len(made) == batches:
                raise KeyboardInterrupt
            made.append(indices)
            return make_images(indices)

        return make

    monkeypatch.setattr(command, "pipeline_images", stopping)
    return made


def test_metrics_json_reproduces_the_measurement_and_feeds_the_card(folder, reference, tmp_path):
    (record,) = evaluate(folder, reference, tmp_path / "out", "--seed", 7)
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert stored == record
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.json", "grid.png", ".lock"}
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.width > 2 * grid.height  # four rows of ten classes
    assert stored["weights_sha256"] == weights_sha256(folder / "transformer")
    assert (stored["num_samples"], stored["seeds"], stored["device"]) == (40, "7-46", "cpu")
    assert (stored["guidance_scale"], stored["guidance_interval"], stored["dtype"]) == (2.0, [0.1, 1.0], "float32")
    assert stored["references"]["teacher"]["sha256"] == FeatureStatistics.load(reference).sha256
    assert stored["versions"]["torch"] == torch.__version__
    card = str(card_for_folder(folder, "me/digits", tmp_path / "out" / "metrics.json"))
    assert any(f"{stored['metrics']['fd_teacher']:.{digits}g}" in card for digits in (3, 4, 6))


def test_two_processes_measure_what_one_does(folder, reference, tmp_path):
    options = ("--metrics", "fd_teacher", "precision_recall_teacher", "--chunk_size", "16")
    (one,) = evaluate(folder, reference, tmp_path / "one", *options)
    in_two_processes(evaluate, folder, reference, tmp_path / "two", *options)
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["metrics"] == pytest.approx(
        one["metrics"], rel=1e-10
    )
    assert (tmp_path / "two" / "grid.png").read_bytes() == (tmp_path / "one" / "grid.png").read_bytes()


def test_a_sweep_covers_all_combinations(folder, reference, tmp_path):
    ema = tmp_path / "checkpoint-5" / "transformer_ema_0.5"
    shutil.copytree(folder / "transformer", ema)
    weights = load_file(ema / "diffusion_pytorch_model.safetensors")
    save_file({name: 0.9 * tensor for name, tensor in weights.items()}, ema / "diffusion_pytorch_model.safetensors")
    sweep = ["--transformers", folder / "transformer", ema, "--guidance_scales", 1, 3]
    sweep += ["--schedulers", "heun", "euler", "--guidance_intervals", "0:1", "0.4:1"]
    records = evaluate(folder, reference, tmp_path / "out", *sweep, num_samples=10)

    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    axes = ("transformer", "scheduler", "guidance_scale", "guidance_interval")
    assert len(rows) == len({tuple(row[axis] for axis in axes) for row in rows}) == 16
    assert rows[-1]["folder"] == "checkpoint-5-ema_0.5_euler_interval-0.4-1_guidance-3"
    for row, record in zip(rows, records, strict=True):
        assert json.loads((tmp_path / "out" / row["folder"] / "metrics.json").read_text()) == record
    # Every axis has an effect; the interval has none without guidance.
    assert len({row["fd_teacher"] for row in rows}) == 12
    best = json.loads((tmp_path / "out" / "sweep.json").read_text())["best"]
    assert best["fd_teacher"] == min(record["metrics"]["fd_teacher"] for record in records)
    with Image.open(tmp_path / "out" / "sweep.png") as image:
        assert min(image.size) > 100


def test_a_sweep_resumes_and_keeps_its_finished_cells(folder, reference, tmp_path, monkeypatch):
    options = ("--chunk_size", 8, "--guidance_scales", 1, 2)
    straight = evaluate(folder, reference, tmp_path / "straight", *options, num_samples=20)
    stop_after(monkeypatch, batches=5)  # the first cell's three, and two of the second
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, reference, tmp_path / "stopped", *options, num_samples=20)
    cells = sorted(path.relative_to(tmp_path / "stopped").as_posix() for path in tmp_path.glob("stopped/*/[ms]*"))
    assert cells == ["guidance-1/metrics.json", "guidance-2/state.npz"]
    made = stop_after(monkeypatch, batches=1 + 3)  # the rest of the second cell, and a new one
    resumed = evaluate(folder, reference, tmp_path / "stopped", *options, 0.5, num_samples=20)
    assert [cell["metrics"] for cell in resumed[:2]] == [cell["metrics"] for cell in straight]
    assert len(made) == 4 and not list(tmp_path.glob("stopped/*/state.npz"))


def test_the_best_cell_has_the_highest_score():
    records = [{"metrics": {"inception_score": score, "fid": 0.0}} for score in (2.0, 1.0, 3.0)]
    assert command.best(records) == 2


def test_other_settings_need_overwrite(folder, reference, tmp_path):
    (first,) = evaluate(folder, reference, tmp_path)
    with pytest.raises(ValueError, match="seeds was '0-39' and is '1-40'"):
        evaluate(folder, reference, tmp_path, "--seed", 1)
    assert json.loads((tmp_path / "metrics.json").read_text()) == first
    (second,) = evaluate(folder, reference, tmp_path, "--seed", 1, "--overwrite")
    assert second["seeds"] == "1-40" and second["metrics"] != first["metrics"]


def test_image_files_score_as_the_pipeline_that_made_them(folder, reference, make_pipeline, tmp_path):
    (expected,) = evaluate(folder, reference, tmp_path / "sampled")
    make_images = pipeline_images(make_pipeline(guidance_scale=2.0), 40, num_inference_steps=2)
    (tmp_path / "images").mkdir()
    for index, image in enumerate(torch.cat([make_images(range(start, start + 8)) for start in range(0, 40, 8)])):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{index:04d}.png")
    Image.new("RGB", (50, 50)).save(tmp_path / "images" / "grid.png")  # as pixelrepa-generate leaves one
    (record,) = evaluate(None, reference, tmp_path / "measured", "--images", tmp_path / "images")
    assert record["metrics"] == expected["metrics"]
    with pytest.raises(ValueError, match="there are 40 images"):
        evaluate(None, reference, tmp_path / "more", "--images", tmp_path / "images", num_samples=41)
