"""The demo: what `make demo` runs in full, in a few steps each."""

from pathlib import Path

import pytest
from training_runs import ROOT, load_script

from pixelrepa_diffusers.teacher import SemanticTeacher


def test_the_demo_runs_from_nothing_to_a_score(tmp_path):
    teacher = load_script("examples/digits/prepare_teacher.py")
    teacher.main(teacher.PrepareTeacherArguments(output_dir=tmp_path, steps=2))
    assert len(list(tmp_path.glob("train/*/*.png"))) == 1438 and len(list(tmp_path.glob("test/*/*.png"))) == 359
    assert SemanticTeacher.from_pretrained(tmp_path / "teacher", grid_size=4, image_size=16).feature_dim == 64
    with pytest.raises(FileExistsError, match="teacher exists"):
        teacher.main(teacher.PrepareTeacherArguments(output_dir=tmp_path))

    from pixelrepa_diffusers.training.arguments import parse_arguments

    words = ["--config", str(ROOT / "training/configs/digits.yaml"), "--train_data_dir", str(tmp_path / "train")]
    words += ["--teacher_model_name_or_path", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "run")]
    words += ["--teacher_cache_dir", str(tmp_path / "teacher_features")]
    words += ["--max_train_steps", "2", "--train_batch_size", "8", "--validation_steps", "0", "--report_to", "none"]
    folder = load_script("training/train_pixelrepa.py").main(parse_arguments(words))

    score = load_script("examples/digits/score_digits.py")
    sizes = {"num_images": 20, "num_inference_steps": 2, "data_dir": tmp_path}
    scores = score.main(score.ScoreArguments(pipeline=Path(folder), **sizes))
    assert scores["classifier on held-out real digits"] >= 0.97
    assert {"recognised", "worst class", "precision (k=3)", "recall (k=3)"} <= scores["guidance 2"].keys()
    assert (tmp_path / "run/digits_guidance_2.png").exists()

    score.main(score.ScoreArguments(pipeline=Path(folder), dtype="bfloat16", **sizes))
    assert (tmp_path / "run/scores_bfloat16.json").exists() and (tmp_path / "run/scores.json").exists()
