"""Projectors from the transformer's tokens to the teacher's feature space; used in training only.

All share one call: `projector(hidden_states, timestep, class_labels, keep_mask=None)`.

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
    JiTTransformer2DModel,
    initialize_jit_weights,
    prepend_class_tokens,
)


class MaskedTransformerAdapter(ModelMixin, ConfigMixin, AttentionMixin):
    r"""
    The Masked Transformer Adapter of PixelREPA (arXiv 2603.14366).

    Replaces the tokens outside the keep mask by one learned mask token, runs JiT blocks with their own timestep and class
    embeddings and in-context class tokens, and projects to the teacher's width (Linear, LayerNorm, SiLU, Linear) unless
    the widths are equal.

    Args:
        hidden_size (`int`): Width D of the transformer's tokens and of the adapter's blocks.
        num_attention_heads (`int`): Attention heads, as in the transformer.
        teacher_dim (`int`): Width F of the teacher's features.
        num_layers (`int`, *optional*, defaults to 2): Number of JiT blocks.
        grid_size (`int`, *optional*, defaults to 16): Side G of the transformer's token grid.
        in_context_len (`int`, *optional*, defaults to 32): Number of in-context class tokens; may be 0.
        num_classes (`int`, *optional*, defaults to 1000): Number of classes. Index `num_classes` is the null class.
        mlp_ratio (`float`, *optional*, defaults to 4.0): Feed-forward ratio, as in the transformer.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["JiTConditioning", "JiTBlock"]
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
        head_dim = hidden_size // num_attention_heads
        self.tables = JiTPositionTables(grid_size, head_dim, in_context_len)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.conditioning = JiTConditioning(num_classes, hidden_size)
        if in_context_len:
            self.in_context_positions = nn.Parameter(torch.zeros(1, in_context_len, hidden_size))
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
        Predict the teacher's features from the transformer's tokens.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, grid_size², hidden_size)`): The transformer's tokens h.
            timestep (`torch.Tensor` of shape `(batch_size,)`): t in [0, 1]; 0 is noise, 1 is the image.
            class_labels (`torch.Tensor` of shape `(batch_size,)`): The labels y that the transformer received.
            keep_mask (`torch.BoolTensor` of shape `(batch_size, grid_size²)`, *optional*): False where a token is
                replaced by the mask token. Without a mask `mask_token` gets no gradient: under DDP pass a mask of ones.

        Returns:
            `torch.Tensor` of shape `(batch_size, grid_size², teacher_dim)`.
        """
        if keep_mask is not None:
            # Under autocast this promotes bfloat16 tokens to the float32 of the mask token, as in the published code.
            hidden_states = torch.where(keep_mask.unsqueeze(-1), hidden_states, self.mask_token)

        num_patches = hidden_states.shape[1]
        conditioning, class_states = self.conditioning(timestep, class_labels)  # (B, D) each
        conditioning = F.silu(conditioning)
        if self.config.in_context_len:
            hidden_states = prepend_class_tokens(hidden_states, class_states, self.in_context_positions)
        image_rotary_emb = self.tables()[1:]  # (cos, sin), (L + N, d) each
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
    The projector of REPA (arXiv 2410.06940): a three-layer MLP applied to each token.

    Args:
        hidden_size (`int`): Width D of the transformer's tokens.
        teacher_dim (`int`): Width F of the teacher's features.
        projector_dim (`int`, *optional*, defaults to 2048): Width of the two hidden layers.
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

    def forward(self, hidden_states: torch.Tensor, timestep=None, class_labels=None, keep_mask=None) -> torch.Tensor:
        """Map `hidden_states` (B, N, D) to (B, N, F); the other arguments are ignored."""
        return self.projection(hidden_states)


class ConvProjector(ModelMixin, ConfigMixin):
    r"""
    The projector of iREPA (arXiv 2512.10794): one zero-padded 3×3 convolution over the token grid.

    Args:
        hidden_size (`int`): Width D of the transformer's tokens.
        teacher_dim (`int`): Width F of the teacher's features.
        grid_size (`int`, *optional*, defaults to 16): Side G of the transformer's token grid.
    """

    @register_to_config
    def __init__(self, hidden_size: int, teacher_dim: int, grid_size: int = 16):
        super().__init__()
        self.projection = nn.Conv2d(hidden_size, teacher_dim, 3, padding=1)
        initialize_jit_weights(self)

    def forward(self, hidden_states: torch.Tensor, timestep=None, class_labels=None, keep_mask=None) -> torch.Tensor:
        """Map `hidden_states` (B, G², D), in row-major order, to (B, G², F); the other arguments are ignored."""
        grid_size = self.config.grid_size
        grid = hidden_states.transpose(1, 2).unflatten(2, (grid_size, grid_size))  # (B, D, G, G)
        return self.projection(grid).flatten(2).transpose(1, 2)  # (B, N, F)


def check_projector_fits(projector: ModelMixin, transformer: JiTTransformer2DModel) -> None:
    """Raise a `ValueError` unless the projector was built for the transformer's width, token grid and classes."""
    config = transformer.config
    needed = {
        "hidden_size": config.num_attention_heads * config.attention_head_dim,
        "grid_size": config.sample_size // config.patch_size,
        "num_classes": config.num_classes,
    }
    for name in needed.keys() & projector.config.keys():
        if projector.config[name] != needed[name]:
            raise ValueError(f"The projector's `{name}` is {projector.config[name]}; this model needs {needed[name]}.")
