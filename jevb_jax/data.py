"""Image sources, splits, and the order in which training and evaluation see them.

A source is anything with a length, `source[i]` -> uint8 `[H, W, C]`, and labels or None
(`ImageSource`). Images stay uint8 until they are on the device. Everything random here is a pure
function of a seed, computed on the host with NumPy: a training batch is known from its step number
alone (`batch_indices`), so a checkpoint needs to hold nothing about the data.

scikit-learn, Pillow, Grain and TensorFlow Datasets are imported by the functions that need them.
TensorFlow is never imported.
"""

import contextlib
import functools
import importlib
import io
import itertools
import logging
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from jevb_jax import pictures, workers
from jevb_jax.files import is_remote, to_path

_logger = logging.getLogger(__name__)

SOURCES = ("digits", "shapes", "arrays", "folder", "tfds")

# One stream of random bits per purpose: the same seed never gives two of them the same numbers.
_ORDER, _VALIDATION, _TRAIN_SUBSET, _TEST_SUBSET, _DIGITS_TEST, _SHAPES = range(6)

_T = TypeVar("_T")

# What NumPy and zipfile raise on damaged files.
_DAMAGED_ZIP = (ValueError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


class ImageSource(Protocol):
    """A set of N labelled or unlabelled images of one shape, read by index."""

    @property
    def labels(self) -> np.ndarray | None:
        """int64 `[N]` in `[0, num_classes(source))`, or None where there are none."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """One name per class, or None where unknown."""
        ...

    @property
    def name(self) -> str:
        """What to call the source in messages and reports."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns image `index`, uint8 `[H, W, C]`."""
        ...


# --- Sources ---


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images that are already in memory.

    Attributes:
        images: uint8 `[N, H, W, C]`, N >= 1.
        labels: any integer dtype, `[N]`, non-negative and below `len(class_names)` where names are
            given; kept as int64. None for unlabelled images.
        class_names: one name per class, or None.
        name: what to call the source in messages.

    Raises:
        TypeError: images are not uint8, or labels are not integers.
        ValueError: wrong rank, no images, labels of another length or out of range.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    name: str = "arrays"

    def __post_init__(self) -> None:
        _check_images(self.images.shape, self.images.dtype, where=self.name)
        if self.labels is not None:
            labels = _checked_labels(
                self.labels, len(self.images), self.class_names, where=self.name
            )
            object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]


@dataclass(frozen=True, eq=False)
class Subset:
    """Some examples of another source, in the order of `indices`.

    Attributes:
        source: where the images come from.
        indices: integers `[M]`, M >= 1, each in `[0, len(source))`; kept as int64.
        has_labels: whether the labels of the source, if any, are those of the subset.

    Raises:
        TypeError: indices are not integers.
        ValueError: indices are empty, not rank 1, or out of range.
    """

    source: ImageSource
    indices: np.ndarray
    has_labels: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "indices", _checked_indices(self.indices, len(self.source)))

    @property
    def labels(self) -> np.ndarray | None:
        """int64 `[M]`, or None."""
        labels = self.source.labels
        return None if labels is None or not self.has_labels else labels[self.indices]

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


class _FileSource:
    """Pictures that are files, read when asked for.

    Attributes:
        paths: one for each image.
        names: of the files from the set's own directory on: the same wherever the set lies.
        image_size: see `pictures.read`.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        names: Sequence[str],
        *,
        image_size: int,
        max_image_pixels: int,
    ):
        self.name = name
        self.paths = tuple(paths)
        self.names = tuple(names)
        self.image_size = image_size
        self._max_pixels = max_image_pixels
        self.labels: np.ndarray | None = None
        self.class_names: tuple[str, ...] | None = None
        if image_size == 0:
            self._check_equal_sizes()

    def _check_equal_sizes(self) -> None:
        first = None
        for index, path in enumerate(self.paths):
            where = f"image {index}, {path}"
            size = pictures.size(path, max_pixels=self._max_pixels, where=where)
            first = first or size
            if size != first:
                raise ValueError(
                    f"images of differing size: {self.paths[0]} is {first[0]}x{first[1]}, "
                    f"{where} is {size[0]}x{size[1]}; set image_size to resize them on load"
                )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        path = self.paths[index]
        return pictures.read(
            path,
            mode="RGB",
            image_size=self.image_size,
            max_pixels=self._max_pixels,
            where=f"image {index}, {path}",
        )


class FolderSource(_FileSource):
    """Picture files in a directory, read and resized when asked for.

    Two layouts. Class-per-folder: `root/<class>/**/<file>`, labels in the sorted order of the
    folder names. Flat: `root/<file>`, no labels. Read are the endings of `pictures.SUFFIXES`, in
    capitals or not; what colors, transparency and orientation become, says `pictures.read`. Other
    files, hidden ones, and links to folders that are read anyway are left out, and a warning says
    how many there are; other links are followed.

    Args:
        root: the directory.
        image_size: side of the square images, in pixels: the shorter side is brought to it by
            Pillow's antialiased bilinear filter, then the centre is cut out. 0 keeps images as they
            are; their headers are then read once, now, to see that they have the same size.
        class_names: the classes of another folder (the training set's), so that labels mean the
            same here. None takes the folder names.
        max_image_pixels: a picture of more pixels is refused before it is decoded.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: no images, both layouts at once, a class without images, a folder that is not in
            `class_names`, a link to nothing, or images of differing size with `image_size=0`.
            Reading an image raises ValueError with the file's name and index when it cannot be
            decoded.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        image_size: int = 0,
        class_names: tuple[str, ...] | None = None,
        max_image_pixels: int = pictures.MAX_PIXELS,
    ):
        pictures.check_limits(image_size, max_image_pixels)
        _check_local(root, "folders of images")
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"no image directory at {root}")
        listing = pictures.list_folder(root)
        files, classes = listing.files, listing.classes
        remarks = listing.remarks()
        if files and any(classes.values()):
            raise ValueError(
                f"{root} holds images both directly ({len(files)}) and in class folders: "
                "use one folder per class, or a flat folder without labels"
            )
        labels, names = None, None
        for name in classes:
            try:
                name.encode()
            except UnicodeEncodeError as error:  # results could not be written, after the training
                raise ValueError(
                    f"the name of the class folder {name!r} in {root} is no UTF-8: rename it"
                ) from error
        if classes and not files:
            names = tuple(classes) if class_names is None else class_names
            unknown = sorted(set(classes) - set(names))
            if unknown:
                raise ValueError(
                    f"{root} has class folders {unknown} that are not among the known classes "
                    f"{list(names)}"
                )
            empty = [name for name, members in classes.items() if not members]
            if empty:
                raise ValueError(
                    "; ".join([f"class folders without pictures in {root}: {empty}", *remarks])
                    + "; remove or fill them"
                )
            sizes = [len(members) for members in classes.values()]
            numbers = [names.index(name) for name in classes]
            labels = np.repeat(np.asarray(numbers, np.int64), sizes)
            files = [path for members in classes.values() for path in members]
        if not files:
            raise ValueError(
                "; ".join([f"no pictures in {root}", *remarks])
                + f"; expected {root}/<class>/<file> or, unlabelled, {root}/<file>, with endings "
                f"{' '.join(pictures.SUFFIXES)}"
            )
        for remark in remarks:
            _logger.warning("%s: %s", root, remark)
        super().__init__(
            str(root),
            files,
            [path[len(os.path.join(root, "")) :] for path in files],
            image_size=image_size,
            max_image_pixels=max_image_pixels,
        )
        self.labels, self.class_names = labels, names


