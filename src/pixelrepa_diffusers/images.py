"""Find, read, crop and show images: the same code for training, generation and evaluation."""

from __future__ import annotations

import collections
import contextlib
import glob
import io
import logging
import math
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError


__all__ = [
    "DECODING_ERRORS",
    "IMAGE_SUFFIXES",
    "BadImageError",
    "center_crop_adm",
    "list_classes",
    "list_images",
    "make_grid",
    "open_image",
    "read_image",
    "to_rgb",
    "to_uint8",
]

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# Pillow's decoders raise all of these for damaged bytes.
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

SMALLEST_CELL = 64  # pixels; smaller images are enlarged in a grid


class BadImageError(ValueError):
    """An image that cannot be decoded; the message names it and the reason."""


def list_images(source: str | Path) -> list[Path]:
    """
    List image files in a fixed order.

    Every command follows the same rules: files are recognized by their suffix (`IMAGE_SUFFIXES`, in any case), sub-folders
    are searched, names that start with a dot are skipped, and symbolic links are followed.

    Args:
        source (`str` or `Path`): A folder, or a pattern such as `images/0*.png`.

    Returns:
        `list[Path]`: The files, sorted by path.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If a link is broken or leads back to a folder above it.
    """
    source = Path(source)
    if source.is_dir():
        ignored = collections.Counter()
        paths = [Path(path) for path in _find_images(str(source), ignored)]
        _report_ignored(source, ignored)
    else:
        matches = map(Path, glob.glob(str(source), recursive=True))
        paths = sorted(path for path in matches if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise FileNotFoundError(
            f"No images ({', '.join(IMAGE_SUFFIXES)}) at {source}: give a folder, or a pattern such as 'images/*.png'."
        )
    return paths


def list_classes(folder: str | Path) -> dict[str, list[Path]]:
    """
    List the image files of a folder with one sub-folder per class, by the rules of [`list_images`].

    Returns:
        `dict[str, list[Path]]`: The files of each class. Classes are sorted by name, so that a class's position is its label.

    Raises:
        ValueError: If there are no class folders, one of them has no images, or an image lies outside them.
    """
    folder, classes, ignored = Path(folder), {}, collections.Counter()
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            classes[entry.name] = [Path(path) for path in _find_images(str(entry), ignored)]
            if not classes[entry.name]:
                raise ValueError(
                    f"Class folder {entry} has no images ({', '.join(IMAGE_SUFFIXES)}): fill or remove it."
                )
        elif entry.suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith("."):
            raise ValueError(
                f"{entry} lies outside the class folders of {folder}: move every image into the sub-folder of its class, "
                "or pass --unconditional."
            )
    if not classes:
        raise ValueError(f"{folder} has no sub-folders: it needs one per class, or --unconditional.")
    _report_ignored(folder, ignored)
    return classes


def _find_images(folder: str, ignored: collections.Counter, ancestors: tuple = ()) -> Iterator[str]:
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity in ancestors:
        raise ValueError(f"{folder} links back to a folder above it: remove the link.")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        suffix = Path(entry.name).suffix
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _find_images(entry.path, ignored, (*ancestors, identity))
        elif suffix.lower() not in IMAGE_SUFFIXES:
            ignored[suffix or entry.name] += 1
        elif entry.is_file():
            yield entry.path
        else:
            raise ValueError(f"{entry.path} is a broken link: remove it.")


def _report_ignored(folder: Path, ignored: collections.Counter) -> None:
    if ignored:
        logger.warning("Ignored files in %s without an image suffix: %s", folder, dict(ignored))


@contextlib.contextmanager
def open_image(file: str | Path | BinaryIO, name: str | None = None) -> Iterator[Image.Image]:
    """
    Open an image without decoding it.

    Args:
        file (`str`, `Path` or binary file): The encoded image.
        name (`str`, *optional*, defaults to `file`): Name of the image in an error.

    Raises:
        BadImageError: If the image proves damaged or too large, here or while the `with` block decodes it.
    """
    try:
        with Image.open(file) as image:
            _check_num_pixels(*image.size)
            yield image
    except DECODING_ERRORS as error:
        reason = "unknown image format" if isinstance(error, UnidentifiedImageError) else error
        raise BadImageError(f"Bad image {name or file}: {reason}") from error


def _check_num_pixels(width: float, height: float, what: str = "it has") -> None:
    # Pillow itself only warns between its limit and twice its limit.
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise Image.DecompressionBombError(f"{what} {width:.0f}×{height:.0f} pixels, more than the limit of {limit}")


def read_image(
    image: str | Path | bytes, size: int | None = None, offset: float | None = None, name: str | None = None
) -> torch.Tensor:
    """
    Read an image as 8-bit RGB.

    Args:
        image (`str`, `Path` or `bytes`): A path, a URL that `fsspec` opens, or the encoded bytes.
        size (`int`, *optional*): Side of a square crop in pixels. By default the image keeps its size.
        offset (`float`, *optional*): Position of the square along the longer side, from 0 (start) to 1 (end). By default
            the crop is ADM's centre crop.
        name (`str`, *optional*, defaults to `image`): Name of the image in an error.

    Returns:
        `torch.Tensor`: `torch.uint8` of shape (3, H, W), see [`to_rgb`].

    Raises:
        BadImageError: If the image is damaged, too large, or of an undefined range.
        OSError: If the file cannot be read.
    """
    if isinstance(image, bytes):
        name = name or f"of {len(image)} bytes"
    else:
        name = name or str(image)
        with fsspec.open(image, "rb") if "://" in str(image) else open(image, "rb") as file:
            image = file.read()  # so that an error of the file system is not mistaken for a damaged image
    with open_image(io.BytesIO(image), name) as picture:
        picture = to_rgb(picture)
        if offset is not None:
            short = min(picture.size)
            left, top = round(offset * (picture.width - short)), round(offset * (picture.height - short))
            picture = picture.crop((left, top, left + short, top + short))
        if size is not None:
            picture = center_crop_adm(picture, size)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def to_rgb(picture: Image.Image) -> Image.Image:
    """
    Convert an opened image to upright 8-bit RGB.

    The EXIF orientation is applied, transparency is laid over white, and 16-bit grayscale is scaled by 255/65535. Other
    modes follow Pillow's conversion; colour profiles are ignored. Animations contribute their first frame.

    Raises:
        ValueError: If the image is floating point or 32-bit, which have no defined range.
        One of `DECODING_ERRORS`: If its bytes are damaged.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        # Pillow opens 16-bit grayscale as "I;16…" or, depending on version and format, as 32-bit "I".
        gray = np.asarray(picture)
        if picture.mode == "F" or gray.min() < 0 or gray.max() > 65535:
            raise ValueError("floating point and 32-bit grayscale have no defined range; store it with 8 or 16 bits")
        return Image.fromarray(np.rint(gray * (255 / 65535)).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def center_crop_adm(image: Image.Image, size: int) -> Image.Image:
    """
    Cut the square centre crop of ADM (arXiv 2105.05233), the preprocessing of the published JiT and PixelREPA results.

    The image is halved with a box filter while its short side is at least `2 * size`, resized with a bicubic filter until
    the short side equals `size`, and cropped at its centre. Images smaller than `size` are enlarged by the same filter.

    Args:
        image (`PIL.Image.Image`): An image with 8-bit channels; the result has the same mode.
        size (`int`): Side of the result in pixels.
    """
    scale = size / min(image.size)
    _check_num_pixels(scale * image.width, scale * image.height, "resized for the crop it would have")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_uint8(images: torch.Tensor, value_range: tuple[float, float] = (-1.0, 1.0)) -> torch.Tensor:
    """
    Round floating-point images to the 8 bits of a PNG: `round(255 · clip((x - low) / (high - low), 0, 1))`.

    Args:
        images (`torch.Tensor`): Images of any shape; values outside `value_range` are clipped.
        value_range (`tuple[float, float]`, *optional*, defaults to `(-1.0, 1.0)`): Values of black and white. (-1, 1) is the
            range of the model, (0, 1) that of a pipeline with `output_type="pt"`.

    Returns:
        `torch.Tensor`: `torch.uint8` of the same shape.

    Raises:
        ValueError: If there are NaN or infinite values, which would become arbitrary pixels.
    """
    if not torch.isfinite(images).all():
        raise ValueError("The images contain NaN or infinite values: the model or its numeric type overflowed.")
    low, high = value_range
    return ((images.float() - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)


def make_grid(
    images: Sequence[Image.Image | np.ndarray], labels: Sequence[str] | None = None, columns: int | None = None
) -> Image.Image:
    """
    Draw images of one size in rows, each below its label. Small images are enlarged by an integer factor.

    Args:
        images (`list[PIL.Image.Image]` or `list[np.ndarray]`): Images; arrays are uint8 of shape (H, W, 3).
        labels (`list[str]`, *optional*): One text per image; texts wider than their image are shortened.
        columns (`int`, *optional*): Images per row. By default the grid is about square.

    Returns:
        `PIL.Image.Image`: An RGB image with a white background.
    """
    images = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in images]
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)

    scale = math.ceil(SMALLEST_CELL / min(*images[0].size, SMALLEST_CELL))
    width, height = (scale * side for side in images[0].size)
    gap = max(8, width // 16)
    font = ImageFont.load_default(size=min(24, max(10, width // 8)))
    header = 0 if labels is None else math.ceil(sum(font.getmetrics()))

    grid = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + header + gap) + gap), "white")
    draw = ImageDraw.Draw(grid)
    for index, (image, label) in enumerate(zip(images, labels or [""] * len(images), strict=True)):
        left = gap + (index % columns) * (width + gap)
        top = gap + (index // columns) * (height + header + gap)
        while draw.textlength(label, font=font) > width:
            label = label.removesuffix("…")[:-1] + "…"
        draw.text((left, top), label, fill="black", font=font)
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top + header))
    return grid
