# Copyright 2026 The pixelrepa_diffusers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Feature networks: 8-bit images → the vectors that the metrics compare.

A feature network is any `torch.nn.Module` in eval mode that takes `torch.uint8` images (B, 3, H, W), resizes and normalises
them as it needs, and returns features (B, D), or a dict with `"features"` and, from a classifier, `"logits"` (B, C).
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, PreTrainedModel

from ..teacher import read_normalization


def stack_images(images: torch.Tensor | np.ndarray | Sequence[Image.Image | np.ndarray]) -> torch.Tensor:
    """Images as one `torch.uint8` batch (B, 3, H, W).

    Args:
        images: a `torch.uint8` tensor (B, 3, H, W), which is returned; a uint8 array (B, H, W, 3); or a sequence of PIL
            images (any mode; Pillow converts it to RGB) and uint8 arrays (H, W, 3), all of one size.

    Raises:
        TypeError: floating point images. What their range means is not for a metric to guess: `images.to_uint8` first.
        ValueError: no image, another shape, or several sizes.
    """
    if not isinstance(images, torch.Tensor):
        arrays = [np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image) for image in images]
        shapes = sorted({array.shape for array in arrays})
        if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][2] != 3:
            raise ValueError(
                f"Images must be RGB arrays (H, W, 3) of one size, got the shapes {shapes}. Crop them first."
            )
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    if images.dtype != torch.uint8:
        raise TypeError(
            f"Metrics take 8-bit images (uint8), got {images.dtype}. Round them with images.to_uint8 first."
        )
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"Images must have shape (B, 3, H, W), got {tuple(images.shape)}.")
    return images


@torch.inference_mode()
def extract(network: nn.Module, images: torch.Tensor | np.ndarray | Sequence) -> dict[str, torch.Tensor]:
    """Runs `network` on images (see `stack_images`), on the network's device.

    Returns:
        `features` (B, D) and, from a classifier, `logits` (B, C), on that device.

    Raises:
        ValueError: images as in `stack_images`, a network in train mode, or one whose output is not one row per image.
    """
    if network.training:
        raise ValueError(
            "The feature network is in train mode: dropout and batch statistics would change. Call .eval()."
        )
    images = stack_images(images)
    device = next((parameter.device for parameter in network.parameters()), images.device)
    outputs = network(images.to(device))
    if isinstance(outputs, torch.Tensor):
        outputs = {"features": outputs}
    for name, output in outputs.items():
        if output.ndim != 2 or len(output) != len(images):
            raise ValueError(
                f"The feature network must return one vector per image, ({len(images)}, width), got {name} of shape "
                f"{tuple(output.shape)}."
            )
    return outputs


def network_name(network: nn.Module) -> str:
    """A feature network in words: its `description` if it has one, else its class."""
    return getattr(network, "description", type(network).__qualname__)


