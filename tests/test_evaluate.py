"""evaluation.py and pipelines/evaluate.py: metrics of a set of images that depends on weights and settings alone."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file
from tiny import TEACHER_IMAGE_SIZE, TinyClassifier, encoder, random_images, reference_of
from training_runs import ROOT, TEACHER, launch_two
from transformers import HfArgumentParser

from pixelrepa_diffusers import PixelREPAPipeline
from pixelrepa_diffusers.commands import evaluate as script
from pixelrepa_diffusers.commands.evaluate import EvaluateArguments, main
from pixelrepa_diffusers.evaluation import (
    FeatureMoments,
    FeatureSpace,
    FeatureStatistics,
    InceptionScoreSums,
    accumulate,
    evaluate_pipeline,
    extract,
    file_images,
    list_images,
    open_spaces,
    pipeline_images,
    precision_recall,
    results,
)
from pixelrepa_diffusers.hub import card_for_folder, weights_sha256
from pixelrepa_diffusers.sampling import seeded


@pytest.fixture(scope="module")
def folder(make_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(id2label={index: f"digit {index}" for index in range(10)}, guidance_scale=2.0).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "real.npz"
    reference_of(encoder(), random_images(40)).save(path)
    return path


def words(folder, reference, output_dir, *options, num_samples=40, batch_size=8) -> list[str]:
    given = [
        *("--pipeline", folder, "--output_dir", output_dir, "--metrics", "fd_teacher", "--teacher", TEACHER),
        *("--teacher_image_size", TEACHER_IMAGE_SIZE, "--teacher_reference", reference, "--num_samples", num_samples),
        *("--num_inference_steps", 2, "--batch_size", batch_size, *options),
    ]
    return [str(word) for word in given]


def arguments(words: list[str]) -> EvaluateArguments:
    return HfArgumentParser(EvaluateArguments).parse_args_into_dataclasses(words)[0]


def evaluate(*args, **kwargs) -> list[dict]:
    return main(arguments(words(*args, **kwargs)))


def stop_after(monkeypatch, batches: int):
    """Makes the script end, as if killed, when it has sampled so many batches."""
    made = []

    def stopping(*args, **kwargs):
        make_images = pipeline_images(*args, **kwargs)

        def make(indices):
            if len(made) == batches:
                raise KeyboardInterrupt
            made.append(indices)
            return make_images(indices)

        return make

    monkeypatch.setattr(script, "pipeline_images", stopping)
    return made


# ------------------------------------------------------------------------------------------------------- the package


def test_streamed_metrics_equal_those_of_all_images_at_once(make_pipeline):
    network, real = TinyClassifier(), random_images(30)
    reference = reference_of(network, real)
    metrics = ["fid", "inception_score", "precision_recall"]
    spaces = open_spaces(metrics, 30, {"inception": lambda: network}, {"inception": reference})
    pipeline = make_pipeline(guidance_scale=1.5)
    values = evaluate_pipeline(pipeline, spaces, num_images=30, batch_size=7, seed=5, num_inference_steps=2)

    made = [
        pipeline(index % 10, generator=torch.Generator().manual_seed(5 + index), num_inference_steps=2).images[0]
        for index in range(30)
    ]
    outputs = extract(network, made)
    moments, scores = FeatureMoments(), InceptionScoreSums(30)
    moments.update(outputs["features"])
    scores.update(outputs["logits"], range(30))
    expected = {"fid": FeatureStatistics.from_moments(moments).distance(reference), **scores.compute()}
    expected |= precision_recall(outputs["features"].half(), reference.features)
    assert list(values) == ["fid", "inception_score", "inception_score_std", "precision", "recall"]
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-5), name


def test_images_are_as_many_of_each_class_and_those_the_pipeline_would_save(make_pipeline):
    pipeline = make_pipeline(guidance_scale=1.5)
    images = pipeline_images(pipeline, 20, seed=3, num_inference_steps=2)(range(20))
    saved = pipeline([*range(10), *range(10)], generator=seeded(range(3, 23)), num_inference_steps=2).images
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), np.stack([np.asarray(one) for one in saved]))


def test_online_evaluation_leaves_global_randomness_alone(make_pipeline):
    spaces = open_spaces(["inception_score"], 10, {"inception": TinyClassifier}, {})
    torch.manual_seed(0)
    before = torch.get_rng_state()
    evaluate_pipeline(make_pipeline(), spaces, num_images=10, num_inference_steps=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_chunks_and_batches_change_a_metric_by_rounding_only():
    network, images = TinyClassifier(), random_images(50)
    space = FeatureSpace("inception", network, ("fid",), reference_of(network, random_images(40, seed=2)))

    def value(**kwargs) -> float:
        return results(accumulate(lambda indices: images[list(indices)], 50, [space], **kwargs), [space])["fid"]

    assert value(batch_size=7, chunk_size=10) == pytest.approx(value(batch_size=50), rel=1e-10)


def test_a_kept_state_goes_on_to_the_bit_and_makes_no_image_twice(tmp_path):
    network, images, state = TinyClassifier(), random_images(50), tmp_path / "state.npz"
    reference = reference_of(network, random_images(40, seed=2))
    space = FeatureSpace("inception", network, ("fid", "inception_score", "precision_recall"), reference)
    made = []

    def make_images(indices):
        if state.exists() and len(made) == 3:  # in the middle of the second chunk
            raise KeyboardInterrupt
        made.append(list(indices))
        return images[list(indices)]

    options = {"num_shown": 3, "chunk_size": 16, "settings": {"seed": 0}}
    straight = accumulate(lambda indices: images[list(indices)], 50, [space], 8, **options)
    with pytest.raises(KeyboardInterrupt):
        accumulate(make_images, 50, [space], 8, state_path=state, **options)
    first, made[:] = made[:2], [None] * 9
    resumed = accumulate(make_images, 50, [space], 8, state_path=state, **options)
    assert sorted(index for batch in first + made[9:] for index in batch) == list(range(50))
    assert results(resumed, [space]) == results(straight, [space])
    np.testing.assert_array_equal(resumed.pictures(), straight.pictures())
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        accumulate(make_images, 50, [space], 8, state_path=state, **{**options, "settings": {"seed": 1}})


@pytest.mark.parametrize(
    "metrics, num_images, change, message",
    [
        (["fid", "kid"], 40, {}, "must be different ones of"),
        (["fid", "fid"], 40, {}, "must be different ones of"),
        ([], 40, {}, "must be different ones of"),
        (["fid"], 1, {}, "at least 2 images"),
        (["inception_score"], 9, {}, "at least 10 images"),
        (["precision_recall"], 3, {}, "at least 4 images"),
        (["fid"], 40, {"reference": None}, "--inception_reference"),
        (["precision_recall"], 40, {"features": None}, "--keep_features"),
        (["fid"], 40, {"network": TinyClassifier(seed=1)}, "another network"),
        (["fid"], 40, {"network": encoder}, "width 12"),
    ],
)
def test_what_a_metric_lacks_is_said_before_any_image_is_made(metrics, num_images, change, message):
    network = TinyClassifier()
    reference = reference_of(network, random_images(40))
    if "features" in change:
        reference.features = None
    network = change.get("network", network)
    load = network if callable(network) and not isinstance(network, torch.nn.Module) else lambda: network
    with pytest.raises(ValueError, match=message):
        open_spaces(metrics, num_images, {"inception": load}, {"inception": change.get("reference", reference)})


def test_models_and_numbers_that_cannot_be_evaluated_are_refused(make_pipeline):
    with pytest.raises(ValueError, match="1 channels"):
        pipeline_images(make_pipeline({"in_channels": 1}), 10)
    with pytest.raises(ValueError, match=r"multiple of the model's 10 classes.* got 44\. The nearest is 40"):
        pipeline_images(make_pipeline(), 44)
    with pytest.raises(ValueError, match="Seeds"):
        pipeline_images(make_pipeline(), 10, seed=2**63 - 5)
    with pytest.raises(ValueError, match="num_inference_steps"):
        pipeline_images(make_pipeline(), 10, num_inference_steps=0)


# -------------------------------------------------------------------------------------------------------- the script


def test_metrics_json_holds_all_it_takes_to_measure_again_and_feeds_the_card(folder, reference, tmp_path):
    (record,) = evaluate(folder, reference, tmp_path / "out", "--seed", 7)
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert stored == record
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.json", "grid.png", ".lock"}
    assert stored["weights_sha256"] == weights_sha256(folder / "transformer")
    assert (stored["num_samples"], stored["seeds"], stored["device"]) == (40, "7-46", "cpu")
    assert (stored["guidance_scale"], stored["guidance_interval"], stored["dtype"]) == (2.0, [0.1, 1.0], "float32")
    assert stored["references"]["teacher"]["sha256"] == FeatureStatistics.load(reference).sha256
    assert stored["versions"]["torch"] == torch.__version__

    again = main(arguments([*words(folder, reference, tmp_path / "again"), "--seed", "7"]))[0]
    assert again["metrics"] == stored["metrics"]
    card = card_for_folder(folder, "me/digits", tmp_path / "out" / "metrics.json")
    assert f"| {float(format(stored['metrics']['fd_teacher'], '.3g')):g} | lower |" in str(card)


def test_two_processes_measure_what_one_does(folder, reference, tmp_path):
    options = ("--metrics", "fd_teacher", "precision_recall_teacher", "--chunk_size", "16")
    (one,) = evaluate(folder, reference, tmp_path / "one", *options)
    record = tmp_path / "two" / "metrics.json"
    launch_two(ROOT / "pipelines" / "evaluate.py", words(folder, reference, tmp_path / "two", *options), record)
    two = json.loads(record.read_text())
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-10)
    assert (tmp_path / "two" / "grid.png").read_bytes() == (tmp_path / "one" / "grid.png").read_bytes()


def test_a_sweep_covers_every_combination_and_goes_on_where_it_stopped(folder, reference, tmp_path, monkeypatch):
    average = tmp_path / "checkpoint-5" / "transformer_ema_0.5"
    average.mkdir(parents=True)
    (average / "config.json").write_bytes((folder / "transformer" / "config.json").read_bytes())
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({k: 0.9 * v for k, v in weights.items()}, average / "diffusion_pytorch_model.safetensors")
    sweep = [
        *("--transformers", folder / "transformer", average, "--guidance_scales", 1, 3),
        *("--schedulers", "heun", "euler", "--guidance_intervals", "0:1", "0.4:1", "--chunk_size", 8),
    ]  # fmt: skip
    straight = evaluate(folder, reference, tmp_path / "straight", *sweep, num_samples=30)

    made = stop_after(monkeypatch, batches=6)  # the first cell's four batches and, of the second, two
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, reference, tmp_path / "stopped", *sweep, num_samples=30)
    assert len(list((tmp_path / "stopped").glob("*/metrics.json"))) == 1
    assert len(list((tmp_path / "stopped").glob("*/state.npz"))) == 1
    made.clear()
    stop_after(monkeypatch, batches=10**9)
    resumed = evaluate(folder, reference, tmp_path / "stopped", *sweep, num_samples=30)
    assert [one["metrics"] for one in resumed] == [one["metrics"] for one in straight]
    assert not list((tmp_path / "stopped").glob("*/state.npz"))

    rows = list(csv.DictReader((tmp_path / "straight" / "sweep.csv").open()))
    assert len(rows) == 16
    axes = ("transformer", "scheduler", "guidance_scale", "guidance_interval")
    assert {tuple(row[axis] for axis in axes) for row in rows} == {
        (transformer, scheduler, scale, interval)
        for transformer in (f"{folder.name}-transformer", "checkpoint-5-transformer_ema_0.5")
        for scheduler in ("heun", "euler")
        for scale in ("1", "3")
        for interval in ("0-1", "0.4-1")
    }
    # every axis acts, but for the interval of no guidance
    assert len({row["fd_teacher"] for row in rows}) == 12
    assert len({one["weights_sha256"] for one in straight}) == 2
    best = json.loads((tmp_path / "straight" / "sweep.json").read_text())["best"]["fd_teacher"]
    assert best == min(one["metrics"]["fd_teacher"] for one in straight)
    with Image.open(tmp_path / "straight" / "heatmap.png") as image:
        assert min(image.size) > 100


@pytest.mark.parametrize(("metric", "place"), [("fid", 1), ("inception_score", 2)])
def test_the_best_cell_has_the_lowest_distance_or_the_highest_score(metric, place):
    assert script.best([{"metrics": {metric: value, "fd_teacher": 0.0}} for value in (2.0, 1.0, 3.0)]) == place


def test_the_network_computes_in_the_type_asked_for(folder, reference, tmp_path):
    ((exact,), (rounded,)) = (evaluate(folder, reference, tmp_path / d, "--dtype", d) for d in ("float32", "bfloat16"))
    assert (exact["dtype"], rounded["dtype"]) == ("float32", "bfloat16")
    assert rounded["metrics"] != exact["metrics"]
    assert rounded["metrics"]["fd_teacher"] == pytest.approx(exact["metrics"]["fd_teacher"], rel=0.1)


def test_a_finished_evaluation_is_kept_unless_its_settings_changed(folder, reference, tmp_path, monkeypatch):
    (first,) = evaluate(folder, reference, tmp_path)
    made = stop_after(monkeypatch, batches=0)
    assert evaluate(folder, reference, tmp_path) == [first]
    with pytest.raises(ValueError, match="seeds was '0-39' and is '1-40'"):
        evaluate(folder, reference, tmp_path, "--seed", 1)
    assert json.loads((tmp_path / "metrics.json").read_text()) == first and not made
    monkeypatch.undo()
    (second,) = evaluate(folder, reference, tmp_path, "--seed", 1, "--overwrite")
    assert second["seeds"] == "1-40" and second["metrics"] != first["metrics"]


def test_a_folder_of_images_scores_as_the_pipeline_that_made_them(folder, reference, tmp_path):
    (expected,) = evaluate(folder, reference, tmp_path / "sampled")
    pipeline = PixelREPAPipeline.from_pretrained(folder)
    (tmp_path / "images").mkdir()
    for start in range(0, 40, 8):
        images = pipeline(
            [index % 10 for index in range(start, start + 8)],
            generator=seeded(range(start, start + 8)),
            num_inference_steps=2,
        ).images
        for index, image in enumerate(images, start=start):
            image.save(tmp_path / "images" / f"{index:04d}.png")
    common = words("unused", reference, tmp_path / "measured")
    at = common.index("--num_inference_steps")
    common = common[2:at] + common[at + 2 :]
    (record,) = main(arguments([*common, "--images", str(tmp_path / "images")]))
    assert record["metrics"] == expected["metrics"]
    Image.new("RGB", (50, 50)).save(tmp_path / "images" / "grid.png")
    with pytest.raises(ValueError, match=r"grid\.png has 50×50"):
        main(arguments([*common, "--num_samples", "41", "--images", str(tmp_path / "images")]))
    assert len(list_images(tmp_path / "images" / "0*.png")) == 40
    with pytest.raises(FileNotFoundError, match="No images"):
        list_images(tmp_path / "nothing")


def test_images_of_one_size_may_lie_on_their_side(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).save(tmp_path / "0.png")
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "1.png", exif=exif)
    upright, turned = file_images(list_images(tmp_path))([0, 1])
    assert torch.equal(upright, turned)
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"0\.png has 6×4 pixels, .*2\.png has 4×6"):
        file_images(list_images(tmp_path))


@pytest.mark.parametrize(
    "options, error, message",
    [
        (("--num_samples", 45), ValueError, "multiple of the model's 10 classes"),
        (("--metrics", "fid"), ValueError, "--inception_reference"),
        (("--teacher_reference", "missing.npz"), FileNotFoundError, r"missing\.npz"),
        (("--teacher_pooling", "patches"), ValueError, "another network"),
        (("--images", "here"), ValueError, "either --pipeline or --images"),
        (("--batch_size", 0), ValueError, "--batch_size"),
        (("--guidance_intervals", "0.5"), ValueError, "LOW:HIGH"),
        (("--guidance_intervals", "0.9:0.1"), ValueError, "low < high"),
        (("--guidance_scales", 2, "2.0"), ValueError, "more than once"),
        (("--transformers", "nowhere"), FileNotFoundError, "no transformer folder"),
    ],
)
def test_bad_arguments_are_refused_before_the_weights_are_read(folder, reference, tmp_path, options, error, message):
    config_only = tmp_path / "config-only"
    for name in ("model_index.json", "transformer/config.json"):
        (config_only / name).parent.mkdir(parents=True, exist_ok=True)
        (config_only / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(error, match=message):
        evaluate(config_only, reference, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
