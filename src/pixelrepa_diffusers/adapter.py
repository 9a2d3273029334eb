# Copyright 2026 The pixelrepa_diffusers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""From the transformer's tokens to the teacher's feature space: PixelREPA's adapter, and the baselines' projectors.

They are used in training alone. All take the same call, `(hidden_states, timestep, class_labels, keep_mask=None)`.

Letters in the shape trails: B batch, G side of the token grid, N = G² patch tokens, L in-context class tokens,
D width of the transformer, F width of the teacher.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin

from .transformer_jit import (
    JiTBlock,
    JiTConditioning,
    JiTPositionTables,
    initialize_jit_weights,
    prepend_class_tokens,
)


def _refuse_keep_mask(model: ModelMixin, keep_mask: torch.Tensor | None) -> None:
    if keep_mask is not None:
        raise ValueError(f"{type(model).__name__} has no mask token: `keep_mask` must be None.")


def _check_tokens(hidden_states: torch.Tensor, hidden_size: int) -> None:
    if hidden_states.ndim != 3 or hidden_states.shape[2] != hidden_size or not hidden_states.is_floating_point():
        raise ValueError(
            f"`hidden_states` must be floating point tokens (batch_size, tokens, {hidden_size}), the width the projector was "
            f"made for, got {hidden_states.dtype} of shape {tuple(hidden_states.shape)}."
        )


def _check_num_tokens(hidden_states: torch.Tensor, grid_size: int) -> None:
    if hidden_states.shape[1] != grid_size**2:
        raise ValueError(
            f"Expected {grid_size}×{grid_size} = {grid_size**2} tokens (batch_size, tokens, width), got "
            f"{tuple(hidden_states.shape)}. `grid_size` must be the transformer's sample_size / patch_size."
        )


class MaskedTransformerAdapter(ModelMixin, ConfigMixin, AttentionMixin):
    r"""
    The Masked Transformer Adapter of PixelREPA (arXiv 2603.14366).

    Tokens the keep mask leaves out are replaced by one learned mask token; then JiT blocks with their own timestep and
    class embedding and in-context class tokens; then, only where the widths differ, a projection
    Linear–LayerNorm–SiLU–Linear. The loss is over all tokens, the replaced ones included.

    Parameters:
        hidden_size (`int`): Width D of the transformer's tokens, and of the adapter's blocks.
        num_attention_heads (`int`): Heads; as in the transformer.
        teacher_dim (`int`): Width F of the teacher's features.
        num_layers (`int`, defaults to 2): JiT blocks.
        grid_size (`int`, defaults to 16): Side G of the token grid, the transformer's sample_size / patch_size.
        in_context_len (`int`, defaults to 32): In-context class tokens; 0 for none.
        num_classes (`int`, defaults to 1000): Classes. Index `num_classes` is the null class.
        mlp_ratio (`float`, defaults to 4.0): As in the transformer.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["JiTBlock"]
    _repeated_blocks = ["JiTBlock"]

    @register_to_config
    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        teacher_dim: int,
        num_layers: int = 2,
        grid_size: int = 16,
        in_context_len: int = 32,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        if hidden_size % (4 * num_attention_heads):
            raise ValueError(
                "`hidden_size` must be heads × a head width that is a multiple of 4 (rotary pairs for rows and for "
                f"columns), got {hidden_size} for {num_attention_heads} heads."
            )
        head_dim = hidden_size // num_attention_heads
        self.tables = JiTPositionTables(grid_size, head_dim, in_context_len)
        self.mask_token = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.conditioning = JiTConditioning(num_classes, hidden_size)
        if in_context_len:
            self.in_context_positions = nn.Parameter(torch.empty(1, in_context_len, hidden_size))
        self.blocks = nn.ModuleList(
            [JiTBlock(hidden_size, num_attention_heads, head_dim, mlp_ratio) for _ in range(num_layers)]
        )
        self.projection = None
        if hidden_size != teacher_dim:
            self.projection = nn.Sequential(
                nn.Linear(hidden_size, hidden_size),
                nn.LayerNorm(hidden_size),
                nn.SiLU(),
                nn.Linear(hidden_size, teacher_dim),
            )
        self.gradient_checkpointing = False

        initialize_jit_weights(self)
        nn.init.normal_(self.mask_token, std=0.02)
        if in_context_len:
            nn.init.normal_(self.in_context_positions, std=0.02)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        keep_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, grid_size², hidden_size)`): The transformer's tokens h.
            timestep (`torch.Tensor` of shape `(batch_size,)`): t in [0, 1]; 0 is noise, 1 is the image.
            class_labels (`torch.Tensor` of shape `(batch_size,)`): The labels the transformer saw, dropped ones included.
            keep_mask (`torch.BoolTensor` of shape `(batch_size, grid_size²)`, *optional*):
                False where a token is replaced by the mask token. None replaces none, and then leaves `mask_token`
                without a gradient: under DDP pass a mask of ones instead.

        Returns:
            `torch.Tensor` of shape `(batch_size, grid_size², teacher_dim)`.
        """
        _check_tokens(hidden_states, self.config.hidden_size)
        _check_num_tokens(hidden_states, self.config.grid_size)
        if keep_mask is not None:
            if keep_mask.dtype != torch.bool or keep_mask.shape != hidden_states.shape[:2]:
                raise ValueError(
                    f"`keep_mask` must be a bool tensor of shape {tuple(hidden_states.shape[:2])}, got "
                    f"{keep_mask.dtype} of shape {tuple(keep_mask.shape)}."
                )
            hidden_states = torch.where(
                keep_mask.unsqueeze(-1), hidden_states, self.mask_token.to(hidden_states.dtype)
            )

        num_patches = hidden_states.shape[1]
        conditioning, class_states = self.conditioning(timestep, class_labels)  # (B, D) each
        conditioning = F.silu(conditioning)
        if self.config.in_context_len:
            hidden_states = prepend_class_tokens(hidden_states, class_states, self.in_context_positions)
        _, cos, sin = self.tables()  # (L + N, d) each
        image_rotary_emb = (cos, sin)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning, image_rotary_emb)
            else:
                hidden_states = block(hidden_states, conditioning, image_rotary_emb)
        hidden_states = hidden_states[:, -num_patches:]  # (B, N, D)
        if self.projection is not None:
            hidden_states = self.projection(hidden_states)  # (B, N, F)
        return hidden_states


