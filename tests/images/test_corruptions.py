import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image
from sklearn.datasets import load_sample_image

from jevb_jax.images import corruptions
from tests.marks import nightly


def images() -> np.ndarray:
    photograph = load_sample_image("china.jpg")
    return np.stack([photograph[i : i + 256 : 8, 200:456:8] for i in (60, 90, 120)])


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_contrast(severity):
    factor = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    found = corruptions.corrupt(images(), "contrast", severity=severity, seed=0)
    x = images().astype(np.float64)
    mean = x.mean(axis=(1, 2), keepdims=True)
    # Rounded to a grey level, from float32.
    np.testing.assert_allclose(found, mean + factor * (x - mean), atol=0.5 + 1e-3)


@pytest.mark.parametrize("severity", [1, 5])
def test_noise_has_its_standard_deviation(severity):
    gray = np.full((20, 32, 32, 3), 128, np.uint8)
    found = corruptions.corrupt(gray, "gaussian_noise", severity=severity, seed=0) / 255
    std = (0.04, 0.08, 0.12, 0.18, 0.26)[severity - 1]
    inside = np.abs(found - 128 / 255) < 0.4  # not clipped
    assert found.mean() == pytest.approx(128 / 255, abs=0.003)
    expected = (
        std
        if severity == 1
        else np.std(np.clip(np.random.default_rng(0).normal(0, std, 200_000), -0.4, 0.4))
    )
    assert np.std(np.clip(found - 128 / 255, -0.4, 0.4)) == pytest.approx(expected, rel=0.02)
    assert inside.mean() > 0.85


@pytest.mark.parametrize(("severity", "tiles"), [(1, 2), (3, 4), (5, 8)])
def test_shuffled_patches_are_the_patches(severity, tiles):
    found = corruptions.corrupt(images(), "patch_shuffle", severity=severity, seed=0)

    def patches(image: np.ndarray) -> list[bytes]:
        return [
            part.tobytes()
            for row in np.split(image, tiles, axis=0)
            for part in np.split(row, tiles, axis=1)
        ]

    for before, after in zip(images(), found, strict=True):
        assert sorted(patches(before)) == sorted(patches(after))
    assert any(patches(a) != patches(b) for a, b in zip(images(), found, strict=True))


@pytest.mark.parametrize("severity", [1, 5])
def test_blur_is_scipys(severity):
    sigma = (0.04, 0.055, 0.07, 0.09, 0.12)[severity - 1] * 32
    found = corruptions.corrupt(images(), "gaussian_blur", severity=severity, seed=0)
    expected = scipy.ndimage.gaussian_filter(
        images().astype(np.float64),
        sigma,
        mode="mirror",
        radius=int(np.ceil(3 * sigma)),
        axes=(1, 2),
    )
    np.testing.assert_allclose(found, expected, atol=0.5 + 1e-3)


@pytest.mark.parametrize("severity", [2, 3, 5])
def test_pixels_are_means_of_boxes(severity):
    kept = (0.8, 0.65, 0.5, 0.4, 0.25)[severity - 1]
    found = corruptions.corrupt(images(), "pixelate", severity=severity, seed=0)
    pixels = round(kept * 32)
    # Every pixel split into as many parts as there are boxes: box means are then plain means.
    fine = images().astype(np.float64).repeat(pixels, axis=1).repeat(pixels, axis=2)
    boxes = fine.reshape(3, pixels, 32, pixels, 32, 3).mean(axis=(2, 4))
    index = ((np.arange(32) + 0.5) * pixels / 32).astype(int)
    np.testing.assert_allclose(found, boxes[:, index][:, :, index], atol=0.5 + 1e-3)


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_rotation_is_scipys_one_way_or_the_other(severity):
    degrees = (8, 16, 30, 45, 90)[severity - 1]
    same = np.repeat(images()[:1], 8, axis=0)
    found = corruptions.corrupt(same, "rotation", severity=severity, seed=0)
    ways = [
        scipy.ndimage.rotate(
            same[0].astype(np.float64), sign * degrees, reshape=False, order=1, mode="reflect"
        )
        for sign in (-1, 1)
    ]
    errors = np.array([[np.abs(one - way).max() for way in ways] for one in found.astype(float)])
    assert np.all(errors.min(axis=1) < 0.52)  # rounding, and float32 coordinates
    assert set(errors.argmin(axis=1)) == {0, 1}


@pytest.mark.parametrize(("severity", "side"), [(1, 29), (2, 25), (3, 20), (4, 16), (5, 12)])
def test_crop_is_a_part_of_the_image(severity, side):
    # On a ramp a crop's mean tells where it was cut, its range how large it was: the root of 0.8, 0.6,
    # 0.4, 0.25, 0.15 of 32 pixels, up to the resampling's ends.
    ramp = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8)[:, None, None], (32, 32, 3))
    found = corruptions.corrupt(np.stack([ramp] * 50), "crop", severity=severity, seed=0)
    span = np.ptp(found.astype(float), axis=(1, 2, 3))
    assert np.all(np.abs(span - 8 * (side - 1)) <= 2)
    assert len(set(found.mean(axis=(1, 2, 3)).round())) > min(8, 32 - side)


def test_crop_needs_squares():
    with pytest.raises(ValueError, match="crop needs square images, got 30 x 32"):
        corruptions.corrupt(images()[:, :30], "crop", severity=1, seed=0)


