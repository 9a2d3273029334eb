"""JiT, the "Just image Transformer" (arXiv 2511.13720): a plain transformer that predicts clean pixels from noisy ones.

Time runs from noise to image: t = 0 is noise, t = 1 is the image, z = t·x + (1 − t)·e.

Letters in the shapes: B batch, C image channels, S image side, p patch side, N = (S/p)² patch tokens, L in-context
class tokens, T = N or L + N tokens, D width, H heads, d head width, F feed-forward width.

The file is published beside the weights as remote code and imports only torch and diffusers.
"""

import functools
import inspect
import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import PyramidAttentionBroadcastConfig
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
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
from diffusers.models.modeling_utils import ModelMixin, get_parameter_dtype
from diffusers.utils import BaseOutput


@dataclass
class JiTTransformer2DModelOutput(BaseOutput):
    """
    Output of [`JiTTransformer2DModel`].

    Args:
        sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
            Predicted clean image x̂, nominally in [-1, 1] (not clamped).
        alignment_states (`torch.Tensor` of shape `(batch_size, num_patches, hidden_size)`, *optional*):
            Patch tokens h at the alignment depth, for a representation-alignment loss.
    """

    sample: torch.Tensor
    alignment_states: torch.Tensor | None = None


class JiTRMSNorm(nn.RMSNorm):
    """RMSNorm with float32 statistics and the output dtype of its input.

    Autocast alone differs between devices: bfloat16 inputs with a float32 weight return float32 on CUDA, not on CPU.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype == self.weight.dtype:  # one fused kernel, no copy of the input
            normed = F.rms_norm(hidden_states, self.normalized_shape, self.weight, self.eps)
        else:
            normed = F.rms_norm(hidden_states.float(), self.normalized_shape, self.weight.float(), self.eps)
        return normed.to(hidden_states.dtype)


class JiTDropout(nn.Dropout):
    """Dropout that ignores its probability in eval mode, so that all blocks share one compiled graph."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) if self.training else hidden_states


class JiTPositionTables(nn.Module):
    """Position tables of a square token grid, computed from the configuration and always float32.

    Buffers, none of them saved:
        positions (1, N, D): fixed 2-D sin-cos table as in MAE and DiT; `None` without `dim`.
        cos, sin (L + N, d): rotary tables with theta 10000. The first half of a head's channels encodes the row, the
            second half the column; adjacent channels share a frequency. The L leading in-context rows are not rotated.
    """

    def __init__(self, grid_size: int, head_dim: int, num_in_context: int, dim: int | None = None):
        super().__init__()
        self.grid_size, self.head_dim, self.num_in_context, self.dim = grid_size, head_dim, num_in_context, dim
        for name, table in self._compute().items():
            self.register_buffer(name, table, persistent=False)

    def _compute(self) -> dict[str, torch.Tensor | None]:
        # Always on the CPU: bit-identical tables on every device, and some devices have no float64.
        index = torch.arange(self.grid_size, device="cpu")
        row = get_1d_rotary_pos_embed(self.head_dim // 2, index.repeat_interleave(self.grid_size), use_real=True)
        column = get_1d_rotary_pos_embed(self.head_dim // 2, index.repeat(self.grid_size), use_real=True)
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
        # `.to(torch.bfloat16)` would round the angles and `.to_empty()` would leave them undefined.
        super()._apply(fn, recurse)
        device = self.cos.device
        if device.type != "meta":
            for name, table in self._compute().items():
                self._buffers[name] = None if table is None else table.to(device)
        return self

    def forward(self) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Return (positions, cos, sin)."""
        # A call triggers offloading hooks, and views stay valid after the hooks have taken the buffers away.
        return (None if self.positions is None else self.positions[:]), self.cos[:], self.sin[:]


class JiTPatchConv(nn.Conv2d):
    """Convolution whose stride is its kernel size, as one matrix product over the patches."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        patch_size = self.kernel_size[0]
        patches = sample.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, S/p, p, S/p, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, S/p, S/p, C·p·p)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)  # (B, D, S/p, S/p)


