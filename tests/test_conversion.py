"""Published checkpoints in and out: exact, safe, and refused by name when something is wrong."""

import argparse
import gc
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pixelrepa_diffusers.conversion as checkpoints
from pixelrepa_diffusers import PRESETS, JiTTransformer2DModel
from pixelrepa_diffusers.adapter import MaskedTransformerAdapter, MLPProjector
from pixelrepa_diffusers.conversion import (
    adapter_state_from_original,
    adapter_state_to_original,
    load_original_checkpoint,
    matching_presets,
    read_original_checkpoint,
    save_original_checkpoint,
    transformer_state_from_original,
    transformer_state_to_original,
)


REFERENCE = Path(__file__).parent / "fixtures" / "reference_a"
PUBLISHED = REFERENCE / "checkpoint-last.pth"
START = 2  # the recorded model's in_context_start, which its weights do not show


def changed(path, edit):
    """The recorded checkpoint, unmapped and changed by `edit`, at `path`."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(PUBLISHED)
    edit(checkpoint)
    torch.save(checkpoint, path)
    return path


def without_adapter(checkpoint):
    """What plain JiT's code saves."""
    checkpoint["model"] = {
        key: value for key, value in checkpoint["model"].items() if key.startswith("net.") and key != "net.mask_token"
    }
    for name in ("model_ema1", "model_ema2"):
        checkpoint[name].pop("mask_token")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def settings(model):
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def tiny(**changes):
    config = {
        "sample_size": 16, "patch_size": 4, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8,
        "bottleneck_dim": 8, "in_context_len": 2, "in_context_start": 1, "num_classes": 3, "noise_scale": 1.5,
        "t_eps": 0.03, "dropout": 0.1,
    }  # fmt: skip
    torch.manual_seed(0)
    return JiTTransformer2DModel(**{**config, **changes})


def tiny_adapter(**changes):
    config = {
        "hidden_size": 16, "num_attention_heads": 2, "teacher_dim": 16, "num_layers": 1, "grid_size": 4,
        "in_context_len": 2, "num_classes": 3,
    }  # fmt: skip
    return MaskedTransformerAdapter(**{**config, **changes})


# Names


def test_renaming_the_net_there_and_back_changes_no_name_no_bit_and_no_place():
    state = read_original_checkpoint(PUBLISHED)["model_ema1"]
    ours = transformer_state_from_original(state, START)
    back = transformer_state_to_original(ours, grid_size=4, mask_token=state["mask_token"])
    assert list(back) == list(state)
    table = read_original_checkpoint(PUBLISHED)["model"]["net.pos_embed"]
    assert equal(back, {**state, "pos_embed": table})
    assert equal(transformer_state_from_original(back, START), ours)


def test_renaming_the_adapter_there_and_back_changes_no_name_and_no_bit():
    state = load_file(REFERENCE / "adapter.safetensors")
    ours = adapter_state_from_original(state, mask_token=torch.ones(1, 1, 32))
    assert ours["mask_token"].eq(1).all()
    assert equal(adapter_state_to_original(ours), state)


@pytest.mark.parametrize("key", ["blocks.0.attn.extra.weight", "blocks.9.norm1.weight", "pos_embedding"])
def test_renaming_refuses_a_stranger_by_name(key):
    state = {**load_file(REFERENCE / "jit.safetensors"), key: torch.zeros(1)}
    with pytest.raises(ValueError, match=re.escape(key)):
        transformer_state_from_original(state, START)


# Reading


@pytest.mark.parametrize("weights, recorded", [("model", "jit"), ("ema1", "jit_ema1"), ("ema2", "jit_ema2")])
def test_every_set_of_weights_is_read_exactly(weights, recorded):
    transformer, _ = load_original_checkpoint(PUBLISHED, weights, in_context_start=START)
    expected = load_file(REFERENCE / f"{recorded}_after5.safetensors")
    assert equal(transformer.state_dict(), transformer_state_from_original(expected, START))
    assert not transformer.training


@pytest.mark.parametrize("weights", ["model", "ema1"])
def test_the_adapter_and_its_mask_token_are_the_ones_in_training(weights):
    _, adapter = load_original_checkpoint(PUBLISHED, weights, in_context_start=START)
    mask_token = load_file(REFERENCE / "jit_after5.safetensors")["mask_token"]
    expected = load_file(REFERENCE / "adapter_after5.safetensors")
    assert equal(dict(sorted(adapter.state_dict().items())), dict(sorted(
        adapter_state_from_original(expected, mask_token).items()
    )))  # fmt: skip
    assert adapter.config.teacher_dim == 24 and adapter.config.grid_size == 4


def test_shapes_and_args_tell_the_architecture(tmp_path):
    def edit(checkpoint):
        vars(checkpoint["args"]).update(noise_scale=2.5, t_eps=0.02, proj_dropout=0.3)

    transformer, _ = load_original_checkpoint(changed(tmp_path / "a.pth", edit), in_context_start=START)
    expected = {
        "sample_size": 32, "patch_size": 8, "in_channels": 3, "num_layers": 4, "num_attention_heads": 4,
        "attention_head_dim": 8, "bottleneck_dim": 8, "in_context_len": 2, "in_context_start": 2, "num_classes": 10,
        "noise_scale": 2.5, "t_eps": 0.02, "dropout": 0.3,
    }  # fmt: skip
    assert {name: transformer.config[name] for name in expected} == expected


def test_an_architecture_of_no_preset_needs_to_be_told_where_class_tokens_enter():
    with pytest.raises(ValueError, match=r"in_context_start`, from 0 to 3"):
        load_original_checkpoint(PUBLISHED)


def test_a_checkpoint_without_args_needs_to_be_told_its_noise_scale(tmp_path):
    path = changed(tmp_path / "a.pth", lambda checkpoint: checkpoint.pop("args"))
    with pytest.raises(ValueError, match="Give `noise_scale`"):
        load_original_checkpoint(path, in_context_start=START)
    transformer, _ = load_original_checkpoint(path, in_context_start=START, noise_scale=2.0)
    assert (transformer.config.noise_scale, transformer.config.t_eps) == (2.0, 0.05)


def test_a_checkpoint_without_args_is_completed_from_the_preset_of_its_shapes(tmp_path):
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


def test_a_plain_jit_is_read_without_an_adapter(tmp_path):
    path = changed(tmp_path / "jit.pth", without_adapter)
    for weights in ("model", "ema1"):
        transformer, adapter = load_original_checkpoint(path, weights, in_context_start=START)
        same, _ = load_original_checkpoint(PUBLISHED, weights, in_context_start=START)
        assert adapter is None and equal(transformer.state_dict(), same.state_dict())


def test_half_precision_is_widened_without_loss(tmp_path):
    def edit(checkpoint):
        checkpoint["model_ema1"] = {key: value.bfloat16() for key, value in checkpoint["model_ema1"].items()}

    transformer, _ = load_original_checkpoint(changed(tmp_path / "a.pth", edit), in_context_start=START)
    full, _ = load_original_checkpoint(PUBLISHED, in_context_start=START)
    for key, value in full.state_dict().items():
        assert torch.equal(transformer.state_dict()[key], value.bfloat16().float())


def test_the_position_table_of_a_long_average_is_accepted(tmp_path):
    # Averaged with decay 0.9999 for 750,000 steps in float32, the constant table drifts by up to 1.6e-4.
    def edit(checkpoint):
        checkpoint["model_ema1"]["pos_embed"] += 2e-4

    load_original_checkpoint(changed(tmp_path / "a.pth", edit), in_context_start=START)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the process's memory map")
def test_tensors_stay_in_the_file_until_used_and_leave_it_then():
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


def test_the_old_format_without_zip_is_read_too(tmp_path):
    checkpoint = read_original_checkpoint(PUBLISHED)
    torch.save(checkpoint, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old, _ = load_original_checkpoint(tmp_path / "old.pth", in_context_start=START)
    new, _ = load_original_checkpoint(PUBLISHED, in_context_start=START)
    assert equal(old.state_dict(), new.state_dict())


# Refusing


def put(entry, key, value):
    def edit(checkpoint):
        checkpoint[entry][key] = value

    return edit


def drop(entry, key):
    return lambda checkpoint: checkpoint[entry].pop(key)


def set_arg(name, value):
    return lambda checkpoint: setattr(checkpoint["args"], name, value)


def drop_adapter_alone(checkpoint):
    for key in [key for key in checkpoint["model"] if key.startswith("masked_transformer_adapter.")]:
        del checkpoint["model"][key]


def poison(entry, key, value):
    def edit(checkpoint):
        checkpoint[entry][key].detach().view(-1)[1] = value

    return edit


ADAPTER = "masked_transformer_adapter."
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "edit, named",
    [
        (drop("model_ema1", "blocks.1.attn.qkv.bias"), "missing 'blocks.1.attn.qkv.bias'"),
        (drop("model_ema1", "pos_embed"), "no 'pos_embed' in 'model_ema1'"),
        (drop("model_ema1", "in_context_posemb"), "no 'in_context_posemb' in 'model_ema1'"),
        (drop("model_ema1", "mask_token"), "'model_ema1' .* missing 'mask_token'"),
        (drop("model", "net.final_layer.linear.weight"), "'model' .* missing 'net.final_layer.linear.weight'"),
        (drop("model", "net.mask_token"), "no 'net.mask_token'"),
        (drop("model", ADAPTER + "blocks.1.mlp.w3.bias"), f"missing '{ADAPTER}blocks.1.mlp.w3.bias'"),
        (drop("model", ADAPTER + "projection_layer.mlp.3.weight"), f"no '{ADAPTER}projection_layer.mlp.3.weight'"),
        (drop_adapter_alone, f"'net.mask_token' but no '{ADAPTER}'"),
        (put("model_ema1", "blocks.0.extra", torch.zeros(1)), "unknown 'blocks.0.extra'"),
        (put("model", "net.blocks.4.norm1.weight", torch.zeros(32)), "unknown .*'net.blocks.4.norm1.weight'"),
        (put("model", "surprise.weight", torch.zeros(1)), "unknown 'surprise.weight'"),
        (put("model", ADAPTER + "more", torch.zeros(1)), f"unknown '{ADAPTER}more'"),
        (
            put("model_ema1", "blocks.3.mlp.w3.weight", torch.zeros(32, 86)),
            r"'blocks.3.mlp.w3.weight' has the shape \(32, 86\) instead of \(32, 85\)",
        ),
        (put("model", "net.t_embedder.mlp.0.bias", torch.zeros(3)), r"'net.t_embedder.mlp.0.bias' has the shape \(3,\)"),
        (put("model", ADAPTER + "blocks.0.attn.qkv.weight", torch.zeros(9, 32)), rf"{ADAPTER}blocks.0.*\(9, 32\)"),
        (put("model_ema1", "blocks.0.attn.q_norm.weight", torch.zeros(7)), "'blocks.0.attn.q_norm.weight'.* 7 elem"),
        (put("model_ema1", "blocks.0.attn.q_norm.weight", torch.zeros(0)), r"'blocks.0.attn.q_norm.weight'.*\(0,\)"),
        (put("model_ema1", "x_embedder.proj1.weight", torch.zeros(8)), "'x_embedder.proj1.weight'.*4 dimensions"),
        (put("model_ema1", "y_embedder.embedding_table.weight", torch.zeros(9, 32)), "`class_num` is 10.*'y_embedder"),
        (set_arg("img_size", 64), "`img_size` is 64 .* 32"),
        (set_arg("noise_scale", NAN), "`noise_scale` .* finite number, got nan"),
        (set_arg("t_eps", "0.05"), "`t_eps` .* finite number, got '0.05'"),
        (poison("model_ema1", "blocks.2.norm2.weight", NAN), "'blocks.2.norm2.weight' in 'model_ema1' holds NaN"),
        (poison("model", ADAPTER + "blocks.0.norm1.weight", INF), f"'{ADAPTER}blocks.0.norm1.weight'.* infinity"),
        (poison("model", "net.mask_token", NAN), "'net.mask_token' in 'model' holds NaN"),
        (
            put("model_ema1", "blocks.0.norm1.weight", torch.zeros(32, dtype=torch.int64)),
            "'blocks.0.norm1.weight'.* torch.int64",
        ),
        (put("model_ema1", "final_layer.linear.bias", torch.zeros(192).to_sparse()), "'final_layer.linear.bias'.*dense"),
        (put("model_ema1", "pos_embed", torch.zeros(1, 16, 32)), "'pos_embed' in 'model_ema1' .* sin-cos table"),
        (put("model_ema1", "blocks.0.norm1.weight", [1.0]), "'blocks.0.norm1.weight': list"),
        (lambda checkpoint: checkpoint.update(model_ema1=[1]), "'model_ema1' must be a dictionary .* list"),
        (lambda checkpoint: checkpoint.update(args={"noise_scale": 1.0}), "'args' must be an argparse.Namespace"),
        (lambda checkpoint: checkpoint.pop("model_ema1"), "no 'model_ema1'.* has the sets 'ema2', 'model'"),
        (lambda checkpoint: [checkpoint.pop(key) for key in list(checkpoint)[:1] + list(checkpoint)[-2:]], "holds 'opt"),
    ],
)  # fmt: skip
def test_what_does_not_belong_is_refused_by_name(tmp_path, edit, named):
    path = changed(tmp_path / "bad.pth", edit)
    with pytest.raises(ValueError, match=f"(?s){named}"):
        load_original_checkpoint(path, in_context_start=START)


