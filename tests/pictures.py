"""Images for the tests of reading and of data."""

import io
import itertools
import tarfile
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


def write_shards(folder: Path, images: list[bytes], sizes: tuple[int, ...], num_classes: int = 5) -> Path:
    """WebDataset shards of the given numbers of PNG images, labelled 0 … num_classes - 1 in turn."""
    folder.mkdir()
    numbers = iter(range(len(images)))
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in itertools.islice(numbers, size):
                for suffix, content in (("png", images[number]), ("cls", str(number % num_classes).encode())):
                    member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder
