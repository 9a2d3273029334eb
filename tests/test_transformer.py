"""JiTTransformer2DModel keeps the promises of a diffusers model."""

import copy
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo
from accelerate import cpu_offload, disk_offload
from diffusers import AutoModel
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig

from pixelrepa_diffusers import PRESETS, JiTTransformer2DModel
from pixelrepa_diffusers.transformer_jit import JiTAttnProcessor, JiTBlock, JiTPositionTables, JiTRMSNorm


CPU = torch.device("cpu")


def make_inputs(batch_size=2, channels=3, size=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch_size, channels, size, size, generator=generator).to(dtype),
        "timestep": torch.linspace(0.1, 0.9, batch_size),
        "class_labels": torch.arange(batch_size),
    }


@torch.no_grad()
def predict(transformer, **inputs):
    return transformer(**(inputs or make_inputs())).sample


def assert_close(actual, expected):
    # Loaded weights begin elsewhere in memory than made ones, which decides the last bits of a product.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def assert_same_weights(loaded, transformer):
    expected = transformer.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def settings(transformer):
    return {name: value for name, value in transformer.config.items() if not name.startswith("_")}


@pytest.fixture
def saved(make_transformer, tmp_path):
    transformer = make_transformer()
    transformer.save_pretrained(tmp_path / "saved")
    return transformer, tmp_path / "saved"


# Sizes