class JiTPatchEmbed(nn.Module):
    """Bottleneck patch embedding: p×p convolution to `bottleneck_dim`, then 1×1 convolution to the width."""

    def __init__(self, patch_size: int, in_channels: int, bottleneck_dim: int, dim: int):
        super().__init__()
        self.proj_in = JiTPatchConv(in_channels, bottleneck_dim, patch_size, stride=patch_size, bias=False)
        self.proj_out = JiTPatchConv(bottleneck_dim, dim, 1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.proj_out(self.proj_in(sample)).flatten(2).transpose(1, 2)  # (B, N, D), contiguous


class JiTConditioning(nn.Module):
    """Time embedding (MLP of 256 frequencies of t in [0, 1]) plus class embedding (one row more: the null class)."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(256, dim)
        self.class_embedding = nn.Embedding(num_classes + 1, dim)

    def forward(self, timestep: torch.Tensor, class_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed timestep (B,) and class_labels (B,); return (t_emb + y_emb, y_emb), (B, D) each."""
        class_states = self.class_embedding(class_labels)
        frequencies = self.time_proj(timestep.float()).to(get_parameter_dtype(self.time_embedding))  # (B, 256)
        return self.time_embedding(frequencies).to(class_states.dtype) + class_states, class_states


class JiTAttnProcessor:
    """
    Self-attention with query/key RMSNorm and rotary embedding on diffusers' attention backends.

    Args:
        joint_projections (`bool`, defaults to `False`):
            Compute queries, keys and values as one matrix product of the concatenated weights, for training on a GPU. It
            needs plain weights: no LoRA layers, quantization or offloading of single layers.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, joint_projections: bool = False):
        self.joint_projections = joint_projections

    def __call__(
        self,
        attn: "JiTAttention",
        hidden_states: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        elif self.joint_projections:
            weight = torch.cat([attn.to_q.weight, attn.to_k.weight, attn.to_v.weight])
            bias = torch.cat([attn.to_q.bias, attn.to_k.bias, attn.to_v.bias])
            query, key, value = F.linear(hidden_states, weight, bias).chunk(3, dim=-1)
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
    """Multi-head self-attention with projections that can be fused (`fuse_projections`)."""

    _default_processor_cls = JiTAttnProcessor
    _available_processors = [JiTAttnProcessor]
    is_cross_attention = False

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
    """SwiGLU, W3·(silu(W1·x) * W2·x), with W1 and W2 in one matrix and the hidden width int(mlp_ratio·D·2/3)."""

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
    """Transformer block with adaLN-zero; `conditioning` is silu(t_emb + y_emb), shared by all blocks."""

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
    """Prepend the class embedding (B, D), once per in-context position: (B, N, D) → (B, L + N, D).

    As in the published code, under autocast the float32 class tokens make the residual stream float32 from here on.
    """
    class_tokens = class_states.unsqueeze(1) + positions.to(class_states)
    return torch.cat([class_tokens.to(hidden_states.device), hidden_states], dim=1)


class JiTFinalLayer(nn.Module):
    """Output layer: RMSNorm, modulation, and projection of a token to the p·p·C values of its patch."""

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
    """Apply the published initialization to a JiT, or to an adapter built from its layers.

    Linear maps and convolutions: Xavier uniform; queries, keys and values count as one matrix, as in the published code
    (bound sqrt(6 / 4D)). Biases, adaLN maps and the final projection: 0. Class table and timestep MLP: N(0, 0.02²).
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
    Class-conditional pixel-space transformer that predicts the clean image (JiT, arXiv 2511.13720).

    Args:
        sample_size (`int`, defaults to 256): Side of the square image in pixels.
        patch_size (`int`, defaults to 16): Side of a patch in pixels; must divide `sample_size`.
        in_channels (`int`, defaults to 3): Number of image channels.
        num_layers (`int`, defaults to 12): Number of transformer blocks.
        num_attention_heads (`int`, defaults to 12): Number of heads; the width is heads × `attention_head_dim`.
        attention_head_dim (`int`, defaults to 64): Width of a head; a multiple of 4 (rotary pairs on two axes).
        bottleneck_dim (`int`, defaults to 128): Channels between the two convolutions of the patch embedding.
        mlp_ratio (`float`, defaults to 4.0): The SwiGLU hidden width is int(mlp_ratio · width · 2/3).
        in_context_len (`int`, defaults to 32): Number of in-context class tokens; 0 disables them.
        in_context_start (`int`, defaults to 4):
            Index of the block before which the class tokens are prepended; also the default alignment depth.
        num_classes (`int`, defaults to 1000): Number of classes. Label `num_classes` is the null class of guidance.
        dropout (`float`, defaults to 0.0):
            Dropout of the attention output and of the feed-forward hidden states, in the middle half of the blocks.
        norm_eps (`float`, defaults to 1e-6): Epsilon of every RMSNorm.
        t_eps (`float`, defaults to 0.05): Lower bound of 1 − t in the velocity that the weights were trained with.
        noise_scale (`float`, defaults to 1.0): Standard deviation of the noise that the weights were trained with.

    Supported caches (`enable_cache`): `FirstBlockCacheConfig`, `MagCacheConfig`, `PyramidAttentionBroadcastConfig`,
    `TaylorSeerCacheConfig` (without lite mode) and `SeaCacheConfig` (with a `raw_vision_callback`, for example
    `lambda module, args, kwargs: list(args[0].unsqueeze(2))`).
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["JiTPatchEmbed", "JiTConditioning", "JiTBlock", "JiTFinalLayer"]
    _repeated_blocks = ["JiTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "conditioning", "norm", "final_layer"]
    # Loaded in bfloat16, with 8 significant bits, it could not separate neighbouring noise levels.
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
        if sample_size % patch_size:
            smaller = max(1, sample_size // patch_size) * patch_size
            raise ValueError(
                f"`sample_size` {sample_size} is not a multiple of `patch_size` {patch_size}; the nearest sizes are "
                f"{smaller} and {smaller + patch_size}."
            )
        if attention_head_dim % 4:
            raise ValueError(f"`attention_head_dim` must be a multiple of 4, got {attention_head_dim}.")
        if not 0 <= in_context_start < num_layers:
            raise ValueError(f"`in_context_start` must lie in [0, {num_layers - 1}], got {in_context_start}.")

        dim = num_attention_heads * attention_head_dim
        grid_size = sample_size // patch_size
        self.tables = JiTPositionTables(grid_size, attention_head_dim, in_context_len, dim)
        self.patch_embed = JiTPatchEmbed(patch_size, in_channels, bottleneck_dim, dim)
        self.conditioning = JiTConditioning(num_classes, dim)
        if in_context_len:
            self.in_context_positions = nn.Parameter(torch.zeros(1, in_context_len, dim))

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
        # Two lists, because diffusers' block caches need one sequence length for all `transformer_blocks`.
        self.encoder_blocks = nn.ModuleList(blocks[:in_context_start])
        self.transformer_blocks = nn.ModuleList(blocks[in_context_start:])
        self.final_layer = JiTFinalLayer(dim, patch_size * patch_size * in_channels, norm_eps)
        self.gradient_checkpointing = False

        initialize_jit_weights(self)
        if in_context_len:
            nn.init.normal_(self.in_context_positions, std=0.02)

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save config.json and a copy of this file, so that the model loads without this package."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        source = Path(inspect.getfile(type(self)))
        shutil.copyfile(source, Path(save_directory) / source.name)

    @functools.wraps(ModelMixin.save_pretrained)  # pipelines look at its signature
    def save_pretrained(self, save_directory, *args, **kwargs):
        fused = any(getattr(module, "fused_projections", False) for module in self.modules())
        self.unfuse_qkv_projections()  # diffusers would save both and ignore the fused ones at the next load
        super().save_pretrained(save_directory, *args, **kwargs)
        if fused:
            self.fuse_qkv_projections()
        # diffusers deletes the shards of an earlier save but not their index, and loading prefers the index.
        for index in Path(save_directory).glob("*.safetensors.index*.json"):
            shards = set(json.loads(index.read_text())["weight_map"].values())
            if not all((index.parent / shard).exists() for shard in shards):
                index.unlink()

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)  # may be a local path
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        # `auto_map` is for AutoModel; as an argument of this class it would cause a warning at every load.
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """Compile the blocks, by default with dynamic shapes: one graph with and without class tokens or guidance."""
        kwargs.setdefault("dynamic", True)
        super().compile_repeated_blocks(*args, **kwargs)

    def enable_cache(self, config) -> None:
        """Enable one of diffusers' caches for sampling; the class docstring lists the supported ones."""
        name = type(config).__name__
        if name == "FasterCacheConfig":
            raise ValueError(f"{name} does not fit this model: it expects guidance at every step.")
        if name == "TaylorSeerCacheConfig" and config.use_lite_mode:
            raise ValueError(
                f"{name} does not fit this model: lite mode needs a layer `proj_out`. Set `use_lite_mode=False`, "
                '`cache_identifiers=["final_layer"]` and `skip_predict_identifiers=[r".*_blocks\\.\\d+"]`.'
            )
        if name == "SeaCacheConfig" and config.raw_vision_callback is None:
            raise ValueError(
                f"{name} does not fit this model: set a `raw_vision_callback` that returns the noisy images."
            )
        self._broadcast_context = None
        super().enable_cache(config)

    @contextmanager
    def cache_context(self, name: str, **kwargs):
        # Pyramid attention broadcast keeps one state for all contexts, whose batch sizes differ.
        if isinstance(self._cache_config, PyramidAttentionBroadcastConfig) and name != self._broadcast_context:
            self._reset_stateful_cache()
            self._broadcast_context = name
        with super().cache_context(name, **kwargs):
            yield

    def velocity(self, prediction: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        """
        Velocity towards the image, v = (x̂ − z) / max(1 − t, t_eps), in float32 (JiT, arXiv 2511.13720).

        Training applies it to the clean and to the predicted image, sampling to the predicted image. Because of the clamp,
        a sampling step in t > 1 − t_eps ends before x̂.

        Args:
            prediction (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x̂, or x for the target.
            sample (`torch.Tensor` of the same shape): z.
            timestep (`torch.Tensor` of shape `(batch_size,)` or `()`, or `float`): t in [0, 1]; 0 is noise.
        """
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
        Predict the clean image x̂ from the noisy image z.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`):
                Noisy image z, in any floating dtype.
            timestep (`torch.Tensor` of shape `(batch_size,)` or `()`, or `float`):
                t in [0, 1]; 0 is noise, 1 is the image (diffusers' timestep is 1000·(1 − t)).
            class_labels (`torch.Tensor` of shape `(batch_size,)`):
                Integers in [0, num_classes]; `num_classes` is the null class.
            return_alignment_states (`bool`, defaults to `False`): Whether to return the patch tokens at `alignment_depth`.
            alignment_depth (`int`, *optional*, defaults to `in_context_start`):
                Number of blocks before the aligned tokens, in [0, num_layers − 1].
            return_dict (`bool`, defaults to `True`): Whether to return a [`JiTTransformer2DModelOutput`] or a tuple.
        """
        config = self.config
        batch_size, *image_shape = hidden_states.shape
        if image_shape != [config.in_channels, config.sample_size, config.sample_size]:
            raise ValueError(
                f"`hidden_states` must have the shape (batch_size, {config.in_channels}, {config.sample_size}, "
                f"{config.sample_size}), got {tuple(hidden_states.shape)}."
            )
        if alignment_depth is None:
            alignment_depth = config.in_context_start
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=hidden_states.device).expand(batch_size)

        conditioning, class_states = self.conditioning(timestep, class_labels)  # (B, D) each
        hidden_states = self.patch_embed(hidden_states.to(get_parameter_dtype(self.patch_embed)))  # (B, N, D)
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
# Perturbed-attention guidance replaces the attention of a block.
AttentionProcessorRegistry.register(
    model_class=JiTAttnProcessor,
    metadata=AttentionProcessorMetadata(skip_processor_output_fn=lambda attn, hidden_states, *_: hidden_states),
)