@pytest.mark.parametrize(
    "name", ["contrast", nightly("crop"), "gaussian_noise", nightly("rotation")]
)
def test_a_traced_severity_gives_the_same_images(name):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(4), jnp.arange(3))
    floats = jnp.asarray(images(), jnp.float32) / 255
    for severity in range(1, 6):
        one = functools.partial(corruptions.CORRUPTIONS[name], severity=severity)
        plain = jax.jit(jax.vmap(one))
        np.testing.assert_array_equal(
            corruptions.corrupt(images(), name, severity=severity, seed=4),
            jnp.round(plain(keys, floats) * 255).astype(jnp.uint8),
        )


# A shuffled, turned or cropped image may land on what looks alike.
@pytest.mark.parametrize("name", ["contrast", "gaussian_blur", "gaussian_noise", "pixelate"])
def test_severity_moves_an_image_further(name):
    clean = images().astype(float)
    distances = [
        np.mean((corruptions.corrupt(images(), name, severity=s, seed=0) - clean) ** 2)
        for s in range(1, 6)
    ]
    assert np.all(np.diff(distances) > 0)


def test_batches_do_not_matter(monkeypatch):
    whole = corruptions.corrupt(images(), "rotation", severity=2, seed=0)
    monkeypatch.setattr(corruptions, "_BATCH_SIZE", 2)
    found = corruptions.corrupt(images(), "rotation", severity=2, seed=0)
    np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("name", sorted(corruptions.CORRUPTIONS))
def test_digits_of_eight_pixels_are_corrupted_too(name):
    small = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    for severity in (1, 5):
        found = corruptions.corrupt(small, name, severity=severity, seed=0)
        assert found.shape == small.shape
        assert np.any(found != small)


@pytest.mark.parametrize("name", sorted(corruptions.CORRUPTIONS))
def test_seeds_and_severities(name):
    first = corruptions.corrupt(images(), name, severity=3, seed=0)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, corruptions.corrupt(images(), name, severity=3, seed=0))
    if name not in ("contrast", "gaussian_blur", "pixelate"):
        others = [corruptions.corrupt(images(), name, severity=3, seed=seed) for seed in (1, 2, 3)]
        assert any(np.any(first != other) for other in others)
        same = np.repeat(images()[:1], 3, axis=0)
        each = corruptions.corrupt(same, name, severity=3, seed=0)
        assert np.any(each[0] != each[1])  # every image has a key of its own
    for severity in (0, 6):
        with pytest.raises(ValueError, match="severity must be 1 to 5"):
            corruptions.corrupt(images(), name, severity=severity, seed=0)


def test_errors():
    with pytest.raises(ValueError, match="corruption must be one of"):
        corruptions.corrupt(images(), "fog", severity=1, seed=0)
    with pytest.raises(ValueError, match="sides divisible by 4, got 30 x 32"):
        corruptions.corrupt(images()[:, :30], "patch_shuffle", severity=3, seed=0)


def test_settings_of_numpy_and_images_that_are_refused():
    first = images()[:1]
    expected = corruptions.corrupt(first, "gaussian_blur", severity=3, seed=1)
    found = corruptions.corrupt(first, "gaussian_blur", severity=np.int64(3), seed=np.uint8(1))  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(found, expected)
    key, image = jax.random.key(0), jnp.asarray(first[0], jnp.float32) / 255
    for severity in (0, 6, jnp.asarray(6), np.int64(0)):
        with pytest.raises(ValueError, match="severity must be 1 to 5"):
            corruptions.contrast(key, image, severity=severity)  # pyright: ignore[reportArgumentType]
    wrong: dict[str, Any]
    for wrong, error, message in (
        ({"severity": 3.0}, TypeError, "severity must be one whole number"),
        ({"seed": 1.0}, TypeError, "seed must be one whole number"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"images": first / 255}, TypeError, "images must be uint8"),
        ({"images": first[0]}, ValueError, "non-empty"),
        ({"images": first[:0]}, ValueError, "non-empty"),
    ):
        call: dict[str, Any] = {"images": first, "severity": 3, "seed": 1} | wrong
        with pytest.raises(error, match=message):
            corruptions.corrupt(call.pop("images"), "contrast", **call)


def test_center_crops_are_urls():
    photograph = load_sample_image("china.jpg")
    # Two shapes; the square is that of the shorter side.
    for whole in (photograph[60:316:4, 200:456:4], photograph[60:316:4, 200:520:4]):
        many = np.stack([np.roll(whole, 7 * i, axis=1) for i in range(9)])
        found = corruptions.center_crops(many, seed=3)
        assert found.shape == (9, 64, 64, 3)
        shares = np.random.default_rng(3).uniform(0.1, 0.75, size=9)
        for image, crop, share in zip(many, found, shares, strict=True):
            side = round(64 * share)
            # torchvision's center_crop rounds in this way.
            top, left = (round((length - side) / 2) for length in image.shape[:2])
            picture = Image.fromarray(image[top : top + side, left : left + side])
            expected = np.asarray(picture.resize((64, 64), Image.Resampling.BILINEAR), int)
            np.testing.assert_allclose(crop, expected, atol=1)
    np.testing.assert_array_equal(found, corruptions.center_crops(many, seed=3))
    assert np.any(found != corruptions.center_crops(many, seed=4))


def test_center_crops_of_few_pixels_and_of_no_images():
    tiny = np.full((6, 1, 3, 1), 9, np.uint8)
    np.testing.assert_array_equal(corruptions.center_crops(tiny, seed=0), tiny[:, :, :1])
    with pytest.raises(ValueError, match="non-empty"):
        corruptions.center_crops(tiny[:0], seed=0)
    with pytest.raises(TypeError, match="must be uint8"):
        corruptions.center_crops(tiny / 255, seed=0)
    with pytest.raises(ValueError, match="seed must be"):
        corruptions.center_crops(tiny, seed=-1)