PUBLISHED_MILLIONS = {"JiT-B/16": 131, "JiT-L/16": 459, "JiT-H/16": 953}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_published_size_and_predicts_an_image(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        transformer = JiTTransformer2DModel(**preset.transformer_config()).eval()
        # The tables are computed, not loaded, so they are real even here; a real call has them on the model's device.
        transformer.tables = transformer.tables.to("meta")
        output = transformer(
            **make_inputs(channels=preset.in_channels, size=preset.sample_size), return_alignment_states=True
        )
    millions = round(transformer.num_parameters() / 1e6)
    assert millions == PUBLISHED_MILLIONS.get(name, millions)
    assert output.sample.shape == (2, preset.in_channels, preset.sample_size, preset.sample_size)
    tokens = (preset.sample_size // preset.patch_size) ** 2
    width = preset.num_attention_heads * preset.attention_head_dim
    assert output.alignment_states.shape == (2, tokens, width)


@pytest.mark.parametrize(
    "changes",
    [
        {"in_channels": 1},
        {"in_channels": 4, "num_classes": 1},
        {"sample_size": 15, "patch_size": 3},
        {"sample_size": 21, "patch_size": 7, "num_classes": 1001},
        {"sample_size": 4, "patch_size": 4},
        {"patch_size": 1, "sample_size": 6, "bottleneck_dim": 1},
        {"in_context_len": 0},
        {"in_context_start": 0},
        {"in_context_start": 3},
        {"num_layers": 1, "in_context_start": 0, "num_attention_heads": 3, "attention_head_dim": 4},
    ],
    ids=str,
)
def test_any_size_channel_and_class_count_predicts_an_image(make_transformer, changes):
    transformer = make_transformer(**changes)
    config = transformer.config
    inputs = make_inputs(channels=config.in_channels, size=config.sample_size)
    inputs["class_labels"] = torch.tensor([0, config.num_classes])
    sample = predict(transformer, **inputs)
    assert sample.shape == inputs["hidden_states"].shape
    assert sample.isfinite().all()
    assert sample.std() > 0


def test_dropout_lies_in_the_middle_half_of_the_blocks(make_transformer):
    transformer = make_transformer(num_layers=11, dropout=0.2)
    blocks = [*transformer.encoder_blocks, *transformer.transformer_blocks]
    assert [block.ff.dropout.p for block in blocks] == [0, 0, 0.2, 0.2, 0.2, 0.2, 0, 0, 0, 0, 0]
    assert [block.attn.to_out[1].p for block in blocks] == [0, 0, 0.2, 0.2, 0.2, 0.2, 0, 0, 0, 0, 0]


def test_a_fresh_model_has_the_published_initialisation():
    transformer = JiTTransformer2DModel(**PRESETS["JiT-Digits/4"].transformer_config())
    state = transformer.state_dict()
    assert predict(transformer.eval(), **make_inputs()).abs().max() == 0
    for name, tensor in state.items():
        if name.endswith(("modulation.weight", "bias")) or name == "final_layer.linear.weight":
            assert tensor.abs().max() == 0, name
        elif "class_embedding" in name or "time_embedding" in name or name == "in_context_positions":
            assert tensor.std() == pytest.approx(0.02, rel=0.2), name
        elif "norm" in name:
            assert (tensor == 1).all(), name
        else:
            # Xavier uniform; queries, keys and values as the one matrix they are in the published code.
            rows, columns = tensor.flatten(1).shape
            bound = (6 / (columns + rows * (3 if re.search("to_[qkv]", name) else 1))) ** 0.5
            assert tensor.abs().max() <= bound, name
            assert tensor.abs().max() > 0.95 * bound, name


# One call


def test_a_tuple_holds_what_the_output_holds(make_transformer):
    transformer, inputs = make_transformer(), make_inputs()
    with torch.no_grad():
        output = transformer(**inputs, return_alignment_states=True)
        sample, states = transformer(**inputs, return_alignment_states=True, return_dict=False)
        (alone,) = transformer(**inputs, return_dict=False)
    assert torch.equal(output.sample, sample)
    assert torch.equal(output.alignment_states, states)
    assert torch.equal(output.sample, alone)
    assert transformer(**inputs).alignment_states is None


def test_the_same_call_gives_the_same_result_and_changes_no_input(make_transformer):
    transformer, inputs = make_transformer(), make_inputs()
    before = copy.deepcopy(inputs)
    assert torch.equal(predict(transformer, **inputs), predict(transformer, **inputs))
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_an_image_does_not_depend_on_its_batch(make_transformer):
    transformer, inputs = make_transformer(), make_inputs(5)
    together = predict(transformer, **inputs)
    alone = torch.cat([predict(transformer, **{k: v[i : i + 1] for k, v in inputs.items()}) for i in range(5)])
    assert_close(together, alone)


def test_one_time_for_all_may_be_a_number_or_a_tensor(make_transformer):
    transformer, inputs = make_transformer(), make_inputs()
    del inputs["timestep"]
    expected = predict(transformer, timestep=torch.tensor([0.3, 0.3]), **inputs)
    assert torch.equal(predict(transformer, timestep=0.3, **inputs), expected)
    assert torch.equal(predict(transformer, timestep=torch.tensor(0.3), **inputs), expected)
    assert torch.equal(predict(transformer, timestep=torch.tensor([0.3]), **inputs), expected)


@torch.no_grad()
def test_alignment_states_are_the_patch_tokens_at_any_depth(make_transformer):
    transformer, inputs = make_transformer(), make_inputs()
    seen = []
    for block in (*transformer.encoder_blocks, *transformer.transformer_blocks):
        block.register_forward_pre_hook(lambda block, arguments: seen.append(arguments[0]))
    transformer(**inputs)
    outputs = [
        transformer(**inputs, return_alignment_states=True, alignment_depth=depth).alignment_states
        for depth in range(4)
    ]
    assert [tokens.shape[1] for tokens in seen[:4]] == [16, 16, 18, 18]
    for depth in range(4):
        assert torch.equal(outputs[depth], seen[depth][:, -16:])
    default = transformer(**inputs, return_alignment_states=True).alignment_states
    assert torch.equal(default, outputs[transformer.config.in_context_start])


def test_velocity_is_clamped_near_the_image_and_float32(make_transformer):
    transformer = make_transformer(t_eps=0.05)
    prediction, sample = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    times = torch.tensor([0.0, 0.5, 0.96, 1.0])
    expected = (prediction - sample) / torch.tensor([1.0, 0.5, 0.05, 0.05]).view(4, 1, 1, 1)
    torch.testing.assert_close(transformer.velocity(prediction, sample, times), expected)
    half = transformer.velocity(prediction.bfloat16(), sample, 0.5)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, (prediction.bfloat16().float() - sample) / 0.5)


# Saving and loading


def test_a_loaded_model_is_the_saved_one(saved):
    transformer, folder = saved
    loaded = JiTTransformer2DModel.from_pretrained(folder)
    assert settings(loaded) == settings(transformer)
    assert not loaded.training
    assert_same_weights(loaded, transformer)
    assert_close(predict(loaded), predict(transformer))


def test_loading_and_saving_again_writes_the_same_files(saved, tmp_path):
    _, folder = saved
    JiTTransformer2DModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors", "transformer_jit.py"}
    for name in names - {"config.json"}:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    configs = [json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "again")]
    configs[1].pop("_name_or_path")
    assert configs[0] == configs[1]


