"""Tiny real components that several test files share."""

import json
from pathlib import Path

import torch
from training_runs import TEACHER

from pixelrepa_diffusers import JiTTransformer2DModel
from pixelrepa_diffusers.evaluation import (
    FeatureBank,
    FeatureMoments,
    FeatureStatistics,
    VisionEncoderNetwork,
    extract,
)


REFERENCE = TEACHER.parent
TEACHER_IMAGE_SIZE = 28  # a multiple of its patch


class TinyClassifier(torch.nn.Module):
    """Pooled colours and a random layer on them: features (B, 12) and logits (B, 5), like [`InceptionNetwork`]."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = torch.nn.Linear(12, 5)
        self.eval()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = torch.nn.functional.adaptive_avg_pool2d(images.float() / 32, 2).flatten(1)
        return {"features": features, "logits": self.head(features)}


def perturbed(module: torch.nn.Module) -> torch.nn.Module:
    """Add noise to all parameters, because layers initialized to zero would hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def recorded_config() -> dict:
    """Configuration of the recorded run of the published implementation, under its names."""
    return json.loads((REFERENCE / "config.json").read_text())


def recorded_architecture() -> JiTTransformer2DModel:
    """The transformer of the recorded run, with random weights."""
    config = recorded_config()
    return JiTTransformer2DModel(
        sample_size=config["image"],
        patch_size=config["patch"],
        num_layers=config["depth"],
        num_attention_heads=config["heads"],
        attention_head_dim=config["hidden"] // config["heads"],
        bottleneck_dim=config["bottleneck"],
        in_context_len=config["ctx_len"],
        in_context_start=config["ctx_start"],
        num_classes=config["classes"],
        t_eps=config["t_eps"],
        noise_scale=config["noise_scale"],
    )


def files(folder: Path) -> dict[str, bytes]:
    """Content of all files in a folder, by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def random_images(count: int, seed: int = 1) -> torch.Tensor:
    """uint8 (count, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)


def encoder() -> VisionEncoderNetwork:
    return VisionEncoderNetwork.from_pretrained(TEACHER, image_size=TEACHER_IMAGE_SIZE)


def reference_of(network: torch.nn.Module, images: torch.Tensor) -> FeatureStatistics:
    """Statistics as pixelrepa-prepare-reference --keep_features writes them."""
    features = extract(network, images)["features"]
    moments, bank = FeatureMoments(), FeatureBank()
    moments.update(features)
    bank.update(features)
    return FeatureStatistics.from_moments(moments, bank, network)
