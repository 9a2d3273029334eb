"""Image handling shared by training, generation and evaluation: the ADM crop, 8-bit rounding, labelled grids."""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps


__all__ = ["DECODING_ERRORS", "center_crop_adm", "make_grid", "to_rgb", "to_uint8"]

# What damaged bytes lead Pillow's decoders into (all of these were seen or are raised in its sources).
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    EOFError,
    LookupError,
    ArithmeticError,
    struct.error,
    Image.DecompressionBombError,
)


def to_rgb(picture: Image.Image) -> Image.Image:
    """An opened picture as upright 8-bit RGB, the same for training, reference statistics and evaluation.

    EXIF orientation is applied; transparency is laid over white; 16-bit grayscale is scaled by 255/65535; grayscale, palette,
    CMYK and YCbCr become RGB by Pillow's conversion (colour profiles are ignored); of an animation the first frame is used.

    Raises:
        ValueError: a floating point or 32-bit picture, whose range is not defined.
        One of `DECODING_ERRORS`: damaged bytes, which Pillow reads only now.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        # Pillow opens 16-bit grayscale as "I;16…" and, depending on version and format, as 32-bit "I".
        gray = np.asarray(picture)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError("32-bit grayscale has no defined range; store it with 8 or 16 bits")
        return Image.fromarray(np.rint(gray * (255 / 65535)).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("floating point grayscale has no defined range; store it with 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def center_crop_adm(image: Image.Image, size: int) -> Image.Image:
    """Square centre crop as in ADM (arXiv 2105.05233), the preprocessing behind the published JiT and PixelREPA numbers.

    The image is halved with a box filter while its short side is at least `2 * size`, resized with a bicubic filter
    until the short side equals `size`, and cropped at its centre.

    Args:
        image: any PIL image with 8-bit channels; it is returned in its own mode (convert to RGB before or after).
        size: side of the result in pixels.

    Returns:
        A new `size` × `size` image.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be an integer, a positive number of pixels, got {size!r}.")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_uint8(images: torch.Tensor, value_range: tuple[float, float] = (-1.0, 1.0)) -> torch.Tensor:
    """Round images to the 8 bits that a saved PNG holds: `round(255 · clip((x - low) / (high - low), 0, 1))`.

    Args:
        images: floating point, any shape; values outside `value_range` are clipped, as an image file would.
        value_range: the values of black and white: (-1, 1) for what the model predicts, (0, 1) for what a diffusers
            pipeline returns with `output_type="pt"`.

    Returns:
        `torch.uint8` of the same shape and device.

    Raises:
        TypeError: for integer tensors, which cannot be in such a range.
        ValueError: for NaN or infinite values, which no image file can hold.
    """
    if not images.is_floating_point():
        raise TypeError(f"to_uint8 takes floating point images in {value_range}, got {images.dtype}.")
    if not torch.isfinite(images).all():
        raise ValueError("The images contain NaN or infinite values: the model or its numeric type overflowed.")
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range must be (black, white) with black < white, got {value_range}.")
    return ((images.float() - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)


def make_grid(
    images: Sequence[Image.Image | np.ndarray], labels: Sequence[str] | None = None, columns: int | None = None
) -> Image.Image:
    """Draw images of one size in rows, each with its label above it.

    Args:
        images: PIL images, or uint8 arrays (H, W, 3).
        labels: one text per image; a text wider than its image is shortened with an ellipsis.
        columns: images per row; by default the smallest number that makes the grid no taller than wide.

    Returns:
        An RGB image on a white ground.

    Raises:
        ValueError: when there is no image, the sizes differ, or the number of labels is not the number of images.
    """
    images = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in images]
    if not images:
        raise ValueError("make_grid needs at least one image.")
    if len({image.size for image in images}) > 1:
        raise ValueError(f"All images of a grid must have one size, got {sorted({image.size for image in images})}.")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"Got {len(labels)} labels for {len(images)} images: give one label per image or none.")
    if columns is None:
        columns = math.ceil(math.sqrt(len(images)))
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
        raise ValueError(f"columns must be an integer of at least 1, got {columns!r}.")
    columns = min(columns, len(images))

    width, height = images[0].size
    gap = max(1, width // 32)
    font = ImageFont.load_default(size=min(24, max(8, width // 8)))
    header = 0 if labels is None else math.ceil(sum(font.getmetrics()))
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + header + gap) + gap), "white")
    draw = ImageDraw.Draw(grid)
    for index, image in enumerate(images):
        left = gap + (index % columns) * (width + gap)
        top = gap + (index // columns) * (height + header + gap)
        grid.paste(image, (left, top + header))
        if labels is not None:
            text = str(labels[index])
            while draw.textlength(text, font=font) > width and text != "…":
                text = text.removesuffix("…")[:-1] + "…"
            draw.text((left, top), text, fill="black", font=font)
    return grid


def list_images(folder: str | Path) -> list[Path]:
    """Every image file below a folder, or that fits a pattern such as "images/0*.png", sorted.

    Raises:
        FileNotFoundError: there is none.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    path = Path(folder)
    root, pattern = (path, "**/*") if path.is_dir() else (path.parent, path.name)
    paths = sorted(file for file in root.glob(pattern) if file.suffix.lower() in suffixes and file.is_file())
    if not paths:
        raise FileNotFoundError(
            f"No images at {folder}: give a folder of images, or a pattern such as 'images/*.png'."
        )
    return paths


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """An image file, opened but not decoded. What is wrong with it, then or later, becomes a ValueError that names it."""
    try:
        with Image.open(path) as image:
            # Pillow itself only warns between its limit and twice its limit.
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"its {image.width}×{image.height} pixels are more than {Image.MAX_IMAGE_PIXELS}")
            yield image
    except DECODING_ERRORS as error:
        raise ValueError(f"Bad image {path}: {error}. Replace it, or leave it out.") from error


def read_image(path: Path, size: int | None = None) -> torch.Tensor:
    """An image file as torch.uint8 (3, H, W), made RGB by [`to_rgb`]; with `size`, its ADM centre crop of that many pixels.

    Raises:
        ValueError: a damaged or huge file, by name.
    """
    with open_image(path) as image:
        image = to_rgb(image)
    if size is not None:
        image = center_crop_adm(image, size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
