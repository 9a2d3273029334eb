"""Model cards: metadata the Hub accepts, figures that have a source, names for ImageNet's classes."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from standin_hub import card_errors

from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline, get_preset
from pixelrepa_diffusers.hub import (
    PAPER_HEADING,
    PAPER_RESULTS,
    build_card,
    card_for_folder,
    check_figures,
    imagenet_id2label,
    redact,
    weights_sha256,
)


CARDS = Path(__file__).parents[1] / "model_cards"
RELEASES = ("pixelrepa-b-16", "pixelrepa-l-16", "pixelrepa-h-16", "pixelrepa-digits")
METRICS = {
    "metrics": {"fid": 12.3456, "inception_score": 45.6},
    "num_samples": 1000,
    "reference": "digits-train.npz",
    "device": "cpu",
    "guidance_scale": 2.0,
    "versions": {"torch": "2.13.0"},
}
TRAINING = {
    "objective": "pixelrepa",
    "teacher_model_name_or_path": "facebook/dinov2-base",
    "dataset_name": "ylecun/mnist",
    "train_data_dir": "/home/somebody/images",
    "output_dir": "/home/somebody/run",
    "steps": 321,
    "images_seen": 41088,
    "mixed_precision": "bf16",
    "ema_decays": [0.9999, 0.9996],
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    torch.manual_seed(0)
    transformer = JiTTransformer2DModel(
        sample_size=8, patch_size=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, bottleneck_dim=8,
        in_context_len=2, in_context_start=1, num_classes=3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pipeline")
    names = {0: "zero, nought", 1: "one", 2: "two"}
    PixelREPAPipeline(transformer, JiTFlowMatchScheduler(), names, guidance_scale=2.0).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(pipeline, tmp_path):
    """The pipeline with everything a card can tell of."""
    for path in pipeline.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(pipeline)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (tmp_path / "training_arguments.json").write_text(json.dumps(TRAINING))
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "samples.png").write_bytes(b"")
    return tmp_path


def section(card, heading: str) -> str:
    return str(card).split(f"\n## {heading}\n")[1].partition("\n## ")[0]


def metadata(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---", text, re.DOTALL)[1])


@pytest.mark.parametrize("name", RELEASES)
def test_released_cards_are_what_the_template_and_their_sources_give(name):
    spec = importlib.util.spec_from_file_location("build_cards", CARDS / "build_cards.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    assert set(builder.RELEASES) == set(RELEASES)
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert text == builder.build(name), "run `python model_cards/build_cards.py`"


@pytest.mark.parametrize("name", RELEASES)
def test_released_cards_carry_metadata_the_hub_accepts(name):
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert card_errors(text) == []
    data = ModelCard(text).data
    assert data.library_name == "diffusers" and data.pipeline_tag == "unconditional-image-generation"
    assert {"jit", "pixelrepa", "class-conditional-image-generation"} <= set(data.tags)
    if name != "pixelrepa-digits":
        assert data.datasets == ["ILSVRC/imagenet-1k"] and metadata(text)["teacher"] == "facebook/dinov2-base"
        assert data.license == "other" and data.license_link


@pytest.mark.parametrize("name", RELEASES)
def test_the_papers_numbers_stand_only_in_the_section_that_calls_them_the_papers(name):
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    results = PAPER_RESULTS.get(
        name.replace("pixelrepa-", "JiT-").replace("-b-", "-B/").replace("-l-", "-L/").replace("-h-", "-H/")
    )
    if name == "pixelrepa-digits":
        assert PAPER_HEADING not in text
        return
    quoted = section(text, PAPER_HEADING)
    assert "Quoted from the paper" in quoted and "not measurements" in quoted
    for value in (str(number) for pair in results.values() for number in pair):
        assert value in quoted and text.count(value) == quoted.count(value)
    assert "model-index" not in metadata(text)


def test_a_folders_card_states_its_metrics_with_their_source(folder):
    card = card_for_folder(folder, "me/digits")
    measured = section(card, "Measured results")
    for line in (
        "| fid | 12.3456 |",
        "| inception_score | 45.6 |",
        "| num_samples | 1000 |",
        "| reference | digits-train.npz |",
        "| device | cpu |",
    ):
        assert line in measured
    assert "versions" not in measured
    assert card_errors(str(card)) == []
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == METRICS["metrics"] and card.data.model_name == "digits"
    assert card.data.eval_results[0].dataset_name == "digits-train.npz"


def test_a_folders_card_tells_the_training_from_the_saved_arguments(folder):
    card = card_for_folder(folder, "me/digits")
    training = section(card, "Training")
    for line in (
        "| steps | 321 |",
        "| images_seen | 41088 |",
        "| ema_decays | [0.9999, 0.9996] |",
        "| dataset_name | ylecun/mnist |",
    ):
        assert line in training
    assert card.data.datasets == ["ylecun/mnist"] and metadata(str(card))["teacher"] == "facebook/dinov2-base"
    assert "![" in section(card, "Samples")
    assert "/home/somebody" not in str(card)


def test_a_teacher_or_data_set_on_a_local_disk_is_not_named(folder):
    local = {**TRAINING, "teacher_model_name_or_path": "/home/somebody/teacher", "dataset_name": str(folder)}
    (folder / "training_arguments.json").write_text(json.dumps(local))
    card = card_for_folder(folder, "me/digits")
    assert "/home/somebody" not in str(card) and str(folder) not in str(card)
    assert card.data.datasets is None and "an image encoder" in str(card)


def test_a_card_says_what_is_not_known_and_claims_no_method(pipeline):
    card = card_for_folder(pipeline, "me/digits")
    assert "is not recorded" in section(card, "Training")
    assert section(card, "Measured results").strip() == "Nothing has been measured with these weights."
    assert "## Samples" not in str(card) and "trained with" not in str(card) and "pixelrepa" not in card.data.tags


@pytest.mark.parametrize(
    "objective, words", [("none", "without alignment"), ("repa", "2410.06940"), ("irepa", "2512.10794")]
)
def test_a_baselines_card_does_not_call_it_pixelrepa(folder, objective, words):
    (folder / "training_arguments.json").write_text(json.dumps({**TRAINING, "objective": objective}))
    card = card_for_folder(folder, "me/digits")
    assert words in str(card) and "pixelrepa" not in card.data.tags


@pytest.mark.parametrize("missing", ["metrics", "num_samples", "reference", "device"])
def test_metrics_without_their_source_fail_the_card(folder, missing):
    (folder / "metrics.json").write_text(
        json.dumps({name: value for name, value in METRICS.items() if name != missing})
    )
    with pytest.raises(ValueError, match=f"'{missing}'.*source"):
        card_for_folder(folder, "me/digits")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "3.2", True, None])
def test_a_metric_that_is_no_finite_number_fails_the_card(folder, value):
    (folder / "metrics.json").write_text(json.dumps({**METRICS, "metrics": {"fid": value}}))
    with pytest.raises(ValueError, match="finite number"):
        card_for_folder(folder, "me/digits")


def test_metrics_of_other_weights_fail_the_card(folder):
    (folder / "metrics.json").write_text(
        json.dumps({**METRICS, "weights_sha256": weights_sha256(folder / "transformer")})
    )
    card_for_folder(folder, "me/digits")
    (folder / "metrics.json").write_text(json.dumps({**METRICS, "weights_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="other weights"):
        card_for_folder(folder, "me/digits")


@pytest.mark.parametrize(
    "description",
    [
        "It reaches an FID of 2.11.",
        "fid-50k: 3.2",
        "| FID | IS |\n|---|---|\n| 2.11 | 309.5 |",
        "The inception score\nis 309.5 at best.",
        "It makes 12 images per second.",
    ],
)
def test_a_figure_without_a_source_fails_the_card(folder, description):
    with pytest.raises(ValueError, match="without a source"):
        card_for_folder(folder, "me/digits", description=description)


def test_text_without_results_may_have_numbers(folder):
    assert "on 8 GPUs in 3 days" in str(
        card_for_folder(folder, "me/digits", description="Trained on 8 GPUs in 3 days.")
    )


def test_a_figure_may_not_move_to_another_section():
    card = "---\na: b\n---\n\n# Title\n\n## Measured results\n\nFID 3.5\n\n## Other\n\nwords\n"
    check_figures(card, {"Measured results": {"3.5"}})
    for text in (card.replace("words", "FID 3.5"), card.replace("3.5", "3.4"), card.replace("# Title", "# FID 3.5")):
        with pytest.raises(ValueError, match="without a source"):
            check_figures(text, {"Measured results": {"3.5"}})


def test_the_license_other_needs_a_name_and_a_link(folder):
    with pytest.raises(ValueError, match="license_link"):
        card_for_folder(folder, "me/digits", license="other")
    card = card_for_folder(folder, "me/digits", license="other", license_name="mine", license_link="LICENSE")
    assert card_errors(str(card)) == []


def test_snippets_are_python_and_use_names_the_model_knows(folder):
    card = card_for_folder(folder, "me/digits", revision="checkpoint-5")
    code = re.search(r"```python\n(.*?)```", str(card), re.DOTALL)[1]
    ast.parse(code)
    assert 'from_pretrained("me/digits", revision="checkpoint-5", trust_remote_code=True)' in code
    assert 'pipe(["zero", 2]' in code


def test_a_card_built_twice_is_the_same(folder):
    assert str(card_for_folder(folder, "me/digits")) == str(card_for_folder(folder, "me/digits"))


def test_imagenet_names_are_the_thousand_classes_in_order():
    names = imagenet_id2label()
    assert list(names) == list(range(1000))
    assert (names[0], names[207], names[360], names[999].partition(",")[0]) == (
        "tench, Tinca tinca", "golden retriever", "otter", "toilet tissue",
    )  # fmt: skip


@pytest.mark.parametrize("preset", ["JiT-B/16", "JiT-H/32"])
def test_published_presets_take_class_names(preset):
    with torch.device("meta"):
        transformer = JiTTransformer2DModel(**get_preset(preset).transformer_config())
    pipe = PixelREPAPipeline(transformer, JiTFlowMatchScheduler(), imagenet_id2label())
    assert pipe.get_label_ids("golden retriever") == [207]
    assert pipe.get_label_ids(["Tinca tinca", "otter", 5]) == [0, 360, 5]
    with pytest.raises(ValueError, match=r"\[134, 517\]"):
        pipe.get_label_ids("crane")
    with pytest.raises(ValueError, match="golden retriever"):
        pipe.get_label_ids("golden retreiver")


def test_secrets_are_taken_out_of_arguments_and_text(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    arguments = {
        "hub_token": "anything", "api_key": "k", "password": "p", "num_tokens": 256, "HF_TOKEN": None,
        "nested": [{"auth_token": "x"}, "log in with hf_" + "b" * 34], "url": "https://me:secret@host/x",
        "command": "--hub_token hf_" + "a" * 34, "header": "Bearer abc.def", "steps": 3,
    }  # fmt: skip
    assert redact(arguments) == {
        "hub_token": "<redacted>", "api_key": "<redacted>", "password": "<redacted>", "num_tokens": 256, "HF_TOKEN": None,
        "nested": [{"auth_token": "<redacted>"}, "log in with <redacted>"], "url": "https://<redacted>@host/x",
        "command": "--hub_token <redacted>", "header": "Bearer <redacted>", "steps": 3,
    }  # fmt: skip
    assert redact("the token is s3cr3t!", token="s3cr3t!") == "the token is <redacted>"


def test_build_card_needs_no_folder():
    config = {**get_preset("JiT-B/16").transformer_config(), "t_eps": 0.05}
    card = build_card("me/x", config, {"id2label": None, "guidance_scale": 3.1, "guidance_interval": (0.1, 1.0)})
    assert "pipe([0, 999]" in str(card) and PAPER_HEADING in str(card)
