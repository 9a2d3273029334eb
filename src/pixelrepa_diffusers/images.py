"""Find, read, crop and show images: the same code for training, generation and evaluation."""

from __future__ import annotations

import contextlib
import glob
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError


IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SMALLEST_CELL = 64  # pixels; smaller images are enlarged in a grid


class BadImageError(ValueError):
    """An image that cannot be decoded; the message names it and the reason."""


def list_images(source: str | Path) -> list[Path]:
    """
    List image files, recognized by their suffix (`IMAGE_SUFFIXES`, in any case), sorted by path.

    Sub-folders are searched, links are followed, and names that start with a dot are skipped.

    Args:
        source (`str` or `Path`): A folder, or a pattern such as `images/0*.png`.

    Raises:
        FileNotFoundError: If there are none.
    """
    if Path(source).is_dir():
        paths = list(_walk(Path(source)))
    else:
        matches = map(Path, glob.glob(str(source), recursive=True))
        paths = sorted(path for path in matches if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(
            f"No images ({', '.join(IMAGE_SUFFIXES)}) at {source}: give a folder, or a pattern such as 'images/*.png'."
        )
    return paths


def _walk(folder: Path, parents: tuple[Path, ...] = ()) -> Iterator[Path]:
    if folder.resolve() in parents:  # a link to a folder above it
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES:
            yield path
        elif path.is_dir():
            yield from _walk(path, (*parents, folder.resolve()))


def list_classes(folder: str | Path) -> dict[str, list[Path]]:
    """
    List the image files of a folder with one sub-folder per class, by the rules of [`list_images`].

    Returns:
        `dict[str, list[Path]]`: The files of each class. Classes are sorted by name, so that a class's position is its label.

    Raises:
        ValueError: If there are no class folders, or an image lies outside them.
        FileNotFoundError: If the folder does not exist, or a class has no images.
    """
    entries = [path for path in sorted(Path(folder).iterdir()) if not path.name.startswith(".")]
    folders = [path for path in entries if path.is_dir()]
    loose = [path.name for path in entries if path.suffix.lower() in IMAGE_SUFFIXES]
    if loose or not folders:
        raise ValueError(
            f"{folder} needs a sub-folder of images for each class, but holds {loose[0] if loose else 'no sub-folders'}: "
            "move every image into the sub-folder of its class, or pass --unconditional."
        )
    return {path.name: list_images(path) for path in folders}


@contextlib.contextmanager
def open_image(file: str | Path | BinaryIO, name: str | None = None) -> Iterator[Image.Image]:
    """
    Open an image without decoding it; `name` stands for the file in an error.

    Raises:
        BadImageError: If the image proves damaged or too large, here or while the `with` block decodes it.
    """
    try:
        with Image.open(file) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise errors of many kinds for damaged bytes
        reason = "unknown image format" if isinstance(error, UnidentifiedImageError) else error
        raise BadImageError(f"Bad image {name or file}: {reason}") from error


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
        BadImageError: If the image is damaged, of an undefined range, or too large for Pillow.
    """
    if isinstance(image, bytes):
        name = name or f"of {len(image)} bytes"
    else:
        name = name or str(image)
        with fsspec.open(image, "rb") if "://" in str(image) else open(image, "rb") as file:
            image = file.read()  # errors of the file system do not mean a damaged image
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
    modes follow Pillow's conversion; colour profiles are ignored. Animations contribute their first frame. Floating-point
    and 32-bit images, which have no defined range, are a `ValueError`.
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
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_uint8(images: torch.Tensor, value_range: tuple[float, float] = (-1.0, 1.0)) -> torch.Tensor:
    """
    Round floating-point images to the 8 bits of a PNG: `round(255 · clip((x - low) / (high - low), 0, 1))`.

    `value_range` are the values of black and white: (-1, 1) for the model, (0, 1) for a pipeline with `output_type="pt"`.

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
    Draw images of one size, PIL or uint8 (H, W, 3), in rows, each below its label. Small images are enlarged by an integer
    factor, labels wider than their image are shortened. By default the grid is about square.
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