class ImageListSource(_FileSource):
    """Picture files named, with a label each, by the lines of a text file.

    The format of OpenOOD's benchmark lists: `relative/path.png LABEL` a line. A file of which any
    label is negative, as those of outlier sets are, counts as unlabelled. Pictures become what
    `pictures.read` says; a warning tells of pictures that are named more than once.

    Args:
        list_path: the text file.
        root: directory that its paths start from.
        image_size: as for `FolderSource`.
        max_image_pixels: as for `FolderSource`.

    Raises:
        FileNotFoundError: no such list, or a file of it is missing (the first one is named).
        ValueError: no lines, or a line that is not a path and an integer, with its number; and as
            `FolderSource`.
    """

    def __init__(
        self,
        list_path: str | os.PathLike[str],
        root: str | os.PathLike[str],
        *,
        image_size: int = 0,
        max_image_pixels: int = pictures.MAX_PIXELS,
    ):
        pictures.check_limits(image_size, max_image_pixels)
        _check_local(root, "lists of images")
        if not Path(list_path).is_file():
            raise FileNotFoundError(f"no image list at {list_path}")
        names, labels = [], []
        lines = Path(list_path).read_text(encoding="utf-8-sig").splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name, _, label = line.strip().rpartition(" ")
            if not name or not re.fullmatch(r"-?[0-9]+", label):
                raise ValueError(
                    f"line {number} of {list_path} must be a path and an integer, got {line!r}"
                )
            names.append(name)
            labels.append(int(label))
        if not names:
            raise ValueError(f"{list_path} names no images")
        paths = [os.path.join(root, name) for name in names]
        missing = [path for path in paths if not os.path.isfile(path)]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(paths)} files of {list_path} are missing, the first is "
                f"{missing[0]}"
            )
        repeated = len(names) - len(set(names))
        if repeated:
            _logger.warning(
                "%s: %d lines name a picture that another line names", list_path, repeated
            )
        super().__init__(
            str(list_path), paths, names, image_size=image_size, max_image_pixels=max_image_pixels
        )
        self.labels = None if min(labels) < 0 else np.asarray(labels, np.int64)


class TfdsSource:
    """A split of a prepared TensorFlow Datasets directory, read without TensorFlow.

    Only the array_record format can be read by index, and only from local or mounted directories.
    Images are decoded here, by Pillow: TFDS itself would take OpenCV where that is installed, whose
    JPEG pixels may differ. (TFDS needs importlib_resources too, and declares neither.)

    Args:
        name: as TFDS spells it: `cifar10`, `cifar10:3.0.2`, `imagenet_resized/32x32`. Without a
            version the highest one on disk is taken.
        split: a TFDS split, slices included: `train`, `test`, `train[:10%]`.
        data_dir: the directory above the data set's; empty for TFDS's own (`$TFDS_DATA_DIR`, else
            `~/tensorflow_datasets`).
        image_size: as for `FolderSource`; needed where the data set's images differ in size.
        max_image_pixels: as for `FolderSource`.
        image_key: the feature with the image.
        label_key: the feature with the class label; a data set without it is unlabelled.

    Raises:
        FileNotFoundError: the data set is not there; the message holds the command that makes it.
        ValueError: another file format, unknown split, no such image feature, labels that are not
            class labels, or `image_size=0` where images differ in size. Reading raises ValueError
            with the record's index.
    """

    def __init__(
        self,
        name: str,
        split: str,
        *,
        data_dir: str | os.PathLike[str] = "",
        image_size: int = 0,
        max_image_pixels: int = pictures.MAX_PIXELS,
        image_key: str = "image",
        label_key: str = "label",
    ):
        pictures.check_limits(image_size, max_image_pixels)
        self._arguments: dict[str, Any] = {
            "name": name,
            "split": split,
            "data_dir": data_dir,
            "image_size": image_size,
            "max_image_pixels": max_image_pixels,
            "image_key": image_key,
            "label_key": label_key,
        }
        root = to_path(
            os.path.expanduser(
                data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
            )
        )
        directory = _tfds_directory(name, root)
        # Not an import statement, because TFDS's lazy modules mislead type checkers.
        tfds: Any = importlib.import_module("tensorflow_datasets")
        builder = tfds.builder_from_directory(directory)
        features: dict[str, Any] = dict(builder.info.features.items())
        image: Any = features.get(image_key)
        if not isinstance(image, tfds.features.Image) or np.dtype(image.np_dtype) != np.uint8:
            raise ValueError(
                f"{directory} has no uint8 image feature {image_key!r}; its features are {features}"
            )
        height, width, channels = image.shape
        if channels not in (1, 3, None):
            raise ValueError(f"expected images of 1 or 3 channels in {directory}, got {channels}")
        if image_size == 0 and (height is None or width is None):
            raise ValueError(
                f"the images of {directory} may differ in size: "
                "set image_size to resize them on load"
            )
        label = features.get(label_key)
        if label is not None and not isinstance(label, tfds.features.ClassLabel):
            raise ValueError(f"feature {label_key!r} of {directory} is not a class label: {label}")
        try:
            # The encoded bytes: reading labels then decodes no image.
            self._records: Any = builder.as_data_source(
                split, decoders={image_key: tfds.decode.SkipDecoding()}
            )
        except NotImplementedError as error:
            raise ValueError(
                f"{directory} is stored as {builder.info.file_format}, which cannot be read by "
                "index; remove it, or choose another data_dir, and build it with\n"
                f"  {_tfds_build_command(name, root)}"
            ) from error
        self.name = f"{builder.name}:{builder.version}/{split}"
        self.image_size = image_size
        self.class_names: tuple[str, ...] | None = None if label is None else tuple(label.names)
        self._mode = "L" if channels == 1 else "RGB"
        if len(self._records) == 0:
            raise ValueError(f"{self.name} has no examples")

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes open their own readers: TFDS's builder and features do not travel.
        return functools.partial(TfdsSource, **self._arguments), ()

    @property
    def labels(self) -> np.ndarray | None:
        """int64 `[N]`, or None.

        None too where every label is -1, TFDS's mark for an unlabelled split. The first use reads
        every record once (but decodes no image): minutes for a set of ImageNet's size.
        """
        return self._all_labels

    @functools.cached_property
    def _all_labels(self) -> np.ndarray | None:
        if self.class_names is None:
            return None
        chunk = 4096  # records read together, by TFDS's own threads
        parts = []
        for start in range(0, len(self), chunk):
            records = self._records.__getitems__(range(start, min(start + chunk, len(self))))
            parts += [record[self._arguments["label_key"]] for record in records]
        labels = np.asarray(parts, np.int64)
        if (labels == -1).all():
            return None
        return _checked_labels(labels, len(self), self.class_names, where=self.name)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.name}, which has {len(self)}")
        return pictures.read(
            io.BytesIO(self.encoded(index)),
            mode=self._mode,
            image_size=self.image_size,
            max_pixels=self._arguments["max_image_pixels"],
            where=self._where(index),
        )

    def encoded(self, index: int) -> bytes:
        """Returns image `index` as it is stored."""
        try:
            return self._records[index][self._arguments["image_key"]]
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"cannot read {self._where(index)}: {error}") from error

    def _where(self, index: int) -> str:
        return f"record {index} of {self.name}"


