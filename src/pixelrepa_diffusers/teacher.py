# Copyright 2026 The pixelrepa_diffusers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The frozen semantic teacher: images in [-1, 1] → one feature vector for every token of the student.

Letters in the shape trails: B batch, S side of the image the model sees, p side of its patches, G = S/p side of the
token grid (the student's), N = G² patch tokens, P prefix tokens (class, registers), F feature width.
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
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)


SUPPORTED = (
    "a transformers vision encoder with square patches of RGB pixels whose last hidden state holds one token per patch: "
    "DINOv2 (with or without registers), DINOv3 ViT, SigLIP, SigLIP 2, CLIP, ViT, DeiT, I-JEPA, …"
)


def _square(size: int | Sequence[int] | None, what: str) -> int:
    """The side of a square given as one number or as two equal ones."""
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1:
        raise ValueError(f"The teacher's configuration has {what} {size!r}. Needed is {SUPPORTED}")
    return sides.pop()


def _check_vision_config(config) -> None:
    num_channels = getattr(config, "num_channels", None)
    if num_channels != 3:
        raise ValueError(
            f"A teacher of type {config.model_type!r} has num_channels={num_channels}. Needed is {SUPPORTED}"
        )
    _square(getattr(config, "patch_size", None), "patch_size")


def read_normalization(name_or_path: str, **hub_kwargs) -> tuple[Sequence[float], Sequence[float]]:
    """The (mean, std) of the teacher's own preprocessor."""
    # Read the stored values rather than build the processor: some processors exist only in a torchvision version.
    processor, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, **hub_kwargs)
    if "image_mean" not in processor or "image_std" not in processor:  # then they are the defaults of its class
        hub_kwargs = {"trust_remote_code": False, **hub_kwargs}
        processor = AutoImageProcessor.from_pretrained(name_or_path, **hub_kwargs).to_dict()
    if not processor.get("do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3
    return processor["image_mean"], processor["image_std"]


def _resample_patch_kernel(kernel: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Resizes (F, 3, p, p) to (F, 3, patch_size, patch_size), FlexiViT (arXiv 2212.08013, section 3.4).

    With R the antialiased bicubic resize of a patch, the new kernel is pinv(Rᵀ)·kernel: of all kernels, the one whose
    products with resized patches are nearest to those of the old kernel with the patches themselves. R is separable,
    hence so is its pseudo-inverse, and the one-dimensional operator suffices.
    """
    identity = torch.eye(kernel.shape[-1], dtype=torch.float64)[None, None]
    resize = F.interpolate(identity, (patch_size, kernel.shape[-1]), mode="bicubic", antialias=True)[0, 0]
    pseudo_inverse = torch.linalg.pinv(resize.T)  # (new p, old p)
    # On the CPU because not every accelerator has float64.
    return (pseudo_inverse @ kernel.cpu().double() @ pseudo_inverse.T).to(kernel)


def _resample_positions(table: torch.Tensor, native_grid: int, grid_size: int) -> torch.Tensor:
    """Antialiased bicubic resize of a position table (P + native_grid², F); prefix rows are kept."""
    num_prefix = table.shape[0] - native_grid**2
    prefix, grid = table[:num_prefix], table[num_prefix:].float().T.unflatten(1, (native_grid, native_grid))[None]
    grid = F.interpolate(grid, (grid_size, grid_size), mode="bicubic", antialias=True)  # (1, F, G, G)
    return torch.cat([prefix, grid[0].flatten(1).T.to(table)])


def _interpolate_positions_natively(
    model: PreTrainedModel, num_prefix: int, side: int, grid_size: int
) -> torch.Tensor:
    """The table (1, P + N, F) that `model` itself would interpolate for images of `side` pixels."""
    embeddings = [module for module in model.modules() if hasattr(module, "interpolate_pos_encoding")]
    if not embeddings:
        raise ValueError(
            f"{type(model).__name__} cannot interpolate its position table to {grid_size}×{grid_size} tokens. Use "
            "mode='resample', or a student whose token grid is the teacher's own."
        )
    states = torch.zeros(1, num_prefix + grid_size**2, model.config.hidden_size, device=model.device)
    return embeddings[0].interpolate_pos_encoding(states.to(model.dtype), side, side)


def _naflex_to_fixed_grid(model: PreTrainedModel, grid_size: int | None) -> SiglipVisionModel:
    """The SigLIP tower that equals a SigLIP 2 NaFlex tower on square images.

    The NaFlex tower takes patches cut outside the model, and resizes its table in a loop over the batch which neither
    compiles nor runs without waiting for the device. On square images it is SigLIP but for the layout of its kernel.
    With `grid_size`, its table is resized to that grid by its own rule; None keeps the stored one.
    """
    patch_size, native_grid = _square(model.config.patch_size, "patch_size"), math.isqrt(model.config.num_patches)
    state_dict = model.state_dict()
    kernel = state_dict["embeddings.patch_embedding.weight"].unflatten(1, (patch_size, patch_size, 3))
    state_dict["embeddings.patch_embedding.weight"] = kernel.permute(0, 3, 1, 2).contiguous()  # (F, 3, p, p)
    if grid_size is not None:
        table = state_dict["embeddings.position_embedding.weight"].unflatten(0, (native_grid, native_grid))
        state_dict["embeddings.position_embedding.weight"] = model.embeddings.resize_positional_embeddings(
            table, torch.tensor([[grid_size, grid_size]]), max_length=grid_size**2
        )[0]
    fields = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    config = SiglipVisionConfig(**{**fields, "image_size": patch_size * (grid_size or native_grid)})
    return SiglipVisionModel.from_pretrained(None, config=config, state_dict=state_dict, dtype=model.dtype)


class SemanticTeacher(nn.Module):
    r"""
    A frozen vision encoder that gives the student's token grid its target features.

    A teacher's grid seldom is the student's (DINOv2 has 14 px patches). Two ways to bring them together:

    - `"resample"`, what the published PixelREPA does: the patch kernel is resized to the student's patch size,
      `image_size / grid_size`, with the pseudo-inverse of the bicubic resize (FlexiViT, arXiv 2212.08013), the position
      table by antialiased bicubic to the student's grid, and the image goes in as it is (an image of another size is
      resized to `image_size` first, bilinear). Rotary positions (DINOv3) need no resampling.
    - `"resize"`, what REPA does: the image is resized (bicubic) to teacher's patch × `grid_size` pixels; kernel and
      position handling are the teacher's own.

    The encoder is deliberately not a registered submodule. So no parent can put it into train mode, unfreeze it, hand
    it to an optimizer or DDP, or write it into a state dict; `.to()` and its relatives still move it. It computes in
    its own type (`dtype`) whatever autocast surrounds it.

    Args:
        model (`PreTrainedModel`): The vision encoder. The teacher keeps an adapted copy; this one is left as it is.
        grid_size (`int`): Side G of the student's token grid.
        image_size (`int`): Side of the images in pixels; a multiple of `grid_size` in mode `"resample"`.
        image_mean, image_std (`Sequence[float]` of length 3): Normalisation of images in [0, 1].
        mode (`"resample"` or `"resize"`, defaults to `"resample"`).
        dtype (`torch.dtype`, *optional*): Computing type; defaults to the model's. Resampling is done before the cast.

    Attributes:
        model (`PreTrainedModel`): The adapted encoder.
        feature_dim (`int`): F.
        grid_size (`int`): G.

    Raises:
        ValueError: for an encoder that has no square RGB patches, or whose positions can not be brought to the grid.
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
        for name, side in (("grid_size", grid_size), ("image_size", image_size)):
            if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= 2**16:
                raise ValueError(f"`{name}` must be a positive integer of at most {2**16}, got {side!r}.")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"`dtype` must be a floating point torch.dtype or None, got {dtype!r}.")
        if mode == "resample" and image_size % grid_size:
            raise ValueError(
                f"mode='resample' gives the teacher the student's patches: `image_size` must be a multiple of "
                f"`grid_size`, got {image_size} and {grid_size}. Pass a multiple, or mode='resize'."
            )
        _check_vision_config(model.config)
        if not len(image_mean) == len(image_std) == 3:
            raise ValueError(f"`image_mean` and `image_std` need 3 numbers each, got {image_mean} and {image_std}.")
        if not all(math.isfinite(value) for value in image_mean) or not all(
            0 < value < math.inf for value in image_std
        ):
            raise ValueError(
                f"`image_mean` must be finite and `image_std` positive and finite, got {image_mean} and {image_std}."
            )
        if model.config.model_type == "siglip2_vision_model":
            model = _naflex_to_fixed_grid(model, grid_size if mode == "resize" else None)

        self.grid_size = grid_size
        self.interpolation = "bilinear" if mode == "resample" else "bicubic"
        patch_size = _square(model.config.patch_size, "patch_size")
        native_grid = _square(model.config.image_size, "image_size") // patch_size
        if mode == "resample":
            patch_size = image_size // grid_size
        self.input_size = patch_size * grid_size

        # A model of the same class made for these patches and this grid shows by its shapes what must be adapted.
        config = copy.deepcopy(model.config)
        config.patch_size, config.image_size = patch_size, self.input_size
        with torch.device("meta"):
            blank = type(model)(config).eval()
        self._examine(blank)
        # Cloned because `from_pretrained` takes the tensors themselves: training `model` on would train the teacher.
        state_dict = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name, target in blank.state_dict().items():
            source = state_dict[name]
            num_prefix = source.shape[-2] - native_grid**2 if source.ndim in (2, 3) else -1
            if source.shape == target.shape:
                continue
            if source.ndim == 4 and target.shape[-2:] == (patch_size, patch_size):
                state_dict[name] = _resample_patch_kernel(source, patch_size)
            elif num_prefix < 0 or target.shape[-2] != num_prefix + grid_size**2:
                raise ValueError(
                    f"{type(model).__name__} cannot be brought to {grid_size}×{grid_size} tokens of {patch_size} px: "
                    f"{name} would change from {tuple(source.shape)} to {tuple(target.shape)}, which is neither a patch "
                    f"kernel nor a position table. Needed is {SUPPORTED}"
                )
            elif mode == "resample":
                table = _resample_positions(source.flatten(0, -2), native_grid, grid_size)
                state_dict[name] = table.view(target.shape)
            else:
                table = _interpolate_positions_natively(model, num_prefix, self.input_size, grid_size)
                state_dict[name] = table.view(target.shape)
        adapted = type(model).from_pretrained(None, config=config, state_dict=state_dict, dtype=dtype or model.dtype)
        # Not through `setattr`, which would register it; see the class docstring.
        self.__dict__["model"] = adapted.to(model.device).requires_grad_(False).eval()

        # ((x + 1) / 2 − mean) / std = x · scale + shift. Not buffers: `.to(torch.bfloat16)` would round them.
        mean, std = (torch.tensor(values, device=model.device).view(1, 3, 1, 1) for values in (image_mean, image_std))
        self.pixel_scale, self.pixel_shift = 0.5 / std, (0.5 - mean) / std
        self.train(False)

    def _examine(self, blank: PreTrainedModel) -> None:
        """Runs `blank`, a model on the meta device, to learn what its output is made of."""
        norms = [(name, module) for name, module in blank.named_children() if isinstance(module, nn.LayerNorm)]
        dims_seen = []
        handles = [norms[-1][1].register_forward_hook(lambda m, x, y: dims_seen.append(y.ndim))] if norms else []
        pixel_values = torch.zeros(1, 3, self.input_size, self.input_size, dtype=blank.dtype, device="meta")
        states = blank(pixel_values).last_hidden_state
        for handle in handles:
            handle.remove()
        num_tokens = states.shape[1] if states.ndim == 3 else 0
        if num_tokens < self.grid_size**2:
            raise ValueError(
                f"{type(blank).__name__} turns an image of {self.grid_size}×{self.grid_size} patches into features of "
                f"shape {tuple(states.shape)}: fewer than one token per patch. Needed is {SUPPORTED}"
            )
        self.feature_dim = states.shape[-1]
        self.num_prefix_tokens = num_tokens - self.grid_size**2
        # CLIP applies its final LayerNorm to the class token alone; the target is normalised patch tokens.
        self.final_norm = norms[-1][0] if 2 in dims_seen else None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        grid_size: int,
        image_size: int,
        mode: str = "resample",
        dtype: torch.dtype | None = None,
        **hub_kwargs,
    ) -> "SemanticTeacher":
        """
        Loads an encoder of the Hub or of a folder, with its own normalisation; of a dual model, the vision tower.

        Args:
            name_or_path (`str`): For example `"facebook/dinov2-base"`.
            grid_size, image_size, mode, dtype: See [`SemanticTeacher`]; `dtype` defaults to the stored type.
            hub_kwargs: `revision`, `cache_dir`, `token`, `local_files_only`, `subfolder`; `trust_remote_code=True` for an
                encoder that comes with code of its own, which is refused otherwise.

        Raises:
            OSError: when configuration, weights or preprocessor are not found.
            ValueError: for an unsupported encoder (found before its weights are read), or one with weights missing.
        """
        # Said outright: transformers would else ask on the terminal whether to run a folder's own code.
        hub_kwargs = {"trust_remote_code": False, **hub_kwargs}
        config = AutoConfig.from_pretrained(name_or_path, **hub_kwargs)
        config = getattr(config, "vision_config", config)
        _check_vision_config(config)
        image_mean, image_std = read_normalization(name_or_path, **hub_kwargs)
        model, loading_info = AutoModel.from_pretrained(
            name_or_path, config=config, dtype="auto", output_loading_info=True, **hub_kwargs
        )
        # Pooling heads come after the tokens and are absent from some checkpoints; anything else would be random.
        missing = sorted(key for key in loading_info["missing_keys"] if "pooler" not in key)
        if missing:
            raise ValueError(f"{name_or_path} lacks weights of {type(model).__name__}, among them {missing[:3]}.")
        return cls(model, grid_size, image_size, image_mean, image_std, mode=mode, dtype=dtype)

    def train(self, mode: bool = True) -> "SemanticTeacher":
        return super().train(False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.model._apply(fn, recurse)
        self.pixel_scale, self.pixel_shift = (
            constant.to(self.model.device) for constant in (self.pixel_scale, self.pixel_shift)
        )
        return self

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values (B, 3, H, H) in [-1, 1], any floating type → patch features (B, N, F) float32, row by row."""
        if not isinstance(pixel_values, torch.Tensor):
            raise ValueError(f"The teacher takes a tensor of images, got {type(pixel_values).__name__}.")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or pixel_values.shape[2] != pixel_values.shape[3]:
            raise ValueError(
                f"The teacher takes square RGB images (batch_size, 3, side, side), got {tuple(pixel_values.shape)}."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(f"The teacher takes floating point pixels in [-1, 1], got {pixel_values.dtype}.")
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
            return states.float()
