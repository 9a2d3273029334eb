"""Self-guidance of a frozen JiT (arXiv 2607.29122): a light head that predicts the image from the tokens of a middle block.

The head is a weaker version of the transformer it was trained on. Sampling moves away from its prediction:

    v = v_final + w·(v_final − v_head)

Letters in the shape comments: B batch, C image channels, S image side, p patch side, N = (S/p)² patch tokens, L in-context
class tokens, T = L + N tokens, D width, H heads, d head width.

The file is published beside the weights as remote code and imports only torch and diffusers. It does not import the
transformer's file, which would load a second copy of its classes: the layers here repeat those of a JiT block, with the same
parameter names.
"""

import inspect
import json
import shutil
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, apply_rotary_emb, get_1d_rotary_pos_embed
from diffusers.models.modeling_utils import ModelMixin, get_parameter_dtype


class JiTGuidanceRMSNorm(nn.RMSNorm):
    """RMSNorm with float32 statistics and the output dtype of its input, with and without autocast."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(hidden_states.float(), self.normalized_shape, self.weight.float(), self.eps)
        return normed.to(hidden_states.dtype)


class JiTGuidanceConditioning(nn.Module):
    """Embedding of the time plus class embedding with a null row, as in the transformer."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(256, dim)
        self.class_embedding = nn.Embedding(num_classes + 1, dim)

    def forward(self, timestep: torch.Tensor, class_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """timestep (B,), class_labels (B,) → (t_emb + y_emb, y_emb), each (B, D)."""
        class_states = self.class_embedding(class_labels)
        frequencies = self.time_proj(timestep).to(get_parameter_dtype(self.time_embedding))  # (B, 256)
        return self.time_embedding(frequencies).to(class_states.dtype) + class_states, class_states


class JiTGuidanceAttention(nn.Module):
    """Self-attention with query/key RMSNorm and rotary embedding."""

    def __init__(self, dim: int, head_dim: int, norm_eps: float):
        super().__init__()
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q = JiTGuidanceRMSNorm(head_dim, eps=norm_eps)
        self.norm_k = JiTGuidanceRMSNorm(head_dim, eps=norm_eps)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(
        self, hidden_states: torch.Tensor, image_rotary_emb: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))  # (B, T, H, d)
            for projection in (self.to_q, self.to_k, self.to_v)
        )
        query = apply_rotary_emb(self.norm_q(query), image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(self.norm_k(key), image_rotary_emb, sequence_dim=1)
        return self.to_out[0](dispatch_attention_fn(query, key, value).flatten(2, 3))  # (B, T, D)


class JiTGuidanceFeedForward(nn.Module):
    """SwiGLU, as in the transformer."""

    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        inner_dim = int(int(dim * mlp_ratio) * 2 / 3)
        self.linear_in = nn.Linear(dim, 2 * inner_dim)
        self.linear_out = nn.Linear(inner_dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, hidden_states = self.linear_in(hidden_states).chunk(2, dim=-1)
        return self.linear_out(F.silu(gate) * hidden_states)


class JiTGuidanceBlock(nn.Module):
    """A JiT block with adaLN-zero."""

    def __init__(self, dim: int, head_dim: int, mlp_ratio: float, norm_eps: float):
        super().__init__()
        self.modulation = nn.Linear(dim, 6 * dim)
        self.norm1 = JiTGuidanceRMSNorm(dim, eps=norm_eps)
        self.attn = JiTGuidanceAttention(dim, head_dim, norm_eps)
        self.norm2 = JiTGuidanceRMSNorm(dim, eps=norm_eps)
        self.ff = JiTGuidanceFeedForward(dim, mlp_ratio)

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


class JiTGuidanceFinalLayer(nn.Module):
    """RMSNorm, modulation, and the projection of a token to the p·p·C values of its patch."""

    def __init__(self, dim: int, out_dim: int, norm_eps: float):
        super().__init__()
        self.modulation = nn.Linear(dim, 2 * dim)
        self.norm = JiTGuidanceRMSNorm(dim, eps=norm_eps)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulation(conditioning).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, self.norm(hidden_states), 1 + scale))


