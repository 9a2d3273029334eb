# Copyright 2026 The pixelrepa_diffusers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""JiT, the "Just image Transformer" (arXiv 2511.13720): a plain transformer that predicts clean pixels from noisy ones.

Time runs from noise to image: t = 0 is noise, t = 1 is the image, z = t·x + (1 − t)·e.

Letters in the shape trails: B batch, C image channels, S image side, p patch side, N = (S/p)² patch tokens, L in-context
class tokens, T = N or L + N tokens, D width, H heads, d head width, F feed-forward width.

This file is published beside the weights as remote code: it imports torch and diffusers only.
"""

import inspect
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import (
    TimestepEmbedding,
    Timesteps,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
    get_2d_sincos_pos_embed,
)
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput


def check_integer(name: str, value: int, least: int = 1, most: int = 2**20) -> None:
    """ValueError unless `value` is an integer in [least, most]; True and False are none.

    `most` is far beyond any real model. Without it a damaged configuration would be built until memory is gone.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        allowed = (
            f"a positive integer of at most {most}"
            if least == 1
            else f"an integer of at least {least}, at most {most}"
        )
        raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")


def check_timestep(timestep: torch.Tensor | float, batch_size: int, one_for_all: bool = True) -> None:
    """ValueError unless there is one time for each image of a batch or, where that is allowed, one for all.

    Of tensors types and shapes only, as in `check_labels`: to look at values is to wait for the device at every evaluation.
    """
    if not one_for_all and (not isinstance(timestep, torch.Tensor) or tuple(timestep.shape) != (batch_size,)):
        given = tuple(timestep.shape) if isinstance(timestep, torch.Tensor) else repr(timestep)
        raise ValueError(
            f"`timestep` must be a tensor of shape ({batch_size},), a time t in [0, 1] for each image, got {given}."
        )
    if not isinstance(timestep, (torch.Tensor, float, int)) or isinstance(timestep, bool):
        raise ValueError(f"`timestep` must be a number or a tensor of times t in [0, 1], got {timestep!r}.")
    if not isinstance(timestep, torch.Tensor) and not 0 <= timestep <= 1:
        raise ValueError(
            f"`timestep` must be a time t in [0, 1] (0 is noise, 1 the image; diffusers' timestep is 1000·(1 − t)), got "
            f"{timestep!r}."
        )
    if isinstance(timestep, torch.Tensor) and tuple(timestep.shape) not in ((), (1,), (batch_size,)):
        raise ValueError(
            f"`timestep` must be one time or have the shape ({batch_size},), one for each image, got "
            f"{tuple(timestep.shape)}."
        )


def check_labels(class_labels: torch.Tensor, batch_size: int) -> None:
    """ValueError unless there is an integer label for each image of a batch."""
    if not isinstance(class_labels, torch.Tensor):
        raise ValueError(f"`class_labels` must be a tensor of class ids, got {class_labels!r}.")
    if tuple(class_labels.shape) != (batch_size,):
        raise ValueError(
            f"`class_labels` must have the shape ({batch_size},), one label per image, got {tuple(class_labels.shape)}."
        )
    if class_labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`class_labels` must be integers (int64 or int32), got {class_labels.dtype}.")


def check_mlp_ratio(mlp_ratio: float, dim: int) -> None:
    """ValueError unless the feed-forward networks of width `dim` have a hidden width, and one that fits in memory."""
    if (
        isinstance(mlp_ratio, bool)
        or not isinstance(mlp_ratio, (int, float))
        or not 2 <= dim * mlp_ratio <= dim * 1024
    ):
        raise ValueError(
            f"`mlp_ratio` must be a positive number of at most 1024 that leaves a hidden width of at least 1, which "
            f"for the width {dim} is {2 / dim:.3g}; got {mlp_ratio!r}."
        )


