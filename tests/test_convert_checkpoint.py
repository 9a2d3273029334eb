"""pixelrepa-convert: a published checkpoint becomes a pipeline folder, and the folder a checkpoint."""

import json
import os
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import REFERENCE
from training_runs import assert_equal

from pixelrepa_diffusers import JiTTransformer2DModel, PixelREPAPipeline, presets
from pixelrepa_diffusers.adapter import MaskedTransformerAdapter
from pixelrepa_diffusers.cli import parse
from pixelrepa_diffusers.commands.convert_checkpoint import ConvertArguments, main
from pixelrepa_diffusers.commands.generate import GenerateArguments
from pixelrepa_diffusers.conversion import load_original_checkpoint, read_original_checkpoint, save_original_checkpoint


PUBLISHED = REFERENCE / "checkpoint-last.pth"
NAMES = {str(index): f"digit {index}" for index in range(10)}


def arguments(*options):
    return parse(ConvertArguments, "", [str(option) for option in options])


def convert(folder, *options, checkpoint=PUBLISHED):
    main(arguments("--checkpoint_path", checkpoint, "--output_dir", folder, "--in_context_start", 2, *options))
    return PixelREPAPipeline.from_pretrained(folder)


def test_converting_there_and_back_keeps_the_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("names.json").write_text(json.dumps(NAMES))
    convert("pipe", "--weights", "ema2", "--id2label", "names.json")
    summary = capsys.readouterr().out
    for fact in ("weights ema2", "PixelREPA", "32×32", "10 classes with 10 names", "guidance 3.1 on (0.1, 1.0)"):
        assert fact in summary
    command = shlex.split(summary.partition("Next: ")[2])
    assert command[:5] == ["pixelrepa-generate", "--pipeline", "pipe", "--class_labels", "digit 0"]
    parse(GenerateArguments, "", command[1:])

    main(arguments("--to_original", "--pipeline", "pipe", "--output_path", "back.pth"))
    assert sorted(os.listdir()) == ["back.pth", "names.json", "pipe"]
    expected, adapter = load_original_checkpoint(PUBLISHED, "ema2", in_context_start=2)
    for weights in ("model", "ema1", "ema2"):
        transformer, same_adapter = load_original_checkpoint(tmp_path / "back.pth", weights)
        assert_equal(transformer.state_dict(), expected.state_dict())
        assert_equal(same_adapter.state_dict(), adapter.state_dict())
    recorded = read_original_checkpoint(tmp_path / "back.pth")["args"]
    assert (recorded.cfg, recorded.interval_min, recorded.sampling_method) == (3.1, 0.1, "heun")


def test_args_give_scheduler_and_guidance_and_flags_override_them(tmp_path):
    checkpoint = read_original_checkpoint(PUBLISHED)
    vars(checkpoint["args"]).update(cfg=1.7, interval_min=0.2, interval_max=0.9, sampling_method="euler")
    torch.save(checkpoint, tmp_path / "a.pth")
    pipe = convert(tmp_path / "args", checkpoint=tmp_path / "a.pth")
    assert (pipe.config.guidance_scale, tuple(pipe.config.guidance_interval)) == (1.7, (0.2, 0.9))
    assert pipe.scheduler.config.solver == "euler"
    flags = ("--guidance_scale", 2.2, "--guidance_interval", 0, 0.5)
    pipe = convert(tmp_path / "flags", *flags, checkpoint=tmp_path / "a.pth")
    assert (pipe.config.guidance_scale, tuple(pipe.config.guidance_interval)) == (2.2, (0.0, 0.5))


@pytest.mark.parametrize("is_pixelrepa, scale", [(False, 2.4), (True, 2.8)])
def test_presets_give_the_guidance_of_their_kind(is_pixelrepa, scale, tmp_path, capsys, monkeypatch):
    digits = presets.PRESETS["JiT-Digits/4"].transformer_config()
    preset = presets.Preset(**{**digits, "num_layers": 3}, guidance_scale=2.8, guidance_scale_jit=2.4)
    monkeypatch.setitem(presets.PRESETS, "tiny", preset)
    transformer = JiTTransformer2DModel(**preset.transformer_config())
    adapter = MaskedTransformerAdapter(128, 4, 128, num_layers=1, grid_size=4, num_classes=10)
    path = tmp_path / "a.pth"
    save_original_checkpoint(path, transformer, adapter if is_pixelrepa else None, args={"cfg": 9.0})
    main(arguments("--checkpoint_path", path, "--output_dir", tmp_path / "pipe"))
    assert PixelREPAPipeline.from_pretrained(tmp_path / "pipe").config.guidance_scale == scale
    assert "the paper's for tiny" in capsys.readouterr().out
    assert (tmp_path / "pipe" / "adapter").exists() == is_pixelrepa


def test_half_precision_keeps_the_timestep_embedding_in_float32(tmp_path):
    convert(tmp_path / "pipe", "--dtype", "bfloat16")
    full = load_original_checkpoint(PUBLISHED, in_context_start=2)[0].state_dict()
    saved = load_file(tmp_path / "pipe" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, value in saved.items():
        assert value.dtype == (torch.float32 if "time_embedding" in name else torch.bfloat16)
        assert torch.equal(value, full[name].to(value.dtype))


def test_empty_folders_are_filled_and_nothing_is_overwritten(tmp_path):
    convert(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="is not empty"):
        convert(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
