"""The papers' variants, one frozen record each, and the demo's sizes.

Sources: JiT (arXiv 2511.13720), PixelREPA (arXiv 2603.14366) and their published code.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One architecture at one image size. The first group are `JiTTransformer2DModel` arguments, the second the guidance
    the papers evaluate with: a scale for PixelREPA, a scale for plain JiT, and the interval of t they act in."""

    sample_size: int
    patch_size: int
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    bottleneck_dim: int
    in_context_len: int
    in_context_start: int
    num_classes: int
    dropout: float
    noise_scale: float
    in_channels: int = 3

    guidance_scale: float = 1.0
    guidance_scale_jit: float = 1.0
    guidance_interval: tuple[float, float] = (0.1, 1.0)

    def transformer_config(self) -> dict[str, int | float]:
        """The keyword arguments of [`JiTTransformer2DModel`] for this variant."""
        return {name: value for name, value in vars(self).items() if not name.startswith("guidance")}


_ARCHITECTURES = {
    "B": {
        "num_layers": 12,
        "num_attention_heads": 12,
        "attention_head_dim": 64,
        "bottleneck_dim": 128,
        "in_context_start": 4,
        "dropout": 0.0,
        "guidance_scale": 3.1,
        "guidance_scale_jit": 3.0,
    },
    "L": {
        "num_layers": 24,
        "num_attention_heads": 16,
        "attention_head_dim": 64,
        "bottleneck_dim": 128,
        "in_context_start": 8,
        "dropout": 0.0,
        "guidance_scale": 2.8,
        "guidance_scale_jit": 2.4,
    },
    "H": {
        "num_layers": 32,
        "num_attention_heads": 16,
        "attention_head_dim": 80,
        "bottleneck_dim": 256,
        "in_context_start": 10,
        "dropout": 0.2,
        "guidance_scale": 2.4,
        "guidance_scale_jit": 2.2,
    },
}

PRESETS: dict[str, Preset] = {
    f"JiT-{size}/{patch_size}": Preset(
        sample_size=sample_size,
        patch_size=patch_size,
        in_context_len=32,
        num_classes=1000,
        noise_scale=noise_scale,
        **architecture,
    )
    for patch_size, sample_size, noise_scale in ((16, 256, 1.0), (32, 512, 2.0))
    for size, architecture in _ARCHITECTURES.items()
}
# Not from the papers: a few minutes of two CPU cores on scanned 8x8 digits enlarged to 16x16.
PRESETS["JiT-Digits/4"] = Preset(
    sample_size=16,
    patch_size=4,
    num_layers=6,
    num_attention_heads=4,
    attention_head_dim=32,
    bottleneck_dim=32,
    in_context_len=4,
    in_context_start=2,
    num_classes=10,
    dropout=0.0,
    noise_scale=1.0,
    guidance_scale=2.0,
    guidance_scale_jit=2.0,
)


def get_preset(name: str) -> Preset:
    """The record called `name`, such as "JiT-B/16"; a `KeyError` lists the known names."""
    if not isinstance(name, str) or name not in PRESETS:
        raise KeyError(f"There is no preset {name!r}. Known presets: {', '.join(PRESETS)}.")
    return PRESETS[name]


def matching_presets(config: Mapping[str, Any]) -> dict[str, Preset]:
    """The presets, by name, that agree with every [`JiTTransformer2DModel`] argument that `config` names."""
    return {
        name: preset
        for name, preset in PRESETS.items()
        if all(config.get(field, value) == value for field, value in preset.transformer_config().items())
    }


def imagenet_id2label() -> dict[int, str]:
    """Class names of ImageNet-1k: `{207: "golden retriever", …}`. A name lists its synonyms, separated by commas."""
    path = Path(__file__).with_name("imagenet_classes.json")
    return dict(enumerate(json.loads(path.read_text(encoding="utf-8"))["names"]))
