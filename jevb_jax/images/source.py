"""The interface of a source of images, and checks that every source needs."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from jevb_jax.images.crop_boxes import ExampleCrops
from jevb_jax.images.levels import DTYPES, Dtype
from jevb_jax.runs.files import is_remote, to_path


class ImageSource(Protocol):
    """A set of N labeled or unlabeled images or features of one shape, read by index."""

    @property
    def labels(self) -> np.ndarray | None:
        """Labels, int64 `[N]` in `[0, num_classes(source))`, or None."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One name for each class, or None if they are unknown."""
        ...

    @property
    def name(self) -> str:
        """The name of the source in messages and reports."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """Image `index`, `[H, W, C]` of a type of `levels.DTYPES`; of a `FeatureSource` features."""
        ...


class PictureSource(ImageSource, Protocol):
    """A set of whole pictures in files, of any sizes, out of which crops can be cut."""

    def crops(self, index: int, crops: ExampleCrops) -> list[np.ndarray]:
        """Crops of the whole picture `index`, `[size, size, C]` for each view."""
        ...


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images in memory.

    Attributes:
      images: `[N, H, W, C]` of `dtype`, N >= 1; float32 in [0, 1].
      labels: integers `[N]`, at least 0, and below `len(class_names)` if there are names; kept as
        int64. None for unlabeled images.
      class_names: one name for each class, or None.
      name: the name of the source in messages.
      dtype: type of the images.

    Raises:
      TypeError: images are not of `dtype`, or labels are not integers.
      ValueError: a shape is wrong, there are no images, or labels have another length or are out
        of range.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    name: str = "arrays"
    dtype: Dtype = "uint8"

    def __post_init__(self) -> None:
        check_images(self.images.shape, self.images.dtype, where=self.name, wanted=self.dtype)
        if self.labels is not None:
            labels = checked_labels(
                self.labels, len(self.images), self.class_names, where=self.name
            )
            object.__setattr__(self, "labels", labels)

    @property
    def values(self) -> np.ndarray:
        """The images."""
        return self.images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]


@dataclass(frozen=True, eq=False)
class FeatureSource:
    """Features of a frozen encoder, in memory.

    Attributes:
      features: `[N, F]`, or `[N, V, F]` with V >= 2 views of each example; N >= 1, F >= 1, finite.
        float16 and float64 become float32.
      labels: as for `ArraySource`.
      class_names: one name for each class, or None.
      name: the name of the source in messages.

    Raises:
      TypeError: features are not floating point, or labels are not integers.
      ValueError: a shape is wrong, a value is not finite in float32, or labels have another length
        or are out of range.
    """

    features: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    name: str = "features"

    def __post_init__(self) -> None:
        features = checked_features(self.features, where=self.name)
        object.__setattr__(self, "features", features)
        if self.labels is not None:
            labels = checked_labels(self.labels, len(features), self.class_names, where=self.name)
            object.__setattr__(self, "labels", labels)

    @property
    def values(self) -> np.ndarray:
        """The features."""
        return self.features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.features[index]


# Sources whose array `values` holds all examples.
InMemory = ArraySource | FeatureSource


@dataclass(frozen=True, eq=False)
class Subset:
    """Some examples of another source, in the order of `indices`.

    Attributes:
      source: the other source.
      indices: integers `[M]`, M >= 1, each in `[0, len(source))`; kept as int64.
      has_labels: whether the subset keeps the labels of the source, if there are any.

    Raises:
      TypeError: indices are not integers.
      ValueError: indices are empty, not one axis, or out of range.
    """

    source: ImageSource
    indices: np.ndarray
    has_labels: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", checked_indices(self.indices, len(self.source)))

    @property
    def labels(self) -> np.ndarray | None:
        """Labels, int64 `[M]`, or None."""
        if not self.has_labels:  # those of the source may take minutes to read
            return None
        labels = self.source.labels
        return None if labels is None else labels[self.indices]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The class names of the whole source."""
        return self.source.class_names

    @property
    def name(self) -> str:
        """The name of the whole source."""
        return self.source.name

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.source[int(self.indices[index])]


def num_classes(source: ImageSource) -> int:
    """The number of class names; without names, the largest label plus one.

    Raises:
      ValueError: the source is unlabeled.
    """
    if source.class_names is not None:
        return len(source.class_names)
    if isinstance(source, Subset):  # a subset may lack the last class
        return num_classes(source.source)
    if source.labels is None:
        raise ValueError(f"{source.name} has no labels, so it has no classes")
    return int(source.labels.max()) + 1


def image_shape(source: ImageSource) -> tuple[int, int, int]:
    """`(height, width, channels)` of the first image; all images have this shape."""
    height, width, channels = source[0].shape
    return height, width, channels


def check_has_pictures(source: ImageSource) -> PictureSource:
    """The set of whole pictures that a source, which may be a subset, is taken from.

    Raises:
      TypeError: the source has no picture files.
    """
    while isinstance(source, Subset):
        source = source.source
    # No isinstance: on Python 3.11 it evaluates the property `labels`, which may read all records.
    if not callable(getattr(source, "crops", None)):
        raise TypeError(
            "crops of whole pictures need picture files, as data.source folder, paths, tfds, "
            f"webdataset and hf have them; {source.name} has none. Set augmentation.crop_from to "
            '"square"'
        )
    return cast(PictureSource, source)


def is_of_features(source: ImageSource) -> bool:
    """Whether a source holds features, not images."""
    while isinstance(source, Subset):
        source = source.source
    return isinstance(source, FeatureSource)


def example_bytes(source: ImageSource) -> int:
    """Bytes of one image or of the features of one example."""
    first = source[0]
    return math.prod(first.shape) * first.dtype.itemsize


