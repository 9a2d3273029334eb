"""Published checkpoints convert exactly in both directions, and are read safely."""

import argparse
import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import REFERENCE
from training_runs import assert_equal

from pixelrepa_diffusers import PRESETS, JiTTransformer2DModel
from pixelrepa_diffusers.adapter import MaskedTransformerAdapter
from pixelrepa_diffusers.conversion import (
    adapter_state_from_original,
    load_original_checkpoint,
    read_original_checkpoint,
    save_original_checkpoint,
    transformer_state_from_original,
    transformer_state_to_original,
)
from pixelrepa_diffusers.presets import matching_presets


PUBLISHED = REFERENCE / "checkpoint-last.pth"
START = 2  # the recorded model's in_context_start, which its weights do not show
ADAPTER = "masked_transformer_adapter."


def changed(path, edit):
    """Save the recorded checkpoint, changed by `edit`, at `path`."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(PUBLISHED)
    edit(checkpoint)
    torch.save(checkpoint, path)
    return path


def assert_same_models(one, other):
    """Two models, or two Nones, agree in weights and settings."""
    if one is None or other is None:
        assert one is other
        return
    assert_equal(one.state_dict(), other.state_dict())
    first, second = ({key: value for key, value in model.config.items() if key[0] != "_"} for model in (one, other))
    assert first == second


def tiny(**changes):
    config = {
        "sample_size": 16, "patch_size": 4, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8,
        "bottleneck_dim": 8, "in_context_len": 2, "in_context_start": 1, "num_classes": 3, "noise_scale": 1.5,
        "t_eps": 0.03, "dropout": 0.1,
    }  # fmt: skip
    torch.manual_seed(0)
    return JiTTransformer2DModel(**{**config, **changes})


def tiny_adapter(num_classes=3):
    """As wide as its teacher: without projection."""
    return MaskedTransformerAdapter(16, 2, 16, num_layers=1, grid_size=4, in_context_len=2, num_classes=num_classes)


# Reading


@pytest.mark.parametrize("weights, recorded", [("model", "jit"), ("ema1", "jit_ema1"), ("ema2", "jit_ema2")])
def test_every_set_of_weights_is_read_exactly(weights, recorded):
    transformer, adapter = load_original_checkpoint(PUBLISHED, weights, in_context_start=START)
    net = load_file(REFERENCE / f"{recorded}_after5.safetensors")
    assert_equal(transformer.state_dict(), transformer_state_from_original(net, START))
    # The mask token comes with the net; the rest of the adapter has no EMA.
    adapter_state = load_file(REFERENCE / "adapter_after5.safetensors")
    assert_equal(adapter.state_dict(), adapter_state_from_original(adapter_state, net["mask_token"]))
    assert not transformer.training and not adapter.training


def test_architecture_comes_from_shapes_and_args(tmp_path):
    def edit(checkpoint):
        vars(checkpoint["args"]).update(noise_scale=2.5, t_eps=0.02, proj_dropout=0.3)

    transformer, adapter = load_original_checkpoint(changed(tmp_path / "a.pth", edit), in_context_start=START)
    expected = {
        "sample_size": 32, "patch_size": 8, "in_channels": 3, "num_layers": 4, "num_attention_heads": 4,
        "attention_head_dim": 8, "bottleneck_dim": 8, "in_context_len": 2, "in_context_start": 2, "num_classes": 10,
        "noise_scale": 2.5, "t_eps": 0.02, "dropout": 0.3,
    }  # fmt: skip
    assert {name: transformer.config[name] for name in expected} == expected
    assert adapter.config.teacher_dim == 24 and adapter.config.grid_size == 4


def test_sizes_of_no_preset_need_in_context_start_and_noise_scale(tmp_path):
    path = changed(tmp_path / "a.pth", lambda checkpoint: checkpoint.pop("args"))
    with pytest.raises(ValueError, match="Pass `in_context_start` and `noise_scale`"):
        load_original_checkpoint(path)
    with pytest.raises(ValueError, match="Pass `noise_scale`"):
        load_original_checkpoint(path, in_context_start=START)
    transformer, _ = load_original_checkpoint(path, in_context_start=START, noise_scale=2.0)
    assert (transformer.config.noise_scale, transformer.config.t_eps) == (2.0, 0.05)


def test_sizes_of_a_preset_need_no_args(tmp_path):
    preset = PRESETS["JiT-Digits/4"]
    with torch.device("meta"):
        state = JiTTransformer2DModel(**preset.transformer_config()).state_dict()
    state = {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}
    torch.save({"model_ema1": transformer_state_to_original(state, grid_size=4)}, tmp_path / "a.pth")
    transformer, adapter = load_original_checkpoint(tmp_path / "a.pth")
    assert adapter is None
    assert {name: transformer.config[name] for name in preset.transformer_config()} == preset.transformer_config()


def test_presets_are_told_apart_by_what_is_known():
    assert list(matching_presets({"num_layers": 24})) == ["JiT-L/16", "JiT-L/32"]
    assert list(matching_presets(PRESETS["JiT-H/32"].transformer_config())) == ["JiT-H/32"]
    assert matching_presets({"num_layers": 24, "bottleneck_dim": 1}) == {}


def test_plain_jit_has_no_adapter(tmp_path):
    def edit(checkpoint):  # keep what plain JiT's code saves
        model = checkpoint["model"].items()
        checkpoint["model"] = {key: value for key, value in model if key[:4] == "net." and "mask_token" not in key}
        for name in ("model_ema1", "model_ema2"):
            checkpoint[name].pop("mask_token")

    path = changed(tmp_path / "jit.pth", edit)
    for weights in ("model", "ema1"):
        transformer, adapter = load_original_checkpoint(path, weights, in_context_start=START)
        same, _ = load_original_checkpoint(PUBLISHED, weights, in_context_start=START)
        assert adapter is None
        assert_equal(transformer.state_dict(), same.state_dict())


def test_half_precision_is_widened_exactly_and_its_rounded_position_table_is_accepted(tmp_path):
    def edit(checkpoint):
        checkpoint["model_ema1"] = {key: value.bfloat16() for key, value in checkpoint["model_ema1"].items()}

    transformer, _ = load_original_checkpoint(changed(tmp_path / "a.pth", edit), in_context_start=START)
    full, _ = load_original_checkpoint(PUBLISHED, in_context_start=START)
    for key, value in full.state_dict().items():
        assert torch.equal(transformer.state_dict()[key], value.bfloat16().float())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory map")
def test_tensors_are_mapped_until_used_and_share_no_memory_afterwards():
    def mapped():
        return str(PUBLISHED) in Path("/proc/self/maps").read_text()

    checkpoint = read_original_checkpoint(PUBLISHED)
    assert mapped()
    del checkpoint
    models = load_original_checkpoint(PUBLISHED, in_context_start=START)
    gc.collect()
    assert not mapped()
    for model in models:
        storages = [value.untyped_storage() for value in model.state_dict().values()]
        assert len({storage.data_ptr() for storage in storages}) == len(storages)


# Refusing


def put(entry, key, value):
    return lambda checkpoint: checkpoint[entry].update({key: value})


def drop(entry, key):
    return lambda checkpoint: checkpoint[entry].pop(key)


@pytest.mark.parametrize(
    "edit, named",
    [
        (drop("model_ema1", "blocks.1.attn.qkv.bias"), 'Missing.*"encoder_blocks.1.attn.to_q.bias"'),
        (drop("model_ema1", "pos_embed"), "missing or unexpected tensor 'pos_embed'"),
        (drop("model", ADAPTER + "blocks.1.mlp.w3.bias"), 'Missing.*"blocks.1.ff.linear_out.bias"'),
        (drop("model", ADAPTER + "projection_layer.mlp.3.weight"), 'Unexpected.*"projection.0.weight"'),
        (put("model_ema1", "blocks.0.extra", torch.zeros(1)), "unexpected tensor 'blocks.0.extra'"),
        (put("model", "surprise.weight", torch.zeros(1)), "unexpected tensors in 'model': surprise.weight"),
        (put("model_ema1", "blocks.3.mlp.w3.weight", torch.zeros(32, 86)), r"linear_out.weight.*\[32, 86\]"),
        (put("model_ema1", "blocks.0.norm1.weight", [1.0]), "'model_ema1' cannot be converted"),
        (put("model_ema1", "pos_embed", torch.zeros(1, 16, 32)), "not the sin-cos table"),
        (
            put("model_ema1", "blocks.2.norm2.weight", torch.full((32,), torch.nan)),
            "NaN or infinity in transformer_blocks.0.norm2",
        ),
        (lambda checkpoint: checkpoint.update(model_ema1=[1]), "'model_ema1' cannot be converted"),
        (lambda checkpoint: checkpoint.pop("model_ema1"), "no weights 'ema1'; it has .'ema2', 'model'."),
    ],
)
def test_damaged_and_foreign_checkpoints_are_refused_by_name(tmp_path, edit, named):
    path = changed(tmp_path / "bad.pth", edit)
    with pytest.raises(ValueError, match=f"(?s)bad.pth.*{named}"):
        load_original_checkpoint(path, in_context_start=START)


@pytest.mark.parametrize("kept", [0, 3, 5000, 0.5, -1])
def test_truncated_files_are_refused_without_recommending_unsafe_loading(tmp_path, kept):
    whole, path = PUBLISHED.read_bytes(), tmp_path / "cut.pth"
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"cut\.pth cannot be read as a PyTorch checkpoint") as error:
        load_original_checkpoint(path, in_context_start=START)
    assert "weights_only" not in str(error.value)


# Writing


def test_load_save_load_is_bit_exact_in_the_published_layout(tmp_path):
    averages = {}
    for name in ("ema1", "ema2"):
        transformer, adapter = load_original_checkpoint(PUBLISHED, name, START)
        averages[name] = {**transformer.state_dict(), "mask_token": adapter.mask_token}
    transformer, adapter = load_original_checkpoint(PUBLISHED, "model", START)
    path = tmp_path / "back.pth"
    save_original_checkpoint(path, transformer, adapter, averages, args={"cfg": 3.1})
    assert os.listdir(tmp_path) == ["back.pth"]

    written, published = read_original_checkpoint(path), read_original_checkpoint(PUBLISHED)
    expected = {key: value for key, value in published["model"].items() if not key.startswith("repa_model.")}
    assert list(written["model"]) == list(expected)
    assert_equal(written["model"], expected)
    table = expected["net.pos_embed"]  # the exact one in every set of weights
    for name in ("model_ema1", "model_ema2"):
        assert list(written[name]) == list(published[name])
        assert_equal(written[name], {**published[name], "pos_embed": table})
    recorded, own = vars(published["args"]), vars(written["args"])
    assert own.pop("in_context_start") == START and own == {name: recorded[name] for name in own}
    assert {"img_size", "class_num", "proj_dropout", "t_eps", "noise_scale", "cfg"} < own.keys()
    again = load_original_checkpoint(path, "model")
    assert_same_models(again[0], transformer)
    assert_same_models(again[1], adapter)


@pytest.mark.parametrize("adapted", [True, False])
def test_architectures_of_no_preset_survive_the_round_trip(tmp_path, adapted):
    models = tiny(), tiny_adapter() if adapted else None
    save_original_checkpoint(tmp_path / "a.pth", *models)
    assert ("mask_token" in read_original_checkpoint(tmp_path / "a.pth")["model_ema1"]) == adapted
    for weights in ("model", "ema1", "ema2"):
        again = load_original_checkpoint(tmp_path / "a.pth", weights)
        for pair in zip(again, models, strict=True):
            assert_same_models(*pair)


def test_missing_ema_weights_are_written_as_the_transformer(tmp_path):
    transformer = tiny()
    state = transformer.state_dict()
    average = {key: value + 1 for key, value in state.items()}
    save_original_checkpoint(tmp_path / "a.pth", transformer, ema={"ema1": average})
    for weights, expected in (("ema1", average), ("ema2", state), ("model", state)):
        assert_equal(load_original_checkpoint(tmp_path / "a.pth", weights)[0].state_dict(), expected)
    written, key = read_original_checkpoint(tmp_path / "a.pth"), "final_layer.linear.weight"
    assert written["model_ema2"][key].data_ptr() == written["model"]["net." + key].data_ptr(), "stored twice"


def test_half_precision_is_written_as_float32(tmp_path):
    transformer = tiny().to(torch.bfloat16)
    save_original_checkpoint(tmp_path / "a.pth", transformer)
    assert {value.dtype for value in read_original_checkpoint(tmp_path / "a.pth")["model"].values()} == {torch.float32}
    again, _ = load_original_checkpoint(tmp_path / "a.pth")
    assert_equal(again.state_dict(), {key: value.float() for key, value in transformer.state_dict().items()})


def fused():
    transformer = tiny()
    transformer.fuse_qkv_projections()
    return transformer


@pytest.mark.parametrize(
    "arguments, named",
    [
        (lambda: {"transformer": fused()}, "encoder_blocks.0.attn.to_qkv.bias.* fused projections"),
        (lambda: {"transformer": tiny(mlp_ratio=3.0)}, "`mlp_ratio` 4.0"),
        (lambda: {"transformer": tiny(in_context_len=0)}, "in-context tokens"),
        (lambda: {"adapter": tiny_adapter(num_classes=4)}, "`num_classes` is 4"),
        (lambda: {"ema": {"ema1": tiny(num_layers=2).state_dict()}}, r"`ema\['ema1'\]`"),
        (lambda: {"ema": {"ema2": tiny(num_classes=4).state_dict()}}, r"`ema\['ema2'\]`"),
    ],
)
def test_models_without_published_counterpart_are_not_written(tmp_path, arguments, named):
    with pytest.raises(ValueError, match=named):
        save_original_checkpoint(tmp_path / "a.pth", **{"transformer": tiny(), **arguments()})
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "a.pth"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match=r"a\.pth exists"):
        save_original_checkpoint(path, tiny())
    assert path.read_text() == "precious"
