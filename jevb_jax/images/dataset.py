"""Loads the training, validation and test examples that a config describes."""

import functools
import itertools
import math
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple, Unpack

import numpy as np

from jevb_jax.images import decoding
from jevb_jax.images.arrays import arrays, digits, features
from jevb_jax.images.encoded import EncodedPictures, Reading, without_broken
from jevb_jax.images.image_files import FolderSource, ImageListSource, PathListSource
from jevb_jax.images.levels import Dtype, Levels
from jevb_jax.images.random_bits import (
    DIGITS_TEST,
    TEST_SUBSET,
    TRAIN_SUBSET,
    VALIDATION,
    permutation,
)
from jevb_jax.images.shapes import shapes
from jevb_jax.images.shards import ShardSource
from jevb_jax.images.source import (
    ImageSource,
    Subset,
    image_shape,
    is_of_features,
    num_classes,
)
from jevb_jax.images.tables import TableSource
from jevb_jax.images.tfds import TfdsSource
from jevb_jax.runs.files import to_path

# Sources of encoded pictures, of any sizes, out of which crops can be cut.
PICTURE_SOURCES = ("folder", "paths", "tfds", "webdataset", "hf")
SOURCES = ("digits", "shapes", "arrays", "features", *PICTURE_SOURCES)
# Sources of one set alone, such as an outside set.
OUTSIDE_SOURCES = ("arrays", "features", "image_list", *PICTURE_SOURCES)


class Dataset(NamedTuple):
    """The parts of a data set.

    Attributes:
      train: images that the encoder is trained on.
      validation: images held out of the training images; every choice is made on them.
      test: images for the final numbers only. None if the data are unlabeled and no test images
        were given.
      outside: for detection of left-out classes, test images of these classes; otherwise None.
      outside_validation: validation images of these classes; None also if there are none.
    """

    train: ImageSource
    validation: ImageSource
    test: ImageSource | None
    outside: ImageSource | None = None
    outside_validation: ImageSource | None = None


