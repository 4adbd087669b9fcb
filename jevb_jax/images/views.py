"""What the networks see of an example: views of an image, or of features of a frozen encoder."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax.images import augmentations, pixels
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.images.feature_views import FeatureView
from jevb_jax.images.source import ImageSource, image_shape, is_of_features

View = ViewAugmentation | FeatureView


def view_shape(view: View) -> tuple[int, ...]:
    """Shape of a view without the batch: `(height, width, channels)` or `(F,)`."""
    if isinstance(view, FeatureView):
        return (view.num_features,)
    return view.size, view.size, len(view.mean)


def describe(view: View) -> str:
    """What the networks read, in words: `images 8x8x1`, or `features 768`."""
    shape = "x".join(map(str, view_shape(view)))
    return f"{'features' if isinstance(view, FeatureView) else 'images'} {shape}"


def plain_views(examples: ArrayLike, view: View) -> Array:
    """The un-augmented view of every example of a batch, `[batch, *view_shape(view)]` float32.

    Args:
      examples: `[batch, h, w, c]`, or features `[batch, F]` or `[batch, V, F]`.
      view: the view of evaluation.
    """
    if isinstance(view, FeatureView):
        return jax.vmap(view.plain)(jnp.asarray(examples))
    center = functools.partial(pixels.center_view, size=view.size, mean=view.mean, std=view.std)
    return jax.vmap(center)(jnp.asarray(examples))


def random_views(keys: Array, examples: ArrayLike, view: View) -> Array:
    """One random view of every example of a batch, `[batch, *view_shape(view)]` float32.

    Args:
      keys: `[batch]`, one for each example.
      examples: as for `plain_views`.
      view: makes the views.
    """
    return jax.vmap(view)(keys, jnp.asarray(examples))


def multi_view(
    keys: Array, examples: ArrayLike | tuple[ArrayLike, ...], views: Sequence[View]
) -> tuple[Array, ...]:
    """Several random views of every example of a batch.

    Args:
      keys: `[batch]`, one for each example. A view depends on nothing else but its example.
      examples: as for `plain_views`, or a tuple with the crops of each view that the host has cut out
        of pictures.
      views: one for each view; all of images or, alike, all of features.

    Returns:
      One batch for each view.
    """
    of_images = [view for view in views if isinstance(view, ViewAugmentation)]
    if len(of_images) == len(views):
        return augmentations.multi_view(keys, examples, of_images)
    first = views[0]
    if not isinstance(first, FeatureView) or any(view is not first for view in views):
        raise ValueError("views of features must be one view, repeated")
    several = functools.partial(first.several, count=len(views))
    if isinstance(examples, tuple):
        raise TypeError("features are one array, not a tuple of crops")
    made = jax.vmap(several)(keys, jnp.asarray(examples))
    return tuple(made[:, number] for number in range(len(views)))


def visible_views(
    examples: ArrayLike | tuple[ArrayLike, ...], views: Sequence[View]
) -> list[np.ndarray]:
    """Views for people to look at, as `augmentations.visible_views`; empty for features.

    Args:
      examples: as for `multi_view`.
      views: one for each view.
    """
    of_images = [view for view in views if isinstance(view, ViewAugmentation)]
    return augmentations.visible_views(examples, of_images) if of_images else []


def check_source(source: ImageSource, view: View) -> None:
    """Refuses a source that the networks do not take.

    Raises:
      ValueError: it holds features where images are needed, or the other way round; or it has
        another number of channels or columns than the network.
    """
    if is_of_features(source) != isinstance(view, FeatureView):
        has, wants = ("features", "images") if is_of_features(source) else ("images", "features")
        raise ValueError(f"{source.name} holds {has}, but the network was made for {wants}")
    if isinstance(view, FeatureView):
        width = source[0].shape[-1]
        if width != view.num_features:
            raise ValueError(
                f"{source.name} has {width} features in a row, but the network was trained on "
                f"{view.num_features}"
            )
        return
    channels, wanted = image_shape(source)[-1], len(view.mean)
    if channels not in (1, wanted):
        raise ValueError(
            f"{source.name} has {channels} channels, but the network was trained on {wanted}"
        )


def with_all_channels(examples: np.ndarray, view: View) -> np.ndarray:
    """A batch as the networks take it: gray images are repeated to all channels."""
    if isinstance(view, FeatureView):
        return np.ascontiguousarray(examples)
    shape = (*examples.shape[:-1], len(view.mean))
    return np.ascontiguousarray(np.broadcast_to(examples, shape))
