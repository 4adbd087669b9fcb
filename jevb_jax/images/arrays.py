"""Images in arrays: `.npz` and `.npy` files, and the digits that scikit-learn brings."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jevb_jax.images import array_files
from jevb_jax.images.source import ArraySource, check_images
from jevb_jax.runs.files import to_path

# Labels have one axis. With two, they are labels of a wrong shape: images have more.
_LABEL_AXES = 2


def digits() -> ArraySource:
    """Returns scikit-learn's 1,797 bundled 8x8 handwritten digits as uint8 `[1797, 8, 8, 1]`.

    Gray levels 0..16 are scaled to 0..255. Source: UCI ML hand-written digits (Alpaydin and Kaynak,
    1998), test part.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return ArraySource(images, labels, tuple("0123456789"), name="digits")


def arrays(paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> ArraySource:
    """Reads one or several `.npz` or `.npy` files as one source, in the given order.

    An `.npz` file holds `images`, uint8 `[N, H, W, C]`, and may hold `labels` (integers `[N]`) and
    `class_names` (strings). Other entries are ignored. An `.npy` file holds images, or the labels of
    the `.npy` images before it. Nothing is unpickled.

    Raises:
      FileNotFoundError: a file does not exist.
      TypeError: images are not uint8, or labels are not integers. The message names the file.
      ValueError: a file is damaged or of neither kind, has no `images` or images of a wrong shape,
        or has labels out of range or of another length; labels do not follow `.npy` images; or the
        files disagree in image size, class names, or whether they have labels. The message names
        the file.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if not paths:
        raise ValueError("expected at least one .npz or .npy file, got none")
    parts = _read_all([to_path(path) for path in paths])
    first = parts[0]
    for part in parts[1:]:
        if part.images.shape[1:] != first.images.shape[1:]:
            raise ValueError(
                f"all images must have one size, got {first.images.shape[1:]} in {first.name} and "
                f"{part.images.shape[1:]} in {part.name}"
            )
        if (part.labels is None) != (first.labels is None):
            with_labels, without = (first, part) if part.labels is None else (part, first)
            raise ValueError(
                f"{with_labels.name} has labels and {without.name} has none; "
                "give labels to both or neither"
            )
        if part.class_names != first.class_names:
            raise ValueError(f"class_names differ between {first.name} and {part.name}")
    if len(parts) == 1:
        return first
    labels = [part.labels for part in parts if part.labels is not None]
    return ArraySource(
        np.concatenate([part.images for part in parts]),
        np.concatenate(labels) if labels else None,
        first.class_names,
        name=", ".join(part.name for part in parts),
    )


def _read_all(paths: Sequence[Path]) -> list[ArraySource]:
    parts: list[ArraySource] = []
    read: set[Path] = set()  # one file of labels may serve several files of images
    waiting = False  # whether the last part is `.npy` images, which labels may follow
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}")
        array = _read_npy(path)
        is_labels = array is not None and array.ndim <= _LABEL_AXES
        if not is_labels and path.resolve() in read:
            raise ValueError(f"each file may be given once, but these are repeated: {path}")
        read.add(path.resolve())
        if array is None:
            parts.append(_read_npz(path))
        elif not is_labels:
            parts.append(ArraySource(array, name=str(path)))
        elif waiting:
            images = parts[-1]
            parts[-1] = ArraySource(images.images, array, name=f"{images.name} with {path}")
        else:
            raise ValueError(
                f"{path} holds labels, but no .npy file of images stands right before it. Give "
                "IMAGES.npy, LABELS.npy"
            )
        waiting = array is not None and not is_labels
    return parts


def _read_npy(path: Path) -> np.ndarray | None:
    """The array of an `.npy` file; None for a file of another kind."""

    def check(shape: tuple[int, ...], dtype: np.dtype) -> None:
        if len(shape) > _LABEL_AXES:
            check_images(shape, dtype, where=str(path))

    return array_files.read_npy(path, check=check)


def _read_npz(path: Path) -> ArraySource:
    entries = array_files.read_npz(
        path,
        ("images", "labels", "class_names"),
        says="uint8 [N, H, W, C]",
        check=lambda shape, dtype: check_images(shape, dtype, where=str(path)),
    )
    names = array_files.texts(entries.get("class_names"))
    return ArraySource(entries["images"], entries.get("labels"), names, name=str(path))