def network_sha256(network: nn.Module) -> str:
    """Hash of a feature network's settings and weights: equal hashes, comparable features."""
    digest = hashlib.sha256(getattr(network, "settings", type(network).__qualname__).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class InceptionNetwork(nn.Module):
    """The Inception of FID and IS: torch-fidelity's port of the 2015 TensorFlow graph, with its own resize to 299 pixels.

    Needs the extra `[eval]`. Features are the 2048 pooled activations; logits are the 1008 outputs without bias.

    Args:
        weights (path, *optional*): torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`; None downloads it.
        layer (`str`, defaults to `"2048"`): The features: `"64"`, `"192"`, `"768"` or `"2048"`.

    Raises:
        ImportError: torch-fidelity is missing or cannot be imported; says what to do.
        FileNotFoundError, ValueError: no file at `weights`, or one that holds other things than tensors.
    """

    def __init__(self, weights: str | os.PathLike | None = None, layer: str = "2048"):
        super().__init__()
        if layer not in ("64", "192", "768", "2048"):
            raise ValueError(f'layer must be "64", "192", "768" or "2048", got {layer!r}.')
        if weights is not None:
            if not os.path.isfile(weights):
                raise FileNotFoundError(f"No Inception weights at {weights}.")
            try:
                # torch-fidelity unpickles the file without restrictions; so look first that it holds only tensors.
                torch.load(weights, map_location="meta", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
                raise ValueError(f"{weights} is not a file of Inception weights: {error}") from error
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch build
            raise ImportError(
                f'The Inception network cannot be imported ({error}). Run: pip install "pixelrepa-diffusers[eval]". It brings '
                "torch-fidelity and torchvision; torchvision must match the installed torch (same release, and CUDA or "
                "CPU build alike). Other feature networks, and features computed elsewhere, need neither."
            ) from error
        self.model = FeatureExtractorInceptionV3(
            "inception-v3-compat", [layer, "logits_unbiased"], feature_extractor_weights_path=weights
        )
        self.settings = f"inception-v3-compat {layer}"
        self.description = f"torch-fidelity {self.settings}"
        self.eval()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features, logits = self.model(images)
        return {"features": features, "logits": logits}


class VisionEncoderNetwork(nn.Module):
    """A transformers vision encoder as feature network: DINOv2, SigLIP, CLIP's vision tower, a teacher's folder, …

    The defaults of `from_pretrained` are FD-DINOv2 (Stein et al., arXiv 2306.04675): the final class token of DINOv2
    ViT-L/14 on images resized to 224 × 224 by an antialiased bicubic filter, here in float32 without rounding in between.

    Args:
        model (`PreTrainedModel`): From pixel values to `last_hidden_state` (B, tokens, D).
        image_mean, image_std (3 numbers each): Normalisation of images in [0, 1].
        image_size (`int`): Side in pixels that images are resized to, a multiple of the model's patch.
        pooling (`str`): `"class"`, the first token; or `"patches"`, the mean of the patch tokens.

    Raises:
        ValueError: unknown pooling, a size that is no multiple of the patch, or `"class"` for a model without that token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        image_size: int = 224,
        pooling: str = "class",
    ):
        super().__init__()
        if pooling not in ("class", "patches"):
            raise ValueError(f"pooling must be 'class' or 'patches', got {pooling!r}.")
        if (
            isinstance(image_size, bool)
            or not isinstance(image_size, int)
            or image_size < 1
            or image_size % model.config.patch_size
        ):
            raise ValueError(
                f"image_size must be a multiple of the model's patch of {model.config.patch_size} pixels, got {image_size!r}."
            )
        self.model, self.image_size, self.pooling = model, image_size, pooling
        self.num_patches = (image_size // model.config.patch_size) ** 2
        # Not in the state dict, as they are settings; and float32 whatever the model's type.
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (image_mean, image_std))
        self.settings = (
            f"{type(model).__name__} {pooling} {image_size} mean {tuple(image_mean)} std {tuple(image_std)}"
        )
        self.description = f"{model.config.name_or_path or type(model).__name__}, {pooling}, {image_size} px"
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike = "facebook/dinov2-large",
        image_size: int = 224,
        pooling: str = "class",
        **kwargs,
    ) -> VisionEncoderNetwork:
        """Loads the encoder and its normalisation from a folder or the Hub.

        Args:
            image_size, pooling: see the class. `facebook/dinov2-*` are configured for 518 px and take any multiple of 14.
            kwargs: for `AutoModel.from_pretrained`: `revision`, `cache_dir`, `dtype`, …
        """
        # Said outright: transformers would else ask on the terminal whether to run a folder's own code.
        model = AutoModel.from_pretrained(name_or_path, **{"trust_remote_code": False, **kwargs})
        model = getattr(model, "vision_model", model)  # the image half of CLIP and SigLIP
        of_the_hub = ("revision", "cache_dir", "token", "local_files_only", "subfolder", "trust_remote_code")
        hub_kwargs = {name: kwargs[name] for name in of_the_hub if name in kwargs}
        mean, std = read_normalization(name_or_path, **hub_kwargs)
        return cls(model, mean, std, image_size, pooling)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        size = (self.image_size, self.image_size)
        pixels = F.interpolate(images.float() / 255, size, mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (pixels - self.mean.to(pixels.device)) / self.std.to(pixels.device)
        tokens = self.model(pixels.to(self.model.dtype)).last_hidden_state  # (B, prefix + patches, D)
        num_prefix = tokens.shape[1] - self.num_patches
        if num_prefix < (1 if self.pooling == "class" else 0):
            raise ValueError(
                f"{type(self.model).__name__} gives {tokens.shape[1]} tokens for {self.num_patches} patches: it has no class "
                "token. Use pooling='patches'."
            )
        return tokens[:, 0] if self.pooling == "class" else tokens[:, num_prefix:].mean(dim=1)
