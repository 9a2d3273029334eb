"""Model variants of the papers and of the digits demo, and the class names of ImageNet.

Sources: JiT (arXiv 2511.13720), PixelREPA (arXiv 2603.14366) and their published code.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Preset:
    """
    Architecture of a variant, as arguments of [`JiTTransformer2DModel`], and the papers' guidance: the scale with
    PixelREPA, the scale of plain JiT, and the interval of t.
    """

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

    def transformer_config(self) -> dict[str, Any]:
        """Return the keyword arguments of [`JiTTransformer2DModel`]."""
        return {name: value for name, value in vars(self).items() if not name.startswith("guidance")}


# Layers, heads, head width, bottleneck, block of the class tokens, dropout, guidance scale with PixelREPA and of plain JiT.
_SIZES = {
    "B": (12, 12, 64, 128, 4, 0.0, 3.1, 3.0),
    "L": (24, 16, 64, 128, 8, 0.0, 2.8, 2.4),
    "H": (32, 16, 80, 256, 10, 0.2, 2.4, 2.2),
}

PRESETS: dict[str, Preset] = {
    f"JiT-{name}/{patch_size}": Preset(
        sample_size=sample_size,
        patch_size=patch_size,
        num_layers=num_layers,
        num_attention_heads=num_heads,
        attention_head_dim=head_dim,
        bottleneck_dim=bottleneck_dim,
        in_context_len=32,
        in_context_start=start,
        num_classes=1000,
        dropout=dropout,
        noise_scale=noise_scale,
        guidance_scale=scale,
        guidance_scale_jit=scale_jit,
    )
    for patch_size, sample_size, noise_scale in ((16, 256, 1.0), (32, 512, 2.0))
    for name, (num_layers, num_heads, head_dim, bottleneck_dim, start, dropout, scale, scale_jit) in _SIZES.items()
}
# Demo only: trains in minutes on two CPU cores, on scanned 8x8 digits enlarged to 16x16.
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
    """
    Return a preset by name, such as `"JiT-B/16"`.

    Raises:
        `ValueError`: If there is no such preset; the message lists the known names.
    """
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}. Known presets: {', '.join(PRESETS)}.")
    return PRESETS[name]


def matching_presets(config: Mapping[str, Any]) -> dict[str, Preset]:
    """Return the presets, by name, that agree with every [`JiTTransformer2DModel`] argument in `config`."""
    return {
        name: preset
        for name, preset in PRESETS.items()
        if all(config.get(field, value) == value for field, value in preset.transformer_config().items())
    }


def imagenet_id2label() -> dict[int, str]:
    """
    Return the ImageNet-1k class names by class id: `{207: "golden retriever", ...}`.

    A name lists its synonyms separated by commas. imagenet_classes.json states the source of the names.
    """
    path = Path(__file__).with_name("imagenet_classes.json")
    return dict(enumerate(json.loads(path.read_text(encoding="utf-8"))["names"]))
