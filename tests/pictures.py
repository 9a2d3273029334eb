"""Images for the tests of reading and of data."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def make_image(number: int = 0, width: int = 20, height: int = 12) -> Image.Image:
    """Smooth, distinct, and changed by a flip."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 12 + number, y * 20 + 2 * number, x * y + 5 * number], axis=-1) % 256
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_photos(folder: Path) -> Path:
    """22 images of two classes and many sizes, some nested, PNG and JPEG."""
    for number in range(22):
        path = folder / ("cat" if number % 2 else "ant/sub") / f"{number:02d}{'.png' if number % 3 else '.JPG'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image(number, 20 + number, 12 + number % 5).save(path)
    return folder
