"""pipelines/convert_checkpoint.py: a published checkpoint becomes a pipeline folder, and the folder a checkpoint."""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import HfArgumentParser

from pixelrepa_diffusers import PRESETS, JiTTransformer2DModel, PixelREPAPipeline
from pixelrepa_diffusers.adapter import MaskedTransformerAdapter
from pixelrepa_diffusers.commands import generate
from pixelrepa_diffusers.commands.convert_checkpoint import ConvertArguments, main
from pixelrepa_diffusers.conversion import load_original_checkpoint, read_original_checkpoint, save_original_checkpoint


ROOT = Path(__file__).parents[1]
PUBLISHED = Path(__file__).parent / "fixtures" / "reference_a" / "checkpoint-last.pth"
NAMES = {str(index): f"digit {index}" for index in range(10)}


def arguments(*options):
    return HfArgumentParser(ConvertArguments).parse_args_into_dataclasses([str(option) for option in options])[0]


def convert(folder, *options, checkpoint=PUBLISHED):
    main(arguments("--checkpoint_path", checkpoint, "--output_dir", folder, "--in_context_start", 2, *options))
    return PixelREPAPipeline.from_pretrained(folder)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_published_checkpoint_becomes_images_and_a_checkpoint_again(tmp_path, monkeypatch):
    """As typed: convert, run the command that the summary ends with, convert back."""
    (tmp_path / "names.json").write_text(json.dumps(NAMES))

    def run(*options):
        command = [sys.executable, ROOT / "pipelines" / "convert_checkpoint.py", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    summary = run(
        "--checkpoint_path", PUBLISHED, "--output_dir", "pipe", "--weights", "ema2", "--in_context_start", "2",
        "--id2label", "names.json",
    )  # fmt: skip
    for fact in ("weights ema2", "PixelREPA", "32×32", "10 classes (10 names)", "guidance 3.1 on (0.1, 1.0)"):
        assert fact in summary
    following = summary.partition("Next: ")[2]
    assert "'digit 0'" in following
    # Here and not in a third process, for time.
    monkeypatch.chdir(tmp_path)
    generate_arguments = HfArgumentParser(generate.GenerateArguments)
    options = [*shlex.split(following)[2:], "--num_inference_steps", "2"]
    images = generate.main(generate_arguments.parse_args_into_dataclasses(options)[0])
    assert len(images) == 8 and all(image.is_file() for image in images)

    run("--to_original", "--pipeline", "pipe", "--output_path", "back.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pth", "images", "names.json", "pipe"]
    expected, adapter = load_original_checkpoint(PUBLISHED, "ema2", in_context_start=2)
    for weights in ("model", "ema1", "ema2"):
        transformer, same_adapter = load_original_checkpoint(tmp_path / "back.pth", weights)
        assert equal(transformer.state_dict(), expected.state_dict())
        assert equal(same_adapter.state_dict(), adapter.state_dict())
    recorded = read_original_checkpoint(tmp_path / "back.pth")["args"]
    assert (recorded.cfg, recorded.interval_min, recorded.sampling_method) == (3.1, 0.1, "heun")


def test_the_folder_holds_pipeline_and_adapter_bit_for_bit(tmp_path):
    pipe = convert(tmp_path / "pipe")
    transformer, adapter = load_original_checkpoint(PUBLISHED, in_context_start=2)
    assert equal(pipe.transformer.state_dict(), transformer.state_dict())
    saved = MaskedTransformerAdapter.from_pretrained(tmp_path / "pipe" / "adapter")
    assert equal(saved.state_dict(), adapter.state_dict())
    assert set(pipe.components) == {"transformer", "scheduler"}


def test_scheduler_and_guidance_of_other_shapes_come_from_the_args(tmp_path):
    checkpoint = read_original_checkpoint(PUBLISHED)
    vars(checkpoint["args"]).update(cfg=1.7, interval_min=0.2, interval_max=0.9, sampling_method="euler")
    torch.save(checkpoint, tmp_path / "a.pth")
    pipe = convert(tmp_path / "pipe", checkpoint=tmp_path / "a.pth")
    assert (pipe.config.guidance_scale, tuple(pipe.config.guidance_interval)) == (1.7, (0.2, 0.9))
    assert pipe.scheduler.config.solver == "euler"


def test_flags_come_before_everything_else_for_guidance(tmp_path):
    pipe = convert(tmp_path / "pipe", "--guidance_scale", 2.2, "--guidance_interval", 0, 0.5)
    assert (pipe.config.guidance_scale, tuple(pipe.config.guidance_interval)) == (2.2, (0.0, 0.5))


def test_a_preset_brings_the_guidance_of_its_kind_and_says_what_the_args_said(tmp_path, capsys, monkeypatch):
    config = PRESETS["JiT-Digits/4"].transformer_config()
    monkeypatch.setitem(PRESETS, "tiny", argparse.Namespace(
        transformer_config=lambda: {**config, "num_layers": 3}, guidance_scale=3.5, guidance_scale_jit=2.5,
        guidance_interval=(0.3, 0.8),
    ))  # fmt: skip
    transformer = JiTTransformer2DModel(**{**config, "num_layers": 3})
    adapter = MaskedTransformerAdapter(128, 4, 128, num_layers=1, grid_size=4, num_classes=10)
    for kind, part, scale in (("jit", None, 2.5), ("pixelrepa", adapter, 3.5)):
        save_original_checkpoint(tmp_path / f"{kind}.pth", transformer, part, args={"cfg": 9.0})
        main(arguments("--checkpoint_path", tmp_path / f"{kind}.pth", "--output_dir", tmp_path / kind))
        pipe = PixelREPAPipeline.from_pretrained(tmp_path / kind)
        assert (pipe.config.guidance_scale, tuple(pipe.config.guidance_interval)) == (scale, (0.3, 0.8))
        assert "the paper's for tiny; the checkpoint's args say 9.0" in capsys.readouterr().out
        assert (tmp_path / kind / "adapter").exists() == (part is not None)


def test_half_precision_keeps_the_timestep_embedding_in_float32(tmp_path):
    convert(tmp_path / "pipe", "--dtype", "bfloat16")
    full = load_original_checkpoint(PUBLISHED, in_context_start=2)[0].state_dict()
    saved = load_file(tmp_path / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, value in saved.items():
        assert value.dtype == (torch.float32 if "time_embedding" in name else torch.bfloat16)
        assert torch.equal(value, full[name].to(value.dtype))


def test_large_weights_are_split(tmp_path):
    pipe = convert(tmp_path / "pipe", "--max_shard_size", "100KB")
    assert len(list((tmp_path / "pipe" / "transformer").glob("*.safetensors"))) > 1
    assert equal(
        pipe.transformer.state_dict(), load_original_checkpoint(PUBLISHED, in_context_start=2)[0].state_dict()
    )


def test_an_empty_folder_is_filled_and_any_other_is_left_as_it_is(tmp_path):
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "empty")
    for taken in (tmp_path / "empty", PUBLISHED):
        before = sorted(taken.rglob("*"))
        with pytest.raises(FileExistsError, match="is not empty"):
            convert(taken)
        assert sorted(taken.rglob("*")) == before
    with pytest.raises(FileExistsError, match="exists"):
        main(arguments("--to_original", "--pipeline", tmp_path / "empty", "--output_path", PUBLISHED))
    assert os.listdir(tmp_path) == ["empty"]


@pytest.mark.parametrize(
    "text, named",
    [
        ('{"0": "zero", "0": "nought"}', "distinct class ids"),
        ('{"01": "one"}', "distinct class ids"),
        ('{"one": "one"}', "distinct class ids"),
        ('{"10": "ten"}', "class ids from 0 to 9"),
        ('{"1": 1}', "must be a name"),
        ('["zero"]', "must hold a JSON object"),
        ("{", "Expecting"),
    ],
)
def test_class_names_that_cannot_be_are_refused_before_anything_is_written(tmp_path, text, named):
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(ValueError, match=named):
        convert(tmp_path / "pipe", "--id2label", tmp_path / "names.json")
    assert os.listdir(tmp_path) == ["names.json"]


@pytest.mark.parametrize(
    "options, named",
    [
        (["--guidance_scale", "-1"], "guidance_scale"),
        (["--guidance_interval", "0.5"], "must be a pair"),
        (["--guidance_interval", "0.9", "0.1"], "low < high"),
        (["--in_context_start", "4"], "in_context_start"),
        (["--noise_scale", "0"], "noise_scale"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        convert(tmp_path / "deep" / "pipe", *options)
    assert os.listdir(tmp_path) == []


def test_a_write_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="not supported"):
        convert(tmp_path / "pipe", "--max_shard_size", "many")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_takes_no_more_is_named_and_leaves_no_folder(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # less than the weights: every write beyond it fails
    try:
        with pytest.raises(OSError, match=r"pipe could not be written: .* MiB are free there"):
            convert(tmp_path / "pipe")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "options, named",
    [
        (["--checkpoint_path", "a.pth"], "--output_dir needed without --to_original"),
        (["--to_original", "--pipeline", "p"], "--output_path needed with --to_original"),
        (
            ["--to_original", "--pipeline", "p", "--output_path", "o", "--weights", "ema2"],
            "--weights has no meaning with",
        ),
        (["--checkpoint_path", "a", "--output_dir", "o", "--pipeline", "p"], "--pipeline has no meaning without"),
    ],
)
def test_options_of_the_other_direction_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        main(arguments(*options))


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        main(arguments("--to_original", "--pipeline", tmp_path, "--output_path", tmp_path / "a.pth"))
