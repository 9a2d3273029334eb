"""examples/digits/run_ablation.py: arms that differ in the objective alone, measured alike, with their spread."""

import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import reset_accelerate_state
from PIL import Image
from training_runs import ROOT, SETTINGS, TEACHER, load_script, train

from pixelrepa_diffusers.evaluation import FeatureStatistics, VisionEncoderNetwork, extract


ablation = load_script("examples/digits/run_ablation.py")


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict:
    """An ablation of tiny runs on images of three digits: dark, grey, bright."""
    folder, draw = tmp_path_factory.mktemp("ablation"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 5)):
        for label in range(3):
            (folder / split / str(label)).mkdir(parents=True)
            for index in range(count):
                pixels = (80 * label + 60 * draw.random((16, 16))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / str(label) / f"{index}.png")
    training = {"train_data_dir": str(folder / "train"), "max_train_steps": 4}
    (folder / "training.yaml").write_text(yaml.safe_dump(SETTINGS | training))
    return {
        "output_dir": str(folder / "out"),
        "config": str(folder / "training.yaml"),
        "seeds": [0, 1],
        "arms": {"none": {"objective": "none"}, "unmasked": {"objective": "pixelrepa", "mask_ratio": 0}},
        "arguments": {"checkpointing_steps": 3},
        "held_out_dir": str(folder / "test"),
        "classifier_dir": str(folder / "train"),
        "teacher": str(TEACHER),
        "image_size": 28,
        "num_samples": 30,
        "num_inference_steps": 2,
    }


@pytest.fixture(scope="module")
def start(values, tmp_path_factory):
    """start(**changes) runs the ablation as its YAML file says."""

    def run(**changes) -> dict:
        path = tmp_path_factory.mktemp("config") / "ablation.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}))
        return ablation.main(ablation.read_config(path))

    return run


def train_here(words: list[str], **_) -> SimpleNamespace:
    """In place of `subprocess.run`: interpreters of their own would spend a minute on imports."""
    assert words[:2] == [sys.executable, str(ablation.TRAINER)]
    reset_accelerate_state()
    train(words[2:])
    return SimpleNamespace(returncode=0)


@pytest.fixture(scope="module")
def report(start, values) -> dict:
    """The report of an ablation that was started with one seed and continued with two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "subprocess", SimpleNamespace(run=train_here, STDOUT=None))
        start(seeds=[0])
        written = {path: path.stat().st_mtime_ns for path in Path(values["output_dir"]).glob("*/seed-0/result.json")}
        report = start()
    assert len(written) == 2 and all(path.stat().st_mtime_ns == time for path, time in written.items())
    return report


def result(values, arm, seed) -> dict:
    return json.loads(Path(values["output_dir"], arm, f"seed-{seed}", "result.json").read_text())


def test_every_arm_and_seed_is_measured_at_every_checkpoint_and_the_table_holds_their_spread(report, values):
    for arm in ("none", "unmasked"):
        assert [point["step"] for point in report["arms"][arm]["curve"]] == [3, 4]
        for seed in (0, 1):
            last = result(values, arm, seed)["curve"][-1]
            assert last["step"] == 4
            assert report["arms"][arm]["final"]["fd_teacher"]["by_seed"][seed] == last["fd_teacher"]

    final = report["arms"]["unmasked"]["final"]["fd_teacher"]
    by_seed = list(final["by_seed"].values())
    assert by_seed[0] != by_seed[1]
    assert final["mean"] == pytest.approx(statistics.mean(by_seed))
    assert final["std"] == pytest.approx(statistics.stdev(by_seed))
    folder = Path(values["output_dir"])
    assert f"| unmasked | 2 | {final['mean']:.4g} ± {final['std']:.4g} |" in (folder / "ablation.md").read_text()
    assert (folder / "ablation.json").exists() and (folder / "curves.png").exists()


def test_arms_differ_in_the_objective_alone(report, values):
    none, unmasked = (result(values, arm, 1)["training"] for arm in ("none", "unmasked"))
    assert none["seed"] == 1
    assert {name for name in none if none[name] != unmasked[name]} == {"objective", "mask_ratio"}


def test_real_images_give_an_upper_bound(report, values):
    network, statistics = VisionEncoderNetwork.from_pretrained(TEACHER, image_size=28), []
    for folder in (values["classifier_dir"], values["held_out_dir"]):
        images = [Image.open(path).convert("RGB") for path in sorted(Path(folder).glob("*/*.png"))]
        features = extract(network, images)["features"].double().numpy()
        statistics.append(FeatureStatistics(features.mean(0), np.cov(features.T), len(images)))
    assert report["real"]["fd_teacher"] == pytest.approx(statistics[0].distance(statistics[1]), rel=1e-5)
    assert report["real"]["recognised"] == 1.0


def test_a_failed_run_of_the_launcher_ends_the_ablation_with_its_log(start, tmp_path):
    (tmp_path / "fail.py").write_text("import sys; print('no luck', sys.argv[1:3]); sys.exit(3)")
    with pytest.raises(SystemExit, match=r"(?s)none, seed 0.*status 3.*no luck.*train_pixelrepa.py', '--config"):
        start(output_dir=str(tmp_path / "out"), launcher=[sys.executable, str(tmp_path / "fail.py")])


def test_finished_runs_with_other_settings_are_refused(report, start, values):
    with pytest.raises(ValueError, match="another evaluation"):
        start(arguments={**values["arguments"], "learning_rate": 2e-2})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arms": {"longer": {"objective": "none", "max_train_steps": 9}}}, "objective arguments only"),
        ({"nonsense": 1}, "nonsense"),
        ({"num_samples": 31}, "multiple of the 3 classes"),
    ],
)
def test_bad_configurations_are_refused_before_the_first_run(start, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        start(output_dir=str(tmp_path / "out"), **change)
    assert not (tmp_path / "out").exists()


def test_the_digits_ablation_covers_the_papers_arms():
    args = ablation.read_config(ROOT / "examples/digits/ablation.yaml")
    arms = list(args.arms.values())
    assert {"objective": "none"} in arms and {"objective": "repa"} in arms
    assert {arm["mask_ratio"] for arm in arms if arm["objective"] == "pixelrepa"} >= {0, 0.2}
    assert len(args.seeds) >= 2
