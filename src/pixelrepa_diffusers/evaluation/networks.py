"""
Feature networks: modules in eval mode that resize and normalize uint8 images (B, 3, H, W) themselves.

They return features (B, D), or a dictionary with `features` and, for a classifier, `logits` (B, C).
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

from ..images import to_rgb
from ..teacher import read_normalization


def stack_images(images: torch.Tensor | np.ndarray | Sequence[Image.Image | np.ndarray]) -> torch.Tensor:
    """
    Stack images of one size into a `torch.uint8` batch (B, 3, H, W): such a batch itself, a uint8 array (B, H, W, 3), or a
    list of PIL images and uint8 arrays (H, W, 3).
    """
    if not isinstance(images, torch.Tensor):
        arrays = [np.asarray(to_rgb(image) if isinstance(image, Image.Image) else image) for image in images]
        images = torch.from_numpy(np.stack(arrays)).movedim(-1, 1)
    if images.dtype != torch.uint8 or images.shape[1] != 3:
        raise ValueError(
            f"Metrics take 8-bit RGB images, got {images.dtype} {tuple(images.shape)}. Round floating point images with "
            "pixelrepa_diffusers.images.to_uint8."
        )
    return images


def open_network(
    name: str | os.PathLike,
    inception_weights: str | os.PathLike | None = None,
    image_size: int = 224,
    pooling: str = "class",
) -> nn.Module:
    """[`InceptionNetwork`] for the name "inception", else the [`VisionEncoderNetwork`] of a folder or Hub id."""
    if name == "inception":
        return InceptionNetwork(inception_weights)
    return VisionEncoderNetwork.from_pretrained(name, image_size, pooling)


@torch.inference_mode()
def extract(network: nn.Module, images: torch.Tensor | np.ndarray | Sequence) -> dict[str, torch.Tensor]:
    """
    Run a feature network on images, see [`stack_images`], on the device of the network.

    Returns:
        `dict[str, torch.Tensor]`: `features` (B, D) and, for a classifier, `logits` (B, C).
    """
    images = stack_images(images)
    device = next((parameter.device for parameter in network.parameters()), images.device)
    outputs = network(images.to(device))
    return {"features": outputs} if isinstance(outputs, torch.Tensor) else outputs


def network_name(network: nn.Module) -> str:
    """The `description` of a feature network if it has one, else its class."""
    return getattr(network, "description", type(network).__qualname__)


def network_sha256(network: nn.Module) -> str:
    """Hash of the settings and weights of a feature network; features of equal hashes can be compared."""
    digest = hashlib.sha256(getattr(network, "settings", type(network).__qualname__).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class InceptionNetwork(nn.Module):
    """
    The Inception network of FID and Inception Score: torch-fidelity's port of the 2015 TensorFlow graph.

    Features are the 2048 pooled activations; logits are the 1008 outputs without bias.

    Args:
        weights (`str` or `os.PathLike`, *optional*):
            torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`; downloaded by default.
    """

    settings = "inception-v3-compat 2048"
    description = f"torch-fidelity {settings}"

    def __init__(self, weights: str | os.PathLike | None = None):
        super().__init__()
        if weights is not None:
            # torch-fidelity unpickles without restrictions, so first make sure that the file holds only tensors.
            try:
                torch.load(weights, map_location="meta", weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
                raise ValueError(f"{weights} is not a file of Inception weights: {error}") from error
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch build
            raise ImportError(
                f'The Inception network cannot be imported ({error}). Run: pip install "pixelrepa-diffusers[eval]", and '
                "install the torchvision that matches torch (same release, both for CUDA or both for the CPU)."
            ) from error
        self.model = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
        )
        self.eval()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features, logits = self.model(images)
        return {"features": features, "logits": logits}


class VisionEncoderNetwork(nn.Module):
    """
    A vision encoder of transformers as feature network: DINOv2, SigLIP, the vision tower of CLIP, a teacher's folder, …

    The defaults of [`~VisionEncoderNetwork.from_pretrained`] are FD-DINOv2 (https://huggingface.co/papers/2306.04675).

    Args:
        model (`PreTrainedModel`): Maps pixel values to `last_hidden_state` (B, tokens, D).
        image_mean (`Sequence[float]`): Mean of each channel, for images in [0, 1].
        image_std (`Sequence[float]`): Standard deviation of each channel.
        image_size (`int`, *optional*, defaults to 224): Side that images are resized to (antialiased bicubic).
        pooling (`str`, *optional*, defaults to `"class"`): `"class"` token or mean of the `"patches"`.
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
        patch_size = model.config.patch_size
        if image_size % patch_size:
            raise ValueError(
                f"The image size must be a multiple of the model's patch of {patch_size}, got {image_size}."
            )
        self.model, self.image_size, self.pooling = model, image_size, pooling
        self.num_patches = (image_size // patch_size) ** 2
        for name, values in (("mean", image_mean), ("std", image_std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
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
    ) -> VisionEncoderNetwork:
        """Load the encoder and its normalization from a folder or the Hub."""
        # Without the argument, transformers asks on the terminal whether to run the code of a repository.
        model = AutoModel.from_pretrained(name_or_path, trust_remote_code=False)
        model = getattr(model, "vision_model", model)  # CLIP and SigLIP
        return cls(model, *read_normalization(name_or_path), image_size, pooling)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        size = (self.image_size, self.image_size)
        pixels = F.interpolate(images.float() / 255, size, mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (pixels - self.mean) / self.std
        tokens = self.model(pixels.to(self.model.dtype)).last_hidden_state  # (B, prefix + patches, D)
        num_prefix = tokens.shape[1] - self.num_patches
        if self.pooling == "patches":
            return tokens[:, num_prefix:].mean(dim=1)
        if num_prefix == 0:
            raise ValueError(f"{type(self.model).__name__} has no class token: use pooling 'patches'.")
        return tokens[:, 0]