@dataclass
class JiTTransformer2DModelOutput(BaseOutput):
    """
    The output of [`JiTTransformer2DModel`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
            The predicted clean image x̂, nominally in [-1, 1] (not clamped).
        alignment_states (`torch.Tensor` of shape `(batch_size, num_patches, hidden_size)`, *optional*):
            The patch tokens h at the alignment depth, for a representation-alignment loss.
    """

    sample: torch.Tensor
    alignment_states: torch.Tensor | None = None


class JiTRMSNorm(nn.RMSNorm):
    """RMSNorm with float32 statistics that returns the input's type.

    Under autocast queries and keys arrive in bfloat16 while the weight is float32: then all of it is float32, and the
    result is rounded. (On CUDA autocast alone would return float32, on a CPU it would not.)
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype == self.weight.dtype:  # one fused kernel, which needs no copy of the input
            normed = F.rms_norm(hidden_states, self.normalized_shape, self.weight, self.eps)
        else:
            normed = F.rms_norm(hidden_states.float(), self.normalized_shape, self.weight.float(), self.eps)
        return normed.to(hidden_states.dtype)


class JiTDropout(nn.Dropout):
    """Dropout that reads its probability in training only: the blocks differ in it, and a compiled block would
    specialise on it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) if self.training else hidden_states


