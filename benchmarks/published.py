"""Shared by the benchmarks: timers, reports, and the published code's arithmetic on our weights."""

from __future__ import annotations

import copy
import os
import statistics
import time
import types
from collections.abc import Callable
from dataclasses import asdict

import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F

from pixelrepa_diffusers.files import write_json
from pixelrepa_diffusers.sampling import device_name, versions
from pixelrepa_diffusers.transformer_jit import JiTAttention, JiTRMSNorm


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


# ------------------------------------------------------------------------------------------------------------ timing


class StepClock:
    """Time between named marks of a step without a device sync: CUDA events on a GPU, `perf_counter` on a CPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str | None, torch.cuda.Event | float]] = []

    def mark(self, name: str | None) -> None:
        """End the part called `name`, which began at the previous mark; None begins a step."""
        moment = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            moment.record()
        self.marks.append((name, moment))

    def medians(self) -> dict[str, float]:
        """Median seconds of each part over the steps, after a device sync."""
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


# ----------------------------------------------------------------------------------------------------------- reports


def write_report(args, device: torch.device, tables: dict[str, list[dict]]) -> dict:
    """Print the machine and the tables (wide ones transposed), write them with the arguments, and return all."""
    report = {
        "arguments": {**asdict(args), "output_dir": str(args.output_dir)},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # above the number of cores, the machine was busy
        "versions": versions(),
        **tables,
    }
    print(f"{report['device']}, {report['threads']} CPU threads, load average {report['load_average']:.1f}")
    for name, rows in tables.items():
        if rows:
            table = pd.DataFrame(rows, dtype=object).dropna(axis="columns", how="all")
            table, is_wide = table.where(table.notna(), "-"), len(table.columns) > len(table)
            text = (table.T if is_wide else table).to_string(
                index=is_wide, header=not is_wide, float_format="{:.4g}".format
            )
            print(f"\n{name}\n{text}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "benchmark.json", report)
    return report
