"""Finding, reading, cropping and showing images."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
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


def smooth_image(width: int = 20, height: int = 12, number: int = 0) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 12 + number, y * 20 + 2 * number, x * y + 5 * number], axis=-1) % 256
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------ listing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/2.PNG", "b/10.tiff", "a/sub/1.gif", "a/z.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_images_are_listed_in_path_order(folder):
    names = ["a/sub/1.gif", "a/z.jpg", "b/10.tiff", "b/2.PNG"]
    assert list_images(folder) == sorted(list_images(folder)) == [folder / name for name in names]
    assert list_images(f"{folder}/b/*") == [folder / name for name in names[2:]]
    assert list_classes(folder) == {
        "a": [folder / name for name in names[:2]],
        "b": [folder / name for name in names[2:]],
    }


def test_every_listed_format_can_be_read(tmp_path):
    for suffix in IMAGE_SUFFIXES:
        smooth_image().save(tmp_path / f"image{suffix}")
    assert len(list_images(tmp_path)) == len(IMAGE_SUFFIXES)
    for path in list_images(tmp_path):
        assert read_image(path).shape == (3, 12, 20)


def test_hidden_and_other_files_are_skipped_and_the_latter_counted(folder, caplog):
    expected = list_images(folder)
    for name in ("a/list.txt", "a/more.txt", "a/._1.png", ".cache/1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert list_images(folder) == expected and list(list_classes(folder)) == ["a", "b"]
    assert "'.txt': 2" in caplog.text


def test_links_are_followed_but_loops_and_broken_links_are_errors(folder):
    (folder / "c").symlink_to(folder / "b")
    assert list(list_classes(folder)) == ["a", "b", "c"] and len(list_images(folder)) == 6
    (folder / "a/up").symlink_to(folder / "a")
    with pytest.raises(ValueError, match="links back"):
        list_images(folder)
    (folder / "a/up").unlink()
    (folder / "a/gone.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(ValueError, match=r"gone.png is a broken link"):
        list_classes(folder)


def test_folders_without_usable_images_are_errors(folder):
    for source in (folder / "nowhere", f"{folder}/*.png"):
        with pytest.raises(FileNotFoundError, match="No images"):
            list_images(source)
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match="no sub-folders"):
        list_classes(folder / "empty")
    (folder / "empty").rmdir()
    (folder / "bat").mkdir()
    with pytest.raises(ValueError, match=r"Class folder .*bat has no images"):
        list_classes(folder)
    (folder / "0.png").touch()
    with pytest.raises(ValueError, match=r"0.png lies outside the class folders"):
        list_classes(folder)


# ------------------------------------------------------------------------------------------------------------ reading


GRAY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOURS = np.asarray(smooth_image(8, 8, number=9))


def palette() -> Image.Image:
    return Image.fromarray(COLOURS).quantize(16)


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
        encoded(palette(), transparency=3),
        np.where(np.asarray(palette())[..., None] == 3, 255, np.asarray(palette().convert("RGB"))),
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


def test_exif_orientation_is_applied():
    upright, exif = smooth_image(8, 6), Image.Exif()
    exif[0x0112] = 6
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    assert torch.equal(read_image(encoded(turned, exif=exif)), read_image(encoded(upright)))


def damaged_exif(position: int, value: int) -> bytes:
    """A JPEG with one wrong byte in its EXIF block."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    damaged = bytearray(encoded(smooth_image(), "JPEG", exif=exif))
    damaged[damaged.find(b"Exif") + position] = value
    return bytes(damaged)


