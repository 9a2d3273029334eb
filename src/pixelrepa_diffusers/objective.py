"""The PixelREPA training objective, and random draws for a training loop of your own (the trainer's: training/draws.py).

    (1)  z         = t·x + (1 − t)·e               e = noise_scale·N(0, I); t = 0 is noise, t = 1 is the image
    (2)  v         = (x − z) / max(1 − t, t_eps)   v̂ likewise, with the prediction x̂ = JiT(z, t, y) in place of x
    (3)  L_denoise = mean (v − v̂)²
    (4)  L_align   = mean over tokens of 1 − cos(f(x), projector(h))
    (5)  L         = L_denoise + λ·L_align

(1)–(3) are JiT (arXiv 2511.13720), (4) and (5) PixelREPA (arXiv 2603.14366). Everything outside the networks is float32.

Letters in the shape trails: B batch, N patch tokens, F width of the teacher.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.utils import BaseOutput

from .adapter import ConvProjector, MaskedTransformerAdapter, MLPProjector, check_projector_fits
from .transformer_jit import JiTTransformer2DModel


def interpolate(images: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Equation (1), z = t·x + (1 − t)·e: images x (B, C, H, W), `noise` e times `noise_scale`, `timestep` t (B,)."""
    t = timestep.view(-1, 1, 1, 1)
    return t * images + (1 - t) * noise


@dataclass
class PixelREPAObjectiveOutput(BaseOutput):
    """
    Losses of a batch, float32 scalars.

    Args:
        loss (`torch.Tensor`): L of (5), the one to differentiate.
        denoising_loss (`torch.Tensor`): L_denoise of (3).
        alignment_loss (`torch.Tensor`, *optional*): L_align of (4); None when alignment is off.
    """

    # Defaults because accelerate rebuilds outputs as `type(output)({name: tensor})`, without the other fields.
    loss: torch.Tensor
    denoising_loss: torch.Tensor | None = None
    alignment_loss: torch.Tensor | None = None


