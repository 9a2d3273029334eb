"""The memory that a dry run announces is the memory that a step needs."""

import pytest
import torch

from pixelrepa_diffusers.training.arguments import TrainingArguments
from pixelrepa_diffusers.training.builders import apply_switches, build_objective, build_projector, build_transformer
from pixelrepa_diffusers.training.dry_run import dry_run, estimate_memory
from pixelrepa_diffusers.transformer_jit import JiTBlock


TEACHER_DIM = 64


def saved_bytes(args: TrainingArguments, batch_size: int) -> int:
    """Bytes of all tensors that one forward pass saves for the backward pass, without parameters and buffers."""
    transformer = build_transformer(args, num_classes=10)
    objective = build_objective(args, transformer, build_projector(args, transformer.config, TEACHER_DIM))
    apply_switches(args, objective)
    size = transformer.config.sample_size
    tokens = (size // transformer.config.patch_size) ** 2
    ignored = {t.untyped_storage().data_ptr() for t in (*objective.parameters(), *objective.buffers())}
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in ignored:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other tensor gets its address
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=args.mixed_precision == "bf16"),
    ):
        objective(
            torch.randn(batch_size, 3, size, size),
            torch.zeros(batch_size, dtype=torch.int64),
            torch.rand(batch_size),
            torch.randn(batch_size, 3, size, size),
            torch.randn(batch_size, tokens, TEACHER_DIM),
            torch.ones(batch_size, tokens, dtype=torch.bool),
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


SIZES = {
    "preset": "JiT-Digits/4", "resolution": 32, "num_layers": 6, "attention_head_dim": 8, "num_attention_heads": 8,
    "in_context_start": 2, "train_batch_size": 1,
}  # fmt: skip
COMPILED = {"compile": True, "num_layers": 1, "adapter_layers": 1, "in_context_len": 0, "in_context_start": 0}
RECOMPUTED = {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("mixed_precision", "switches"),
    [("no", {}), ("bf16", {}), ("bf16", COMPILED), ("no", RECOMPUTED), ("bf16", RECOMPUTED)],
)
def test_activations_are_estimated_within_15_percent(mixed_precision, switches, monkeypatch):
    compile_block = JiTBlock.compile  # partitioned as for a GPU, but no machine code is generated
    monkeypatch.setattr(
        JiTBlock, "compile", lambda self, **o: compile_block(self, **o, backend="aot_eager_decomp_partition")
    )
    args = TrainingArguments(**{**SIZES, **switches}, mixed_precision=mixed_precision)
    config = build_transformer(args, 10).config
    measured = saved_bytes(args, 3) - saved_bytes(args, 2)  # without what does not grow with the batch
    estimated = estimate_memory(args, config, 1, 1, 1, TEACHER_DIM, 1)["saved activations (batch 1)"] * 2**30
    assert estimated == pytest.approx(measured, rel=0.15)


def test_only_trained_weights_have_gradients_optimizer_state_and_emas(tmp_path):
    args = TrainingArguments(preset="JiT-B/16", objective="none")
    with torch.device("meta"):
        transformer = build_transformer(args, num_classes=1000)
    transformer.save_config(tmp_path / "transformer")
    size = transformer.num_parameters()
    lora = 12 * 4 * 2 * 16 * 768  # two matrices of rank 16 for each of the four layers of 12 attentions
    for rank, trained in ((None, size), (16, lora)):
        args = TrainingArguments(pretrained_model_name_or_path=str(tmp_path), lora_rank=rank, objective="none")
        memory = dry_run(args, 1, None)["memory_GiB"]
        weights = size + (lora if rank else 0)
        expected = {"weights and gradients": weights + trained, "optimizer": 2 * trained, "EMAs": 2 * trained}
        assert {name: memory[name] for name in expected} == {
            name: round(4 * count / 2**30, 2) for name, count in expected.items()
        }
