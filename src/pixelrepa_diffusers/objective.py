# Copyright 2026 The pixelrepa_diffusers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The training objective: the path from noise to image, the two losses, their weighted sum; and the random draws.

    z  = t·x + (1 − t)·e                     e = noise_scale·N(0, I); t = 0 is noise, t = 1 is the image
    v  = (x − z) / max(1 − t, t_eps)         v̂ the same with x̂ = JiT(z, t, y) for x
    L  = mean (v − v̂)² + λ·mean (1 − cos(f(x)[n], projector(h)[n]))

(JiT, arXiv 2511.13720; PixelREPA, arXiv 2603.14366.) All of it in float32, whatever the network computes in.

The cosine divides by norms of at least 1e-8 (torch's): with a feature of norm zero it is 0, the token's loss is 1, and
where the teacher's is zero the token has no gradient.

Letters in the shape trails: B batch, N patch tokens, D width of the transformer, F width of the teacher.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.utils import BaseOutput

from .adapter import ConvProjector, MaskedTransformerAdapter, MLPProjector
from .transformer_jit import JiTTransformer2DModel


def _check_real(name: str, value: float, least: float, most: float, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"`{name}` must {allowed}, got {value!r}.")


def draw_timesteps(
    batch_size: int, generator: torch.Generator, P_mean: float = -0.8, P_std: float = 0.8
) -> torch.Tensor:
    """t = sigmoid(P_mean + P_std·n), n ~ N(0, 1): (batch_size,) float32 in (0, 1), on the generator's device."""
    _check_real("P_mean", P_mean, -1e6, 1e6, "be a finite number")
    _check_real("P_std", P_std, 0, 1e6, "be a finite number of at least 0")
    normal = torch.randn(batch_size, generator=generator, device=generator.device)
    return torch.sigmoid(P_mean + P_std * normal)


def draw_keep_mask(
    batch_size: int, num_tokens: int, generator: torch.Generator, mask_ratio: float = 0.2
) -> torch.Tensor:
    """(batch_size, num_tokens) bool: False, each token independently, with probability `mask_ratio` in [0, 1]."""
    _check_real("mask_ratio", mask_ratio, 0, 1, "lie in [0, 1]")
    uniform = torch.rand(batch_size, num_tokens, generator=generator, device=generator.device)
    # ≥ where the published code has >: a uniform draw can be 0, and ratio 0 must keep every token.
    return uniform >= mask_ratio


def drop_labels(
    class_labels: torch.Tensor, num_classes: int, generator: torch.Generator, probability: float = 0.1
) -> torch.Tensor:
    """Labels (B,) with each, independently, replaced by the null class `num_classes` with the given probability."""
    _check_real("probability", probability, 0, 1, "lie in [0, 1]")
    uniform = torch.rand(class_labels.shape, generator=generator, device=generator.device)
    return class_labels.masked_fill((uniform < probability).to(class_labels.device), num_classes)


def interpolate(images: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """
    The path z = t·x + (1 − t)·e from noise to image (JiT, arXiv 2511.13720).

    Args:
        images: x, (B, C, S, S), in [-1, 1].
        noise: e, shaped like `images`, already multiplied by the model's `noise_scale`.
        timestep: t in [0, 1], (B,).
    """
    t = timestep.view(-1, 1, 1, 1)
    return t * images + (1 - t) * noise


@dataclass
class PixelREPAObjectiveOutput(BaseOutput):
    """
    The parts of the objective, float32 scalars.

    Args:
        loss: The one to differentiate: denoising_loss + alignment_weight · alignment_loss.
        denoising_loss: Mean squared error of the velocity.
        alignment_loss: 1 − the mean cosine; None where alignment is off.
    """

    # Defaults because accelerate rebuilds outputs as `type(output)({name: tensor})`, which needs all but the first.
    loss: torch.Tensor
    denoising_loss: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None


class PixelREPAObjective(nn.Module):
    r"""
    The transformer, the projector and the loss as one module: what `accelerator.prepare` is given.

    It draws nothing. Both branches come from one forward pass of the transformer, which always sees unmasked tokens.

    Args:
        transformer (`JiTTransformer2DModel`): Its config gives `noise_scale` and `t_eps`.
        projector (`MaskedTransformerAdapter`, `MLPProjector` or `ConvProjector`, *optional*): None is plain JiT.
        alignment_weight (`float`, defaults to 0.1): λ.
        spatial_norm (`float`, *optional*): γ of iREPA's normalisation of the teacher's features (arXiv 2512.10794),
            (f − γ·mean over tokens) / (std over tokens + 1e-6). 0.8 there; None leaves the features as they are.
        alignment_depth (`int`, *optional*): The number of blocks the aligned tokens have passed; defaults to the
            transformer's `in_context_start`.
    """

    # For accelerate's FSDP wrapping, which asks the outermost module.
    _no_split_modules = JiTTransformer2DModel._no_split_modules

    def __init__(
        self,
        transformer: JiTTransformer2DModel,
        projector: MaskedTransformerAdapter | MLPProjector | ConvProjector | None = None,
        alignment_weight: float = 0.1,
        spatial_norm: float | None = None,
        alignment_depth: int | None = None,
    ):
        super().__init__()
        if not isinstance(transformer, JiTTransformer2DModel):
            raise ValueError(f"`transformer` must be a JiTTransformer2DModel, got {type(transformer).__name__}.")
        if not isinstance(projector, MaskedTransformerAdapter | MLPProjector | ConvProjector | None):
            raise ValueError(
                "`projector` must be a MaskedTransformerAdapter, an MLPProjector, a ConvProjector or None, got "
                f"{type(projector).__name__}."
            )
        config = transformer.config
        for name, needed in (
            ("hidden_size", config.num_attention_heads * config.attention_head_dim),
            ("grid_size", config.sample_size // config.patch_size),
            ("num_classes", config.num_classes),
        ):
            given = needed if projector is None else projector.config.get(name, needed)
            if given != needed:
                raise ValueError(f"The projector's `{name}` is {given}; with this transformer it must be {needed}.")
        finite = "be a finite number of at least 0"
        _check_real("alignment_weight", alignment_weight, 0, 1e30, finite)
        if spatial_norm is not None:
            _check_real("spatial_norm", spatial_norm, 0, 1e30, finite + ", or None")
            if config.sample_size == config.patch_size:
                raise ValueError(
                    f"`spatial_norm` divides by the standard deviation over the tokens, and images of {config.sample_size} "
                    f"pixels in patches of {config.patch_size} have one token: it must be None."
                )
        deepest = config.num_layers - 1
        if alignment_depth is not None and (
            not isinstance(alignment_depth, int) or not 0 <= alignment_depth <= deepest
        ):
            raise ValueError(f"`alignment_depth` must lie in [0, {deepest}], got {alignment_depth!r}.")
        self.transformer = transformer
        self.projector = projector
        self.alignment_weight = alignment_weight
        self.spatial_norm = spatial_norm
        self.alignment_depth = alignment_depth

    def forward(
        self,
        pixel_values: torch.Tensor,
        class_labels: torch.Tensor,
        timestep: torch.Tensor,
        noise: torch.Tensor,
        teacher_features: torch.Tensor | None = None,
        keep_mask: torch.Tensor | None = None,
    ) -> PixelREPAObjectiveOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Images x in [-1, 1].
            class_labels (`torch.Tensor` of shape `(batch_size,)`): Labels, already dropped (see [`drop_labels`]).
            timestep (`torch.Tensor` of shape `(batch_size,)`): t in [0, 1] (see [`draw_timesteps`]).
            noise (`torch.Tensor`, shaped like `pixel_values`): Unit noise; it is multiplied by the transformer's
                `noise_scale` here.
            teacher_features (`torch.Tensor` of shape `(batch_size, num_patches, teacher_dim)`, *optional*):
                f(x), in any floating type. None turns alignment off, for this call.
            keep_mask (`torch.BoolTensor` of shape `(batch_size, num_patches)`, *optional*): Handed to the projector
                (see [`draw_keep_mask`]).
        """
        if teacher_features is not None and self.projector is None:
            raise ValueError("`teacher_features` were given, but there is no projector to align. Pass one or neither.")
        if not pixel_values.is_floating_point():
            raise ValueError(f"`pixel_values` must be floating point images in [-1, 1], got {pixel_values.dtype}.")
        if noise.shape != pixel_values.shape:
            raise ValueError(
                f"`noise` must have the shape of `pixel_values`, {tuple(pixel_values.shape)}, got {tuple(noise.shape)}."
            )

        device_type = pixel_values.device.type
        with torch.autocast(device_type, enabled=False):
            images = pixel_values.float()
            noisy = interpolate(images, self.transformer.config.noise_scale * noise.float(), timestep.float())
            target_velocity = self.transformer.velocity(images, noisy, timestep)

        output = self.transformer(
            noisy,
            timestep,
            class_labels,
            return_alignment_states=self.projector is not None,
            alignment_depth=self.alignment_depth,
        )
        with torch.autocast(device_type, enabled=False):
            velocity = self.transformer.velocity(output.sample, noisy, timestep)
            denoising_loss = (target_velocity - velocity).square().mean()

        if teacher_features is None:
            loss = denoising_loss
            if self.projector is not None:
                # DDP waits for a gradient of every parameter it was given, FSDP gathers them in forward only: while
                # alignment is off, one token sequence goes through the projector for gradients of exactly zero.
                mask = None if keep_mask is None else keep_mask[:1]
                unused = self.projector(output.alignment_states[:1].detach(), timestep[:1], class_labels[:1], mask)
                loss = loss + 0.0 * unused.float().sum()
            return PixelREPAObjectiveOutput(loss=loss, denoising_loss=denoising_loss)

        predicted = self.projector(output.alignment_states, timestep, class_labels, keep_mask)  # (B, N, F)
        if teacher_features.shape != predicted.shape:
            raise ValueError(
                f"The projector gives features of shape {tuple(predicted.shape)}, the teacher of shape "
                f"{tuple(teacher_features.shape)}: token grid or `teacher_dim` do not fit."
            )
        with torch.autocast(device_type, enabled=False):
            targets = teacher_features.float()
            if self.spatial_norm is not None:
                spread = targets.std(dim=1, keepdim=True) + 1e-6
                targets = (targets - self.spatial_norm * targets.mean(dim=1, keepdim=True)) / spread
            alignment_loss = (1 - F.cosine_similarity(predicted.float(), targets, dim=-1)).mean()
            loss = denoising_loss + self.alignment_weight * alignment_loss
        return PixelREPAObjectiveOutput(loss=loss, denoising_loss=denoising_loss, alignment_loss=alignment_loss)