class PixelREPAObjective(nn.Module):
    r"""
    Transformer, projector and loss as one module for `accelerator.prepare`.

    It draws no random numbers. Both losses come from one forward pass of the transformer; only the projector sees the mask.

    Args:
        transformer (`JiTTransformer2DModel`): The model to train; its config provides `noise_scale` and `t_eps`.
        projector (`MaskedTransformerAdapter`, `MLPProjector` or `ConvProjector`, *optional*): The projector to align;
            None trains plain JiT.
        alignment_weight (`float`, *optional*, defaults to 0.1): λ.
        spatial_norm (`float`, *optional*): γ of iREPA's spatial normalization of the teacher's features
            (arXiv 2512.10794), (f − γ·mean over tokens) / (std over tokens + 1e-6); iREPA uses 0.8.
        alignment_depth (`int`, *optional*, defaults to the transformer's `in_context_start`): Number of blocks before the
            aligned tokens.

    Raises:
        `ValueError`: If the projector does not fit the transformer, or `alignment_depth` is out of range.
    """

    # accelerate's FSDP wrapping reads this from the outermost module.
    _no_split_modules = ["JiTBlock"]

    def __init__(
        self,
        transformer: JiTTransformer2DModel,
        projector: MaskedTransformerAdapter | MLPProjector | ConvProjector | None = None,
        alignment_weight: float = 0.1,
        spatial_norm: float | None = None,
        alignment_depth: int | None = None,
    ):
        super().__init__()
        if projector is not None:
            check_projector_fits(projector, transformer)
        if alignment_depth is not None and not 0 <= alignment_depth < transformer.config.num_layers:
            raise ValueError(
                f"`alignment_depth` must lie in [0, {transformer.config.num_layers - 1}], got {alignment_depth}."
            )
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
        Compute the losses of one batch.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Images x in [-1, 1].
            class_labels (`torch.Tensor` of shape `(batch_size,)`): Labels y after [`drop_labels`].
            timestep (`torch.Tensor` of shape `(batch_size,)`): t in [0, 1], see [`draw_timesteps`].
            noise (`torch.Tensor`, shaped like `pixel_values`): Unit noise; it is multiplied by `noise_scale` here.
            teacher_features (`torch.Tensor` of shape `(batch_size, num_patches, teacher_dim)`, *optional*): f(x), in any
                floating type. None turns alignment off for this call.
            keep_mask (`torch.BoolTensor` of shape `(batch_size, num_patches)`, *optional*): See [`draw_keep_mask`].
        """
        images = pixel_values.float()
        noisy = interpolate(images, self.transformer.config.noise_scale * noise.float(), timestep)  # (1)
        output = self.transformer(
            noisy,
            timestep,
            class_labels,
            return_alignment_states=self.projector is not None,
            alignment_depth=self.alignment_depth,
        )
        target_velocity = self.transformer.velocity(images, noisy, timestep)  # (2)
        velocity = self.transformer.velocity(output.sample, noisy, timestep)
        denoising_loss = (target_velocity - velocity).square().mean()  # (3)

        if teacher_features is None:
            loss = denoising_loss
            if self.projector is not None:
                # DDP needs a gradient for every parameter and FSDP gathers parameters in forward only, so one sequence
                # passes through the projector for gradients of exactly zero.
                mask = None if keep_mask is None else keep_mask[:1]
                unused = self.projector(output.alignment_states[:1].detach(), timestep[:1], class_labels[:1], mask)
                loss = loss + 0.0 * unused.float().sum()
            return PixelREPAObjectiveOutput(loss=loss, denoising_loss=denoising_loss)

        predicted = self.projector(output.alignment_states, timestep, class_labels, keep_mask)  # (B, N, F)
        if predicted.shape != teacher_features.shape:  # cosine_similarity would broadcast
            raise ValueError(
                f"The projector's features have shape {tuple(predicted.shape)}, the teacher's "
                f"{tuple(teacher_features.shape)}: the token grid or `teacher_dim` do not match."
            )
        targets = teacher_features.float()
        if self.spatial_norm is not None:
            spread = targets.std(dim=1, keepdim=True) + 1e-6
            targets = (targets - self.spatial_norm * targets.mean(dim=1, keepdim=True)) / spread
        # A zero feature has the cosine 0: torch divides by norms of at least 1e-8.
        alignment_loss = (1 - F.cosine_similarity(predicted.float(), targets, dim=-1)).mean()  # (4)
        loss = denoising_loss + self.alignment_weight * alignment_loss  # (5)
        return PixelREPAObjectiveOutput(loss=loss, denoising_loss=denoising_loss, alignment_loss=alignment_loss)


def draw_timesteps(
    batch_size: int, generator: torch.Generator, P_mean: float = -0.8, P_std: float = 0.8
) -> torch.Tensor:
    """Draw logit-normal timesteps t = sigmoid(P_mean + P_std·n), n ~ N(0, 1): (B,) float32, on the generator's device."""
    return torch.sigmoid(P_mean + P_std * torch.randn(batch_size, generator=generator, device=generator.device))


def draw_keep_mask(
    batch_size: int, num_tokens: int, generator: torch.Generator, mask_ratio: float = 0.2
) -> torch.Tensor:
    """Draw a bool mask (B, N) that is False for each token independently with probability `mask_ratio`."""
    # ≥ where the published code has >: a uniform draw can be 0, and ratio 0 must keep every token.
    return torch.rand(batch_size, num_tokens, generator=generator, device=generator.device) >= mask_ratio


def drop_labels(
    class_labels: torch.Tensor, num_classes: int, generator: torch.Generator, probability: float = 0.1
) -> torch.Tensor:
    """Replace each of the labels (B,) by the null class `num_classes`, independently, with the given probability."""
    uniform = torch.rand(class_labels.shape, generator=generator, device=generator.device)
    return class_labels.masked_fill(uniform.to(class_labels.device) < probability, num_classes)
