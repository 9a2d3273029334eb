"""The frozen semantic teacher: images in [-1, 1] to one feature vector per token of the student.

Letters in the shape trails: B batch, S image side at the encoder's input, p patch side, G = S/p side of the token grid
(the student's), N = G² patch tokens, P prefix tokens (class, registers), F feature width.
"""

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    ImageProcessingMixin,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)


def _side(size: int | Sequence[int]) -> int:
    """Return the side of a square, given as one number or as two equal ones."""
    return size if isinstance(size, int) else size[0]


def _unsupported(config: PretrainedConfig) -> ValueError:
    return ValueError(
        f"A model of type {config.model_type!r} cannot be the teacher. Supported are transformers vision encoders with "
        "square patches of RGB pixels and one token per patch in their last hidden state: DINOv2 (with or without "
        "registers), DINOv3 ViT, SigLIP, SigLIP 2, CLIP, ViT, DeiT, I-JEPA, …"
    )


def read_normalization(
    name_or_path: str, trust_remote_code: bool = False, **hub_kwargs
) -> tuple[Sequence[float], Sequence[float]]:
    """Read the mean and std of a model's own image processor, for images in [0, 1]."""
    # The stored values come first: some processors cannot be built without torchvision.
    processor, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, **hub_kwargs)
    if "image_mean" not in processor or "image_std" not in processor:  # defaults of the processor's class
        processor = AutoImageProcessor.from_pretrained(
            name_or_path, trust_remote_code=trust_remote_code, **hub_kwargs
        ).to_dict()
    if not processor.get("do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3
    return processor["image_mean"], processor["image_std"]


def _resample_patch_kernel(kernel: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Resize a patch kernel (F, 3, p, p) to another side p, as in FlexiViT (arXiv 2212.08013, section 3.4)."""
    # The new kernel is pinv(Rᵀ)·kernel with R the antialiased bicubic resize, which is separable.
    identity = torch.eye(kernel.shape[-1], dtype=torch.float64)[None, None]
    resize = F.interpolate(identity, (patch_size, kernel.shape[-1]), mode="bicubic", antialias=True)[0, 0]
    pseudo_inverse = torch.linalg.pinv(resize.T)  # (new p, old p)
    # On the CPU because not every accelerator has float64.
    return (pseudo_inverse @ kernel.cpu().double() @ pseudo_inverse.T).to(kernel)


def _resample_positions(table: torch.Tensor, num_prefix: int, grid_size: int) -> torch.Tensor:
    """Resize a position table (P + g², F) to (P + G², F) by antialiased bicubic interpolation; prefix rows are kept."""
    prefix, grid = table[:num_prefix], table[num_prefix:].float()
    grid = grid.T.unflatten(1, (math.isqrt(len(grid)), -1))[None]  # (1, F, g, g)
    grid = F.interpolate(grid, (grid_size, grid_size), mode="bicubic", antialias=True)  # (1, F, G, G)
    return torch.cat([prefix, grid[0].flatten(1).T.to(table)])


def _interpolate_positions_natively(model: PreTrainedModel, num_tokens: int, side: int) -> torch.Tensor:
    """Return the position table (1, P + N, F) that `model` itself interpolates for images of `side` pixels."""
    embeddings = next((module for module in model.modules() if hasattr(module, "interpolate_pos_encoding")), None)
    if embeddings is None:
        raise _unsupported(model.config)
    states = torch.zeros(1, num_tokens, model.config.hidden_size, device=model.device, dtype=model.dtype)
    return embeddings.interpolate_pos_encoding(states, side, side)


def _naflex_to_fixed_grid(model: PreTrainedModel, grid_size: int | None) -> SiglipVisionModel:
    """
    Convert a SigLIP 2 NaFlex tower, which takes patches cut outside the model, to a SigLIP tower.

    On square images only the layout of its kernel differs, and the rule that resizes its table to `grid_size`, if given.
    """
    patch_size, native_grid = _side(model.config.patch_size), math.isqrt(model.config.num_patches)
    kernel_name, table_name = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
    state_dict = model.state_dict()
    kernel = state_dict[kernel_name].unflatten(1, (patch_size, patch_size, 3))
    state_dict[kernel_name] = kernel.permute(0, 3, 1, 2).contiguous()  # (F, 3, p, p)
    if grid_size is not None:
        table, shape = state_dict[table_name].unflatten(0, (native_grid, -1)), torch.tensor([[grid_size, grid_size]])
        state_dict[table_name] = model.embeddings.resize_positional_embeddings(table, shape, grid_size**2)[0]
    fields = {**model.config.to_dict(), "image_size": patch_size * (grid_size or native_grid)}
    config = SiglipVisionConfig(**{key: value for key, value in fields.items() if key != "model_type"})
    return SiglipVisionModel.from_pretrained(None, config=config, state_dict=state_dict, dtype=model.dtype)


def _adapt_weights(
    model: PreTrainedModel, target: PreTrainedModel, grid_size: int, mode: str
) -> dict[str, torch.Tensor]:
    """Resize the patch kernel and the position table of `model` to the shapes of `target`, which is on the meta device."""
    patch_size, input_size = target.config.patch_size, target.config.image_size
    native_grid = _side(model.config.image_size) // _side(model.config.patch_size)
    # Cloned because `from_pretrained` takes the tensors themselves: training `model` would train the teacher.
    state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, expected in target.state_dict().items():
        tensor = state_dict[name]
        if tensor.shape == expected.shape:
            continue
        num_tokens, num_prefix = expected.shape[-2], tensor.shape[-2] - native_grid**2  # of a position table
        if tensor.ndim == 4 and expected.shape[-2:] == (patch_size, patch_size):
            state_dict[name] = _resample_patch_kernel(tensor, patch_size)
        elif tensor.ndim > 3 or num_prefix < 0 or num_tokens != num_prefix + grid_size**2:
            raise _unsupported(model.config)
        elif mode == "resample":
            state_dict[name] = _resample_positions(tensor.flatten(0, -2), num_prefix, grid_size).view(expected.shape)
        else:
            state_dict[name] = _interpolate_positions_natively(model, num_tokens, input_size).view(expected.shape)
    return state_dict


class SemanticTeacher(nn.Module):
    r"""
    A frozen vision encoder that provides target features on the student's token grid.

    The teacher's token grid is rarely the student's (DINOv2 has 14 px patches). Two modes match them:

    - `"resample"`, as in the published PixelREPA: the patch kernel is resized to the student's patch size,
      `image_size / grid_size`, with the pseudo-inverse of the bicubic resize (FlexiViT, arXiv 2212.08013), the position
      table to the student's grid by antialiased bicubic interpolation. Images of another size are resized (bilinear).
    - `"resize"`, as in REPA: images are resized (bicubic) to the teacher's patch size × `grid_size` pixels; kernel and
      position handling are the teacher's own.

    The encoder is deliberately not a registered submodule: a parent module cannot train, unfreeze or save it, but `.to()`
    moves it. It computes in its own `dtype`, also under autocast.

    Args:
        model (`PreTrainedModel`): The vision encoder; the teacher keeps an adapted copy.
        grid_size (`int`): Side G of the student's token grid.
        image_size (`int`): Image side in pixels, a multiple of `grid_size`; unused in mode `"resize"`.
        image_mean, image_std (`Sequence[float]` of length 3): Normalization of images in [0, 1].
        mode (`str`, *optional*, defaults to `"resample"`): `"resample"` or `"resize"`.
        dtype (`torch.dtype`, *optional*, defaults to the model's): Compute dtype. Resampling precedes the cast.

    Raises:
        `ValueError`: If the encoder is not supported, or cannot be adapted to the grid.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        grid_size: int,
        image_size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        mode: str = "resample",
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if mode not in ("resample", "resize"):
            raise ValueError(f"`mode` must be 'resample' or 'resize', got {mode!r}.")
        if getattr(model.config, "num_channels", None) != 3 or not hasattr(model.config, "patch_size"):
            raise _unsupported(model.config)
        if model.config.model_type == "siglip2_vision_model":
            model = _naflex_to_fixed_grid(model, grid_size if mode == "resize" else None)

        self.grid_size = grid_size
        self.interpolation = "bilinear" if mode == "resample" else "bicubic"
        patch_size = image_size // grid_size if mode == "resample" else _side(model.config.patch_size)
        self.input_size = patch_size * grid_size

        # A model of the same class with these patches and this grid: its shapes show which weights must be adapted.
        config = copy.deepcopy(model.config)
        config.patch_size, config.image_size = patch_size, self.input_size
        with torch.device("meta"):
            target = type(model)(config).eval()
            pixel_values = torch.zeros(1, 3, self.input_size, self.input_size, dtype=target.dtype)
            states = target(pixel_values).last_hidden_state
        if states.ndim != 3 or states.shape[1] < grid_size**2:
            raise _unsupported(config)
        self.feature_dim, self.num_prefix_tokens = states.shape[2], states.shape[1] - grid_size**2
        # CLIP applies its final LayerNorm to the class token alone; the target is normalized patch tokens.
        self.final_norm = "post_layernorm" if "clip" in config.model_type else None
        state_dict = _adapt_weights(model, target, grid_size, mode)
        adapted = type(model).from_pretrained(None, config=config, state_dict=state_dict, dtype=dtype or model.dtype)
        # Not through `setattr`, which would register it; see the class docstring.
        self.__dict__["model"] = adapted.to(model.device).requires_grad_(False).eval()

        # ((x + 1) / 2 − mean) / std = x · scale + shift. Not buffers: `.to(torch.bfloat16)` would round them.
        mean, std = (torch.tensor(values, device=model.device).view(1, 3, 1, 1) for values in (image_mean, image_std))
        self.pixel_scale, self.pixel_shift = 0.5 / std, (0.5 - mean) / std
        self.train(False)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        grid_size: int,
        image_size: int,
        mode: str = "resample",
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        **hub_kwargs,
    ) -> "SemanticTeacher":
        """
        Load an encoder, or the vision tower of a dual model, with its own normalization from the Hub or a folder.

        Args:
            name_or_path (`str`): For example `"facebook/dinov2-base"`.
            grid_size, image_size, mode, dtype: See [`SemanticTeacher`].
            trust_remote_code (`bool`, *optional*, defaults to `False`): Allow the encoder to run its own code.
            hub_kwargs: `revision`, `cache_dir`, `token`, `local_files_only`, `subfolder`.

        Raises:
            `OSError`: If configuration, weights or image processor are not found.
            `ValueError`: If the encoder is not supported or lacks weights.
        """
        # Never None: transformers would ask on the terminal whether to run a folder's own code.
        hub_kwargs["trust_remote_code"] = trust_remote_code
        config = AutoConfig.from_pretrained(name_or_path, **hub_kwargs)
        config = getattr(config, "vision_config", config)
        image_mean, image_std = read_normalization(name_or_path, **hub_kwargs)
        model, loading_info = AutoModel.from_pretrained(
            name_or_path, config=config, dtype="auto", output_loading_info=True, **hub_kwargs
        )
        # Pooling heads come after the tokens and are absent from some checkpoints; anything else would be random.
        if missing := sorted(key for key in loading_info["missing_keys"] if "pooler" not in key):
            raise ValueError(f"{name_or_path} lacks weights of {type(model).__name__}, among them {missing[:3]}.")
        return cls(model, grid_size, image_size, image_mean, image_std, mode=mode, dtype=dtype)

    def train(self, mode: bool = True) -> "SemanticTeacher":
        return super().train(False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.model._apply(fn, recurse)
        self.pixel_scale = self.pixel_scale.to(self.model.device)
        self.pixel_shift = self.pixel_shift.to(self.model.device)
        return self

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images (B, 3, H, H) in [-1, 1], any floating dtype, to features (B, N, F) in the encoder's dtype, row-major."""
        with torch.autocast(pixel_values.device.type, enabled=False):
            pixel_values = pixel_values.float()
            if pixel_values.shape[-1] != self.input_size:
                # Not antialiased, as in both published codes.
                pixel_values = F.interpolate(pixel_values, self.input_size, mode=self.interpolation)  # (B, 3, S, S)
            pixel_values = torch.addcmul(self.pixel_shift, pixel_values, self.pixel_scale)
            states = self.model(pixel_values.to(self.model.dtype)).last_hidden_state  # (B, P + N, F)
            states = states[:, self.num_prefix_tokens :]  # (B, N, F)
            if self.final_norm is not None:
                states = getattr(self.model, self.final_norm)(states)
            return states
