"""Finding, reading, cropping and showing images."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, make_image
from PIL import Image

from pixelrepa_diffusers.images import (
    IMAGE_SUFFIXES,
    BadImageError,
    center_crop_adm,
    list_classes,
    list_images,
    make_grid,
    read_image,
    to_uint8,
)


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ------------------------------------------------------------------------------------------------------------ listing


def touch(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [folder / name for name in names]


def test_images_are_listed_in_path_order_without_hidden_and_other_files(tmp_path):
    paths = touch(tmp_path, "a/sub/1.gif", "a/z.jpg", "b/10.tiff", "b/2.PNG")
    touch(tmp_path, "a/list.txt", "a/._1.png", ".cache/1.png")
    assert list_images(tmp_path) == sorted(paths) == paths
    assert list_images(f"{tmp_path}/b/*") == paths[2:]
    assert list_classes(tmp_path) == {"a": paths[:2], "b": paths[2:]}
    (tmp_path / "c").symlink_to(tmp_path / "b")
    assert list(list_classes(tmp_path)) == ["a", "b", "c"] and len(list_images(tmp_path)) == 6


def test_every_listed_format_can_be_read(tmp_path):
    for suffix in IMAGE_SUFFIXES:
        make_image().save(tmp_path / f"image{suffix}")
    assert [read_image(path).shape for path in list_images(tmp_path)] == [(3, 12, 20)] * len(IMAGE_SUFFIXES)


@pytest.mark.parametrize(
    "names, error, message",
    [
        ([], FileNotFoundError, "nowhere"),
        (["nowhere/.hidden/1.png"], ValueError, "holds no sub-folders"),
        (["nowhere/a/1.png", "nowhere/0.png"], ValueError, "holds 0.png: .*--unconditional"),
        (["nowhere/a/1.png", "nowhere/bat/1.txt"], FileNotFoundError, "No images .* at .*bat"),
    ],
)
def test_folders_without_usable_classes_are_errors(tmp_path, names, error, message):
    touch(tmp_path, *names)
    with pytest.raises(error, match=message):
        list_classes(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="No images"):
        list_images(f"{tmp_path}/*.webp")


# ------------------------------------------------------------------------------------------------------------ reading


GRAY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOURS = np.asarray(make_image(9, 8, 8))
PALETTE = Image.fromarray(COLOURS).quantize(16)


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(Image.fromarray(GRAY))
    return image


def over_white(rgb: np.ndarray) -> np.ndarray:
    alpha = GRAY[..., None] / 255
    return rgb * alpha + 255 * (1 - alpha)


def gray_rgb(gray: np.ndarray = GRAY) -> np.ndarray:
    return np.stack([gray] * 3, axis=-1)


MODES = {
    "black and white": (encoded(Image.fromarray(GRAY > 99)), gray_rgb((GRAY > 99) * 255)),
    "grayscale with alpha": (encoded(with_alpha(Image.fromarray(255 - GRAY))), over_white(gray_rgb(255 - GRAY))),
    "16 bits": (encoded(Image.fromarray(GRAY.astype(np.uint16) * 257)), gray_rgb()),
    "16 bits, TIFF": (encoded(Image.fromarray(GRAY.astype(np.uint16) * 257), "TIFF"), gray_rgb()),
    "32 bits in the range of 16": (encoded(Image.fromarray(GRAY.astype(np.int32) * 257), "TIFF"), gray_rgb()),
    "palette with a transparent entry": (
        encoded(PALETTE, transparency=3),
        np.where(np.asarray(PALETTE)[..., None] == 3, 255, np.asarray(PALETTE.convert("RGB"))),
    ),
    "transparent": (encoded(with_alpha(Image.fromarray(COLOURS))), over_white(COLOURS)),
    "transparent colour": (
        encoded(Image.fromarray(COLOURS), transparency=tuple(COLOURS[2, 3].tolist())),
        np.where((np.abs(COLOURS - COLOURS[2, 3]) > 0).any(-1, keepdims=True), COLOURS, 255),
    ),
    "CMYK": (encoded(Image.new("CMYK", (8, 8), (255, 0, 255, 0)), "JPEG"), np.tile([0, 255, 0], (8, 8, 1))),
    "animation": (
        encoded(Image.fromarray(COLOURS), save_all=True, append_images=[Image.new("RGB", (8, 8))]),
        COLOURS,
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_as_documented(mode):
    stored, expected = MODES[mode]
    pixels = read_image(stored, name=mode)
    assert pixels.dtype == torch.uint8
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(float) - expected).max() <= 1  # rounding of the compositing


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_exif_orientation_is_applied():
    upright = make_image(0, 8, 6)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    assert torch.equal(read_image(encoded(turned, exif=orientation(6))), read_image(encoded(upright)))


def damaged_exif(position: int, value: int) -> bytes:
    """A JPEG with one wrong byte in its EXIF block."""
    exif = orientation(6)
    exif[0x011A] = 72.0
    damaged = bytearray(encoded(make_image(), "JPEG", exif=exif))
    damaged[damaged.find(b"Exif") + position] = value
    return bytes(damaged)


BAD_IMAGES = {
    "EXIF that raises TypeError in Pillow": damaged_exif(31, 1),
    "EXIF that raises struct.error in Pillow": damaged_exif(29, 0),
    "no image": b"hello",
    "empty": b"",
    "truncated PNG": encoded(make_image())[:-40],
    "truncated JPEG": encoded(make_image(0, 64, 64), "JPEG")[:-200],
    "truncated WebP": encoded(make_image(), "WEBP")[:-40],
    "floating point": encoded(Image.fromarray(GRAY.astype(np.float32)), "TIFF"),
    "32 bits": encoded(Image.fromarray(GRAY.astype(np.int32) * 2**20), "TIFF"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_are_named(tmp_path, kind):
    (tmp_path / "1.png").write_bytes(BAD_IMAGES[kind])
    with pytest.raises(BadImageError, match=r"Bad image .*1.png: .+"):
        read_image(tmp_path / "1.png")
    with pytest.raises(FileNotFoundError, match=r"gone.png"):  # an unreadable file is not a bad image
        read_image(tmp_path / "gone.png")


@pytest.mark.filterwarnings("ignore")
def test_random_damage_gives_an_image_or_a_bad_image_error():
    random = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        options = {} if format in ("BMP", "GIF") else {"exif": orientation(6)}
        whole = encoded(make_image(0, 24, 24), format, **options)
        for _ in range(60):
            damaged = bytearray(whole[: random.integers(1, len(whole) + 1)])
            for position in random.integers(0, len(damaged), size=random.integers(0, 6)):
                damaged[position] = random.integers(256)
            with contextlib.suppress(BadImageError):
                assert len(read_image(bytes(damaged), name="damaged")) == 3


# ----------------------------------------------------------------------------------------------------------- cropping


@pytest.mark.parametrize("width, height", [(65, 64), (40, 300), (31, 17)])
def test_adm_crop_of_any_image_is_a_square_of_the_given_size(width, height):
    assert center_crop_adm(random_image(width, height), 32).size == (32, 32)


def test_adm_crop_halves_with_a_box_filter_before_the_bicubic_resize():
    # At four times the size the bicubic resize is the identity, so only means of 2 × 2 pixels remain. Pillow rounds to 8
    # bits after the horizontal and the vertical pass of each halving: at most half a level up, four times.
    image = random_image(64, 64)
    expected = np.asarray(image, dtype=np.float64).reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(np.asarray(center_crop_adm(image, 16)) - expected).max() <= 2


def test_adm_crop_resizes_to_the_short_side_and_cuts_the_centre():
    image = random_image(51, 32)
    assert np.array_equal(center_crop_adm(image, 32), np.asarray(image)[:, 9:41])
    expected = make_image(0, 5, 3).resize((13, 8), Image.Resampling.BICUBIC).crop((2, 0, 10, 8))
    assert np.array_equal(center_crop_adm(make_image(0, 5, 3), 8), expected)


def test_offset_moves_the_full_square_along_the_longer_side():
    image = encoded(make_image())
    for offset, left in ((0.0, 0), (0.5, 4), (1.0, 8)):
        assert torch.equal(read_image(image, size=12, offset=offset), read_image(image)[:, :, left : left + 12])


# ----------------------------------------------------------------------------------------------------- 8 bits and grids


def test_rounding_to_8_bits_is_to_the_nearest_level_and_clips():
    levels = torch.arange(256, dtype=torch.uint8)
    for low, high in ((-1.0, 1.0), (0.0, 1.0)):
        assert torch.equal(to_uint8(levels.float() / 255 * (high - low) + low, (low, high)), levels)
    images = torch.tensor([-3.0, -1.0, 2 * 0.4 / 255 - 1, 2 * 0.6 / 255 - 1, 1.0, 1.5])
    assert to_uint8(images).tolist() == [0, 0, 0, 1, 255, 255]
    with pytest.raises(ValueError, match="NaN or infinite"):
        to_uint8(torch.tensor([0.0, float("nan")]))


@pytest.mark.parametrize("labels", [None, ["a", "a label far too long for its image", "", "d", "e"]])
@pytest.mark.parametrize("size, scale", [((96, 64), 1), ((24, 16), 4)])
def test_grid_shows_every_image_enlarged_if_small(labels, size, scale):
    images = [random_image(*size, seed) for seed in range(5)]
    grid = np.asarray(make_grid(images, labels, columns=2))
    for image in images:
        expected = np.asarray(image).repeat(scale, 0).repeat(scale, 1)
        height, width, _ = expected.shape
        corners = (grid[:-height, :-width] == expected[0, 0]).all(-1)
        assert any(np.array_equal(grid[y : y + height, x : x + width], expected) for y, x in np.argwhere(corners))


def test_captions_are_above_their_images_and_do_not_touch():
    grid = np.asarray(make_grid([Image.new("RGB", (16, 16), "white")] * 2, ["a caption wider than its image"] * 2))
    assert grid.min() < 64 and (grid[-64:] == 255).all()
    blank = (grid == 255).all(axis=(0, 2))
    assert blank[8 + 64 : 8 + 64 + 8].all()