def test_position_tables_are_not_saved(make_transformer):
    assert not any(name.startswith("tables") for name in make_transformer().state_dict())


def test_shards_load_to_the_same_model(make_transformer, tmp_path):
    transformer = make_transformer()
    transformer.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(JiTTransformer2DModel.from_pretrained(tmp_path), transformer)


def test_a_variant_loads_under_its_name_alone(make_transformer, tmp_path):
    transformer = make_transformer()
    transformer.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert_same_weights(JiTTransformer2DModel.from_pretrained(tmp_path, variant="fp16"), transformer)
    with pytest.raises(OSError):
        JiTTransformer2DModel.from_pretrained(tmp_path)


def test_auto_model_loads_it_with_trust(saved):
    transformer, folder = saved
    loaded = AutoModel.from_pretrained(str(folder), trust_remote_code=True)
    assert type(loaded).__name__ == "JiTTransformer2DModel"
    assert_same_weights(loaded, transformer)
    assert_close(predict(loaded), predict(transformer))


# Types of number


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_a_model_loaded_in_half_precision_keeps_the_timestep_embedding_in_float32(saved, dtype, bound):
    transformer, folder = saved
    loaded = JiTTransformer2DModel.from_pretrained(folder, dtype=dtype)
    assert loaded.dtype == dtype
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if "time_embedding" in name else dtype), name
    assert predict(loaded).dtype == dtype
    assert (predict(loaded).float() - predict(transformer)).abs().max() < bound


