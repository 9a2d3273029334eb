"""commands/probe_alignment.py: near and far images of every class, noised and denoised."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import TEACHER, in_two_processes

from pixelrepa_diffusers import JiTFlowMatchScheduler, PixelREPAPipeline
from pixelrepa_diffusers.cli import parse
from pixelrepa_diffusers.commands.probe_alignment import SUBSETS, LateScheduler, ProbeArguments, main
from pixelrepa_diffusers.evaluation import FeatureMoments, FeatureStatistics, VisionEncoderNetwork, extract
from pixelrepa_diffusers.images import list_images, read_image
from pixelrepa_diffusers.sampling import seeded


CLASSES, PER_CLASS, KEPT = 3, 24, 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes of noise with rising contrast."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir()
        for index in range(PER_CLASS):
            pixels = 128 + (random.random((16, 16, 3)) - 0.5) * 10 * index + 20 * label
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"class{label}" / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def folders(make_pipeline, tmp_path_factory):
    folders = [tmp_path_factory.mktemp("pipeline") for _ in range(2)]
    for seed, folder in enumerate(folders):
        make_pipeline({"seed": seed, "num_classes": CLASSES, "noise_scale": 2.0}).save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def teacher():
    return VisionEncoderNetwork.from_pretrained(TEACHER, image_size=28, pooling="patches")


def probe(folders, data, output_dir, *options) -> dict:
    given = [
        *("--pipelines", *folders, "--names", "first", "second", "--data_dir", data, "--teacher", TEACHER),
        *("--image_size", 28, "--images_per_class", KEPT, "--num_inference_steps", 5, "--batch_size", 8),
        *("--output_dir", output_dir, *options),
    ]
    return main(parse(ProbeArguments, "", [str(word) for word in given]))


@pytest.fixture(scope="module")
def record(folders, data, tmp_path_factory):
    return probe(folders, data, tmp_path_factory.mktemp("out"))


def test_near_and_far_are_nearest_to_and_farthest_from_the_class_mean(record, data, teacher):
    for label in range(CLASSES):
        paths = list_images(data / f"class{label}")
        features = extract(teacher, torch.stack([read_image(path) for path in paths]))["features"]
        order = (features - features.mean(0)).square().sum(1).sqrt().argsort().tolist()
        names = [f"class{label}/{path.name}" for path in paths]
        for subset, kept in zip(SUBSETS, (order[:KEPT], order[-KEPT:]), strict=True):
            assert {names[index] for index in kept} <= set(record["subsets"][subset])
    assert record["images_per_subset"] == {"near": CLASSES * KEPT, "far": CLASSES * KEPT}


def test_the_distance_is_between_denoised_images_and_originals(record, folders, data, teacher):
    transformer = PixelREPAPipeline.from_pretrained(folders[1]).transformer
    numbers = {str(path.relative_to(data)): number for number, path in enumerate(list_images(data))}

    def velocity(z, t, label):
        t = torch.tensor(t)
        return transformer.velocity(transformer(z, t, label).sample, z, t)

    real, made = FeatureMoments(), FeatureMoments()
    for name in record["subsets"]["far"]:
        image, label = read_image(data / name)[None], torch.tensor([int(name[5])])
        noise = torch.randn(1, 3, 16, 16, generator=seeded([numbers[name]])[0])
        # Heun's method by hand from t = 0.2 on the grid of five steps; the last step is Euler's.
        z = 0.2 * (image / 127.5 - 1) + 0.8 * 2.0 * noise
        with torch.no_grad():
            for t in (0.2, 0.4, 0.6, 0.8):
                slope = velocity(z, t, label)
                if t < 0.8:
                    slope = (slope + velocity(z + 0.2 * slope, t + 0.2, label)) / 2
                z = z + 0.2 * slope
        made.update(extract(teacher, ((z + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8))["features"])
        real.update(extract(teacher, image)["features"])
    expected = FeatureStatistics.from_moments(made).distance(FeatureStatistics.from_moments(real))
    assert record["frechet_distance"]["second"]["far"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("solver", "late"), [("heun", [500, 250, 250]), ("euler", [500, 250])])
def test_a_late_start_at_the_first_grid_point_is_the_whole_grid(make_pipeline, solver, late):
    pipeline = make_pipeline(scheduler=JiTFlowMatchScheduler(solver=solver))
    whole = pipeline([1, 2], num_inference_steps=4, generator=seeded([0, 1]), output_type="np").images
    pipeline.scheduler = LateScheduler(solver=solver)
    again = pipeline([1, 2], num_inference_steps=4, generator=seeded([0, 1]), output_type="np").images
    np.testing.assert_array_equal(again, whole)
    pipeline.scheduler.start_time = 0.5
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == late


def test_two_processes_find_what_one_does(record, folders, data, tmp_path):
    in_two_processes(probe, folders, data, tmp_path)
    two = json.loads((tmp_path / "probe.json").read_text())
    assert two["subsets"] == record["subsets"]
    for name, pair in record["frechet_distance"].items():
        assert two["frechet_distance"][name] == pytest.approx(pair, rel=1e-9)


def test_table_and_plot_are_written_and_an_earlier_probe_is_kept(folders, data, tmp_path, capsys):
    probe(folders[:1] * 2, data, tmp_path, "--max_classes", 2)
    stored = json.loads((tmp_path / "probe.json").read_text())
    assert len(stored["classes"]) == 2 and stored["images_per_subset"]["near"] == 2 * KEPT
    assert stored["frechet_distance"]["first"] == stored["frechet_distance"]["second"]
    table = (tmp_path / "probe.md").read_text()
    assert table in capsys.readouterr().out
    assert f"| first | {stored['frechet_distance']['first']['near']:.4g} |" in table
    with Image.open(tmp_path / "probe.png") as image:
        assert min(image.size) > 100
    with pytest.raises(FileExistsError, match="--overwrite"):
        probe(folders, data, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images_per_class", PER_CLASS // 2 + 1), "images overlap"),
        (("--time", 0.3), "must be a step of"),
        (("--names", "same", "same"), "all different"),
        (("--pipelines", "ten", "ten"), "the 3 classes"),
    ],
)
def test_wrong_arguments_fail_before_anything_is_computed(
    folders, data, make_pipeline, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    make_pipeline().save_pretrained("ten")
    with pytest.raises(ValueError, match=message):
        probe(folders, data, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