class JiTGuidanceHead(ModelMixin, ConfigMixin):
    r"""
    Head that predicts the clean image from the tokens of a frozen [`JiTTransformer2DModel`] after `depth` blocks: one JiT
    block and a final layer. [`JiTGuidanceHead.from_transformer`] initializes it.

    Args:
        depth (`int`): Number of transformer blocks that the tokens have passed.
        sample_size, patch_size, in_channels, num_attention_heads, attention_head_dim, mlp_ratio, in_context_len,
        num_classes, norm_eps: As in the transformer.
    """

    _no_split_modules = ["JiTGuidanceConditioning", "JiTGuidanceBlock", "JiTGuidanceFinalLayer"]
    _repeated_blocks = ["JiTGuidanceBlock"]
    _supports_group_offloading = True
    _skip_layerwise_casting_patterns = ["conditioning", "norm", "final_layer"]
    _keep_in_fp32_modules = ["time_embedding"]  # as in the transformer
    _auto_class = "AutoModel"

    # Settings that must be the transformer's.
    shared_settings = (
        "sample_size",
        "patch_size",
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "mlp_ratio",
        "in_context_len",
        "num_classes",
        "norm_eps",
    )

    @register_to_config
    def __init__(
        self,
        depth: int = 6,
        sample_size: int = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        in_context_len: int = 32,
        num_classes: int = 1000,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.conditioning = JiTGuidanceConditioning(num_classes, dim)
        if in_context_len:
            self.in_context_positions = nn.Parameter(torch.zeros(1, in_context_len, dim))
        self.block = JiTGuidanceBlock(dim, attention_head_dim, mlp_ratio, norm_eps)
        self.final_layer = JiTGuidanceFinalLayer(dim, patch_size * patch_size * in_channels, norm_eps)

    @classmethod
    def from_transformer(cls, transformer: ModelMixin, depth: int | None = None) -> "JiTGuidanceHead":
        """
        Build a head with a copy of the transformer's last block, final layer, conditioning and class-token positions.

        Args:
            transformer ([`JiTTransformer2DModel`]): The model to guide.
            depth (`int`, *optional*, defaults to half of the blocks): Number of blocks before the head, in
                [0, num_layers − 1].

        Raises:
            `ValueError`: If the transformer has no block `depth`.
        """
        config = transformer.config
        head = cls(
            depth=config.num_layers // 2 if depth is None else depth,
            **{name: config[name] for name in cls.shared_settings},
        )
        head.check_fits(transformer)
        parts = {
            "conditioning": transformer.conditioning,
            "block": (*transformer.encoder_blocks, *transformer.transformer_blocks)[-1],
            "final_layer": transformer.final_layer,
        }
        for name, part in parts.items():
            getattr(head, name).load_state_dict(part.state_dict())
        if config.in_context_len:
            head.in_context_positions.data.copy_(transformer.in_context_positions)
        return head.to(transformer.device)

    def check_fits(self, transformer: ModelMixin) -> None:
        """Raise a `ValueError` that names the difference, unless the head reads tokens of such a transformer."""
        config = transformer.config
        if differences := [name for name in self.shared_settings if self.config[name] != config[name]]:
            name = differences[0]
            raise ValueError(
                f"The guidance head belongs to another transformer: its {name} is {self.config[name]}, the "
                f"transformer's is {config[name]}."
            )
        if not 0 <= self.config.depth < config.num_layers:
            raise ValueError(
                f"The guidance head reads the tokens after {self.config.depth} blocks; with this transformer, its depth "
                f"must lie in [0, {config.num_layers - 1}]."
            )

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save config.json and a copy of this file, so that the head loads without this package."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        source = Path(inspect.getfile(type(self)))
        shutil.copyfile(source, Path(save_directory) / source.name)

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)  # a local path of the machine that loaded the weights
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        # Only AutoModel reads `auto_map`; diffusers would warn about an unexpected argument at every load.
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor | float, class_labels: torch.Tensor
    ) -> torch.Tensor:
        """
        Predict the clean image x̂ from the tokens of a middle block.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, num_patches, hidden_size)`):
                `alignment_states` of the transformer with `alignment_depth=head.config.depth`.
            timestep (`torch.Tensor` of shape `(batch_size,)` or `()`, or `float`): t in [0, 1]; 0 is noise.
            class_labels (`torch.Tensor` of shape `(batch_size,)`):
                Integers in [0, num_classes]; `num_classes` is the null class.

        Returns:
            `torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`: x̂.
        """
        config, batch_size = self.config, len(hidden_states)
        grid_size, patch_size = config.sample_size // config.patch_size, config.patch_size
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=hidden_states.device).expand(batch_size)
        conditioning, class_states = self.conditioning(timestep, class_labels)  # (B, D) each
        conditioning = F.silu(conditioning)

        # The transformer's rotary tables: the first half of a head's channels encodes the row, the second the column.
        index = torch.arange(grid_size, device=hidden_states.device)
        row, column = (
            get_1d_rotary_pos_embed(config.attention_head_dim // 2, position, use_real=True)
            for position in (index.repeat_interleave(grid_size), index.repeat(grid_size))
        )
        cos, sin = (torch.cat(axes, dim=-1) for axes in zip(row, column, strict=True))  # (N, d) each

        if config.in_context_len:
            # The alignment states have no class tokens. A head without them would know the image better than the class,
            # and its guidance would act like more classifier-free guidance.
            class_tokens = class_states.unsqueeze(1) + self.in_context_positions.to(class_states)
            hidden_states = torch.cat([class_tokens.to(hidden_states.dtype), hidden_states], dim=1)  # (B, T, D)
            cos = F.pad(cos, (0, 0, config.in_context_len, 0), value=1.0)  # (T, d): class tokens are not rotated
            sin = F.pad(sin, (0, 0, config.in_context_len, 0), value=0.0)
        hidden_states = self.block(hidden_states, conditioning, (cos, sin))
        hidden_states = hidden_states[:, config.in_context_len :]  # (B, N, D)
        hidden_states = self.final_layer(hidden_states, conditioning)  # (B, N, p·p·C)
        sample = hidden_states.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (grid_size, grid_size))
        return sample.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, S, S)
