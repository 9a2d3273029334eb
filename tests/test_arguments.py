"""Training arguments: defaults, configuration files, ranges and rules."""

import json

import pytest
from accelerate.state import AcceleratorState
from training_runs import ROOT, TRAINER, load_script

from pixelrepa_diffusers.training.arguments import TrainingArguments, parse_arguments


CONFIGS = sorted((ROOT / "training/configs").glob("*_[blh][13]?.yaml"))


def test_defaults_are_the_published_recipe():
    # PixelREPA, arXiv 2603.14366, and its code.
    published = {
        "alignment_weight": 0.1, "mask_ratio": 0.2, "label_drop_prob": 0.1, "P_mean": -0.8, "P_std": 0.8,
        "adapter_layers": 2, "teacher_mode": "resample", "teacher_model_name_or_path": "facebook/dinov2-base",
        "learning_rate": 2e-4, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_weight_decay": 0.0, "max_grad_norm": None,
        "ema_decays": [0.9999, 0.9996], "ema_update_every": 1, "num_train_epochs": 600, "center_crop": True,
        "random_flip": True, "lr_scheduler": "constant_with_warmup",
    }  # fmt: skip
    args = TrainingArguments()
    assert {name: getattr(args, name) for name in published} == published


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_passes_a_dry_run_of_eight_processes(config, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    AcceleratorState._reset_state(True)
    load_script(TRAINER).main(parse_arguments(["--config", str(config), "--dry_run", "--dry_run_processes", "8"]))
    printed = capsys.readouterr().out
    report = json.loads(printed[printed.index("{") :])
    name, size = config.stem.split("_")
    assert report["arguments"]["objective"] == {"jit": "none"}.get(name, name)
    assert report["arguments"]["output_dir"] == f"outputs/{config.stem}"
    assert report["global_batch_size"] == 1024
    assert report["launch_file"] == f"training/accelerate/{'fsdp2' if '_h' in config.stem else '8gpu'}.yaml"
    assert report["learning_rate"] == pytest.approx(2e-4)
    assert report["steps"] == 600 * 1251
    assert report["warmup_steps"] == 5 * 1251
    millions = {"b16": 131, "l16": 459, "h16": 953, "b32": 133, "l32": 462, "h32": 956}[size]
    assert report["parameters"]["transformer"] / 1e6 == pytest.approx(millions, rel=0.01)


def test_command_line_overrides_file_and_file_overrides_base(tmp_path):
    (tmp_path / "base.yaml").write_text("learning_rate: 5e-5\nema_decays: [0.9, 0.8]\nuse_ema: false\nseed: 3\n")
    (tmp_path / "config.yaml").write_text("base: base.yaml\nmax_grad_norm: null\nseed: 4\n")
    args = parse_arguments(["--config", str(tmp_path / "config.yaml"), "--learning_rate", "1e-3"])
    assert (args.learning_rate, args.ema_decays, args.use_ema, args.seed) == (1e-3, [0.9, 0.8], False, 4)


@pytest.mark.parametrize(
    ("text", "message"), [("lerning_rate: 1", "unrecognized arguments: --lerning_rate"), ("- a", "`name: value`")]
)
def test_wrong_config_file_is_refused(tmp_path, text, message, capsys):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parse_arguments(["--config", str(tmp_path / "config.yaml")])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mask_ratio 1.5", "--mask_ratio must be at least 0 and at most 1"),
        ("--learning_rate nan", "--learning_rate must be greater than 0"),
        ("--ema_decays 0.9 1", "--ema_decays must be at least 0 and less than 1"),
        ("--preset JiT-X/16", "JiT-B/16"),
        ("--config missing.yaml", "missing.yaml"),
        ("--hub_model_id me/x", "need --push_to_hub"),
        ("--push_to_hub --hub_token hf_x --report_to wandb", "wandb records"),
        ("--streaming", "--max_train_steps and --lr_warmup_steps"),
        ("--teacher_cache_dir x --center_crop false", "needs --center_crop"),
        ("--eval_steps 1 --eval_metrics fid fd_teacher", "several feature networks"),
    ],
)
def test_wrong_argument_is_refused_by_name(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse_arguments(words.split())
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "steps", "warmup", "expected"),
    [
        ("", 750_600, 6255, []),
        ("", 5000, 5000, ["Set --lr_warmup_steps", "61% initial weights. Set smaller --ema_decays, such as 0.9990."]),
        ("", 4, 1, ["Set --use_ema false"]),
        ("--use_ema false", 5000, 10, []),
        ("--use_ema false --lr_scheduler constant", 10, 10, []),
    ],
)
def test_settings_that_do_not_suit_a_short_run_cause_warnings(words, steps, warmup, expected):
    warnings = parse_arguments(words.split()).warnings(steps, warmup)
    assert len(warnings) == len(expected)
    assert all(text in warning for text, warning in zip(expected, warnings, strict=True))
