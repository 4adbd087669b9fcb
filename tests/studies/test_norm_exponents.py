"""The study of powers of the length of features."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jevb_jax.images.batches import load_resident
from jevb_jax.images.dataset import load_dataset
from studies import norm_exponents


@pytest.mark.slow
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


def test_training_images_are_those_that_the_model_saw_where_it_saw_fewer():
    data = {"source": "digits", "num_train_examples": 50}
    model: Any = SimpleNamespace(config={"data": data})
    split = load_dataset(**data)
    for found, part in zip(norm_exponents._held_out(model), split[:2], strict=True):
        np.testing.assert_array_equal(found, load_resident(part))


def test_digits_have_the_size_of_the_other_images():
    images = norm_exponents.enlarged_digits(3)
    assert images.shape == (3, 32, 32, 3)
    assert images.dtype == np.uint8
    assert images.max() == 255