def load_dataset(
    *,
    source: str,
    train_paths: Sequence[str] = (),
    test_paths: Sequence[str] = (),
    tfds_name: str = "",
    data_dir: str = "",
    train_split: str = "train",
    test_split: str = "test",
    image_column: str = "image",
    label_column: str = "label",
    image_size: int = 0,
    max_image_pixels: int = decoding.MAX_PIXELS,
    exif: decoding.Exif = "apply",
    skip_broken: Literal["refuse", "skip"] = "refuse",
    labels: Literal["given", "none"] = "given",
    num_channels: int = 0,
    dtype: Dtype = "uint8",
    value_range: tuple[float, ...] = (),
    num_train_examples: int = 0,
    num_test_examples: int = 0,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
    inlier_class: int = -1,
    inlier_classes: Sequence[int] = (),
) -> Dataset:
    """Loads a data set and holds out its validation part.

    The validation part is `validation_fraction` of all training images, stratified by label if
    there are labels. It depends on `split_seed`, never contains test images, and does not change
    with `num_train_examples` (except for `shapes`, which draws as many images as it needs).

    Args:
      source: `digits`, `shapes`, `arrays`, `features`, `folder`, `paths`, `tfds`, `webdataset` or
        `hf`. For `digits` the test images are a stratified 20%.
      train_paths: `.npz` or `.npy` files for `arrays` and `features`, one directory for `folder`,
        one text or CSV file for `paths`, tar files or patterns for `webdataset`; one directory
        of `save_to_disk`, or parquet or Arrow files, for `hf`.
      test_paths: the same for the test images.
      tfds_name: name of the data set, as for `TfdsSource`.
      data_dir: directory of TFDS data sets, as for `TfdsSource`.
      train_split: TFDS split of the training images.
      test_split: TFDS split of the test images; empty for none.
      image_column: `hf`: name of the column of pictures.
      label_column: `hf`: name of the column of labels; empty for none.
      image_size: height and width in pixels. Encoded pictures (`PICTURE_SOURCES`) are resized to it
        when they are read; `shapes` are drawn at it (0: 32). 0 keeps the images as they are. Images
        in memory are not resized and must have this size.
      max_image_pixels: an encoded picture with more pixels is an error, before it is decoded.
      exif: whether the orientation in EXIF is applied or ignored.
      skip_broken: `refuse`: the first encoded picture that cannot be read is an error, when it is
        read. `skip`: all are decoded at the start, and those that cannot be read are left out with
        a warning.
      labels: `none` ignores all labels; folders are then no classes.
      num_channels: of encoded pictures, see `Reading`; arrays must have this number. 0 for any.
      dtype: type of the pixels of arrays and pictures.
      value_range: values of black and white, as for `Levels`.
      num_train_examples: number of images that remain for training, a stratified choice by
        `split_seed`; 0 for all (`shapes`: 9,000).
      num_test_examples: the same for the test images (`shapes`: 2,000).
      validation_fraction: share of the training images that is held out, in (0, 1).
      split_seed: non-negative integer.
      inlier_class: the only class to train on, for one-class detection; -1 for all classes. The
        test images of the other classes become `outside`, and their validation images
        `outside_validation`. The remaining labels are all equal and are dropped. Numbers of
        examples count all classes.
      inlier_classes: the only classes to train on; empty for all classes. The other classes are
        outside as with `inlier_class`, but labels are kept.

    Raises:
      ValueError: an argument is unknown or out of range, a part would be empty, there are fewer
        examples than asked for, labeled data have no test part, training and test part are the
        same, or they differ in size, channels, classes or having labels. Also for the reasons of
        the source itself.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown data source {source!r}; expected one of {', '.join(SOURCES)}")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"expected validation_fraction in (0, 1), got {validation_fraction}")
    decoding.check_limits(image_size, max_image_pixels)
    if isinstance(train_paths, str) or isinstance(test_paths, str):
        raise ValueError("train_paths and test_paths must be sequences of paths, not one string")
    if num_train_examples < 0 or num_test_examples < 0:
        raise ValueError(
            "expected num_train_examples and num_test_examples >= 0 (0 for all), "
            f"got {num_train_examples} and {num_test_examples}"
        )
    train: ImageSource
    test: ImageSource | None
    has_labels, is_skipping = labels == "given", skip_broken == "skip"
    reading: Reading = {
        "image_size": image_size,
        "max_image_pixels": max_image_pixels,
        "exif": exif,
        "num_channels": num_channels,
        "levels": Levels(dtype, value_range),
        "skip_broken": is_skipping,
    }
    match source:
        case "digits":
            everything = digits()
            chosen = _stratified(everything, round(0.2 * len(everything)), split_seed, DIGITS_TEST)
            train = Subset(everything, _complement(chosen, len(everything)))
            test = Subset(everything, chosen)
        case "shapes":
            # Enough that num_train_examples remain. Odd and even seeds keep train and test apart.
            num_train_examples = num_train_examples or 9_000
            total = math.ceil(num_train_examples / (1 - validation_fraction))
            train = shapes(total, seed=2 * split_seed, image_size=image_size or 32)
            test = shapes(
                num_test_examples or 2_000, seed=2 * split_seed + 1, image_size=image_size or 32
            )
        case "tfds":
            if not tfds_name:
                raise ValueError("source 'tfds' needs tfds_name, for example 'cifar10'")
            if train_split == test_split:
                raise ValueError(f"train_split and test_split are both {train_split!r}")
            read = functools.partial(
                TfdsSource, tfds_name, data_dir=data_dir, has_labels=has_labels, **reading
            )
            train = read(train_split)
            test = read(test_split) if test_split else None
        case _:
            _check_paths_apart(train_paths, test_paths)
            columns = image_column, label_column if has_labels else ""
            read = functools.partial(
                _of_paths, source, has_labels=has_labels, columns=columns, **reading
            )
            train = read(train_paths, where="train_paths")
            test = read(test_paths, where="test_paths", like=train) if test_paths else None
            _check_files_apart(train, test)
    train = _usable(train, has_labels=has_labels, skip_broken=is_skipping)
    if test is not None:
        test = _usable(test, has_labels=has_labels, skip_broken=is_skipping)
    channels = train[0].shape[-1]
    if num_channels not in (0, channels):
        raise ValueError(f"num_channels = {num_channels}, but {train.name} has {channels} channels")
    _check_train_and_test(train, test, image_size)

    held_out = round(validation_fraction * len(train))
    if not 0 < held_out < len(train):
        raise ValueError(
            f"validation_fraction={validation_fraction} of {len(train)} training images of "
            f"{train.name} holds out {held_out}; choose one that leaves both parts non-empty"
        )
    chosen = _stratified(train, held_out, split_seed, VALIDATION)
    validation = Subset(train, chosen)
    train = Subset(train, _complement(chosen, len(train)))
    train = _limited(train, num_train_examples, split_seed, TRAIN_SUBSET)
    if test is not None:
        test = _limited(test, num_test_examples, split_seed, TEST_SUBSET)
    whole = Dataset(train, validation, test)
    if inlier_class >= 0 and len(inlier_classes):
        raise ValueError(
            f"inlier_class={inlier_class} and inlier_classes={tuple(inlier_classes)} exclude each "
            "other; set one of them"
        )
    if inlier_class >= 0:
        return _with_outside(whole, [inlier_class], f"inlier_class={inlier_class}", False)
    if len(inlier_classes):
        name = f"inlier_classes={tuple(inlier_classes)}"
        return _with_outside(whole, inlier_classes, name, True)
    return whole


def _with_outside(whole: Dataset, classes: Sequence[int], name: str, has_labels: bool) -> Dataset:
    """The images of some classes; test and validation images of the others are outside."""

    def inside(source: ImageSource) -> Subset:
        labels = np.zeros(0, np.int64) if source.labels is None else source.labels
        missing = sorted(set(classes) - set(labels.tolist()))
        if missing:
            what = "that label" if len(classes) == 1 else f"the labels {missing}"
            raise ValueError(f"{name}: {source.name} has no images with {what}")
        rows = np.flatnonzero(np.isin(labels, list(classes)))
        return Subset(source, rows, has_labels=has_labels)

    train, validation = inside(whole.train), inside(whole.validation)
    if whole.test is None or whole.test.labels is None:
        raise ValueError(f"{name} needs labeled test images")

    def rest(source: ImageSource) -> Subset | None:
        labels = np.zeros(0, np.int64) if source.labels is None else source.labels
        rows = np.flatnonzero(~np.isin(labels, list(classes)))
        return Subset(source, rows) if len(rows) else None

    outside = rest(whole.test)
    if outside is None:
        raise ValueError(f"{name}: {whole.test.name} has no images of other classes")
    return Dataset(train, validation, inside(whole.test), outside, rest(whole.validation))


def load_images(
    *,
    source: str,
    paths: Sequence[str] = (),
    tfds_name: str = "",
    data_dir: str = "",
    split: str = "test",
    image_column: str = "image",
    label_column: str = "label",
    image_size: int = 0,
    max_image_pixels: int = decoding.MAX_PIXELS,
    exif: decoding.Exif = "apply",
    num_channels: int = 0,
    levels: Levels = Levels(),  # noqa: B008 - it is frozen
    rows: Sequence[int] = (),
    exclude_labels: Sequence[int] = (),
    num_examples: int = 0,
    split_seed: int = 0,
) -> ImageSource:
    """Loads one set of images, for example one that is out of distribution.

    Args:
      source: one of `OUTSIDE_SOURCES`.
      paths: as `train_paths` of `load_dataset`; for `image_list` the list, and the directory that its
        paths are relative to.
      tfds_name: name of the data set, as for `TfdsSource`.
      data_dir: directory of TFDS data sets, as for `TfdsSource`.
      split: TFDS split.
      image_column: `hf`: name of the column of pictures.
      label_column: `hf`: name of the column of labels; empty for none.
      image_size: images from files are resized to this height and width in pixels; 0 keeps them.
      max_image_pixels: a picture in a file with more pixels is an error, before it is decoded.
      exif: whether the orientation in EXIF is applied or ignored.
      num_channels: of encoded pictures, see `Reading`. Arrays keep theirs.
      levels: type of the pixels.
      rows: the first row to keep and the first after it; all rows by default.
      exclude_labels: classes to leave out, for example those of the training set.
      num_examples: number of images, a stratified choice by `split_seed`; 0 for all.
      split_seed: non-negative integer.

    Raises:
      ValueError: the source is unknown, the number of paths is wrong, there are no such rows, classes
        are excluded from unlabeled images, or nothing is left. Also for the reasons of the source
        itself.
    """
    images: ImageSource
    reading: Reading = {
        "image_size": image_size,
        "max_image_pixels": max_image_pixels,
        "exif": exif,
        "num_channels": num_channels,
        "levels": levels,
    }
    match source:
        case "image_list":
            if len(paths) != 2:
                raise ValueError(
                    f"source 'image_list' takes a list and a directory in paths, got {list(paths)}"
                )
            images = ImageListSource(paths[0], paths[1], **reading)
        case "tfds":
            images = TfdsSource(tfds_name, split, data_dir=data_dir, **reading)
        case _:
            if source not in OUTSIDE_SOURCES:
                raise ValueError(
                    f"unknown source {source!r}; expected one of {', '.join(OUTSIDE_SOURCES)}"
                )
            columns = image_column, label_column
            images = _of_paths(source, paths, where="paths", columns=columns, **reading)
    if len(rows):
        if len(rows) != 2 or not 0 <= rows[0] < rows[1] <= len(images):
            raise ValueError(
                f"rows must be a first row and the first after the last, of the {len(images):,} images "
                f"of {images.name}, got {list(rows)}"
            )
        images = Subset(images, np.arange(*rows))
    if len(exclude_labels):
        if images.labels is None:
            raise ValueError(f"{images.name} has no labels, so no class can be excluded")
        kept = np.flatnonzero(~np.isin(images.labels, list(exclude_labels)))
        if not len(kept):
            raise ValueError(
                f"exclude_labels={tuple(exclude_labels)} leaves none of the {len(images):,} images "
                f"of {images.name}"
            )
        images = Subset(images, kept)
    return _limited(images, num_examples, split_seed, TEST_SUBSET)


def _of_paths(
    source: str,
    paths: Sequence[str],
    *,
    where: str,
    has_labels: bool = True,
    columns: tuple[str, str] = ("image", "label"),
    like: ImageSource | None = None,
    **reading: Unpack[Reading],
) -> ImageSource:
    """Opens a set that paths name.

    Args:
      source: what the paths name.
      paths: the paths.
      where: the setting that holds the paths, for messages.
      has_labels: whether labels are read, and folders are classes.
      columns: of pictures and of labels, for tables.
      like: the training set, so that labels mean the same; None for a set of its own.
      **reading: how pictures are read.
    """
    if source == "arrays":
        return arrays(paths, reading.get("levels", Levels()), has_labels=has_labels)
    if source == "features":
        return features(paths, has_labels=has_labels)
    if source == "webdataset":
        return ShardSource(paths, like=like, has_labels=has_labels, **reading)
    if source == "hf":
        return TableSource(
            paths, image_column=columns[0], label_column=columns[1], like=like, **reading
        )
    if len(paths) != 1:
        what = "directory" if source == "folder" else "text or CSV file"
        raise ValueError(f"source {source!r} takes one {what} in {where}, got {list(paths)}")
    if source == "folder":
        names = None if like is None else like.class_names
        return FolderSource(paths[0], class_names=names, has_classes=has_labels, **reading)
    return PathListSource(paths[0], like=like, has_labels=has_labels, **reading)


def _usable(source: ImageSource, *, has_labels: bool, skip_broken: bool) -> ImageSource:
    """A source without its labels, or without pictures that cannot be read, if so asked."""
    if skip_broken and isinstance(source, EncodedPictures):
        source = without_broken(source)
    return source if has_labels else Subset(source, np.arange(len(source)), has_labels=False)


def _check_files_apart(train: ImageSource, test: ImageSource | None) -> None:
    """Raises ValueError if both sets read the same file of pictures."""
    if not isinstance(train, EncodedPictures) or not isinstance(test, EncodedPictures):
        return
    shared = set(map(os.path.abspath, train.files)) & set(map(os.path.abspath, test.files))
    if shared:
        raise ValueError(
            f"{len(shared):,} files are both in {train.name} and in {test.name}, for example "
            f"{min(shared)}; test images must not be trained on"
        )


def _check_paths_apart(train_paths: Sequence[str], test_paths: Sequence[str]) -> None:
    train, test = ([to_path(path).resolve() for path in p] for p in (train_paths, test_paths))
    shared = set(train) & set(test)
    if shared:
        raise ValueError(f"in both train_paths and test_paths: {sorted(map(str, shared))}")
    for inner, outer in [*itertools.product(train, test), *itertools.product(test, train)]:
        if inner.is_relative_to(outer):
            raise ValueError(
                f"{inner} lies in {outer}, so both would contain the same images; give train_paths "
                "and test_paths that do not contain each other"
            )


def _check_train_and_test(train: ImageSource, test: ImageSource | None, image_size: int) -> None:
    shape = train[0].shape if is_of_features(train) else image_shape(train)
    if image_size and shape[:2] != (image_size, image_size):
        raise ValueError(
            f"{train.name} has {shape[0]}x{shape[1]} images, but image_size is {image_size}; images "
            "in memory are not resized, so set image_size to 0 or prepare them at that size"
        )
    if test is None:
        if train.labels is not None:
            raise ValueError(
                f"{train.name} has labels but no test images; give test_paths or test_split "
                "(a test set is never cut from the training images)"
            )
        return
    if test[0].shape != shape:
        what = "examples" if is_of_features(train) else "images"
        raise ValueError(
            f"training {what} are {shape} in {train.name}, test {what} are {test[0].shape} in "
            f"{test.name}"
        )
    if (train.labels is None) != (test.labels is None):
        labeled, unlabeled = (train, test) if test.labels is None else (test, train)
        raise ValueError(f"{labeled.name} has labels and {unlabeled.name} has none")
    if train.labels is None or test.labels is None:
        return
    if train.class_names is not None and test.class_names not in (None, train.class_names):
        raise ValueError(f"class_names differ between {train.name} and {test.name}")
    if test.labels.max() >= num_classes(train):
        raise ValueError(
            f"label {test.labels.max()} of {test.name} is out of range: "
            f"{train.name} has {num_classes(train)} classes"
        )


def _limited(source: ImageSource, num_examples: int, seed: int, purpose: int) -> ImageSource:
    """A stratified choice of `num_examples`, or everything for 0."""
    if num_examples > len(source):
        raise ValueError(
            f"{num_examples} examples were asked for, but {source.name} has only {len(source)} "
            "for this part"
        )
    if num_examples in (0, len(source)):
        return source
    return Subset(source, _stratified(source, num_examples, seed, purpose))


def _stratified(source: ImageSource, count: int, seed: int, purpose: int) -> np.ndarray:
    """Sorted int64 `[count]` with every class in proportion, by largest remainders."""
    order = permutation(len(source), seed, purpose)
    if source.labels is None:
        return np.sort(order[:count])
    _, sizes = np.unique(source.labels, return_counts=True)
    quota, remainder = np.divmod(sizes * count, len(source))
    quota[np.argsort(-remainder, kind="stable")[: count - quota.sum()]] += 1
    by_class = order[np.argsort(source.labels[order], kind="stable")]
    rank = np.arange(len(source)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(by_class[rank < np.repeat(quota, sizes)])


def _complement(indices: np.ndarray, num_examples: int) -> np.ndarray:
    return np.setdiff1d(np.arange(num_examples), indices)
