"""The supervised step against softmax regression by hand, and which epoch is the best."""

import math
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from jax import Array
from scipy.special import logsumexp, softmax

from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.training import classification
from jevb_jax.training.classification import BestEpoch

MEAN, STD = 0.3, 0.5


class Doubled(nn.Module):
    """A backbone of one parameter."""

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        del train
        factor = self.param("factor", lambda _: jax.numpy.asarray(2.0))
        return factor * images.reshape(images.shape[0], -1)


def whole_image() -> ViewAugmentation:
    return ViewAugmentation(
        size=3,
        mean=(MEAN,),
        std=(STD,),
        crop_scale=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        flip_probability=0.0,
        jitter_probability=0.0,
        grayscale_probability=0.0,
    )


@pytest.mark.slow
@pytest.mark.parametrize("is_frozen", [pytest.param(True, marks=pytest.mark.nightly), False])
def test_steps_are_those_of_softmax_regression(is_frozen):
    """Plain gradient descent in NumPy, of the classifier and, where it is tuned, of the factor."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (12, 3, 3, 1), np.uint8)
    labels = random.integers(0, 4, 12)
    pixels = ((images / 255 - MEAN) / STD).reshape(12, 9)
    features = 2 * pixels
    mean, std = features.mean(axis=0), features.std(axis=0)
    rate, factor, kernel, bias = 0.1, 2.0, np.zeros((9, 4)), np.zeros(4)
    losses = []
    for _ in range(3):
        standardized = (factor * pixels - mean) / std
        logits = standardized @ kernel + bias
        losses.append(np.mean(logsumexp(logits, axis=1) - logits[np.arange(12), labels]))
        delta = (softmax(logits, axis=1) - np.eye(4)[labels]) / 12
        of_factor = np.sum((delta @ kernel.T) * pixels / std)
        kernel, bias = kernel - rate * standardized.T @ delta, bias - rate * delta.sum(axis=0)
        factor -= 0 if is_frozen else rate * of_factor

    variables = {"params": {"factor": np.float32(2)}, "batch_stats": {}}
    optimizer = optax.sgd(rate)
    state = classification.initial_state(
        features.astype(np.float32),
        num_classes=4,
        tuned_backbone=None if is_frozen else variables,
        optimizer=optimizer,
    )
    found = []
    for _ in range(3):
        state, metrics = classification.train_step(
            state,
            (jax.numpy.asarray(images), jax.numpy.asarray(labels)),
            jax.random.key(0),
            network=Doubled(),
            frozen_backbone=variables if is_frozen else None,
            view=whole_image(),
            optimizer=optimizer,
        )
        found.append(float(metrics["loss"]))
        assert float(metrics["gradient_norm"]) > 0
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    np.testing.assert_allclose(state.params.kernel, kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.params.bias, bias, rtol=1e-4, atol=1e-6)
    if is_frozen:
        assert state.params.backbone is None
    else:
        np.testing.assert_allclose(state.params.backbone["factor"], factor, rtol=1e-5)
    assert int(state.step) == 3


def test_a_feature_that_never_varies_is_left_as_it_is():
    features = np.array([[1.0, 5.0], [3.0, 5.0]], np.float32)
    state = classification.initial_state(
        features, num_classes=2, tuned_backbone=None, optimizer=optax.sgd(0.1)
    )
    np.testing.assert_array_equal(state.batch_stats["feature_std"], [1, 1])
    np.testing.assert_array_equal(state.batch_stats["feature_mean"], [2, 5])


def at(step: int) -> Any:
    return SimpleNamespace(step=step)


def test_the_earliest_of_the_best_epochs_is_the_best():
    accuracies = {0: 0.2, 5: 0.4, 10: 0.4, 15: 0.3, 20: 0.5}
    watch = BestEpoch(lambda state: accuracies[int(state.step)], steps_per_epoch=5, num_epochs=4)
    kept, scores, lines = [], [], []
    for step in accuracies:
        found = watch.measure(at(step), {"train/loss": 1.5})
        assert found.values == {"validation/accuracy": accuracies[step]}
        kept.append(found.is_to_be_saved)
        scores.append(watch.score(at(step)))
        lines += found.lines
    assert kept == [True, True, False, False, True]
    assert scores == [0.2, 0.4, -math.inf, -math.inf, 0.5]
    assert lines[1] == "epoch 2/4  loss 1.5000  validation accuracy 0.4000"
    assert watch.best_step == 20
    assert watch.score(at(17)) == -math.inf  # in the middle of an epoch

    records = [{"step": 3, "train/loss": 1.0}]
    records += [{"step": s, "validation/accuracy": accuracies[s]} for s in (0, 5, 10)]
    resumed = BestEpoch(lambda _: 0.4, steps_per_epoch=5, num_epochs=4)
    resumed.resume(records)
    assert resumed.best_step == 5
    assert not resumed.measure(at(15), {}).is_to_be_saved