def check_features(shape: tuple[int, ...], dtype: np.dtype, *, where: str) -> None:
    """Raises an error, with advice, unless the array holds features `[N, F]` or `[N, V, F]`."""
    if dtype not in (np.float16, np.float32, np.float64):
        raise TypeError(
            f"{where}: expected features of type float32 (float16 and float64 are converted), got "
            f"{dtype}; convert them with `.astype(np.float32)`"
        )
    if len(shape) not in (2, 3) or 0 in shape:
        one = "; or, if this is one row, a first axis: `features[None]`" * (len(shape) == 1)
        raise ValueError(
            f"{where}: expected features of shape [N, F], or [N, V, F] with V views of each example, "
            f"got {shape}{one}"
        )
    if len(shape) == 3 and shape[1] < 2:
        raise ValueError(
            f"{where}: features of shape {shape} hold one view of each example; give "
            "`features[:, 0]`, of which views are made by noise and mask"
        )


def checked_features(features: np.ndarray, *, where: str) -> np.ndarray:
    """Features as float32 `[N, F]` or `[N, V, F]`. A wrong shape, type or value is an error."""
    check_features(features.shape, features.dtype, where=where)
    with np.errstate(over="ignore"):  # what is too large for float32 is found below
        features = features.astype(np.float32, copy=False)
    is_finite = np.isfinite(features).all(axis=tuple(range(1, features.ndim)))
    if not is_finite.all():
        row = int(np.argmin(is_finite))
        raise ValueError(
            f"{where}: {np.sum(~is_finite):,} of {len(features):,} rows hold NaN or infinity (in "
            f"float32), the first is row {row}; leave them out"
        )
    return features


def check_images(
    shape: tuple[int, ...], dtype: np.dtype, *, where: str, wanted: Dtype = "uint8"
) -> None:
    """Raises an error, with advice, unless the array holds images `[N, H, W, C]` of a type."""
    if dtype != np.dtype(wanted):
        advice = "scale them to 0..255 and convert them with `.astype(np.uint8)`"
        if dtype.name in DTYPES:
            advice += f', or keep them as they are: data.dtype = "{dtype.name}"'
        if wanted != "uint8":
            advice = f"convert them with `.astype(np.{wanted})`, or change data.dtype"
        raise TypeError(f"{where}: expected {wanted} images, got {dtype}; {advice}")
    if len(shape) == 3:
        one = "; or, if this is one image, a first axis: `images[None]`" * (shape[-1] in (3, 4))
        raise ValueError(
            f"{where}: expected images of shape [N, H, W, C], got {shape}; "
            f"add a channel axis: `images[..., None]`{one}"
        )
    if len(shape) != 4:
        raise ValueError(f"{where}: expected images of shape [N, H, W, C], got {shape}")
    if 0 in shape:
        raise ValueError(f"{where}: no images, the array has shape {shape}")
    _, first, height, width = shape
    # Such shapes are not images: one to four rows, and as many channels as columns or more than 15.
    if first <= 4 < width and (height == width or width > 15):
        raise ValueError(
            f"{where}: expected [N, H, W, C], got shape {shape}. These look like "
            f"{first} x {height} x {width} arrays with the channels first (PyTorch's order); give "
            "`np.moveaxis(images, 1, -1)`"
        )


def checked_labels(
    labels: np.ndarray, num_examples: int, class_names: tuple[str, ...] | None, *, where: str
) -> np.ndarray:
    """Labels as int64 `[N]`. A wrong shape, type or range is an error."""
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        advice = "give `labels.argmax(1)` if they are one-hot"
        if labels.ndim != 2:
            advice = "convert them with `.astype(np.int64)` if they are numbers of classes"
        raise TypeError(f"{where}: expected integer labels, got {labels.dtype}; {advice}")
    if labels.shape != (num_examples,):
        advice = ""
        if labels.ndim == 2 and len(labels) == num_examples:
            advice = "; give `labels.ravel()`"
            if labels.shape[1] != 1:
                advice = "; give `labels.argmax(1)` if they are one-hot"
        raise ValueError(
            f"{where}: expected one label for each of the {num_examples} examples, "
            f"got labels of shape {labels.shape}{advice}"
        )
    limit = np.iinfo(np.int64).max if class_names is None else len(class_names)
    wrong = (labels < 0) | (labels >= limit)
    if wrong.any():
        index = int(np.argmax(wrong))
        allowed = ">= 0" if class_names is None else f"in [0, {limit})"
        raise ValueError(
            f"{where}: label {labels[index]} at index {index} is out of range, expected {allowed}"
        )
    return labels.astype(np.int64)


def checked_indices(indices: np.ndarray, num_examples: int) -> np.ndarray:
    """Indices as int64 `[M]`. A wrong shape, type or range is an error."""
    indices = np.asarray(indices)
    if not np.issubdtype(indices.dtype, np.integer):
        raise TypeError(f"expected integer indices, got {indices.dtype}")
    if indices.ndim != 1 or indices.size == 0:
        raise ValueError(f"expected indices of shape [M], M >= 1, got {indices.shape}")
    if indices.min() < 0 or indices.max() >= num_examples:
        raise ValueError(
            f"expected indices in [0, {num_examples}), got {indices.min()} to {indices.max()}"
        )
    return indices.astype(np.int64)


def local_path(path: str | os.PathLike[str], what: str) -> Path:
    """An absolute path of a file or a folder, as `to_path` understands it; `what` is for messages.

    Raises:
      ValueError: it lies in an object store.
    """
    found = to_path(path)
    if is_remote(found):
        raise ValueError(
            f"{what} are read from file systems only, but {path} is an object store. Use a TFDS "
            "data set or .npz files there, or mount the store"
        )
    return found
