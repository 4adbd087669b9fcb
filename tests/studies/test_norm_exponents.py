"""The study of powers of the length of features."""

import numpy as np
import pytest

from studies import norm_exponents


def test_lengths_alone_are_found_without_the_power_that_removes_them():
    random = np.random.default_rng(0)

    def drawn(length: float) -> np.ndarray:
        values = random.normal(0.5, 1, (200, 6))
        return length * values / np.linalg.norm(values, axis=1, keepdims=True)

    outside = dict.fromkeys(
        [*norm_exponents.CHOICES, *norm_exponents.NEAR, *norm_exponents.FAR], 20.0
    )
    lengths = {"train": 1.0, "validation": 1.0, "test": 1.0, **outside}
    features = {name: drawn(length) for name, length in lengths.items()}
    features["train"] *= np.exp(random.normal(0, 0.1, (200, 1)))
    rows = {
        row[0]: [float(cell) for cell in row[1:]] for row in norm_exponents.exponent_rows(features)
    }
    assert rows["0"][1:] == [1.0] * 4  # far away
    assert rows["1"][1:] == pytest.approx([0.5] * 4, abs=0.1)  # their directions are alike
    assert rows["1"][0] < rows["0"][0]


def test_digits_have_the_size_of_the_other_images():
    images = norm_exponents.enlarged_digits(3)
    assert images.shape == (3, 32, 32, 3)
    assert images.dtype == np.uint8
    assert images.max() == 255
