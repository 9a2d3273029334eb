import numpy as np
import pytest
import torch
from PIL import Image

from pixelrepa_diffusers.images import center_crop_adm, make_grid, to_uint8


def random_image(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("width, height", [(64, 64), (65, 64), (200, 131), (40, 300), (31, 17), (127, 128)])
def test_adm_crop_of_any_image_is_a_square_of_the_asked_size(width, height):
    assert center_crop_adm(random_image(width, height), 32).size == (32, 32)


def test_adm_crop_leaves_an_image_of_the_right_size_unchanged():
    image = random_image(32, 32)
    assert np.array_equal(np.asarray(center_crop_adm(image, 32)), np.asarray(image))


def test_adm_crop_only_crops_when_the_short_side_fits():
    image = random_image(51, 32)
    assert np.array_equal(np.asarray(center_crop_adm(image, 32)), np.asarray(image)[:, 9:41])


def test_adm_crop_halves_with_a_box_filter_before_the_bicubic_resize():
    # At four times the size the bicubic resize is the identity, so only means of 2 × 2 pixels remain. Pillow rounds
    # to 8 bits after the horizontal and the vertical pass of each halving: at most half a level up, four times.
    image = random_image(64, 64)
    expected = np.asarray(image, dtype=np.float64).reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(np.asarray(center_crop_adm(image, 16)) - expected).max() <= 2


def test_adm_crop_refuses_a_size_without_pixels():
    with pytest.raises(ValueError, match="positive number of pixels, got 0"):
        center_crop_adm(random_image(8, 8), 0)


@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0)])
def test_rounding_to_8_bits_undoes_the_conversion_from_8_bits(value_range):
    low, high = value_range
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 255 * (high - low) + low, value_range), levels)


def test_rounding_is_to_the_nearest_level_and_clips_what_lies_outside():
    images = torch.tensor([-3.0, -1.0, 2 * 0.4 / 255 - 1, 2 * 0.6 / 255 - 1, 1.0, 1.5])
    assert to_uint8(images).tolist() == [0, 0, 0, 1, 255, 255]


def test_rounding_refuses_what_an_image_file_cannot_hold():
    with pytest.raises(ValueError, match="NaN or infinite"):
        to_uint8(torch.tensor([0.0, float("nan")]))
    with pytest.raises(TypeError, match=r"torch\.uint8"):
        to_uint8(torch.zeros(3, dtype=torch.uint8))


@pytest.mark.parametrize("labels", [None, ["a", "a label far too long for its image", "", "d", "e"]])
def test_grid_shows_every_image_unchanged(labels):
    images = [random_image(24, 16, seed) for seed in range(5)]
    grid = np.asarray(make_grid(images, labels, columns=2))
    for image in images:
        windows = np.lib.stride_tricks.sliding_window_view(grid, (16, 24, 3))
        assert (windows == np.asarray(image)).all((-3, -2, -1)).any()


def test_grid_takes_arrays_and_is_square_by_default():
    images = [np.asarray(random_image(32, 32, seed)) for seed in range(9)]
    grid = make_grid(images)
    assert grid.mode == "RGB" and grid.width == grid.height


def test_labels_add_dark_text_above_the_images():
    white = [Image.new("RGB", (64, 64), "white")] * 2
    grid = np.asarray(make_grid(white, ["cat", "dog"]))
    assert grid.min() < 64 and (grid[-64:] == 255).all()


def test_grid_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="at least one image"):
        make_grid([])
    with pytest.raises(ValueError, match="one size"):
        make_grid([random_image(8, 8), random_image(8, 9)])
    with pytest.raises(ValueError, match="Got 2 labels for 1 images"):
        make_grid([random_image(8, 8)], ["a", "b"])
    with pytest.raises(ValueError, match="columns"):
        make_grid([random_image(8, 8)], columns=0)
