import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from jevb_jax.evaluation import corruptions


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


@pytest.mark.parametrize("name", sorted(corruptions.CORRUPTIONS))
def test_seeds_and_severities(name):
    first = corruptions.corrupt(images(), name, severity=3, seed=0)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, corruptions.corrupt(images(), name, severity=3, seed=0))
    if name != "contrast":
        assert np.any(first != corruptions.corrupt(images(), name, severity=3, seed=1))
        same = np.repeat(images()[:1], 3, axis=0)
        each = corruptions.corrupt(same, name, severity=3, seed=0)
        assert np.any(each[0] != each[1])  # every image has a key of its own
    for severity in (0, 6):
        with pytest.raises(ValueError, match="severity must be 1 to 5"):
            corruptions.corrupt(images(), name, severity=severity, seed=0)


def test_errors():
    with pytest.raises(ValueError, match="corruption must be one of"):
        corruptions.corrupt(images(), "fog", severity=1, seed=0)
    with pytest.raises(ValueError, match="sides that 4 divides, got 30 x 32"):
        corruptions.corrupt(images()[:, :30], "patch_shuffle", severity=3, seed=0)