def test_an_unknown_set_of_weights_is_refused():
    with pytest.raises(ValueError, match="'ema1', 'ema2', 'model', got 'ema'"):
        load_original_checkpoint(PUBLISHED, "ema", in_context_start=START)


def test_entries_beyond_the_layout_are_ignored_with_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(checkpoints.logger, "propagate", True)
    monkeypatch.setattr(checkpoints.logger.parent, "propagate", True)
    path = changed(tmp_path / "a.pth", lambda checkpoint: checkpoint.update(model_ema3={}))
    load_original_checkpoint(path, in_context_start=START)
    assert "model_ema3" in caplog.text


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["top", "args", "model"])
def test_a_hostile_pickle_is_refused_by_name_and_not_run(tmp_path, zipped, place):
    checkpoint, marker = read_original_checkpoint(PUBLISHED), tmp_path / "was-here"
    target = {"top": checkpoint, "args": vars(checkpoint["args"]), "model": checkpoint["model"]}[place]
    target["net.evil"] = Hostile(marker)
    path = tmp_path / "hostile.pth"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"refused.*`{os.mkdir.__module__}\.mkdir`"):
        load_original_checkpoint(path, in_context_start=START)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the pickle was harmless, so the test showed nothing"


def test_no_class_stays_allowed_after_reading():
    read_original_checkpoint(PUBLISHED)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0, 3, 100, 5000, 0.5, 0.99, -1])
def test_a_truncated_file_is_refused_as_such(tmp_path, kept, zipped):
    torch.save(read_original_checkpoint(PUBLISHED), tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "whole.pth").read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"cut\.pth cannot be read as a PyTorch checkpoint.*cut short"):
        load_original_checkpoint(path, in_context_start=START)


def test_other_files_are_refused_and_never_recommended_to_be_read_unsafely(tmp_path):
    (tmp_path / "notes.pth").write_text("not a checkpoint")
    for path in (tmp_path / "notes.pth", REFERENCE / "config.json"):
        with pytest.raises(ValueError, match="another kind of file") as error:
            load_original_checkpoint(path)
        assert "weights_only" not in str(error.value)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        load_original_checkpoint(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError):
        load_original_checkpoint(tmp_path / "absent.pth")


# Writing


def test_load_save_load_is_bit_identical_and_the_file_is_laid_out_as_published(tmp_path):
    averages = {name: load_original_checkpoint(PUBLISHED, name, START)[0].state_dict() for name in ("ema1", "ema2")}
    transformer, adapter = load_original_checkpoint(PUBLISHED, "model", START)
    path = tmp_path / "back.pth"
    save_original_checkpoint(path, transformer, adapter, averages, args={"cfg": 3.1})
    assert os.listdir(tmp_path) == ["back.pth"]

    written, published = read_original_checkpoint(path), read_original_checkpoint(PUBLISHED)
    expected = {key: value for key, value in published["model"].items() if not key.startswith("repa_model.")}
    assert list(written["model"]) == list(expected) and equal(written["model"], expected)
    for name in ("model_ema1", "model_ema2"):
        # The published averages of the constant table and of the mask token, which no image depends on, are not kept.
        own = {"pos_embed": expected["net.pos_embed"], "mask_token": expected["net.mask_token"]}
        assert list(written[name]) == list(published[name]) and equal(written[name], {**published[name], **own})
    recorded = vars(published["args"])
    own = vars(written["args"])
    assert own.pop("in_context_start") == START and own == {name: recorded[name] for name in own}
    assert {"img_size", "class_num", "proj_dropout", "t_eps", "noise_scale", "cfg"} < own.keys()

    for name, state in {**averages, "model": transformer.state_dict()}.items():
        again, adapter_again = load_original_checkpoint(path, name)
        assert equal(again.state_dict(), state) and equal(adapter_again.state_dict(), adapter.state_dict())
        assert settings(again) == settings(transformer)


def test_a_plain_jit_of_no_preset_survives_the_round_trip_without_being_told_anything(tmp_path):
    transformer = tiny()
    save_original_checkpoint(tmp_path / "jit.pth", transformer)
    written = read_original_checkpoint(tmp_path / "jit.pth")
    assert all(key.startswith("net.") for key in written["model"]) and "mask_token" not in written["model_ema1"]
    for weights in ("model", "ema1", "ema2"):
        again, adapter = load_original_checkpoint(tmp_path / "jit.pth", weights)
        assert adapter is None and equal(again.state_dict(), transformer.state_dict())
        assert settings(again) == settings(transformer)


