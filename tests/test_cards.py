"""Model cards: metadata that the Hub accepts, figures with a source, and no local paths."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from standin_hub import card_errors

from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline, get_preset
from pixelrepa_diffusers.hub import PAPER_RESULTS, build_card, card_for_folder, read_metrics, weights_sha256
from pixelrepa_diffusers.presets import imagenet_id2label


CARDS = Path(__file__).parents[1] / "model_cards"
RELEASES = {
    "pixelrepa-b-16": "JiT-B/16",
    "pixelrepa-l-16": "JiT-L/16",
    "pixelrepa-h-16": "JiT-H/16",
    "pixelrepa-digits": "JiT-Digits/4",
}
METRICS = {
    "metrics": {"fid": 12.3456, "inception_score": 45.6, "precision_dinov2": 0.71},
    "num_samples": 1000,
    "reference": "digits-train.npz",
    "device": "cpu",
    "guidance_scale": 2.0,
    "wanted": ["fid"],
    "seconds": 31.4,
}
TRAINING = {
    "objective": "pixelrepa",
    "teacher_model_name_or_path": "facebook/dinov2-base",
    "dataset_name": "ylecun/mnist",
    "pretrained_model_name_or_path": "someone/jit",
    "train_data_dir": "/home/somebody/images",
    "steps": 321,
    "images_seen": 41088,
    "alignment_weight": 0.1,
    "ema_decays": [0.9999, 0.9996],
}


@pytest.fixture(scope="module")
def pipeline(make_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    names = {0: "zero, nought", 1: "one", 2: "two"}
    make_pipeline({"num_classes": 3}, id2label=names, guidance_scale=2.0).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(pipeline, tmp_path):
    """A pipeline with all the records that a card reads."""
    folder = Path(shutil.copytree(pipeline, tmp_path / "pipeline"))
    write_json(folder / "training_arguments.json", TRAINING)
    write_json(folder / "metrics.json", METRICS)
    (folder / "samples.png").write_bytes(b"")
    return folder


def write_json(path: Path, content: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def section(card, heading: str) -> str:
    return str(card).split(f"\n## {heading}\n")[1].partition("\n## ")[0]


def metadata(card) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---", str(card), re.DOTALL)[1])


@pytest.mark.parametrize("name", RELEASES)
def test_released_cards_are_up_to_date_and_quote_the_paper_in_one_section(name):
    spec = importlib.util.spec_from_file_location("build_cards", CARDS / "build_cards.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert text == builder.build(name), "run `python model_cards/build_cards.py`"
    assert card_errors(text) == []
    data = ModelCard(text).data
    assert data.library_name == "diffusers" and data.pipeline_tag == "unconditional-image-generation"
    assert {"jit", "pixelrepa", "class-conditional-image-generation"} <= set(data.tags)
    assert ("## The paper's results" in text) == (name != "pixelrepa-digits")
    if name != "pixelrepa-digits":
        assert data.datasets == ["ILSVRC/imagenet-1k"] and metadata(text)["teacher"] == "facebook/dinov2-base"
        assert data.license == "other" and data.license_link
    for value in (str(value) for pair in PAPER_RESULTS.get(RELEASES[name], {}).values() for value in pair):
        assert value in section(text, "The paper's results") and text.count(value) == 1


def test_measured_figures_are_rounded_explained_and_sourced(folder):
    card = card_for_folder(folder, "me/digits")
    measured = section(card, "Measured results")
    for line in (
        "| FID | 12.3 | lower |",
        "| Inception Score | 45.6 | higher |",
        "| Precision | 0.71 | higher |",
        "| samples | 1,000 |",
        "| reference statistics | digits-train.npz |",
        "| device | cpu |",
    ):
        assert line in measured
    assert "in DINOv2 features" in measured and "wanted" not in measured and "31.4" not in measured
    assert card_errors(str(card)) == []
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"fid": 12.3, "inception_score": 45.6, "precision_dinov2": 0.71}

    write_json(folder / "metrics.json", {**METRICS, "num_samples": 50_000})
    assert "| FID | 12.35 |" in str(card_for_folder(folder, "me/digits"))


def test_training_is_described_from_the_saved_arguments(folder):
    card = card_for_folder(folder, "me/digits", revision="checkpoint-5")
    for line in (
        "| fine-tuned from | someone/jit |",
        "| data set | ylecun/mnist |",
        "| teacher | facebook/dinov2-base |",
        "| optimizer steps | 321 |",
        "| images seen | 41,088 |",
        "| EMA decays | 0.9999, 0.9996 |",
    ):
        assert line in section(card, "Training")
    assert card.data.datasets == ["ylecun/mnist"] and card.data.base_model == "someone/jit"
    assert metadata(card)["teacher"] == "facebook/dinov2-base"
    assert "![" in section(card, "Samples") and "/home/somebody" not in str(card)
    code = section(card, "How to use")
    assert 'from_pretrained("me/digits", revision="checkpoint-5", trust_remote_code=True)' in code
    assert 'pipe(["zero", 2]' in code


def test_local_teacher_and_data_set_are_not_named_unless_asked(folder):
    local = dict.fromkeys(("teacher_model_name_or_path", "dataset_name"), "a local folder")
    write_json(folder / "training_arguments.json", TRAINING | local)
    card = card_for_folder(folder, "me/digits")
    assert card.data.datasets is None and "an image encoder" in str(card) and "a local folder" not in str(card)
    card = card_for_folder(folder, "me/digits", teacher="a small ViT", dataset="my digits")
    assert "| data set | my digits |" in str(card) and "frozen teacher (a small ViT)" in str(card)
    assert card.data.datasets is None and card_errors(str(card)) == []


def test_unknown_facts_are_not_claimed(pipeline):
    card = card_for_folder(pipeline, "me/digits")
    assert "is not recorded" in section(card, "Training")
    assert "No results have been measured" in section(card, "Measured results")
    assert "## Samples" not in str(card) and "trained with" not in str(card) and "pixelrepa" not in card.data.tags
    assert card.data.license is None and "No licence is stated" in str(card)


@pytest.mark.parametrize(
    "objective, words", [("none", "without alignment"), ("repa", "2410.06940"), ("irepa", "2512.10794")]
)
def test_baselines_are_not_called_pixelrepa(folder, objective, words):
    write_json(folder / "training_arguments.json", TRAINING | {"objective": objective})
    card = card_for_folder(folder, "me/digits")
    assert words in str(card) and "pixelrepa" not in card.data.tags
    assert ("alignment weight" in str(card)) == (objective != "none")


def test_model_with_one_class_is_called_unconditional():
    config = {**get_preset("JiT-B/16").transformer_config(), "num_classes": 1}
    card = build_card("me/x", config, {"id2label": None, "guidance_scale": 1.0, "guidance_interval": (0.1, 1.0)})
    assert "Unconditional 256 × 256 images" in str(card) and "class-conditional" not in str(card).lower()
    assert "pipe(generator=" in str(card) and "The paper's results" not in str(card)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_samples": None}, "does not say num_samples"),
        ({"reference": ""}, "does not say reference"),
        ({"weights_sha256": "0" * 64}, "other weights"),
    ],
)
def test_metrics_without_a_source_or_of_other_weights_are_refused(folder, change, message):
    write_json(folder / "metrics.json", METRICS | {"weights_sha256": weights_sha256(folder / "transformer")})
    card_for_folder(folder, "me/digits")
    write_json(folder / "metrics.json", METRICS | change)
    with pytest.raises(ValueError, match=message):
        card_for_folder(folder, "me/digits")


def test_sweep_stands_for_its_best_cell(folder, tmp_path):
    for cell, fid in {"cell-1": 9.5, "cell-2": 3.25}.items():
        write_json(tmp_path / "sweep" / cell / "metrics.json", METRICS | {"metrics": {"fid": fid}, "seeds": cell})
    sweep = write_json(tmp_path / "sweep" / "sweep.json", {"cells": [], "best": {"folder": "cell-2", "fid": 3.25}})
    assert read_metrics(folder, sweep)["seeds"] == "cell-2"
    assert "| FID | 3.25 |" in str(card_for_folder(folder, "me/digits", sweep))


def test_description_may_hold_numbers_but_no_results(folder):
    description = "This is a model trained on 8 GPUs in 3 days."
    assert description in str(card_for_folder(folder, "me/digits", description=description))
    for result in ("It reaches an FID of 2.11.", "fid-50k: 3.2", "The inception score\nis 309.5.", "12 images/s."):
        with pytest.raises(ValueError, match="without a source"):
            card_for_folder(folder, "me/digits", description=result)


def test_published_presets_take_imagenet_class_names():
    names = imagenet_id2label()
    assert list(names) == list(range(1000)) and names[207] == "golden retriever"
    with torch.device("meta"):
        transformer = JiTTransformer2DModel(**get_preset("JiT-B/16").transformer_config())
    pipe = PixelREPAPipeline(transformer, JiTFlowMatchScheduler(), names)
    assert pipe.get_label_ids(["Tinca tinca", "otter", 5]) == [0, 360, 5]
