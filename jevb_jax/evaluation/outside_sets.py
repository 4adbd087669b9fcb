"""Sets of images that are out of distribution."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jevb_jax.images import corruptions, dataset
from jevb_jax.images.source import ArraySource, ImageSource
from jevb_jax.settings.sections import RunSettings

# The group of corrupted copies of in-distribution images.
CORRUPTED = "corrupted"
# The group of other images of the same classes, on which accuracies are measured, too.
SHIFTED = "shifted"


class OutsideSet(NamedTuple):
    """Images that are out of distribution.

    Attributes:
      name: the name of the set; `NAME_SEVERITY` for a corruption.
      group: "near", "far", and so on; AUROC is averaged over a group. `CORRUPTED` for corruptions;
        `SHIFTED` for other images of the same classes.
      source: the images.
      protocol: what the images are, in words.
    """

    name: str
    group: str
    source: ImageSource
    protocol: str


def load_outside_set(
    *, name: str, group: str, protocol: str, alike: Mapping[str, Any] | None = None, **source: Any
) -> OutsideSet:
    """Loads a set that a config describes.

    Args:
      name: the name of the set.
      group: AUROC is averaged over the sets of a group.
      protocol: what the set is, in words: which release, which list of images.
      alike: how the run reads its own images (`DataSection.alike`).
      **source: keyword arguments of `dataset.load_images`, whose errors it may raise.
    """
    images = dataset.load_images(**(alike or {}), **source)
    return OutsideSet(name, group, images, protocol or f"{name}, {images.name}")


def corrupted_sets(
    images: np.ndarray, names: Sequence[str], severities: Sequence[int], *, of: str
) -> Iterator[OutsideSet]:
    """Yields corrupted copies of in-distribution images, one set for each corruption and severity.

    Args:
      images: `[N, h, w, c]` uint8.
      names: keys of `corruptions.CORRUPTIONS`.
      severities: each from 1 to 5.
      of: what the images are, for the protocol.
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


def other_classes(data: dataset.Dataset, split: str) -> OutsideSet | None:
    """The images of the left-out classes in the split that is evaluated.

    Args:
      data: the data of the run.
      split: "validation" or "test"; what is chosen on validation images must not see test images.

    Returns:
      The set, or None if no class is left out.

    Raises:
      ValueError: classes are left out, and the split has no image of them.
    """
    if data.outside is None:
        return None
    source = data.outside_validation if split == "validation" else data.outside
    if source is None:
        raise ValueError(
            f"{data.train.name} has no {split} image of the classes that are left out, so they "
            "cannot be detected with evaluation.split = 'validation'. Set data.validation_fraction "
            "higher, or leave out other classes"
        )
    what = f"the {split} images of the other classes"
    return OutsideSet("other_classes", "other_classes", source, what)


def is_asked(settings: RunSettings) -> bool:
    """Whether the config asks for detection."""
    section = settings.ood
    has_classes = settings.data.inlier_class >= 0 or bool(settings.data.inlier_classes)
    return bool(section.outside or section.corruptions or has_classes)
