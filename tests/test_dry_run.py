"""The memory that a dry run announces is the memory that a step needs."""

import pytest
import torch

from pixelrepa_diffusers.training.arguments import TrainingArguments
from pixelrepa_diffusers.training.builders import apply_switches, build_objective, build_projector, build_transformer
from pixelrepa_diffusers.training.dry_run import estimate_memory
from pixelrepa_diffusers.transformer_jit import JiTBlock


TEACHER_DIM = 64


def saved_bytes(args: TrainingArguments, batch_size: int) -> int:
    """Bytes of all tensors that one forward pass saves for the backward pass, without parameters and buffers."""
    transformer = build_transformer(args, num_classes=10)
    objective = build_objective(args, transformer, build_projector(args, transformer.config, TEACHER_DIM))
    apply_switches(args, objective)
    size, tokens = (
        transformer.config.sample_size,
        (transformer.config.sample_size // transformer.config.patch_size) ** 2,
    )
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


@pytest.mark.parametrize(
    "mixed_precision, switches",
    [
        ("no", {}),
        ("bf16", {}),
        (
            "bf16",
            {"compile": True, "num_layers": 2, "in_context_len": 0, "in_context_start": 0},
        ),  # one length to compile
        ("no", {"gradient_checkpointing": True}),
        ("bf16", {"gradient_checkpointing": True}),
    ],
)
def test_activations_are_estimated_within_15_percent(mixed_precision, switches, monkeypatch):
    compile_block = JiTBlock.compile  # partitioned as for a GPU, but no machine code is generated
    monkeypatch.setattr(
        JiTBlock, "compile", lambda self, **o: compile_block(self, **o, backend="aot_eager_decomp_partition")
    )
    sizes = {
        "resolution": 32,
        "num_layers": 6,
        "attention_head_dim": 8,
        "num_attention_heads": 8,
        "in_context_start": 2,
    }
    args = TrainingArguments(
        **{"preset": "JiT-Digits/4", **sizes, **switches}, train_batch_size=1, mixed_precision=mixed_precision
    )
    config = build_transformer(args, 10).config
    measured = saved_bytes(args, 3) - saved_bytes(args, 2)  # without what does not grow with the batch
    estimated = estimate_memory(args, config, 1, 1, 1, TEACHER_DIM)["saved activations (batch 1)"] * 2**30
    assert estimated == pytest.approx(measured, rel=0.15)
