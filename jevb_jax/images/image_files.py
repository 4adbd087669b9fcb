"""Images in files: folders, and lists of paths."""

import csv
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Unpack

import numpy as np

from jevb_jax.images import decoding
from jevb_jax.images.encoded import EncodedPictures, Reading
from jevb_jax.images.folder_listing import list_folder
from jevb_jax.images.label_texts import labels_of_texts
from jevb_jax.images.source import ImageSource, local_path

_logger = logging.getLogger(__name__)


class _Row(NamedTuple):
    """A picture in a list: the number of its line, its path, and its label, which may be empty."""

    line: int
    name: str
    label: str


class FileSource(EncodedPictures):
    """Pictures in files.

    Attributes:
      paths: one for each image.
      names: paths relative to the directory of the set, so they do not change if it is moved.
    """

    def __init__(
        self, name: str, paths: Sequence[str], names: Sequence[str], **reading: Unpack[Reading]
    ):
        super().__init__(name, **reading)
        self.paths = tuple(paths)
        self.names = tuple(names)
        self._check_opened()

    @property
    def files(self) -> Sequence[str]:
        """The pictures themselves."""
        return self.paths

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> str:
        """Path of picture `index`."""
        return self.paths[index]

    def where(self, index: int) -> str:
        """The name of picture `index` in messages."""
        return f"image {index}, {self.paths[index]}"


class FolderSource(FileSource):
    """Picture files in a directory, each read and resized when it is asked for.

    There are two layouts. Class folders: `root/<class>/**/<file>`, with labels in the sorted order
    of the folder names. Flat: `root/<file>`, without labels. With `has_classes=False` there are no
    labels, and pictures lie at any depth. Only files with an ending in `decoding.SUFFIXES`, in any
    case, are read; `decoding.read` says what becomes of colors, transparency and orientation. Other
    files, hidden files, and links to folders that are read anyway are left out, and a warning gives
    their numbers. Other links are followed.

    Args:
      root: the directory.
      class_names: classes of another folder (the training set), so that labels mean the same
        here. None takes the folder names.
      has_classes: whether folders are classes.
      **reading: see `Reading`.

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
        class_names: tuple[str, ...] | None = None,
        has_classes: bool = True,
        **reading: Unpack[Reading],
    ):
        root = local_path(root, "folders of images")
        if not root.is_dir():
            raise FileNotFoundError(f"no image directory at {root}")
        listing = list_folder(root)
        files, classes = listing.files, listing.classes
        remarks = listing.remarks(has_classes=has_classes)
        if not has_classes:
            files = [*files, *(path for members in classes.values() for path in members)]
            classes = {}
        if files and any(classes.values()):
            raise ValueError(
                f"{root} holds images both directly ({len(files)}) and in class folders: use one folder "
                'per class, or data.labels = "none", which takes all of them without labels'
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
                f"{' '.join(decoding.SUFFIXES)}"
            )
        for remark in remarks:
            _logger.warning("%s: %s", root, remark)
        start = len(os.path.join(root, ""))
        super().__init__(
            str(root),
            files,
            [path[start:] for path in files],
            **reading,
        )
        self._labels, self.class_names = labels, names


class _ListedFiles(FileSource):
    """Picture files whose names stand in a text file. A warning tells of names that are repeated."""

    def __init__(
        self,
        list_path: Path,
        root: Path,
        rows: Sequence[_Row],
        **reading: Unpack[Reading],
    ):
        if not rows:
            raise ValueError(f"{list_path} names no images")
        names = [row.name for row in rows]
        paths = [os.path.join(root, name) for name in names]
        missing = [number for number, path in enumerate(paths) if not os.path.isfile(path)]
        if missing:
            first = missing[0]
            raise FileNotFoundError(
                f"{len(missing):,} of the {len(paths):,} files in {list_path} do not exist, for example "
                f"{paths[first]} (line {rows[first].line})"
            )
        repeated = len(names) - len(set(names))
        if repeated:
            _logger.warning(
                "%s: %d lines name a picture that another line names too", list_path, repeated
            )
        super().__init__(str(list_path), paths, names, **reading)


class ImageListSource(_ListedFiles):
    """Picture files that a text file lists, each with a label, as in OpenOOD's benchmark.

    A line is `relative/path.png LABEL`. If any label is negative, as in lists of outliers, the whole
    set counts as unlabeled.

    Args:
      list_path: the text file.
      root: the directory that its paths are relative to.
      **reading: see `Reading`.

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
        **reading: Unpack[Reading],
    ):
        list_path, root = (local_path(path, "lists of images") for path in (list_path, root))
        rows = []
        for number, line in _lines(list_path):
            name, _, label = line.strip().rpartition(" ")
            if not name or not re.fullmatch(r"-?[0-9]+", label):
                raise ValueError(
                    f"line {number} of {list_path} must be a path and an integer, got {line!r}"
                )
            rows.append(_Row(number, name, label))
        super().__init__(list_path, root, rows, **reading)
        labels = np.asarray([int(row.label) for row in rows], np.int64)
        self._labels = None if labels.min() < 0 else labels


