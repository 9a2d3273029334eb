"""Write the cards of the released variants: `python model_cards/build_cards.py`.

Measured results and training arguments of a variant come from NAME.metrics.json and NAME.training_arguments.json in this
folder. Without them the card says that nothing was measured or recorded.
"""

import json
from pathlib import Path

from pixelrepa_diffusers import get_preset
from pixelrepa_diffusers.hub import build_card
from pixelrepa_diffusers.presets import imagenet_id2label


CARDS = Path(__file__).parent

PUBLISHED = {
    "objective": "pixelrepa",
    "teacher": "facebook/dinov2-base",
    "dataset": "ILSVRC/imagenet-1k",
    "origin": (
        "The weights were published by the authors of PixelREPA for ImageNet-1k and converted with `pixelrepa-convert`. "
        "The paper and its code describe the training; no record of the run is part of this repository."
    ),
    "license": "other",
    "license_name": "original-repository",
    "license_link": "https://github.com/kaist-cvml/PixelREPA",
}
DIGITS = {
    "dataset": "scanned digits of scikit-learn (UCI Optical Recognition of Handwritten Digits)",
    "teacher": "a small DINOv2 trained on the same digits",
    "description": (
        "Demo only: trained by `make demo` on digits enlarged from 8 × 8 to 16 × 16 pixels, to show that the method and its "
        "tools work from end to end."
    ),
    "license": "apache-2.0",
}
RELEASES = {
    "pixelrepa-b-16": ("JiT-B/16", imagenet_id2label(), PUBLISHED),
    "pixelrepa-l-16": ("JiT-L/16", imagenet_id2label(), PUBLISHED),
    "pixelrepa-h-16": ("JiT-H/16", imagenet_id2label(), PUBLISHED),
    "pixelrepa-digits": ("JiT-Digits/4", {digit: str(digit) for digit in range(10)}, DIGITS),
}


def build(name: str) -> str:
    """Build the text of one card."""
    preset_name, id2label, options = RELEASES[name]
    preset = get_preset(preset_name)
    records = {}
    for record in ("metrics", "training_arguments"):
        path = CARDS / f"{name}.{record}.json"
        records[record] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    card = build_card(
        f"your-name/{name}",
        preset.transformer_config(),
        {
            "id2label": {str(label): text for label, text in id2label.items()},
            "guidance_scale": preset.guidance_scale,
            "guidance_interval": preset.guidance_interval,
        },
        metrics=records["metrics"],
        training=records["training_arguments"],
        **options,
    )
    return str(card)


if __name__ == "__main__":
    for name in RELEASES:
        (CARDS / f"{name}.md").write_text(build(name), encoding="utf-8")
