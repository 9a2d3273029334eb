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
    """
    FLOPs of one training image: (of the student, of the alignment).

    They count the matrix products of a forward pass, three times for what is trained (the backward pass has two products
    for each of the forward's) and once for the frozen teacher. Recomputed activations are not counted.
    """
    transformer, projector = objective.transformer, objective.projector
    config, blocks = transformer.config, transformer.transformer_blocks
    num_patches = (config.sample_size // config.patch_size) ** 2
    extended = num_patches + config.in_context_len
    student = _forward_flops(transformer, num_patches)
    student += _forward_flops(blocks, extended) - _forward_flops(blocks, num_patches)
    alignment = 0
    if projector is not None:
        alignment += 3 * _forward_flops(projector, num_patches)
        if hasattr(projector, "blocks"):
            alignment += 3 * (
                _forward_flops(projector.blocks, extended) - _forward_flops(projector.blocks, num_patches)
            )
    if teacher is not None:
        tokens, settings = teacher.grid_size**2 + teacher.num_prefix_tokens, teacher.model.config
        alignment += _forward_flops(teacher.model, tokens)
        alignment += settings.num_hidden_layers * 4 * tokens**2 * settings.hidden_size
    return 3 * student, alignment


def _forward_flops(module: nn.Module, num_tokens: int) -> int:
    """FLOPs of the matrix products of one image, a multiply-add counted as two; of the attentions, JiT's alone."""
    flops = 0
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            per_image = {"conditioning", "modulation"} & set(name.split("."))
            flops += 2 * layer.weight.numel() * (1 if per_image else num_tokens)
        elif isinstance(layer, JiTAttention):
            flops += 4 * num_tokens**2 * layer.heads * layer.head_dim
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
