"""Frozen features of every image of a source, each computed exactly once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jevb_jax import augmentations, data
from jevb_jax.networks import JointEmbeddingModel, ViewOutputs


class Features(NamedTuple):
    """Outputs for `N` un-augmented images, float32, on the host.

    Attributes:
      representation: `[N, F]`, of the backbone.
      embedding: `[N, D]`, of the projector.
      prediction: of the head, see `ViewOutputs`.
      labels: `[N]` int64, or None.
    """

    representation: np.ndarray
    embedding: np.ndarray
    prediction: Any
    labels: np.ndarray | None


class FeatureExtractor:
    """Computes features in padded batches of one size, so that it compiles once."""

    def __init__(
        self,
        model: JointEmbeddingModel,
        *,
        image_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        batch_size: int,
    ):
        """Prepares the compiled forward pass.

        Args:
          model: networks.
          image_size: pixels a side of the view (images are resized to it).
          mean: of the normalisation, one value for each channel.
          std: likewise.
          batch_size: images at a time.
        """
        self._batch_size = batch_size

        def forward(variables: Any, images: Array) -> ViewOutputs:
            views = jax.vmap(
                lambda image: augmentations.center_view(image, size=image_size, mean=mean, std=std)
            )(images)
            return model.apply(variables, views, train=False)  # pyright: ignore[reportReturnType]

        self._forward = jax.jit(forward)

    def __call__(self, variables: Any, source: data.ImageSource) -> Features:
        """Features of every image of `source`, in its order.

        Args:
          variables: parameters and running statistics.
          source: images.

        Returns:
          The features.
        """
        parts: list[ViewOutputs] = []
        for images, mask in data.evaluation_batches(source, self._batch_size):
            outputs = jax.device_get(self._forward(variables, jnp.asarray(images)))
            parts.append(jax.tree.map(lambda values: np.asarray(values)[mask], outputs))  # noqa: B023
        whole: Any = jax.tree.map(lambda *values: np.concatenate(values), *parts)
        return Features(whole.representation, whole.embedding, whole.prediction, source.labels)