class MLPProjector(ModelMixin, ConfigMixin):
    r"""
    REPA's projector (arXiv 2410.06940): Linear–SiLU–Linear–SiLU–Linear on every token by itself.

    Parameters:
        hidden_size (`int`): Width D of the transformer's tokens.
        teacher_dim (`int`): Width F of the teacher's features.
        projector_dim (`int`, defaults to 2048): Width of the two hidden layers.
    """

    @register_to_config
    def __init__(self, hidden_size: int, teacher_dim: int, projector_dim: int = 2048):
        super().__init__()
        self.projection = nn.Sequential(
            nn.Linear(hidden_size, projector_dim),
            nn.SiLU(),
            nn.Linear(projector_dim, projector_dim),
            nn.SiLU(),
            nn.Linear(projector_dim, teacher_dim),
        )
        initialize_jit_weights(self)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        keep_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, N, D) → (B, N, F). It is conditioned on nothing and masks nothing."""
        _refuse_keep_mask(self, keep_mask)
        _check_tokens(hidden_states, self.config.hidden_size)
        return self.projection(hidden_states)


class ConvProjector(ModelMixin, ConfigMixin):
    r"""
    iREPA's projector (arXiv 2512.10794): one 3×3 convolution over the token grid, padded with zeros.

    Parameters:
        hidden_size (`int`): Width D of the transformer's tokens.
        teacher_dim (`int`): Width F of the teacher's features.
        grid_size (`int`, defaults to 16): Side G of the token grid, the transformer's sample_size / patch_size.
    """

    @register_to_config
    def __init__(self, hidden_size: int, teacher_dim: int, grid_size: int = 16):
        super().__init__()
        self.projection = nn.Conv2d(hidden_size, teacher_dim, 3, padding=1)
        initialize_jit_weights(self)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        keep_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states (B, G², D), row by row → (B, G², F). It is conditioned on nothing and masks nothing."""
        _refuse_keep_mask(self, keep_mask)
        _check_tokens(hidden_states, self.config.hidden_size)
        _check_num_tokens(hidden_states, self.config.grid_size)
        grid = hidden_states.transpose(1, 2).unflatten(2, (self.config.grid_size, -1))  # (B, D, G, G)
        return self.projection(grid).flatten(2).transpose(1, 2)  # (B, N, F)
