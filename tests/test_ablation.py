"""training/run_ablation.py: arms that differ in the objective alone, measured alike, with their spread."""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from training_runs import ROOT, TEACHER, load_script

from pixelrepa_diffusers.evaluation import FeatureStatistics, VisionEncoderNetwork, extract


main = load_script("examples/digits/run_ablation.py").main
read_config = load_script("examples/digits/run_ablation.py").read_config


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Tiny runs on images of three digits: dark, grey, bright."""
    folder, draw = tmp_path_factory.mktemp("ablation"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 5)):
        for label in range(3):
            (folder / split / str(label)).mkdir(parents=True)
            for index in range(count):
                pixels = (80 * label + 60 * draw.random((16, 16))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / str(label) / f"{index}.png")
    training = {
        "train_data_dir": str(folder / "train"),
        "teacher_model_name_or_path": str(TEACHER),
        "preset": "JiT-Digits/4",
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "bottleneck_dim": 8,
        "in_context_len": 2,
        "in_context_start": 1,
        "train_batch_size": 8,
        "max_train_steps": 4,
        "learning_rate": 1e-2,
        "lr_warmup_steps": 1,
        "ema_decays": [0.5],
        "dataloader_num_workers": 0,
    }
    (folder / "training.yaml").write_text(yaml.safe_dump(training))
    ablation = {
        "output_dir": str(folder / "out"),
        "config": str(folder / "training.yaml"),
        "seeds": [0, 1],
        "arms": {"none": {"objective": "none"}, "unmasked": {"objective": "pixelrepa", "mask_ratio": 0}},
        "arguments": {"checkpointing_steps": 3, "validation_steps": 0, "report_to": "none"},
        "held_out_dir": str(folder / "test"),
        "classifier_dir": str(folder / "train"),
        "teacher": str(TEACHER),
        "image_size": 28,
        "num_samples": 30,
        "num_inference_steps": 2,
    }
    (folder / "ablation.yaml").write_text(yaml.safe_dump(ablation))
    return folder / "ablation.yaml"


@pytest.fixture(scope="module")
def finished(config):
    """The report of an ablation that was started with one seed and gone on with two."""
    args = read_config(config)
    args.seeds = [0]
    main(args)
    first = {path: path.stat().st_mtime_ns for path in Path(args.output_dir).glob("*/seed-0/result.json")}
    report = main(read_config(config))
    assert len(first) == 2 and all(path.stat().st_mtime_ns == time for path, time in first.items())
    return report


def test_every_arm_and_seed_is_measured_at_every_checkpoint(finished, config):
    folder = Path(read_config(config).output_dir)
    for arm in ("none", "unmasked"):
        assert [point["step"] for point in finished["arms"][arm]["curve"]] == [3, 4]
        for seed in (0, 1):
            result = json.loads((folder / arm / f"seed-{seed}" / "result.json").read_text())
            assert [point["step"] for point in result["curve"]] == [3, 4]
            assert result["training"]["seed"] == seed
            assert finished["arms"][arm]["final"]["fd_teacher"]["by_seed"][seed] == result["curve"][1]["fd_teacher"]


def test_arms_differ_in_the_objective_alone(finished, config):
    folder = Path(read_config(config).output_dir)
    none, unmasked = (
        json.loads((folder / arm / "seed-1" / "result.json").read_text())["training"] for arm in ("none", "unmasked")
    )
    assert {name for name in none if none[name] != unmasked[name]} == {"objective", "mask_ratio"}


def test_the_table_holds_mean_and_standard_deviation_over_the_seeds(finished, config):
    folder = Path(read_config(config).output_dir)
    assert json.loads((folder / "ablation.json").read_text())["arms"].keys() == finished["arms"].keys()
    final = finished["arms"]["unmasked"]["final"]["fd_teacher"]
    values = list(final["by_seed"].values())
    assert final["mean"] == pytest.approx(statistics.mean(values)) and values[0] != values[1]
    assert final["std"] == pytest.approx(statistics.stdev(values))
    table = (folder / "ablation.md").read_text()
    assert f"| unmasked | 2 | {final['mean']:.4g} ± {final['std']:.4g} |" in table
    assert "max_train_steps 4" in table
    with Image.open(folder / "curves.png") as image:
        assert min(image.size) > 100


def test_real_images_mark_what_can_be_reached(finished, config):
    args = read_config(config)
    network = VisionEncoderNetwork.from_pretrained(TEACHER, image_size=28)

    def moments(folder) -> FeatureStatistics:
        images = [Image.open(path).convert("RGB") for path in sorted(Path(folder).glob("*/*.png"))]
        features = extract(network, images)["features"].double().numpy()
        return FeatureStatistics(features.mean(0), np.cov(features.T), len(images))

    expected = moments(args.classifier_dir).distance(moments(args.held_out_dir))
    assert finished["real"]["fd_teacher"] == pytest.approx(expected, rel=1e-5)
    assert finished["real"]["recognised"] == 1.0


def test_finished_runs_of_other_settings_are_refused(finished, config, tmp_path):
    values = yaml.safe_load(config.read_text())
    values["arguments"]["learning_rate"] = 2e-2
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="another evaluation: training"):
        main(read_config(tmp_path / "changed.yaml"))


def test_runs_of_a_launcher_are_those_of_this_process(finished, config, tmp_path):
    values = yaml.safe_load(config.read_text())
    values |= {"output_dir": str(tmp_path), "seeds": [1], "launcher": [sys.executable]}
    (tmp_path / "launched.yaml").write_text(yaml.safe_dump(values | {"arms": {"none": {"objective": "none"}}}))
    launched = main(read_config(tmp_path / "launched.yaml"))["arms"]["none"]["final"]["fd_teacher"]["by_seed"]
    assert launched[1] == pytest.approx(finished["arms"]["none"]["final"]["fd_teacher"]["by_seed"][1], rel=1e-9)
    assert "Wrote" in (tmp_path / "none" / "seed-1" / "log.txt").read_text()


def test_a_run_that_fails_ends_the_ablation_with_its_log(config, tmp_path):
    (tmp_path / "fail.py").write_text("import sys; print('no luck'); sys.exit(3)")
    values = yaml.safe_load(config.read_text())
    values |= {"output_dir": str(tmp_path), "launcher": [sys.executable, str(tmp_path / "fail.py")]}
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(RuntimeError, match=r"(?s)none, seed 0.*status 3.*no luck"):
        main(read_config(tmp_path / "new.yaml"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arms": {"longer": {"objective": "none", "max_train_steps": 9}}}, "no objective argument"),
        ({"arms": {}}, "at least one arm"),
        ({"seeds": [1, 1]}, "no seed twice"),
        ({"arms": {"a/b": {}}}, "folder's"),
        ({"nonsense": 1}, r"unknown names \['nonsense'\]"),
        ({"num_samples": 31}, "multiple of the 3 classes"),
    ],
)
def test_bad_configurations_are_refused_before_the_first_run(config, tmp_path, change, message):
    values = yaml.safe_load(config.read_text())
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path / "out"), **change}))
    with pytest.raises(ValueError, match=message):
        main(read_config(tmp_path / "bad.yaml"))
    assert not (tmp_path / "out").exists()


def test_the_digits_ablation_covers_the_papers_arms():
    args = read_config(ROOT / "examples" / "digits" / "ablation.yaml")
    arms = list(args.arms.values())
    assert {"objective": "none"} in arms and {"objective": "repa"} in arms
    assert {arm["mask_ratio"] for arm in arms if arm["objective"] == "pixelrepa"} >= {0, 0.2}
    assert len(args.seeds) >= 2
