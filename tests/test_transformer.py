"""JiTTransformer2DModel behaves as a diffusers model."""

import copy
import re

import pytest
import torch
import torch._dynamo
from accelerate import cpu_offload, disk_offload
from diffusers.models.attention_dispatch import attention_backend

from pixelrepa_diffusers import PRESETS, JiTTransformer2DModel, MaskedTransformerAdapter
from pixelrepa_diffusers.transformer_jit import JiTPositionTables, JiTRMSNorm


CPU = torch.device("cpu")


def make_inputs(batch_size=2, channels=3, size=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch_size, channels, size, size, generator=generator).to(dtype),
        "timestep": torch.linspace(0.1, 0.9, batch_size).to(dtype),
        "class_labels": torch.arange(batch_size),
    }


@torch.no_grad()
def predict(transformer, **inputs):
    return transformer(**(inputs or make_inputs())).sample


def assert_close(actual, expected):
    # Loaded weights have another memory alignment, which changes the last bits of a matrix product.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def backward(transformer):
    """Loss of sample and alignment states, and the gradients by name."""
    output = transformer(**make_inputs(), return_alignment_states=True)
    loss = output.sample.square().mean() + output.alignment_states.square().mean()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in transformer.named_parameters()}


@pytest.fixture(scope="module")
def saved(make_transformer, tmp_path_factory):
    """A transformer, its prediction and its saved folder."""
    folder, transformer = tmp_path_factory.mktemp("transformer"), make_transformer()
    transformer.save_pretrained(folder)
    return transformer, predict(transformer), folder


# Architecture


