"""Images and features in arrays: `.npz` and `.npy` files, and the digits of scikit-learn."""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from jevb_jax.images import array_files
from jevb_jax.images.levels import Levels
from jevb_jax.images.source import (
    ArraySource,
    FeatureSource,
    InMemory,
    check_features,
    check_images,
)
from jevb_jax.runs.files import to_path

_Source = TypeVar("_Source", ArraySource, FeatureSource)
_Paths = Sequence[str | os.PathLike[str]] | str | os.PathLike[str]


@dataclass(frozen=True)
class _Kind(Generic[_Source]):
    """What the files hold.

    Attributes:
      name: the entry of an `.npz` file that holds it.
      says: its type and shape, for messages.
      label_axes: an `.npy` array of at most so many axes holds labels.
      stored: the values of a file as the source holds them, given the name of the file.
      make: the source, from such values, labels, class names and the name of the source.
      check: raises for a wrong shape or type, before memory is taken.
    """

    name: str
    says: str
    label_axes: int
    stored: Callable[[np.ndarray, str], np.ndarray]
    make: Callable[[np.ndarray, np.ndarray | None, tuple[str, ...] | None, str], _Source]
    check: Callable[..., None]


def _images(levels: Levels) -> _Kind[ArraySource]:
    return _Kind(
        "images",
        f"{levels.dtype} [N, H, W, C]",
        2,  # labels of two axes are labels of a wrong shape; images have more
        lambda values, name: levels.as_stored(values, where=name),
        functools.partial(ArraySource, dtype=levels.dtype),
        functools.partial(check_images, wanted=levels.dtype),
    )


_FEATURES = _Kind(
    "features",
    "float32 [N, F] or [N, V, F]",
    1,
    lambda values, name: values,
    FeatureSource,
    check_features,
)


def digits() -> ArraySource:
    """Returns scikit-learn's 1,797 bundled 8x8 handwritten digits as uint8 `[1797, 8, 8, 1]`.

    Gray levels 0..16 are scaled to 0..255. Source: UCI ML hand-written digits (Alpaydin and Kaynak,
    1998), test part.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return ArraySource(images, labels, tuple("0123456789"), name="digits")


def arrays(
    paths: _Paths,
    levels: Levels = Levels(),  # noqa: B008 - it is frozen
    *,
    has_labels: bool = True,
) -> ArraySource:
    """Reads one or several `.npz` or `.npy` files of images as one source, in the given order.

    An `.npz` file holds `images`, `[N, H, W, C]`, and may hold `labels` (integers `[N]`) and
    `class_names` (strings). Other entries are ignored. An `.npy` file holds images, or the labels of
    the `.npy` images before it; one file of labels may follow several files of images. Nothing is
    unpickled.

    Args:
      paths: the files.
      levels: type of the images, and which values are black and white.
      has_labels: whether labels are kept; without, nothing about them is checked.

    Raises:
      FileNotFoundError: a file does not exist.
      TypeError: images are not of this type, or labels are not integers. The message names the file.
      ValueError: a file is damaged, of neither kind or given twice; images are missing or have a
        wrong shape; labels are out of range, have another length or do not follow `.npy` images; or
        the files disagree in image size, class names, or whether they have labels; or a value is
        outside of the range. The message names the file.
    """
    return _joined(paths, _images(levels), has_labels=has_labels)


def features(paths: _Paths, *, has_labels: bool = True) -> FeatureSource:
    """Reads one or several files of features as one source, in the given order.

    `.npz` and `.npy` files are as for `arrays`, with `features`, `[N, F]` or `[N, V, F]`, in the place
    of images. A parquet file has a column `features` of lists of one length, or of lists of such
    lists, and may have a column `labels`; it needs pyarrow. float16 and float64 become float32.

    Args:
      paths: the files.
      has_labels: as for `arrays`.

    Raises:
      FileNotFoundError: a file does not exist.
      TypeError: features are not floating point, or labels are not integers. The message names the
        file.
      ValueError: as for `arrays`, or features are not finite.
    """
    return _joined(paths, _FEATURES, has_labels=has_labels)


def _joined(paths: _Paths, kind: _Kind[_Source], *, has_labels: bool) -> _Source:
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if not paths:
        raise ValueError(f"expected at least one .npz or .npy file of {kind.name}, got none")
    parts = _read_all([to_path(path) for path in paths], kind, has_labels=has_labels)
    first = parts[0]
    for part in parts[1:]:
        _check_fit(first, part, kind.name)
    if len(parts) == 1:
        return first
    labels = [part.labels for part in parts if part.labels is not None]
    return kind.make(
        np.concatenate([part.values for part in parts]),
        np.concatenate(labels) if labels else None,
        first.class_names,
        ", ".join(part.name for part in parts),
    )


def _check_fit(first: InMemory, part: InMemory, what: str) -> None:
    """Raises ValueError if two files cannot be parts of one source."""
    if part.values.shape[1:] != first.values.shape[1:]:
        raise ValueError(
            f"{what} must have one size in all files, got {first.values.shape[1:]} in {first.name} and "
            f"{part.values.shape[1:]} in {part.name}"
        )
    if (part.labels is None) != (first.labels is None):
        with_labels, without = (first, part) if part.labels is None else (part, first)
        raise ValueError(
            f"{with_labels.name} has labels and {without.name} has none; give labels to both or neither"
        )
    if part.class_names != first.class_names:
        raise ValueError(f"class_names differ between {first.name} and {part.name}")


def _read_all(paths: Sequence[Path], kind: _Kind[_Source], *, has_labels: bool) -> list[_Source]:
    wanted = (kind.name, "labels", "class_names") if has_labels else (kind.name,)
    parts: list[_Source] = []
    read: set[Path] = set()
    waiting = False  # whether the last part is an `.npy` file, which labels may follow
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}")
        check = functools.partial(kind.check, where=str(path))
        array = array_files.read_npy(
            path, check=lambda s, d, c=check: c(s, d) if len(s) > kind.label_axes else None
        )
        is_labels = array is not None and array.ndim <= kind.label_axes
        if not is_labels and path.resolve() in read:
            raise ValueError(f"each file may be given once, but these are repeated: {path}")
        read.add(path.resolve())
        if array is None:
            named: Any = {"says": kind.says, "check": check}
            entries = None
            if kind.label_axes == 1:  # features; parquet files of pictures are another source
                entries = array_files.read_parquet(path, wanted[:2], **named)
            if entries is None:
                entries = array_files.read_npz(path, wanted, **named)
            names = array_files.texts(entries.get("class_names"))
            values = kind.stored(entries[kind.name], str(path))
            parts.append(kind.make(values, entries.get("labels"), names, str(path)))
        elif not is_labels:
            parts.append(kind.make(kind.stored(array, str(path)), None, None, str(path)))
        elif waiting:
            last = parts[-1]
            labels = array if has_labels else None
            parts[-1] = kind.make(last.values, labels, None, f"{last.name} with {path}")
        else:
            raise ValueError(
                f"{path} holds labels, but no .npy file of {kind.name} stands right before it. Give "
                f"{kind.name.upper()}.npy, LABELS.npy (its shape is {array.shape})"
            )
        waiting = array is not None and not is_labels
    return parts
