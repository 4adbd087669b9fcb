"""Images in files: folders and lists of paths."""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jevb_jax.images import pictures
from jevb_jax.images.source import check_local

_logger = logging.getLogger(__name__)


class _FileSource:
    """Pictures that are files, read when asked for.

    Attributes:
        paths: one for each image.
        names: paths from the set's own directory on: the same wherever the set lies.
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
            Pillow's antialiased bilinear filter, then the center is cut out. 0 keeps images as they
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
    label is negative, as those of outlier sets are, counts as unlabeled. Pictures become what
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
