"""Features of a frozen encoder in `.npz` and `.npy` files."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jevb_jax.images import array_files
from jevb_jax.images.source import FeatureSource
from jevb_jax.runs.files import to_path


def features(paths: Sequence[str | os.PathLike[str]]) -> FeatureSource:
    """Reads one or several `.npz` or `.npy` files as one source, in the given order.

    An `.npz` file holds `features`, `[N, F]` or `[N, V, F]`, and may hold `labels` (integers `[N]`)
    and `class_names` (strings). Other entries are ignored. An `.npy` file holds features, or with
    one axis the labels of the `.npy` features before it. float16 and float64 become float32.
    Nothing is unpickled.

    Raises:
      FileNotFoundError: a file does not exist.
      TypeError: features are not floating point, or labels are not integers. The message names the
        file.
      ValueError: a file is damaged, of neither kind or given twice; features are missing, have a
        wrong shape or are not finite; labels are out of range, have another length or do not follow
        features; or the files disagree in shape, class names, or whether they have labels. The
        message names the file.
    """
    if not paths:
        raise ValueError("expected at least one .npz or .npy file of features, got none")
    parts = _read_all([to_path(path) for path in paths])
    first = parts[0]
    for part in parts[1:]:
        if part.features.shape[1:] != first.features.shape[1:]:
            raise ValueError(
                "features of each example must have one shape, got "
                f"{first.features.shape[1:]} in {first.name} and {part.features.shape[1:]} in "
                f"{part.name}"
            )
        if (part.labels is None) != (first.labels is None):
            with_labels, without = (first, part) if part.labels is None else (part, first)
            raise ValueError(
                f"{with_labels.name} has labels and {without.name} has none; give labels to both or "
                "neither"
            )
        if part.class_names != first.class_names:
            raise ValueError(f"class_names differ between {first.name} and {part.name}")
    if len(parts) == 1:
        return first
    labels = [part.labels for part in parts if part.labels is not None]
    return FeatureSource(
        np.concatenate([part.features for part in parts]),
        np.concatenate(labels) if labels else None,
        first.class_names,
        name=", ".join(part.name for part in parts),
    )


def _read_all(paths: Sequence[Path]) -> list[FeatureSource]:
    parts: list[FeatureSource] = []
    read: set[Path] = set()
    waiting = False  # whether the last part is `.npy` features, which labels may follow
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}")
        if path.resolve() in read:
            raise ValueError(f"each file may be given once, but this is repeated: {path}")
        read.add(path.resolve())
        # What is checked before memory is taken is enough here: `FeatureSource` checks the rest.
        array = array_files.read_npy(path, check=lambda shape, dtype: None)
        if array is None:
            parts.append(_read_npz(path))
            waiting = False
        elif array.ndim != 1:
            parts.append(FeatureSource(array, name=str(path)))
            waiting = True
        elif waiting:
            last = parts[-1]
            name = f"{last.name} with {path}"
            parts[-1] = FeatureSource(last.features, array, name=name)
            waiting = False
        else:
            raise ValueError(
                f"{path} has one axis, so it holds labels, but no .npy file of features stands right "
                "before it. Give FEATURES.npy, LABELS.npy; one row of features needs `features[None]`"
            )
    return parts


def _read_npz(path: Path) -> FeatureSource:
    entries = array_files.read_npz(
        path,
        ("features", "labels", "class_names"),
        says="float32 [N, F] or [N, V, F]",
        check=lambda shape, dtype: None,
    )
    names = array_files.texts(entries.get("class_names"))
    return FeatureSource(entries["features"], entries.get("labels"), names, name=str(path))