class PathListSource(_ListedFiles):
    """Picture files that a text or CSV file lists, with or without labels.

    Paths are absolute, or relative to the directory of the list. Empty lines are left out.

    * A CSV file (`.csv`) has the columns path and label, or path alone. If the first row holds the
      word `path`, it names the columns; then `label` is optional and other columns are ignored.
    * In a text file, a line is a path, or a path and a label with a tab or a blank between them. A
      line that ends like a picture (`.png`) is a path alone. A label with blanks needs a tab.

    All lines have labels, or none has. Labels are all integers, or they are names of classes, which
    are sorted.

    Args:
      list_path: the file.
      like: the training list, so that labels mean the same here; None for a list of its own.
      has_labels: whether labels are kept; without, nothing about them is checked.
      **reading: see `Reading`.

    Raises:
      FileNotFoundError: the list does not exist, or files that it names (the message has the
        first).
      ValueError: the list is empty or not UTF-8; only some lines have labels; a line is empty but
        for its label; a class is not among those of `like`, or a number is negative. Messages have
        the number of the line. Also for the reasons of `FolderSource`.
    """

    def __init__(
        self,
        list_path: str | os.PathLike[str],
        *,
        like: ImageSource | None = None,
        has_labels: bool = True,
        **reading: Unpack[Reading],
    ):
        list_path = local_path(list_path, "lists of images")
        is_csv = list_path.name.lower().endswith(".csv")
        rows = _csv_rows(list_path) if is_csv else _text_rows(list_path)
        super().__init__(list_path, list_path.parent, rows, **reading)
        self._labels, self.class_names = labels_of_texts(
            [row.label if has_labels else "" for row in rows],
            place=lambda index: f"line {rows[index].line} of {list_path}",
            where=str(list_path),
            like=like,
        )


def _lines(list_path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a list that are not empty, with their numbers from 1."""
    if not list_path.is_file():
        raise FileNotFoundError(f"no image list at {list_path}")
    try:
        text = list_path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{list_path} is not a list in UTF-8: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r")


def _text_rows(list_path: Path) -> list[_Row]:
    rows = []
    for number, line in _lines(list_path):
        name, label = line.strip(), ""
        if "\t" in name:
            name, _, label = name.partition("\t")
        elif not name.lower().endswith(decoding.SUFFIXES) and " " in name:
            name, _, label = name.rpartition(" ")
        rows.append(_Row(number, name.strip(), label.strip()))
    return rows


def _csv_rows(list_path: Path) -> list[_Row]:
    # A reader of its own for each line: a quoted line break would shift the numbers of all lines.
    cells = [(number, next(csv.reader([line]))) for number, line in _lines(list_path)]
    columns = [cell.strip().lower() for cell in cells[0][1]] if cells else []
    path, label = 0, 1
    has_header = "path" in columns
    if has_header:
        path, label = columns.index("path"), columns.index("label") if "label" in columns else -1
        cells = cells[1:]
    rows = []
    for number, row in cells:
        if len(row) > 2 and not has_header:
            raise ValueError(
                f"line {number} of {list_path} has {len(row)} columns, expected 1 or 2"
            )
        given = row[label].strip() if 0 <= label < len(row) else ""
        rows.append(_Row(number, row[path].strip() if path < len(row) else "", given))
    return rows
