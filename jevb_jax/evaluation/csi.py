"""CSI's score without labels: similarity to training images in each of four rotations.

After Tack et al. 2020 and the code of its authors, whose score is the sum of two. This is the
contrastive one. The other is the confidence of a classifier of rotations, which our encoders do not
have, so it is left out.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import arguments
from jevb_jax.evaluation.detector_input import (
    DegenerateFeaturesError,
    as_float32,
    checked_fit_features,
    or_infinite,
    unit_directions,
)
from jevb_jax.evaluation.products import exact_matmul
from jevb_jax.images import augmentations
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.images.views import View
from jevb_jax.paper import sphere
from jevb_jax.paper.scores import never_certain, real_numbers
from jevb_jax.settings.sections import OodSection

NUM_ROTATIONS = 4
# Share of the image area of every crop; the published command fixes it.
CROP_SHARE = 0.54
_AXES = f"[N, {NUM_ROTATIONS}, D]"
_QUERIES_AT_ONCE = 128


def check_square(what: str, height: int, width: int) -> None:
    """Raises ValueError if images cannot be turned by a quarter without a change of shape."""
    if height != width:
        raise ValueError(
            f"ood.csi_crops: CSI turns images by quarter turns, so they must be square, but {what} "
            f"have {height} x {width} pixels. Set data.image_size (or image_size of the outside set) "
            "to cut out the square, or set ood.csi_crops to 0"
        )


@dataclasses.dataclass(frozen=True)
class RotatedViews:
    """The views of an image for CSI's score: random crops of each of its four rotations.

    A view is mirrored at random, turned, then augmented. All images use the same draws, so the
    score of an image depends neither on its place nor on other images. In the published code, the
    draws depend on the place in the batch.

    Attributes:
      augmentation: makes the crops of the turned image. Its flip comes before the turn.
      num_crops: views of each rotation, at least 1.
      seed: sets the draws; rotation `r` of crop `c` has the key `fold_in(fold_in(key, c), r)`.
    """

    augmentation: ViewAugmentation
    num_crops: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name, at_least in (("num_crops", 1), ("seed", 0)):
            number = arguments.whole_number(name, getattr(self, name), at_least=at_least)
            object.__setattr__(self, name, number)

    def views(self, crop: ArrayLike, images: Array) -> Array:
        """One view of every rotation of every image.

        Args:
          crop: number of the crop, from 0.
          images: `[N, h, h, c]`.

        Returns:
          `[4, N, size, size, c]` float32, turned by 0, 1, 2 and 3 quarters counterclockwise.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), crop)
        flips, keys = [], []
        for rotation in range(NUM_ROTATIONS):
            flip, rest = jax.random.split(jax.random.fold_in(key, rotation))
            flips.append(flip)
            keys.append(rest)
        mirror = functools.partial(
            augmentations.random_horizontal_flip, probability=self.augmentation.flip_probability
        )
        turned = jnp.stack(
            [
                jnp.rot90(jax.vmap(mirror, (None, 0))(flip, images), rotation, (1, 2))
                for rotation, flip in enumerate(flips)
            ]
        )
        augmentation = dataclasses.replace(self.augmentation, flip_probability=0.0)
        # The key of a rotation is shared by its images.
        return jax.vmap(jax.vmap(augmentation, (None, 0)))(jnp.stack(keys), turned)

    def mean_embeddings(self, embed: Callable[[Array], Array], images: Array) -> Array:
        """Embedding of every rotation of every image, as a mean over its crops.

        Args:
          embed: maps views `[n, size, size, c]` to `[n, D]`.
          images: `[N, h, h, c]`.

        Returns:
          `[N, 4, D]` float32.

        Raises:
          ValueError: the images are not square.
        """
        check_square("these", *images.shape[1:3])

        def of_crop(crop: Array) -> Array:
            views = self.views(crop, images)
            (flat,) = sphere.at_least_float32(embed(views.reshape(-1, *views.shape[2:])))
            return flat.reshape(*views.shape[:2], -1)

        # One crop after the other, so that memory does not grow with their number.
        crops = jax.lax.map(of_crop, jnp.arange(self.num_crops))
        return jnp.swapaxes(jnp.mean(crops, axis=0), 0, 1)