@dataclass(frozen=True, eq=False, kw_only=True)
class ShapesSource(ArraySource):
    """Procedural images whose labels are uncertain by a known amount; made by `shapes`.

    Attributes:
        label_probabilities: float32 `[N, 10]`, the distribution each label was drawn from. It has
            mass on at most two classes: `1 - ambiguity / 2` and `ambiguity / 2`.
        ambiguity: float32 `[N]` in [0, 1]; 0 is certain, 1 is an even choice between two classes.
    """

    label_probabilities: np.ndarray
    ambiguity: np.ndarray


def num_classes(source: ImageSource) -> int:
    """Returns the number of class names, or, without names, the largest label plus one.

    Raises:
        ValueError: the source is unlabelled.
    """
    if source.class_names is not None:
        return len(source.class_names)
    if isinstance(source, Subset):  # a subset may lack the last class
        return num_classes(source.source)
    if source.labels is None:
        raise ValueError(f"{source.name} has no labels, so it has no classes")
    return int(source.labels.max()) + 1


def image_shape(source: ImageSource) -> tuple[int, int, int]:
    """Returns `(height, width, channels)` of the first image, and so of every one."""
    height, width, channels = source[0].shape
    return height, width, channels


def digits() -> ArraySource:
    """Returns scikit-learn's 1,797 bundled 8x8 handwritten digits as uint8 `[1797, 8, 8, 1]`.

    Grey levels 0..16 are scaled to 0..255. Source: UCI ML hand-written digits (Alpaydin and Kaynak,
    1998), test part.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return ArraySource(images, labels, tuple("0123456789"), name="digits")


def arrays(paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> ArraySource:
    """Reads one or several `.npz` files as one source, in the order given.

    Each file holds `images` uint8 `[N, H, W, C]`, optionally `labels` (integers `[N]`) and
    `class_names` (strings); other entries are ignored. Nothing is unpickled.

    Raises:
        FileNotFoundError: no such file.
        TypeError: images are not uint8 or labels are not integers; the message names the file.
        ValueError: anything else that is wrong, naming the file: not an npz or a damaged one, no
            `images`, wrong rank, empty, labels out of range or of another length, or files that
            disagree in image size, in having labels, or in class names.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if not paths:
        raise ValueError("expected at least one .npz file, got none")
    real = [to_path(path).resolve() for path in paths]
    repeated = sorted({str(path) for path in real if real.count(path) > 1})
    if repeated:
        raise ValueError(f"files given more than once: {repeated}; their images would be doubled")
    parts = [_read_npz(to_path(path)) for path in paths]
    first = parts[0]
    for part in parts[1:]:
        if part.images.shape[1:] != first.images.shape[1:]:
            raise ValueError(
                f"images of differing size: {first.images.shape[1:]} in {first.name}, "
                f"{part.images.shape[1:]} in {part.name}"
            )
        if (part.labels is None) != (first.labels is None):
            with_labels, without = (first, part) if part.labels is None else (part, first)
            raise ValueError(
                f"{with_labels.name} has labels and {without.name} has none: "
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


def _read_npz(path: Path) -> ArraySource:
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    with _damage_named(path), path.open("rb") as stream:
        magic = np.lib.format.MAGIC_PREFIX
        if stream.read(len(magic)) == magic:
            raise ValueError("it holds a single array; save it by `np.savez(path, images=array)`")
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as file:
            keys = file.files
            wanted = [key for key in ("images", "labels", "class_names") if key in keys]
            headers = {key: _entry_header(file.zip, key) for key in wanted}
    # Before memory is taken, which other types need much of.
    if "images" in headers and not headers["images"][1].hasobject:
        _check_images(*headers["images"], where=str(path))
    with (
        _damage_named(path),
        path.open("rb") as stream,
        np.load(stream, allow_pickle=False) as file,
    ):
        entries = {key: file[key] for key in wanted}
    if "images" not in entries:
        raise ValueError(
            f"{path} has no entry `images` (uint8 [N, H, W, C]); its entries are {keys}"
        )
    names = entries.get("class_names")
    if names is not None:
        names = tuple(
            item.decode() if isinstance(item, bytes) else str(item) for item in names.tolist()
        )
    return ArraySource(entries["images"], entries.get("labels"), names, name=str(path))


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED_ZIP as error:
        raise ValueError(f"{path} cannot be read as an .npz file: {error}") from error
    except MemoryError as error:
        raise ValueError(
            f"there is no memory for the arrays of {path} ({error}): give fewer images, or a folder of "
            "pictures or a TFDS set, which need not be in memory together"
        ) from error


def _entry_header(archive: zipfile.ZipFile, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an entry; refuses one that claims more than there is, before it is read."""
    name = key if key in archive.namelist() else f"{key}.npy"
    entry = archive.getinfo(name)
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format
        shape, _, dtype = (
            read.read_array_header_1_0(stream)
            if version == (1, 0)
            else read.read_array_header_2_0(stream)
        )
        held = entry.file_size - stream.tell()
    claimed = math.prod(shape) * dtype.itemsize
    # Deflate makes a byte of at most 1032; what is stored as it is has its own size.
    possible = entry.compress_size * (1032 if entry.compress_type == zipfile.ZIP_DEFLATED else 1)
    if not dtype.hasobject and (claimed > held or entry.file_size > possible > 0):
        raise ValueError(
            f"its entry `{key}` claims {claimed:,} bytes, an array of shape {shape}, and holds at most "
            f"{min(held, possible):,}: it is damaged"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if claimed > memory:
        raise MemoryError(f"{key} needs {claimed:,} bytes of {memory:,}")
    return shape, dtype


# --- Procedural shapes ---

_SHAPE_NAMES = ("disc", "square", "triangle", "ring", "cross")
_TEXTURE_NAMES = ("plain", "striped")
_SHAPE_CLASSES = tuple(f"{texture} {shape}" for shape in _SHAPE_NAMES for texture in _TEXTURE_NAMES)


def shapes(num_examples: int, *, seed: int, image_size: int = 32) -> ShapesSource:
    """Draws coloured shapes with a ground truth for the uncertainty of their labels.

    Ten classes: disc, square, triangle, ring or cross, each plain or striped. Position, size,
    rotation, colours, stripes and the background's gradient are nuisances. Every image is the
    pixelwise mean of two classes drawn with the same nuisances, with weights `1 - ambiguity / 2`
    and `ambiguity / 2`, and its label is one of the two drawn with these probabilities: no
    classifier can know it better than `label_probabilities`. Half the images have ambiguity exactly
    0; in the others it is uniform on (0, 1), so that the best possible accuracy is 0.875 on
    average.

    Image `i` is a pure function of `(seed, i)`, whatever `num_examples`. The random bits are the
    same everywhere; pixels may differ by one grey level between machines whose floating-point
    libraries round differently.

    Args:
        num_examples: how many images, at least 1.
        seed: non-negative integer.
        image_size: side in pixels, at least 8.

    Returns:
        images uint8 `[num_examples, image_size, image_size, 3]`, labels, and the two arrays of
        `ShapesSource`.

    Raises:
        ValueError: `num_examples` or `image_size` too small.
    """
    if num_examples < 1 or image_size < 8:
        raise ValueError(
            f"expected num_examples >= 1 and image_size >= 8, got {num_examples} and {image_size}"
        )
    # Whole blocks only, cut to length at the end: an image is always computed at the same place of
    # an array of the same shape, so that vectorised loops cannot round it differently.
    block = max(1, 2**18 // image_size**2)
    num_blocks = -(-num_examples // block)
    columns = 21  # uniform numbers an image uses
    bits = _random_bits(num_blocks * block * columns, seed, _SHAPES)
    uniform = ((bits >> np.uint64(11)) * 2.0**-53).reshape(num_blocks, block, columns)
    parts = [_draw_shapes(draws, image_size) for draws in uniform]
    images, labels, probabilities, ambiguity = (
        np.concatenate(arrays)[:num_examples] for arrays in zip(*parts, strict=True)
    )
    return ShapesSource(
        images,
        labels,
        _SHAPE_CLASSES,
        "shapes",
        label_probabilities=probabilities,
        ambiguity=ambiguity,
    )


def _draw_shapes(
    uniform: np.ndarray, image_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images, labels, label probabilities and ambiguity from uniform numbers `[block, 21]`."""
    rows = np.arange(len(uniform))
    # In float64: float32 rounds the largest uniform numbers to 1, which is no class.
    first = (uniform[:, 0] * 10).astype(np.int64)
    second = (first + 1 + (uniform[:, 1] * 9).astype(np.int64)) % 10
    u = iter(uniform[:, 2:].astype(np.float32).T)
    ambiguity = np.maximum(0, 2 * next(u) - 1)
    labels = np.where(next(u) < ambiguity / 2, second, first)
    probabilities = np.zeros((len(uniform), 10), np.float32)
    probabilities[rows, first] = 1 - ambiguity / 2
    probabilities[rows, second] = ambiguity / 2

    # Geometry in pixels around the shape's centre; every shape fits in a circle of this radius.
    radius = image_size * (0.24 + 0.14 * next(u))
    centre_x = radius + (image_size - 2 * radius) * next(u)
    centre_y = radius + (image_size - 2 * radius) * next(u)
    angle, phase = 2 * np.pi * next(u), next(u)
    period = _per_image(image_size * (0.14 + 0.06 * next(u)))
    pixel = np.arange(image_size, dtype=np.float32) + 0.5
    x = pixel[None, None, :] - _per_image(centre_x)
    y = pixel[None, :, None] - _per_image(centre_y)
    cos, sin = _per_image(np.cos(angle)), _per_image(np.sin(angle))
    across, along = cos * x + sin * y, cos * y - sin * x

    # A light shape before a linear gradient of two dark colours, or the negative of that.
    colours = [
        _hsv_to_rgb(next(u), 0.5 + 0.5 * next(u), 0.7 + 0.3 * next(u)),
        _hsv_to_rgb(next(u), 0.8 * next(u), 0.4 * next(u)),
        _hsv_to_rgb(next(u), 0.8 * next(u), 0.4 * next(u)),
    ]
    negative = next(u)[:, None] < 0.5
    plain, corner_1, corner_2 = (
        np.where(negative, 1 - colour, colour)[:, None, None, :] for colour in colours
    )
    slope = 2 * np.pi * next(u)
    centred = (pixel / image_size - 0.5) / math.sqrt(2)
    gradient = (
        0.5
        + _per_image(np.cos(slope)) * centred[None, None, :]
        + _per_image(np.sin(slope)) * centred[None, :, None]
    )[..., None]
    background = corner_1 * (1 - gradient) + corner_2 * gradient

    # Stripes of the complementary colour; coverage from the distance to the nearest edge.
    wave = np.mod(across / period + _per_image(phase), 1)
    stripe = np.clip(0.5 + (np.abs(wave - 0.5) - 0.25) * period, 0, 1)[..., None]
    striped = plain * (1 - stripe) + (1 - plain) * stripe

    masks = _shape_masks(across, along, _per_image(radius))
    image = np.zeros_like(background)
    for which, weight in ((first, 1 - ambiguity / 2), (second, ambiguity / 2)):
        mask = masks[which // 2, rows][..., None]
        texture = np.where(_per_image(which % 2 == 1)[..., None], striped, plain)
        image += _per_image(weight)[..., None] * (background + mask * (texture - background))
    images = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return images, labels, probabilities, ambiguity


def _shape_masks(x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Antialiased coverage `[5, block, H, W]` by each shape at coordinates `[block, H, W]`, pixels.

    A pixel whose centre lies `d` outside the edge is covered by `clip(1/2 - d, 0, 1)`: exact for
    straight edges along the grid, within a few grey levels otherwise.
    """
    distance = np.sqrt(x * x + y * y)
    abs_x, abs_y = np.abs(x), np.abs(y)
    half_width, arm = 0.28 * radius, 0.95 * radius
    outside = (
        distance - 0.8 * radius,
        np.maximum(abs_x, abs_y) - 0.7 * radius,
        np.maximum(y, math.sqrt(0.75) * abs_x - 0.5 * y) - 0.5 * radius,
        np.abs(distance - 0.72 * radius) - 0.2 * radius,
        np.minimum(
            np.maximum(abs_x - half_width, abs_y - arm), np.maximum(abs_x - arm, abs_y - half_width)
        ),
    )
    return np.clip(0.5 - np.stack(outside), 0, 1)


def _per_image(values: np.ndarray) -> np.ndarray:
    """One value per image, `[block]`, shaped to meet `[block, H, W]`."""
    return values[:, None, None]


def _hsv_to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Colours `[n, 3]` in [0, 1] from hue, saturation and value `[n]` in [0, 1]."""
    sector = np.mod(hue[:, None] * 6 + np.array([5, 3, 1], np.float32), 6)
    fall = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return value[:, None] * (1 - saturation[:, None] * fall)


# --- Train, validation and test ---


class Dataset(NamedTuple):
    """The three parts of a data set.

    Attributes:
        train: what the encoder is trained on.
        validation: held out of the training images: for every choice that is made.
        test: for the final numbers only; None where the data are unlabelled and no test images
            were given.
        outside: test images of the classes that were left out of all three, or None.
    """

    train: ImageSource
    validation: ImageSource
    test: ImageSource | None
    outside: ImageSource | None = None


def load_dataset(
    *,
    source: str,
    train_paths: Sequence[str] = (),
    test_paths: Sequence[str] = (),
    tfds_name: str = "",
    data_dir: str = "",
    train_split: str = "train",
    test_split: str = "test",
    image_size: int = 0,
    max_image_pixels: int = pictures.MAX_PIXELS,
    num_train_examples: int = 0,
    num_test_examples: int = 0,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
    inlier_class: int = -1,
) -> Dataset:
    """Loads a data set and holds out its validation part.

    The validation part is `validation_fraction` of all training images, stratified by label where
    there are labels. It follows from `split_seed`, never touches the test images, and does not
    change with `num_train_examples` (but for `shapes`, which draws as many images as it needs).

    Args:
        source: `digits`, `shapes`, `arrays`, `folder` or `tfds`. For `digits` a stratified 20% are
            the test images.
        train_paths: `.npz` files for `arrays`, one directory for `folder`.
        test_paths: likewise.
        tfds_name: see `TfdsSource`.
        data_dir: see `TfdsSource`; for `tfds` only.
        train_split: TFDS split of the training images.
        test_split: TFDS split of the test images; empty for none.
        image_size: side in pixels of the images of `folder` and `tfds`, which are resized on load,
            and of `shapes` (0: 32). 0 keeps images as they are. Images in memory are not resized:
            they must have this size.
        max_image_pixels: pictures of `folder` and `tfds` that have more pixels are refused before they
            are decoded.
        num_train_examples: how many images remain for training, a stratified choice by
            `split_seed`; 0 for all (`shapes`: 9,000).
        num_test_examples: likewise for the test images (`shapes`: 2,000).
        validation_fraction: share of the training images held out, in (0, 1).
        split_seed: non-negative integer.
        inlier_class: the one class to train on (one-class detection): the other classes' test images
            become `outside`, and the labels of the rest, all equal, are dropped; numbers of examples
            count all classes. -1: all classes.

    Raises:
        ValueError: unknown source, a fraction outside (0, 1) or that leaves a part empty, more
            examples asked for than there are, labelled data without a test part, a test part that
            is the training part, or training and test images that differ in size, channels, classes
            or in having labels. Also whatever the source itself raises.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown data source {source!r}; expected one of {', '.join(SOURCES)}")
    if not 0 < validation_fraction < 1:
        raise ValueError(f"expected validation_fraction in (0, 1), got {validation_fraction}")
    pictures.check_limits(image_size, max_image_pixels)
    if isinstance(train_paths, str) or isinstance(test_paths, str):
        raise ValueError("train_paths and test_paths are sequences of paths, not one string")
    if num_train_examples < 0 or num_test_examples < 0:
        raise ValueError(
            "expected num_train_examples and num_test_examples >= 0 (0 for all), "
            f"got {num_train_examples} and {num_test_examples}"
        )
    train: ImageSource
    test: ImageSource | None
    match source:
        case "digits":
            everything = digits()
            chosen = _stratified(everything, round(0.2 * len(everything)), split_seed, _DIGITS_TEST)
            train = Subset(everything, _complement(chosen, len(everything)))
            test = Subset(everything, chosen)
        case "shapes":
            # Enough for num_train_examples to remain; odd and even seeds keep train and test apart.
            num_train_examples = num_train_examples or 9_000
            total = math.ceil(num_train_examples / (1 - validation_fraction))
            train = shapes(total, seed=2 * split_seed, image_size=image_size or 32)
            test = shapes(
                num_test_examples or 2_000, seed=2 * split_seed + 1, image_size=image_size or 32
            )
        case "arrays":
            _check_paths_apart(train_paths, test_paths)
            train = arrays(train_paths)
            test = arrays(test_paths) if test_paths else None
        case "folder":
            if len(train_paths) != 1 or len(test_paths) > 1:
                raise ValueError(
                    "source 'folder' takes one directory in train_paths and at most one in "
                    f"test_paths, got {list(train_paths)} and {list(test_paths)}"
                )
            _check_paths_apart(train_paths, test_paths)
            sizes: dict[str, Any] = {"image_size": image_size, "max_image_pixels": max_image_pixels}
            train = FolderSource(train_paths[0], **sizes)
            test = (
                FolderSource(test_paths[0], class_names=train.class_names, **sizes)
                if test_paths
                else None
            )
        case _:
            if not tfds_name:
                raise ValueError("source 'tfds' needs tfds_name, for example 'cifar10'")
            if train_split == test_split:
                raise ValueError(f"train_split and test_split are both {train_split!r}")
            read = functools.partial(
                TfdsSource,
                tfds_name,
                data_dir=data_dir,
                image_size=image_size,
                max_image_pixels=max_image_pixels,
            )
            train = read(train_split)
            test = read(test_split) if test_split else None
    _check_train_and_test(train, test, image_size)

    held_out = round(validation_fraction * len(train))
    if not 0 < held_out < len(train):
        raise ValueError(
            f"validation_fraction={validation_fraction} of {len(train)} training images of "
            f"{train.name} holds out {held_out}: choose one that leaves both parts non-empty"
        )
    chosen = _stratified(train, held_out, split_seed, _VALIDATION)
    validation = Subset(train, chosen)
    train = Subset(train, _complement(chosen, len(train)))
    train = _limited(train, num_train_examples, split_seed, _TRAIN_SUBSET)
    if test is not None:
        test = _limited(test, num_test_examples, split_seed, _TEST_SUBSET)
    outside = None
    if inlier_class >= 0:
        train, validation = (_of_class(part, inlier_class) for part in (train, validation))
        if test is None or test.labels is None:
            raise ValueError(f"inlier_class={inlier_class} needs labelled test images")
        outside = Subset(test, np.flatnonzero(test.labels != inlier_class))
        test = _of_class(test, inlier_class)
    return Dataset(train, validation, test, outside)


def _of_class(source: ImageSource, label: int) -> Subset:
    """The images of one class, without their labels."""
    if source.labels is None or not np.any(source.labels == label):
        raise ValueError(f"inlier_class={label}: {source.name} has no images with that label")
    return Subset(source, np.flatnonzero(source.labels == label), has_labels=False)


def load_images(
    *,
    source: str,
    paths: Sequence[str] = (),
    tfds_name: str = "",
    data_dir: str = "",
    split: str = "test",
    image_size: int = 0,
    max_image_pixels: int = pictures.MAX_PIXELS,
    exclude_labels: Sequence[int] = (),
    num_examples: int = 0,
    split_seed: int = 0,
) -> ImageSource:
    """Loads one set of images, for instance one that is out of distribution.

    Args:
        source: `arrays`, `folder`, `tfds` or `image_list`.
        paths: `.npz` files for `arrays`, one directory for `folder`, the list and the directory that
            its paths start from for `image_list`.
        tfds_name: see `TfdsSource`.
        data_dir: see `TfdsSource`.
        split: of `tfds`.
        image_size: side in pixels that images read from files are resized to; 0 keeps them.
        max_image_pixels: pictures in files that have more pixels are refused before they are decoded.
        exclude_labels: classes to leave out, for instance those of the training set.
        num_examples: a stratified choice by `split_seed`; 0 for all.
        split_seed: non-negative integer.

    Raises:
        ValueError: unknown source, the wrong number of paths, classes to exclude from unlabelled
            images, nothing left. Also whatever the source itself raises.
    """
    images: ImageSource
    sizes: dict[str, Any] = {"image_size": image_size, "max_image_pixels": max_image_pixels}
    match source:
        case "arrays":
            images = arrays(paths)
        case "folder":
            if len(paths) != 1:
                raise ValueError(f"source 'folder' takes one directory in paths, got {list(paths)}")
            images = FolderSource(paths[0], **sizes)
        case "image_list":
            if len(paths) != 2:
                raise ValueError(
                    f"source 'image_list' takes a list and a directory in paths, got {list(paths)}"
                )
            images = ImageListSource(paths[0], paths[1], **sizes)
        case "tfds":
            images = TfdsSource(tfds_name, split, data_dir=data_dir, **sizes)
        case _:
            raise ValueError(
                f"unknown source {source!r}; expected arrays, folder, image_list or tfds"
            )
    if len(exclude_labels):
        if images.labels is None:
            raise ValueError(f"{images.name} has no labels: no class can be excluded")
        images = Subset(images, np.flatnonzero(~np.isin(images.labels, list(exclude_labels))))
    return _limited(images, num_examples, split_seed, _TEST_SUBSET)


def _check_paths_apart(train_paths: Sequence[str], test_paths: Sequence[str]) -> None:
    train, test = ([to_path(path).resolve() for path in p] for p in (train_paths, test_paths))
    shared = set(train) & set(test)
    if shared:
        raise ValueError(f"in both train_paths and test_paths: {sorted(map(str, shared))}")
    for inner, outer in [*itertools.product(train, test), *itertools.product(test, train)]:
        if inner.is_relative_to(outer):
            raise ValueError(
                f"{inner} lies in {outer}, so the one's images would be the other's too: give "
                "train_paths and test_paths that lie side by side"
            )


def _check_train_and_test(train: ImageSource, test: ImageSource | None, image_size: int) -> None:
    shape = image_shape(train)
    if image_size and shape[:2] != (image_size, image_size):
        raise ValueError(
            f"{train.name} has {shape[0]}x{shape[1]} images and image_size is {image_size}; images "
            "in memory are not resized: set image_size to 0 or prepare them at that size"
        )
    if test is None:
        if train.labels is not None:
            raise ValueError(
                f"{train.name} is labelled but has no test images; give test_paths or test_split "
                "(a test set is never cut from the training images)"
            )
        return
    if image_shape(test) != shape:
        raise ValueError(
            f"training images are {shape} in {train.name}, "
            f"test images are {image_shape(test)} in {test.name}"
        )
    if (train.labels is None) != (test.labels is None):
        labelled, unlabelled = (train, test) if test.labels is None else (test, train)
        raise ValueError(f"{labelled.name} has labels and {unlabelled.name} has none")
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
            f"{num_examples} examples asked for, but {source.name} has only {len(source)} "
            "for this part"
        )
    if num_examples in (0, len(source)):
        return source
    return Subset(source, _stratified(source, num_examples, seed, purpose))


def _stratified(source: ImageSource, count: int, seed: int, purpose: int) -> np.ndarray:
    """Sorted int64 `[count]`: every class in proportion, by largest remainders."""
    order = _permutation(len(source), seed, purpose)
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


# --- Order ---


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns the number of whole batches in an epoch; what remains of its order is dropped.

    Raises:
        ValueError: `batch_size` is below 1 or above `num_examples`.
    """
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    if batch_size > num_examples:
        raise ValueError(
            f"batch_size {batch_size} is larger than the {num_examples} training examples: "
            "choose a smaller batch"
        )
    return num_examples // batch_size


def batch_indices(step: int, *, num_examples: int, batch_size: int, seed: int) -> np.ndarray:
    """Returns the examples of training step `step`, a pure function of its arguments.

    Epoch `step // steps_per_epoch` has its own permutation of all examples, a pure function of
    `(seed, epoch)`; no example comes twice in an epoch, and the few that are dropped at its end
    differ from epoch to epoch. The permutation sorts Philox's raw 64-bit output, which NumPy
    guarantees not to change (it gives no guarantee for `Generator.permutation`), so that a run
    resumes in the same order on another machine or NumPy version.

    Args:
        step: number of the step, from 0.
        num_examples: size of the training set.
        batch_size: number of examples in a step.
        seed: non-negative integer.

    Returns:
        int32 `[batch_size]`.

    Raises:
        ValueError: negative step, or as `steps_per_epoch`.
    """
    if step < 0:
        raise ValueError(f"expected step >= 0, got {step}")
    epoch, position = divmod(step, steps_per_epoch(num_examples, batch_size))
    order = _epoch_order(num_examples, seed, epoch)
    return order[position * batch_size : (position + 1) * batch_size].copy()


@functools.lru_cache(maxsize=2)  # two, because prefetching straddles the border of epochs
def _epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return _permutation(num_examples, seed, _ORDER, epoch).astype(np.int32)


def _permutation(num_examples: int, seed: int, *purpose: int) -> np.ndarray:
    return np.argsort(_random_bits(num_examples, seed, *purpose), kind="stable")


def _random_bits(count: int, seed: int, *purpose: int) -> np.ndarray:
    """uint64 `[count]`; a longer call begins with the same numbers as a shorter one."""
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=purpose)).random_raw(count)


# --- Batches ---


def gather(source: ImageSource, indices: np.ndarray) -> np.ndarray:
    """Returns the images at integer `indices` `[B]` as uint8 `[B, H, W, C]`.

    Raises:
        TypeError: indices are not integers.
        ValueError: indices are empty, not rank 1 or out of range, or images differ in size.
    """
    indices = _checked_indices(indices, len(source))
    while isinstance(source, Subset):
        source, indices = source.source, source.indices[indices]
    if isinstance(source, ArraySource):
        return source.images[indices]
    images = [source[int(index)] for index in indices]
    for index, image in zip(indices, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"images of differing size in {source.name}: image {indices[0]} is "
                f"{images[0].shape}, image {index} is {image.shape}; set image_size to resize them on "
                "load"
            )
    return np.stack(images)


def fits_resident(source: ImageSource, *, limit_bytes: int) -> bool:
    """Says whether the images of `source` take at most `limit_bytes` as uint8."""
    return len(source) * math.prod(image_shape(source)) <= limit_bytes


def load_resident(source: ImageSource) -> np.ndarray:
    """Returns all images as uint8 `[N, H, W, C]`, to be put on the device once.

    An `ArraySource` gives its own array, not a copy; files are decoded by 16 threads.
    """
    if isinstance(source, ArraySource):
        return source.images
    if _in_memory(source):
        return gather(source, np.arange(len(source)))
    images = np.empty((len(source), *image_shape(source)), np.uint8)
    start = 0
    for batch, mask in evaluation_batches(source, 64, prefetch_batches=16):
        stop = start + int(mask.sum())
        images[start:stop] = batch[: stop - start]
        start = stop
    return images


def stream_batches(
    source: ImageSource,
    *,
    start_step: int,
    num_steps: int,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    prefetch_batches: int = 4,
    rows: slice = slice(None),
) -> workers.ReadAhead[np.ndarray]:
    """Reads the batches of `num_steps` steps from `start_step` on ahead of their use, by Grain.

    The pipeline runs over step numbers, each mapped to `gather(source, batch_indices(step, ...))`:
    the images are exactly those of a resident data set, from any step, whatever the number of
    workers.

    Args:
        source: where the images come from. With workers it is copied into each of them, so keep
            images in memory to `num_workers=0`.
        start_step: first step, at least 0.
        num_steps: number of batches, at least 1.
        batch_size: examples per batch.
        seed: of the order, see `batch_indices`.
        num_workers: worker processes; 0 reads in up to 16 threads of this process, which is enough
            where decoding dominates (Pillow lets go of the interpreter lock). The caller's main
            module must be importable without doing its work, as always with processes that are
            spawned: a script needs `if __name__ == "__main__":`.
        prefetch_batches: batches read ahead, by each worker or by this process, at least 1.
        rows: of every batch, those to read: a process's own share.

    Returns:
        An iterator of uint8 `[batch_size, H, W, C]`, or as many as `rows` are. Closing it (or its
        end) stops threads and workers.

    Raises:
        ValueError: arguments out of range; while iterating, whatever reading an image raises.
        WorkerError: while iterating, a worker process could not start or was killed.
    """
    steps_per_epoch(len(source), batch_size)
    if start_step < 0 or num_steps < 1:
        raise ValueError(
            f"expected start_step >= 0 and num_steps >= 1, got {start_step} and {num_steps}"
        )
    read = functools.partial(_read_step, source=source, batch_size=batch_size, seed=seed, rows=rows)
    return _read_ahead(read, start_step, start_step + num_steps, num_workers, prefetch_batches)


def _read_step(
    step: int, *, source: ImageSource, batch_size: int, seed: int, rows: slice
) -> np.ndarray:
    indices = batch_indices(step, num_examples=len(source), batch_size=batch_size, seed=seed)
    return gather(source, indices[rows])


def evaluation_batches(
    source: ImageSource,
    batch_size: int,
    *,
    num_workers: int = 0,
    prefetch_batches: int = 4,
    rows: slice = slice(None),
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Visits every example exactly once, in order, in batches of one size.

    Args:
        source: where the images come from.
        batch_size: examples per batch, at least 1; may exceed the number of examples.
        num_workers: as for `stream_batches`; images in memory are read directly.
        prefetch_batches: as for `stream_batches`.
        rows: as for `stream_batches`; the mask is of the whole batch all the same.

    Returns:
        An iterator of images uint8 `[batch_size, H, W, C]` and mask bool `[batch_size]`, False
        where the last batch was filled up with zeros.

    Raises:
        ValueError: arguments out of range; while iterating, whatever reading an image raises.
    """
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    num_batches = -(-len(source) // batch_size)
    read = functools.partial(_read_padded, source=source, batch_size=batch_size, rows=rows)
    if _in_memory(source):
        return map(read, range(num_batches))
    return _read_ahead(read, 0, num_batches, num_workers, prefetch_batches)


def _read_padded(
    batch: int, *, source: ImageSource, batch_size: int, rows: slice
) -> tuple[np.ndarray, np.ndarray]:
    whole = np.arange(batch * batch_size, (batch + 1) * batch_size)
    mask = whole < len(source)
    asked = whole[rows]
    indices = asked[asked < len(source)]
    # A process's share of the last batch may be all padding.
    images = np.empty((0, *image_shape(source)), np.uint8)
    if len(indices):
        images = gather(source, indices)
    if len(indices) < len(asked):
        padding = np.zeros((len(asked) - len(indices), *images.shape[1:]), np.uint8)
        images = np.concatenate([images, padding])
    return images, mask


def _in_memory(source: ImageSource) -> bool:
    while isinstance(source, Subset):
        source = source.source
    return isinstance(source, ArraySource)


def _read_ahead(
    read: Callable[[int], _T], start: int, stop: int, num_workers: int, prefetch_batches: int
) -> workers.ReadAhead[_T]:
    """Gives `read(start), ..., read(stop - 1)`, computed ahead by threads or by processes."""
    if num_workers < 0 or prefetch_batches < 1:
        raise ValueError(
            "expected num_workers >= 0 and prefetch_batches >= 1, "
            f"got {num_workers} and {prefetch_batches}"
        )
    workers.check_not_starting()
    import grain
    from absl import flags

    steps = grain.MapDataset.range(start, stop)
    if num_workers == 0:
        threads = min(prefetch_batches, 16)
        pipeline = steps.map(read).to_iter_dataset(grain.ReadOptions(threads, prefetch_batches))
        return workers.ReadAhead(iter(pipeline), num_workers)
    # Grain reads this flag of its own before it starts a worker, and absl refuses the flags of a
    # program that does not parse any. Marked as given, it has its default; the program's own flags
    # stay as they are.
    profiling = "grain_enable_multiprocess_worker_profiling"
    if profiling in flags.FLAGS:
        flags.FLAGS[profiling].present = True
    carried = workers.Carried(read)
    pipeline = (
        steps.map(carried)
        .to_iter_dataset(grain.ReadOptions(1, 1))
        .mp_prefetch(
            grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=prefetch_batches),
            worker_init_fn=workers.start_worker,
        )
    )
    return workers.ReadAhead(iter(pipeline), num_workers, carried)


# --- Reading and checking ---


def _check_images(shape: tuple[int, ...], dtype: np.dtype, *, where: str) -> None:
    if dtype != np.uint8:
        raise TypeError(
            f"{where}: expected uint8 images, got {dtype}; "
            "scale them to 0..255 and convert them with `.astype(np.uint8)`"
        )
    if len(shape) == 3:
        one = "; or, where this is one image, a first axis: `images[None]`" * (shape[-1] in (3, 4))
        raise ValueError(
            f"{where}: expected images of shape [N, H, W, C], got {shape}; "
            f"add a channel axis: `images[..., None]`{one}"
        )
    if len(shape) != 4:
        raise ValueError(f"{where}: expected images of shape [N, H, W, C], got {shape}")
    if 0 in shape:
        raise ValueError(f"{where}: no images, the array has shape {shape}")
    _, first, height, width = shape
    # Images of one to four rows and as many channels as columns, or more than fifteen, are none.
    if first <= 4 < width and (height == width or width > 15):
        raise ValueError(
            f"{where}: these look like {first} x {height} x {width} arrays with the channels first "
            f"([N, C, H, W], PyTorch's order), got shape {shape}; expected [N, H, W, C]: give "
            "`np.moveaxis(images, 1, -1)`"
        )


def _checked_labels(
    labels: np.ndarray, num_examples: int, class_names: tuple[str, ...] | None, *, where: str
) -> np.ndarray:
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        advice = "give `labels.argmax(1)`, if they are one-hot"
        if labels.ndim != 2:
            advice = "convert them with `.astype(np.int64)`, if they are numbers of classes"
        raise TypeError(f"{where}: expected integer labels, got {labels.dtype}; {advice}")
    if labels.shape != (num_examples,):
        advice = ""
        if labels.ndim == 2 and len(labels) == num_examples:
            advice = "; give `labels.ravel()`"
            if labels.shape[1] != 1:
                advice = "; give `labels.argmax(1)`, if they are one-hot"
        raise ValueError(
            f"{where}: expected one label for each of the {num_examples} images, "
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


def _checked_indices(indices: np.ndarray, num_examples: int) -> np.ndarray:
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


def _check_local(root: str | os.PathLike[str], what: str) -> None:
    if is_remote(to_path(root)):
        raise ValueError(
            f"{what} are read from file systems, and {root} is an object store: take a TFDS data set "
            "or .npz files there, or mount the store"
        )


def _tfds_directory(name: str, root: Path) -> Path:
    """The directory of data set `name`, highest version on disk unless the name says which."""
    base, _, version = name.partition(":")
    found = [
        path
        for path in (root / base).glob(version or "*")
        if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / "dataset_info.json").is_file()
    ]
    if not found:
        raise FileNotFoundError(
            f"no prepared TFDS data set {name!r} in {root}; make it with\n"
            f"  {_tfds_build_command(name, root)}\n"
            "which needs TensorFlow once (`pip install .[prepare]`); reading does not"
        )
    return max(found, key=lambda path: [int(part) for part in path.name.split(".")])


def _tfds_build_command(name: str, root: Path) -> str:
    return f"tfds build {name} --file_format=array_record --data_dir={root}"
