"""Sets of images that are not those of the training."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jevb_jax.images import corruptions, dataset
from jevb_jax.images.source import ArraySource, ImageSource
from jevb_jax.settings.sections import RunSettings

if TYPE_CHECKING:  # a loaded model scores without Optax and ml_collections, which these import
    pass


# Severity 0 is the image itself.
CORRUPTED = "corrupted"


class OutsideSet(NamedTuple):
    """Images that are out of distribution.

    Attributes:
      name: what to call it; of a corruption `NAME_SEVERITY`.
      group: "near", "far", ... over which AUROC is averaged; `CORRUPTED` for corruptions.
      source: the images.
      protocol: what they are.
    """

    name: str
    group: str
    source: ImageSource
    protocol: str


def load_outside_set(*, name: str, group: str, protocol: str, **source: Any) -> OutsideSet:
    """A set that a config describes.

    Args:
      name: what to call it.
      group: sets of one group are averaged.
      protocol: what it is, in words: which release, which split list.
      **source: keyword arguments of `dataset.load_images`.

    Returns:
      The set.

    Raises:
      ValueError: as `dataset.load_images`.
      FileNotFoundError: likewise.
    """
    images = dataset.load_images(**source)
    return OutsideSet(name, group, images, protocol or f"{name}, {images.name}")


def corrupted_sets(
    images: np.ndarray, names: Sequence[str], severities: Sequence[int], *, of: str
) -> Iterator[OutsideSet]:
    """Corrupted copies of in-distribution images, made one set at a time.

    Args:
      images: `[N, h, w, c]` uint8.
      names: some of `corruptions.CORRUPTIONS`.
      severities: 1 to 5.
      of: what the images are, for the protocol.

    Yields:
      One set for each corruption and severity.
    """
    for name in names:
        for severity in severities:
            corrupted = corruptions.corrupt(images, name, severity=severity, seed=0)
            yield OutsideSet(
                f"{name}_{severity}",
                CORRUPTED,
                ArraySource(corrupted, name=f"{name}, severity {severity}"),
                f"the first {len(images):,} images of {of} with {name}, severity {severity} of 5",
            )


def is_asked(settings: RunSettings) -> bool:
    """Whether a config has anything to detect."""
    section = settings.ood
    return bool(section.outside or section.corruptions or settings.data.inlier_class >= 0)