def test_a_model_cast_to_half_precision_works_with_inputs_of_any_type(make_transformer):
    expected = predict(make_transformer())
    transformer = make_transformer().to(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(dtype=dtype)
        inputs["timestep"] = inputs["timestep"].to(dtype)
        assert (predict(transformer, **inputs).float() - expected).abs().max() < 6e-2


@pytest.mark.parametrize(
    "move",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half().float(),
        lambda module: module.to("meta").to_empty(device="cpu"),
        copy.deepcopy,
    ],
    ids=["bfloat16", "there and back", "to_empty", "deepcopy"],
)
def test_position_tables_stay_exact_float32_wherever_the_model_goes(move):
    expected = JiTPositionTables(4, 8, 2, 16)
    moved = move(JiTPositionTables(4, 8, 2, 16))
    for ours, theirs in zip(moved(), expected(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_position_tables_are_real_on_a_model_built_without_memory():
    with torch.device("meta"):
        tables = JiTPositionTables(4, 8, 2, 16)
    assert torch.equal(tables.cos, JiTPositionTables(4, 8, 2, 16).cos)


def test_rms_norm_takes_its_statistics_in_float32():
    norm = JiTRMSNorm(64)
    states = 300 * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    expected = norm(states)
    # 300² overflows float16.
    torch.testing.assert_close(norm(states.half()).float(), expected, rtol=2e-3, atol=2e-3)
    assert norm(states.bfloat16()).dtype == torch.bfloat16


def test_under_autocast_the_residual_stream_is_float32_from_the_class_tokens_on(make_transformer):
    # As in the published code, which concatenates float32 class tokens; a model that was cast keeps its type.
    def types(transformer, **inputs):
        seen = []
        for block in transformer.transformer_blocks:
            block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        predict(transformer, **inputs)
        return set(seen)

    with torch.autocast("cpu", torch.bfloat16):
        assert types(make_transformer(), **make_inputs()) == {torch.float32}
    assert types(make_transformer().to(torch.bfloat16), **make_inputs(dtype=torch.bfloat16)) == {torch.bfloat16}


def test_a_norm_rounds_its_result_and_not_its_weight():
    norm = JiTRMSNorm(64, eps=1e-6)
    torch.nn.init.normal_(norm.weight, mean=1, std=0.1)
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = torch.nn.functional.rms_norm(states.double(), (64,), norm.weight.double(), 1e-6)
    assert torch.equal(norm(states), exact.to(torch.bfloat16))


def test_autocast_leaves_parameters_and_gradients_in_float32(make_transformer):
    transformer = make_transformer().train()
    with torch.autocast("cpu", torch.bfloat16):
        sample = transformer(**make_inputs()).sample
    sample.float().square().mean().backward()
    assert {parameter.grad.dtype for parameter in transformer.parameters()} == {torch.float32}
    assert (sample.float() - predict(make_transformer())).abs().max() < 6e-2


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_layerwise_casting_stores_the_blocks_in_eight_bits(make_transformer, storage, compute):
    expected = predict(make_transformer())
    transformer = make_transformer().to(compute)
    transformer.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
    skipped = ("patch_embed", "conditioning", "norm", "final_layer", "in_context_positions")
    for name, parameter in transformer.named_parameters():
        assert parameter.dtype == (compute if any(word in name for word in skipped) else storage), name
    sample = predict(transformer)
    assert sample.dtype == compute
    assert (sample.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_layerwise_casting_of_a_model_loaded_in_bfloat16_works(saved):
    transformer, folder = saved
    loaded = JiTTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16)
    loaded.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    expected = predict(transformer)
    assert (predict(loaded).float() - expected).abs().max() < 0.1 * expected.abs().max()


# Training


def test_every_parameter_gets_a_gradient(make_transformer):
    transformer = make_transformer().train()
    transformer(**make_inputs()).sample.square().mean().backward()
    assert [name for name, p in transformer.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_dropout_acts_in_training_only(make_transformer):
    transformer, inputs = make_transformer(dropout=0.5), make_inputs()
    expected = predict(make_transformer(), **inputs)
    assert torch.equal(predict(transformer, **inputs), expected)
    transformer.train()
    assert not torch.equal(predict(transformer, **inputs), predict(transformer, **inputs))


def test_dropout_is_of_attention_output_and_feed_forward_of_the_middle_half(make_transformer):
    transformer, dropped = make_transformer(num_layers=8, dropout=0.25).train(), {}

    def note(name):
        def hook(module, inputs, output):
            values = inputs[0] if name.endswith("linear_out") else output
            dropped[name] = (values == 0).float().mean().item()

        return hook

    for number, block in enumerate((*transformer.encoder_blocks, *transformer.transformer_blocks)):
        block.attn.register_forward_hook(note(f"{number}.attn"))
        block.ff.linear_out.register_forward_hook(note(f"{number}.linear_out"))
    predict(transformer, **make_inputs())
    for name, share in dropped.items():
        # a few thousand values each; without dropout none is exactly zero
        assert share == (pytest.approx(0.25, abs=0.08) if 2 <= int(name[0]) < 6 else 0), name
    transformer.eval()
    predict(transformer, **make_inputs())
    assert set(dropped.values()) == {0}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_changes_neither_the_loss_nor_a_gradient(make_transformer, dropout):
    results = []
    for checkpointed in (False, True):
        transformer = make_transformer(dropout=dropout).train()
        if checkpointed:
            transformer.enable_gradient_checkpointing()
            assert transformer.is_gradient_checkpointing
        runs = []
        transformer.transformer_blocks[0].attn.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output = transformer(**make_inputs(), return_alignment_states=True)
            loss = output.sample.square().mean() + output.alignment_states.square().mean()
            loss.backward()
        assert len(runs) == 1 + checkpointed
        results.append((loss.detach(), {name: p.grad for name, p in transformer.named_parameters()}))
    (loss, gradients), (checkpointed_loss, checkpointed_gradients) = results
    assert torch.equal(loss, checkpointed_loss)
    for name in gradients:
        torch.testing.assert_close(gradients[name], checkpointed_gradients[name], rtol=0, atol=1e-6, msg=name)


def test_a_lora_trains_alone_and_can_be_saved_loaded_fused_and_turned_off(make_transformer, tmp_path):
    transformer = make_transformer()
    expected = predict(transformer)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    assert torch.equal(predict(transformer), expected)
    trainable = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    assert len(trainable) == 4 * 4 * 2
    assert all("lora" in name for name in trainable)

    optimizer = torch.optim.SGD(trainable.values(), lr=10.0)
    for _ in range(2):  # the first step moves B alone, which starts at zero
        transformer.train()(**make_inputs()).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned = predict(transformer.eval())
    assert (tuned - expected).abs().max() > 0.01

    transformer.save_lora_adapter(tmp_path)
    transformer.disable_lora()
    assert torch.equal(predict(transformer), expected)

    loaded = make_transformer()
    loaded.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert_close(predict(loaded), tuned)
    loaded.fuse_lora()
    assert_close(predict(loaded), tuned)
    loaded.unfuse_lora()
    loaded.unload_lora()
    assert_close(predict(loaded), expected)


# Attention


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash"])
def test_attention_backends_agree(make_transformer, backend):
    transformer = make_transformer()
    expected = predict(transformer)
    with attention_backend(backend):
        assert_close(predict(transformer), expected)


def test_setting_a_backend_reaches_every_layer_and_is_undone(make_transformer):
    transformer = make_transformer()
    expected = predict(transformer)

    def backends():
        return {processor._attention_backend for processor in transformer.attn_processors.values()}

    # The context restores the process-wide backend, which `set_attention_backend` changes too.
    with attention_backend("native"):
        transformer.set_attention_backend("_native_math")
        assert {backend.value for backend in backends()} == {"_native_math"}
        assert_close(predict(transformer), expected)
        transformer.reset_attention_backend()
        assert backends() == {None}
        with pytest.raises(ValueError, match="must be one of the following"):
            transformer.set_attention_backend("no_such_backend")


def test_attention_processors_can_be_replaced_and_put_back(make_transformer):
    class Uniform(JiTAttnProcessor):
        def __call__(self, attn, hidden_states, image_rotary_emb):
            return attn.to_out[0](attn.to_v(hidden_states).mean(1, keepdim=True).expand_as(hidden_states))

    transformer = make_transformer()
    expected, original = predict(transformer), transformer.attn_processors
    assert len(original) == 4
    transformer.set_attn_processor(Uniform())
    assert {type(processor) for processor in transformer.attn_processors.values()} == {Uniform}
    assert not torch.allclose(predict(transformer), expected, atol=1e-3)
    transformer.set_attn_processor(dict(original))
    assert transformer.attn_processors == original
    assert torch.equal(predict(transformer), expected)
    with pytest.raises(ValueError, match="does not match the number of attention layers"):
        transformer.set_attn_processor({"one": JiTAttnProcessor()})


def test_fused_projections_compute_the_same_and_come_apart_again(make_transformer):
    transformer = make_transformer()
    expected, names = predict(transformer), set(transformer.state_dict())
    transformer.fuse_qkv_projections()
    calls = []
    transformer.encoder_blocks[0].attn.to_q.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_close(predict(transformer), expected)
    assert calls == []
    transformer.unfuse_qkv_projections()
    assert set(transformer.state_dict()) == names
    assert torch.equal(predict(transformer), expected)
    assert calls == [1]


# Memory


@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize(
    "options",
    [
        {"offload_type": "block_level", "num_blocks_per_group": 1},
        {"offload_type": "block_level", "num_blocks_per_group": 3},
        {"offload_type": "leaf_level"},
    ],
    ids=["block", "blocks", "leaf"],
)
def test_group_offloading_changes_nothing(make_transformer, tmp_path, options, to_disk):
    transformer = make_transformer()
    expected = predict(transformer)
    transformer.enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_to_disk_path=str(tmp_path) if to_disk else None, **options
    )
    for _ in range(2):
        assert_close(predict(transformer), expected)


@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "buffers too"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_sequential_offloading_changes_nothing(make_transformer, tmp_path, place, buffers):
    transformer = make_transformer()
    expected = predict(transformer)
    offload = cpu_offload if place == "cpu" else partial(disk_offload, offload_dir=str(tmp_path))
    offload(transformer, execution_device=CPU, offload_buffers=buffers)
    assert {parameter.device.type for parameter in transformer.parameters()} == {"meta"}
    for _ in range(2):
        assert_close(predict(transformer), expected)


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        {"": "cpu"},
        {
            "in_context_positions": "cpu",
            "tables": "disk",
            "patch_embed": "disk",
            "conditioning": "cpu",
            "encoder_blocks": "disk",
            "transformer_blocks.0": "cpu",
            "transformer_blocks.1": "disk",
            "final_layer": "disk",
        },
    ],
    ids=["auto", "one device", "split"],
)
def test_device_maps_change_nothing(saved, tmp_path, device_map):
    transformer, folder = saved
    loaded = JiTTransformer2DModel.from_pretrained(folder, device_map=device_map, offload_folder=str(tmp_path))
    assert loaded.hf_device_map
    assert_close(predict(loaded), predict(transformer))