class JiTPositionTables(nn.Module):
    """Every position table of a square token grid: functions of the configuration, so never saved and never cast.

    Buffers, all float32:
        positions (1, N, D): the fixed 2-D sin-cos table of MAE/DiT, half of the channels for each axis, column first.
            None when `dim` is None.
        cos, sin (L + N, d): rotary tables, theta 10000; the first half of a head's channels turns with the row, the
            second with the column, neighbouring channels share a frequency. The L leading in-context rows do not turn.
    """

    def __init__(self, grid_size: int, head_dim: int, num_in_context: int, dim: int | None = None):
        super().__init__()
        self.grid_size, self.head_dim, self.num_in_context, self.dim = grid_size, head_dim, num_in_context, dim
        for name, table in self._compute().items():
            self.register_buffer(name, table, persistent=False)

    def _compute(self) -> dict[str, torch.Tensor | None]:
        # On the CPU whatever the device: the same bits everywhere, and float64 where a device has none.
        place = torch.arange(self.grid_size, device="cpu")
        row = get_1d_rotary_pos_embed(self.head_dim // 2, place.repeat_interleave(self.grid_size), use_real=True)
        column = get_1d_rotary_pos_embed(self.head_dim // 2, place.repeat(self.grid_size), use_real=True)
        cos, sin = (torch.cat(axes, dim=-1).float() for axes in zip(row, column, strict=True))  # (N, d)
        positions = None
        if self.dim is not None:
            positions = get_2d_sincos_pos_embed(self.dim, self.grid_size, base_size=self.grid_size, device="cpu")
            positions = positions.float()[None]  # (1, N, D)
        return {
            "positions": positions,
            "cos": F.pad(cos, (0, 0, self.num_in_context, 0), value=1.0),  # (L + N, d)
            "sin": F.pad(sin, (0, 0, self.num_in_context, 0), value=0.0),
        }

    def _apply(self, fn, recurse=True):
        # `.to(torch.bfloat16)` would round the angles, `.to_empty()` would leave them undefined: move, then recompute.
        super()._apply(fn, recurse)
        device = self.cos.device
        if device.type != "meta":
            for name, table in self._compute().items():
                self._buffers[name] = None if table is None else table.to(device)
        return self

    def forward(self) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """(positions, cos, sin). A call, not attributes, because offloading brings buffers in for a call; and views,
        because it takes the buffers themselves away again afterwards."""
        return (None if self.positions is None else self.positions[:]), self.cos[:], self.sin[:]


class JiTPatchEmbed(nn.Module):
    """Linear patch embedding through a bottleneck: p×p convolution to `bottleneck_dim`, then 1×1 to the width."""

    def __init__(self, patch_size: int, in_channels: int, bottleneck_dim: int, dim: int):
        super().__init__()
        self.proj_in = nn.Conv2d(in_channels, bottleneck_dim, patch_size, stride=patch_size, bias=False)
        self.proj_out = nn.Conv2d(bottleneck_dim, dim, 1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        hidden_states = self.proj_out(self.proj_in(sample))  # (B, D, S/p, S/p)
        # Contiguous, or the residual stream of the whole encoder would stay channels-first: slower, and another layout
        # for a compiled block to specialise on.
        return hidden_states.flatten(2).transpose(1, 2).contiguous()  # (B, N, D)


class JiTConditioning(nn.Module):
    """Timestep embedding of the raw t in [0, 1] (256 frequencies, MLP) plus a class embedding with a null row."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(256, dim)
        self.class_embedding = nn.Embedding(num_classes + 1, dim)

    def forward(self, timestep: torch.Tensor, class_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """timestep (B,) float32, class_labels (B,) in [0, num_classes] → (t_emb + y_emb, y_emb), each (B, D)."""
        class_states = self.class_embedding(class_labels)
        frequencies = self.time_proj(timestep.float()).to(self.time_embedding.linear_1.weight.dtype)
        return self.time_embedding(frequencies).to(class_states.dtype) + class_states, class_states


class JiTAttnProcessor:
    """Self-attention with query/key RMSNorm and rotary embedding, through diffusers' attention backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "JiTAttention",
        hidden_states: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query = query.unflatten(-1, (-1, attn.head_dim))  # (B, T, H, d)
        key = key.unflatten(-1, (-1, attn.head_dim))
        value = value.unflatten(-1, (-1, attn.head_dim))

        query = apply_rotary_emb(attn.norm_q(query), image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(attn.norm_k(key), image_rotary_emb, sequence_dim=1)
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        hidden_states = hidden_states.flatten(2, 3)  # (B, T, D)
        return attn.to_out[1](attn.to_out[0](hidden_states))


class JiTAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention; the projection of queries, keys and values can be fused (`fuse_projections`)."""

    _default_processor_cls = JiTAttnProcessor
    _available_processors = [JiTAttnProcessor]

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float, norm_eps: float):
        super().__init__()
        self.heads, self.head_dim, self.use_bias = heads, head_dim, True
        self.to_q = nn.Linear(dim, heads * head_dim)
        self.to_k = nn.Linear(dim, heads * head_dim)
        self.to_v = nn.Linear(dim, heads * head_dim)
        self.norm_q = JiTRMSNorm(head_dim, eps=norm_eps)
        self.norm_k = JiTRMSNorm(head_dim, eps=norm_eps)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, dim), JiTDropout(dropout)])
        self.set_processor(self._default_processor_cls())

    def forward(
        self, hidden_states: torch.Tensor, image_rotary_emb: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, image_rotary_emb)


class JiTFeedForward(nn.Module):
    """SwiGLU: W3·(silu(W1 x)·(W2 x)), W1 and W2 stored as one matrix, hidden width int(mlp_ratio·D·2/3)."""

    def __init__(self, dim: int, mlp_ratio: float, dropout: float):
        super().__init__()
        inner_dim = int(int(dim * mlp_ratio) * 2 / 3)
        self.linear_in = nn.Linear(dim, 2 * inner_dim)
        self.dropout = JiTDropout(dropout)
        self.linear_out = nn.Linear(inner_dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, hidden_states = self.linear_in(hidden_states).chunk(2, dim=-1)  # (B, T, F)
        return self.linear_out(self.dropout(F.silu(gate) * hidden_states))


class JiTBlock(nn.Module):
    """adaLN-zero transformer block. `conditioning` is SiLU(t_emb + y_emb), the same for every block of a model."""

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.modulation = nn.Linear(dim, 6 * dim)
        self.norm1 = JiTRMSNorm(dim, eps=norm_eps)
        self.attn = JiTAttention(dim, num_attention_heads, attention_head_dim, dropout, norm_eps)
        self.norm2 = JiTRMSNorm(dim, eps=norm_eps)
        self.ff = JiTFeedForward(dim, mlp_ratio, dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        # (B, 1, D) each
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            self.modulation(conditioning).unsqueeze(1).chunk(6, dim=-1)
        )
        normed = torch.addcmul(shift_msa, self.norm1(hidden_states), 1 + scale_msa)
        hidden_states = torch.addcmul(hidden_states, gate_msa, self.attn(normed, image_rotary_emb))
        normed = torch.addcmul(shift_mlp, self.norm2(hidden_states), 1 + scale_mlp)
        return torch.addcmul(hidden_states, gate_mlp, self.ff(normed))


def prepend_class_tokens(
    hidden_states: torch.Tensor, class_states: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """(B, N, D) → (B, L + N, D): before the patch tokens the class embedding (B, D), once for each of L positions.

    Under autocast the embedding is float32 and the patch tokens are not: then, as in the published code, the residual
    stream is float32 from here on.
    """
    class_tokens = class_states.unsqueeze(1) + positions.to(class_states)
    return torch.cat([class_tokens.to(hidden_states.device), hidden_states], dim=1)


class JiTFinalLayer(nn.Module):
    """RMSNorm, modulation, and the linear map from a token to the p·p·C values of its patch."""

    def __init__(self, dim: int, out_dim: int, norm_eps: float):
        super().__init__()
        self.modulation = nn.Linear(dim, 2 * dim)
        self.norm = JiTRMSNorm(dim, eps=norm_eps)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulation(conditioning).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, self.norm(hidden_states), 1 + scale))


@torch.no_grad()
def initialize_jit_weights(module: nn.Module) -> None:
    """The published initialisation, for a JiT and for the adapter built from its layers.

    Xavier uniform for every linear map (patch convolutions seen as linear; queries, keys and values as the one matrix
    they are in the published code, hence a bound of sqrt(6 / 4D)), biases 0; N(0, 0.02) for the class table and the
    timestep MLP; 0 for the adaLN maps and the final linear map.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for layer in module.modules():
        if isinstance(layer, JiTAttention):
            fused_bound = (6 / (layer.to_q.in_features + 3 * layer.to_q.out_features)) ** 0.5
            for projection in (layer.to_q, layer.to_k, layer.to_v):
                nn.init.uniform_(projection.weight, -fused_bound, fused_bound)
        elif isinstance(layer, JiTConditioning):
            for weight in (
                layer.class_embedding.weight,
                layer.time_embedding.linear_1.weight,
                layer.time_embedding.linear_2.weight,
            ):
                nn.init.normal_(weight, std=0.02)
        elif isinstance(layer, JiTBlock):
            nn.init.zeros_(layer.modulation.weight)
        elif isinstance(layer, JiTFinalLayer):
            nn.init.zeros_(layer.modulation.weight)
            nn.init.zeros_(layer.linear.weight)


class JiTTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin):
    r"""
    A plain, class-conditional transformer on pixels that predicts the clean image (JiT, arXiv 2511.13720).

    Parameters:
        sample_size (`int`, defaults to 256): Side of the square image in pixels.
        patch_size (`int`, defaults to 16): Side of a patch in pixels; must divide `sample_size`.
        in_channels (`int`, defaults to 3): Image channels.
        num_layers (`int`, defaults to 12): Transformer blocks.
        num_attention_heads (`int`, defaults to 12): Heads; the width is heads × `attention_head_dim`.
        attention_head_dim (`int`, defaults to 64): Width of a head; a multiple of 4 (two rotary axes of pairs).
        bottleneck_dim (`int`, defaults to 128): Channels between the two maps of the patch embedding.
        mlp_ratio (`float`, defaults to 4.0): The SwiGLU hidden width is int(mlp_ratio · width · 2/3).
        in_context_len (`int`, defaults to 32): Class tokens prepended to the patch tokens; 0 for none.
        in_context_start (`int`, defaults to 4): The block (0-based) before which they enter; the alignment depth.
        num_classes (`int`, defaults to 1000): Classes. Index `num_classes` is the null class of guidance.
        dropout (`float`, defaults to 0.0): Dropout after the attention's out-projection and inside the feed-forward of
            the middle half of the blocks.
        norm_eps (`float`, defaults to 1e-6): Epsilon of every RMSNorm.
        t_eps (`float`, defaults to 0.05): Lower clamp of 1 − t in the velocity. Part of what the weights were trained on.
        noise_scale (`float`, defaults to 1.0): Standard deviation of the noise the weights were trained on.

    Caches for sampling (`enable_cache`): `FirstBlockCacheConfig`, `MagCacheConfig`, `PyramidAttentionBroadcastConfig`,
    `TaylorSeerCacheConfig` (not its lite mode) and `SeaCacheConfig` (with a `raw_vision_callback`, such as
    `lambda module, args, kwargs: list(args[0].unsqueeze(2))`). A cache starts anew where guidance sets in or ends, so
    the evaluations MagCache counts are those of one kind.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["JiTBlock"]
    _repeated_blocks = ["JiTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "conditioning", "norm", "final_layer"]
    # bfloat16 has 8 bits: the timestep MLP cannot tell neighbouring noise levels apart in it.
    _keep_in_fp32_modules = ["time_embedding"]
    _auto_class = "AutoModel"

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        bottleneck_dim: int = 128,
        mlp_ratio: float = 4.0,
        in_context_len: int = 32,
        in_context_start: int = 4,
        num_classes: int = 1000,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
        t_eps: float = 0.05,
        noise_scale: float = 1.0,
    ):
        super().__init__()
        for name, value in (
            ("sample_size", sample_size),
            ("patch_size", patch_size),
            ("in_channels", in_channels),
            ("num_attention_heads", num_attention_heads),
            ("attention_head_dim", attention_head_dim),
            ("bottleneck_dim", bottleneck_dim),
            ("num_classes", num_classes),
        ):
            check_integer(name, value)
        check_integer("num_layers", num_layers, most=1024)
        if sample_size % patch_size:
            raise ValueError(
                f"`patch_size` must divide `sample_size`: {sample_size} is not a multiple of {patch_size}. "
                f"Nearest sizes that fit: {max(1, sample_size // patch_size) * patch_size} and "
                f"{(sample_size // patch_size + 1) * patch_size}."
            )
        if attention_head_dim % 4:
            raise ValueError(
                f"`attention_head_dim` must be a multiple of 4 (rotary pairs for rows and for columns), got "
                f"{attention_head_dim}."
            )
        check_integer("in_context_len", in_context_len, least=0)
        if (
            isinstance(in_context_start, bool)
            or not isinstance(in_context_start, int)
            or not 0 <= in_context_start < num_layers
        ):
            raise ValueError(
                f"`in_context_start` must name one of the {num_layers} blocks, 0 to {num_layers - 1}, got "
                f"{in_context_start!r}."
            )
        for name, value, allowed, fits in (
            ("dropout", dropout, "lie in [0, 1)", lambda value: 0 <= value < 1),
            ("noise_scale", noise_scale, "be positive and finite", lambda value: 0 < value < float("inf")),
            ("norm_eps", norm_eps, "be positive and finite", lambda value: 0 < value < float("inf")),
            ("t_eps", t_eps, "lie in (0, 1)", lambda value: 0 < value < 1),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
                raise ValueError(f"`{name}` must {allowed}, got {value!r}.")

        dim = num_attention_heads * attention_head_dim
        check_mlp_ratio(mlp_ratio, dim)
        grid_size = sample_size // patch_size
        self.tables = JiTPositionTables(grid_size, attention_head_dim, in_context_len, dim)
        self.patch_embed = JiTPatchEmbed(patch_size, in_channels, bottleneck_dim, dim)
        self.conditioning = JiTConditioning(num_classes, dim)
        if in_context_len:
            self.in_context_positions = nn.Parameter(torch.empty(1, in_context_len, dim))

        middle_half = range(num_layers // 4, num_layers // 4 * 3)
        blocks = [
            JiTBlock(
                dim,
                num_attention_heads,
                attention_head_dim,
                mlp_ratio,
                dropout=dropout if index in middle_half else 0.0,
                norm_eps=norm_eps,
            )
            for index in range(num_layers)
        ]
        # Two lists because the sequence grows between them. diffusers' block caches take every block of
        # `transformer_blocks` as one residual, so tokens may neither enter nor leave inside it.
        self.encoder_blocks = nn.ModuleList(blocks[:in_context_start])
        self.transformer_blocks = nn.ModuleList(blocks[in_context_start:])
        self.final_layer = JiTFinalLayer(dim, patch_size * patch_size * in_channels, norm_eps)
        self.gradient_checkpointing = False

        initialize_jit_weights(self)
        if in_context_len:
            nn.init.normal_(self.in_context_positions, std=0.02)

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Writes config.json and, beside it, this file: the weights can then be loaded without the package."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        source = Path(inspect.getfile(type(self)))
        shutil.copyfile(source, Path(save_directory) / source.name)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        try:
            config = super()._dict_from_json_file(json_file)
        except RecursionError:  # what else is no JSON is diffusers' to tell
            raise ValueError(f"{json_file} is nested too deeply for a configuration.") from None
        if not isinstance(config, dict):
            raise ValueError(f"{json_file} must hold a JSON object, it holds a {type(config).__name__}.")
        return config

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        # `auto_map` serves AutoModel alone; diffusers would report it as an unexpected argument at every load.
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """Compiles the blocks as diffusers does, with symbolic sizes unless told otherwise: they run with the class
        tokens and without, guided and not, and all of it is then one graph."""
        kwargs.setdefault("dynamic", True)
        super().compile_repeated_blocks(*args, **kwargs)

    def enable_cache(self, config) -> None:
        """Enables a cache of diffusers for sampling; see the class for those that fit. `disable_cache` ends it."""
        name = type(config).__name__
        reason = None
        if name == "FasterCacheConfig":
            reason = "it expects every evaluation to be guided, the unconditional half first"
        elif name == "TextKVCacheConfig":
            reason = "there is no text to cache"
        elif name == "TaylorSeerCacheConfig" and config.use_lite_mode:
            reason = (
                "its lite mode looks for a layer called `proj_out`; set `use_lite_mode=False`, "
                '`cache_identifiers=["final_layer"]` and `skip_predict_identifiers=[r".*_blocks\\.\\d+"]` instead'
            )
        elif name == "SeaCacheConfig" and config.raw_vision_callback is None:
            reason = "it needs a `raw_vision_callback` that returns the noisy images"
        if reason is not None:
            raise ValueError(f"{name} does not fit this model: {reason}.")
        super().enable_cache(config)

    def velocity(self, prediction: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        """
        The velocity towards an image, v = (x̂ − z) / max(1 − t, t_eps), in float32 (JiT, arXiv 2511.13720).

        Training applies it to the clean and to the predicted image, sampling to the predicted one. The clamp acts in
        both, so the last sampling steps (t > 1 − t_eps) stop short of x̂; it is part of the model.

        Args:
            prediction (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x̂, or x for the target.
            sample (`torch.Tensor` of the same shape): z.
            timestep (`torch.Tensor` of shape `(batch_size,)` or `()`, or `float`): t in [0, 1], 0 is noise.
        """
        if prediction.shape != sample.shape:
            raise ValueError(
                f"`prediction` and `sample` must have one shape, got {tuple(prediction.shape)} and {tuple(sample.shape)}."
            )
        check_timestep(timestep, len(sample))
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device)
        remaining = (1 - timestep).clamp_min(self.config.t_eps).view(-1, 1, 1, 1)
        return (prediction.float() - sample.float()) / remaining

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor,
        return_alignment_states: bool = False,
        alignment_depth: int | None = None,
        return_dict: bool = True,
    ) -> JiTTransformer2DModelOutput | tuple[torch.Tensor, ...]:
        """
        Predicts the clean image x̂ from the noisy image z.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
                The noisy image z, in any floating type; it is cast to the type of the patch embedding.
            timestep (`torch.Tensor` of shape `(batch_size,)` or `()`, or `float`): t in [0, 1]; 0 is noise, 1 is the image.
            class_labels (`torch.Tensor` of shape `(batch_size,)`): Integers in [0, num_classes]; `num_classes` is null.
            return_alignment_states (`bool`, defaults to `False`): Also return the patch tokens at `alignment_depth`.
            alignment_depth (`int`, *optional*): The number of blocks the aligned tokens have passed, in
                [0, num_layers − 1]. Defaults to `in_context_start`, as published.
            return_dict (`bool`, defaults to `True`): Return a [`JiTTransformer2DModelOutput`] instead of a tuple.
        """
        config = self.config
        image_shape = (config.in_channels, config.sample_size, config.sample_size)
        if not isinstance(hidden_states, torch.Tensor) or not hidden_states.is_floating_point():
            given = hidden_states.dtype if isinstance(hidden_states, torch.Tensor) else type(hidden_states).__name__
            raise ValueError(f"`hidden_states` must be a floating point tensor, the noisy image z, got {given}.")
        if tuple(hidden_states.shape[1:]) != image_shape:
            raise ValueError(
                f"`hidden_states` must have the shape (batch_size, {', '.join(map(str, image_shape))}), got "
                f"{tuple(hidden_states.shape)}."
            )
        if alignment_depth is None:
            alignment_depth = config.in_context_start
        if not isinstance(alignment_depth, int) or not 0 <= alignment_depth < config.num_layers:
            raise ValueError(
                f"`alignment_depth` must lie in [0, {config.num_layers - 1}] for {config.num_layers} blocks, got "
                f"{alignment_depth!r}."
            )
        batch_size = hidden_states.shape[0]
        check_timestep(timestep, batch_size)
        check_labels(class_labels, batch_size)
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=hidden_states.device).expand(batch_size)

        conditioning, class_states = self.conditioning(timestep, class_labels)  # (B, D) each
        hidden_states = self.patch_embed(hidden_states.to(self.patch_embed.proj_in.weight.dtype))  # (B, N, D)
        positions, cos, sin = self.tables()
        hidden_states = hidden_states + positions.to(hidden_states)
        conditioning = F.silu(conditioning)

        num_patches = hidden_states.shape[1]
        alignment_states = None
        image_rotary_emb = (cos[-num_patches:], sin[-num_patches:])  # (N, d) each
        for depth, block in enumerate((*self.encoder_blocks, *self.transformer_blocks)):
            if depth == alignment_depth and return_alignment_states:
                alignment_states = hidden_states[:, -num_patches:]  # (B, N, D)
            if depth == config.in_context_start and config.in_context_len:
                hidden_states = prepend_class_tokens(hidden_states, class_states, self.in_context_positions)
                image_rotary_emb = (cos, sin)  # (L + N, d) each
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning, image_rotary_emb)
            else:
                hidden_states = block(hidden_states, conditioning, image_rotary_emb)

        hidden_states = self.final_layer(hidden_states[:, -num_patches:], conditioning)  # (B, N, p·p·C)

        grid_size, patch_size = config.sample_size // config.patch_size, config.patch_size
        sample = hidden_states.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (grid_size, grid_size))
        sample = sample.permute(0, 5, 1, 3, 2, 4).reshape(batch_size, *image_shape)  # (B, C, S, S)

        if not return_dict:
            return (sample, alignment_states) if return_alignment_states else (sample,)
        return JiTTransformer2DModelOutput(sample=sample, alignment_states=alignment_states)


TransformerBlockRegistry.register(
    model_class=JiTBlock,
    metadata=TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None),
)
