"""FLOPs of training from the architecture, and the measured peak that MFU is relative to."""

from __future__ import annotations

import functools
import time

import torch
import torch.nn as nn

from ..objective import PixelREPAObjective
from ..teacher import SemanticTeacher
from ..transformer_jit import JiTAttention


def flops_per_image(objective: PixelREPAObjective, teacher: SemanticTeacher | None) -> tuple[int, int]:
    """FLOPs of one training image: (of the student, of the alignment). Recomputed activations are not counted."""
    config = objective.transformer.config
    num_patches = (config.sample_size // config.patch_size) ** 2
    student, alignment = count_flops(objective.transformer, num_patches, training=True), 0
    if objective.projector is not None:
        alignment += count_flops(objective.projector, num_patches, training=True)
    if teacher is not None:
        tokens, settings = teacher.grid_size**2 + teacher.num_prefix_tokens, teacher.model.config
        alignment += count_flops(teacher.model, tokens)
        alignment += settings.num_hidden_layers * 4 * tokens**2 * settings.hidden_size
    return student, alignment


def count_flops(module: nn.Module, num_patches: int, training: bool = False) -> int:
    """
    FLOPs of the matrix products of one image, a multiply-add counted as two; of the attentions, JiT's alone.

    The backward pass of `training` has two products for each of the forward pass, one for frozen weights.
    """
    extended = num_patches + getattr(module.config, "in_context_len", 0)
    flops = 0
    for name, layer in module.named_modules():
        num_tokens = extended if name.startswith(("transformer_blocks.", "blocks.")) else num_patches
        if isinstance(layer, nn.Linear | nn.Conv2d):
            per_image = {"conditioning", "modulation"} & set(name.split("."))
            passes = 2 + layer.weight.requires_grad if training else 1
            flops += passes * 2 * layer.weight.numel() * (1 if per_image else num_tokens)
        elif isinstance(layer, JiTAttention):
            flops += (3 if training else 1) * 4 * num_tokens**2 * layer.heads * layer.head_dim
    return flops


@functools.cache
def measure_peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Measured peak FLOP/s: the best of the large square matrix products of `seconds`, which include the warm-up."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 512
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times: list[float] = []
    while sum(times) < seconds:
        started = time.perf_counter()
        left @ right
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)