@pytest.mark.parametrize(
    "changes",
    [
        {"in_channels": 4, "num_classes": 1},
        {"sample_size": 21, "patch_size": 7},
        {"sample_size": 4, "patch_size": 4},
        {"patch_size": 1, "sample_size": 6, "bottleneck_dim": 1},
        {"in_context_len": 0},
        {"in_context_start": 3},
        {"num_layers": 1, "in_context_start": 0, "num_attention_heads": 3, "attention_head_dim": 4},
    ],
    ids=str,
)
def test_unusual_sizes_predict_an_image(make_transformer, changes):
    transformer = make_transformer(**changes)
    config = transformer.config
    inputs = make_inputs(channels=config.in_channels, size=config.sample_size)
    inputs["class_labels"] = torch.tensor([0, config.num_classes])
    sample = predict(transformer, **inputs)
    assert sample.shape == inputs["hidden_states"].shape
    assert sample.isfinite().all() and sample.std() > 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sample_size": 18}, "not a multiple of `patch_size` 4; the nearest sizes are 16 and 20"),
        ({"attention_head_dim": 6}, "`attention_head_dim` must be a multiple of 4"),
        ({"in_context_start": 4}, r"`in_context_start` must lie in \[0, 3\]"),
        ({"sample_size": 32}, r"shape \(batch_size, 3, 32, 32\), got \(2, 3, 16, 16\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make_transformer, changes, message):
    with pytest.raises(ValueError, match=message):
        predict(make_transformer(**changes))


@pytest.mark.parametrize(
    "module",
    [
        JiTTransformer2DModel(**PRESETS["JiT-Digits/4"].transformer_config()),
        MaskedTransformerAdapter(256, 4, 24, grid_size=4, in_context_len=64, num_classes=500),
    ],
    ids=lambda module: type(module).__name__,
)
def test_fresh_weights_have_the_published_initialization(module):
    for name, tensor in module.state_dict().items():
        if name.endswith(("modulation.weight", "bias")) or name == "final_layer.linear.weight":
            assert tensor.abs().max() == 0, name
        elif re.search("class_embedding|time_embedding|in_context_positions|mask_token", name):
            assert tensor.std() == pytest.approx(0.02, rel=0.2), name
        elif tensor.ndim == 1:  # norms
            assert (tensor == 1).all(), name
        else:
            # Xavier uniform, with queries, keys and values as one matrix
            rows, columns = tensor.flatten(1).shape
            bound = (6 / (columns + rows * (3 if re.search("to_[qkv]", name) else 1))) ** 0.5
            assert 0.95 * bound < tensor.abs().max() <= bound, name


def test_dropout_acts_on_attention_and_feed_forward_of_the_middle_half(make_transformer):
    transformer, dropped = make_transformer(num_layers=8, dropout=0.25).train(), {}

    def record(name, values):
        dropped[name] = (values == 0).float().mean().item()

    for index, block in enumerate((*transformer.encoder_blocks, *transformer.transformer_blocks)):
        block.attn.register_forward_hook(lambda _, inputs, output, index=index: record((index, "attn"), output))
        block.ff.linear_out.register_forward_pre_hook(lambda _, inputs, index=index: record((index, "ff"), inputs[0]))
    predict(transformer)
    for (index, name), share in dropped.items():
        assert share == (pytest.approx(0.25, abs=0.08) if 2 <= index < 6 else 0), (index, name)
    predict(transformer.eval())
    assert set(dropped.values()) == {0}


# Forward pass


@torch.no_grad()
def test_forward_is_deterministic_in_every_output_form_and_leaves_its_inputs_alone(make_transformer):
    transformer, inputs = make_transformer(), make_inputs()
    before = copy.deepcopy(inputs)
    output = transformer(**inputs, return_alignment_states=True)
    sample, states = transformer(**inputs, return_alignment_states=True, return_dict=False)
    (alone,) = transformer(**inputs, return_dict=False)
    assert torch.equal(output.sample, sample) and torch.equal(output.sample, alone)
    assert torch.equal(output.alignment_states, states)
    assert transformer(**inputs).alignment_states is None
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_an_image_does_not_depend_on_its_batch(make_transformer):
    transformer, inputs = make_transformer(), make_inputs(5)
    alone = [predict(transformer, **{k: v[i : i + 1] for k, v in inputs.items()}) for i in range(5)]
    assert_close(predict(transformer, **inputs), torch.cat(alone))


@pytest.mark.parametrize("timestep", [0.3, torch.tensor(0.3), torch.tensor([0.3])], ids=repr)
def test_one_time_for_the_batch_may_be_a_number_or_a_tensor(make_transformer, timestep):
    transformer, inputs = make_transformer(), make_inputs()
    expected = predict(transformer, **{**inputs, "timestep": torch.tensor([0.3, 0.3])})
    assert torch.equal(predict(transformer, **{**inputs, "timestep": timestep}), expected)


@torch.no_grad()
def test_alignment_states_are_the_patch_tokens_at_any_depth(make_transformer):
    transformer, inputs, seen = make_transformer(), make_inputs(), []
    for block in (*transformer.encoder_blocks, *transformer.transformer_blocks):
        block.register_forward_pre_hook(lambda block, arguments: seen.append(arguments[0]))
    transformer(**inputs)
    assert [tokens.shape[1] for tokens in seen] == [16, 16, 18, 18]
    for depth, tokens in enumerate(seen[:]):
        output = transformer(**inputs, return_alignment_states=True, alignment_depth=depth)
        assert torch.equal(output.alignment_states, tokens[:, -16:])
    default = transformer(**inputs, return_alignment_states=True).alignment_states
    assert torch.equal(default, seen[transformer.config.in_context_start][:, -16:])


def test_a_loaded_model_equals_the_saved_one_and_saves_the_same_files(saved, tmp_path):
    transformer, expected, folder = saved
    loaded = JiTTransformer2DModel.from_pretrained(folder)
    assert not loaded.training
    torch.testing.assert_close(loaded.state_dict(), transformer.state_dict(), rtol=0, atol=0)
    assert_close(predict(loaded), expected)
    loaded.save_pretrained(tmp_path)
    one, two = ({path.name: path.read_bytes() for path in place.iterdir()} for place in (folder, tmp_path))
    assert one == two
    assert set(one) == {"config.json", "diffusion_pytorch_model.safetensors", "transformer_jit.py"}


# Dtypes


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_loading_keeps_the_timestep_embedding_in_float32(saved, dtype, bound):
    _, expected, folder = saved
    loaded = JiTTransformer2DModel.from_pretrained(folder, dtype=dtype)
    assert loaded.dtype == dtype
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if "time_embedding" in name else dtype), name
    for inputs in (make_inputs(), make_inputs(dtype=dtype)):
        sample = predict(loaded, **inputs)
        assert sample.dtype == dtype
        assert (sample.float() - expected).abs().max() < bound