def test_an_automatic_device_map_keeps_blocks_whole(saved, tmp_path):
    transformer, folder = saved
    loaded = JiTTransformer2DModel.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": 30_000}, offload_folder=str(tmp_path)
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert not [name for name in loaded.hf_device_map if re.search(r"blocks\.\d+\.", name)]
    assert_close(predict(loaded), predict(transformer))


# Compilation. The "eager" backend traces and guards like any other, and compiles no kernels.


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def at_times(batch_size, *times):
    inputs = make_inputs(batch_size)
    return [{**inputs, "timestep": torch.tensor(time)} for time in times]


@torch.no_grad()
def test_the_whole_model_compiles_to_one_graph_for_every_step(make_transformer, fresh_dynamo):
    changes = {"num_layers": 2, "in_context_start": 1}
    transformer = make_transformer(**changes)
    compiled = torch.compile(make_transformer(**changes), fullgraph=True, backend="eager")
    steps = at_times(2, 0.0, 0.02, 0.5, 1.0)
    for step in steps:
        assert torch.equal(predict(compiled, **step), predict(transformer, **step))
    assert fresh_dynamo() == 1
    # Guidance doubles the batch: one graph more, for any size from then on.
    for step in (*at_times(4, 0.1, 0.7), *steps, *at_times(6, 0.3)):
        assert torch.equal(predict(compiled, **step), predict(transformer, **step))
    assert fresh_dynamo() == 2