def test_an_adapter_as_wide_as_its_teacher_has_no_projection_and_survives_the_round_trip(tmp_path):
    adapter = tiny_adapter()
    save_original_checkpoint(tmp_path / "a.pth", tiny(), adapter)
    _, again = load_original_checkpoint(tmp_path / "a.pth")
    assert equal(again.state_dict(), adapter.state_dict()) and settings(again) == settings(adapter)


def test_an_average_that_is_not_given_is_written_as_the_transformer(tmp_path):
    transformer = tiny()
    average = {key: value + 1 for key, value in transformer.state_dict().items()}
    save_original_checkpoint(tmp_path / "a.pth", transformer, ema={"ema1": average})
    for weights, expected in (
        ("ema1", average),
        ("ema2", transformer.state_dict()),
        ("model", transformer.state_dict()),
    ):
        assert equal(load_original_checkpoint(tmp_path / "a.pth", weights)[0].state_dict(), expected)
    written, key = read_original_checkpoint(tmp_path / "a.pth"), "final_layer.linear.weight"
    assert written["model_ema2"][key].data_ptr() == written["model"]["net." + key].data_ptr(), "stored twice"


def test_a_preset_is_named_in_the_args(tmp_path):
    transformer = JiTTransformer2DModel(**PRESETS["JiT-Digits/4"].transformer_config())
    save_original_checkpoint(tmp_path / "a.pth", transformer)
    assert read_original_checkpoint(tmp_path / "a.pth")["args"].model == "JiT-Digits/4"


def test_half_precision_is_written_as_float32(tmp_path):
    transformer = tiny().to(torch.bfloat16)
    save_original_checkpoint(tmp_path / "a.pth", transformer)
    assert {value.dtype for value in read_original_checkpoint(tmp_path / "a.pth")["model"].values()} == {torch.float32}
    again, _ = load_original_checkpoint(tmp_path / "a.pth")
    assert equal(again.state_dict(), {key: value.float() for key, value in transformer.state_dict().items()})


def with_nan():
    transformer = tiny()
    transformer.final_layer.linear.bias.data[0] = NAN
    return transformer


def fused():
    transformer = tiny()
    transformer.fuse_qkv_projections()
    return transformer


@pytest.mark.parametrize(
    "arguments, named",
    [
        (lambda: {"transformer": with_nan()}, "'final_layer.linear.bias' in 'transformer' holds NaN"),
        (lambda: {"transformer": fused()}, "'encoder_blocks.0.attn.to_qkv.bias'.* fused projections"),
        (lambda: {"transformer": tiny(mlp_ratio=3.0)}, "'mlp_ratio': 3.0"),
        (lambda: {"transformer": tiny(norm_eps=1e-5)}, "'norm_eps': 1e-05"),
        (lambda: {"transformer": tiny(in_context_len=0)}, "in_context_len=0"),
        (lambda: {"adapter": MLPProjector(16, 24)}, "not for a MLPProjector"),
        (lambda: {"adapter": tiny_adapter(num_classes=4)}, "`num_classes` is 4.* must be 3"),
        (lambda: {"adapter": tiny_adapter(hidden_size=32)}, "`hidden_size` is 32.* must be 16"),
        (lambda: {"adapter": tiny_adapter(grid_size=3)}, "`grid_size` is 3.* must be 4"),
        (lambda: {"ema": {"0.9999": tiny().state_dict()}}, "'ema1' and 'ema2', got '0.9999'"),
        (lambda: {"ema": {"ema1": tiny(num_layers=2).state_dict()}}, "'ema1' .* missing 'transformer_blocks.1"),
        (lambda: {"ema": {"ema2": tiny(num_classes=4).state_dict()}}, r"'ema2'.*class_embedding.weight'.*\(5, 16\)"),
        (lambda: {"ema": {"ema2": with_nan().state_dict()}}, "'final_layer.linear.bias' in 'ema2' holds NaN"),
        (lambda: {"args": {"output_dir": Path("x")}}, "not so 'output_dir'"),
    ],
)
def test_what_has_no_published_counterpart_is_not_written(tmp_path, arguments, named):
    with pytest.raises(ValueError, match=f"(?s){named}"):
        save_original_checkpoint(tmp_path / "a.pth", **{"transformer": tiny(), **arguments()})
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten_and_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match=r"a\.pth exists"):
        save_original_checkpoint(path, tiny())
    assert path.read_text() == "precious"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save_original_checkpoint(tmp_path / "nowhere" / "a.pth", tiny())

    def full_disk(checkpoint, file):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_original_checkpoint(tmp_path / "b.pth", tiny())
    assert os.listdir(tmp_path) == ["a.pth"]
