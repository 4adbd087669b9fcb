"""Labels that are stored as texts: numbers of classes, or their names."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from jevb_jax.images.source import ImageSource

_INTEGER = re.compile(r"-?[0-9]+")
_NUMBER = re.compile(r"[0-9]{1,9}")  # of a class


def labels_of_texts(
    texts: Sequence[str],
    *,
    place: Callable[[int], str],
    where: str,
    like: ImageSource | None = None,
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels and class names. If all texts are integers, they are numbers of classes.

    Args:
      texts: one for each example; an empty one is no label.
      place: names the place of an example in messages.
      where: names the set in messages.
      like: the training set, so that labels mean the same; None for a set of its own.

    Returns:
      Labels, int64 `[N]`, or None if no example has one; and the sorted names of the classes, or
      None.

    Raises:
      ValueError: only some examples have labels, a number is negative, or a class is not one of
        `like`.
    """
    known = None if like is None else like.class_names
    without = [index for index, text in enumerate(texts) if not text]
    if len(without) == len(texts):
        return None, known
    if without:
        raise ValueError(
            f"{where}: {len(without):,} of {len(texts):,} pictures have no label, the first is "
            f"{place(without[0])}; give labels to all or to none"
        )
    are_known_numbers = like is not None and like.labels is not None and known is None
    if are_known_numbers or (known is None and all(map(_INTEGER.fullmatch, texts))):
        wrong = next((i for i, text in enumerate(texts) if not _NUMBER.fullmatch(text)), None)
        if wrong is not None:
            raise ValueError(
                f"{place(wrong)}: expected the number of a class, from 0, got {texts[wrong]!r}"
            )
        return np.asarray(list(map(int, texts)), np.int64), None
    names = tuple(sorted(set(texts))) if known is None else known
    numbers = {name: number for number, name in enumerate(names)}
    unknown = next((i for i, text in enumerate(texts) if text not in numbers), None)
    if unknown is not None:
        raise ValueError(
            f"{place(unknown)}: class {texts[unknown]!r} is not among the known classes {list(names)}"
        )
    return np.asarray([numbers[text] for text in texts], np.int64), names
