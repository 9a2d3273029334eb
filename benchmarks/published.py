"""Shared by the benchmarks: FLOP counts, peak FLOP/s, timers, and the published code's arithmetic on our weights.

Letters: N patch tokens, L in-context tokens, T = N or L + N, D width, F feed-forward width, p patch side, C channels.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
import types
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

from pixelrepa_diffusers import JiTTransformer2DModel
from pixelrepa_diffusers.adapter import MaskedTransformerAdapter
from pixelrepa_diffusers.sampling import device_name, versions
from pixelrepa_diffusers.transformer_jit import JiTAttention, JiTRMSNorm


# ------------------------------------------------------------------------------------------------------------- FLOPs


def block_flops(num_tokens: int, dim: int, mlp_ratio: float) -> int:
    """One JiT block: 2·T·(4D² + 3DF) for the linear layers, 4T²D for attention, 12D² for modulation."""
    hidden_dim = int(int(dim * mlp_ratio) * 2 / 3)
    return 2 * num_tokens * (4 * dim**2 + 3 * dim * hidden_dim) + 4 * num_tokens**2 * dim + 12 * dim**2


def timestep_flops(dim: int) -> int:
    return 2 * (256 * dim + dim**2)


def transformer_flops(transformer: JiTTransformer2DModel) -> int:
    """
    FLOPs of the forward pass of one image, a multiply-add counted as two; a training step costs three times as many.
    Matrix products only: norms, rotations and activations are bound by memory.

        patches 2N(p²C·b + bD) + timestep 2(256D + D²) + Σ blocks [2T(4D² + 3DF) + 4T²D + 12D²] + head 4D² + 2N·D·p²C

    with T = N before `in_context_start` and L + N from there on, and b the bottleneck of the patch embedding.
    """
    config = transformer.config
    dim = config.num_attention_heads * config.attention_head_dim
    num_patches = (config.sample_size // config.patch_size) ** 2
    patch_dim = config.patch_size**2 * config.in_channels
    extended = num_patches + config.in_context_len
    return (
        2 * num_patches * (patch_dim * config.bottleneck_dim + config.bottleneck_dim * dim)
        + timestep_flops(dim)
        + config.in_context_start * block_flops(num_patches, dim, config.mlp_ratio)
        + (config.num_layers - config.in_context_start) * block_flops(extended, dim, config.mlp_ratio)
        + 4 * dim**2
        + 2 * num_patches * dim * patch_dim
    )


def adapter_flops(adapter: MaskedTransformerAdapter) -> int:
    """FLOPs of the adapter, counted like [`transformer_flops`]: 2(256D + D²) + blocks + 2N(D² + D·teacher_dim)."""
    config = adapter.config
    dim, num_patches = config.hidden_size, config.grid_size**2
    projection = 0 if adapter.projection is None else 2 * num_patches * (dim**2 + dim * config.teacher_dim)
    blocks = config.num_layers * block_flops(num_patches + config.in_context_len, dim, config.mlp_ratio)
    return timestep_flops(dim) + blocks + projection


def measure_peak_flops(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Measured peak FLOP/s: the best of `repeats` large square matrix products. MFU is relative to it."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = time_interleaved({"matmul": lambda: left @ right}, device, repeats)["matmul"]
    return 2 * size**3 / min(seconds)


# ------------------------------------------------------------------------------------------------------------ timing


class StepClock:
    """Time between named marks of a step without a device sync: CUDA events on a GPU, `perf_counter` on a CPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str | None, torch.cuda.Event | float]] = []

    def mark(self, name: str | None) -> None:
        """End the part called `name`, which began at the previous mark; None begins a step."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def medians(self) -> dict[str, float]:
        """Median seconds of each part over the steps. Synchronizes the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        parts: dict[str, list[float]] = {}
        for (_, begin), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            if name is not None:
                seconds = begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin
                parts.setdefault(name, []).append(seconds)
        return {name: statistics.median(values) for name, values in parts.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_interleaved(
    functions: dict[str, Callable[[], object]], device: torch.device, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """
    Seconds of every call of each function, `repeats` of them, after `warmup` calls.

    The functions take turns, so that a change of the machine's load affects all of them alike: ratios within a turn are
    steadier than the times.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            synchronize(device)
            begin = time.perf_counter()
            function()
            synchronize(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def median_ratio(seconds: list[float], reference: list[float]) -> float:
    """Median over the turns of [`time_interleaved`] of the ratio of two functions' times."""
    return statistics.median(own / other for own, other in zip(seconds, reference, strict=True))


# ------------------------------------------------------------------------------------------- the published arithmetic


class PublishedAttnProcessor:
    """Attention as the published code computes it: one product for queries, keys and values, then normalization,
    rotation, scores and softmax written out in float32."""

    def __call__(
        self, attn: JiTAttention, hidden_states: torch.Tensor, image_rotary_emb: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        projections = (attn.to_q, attn.to_k, attn.to_v)
        weight, bias = (torch.cat([getattr(p, name) for p in projections]) for name in ("weight", "bias"))
        states = F.linear(hidden_states, weight, bias).unflatten(-1, (3, attn.heads, attn.head_dim))
        query, key, value = states.permute(2, 0, 3, 1, 4)  # (B, H, T, d) each
        query, key = (_rotate(states, *image_rotary_emb) for states in (attn.norm_q(query), attn.norm_k(key)))
        with torch.autocast(query.device.type, enabled=False):
            scores = query.float() @ key.float().transpose(-2, -1) * attn.head_dim**-0.5  # (B, H, T, T)
        weights = torch.softmax(scores, dim=-1)
        hidden_states = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)  # (B, T, D)
        return attn.to_out[1](attn.to_out[0](hidden_states))


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = states.unflatten(-1, (-1, 2)).unbind(-1)
    return states * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


def _published_rms_norm(self: JiTRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    states = hidden_states.float()
    states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.eps)
    return (self.weight * states).to(hidden_states.dtype)


def with_published_arithmetic(module: nn.Module) -> nn.Module:
    """Copy a module of JiT blocks (not compiled) into one that shares its tensors and computes like the published code."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    twin = copy.deepcopy(module, shared)
    for layer in twin.modules():
        if isinstance(layer, JiTRMSNorm):
            layer.forward = types.MethodType(_published_rms_norm, layer)
        elif isinstance(layer, JiTAttention):
            layer.set_processor(PublishedAttnProcessor())
    return twin


def fill_zeros(module: nn.Module) -> None:
    """Draw the parameters that are initialized to zero: they would hide most of the network from its output."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)


# ----------------------------------------------------------------------------------------------------------- reports


def describe_machine(device: torch.device) -> dict:
    """Device, threads, load (above the number of cores, the machine was busy) and versions."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": versions(),
    }


def format_table(rows: list[dict[str, object]]) -> str:
    """Rows with equal keys as aligned text; floats with four digits, None as "not measured"."""

    def show(value: object) -> str:
        if value is None:
            return "not measured"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in padded)