def rotated_views(section: OodSection, augmentation: View) -> RotatedViews | None:
    """The views that a run's settings ask for; None if the score is off.

    Args:
      section: settings; `csi_crops` is the number of crops.
      augmentation: of training. Here its crops have the fixed area `CROP_SHARE`.
    """
    if not section.csi_crops:
        return None
    if not isinstance(augmentation, ViewAugmentation):
        raise ValueError(
            "ood.csi_crops rotates images, and features have no rotations: set it to 0"
        )
    fixed = dataclasses.replace(augmentation, crop_scale=(CROP_SHARE, CROP_SHARE))
    return RotatedViews(fixed, section.csi_crops)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RotatedSimilarity:
    """Minus the similarity to the nearest fitted image over rotations, fitted by `fit_csi`.

    Attributes:
      bank: `[4, M, D]`, directions of the fitted images in each rotation.
      weight: `[4]`, the inverse of the mean norm in each rotation.
    """

    bank: Array
    weight: Array

    def __call__(self, rotations: ArrayLike) -> Array:
        """Scores, `[N]`, of embeddings `[N, 4, D]`."""
        values = real_numbers("rotations", rotations)
        width = self.bank.shape[-1]
        if values.ndim != 3 or values.shape[1:] != (NUM_ROTATIONS, width):
            raise ValueError(
                f"rotations must be [N, {NUM_ROTATIONS}, {width}], as wide as the fitted ones, got "
                f"shape {values.shape}"
            )
        values = values.astype(jnp.float32)
        score = _minus_similarity(self.bank, self.weight, values)
        return never_certain(or_infinite(score, values.reshape(len(values), -1)))


@jax.jit
def _minus_similarity(bank: Array, weight: Array, rotations: Array) -> Array:
    """Scores, `[N]`, of `[N, 4, D]`; for `bank` and `weight`, see `RotatedSimilarity`."""

    def of_image(query: Array) -> Array:
        products = exact_matmul(bank, query[:, :, None])
        return -jnp.mean(weight * jnp.max(products[..., 0], axis=1))

    return jax.lax.map(of_image, rotations, batch_size=_QUERIES_AT_ONCE)


def fit_csi(rotations: ArrayLike) -> RotatedSimilarity:
    """CSI's contrastive score, an ensemble over rotations (docs eq. 42; Tack et al. 2020).

    The norm of an image times its largest cosine to the fitted images in the same rotation, divided
    by the mean norm of the fitted images, as a mean over rotations; with the opposite sign, because
    it is large for inside images. The published score adds the confidence of a classifier of
    rotations, which is left out here.

    Args:
      rotations: `[M, 4, D]`, in distribution, from `RotatedViews.mean_embeddings`.

    Returns:
      A score: `[N, 4, D]` to `[N]`.

    Raises:
      ValueError: `rotations` are not `[M, 4, D]` or not finite.
      DegenerateFeaturesError: all embeddings of a rotation are zero.
    """
    given = np.asarray(rotations)
    if given.ndim != 3 or given.shape[1] != NUM_ROTATIONS:
        raise ValueError(f"rotations must be {_AXES}, got shape {given.shape}")
    num_images, _, width = given.shape
    flat = checked_fit_features("rotations", given.reshape(num_images, NUM_ROTATIONS * width))
    values = flat.reshape(given.shape)
    mean_norm = np.mean(np.linalg.norm(values, axis=-1), axis=0)
    if not mean_norm.all():
        raise DegenerateFeaturesError(
            "all embeddings of a rotation are zero: has the encoder collapsed?"
        )
    directions = unit_directions(values.reshape(-1, width)).reshape(values.shape)
    return RotatedSimilarity(*as_float32(np.swapaxes(directions, 0, 1), 1 / mean_norm))