class Int8Linear(torch.nn.Linear):
    """Weight-only quantization in miniature: an integer weight, dequantized in forward."""

    def __init__(self, linear):
        torch.nn.Module.__init__(self)
        self.scale = linear.weight.abs().max() / 127
        weight = (linear.weight / self.scale).round().to(torch.int8)
        self.weight, self.bias = torch.nn.Parameter(weight, requires_grad=False), linear.bias

    def forward(self, hidden_states):
        return torch.nn.functional.linear(hidden_states, self.weight.to(hidden_states.dtype) * self.scale, self.bias)


def test_quantized_linear_layers_do_not_change_the_dtype_of_activations(make_transformer):
    transformer = make_transformer()
    expected = predict(transformer)
    for name, module in list(transformer.named_modules()):
        if type(module) is torch.nn.Linear:
            transformer.set_submodule(name, Int8Linear(module))
    sample = predict(transformer)
    assert sample.dtype == torch.float32
    assert 0 < (sample - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    "move",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half().float(),
        lambda module: module.to("meta").to_empty(device="cpu"),
        copy.deepcopy,
    ],
    ids=["bfloat16", "half and back", "to_empty", "deepcopy"],
)
def test_position_tables_stay_exact_float32(move):
    with torch.device("meta"):
        tables = JiTPositionTables(4, 8, 2, 16)
    for moved, expected in zip(move(tables)(), JiTPositionTables(4, 8, 2, 16)(), strict=True):
        assert moved.dtype == torch.float32
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_computes_in_float32_and_rounds_only_its_result(dtype):
    norm = JiTRMSNorm(64, eps=1e-6)
    torch.nn.init.normal_(norm.weight, mean=1, std=0.1)
    states = 300 * torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)  # 300² overflows float16
    exact = torch.nn.functional.rms_norm(states.double(), (64,), norm.weight.double(), 1e-6)
    assert torch.equal(norm(states), exact.to(dtype))


