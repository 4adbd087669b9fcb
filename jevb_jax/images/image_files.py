"""Images in files: folders, and lists of paths."""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jevb_jax.images import pictures
from jevb_jax.images.crop_boxes import ExampleCrops
from jevb_jax.images.source import check_local

_logger = logging.getLogger(__name__)


class _FileSource:
    """Pictures in files, each read when it is asked for.

    Attributes:
      paths: one for each image.
      names: paths relative to the directory of the set, so they do not change if it is moved.
      image_size: size of the square to cut out, in pixels; 0 keeps images as they are.
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
                    f"all images must have one size, but {self.paths[0]} is {first[0]}x{first[1]} and "
                    f"{where} is {size[0]}x{size[1]}; set image_size to resize them when they are read"
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

    def crops(self, index: int, crops: ExampleCrops) -> list[np.ndarray]:
        """Crops of the whole picture `index`, uint8 `[size, size, 3]` for each view."""
        path = self.paths[index]
        return pictures.read_crops(
            path,
            crops,
            mode="RGB",
            max_pixels=self._max_pixels,
            where=f"image {index}, {path}",
        )


class FolderSource(_FileSource):
    """Picture files in a directory, each read and resized when it is asked for.

    There are two layouts. Class folders: `root/<class>/**/<file>`, with labels in the sorted order
    of the folder names. Flat: `root/<file>`, without labels. Only files with an ending in
    `pictures.SUFFIXES`, in any case, are read; `pictures.read` says what becomes of colors,
    transparency and orientation. Other files, hidden files, and links to folders that are read
    anyway are left out, and a warning gives their numbers. Other links are followed.

    Args:
      root: the directory.
      image_size: height and width of the square images, in pixels. The shorter side is resized to
        it by Pillow's antialiased bilinear filter, then the center is cut out. 0 keeps images as
        they are; their headers are then read at once, to check that all have the same size.
      class_names: classes of another folder (the training set), so that labels mean the same
        here. None takes the folder names.
      max_image_pixels: a picture with more pixels is an error, before it is decoded.

    Raises:
      FileNotFoundError: there is no such directory.
      ValueError: there are no images, both layouts are mixed, a class is empty or not in
        `class_names`, a link leads nowhere, or images differ in size with `image_size=0`. Reading
        an image that cannot be decoded raises ValueError with its file name and index.
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
        check_local(root, "folders of images")
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
            except UnicodeEncodeError as error:  # writing results would fail, after the training
                raise ValueError(
                    f"the name of the class folder {name!r} in {root} is not valid UTF-8; rename it"
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
                + f"; expected {root}/<class>/<file> or, unlabeled, {root}/<file>, with endings "
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
    """Picture files that a text file lists, each with a label.

    The format is that of OpenOOD's benchmark lists, one line `relative/path.png LABEL` for each
    picture. If any label is negative, as in lists of outliers, the whole set counts as unlabeled.
    Pictures are read by `pictures.read`. A warning tells if pictures are listed more than once.

    Args:
      list_path: the text file.
      root: the directory that its paths are relative to.
      image_size: as for `FolderSource`.
      max_image_pixels: as for `FolderSource`.

    Raises:
      FileNotFoundError: the list does not exist, or files that it names (the message has the
        first).
      ValueError: the list is empty, or a line is not a path and an integer (the message has its
        number). Also for the reasons of `FolderSource`.
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
        check_local(root, "lists of images")
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
                f"{len(missing)} of the {len(paths)} files in {list_path} do not exist, for example "
                f"{missing[0]}"
            )
        repeated = len(names) - len(set(names))
        if repeated:
            _logger.warning(
                "%s: %d lines name a picture that another line names too", list_path, repeated
            )
        super().__init__(
            str(list_path), paths, names, image_size=image_size, max_image_pixels=max_image_pixels
        )
        self.labels = None if min(labels) < 0 else np.asarray(labels, np.int64)