BAD_IMAGES = {
    "EXIF that raises TypeError in Pillow": damaged_exif(31, 1),
    "EXIF that raises struct.error in Pillow": damaged_exif(29, 0),
    "no image": b"hello",
    "empty": b"",
    "truncated PNG": encoded(smooth_image())[:-40],
    "truncated JPEG": encoded(smooth_image(64, 64), "JPEG")[:-200],
    "truncated WebP": encoded(smooth_image(), "WEBP")[:-40],
    "floating point": encoded(Image.fromarray(GRAY.astype(np.float32)), "TIFF"),
    "32 bits": encoded(Image.fromarray(GRAY.astype(np.int32) * 2**20), "TIFF"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_are_named(tmp_path, kind):
    (tmp_path / "1.png").write_bytes(BAD_IMAGES[kind])
    with pytest.raises(BadImageError, match=r"Bad image .*1.png: .+"):
        read_image(tmp_path / "1.png")


@pytest.mark.filterwarnings("ignore")
def test_random_damage_gives_an_image_or_a_bad_image_error():
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        whole = encoded(smooth_image(24, 24), format, **({} if format in ("BMP", "GIF") else {"exif": exif}))
        for _ in range(60):
            damaged = bytearray(whole[: random.integers(1, len(whole) + 1)])
            for position in random.integers(0, len(damaged), size=random.integers(0, 6)):
                damaged[position] = random.integers(256)
            with contextlib.suppress(BadImageError):
                assert len(read_image(bytes(damaged), name="damaged")) == 3


def test_too_many_pixels_are_a_bad_image_before_and_after_resizing(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert read_image(encoded(smooth_image(25, 40))).shape == (3, 40, 25)
    for size in ((25, 41), (60, 60)):
        with pytest.raises(BadImageError, match="limit of"):
            read_image(encoded(smooth_image(*size)))
    with pytest.raises(BadImageError, match=r"resized .* 160×8 pixels"):
        read_image(encoded(smooth_image(40, 2)), size=8)


def test_an_unreadable_file_is_not_a_bad_image(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.png"):
        read_image(tmp_path / "gone.png")


# ----------------------------------------------------------------------------------------------------------- cropping


@pytest.mark.parametrize("width, height", [(64, 64), (65, 64), (200, 131), (40, 300), (31, 17), (127, 128)])
def test_adm_crop_of_any_image_is_a_square_of_the_given_size(width, height):
    assert center_crop_adm(random_image(width, height), 32).size == (32, 32)


def test_adm_crop_only_crops_when_the_short_side_fits():
    image = random_image(51, 32)
    assert np.array_equal(center_crop_adm(image, 32), np.asarray(image)[:, 9:41])


def test_adm_crop_halves_with_a_box_filter_before_the_bicubic_resize():
    # At four times the size the bicubic resize is the identity, so only means of 2 × 2 pixels remain. Pillow rounds to 8
    # bits after the horizontal and the vertical pass of each halving: at most half a level up, four times.
    image = random_image(64, 64)
    expected = np.asarray(image, dtype=np.float64).reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(np.asarray(center_crop_adm(image, 16)) - expected).max() <= 2


def test_adm_crop_enlarges_small_images():
    expected = smooth_image(5, 3).resize((13, 8), Image.Resampling.BICUBIC).crop((2, 0, 10, 8))
    assert np.array_equal(center_crop_adm(smooth_image(5, 3), 8), expected)


def test_offset_moves_the_full_square_along_the_longer_side():
    pixels = read_image(encoded(smooth_image(20, 12)))
    for offset, left in ((0.0, 0), (0.5, 4), (1.0, 8)):
        crop = read_image(encoded(smooth_image(20, 12)), size=12, offset=offset)
        assert torch.equal(crop, pixels[:, :, left : left + 12])


# ----------------------------------------------------------------------------------------------------- 8 bits and grids


@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0)])
def test_rounding_to_8_bits_inverts_the_conversion_from_8_bits(value_range):
    low, high = value_range
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 255 * (high - low) + low, value_range), levels)


def test_rounding_is_to_the_nearest_level_and_clips():
    images = torch.tensor([-3.0, -1.0, 2 * 0.4 / 255 - 1, 2 * 0.6 / 255 - 1, 1.0, 1.5])
    assert to_uint8(images).tolist() == [0, 0, 0, 1, 255, 255]


def test_rounding_refuses_nan():
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


def test_grid_is_square_by_default():
    grid = make_grid([np.asarray(random_image(32, 32, seed)) for seed in range(9)])
    assert grid.mode == "RGB" and grid.width == grid.height


def test_captions_are_above_their_images_and_do_not_touch():
    white = [Image.new("RGB", (16, 16), "white")] * 2
    grid = np.asarray(make_grid(white, ["a caption wider than its image"] * 2))
    assert grid.min() < 64 and (grid[-64:] == 255).all()
    blank = (grid == 255).all(axis=(0, 2))
    assert blank[8 + 64 : 8 + 64 + 8].all()