@torch.no_grad()
def test_compiled_blocks_are_one_graph_for_every_layer_step_and_batch(make_transformer, fresh_dynamo):
    # Blocks that differ in their dropout are the same graph outside training. No two sizes here are equal, since
    # torch takes sizes that are equal at first to be equal for ever.
    changes = {"dropout": 0.2, "attention_head_dim": 12}
    transformer, compiled = make_transformer(**changes), make_transformer(**changes)
    compiled.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        # With class tokens and without, guided and not.
        for step in (*at_times(2, 0.0, 0.02), *at_times(4, 0.1, 0.7), *at_times(2, 1.0), *at_times(6, 0.4)):
            assert torch.equal(predict(compiled, **step), predict(transformer, **step))
    assert fresh_dynamo() == 1


def test_the_model_can_be_exported(make_transformer):
    transformer, inputs = make_transformer(num_layers=2, in_context_start=1), make_inputs()
    exported = torch.export.export(transformer, args=(), kwargs=inputs).module()
    assert torch.equal(predict(exported, **inputs), predict(transformer, **inputs))


def test_a_compiled_training_step_has_the_gradients_of_a_plain_one(make_transformer, fresh_dynamo):
    gradients = []
    for compiled in (False, True):
        transformer = make_transformer(num_layers=1, in_context_start=0).train()
        call = torch.compile(transformer, fullgraph=True, backend="aot_eager") if compiled else transformer
        output = call(**make_inputs(), return_alignment_states=True)
        (output.sample.square().mean() + output.alignment_states.square().mean()).backward()
        gradients.append({name: p.grad for name, p in transformer.named_parameters()})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_parts_diffusers_asks_for_by_name_exist(make_transformer):
    transformer = make_transformer()
    classes = {type(module).__name__ for module in transformer.modules()}
    assert set(transformer._no_split_modules) | set(transformer._repeated_blocks) <= classes
    names = [name for name, _ in transformer.named_parameters()]
    for pattern in (*transformer._skip_layerwise_casting_patterns, *transformer._keep_in_fp32_modules):
        assert any(re.search(pattern, name) for name in names), pattern
    assert isinstance(transformer.encoder_blocks[0], JiTBlock)
    assert Path(sys.modules[JiTBlock.__module__].__file__).name == "transformer_jit.py"
