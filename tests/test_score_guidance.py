"""examples/digits/score_guidance.py: cells with and without self-guidance share their noise, and finished cells are kept."""

import json

import numpy as np
import pytest
from PIL import Image
from training_runs import load_script

from pixelrepa_diffusers import JiTGuidanceHead


script = load_script("examples/digits/score_guidance.py")


class MeanScorer:
    """In place of the demo's teacher and classifiers: every score is the mean of the pixels."""

    scored: list[np.ndarray] = []

    def __init__(self, data_dir):
        pass

    def draw_real(self, number: int, seed: int) -> np.ndarray:
        return np.full((number, 256), 0.5)

    def score(self, pixels: np.ndarray) -> dict[str, float]:
        self.scored.append(pixels)
        return dict.fromkeys(script.METRICS, float(pixels.mean()))


@pytest.fixture
def start(monkeypatch, make_transformer, make_pipeline, tmp_path):
    transformer = make_transformer()
    for number in range(2):
        head = JiTGuidanceHead.from_transformer(make_transformer(seed=1 + number))
        make_pipeline(transformer, guidance_head=head).save_pretrained(tmp_path / f"head{number}")
    monkeypatch.setattr(script, "Scorer", MeanScorer)
    monkeypatch.setattr(MeanScorer, "scored", [])

    def run(**changes) -> dict:
        settings = {
            "pipelines": [str(tmp_path / "head0"), str(tmp_path / "head1")],
            "output_file": tmp_path / "guidance.json",
            "guidance_scales": [1.5],
            "self_guidance_scales": [0.0, 0.5],
            "num_images": 10,
            "num_inference_steps": 2,
        }
        return script.main(script.ScoreGuidanceArguments(**{**settings, **changes}))

    return run


def test_each_pipeline_has_noise_of_its_own_and_the_same_in_every_cell(start, tmp_path):
    cells = start()
    assert set(cells) == {"real | –", "1.5 | 0", "1.5 | 0.5"}
    plain0, plain1, plain, guided0, guided1, _ = MeanScorer.scored[3:]  # after the real digits
    assert np.array_equal(plain, np.concatenate([plain0, plain1]))
    assert not np.array_equal(plain0, plain1) and not np.array_equal(plain0, guided0)

    MeanScorer.scored.clear()
    start(seed=10, pipelines=[str(tmp_path / "head1")], output_file=tmp_path / "other.json")
    assert np.array_equal(MeanScorer.scored[2], plain1) and np.array_equal(MeanScorer.scored[4], guided1)


def test_table_and_picture(start, tmp_path):
    cells = start(num_images=10, picture=tmp_path / "picture.png")
    one, other = (score["precision"] for score in cells["1.5 | 0.5"]["each"])
    table = (tmp_path / "guidance.md").read_text(encoding="utf-8")
    assert f"| 1.5 | 0.5 | each | {np.mean([one, other]):.3f} ± {np.std([one, other], ddof=1):.3f} |" in table
    assert "| real | – | together | 0.500 |" in table
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 21 * 16 and picture.height > 5 * 16


def test_finished_cells_are_kept_and_other_settings_refused(start, tmp_path):
    start(self_guidance_scales=[0.0])
    record = json.loads((tmp_path / "guidance.json").read_text())
    MeanScorer.scored.clear()
    cells = start()
    assert len(MeanScorer.scored) == 3 and record["cells"].items() <= cells.items()
    with pytest.raises(ValueError, match="scores of other settings"):
        start(num_images=20)
