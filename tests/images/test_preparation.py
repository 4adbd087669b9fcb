"""The square of a picture, against the filter's formula in float64."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from jevb_jax.images import decoding
from jevb_jax.images.pixels import center_view, cut_levels
from jevb_jax.images.preparation import cut_picture, cut_square


def axis_weights(source: int, resized: int, first: int, size: int) -> np.ndarray:
    """`[size, source]`: a triangle as wide as a resized pixel, at least as a source pixel."""
    step = source / resized
    centers = (np.arange(first, first + size) + 0.5) * step
    distance = np.abs(np.arange(source) + 0.5 - centers[:, None]) / max(step, 1)
    weights = np.maximum(1 - distance, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def oracle(image: np.ndarray, size: int) -> np.ndarray:
    """Floats `[size, size, c]`, no rounding."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    weights = []
    for source in (height, width):
        resized = source * size // shorter
        weights.append(axis_weights(source, resized, round((resized - size) / 2), size))
    return np.einsum("ih,hwc,jw->ijc", weights[0], image.astype(np.float64), weights[1])


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    random = np.random.default_rng(height * 1000 + width)
    return random.integers(0, 256, (height, width, channels), np.uint8)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.sampled_from([1, 3, 4]))
@example(1, 90, 40, 3)
@example(16, 33, 16, 1)
@example(64, 1, 1, 1)
@example(1, 65, 16, 3)
@example(200, 3, 16, 3)
@example(40, 60, 16, 4)
def test_square_is_the_filter_s(height, width, size, channels):
    image = noise(height, width, channels)
    expected = oracle(image, size)
    levels = cut_square(image, size)
    assert (levels.dtype, levels.shape) == (np.uint8, (size, size, channels))
    assert np.abs(levels - expected).max() <= 1.02  # two roundings
    floats = cut_square((image / 255).astype(np.float32), size)
    np.testing.assert_allclose(floats, expected / 255, atol=2e-5)
    # Of a file, at once.
    picture = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
    np.testing.assert_array_equal(
        np.asarray(cut_picture(picture, size)), levels.squeeze(-1) if channels == 1 else levels
    )
    pixels = decoding.picture_pixels(
        picture, mode={1: "L", 3: "RGB", 4: "RGBA"}[channels], image_size=size, where="x"
    )
    np.testing.assert_array_equal(pixels, levels)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(28, 56), (57, 31), (9, 7), (16, 40)])
def test_device_and_host_cut_the_same_square(shape):
    image = noise(*shape)
    on_device = np.asarray(cut_levels(image, size=16)).astype(int)
    difference = np.abs(on_device - cut_square(image, 16))
    assert difference.max() <= 1  # a level between two
    assert np.mean(difference > 0) < 0.05
    view = center_view(image, size=16, mean=(0.0,) * 3, std=(1.0,) * 3)
    np.testing.assert_allclose(view, oracle(image, 16) / 255, atol=3e-6)
    assert on_device.shape == view.shape == (16, 16, 3)


def test_a_thin_picture_with_transparency_is_cut_as_its_array():
    image = noise(2, 3000, 4)
    picture = Image.fromarray(image)
    found = np.asarray(cut_picture(picture, 16, max_pixels=1000))
    planes = [Image.fromarray(plane) for plane in np.moveaxis(image, -1, 0)]
    expected = [np.asarray(cut_picture(plane, 16, max_pixels=1000)) for plane in planes]
    np.testing.assert_array_equal(found, np.stack(expected, axis=-1))


def test_a_picture_of_one_row_takes_no_gigabytes():
    # Resized whole it would be 256 x 76,800,000.
    square = cut_square(np.full((1, 300_000, 1), 7, np.uint8), 256)
    np.testing.assert_array_equal(square, np.full((256, 256, 1), 7))
