"""The demo's three scripts, a few steps each: what `make demo` runs in full."""

import pytest
from accelerate.state import AcceleratorState, GradientState
from training_runs import ROOT, load_script

from pixelrepa_diffusers.teacher import SemanticTeacher


def test_the_demo_runs_from_nothing_to_a_score(tmp_path, capsys):
    prepare_teacher = load_script("examples/digits/prepare_teacher.py")
    score_digits = load_script("examples/digits/score_digits.py")
    train_pixelrepa = load_script("training/train_pixelrepa.py")

    from pixelrepa_diffusers.training.arguments import parse_arguments

    prepare_teacher.main(prepare_teacher.PrepareTeacherArguments(output_dir=str(tmp_path), steps=2))
    assert len(list((tmp_path / "train").glob("*/*.png"))) + len(list((tmp_path / "test").glob("*/*.png"))) == 1797
    assert SemanticTeacher.from_pretrained(tmp_path / "teacher", grid_size=4, image_size=16).feature_dim == 64
    with pytest.raises(SystemExit, match="already has train"):
        prepare_teacher.main(prepare_teacher.PrepareTeacherArguments(output_dir=str(tmp_path)))

    words = ["--config", str(ROOT / "training/configs/digits.yaml"), "--train_data_dir", str(tmp_path / "train")]
    words += ["--teacher_model_name_or_path", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "run")]
    words += ["--teacher_cache_dir", str(tmp_path / "teacher_features")]
    words += ["--max_train_steps", "2", "--train_batch_size", "8", "--validation_steps", "0", "--report_to", "none"]
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    folder = train_pixelrepa.main(parse_arguments(words))
    AcceleratorState._reset_state(True)

    capsys.readouterr()
    arguments = {"num_images": 20, "num_inference_steps": 2, "data_dir": str(tmp_path)}
    scores = score_digits.main(score_digits.ScoreArguments(pipeline=str(folder), **arguments))
    assert scores["classifier on held-out real digits"] >= 0.97
    assert {"recognised", "worst class", "precision (k=3)", "recall (k=3)"} <= scores["guidance 2"].keys()
    assert (tmp_path / "run/scores.json").exists()
    assert (tmp_path / "run/digits_guidance_2.png").exists()

    score_digits.main(score_digits.ScoreArguments(pipeline=str(folder), dtype="bfloat16", **arguments))
    assert (tmp_path / "run/scores_bfloat16.json").exists() and (tmp_path / "run/scores.json").exists()