def test_the_residual_stream_is_float32_after_the_class_tokens_under_autocast(make_transformer):
    transformer, dtypes = make_transformer(), set()
    for block in transformer.transformer_blocks:
        block.register_forward_pre_hook(lambda _, arguments: dtypes.add(arguments[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        sample = predict(transformer)
    assert dtypes == {torch.float32}
    assert (sample.float() - predict(make_transformer())).abs().max() < 6e-2


def test_layerwise_casting_stores_the_blocks_in_float8(saved):
    _, expected, folder = saved
    compute = torch.bfloat16
    loaded = JiTTransformer2DModel.from_pretrained(folder, dtype=compute)
    loaded.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    precise = "patch_embed|conditioning|norm|final_layer|in_context_positions"
    for name, parameter in loaded.named_parameters():
        kept = torch.float32 if "time_embedding" in name else compute
        assert parameter.dtype == (kept if re.search(precise, name) else torch.float8_e4m3fn), name
    sample = predict(loaded)
    assert sample.dtype == compute
    assert (sample.float() - expected).abs().max() < 0.1 * expected.abs().max()


# Training


@pytest.mark.parametrize("autocast", [False, True])
def test_every_parameter_gets_a_float32_gradient(make_transformer, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, gradients = backward(make_transformer().train())
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32 and gradient.any(), name


def test_gradient_checkpointing_does_not_change_loss_or_gradients(make_transformer):
    results = []
    for checkpointed in (False, True):
        transformer, runs = make_transformer(dropout=0.5).train(), []
        if checkpointed:
            transformer.enable_gradient_checkpointing()
        transformer.transformer_blocks[0].attn.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            results.append(backward(transformer))
        assert len(runs) == 1 + checkpointed
    (loss, gradients), (checkpointed_loss, checkpointed_gradients) = results
    assert torch.equal(loss, checkpointed_loss)
    torch.testing.assert_close(gradients, checkpointed_gradients, rtol=0, atol=1e-6)


# Attention


def test_attention_backends_agree(make_transformer):
    transformer = make_transformer()
    expected = predict(transformer)
    with attention_backend("native"):  # restores the process-wide backend, which `set_attention_backend` changes
        for backend in ("_native_math", "_native_flash"):
            transformer.set_attention_backend(backend)
            assert {p._attention_backend.value for p in transformer.attn_processors.values()} == {backend}
            assert_close(predict(transformer), expected)


def test_one_product_for_queries_keys_and_values_gives_the_same_gradients(make_transformer):
    separate, joint = make_transformer(), make_transformer()
    for processor in joint.attn_processors.values():
        processor.joint_projections = True
    torch.testing.assert_close(backward(joint), backward(separate), rtol=1e-4, atol=1e-6)


def test_fused_projections_give_the_same_result(make_transformer):
    transformer = make_transformer()
    expected, names, calls = predict(transformer), set(transformer.state_dict()), []
    transformer.encoder_blocks[0].attn.to_q.register_forward_pre_hook(lambda *_: calls.append(1))
    transformer.fuse_qkv_projections()
    assert_close(predict(transformer), expected)
    assert calls == []
    transformer.unfuse_qkv_projections()
    assert set(transformer.state_dict()) == names
    assert torch.equal(predict(transformer), expected)


# Offloading


OFFLOADING = {
    "to memory": lambda model, folder: cpu_offload(model, CPU, offload_buffers=True),
    "to disk": lambda model, folder: disk_offload(model, folder, CPU),
    "to disk, with buffers": lambda model, folder: disk_offload(model, folder, CPU, offload_buffers=True),
    "blocks": lambda model, folder: model.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=3),
    "blocks to disk": lambda model, folder: model.enable_group_offload(
        CPU, CPU, "block_level", num_blocks_per_group=1, offload_to_disk_path=folder
    ),
    "leaves": lambda model, folder: model.enable_group_offload(CPU, CPU, "leaf_level"),
    "leaves to disk": lambda model, folder: model.enable_group_offload(
        CPU, CPU, "leaf_level", offload_to_disk_path=folder
    ),
}


@pytest.mark.parametrize("offload", OFFLOADING)
def test_offloading_changes_nothing(make_transformer, tmp_path, offload):
    transformer = make_transformer()
    expected = predict(transformer)
    OFFLOADING[offload](transformer, str(tmp_path))
    for _ in range(2):
        assert_close(predict(transformer), expected)


SPLIT = {
    "in_context_positions": "cpu",
    "tables": "disk",
    "patch_embed": "disk",
    "conditioning": "cpu",
    "encoder_blocks": "disk",
    "transformer_blocks.0": "cpu",
    "transformer_blocks.1": "disk",
    "final_layer": "disk",
}


@pytest.mark.parametrize("device_map, max_memory", [("auto", {"cpu": 30_000}), (SPLIT, None)], ids=["auto", "split"])
def test_device_maps_change_nothing_and_keep_modules_that_combine_children_whole(
    saved, tmp_path, device_map, max_memory
):
    _, expected, folder = saved
    loaded = JiTTransformer2DModel.from_pretrained(
        folder, device_map=device_map, max_memory=max_memory, offload_folder=str(tmp_path)
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    whole = r"|patch_embed|conditioning|final_layer|(encoder|transformer)_blocks(\.\d+)?|tables|in_context_positions"
    assert all(re.fullmatch(whole, name) for name in loaded.hf_device_map), loaded.hf_device_map
    assert_close(predict(loaded), expected)


# Compilation. The "eager" backend traces and guards like any other, without compiling kernels.


def test_compiled_blocks_share_one_graph_for_all_layers_steps_and_batches(make_transformer):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # All sizes differ here, because torch assumes that sizes which are equal at first stay equal.
    changes = {"dropout": 0.2, "attention_head_dim": 12}
    transformer, compiled = make_transformer(**changes), make_transformer(**changes)
    compiled.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch_size, time in ((2, 0.0), (2, 0.02), (4, 0.1), (4, 0.7), (2, 1.0), (6, 0.4)):
            inputs = {**make_inputs(batch_size), "timestep": torch.tensor(time)}
            assert torch.equal(predict(compiled, **inputs), predict(transformer, **inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_the_model_can_be_exported(make_transformer):
    transformer, inputs = make_transformer(num_layers=1, in_context_start=0), make_inputs()
    exported = torch.export.export(transformer, args=(), kwargs=inputs).module()
    assert torch.equal(predict(exported, **inputs), predict(transformer, **inputs))
