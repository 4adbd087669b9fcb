"""Files that settings name one by one, by a pattern, or by a range of numbers."""

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence

from jevb_jax.images.source import local_path

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def files_of_all(paths: Sequence[str | os.PathLike[str]], source: str, what: str) -> list[str]:
    """The files that names, patterns (`a-*.tar`) and ranges (`a-{00..12}.tar`) mean, in order.

    Args:
      paths: the names. The files of a pattern are sorted.
      source: the data source, for messages.
      what: the kind of files, for messages.

    Raises:
      FileNotFoundError: a file does not exist, or a pattern fits none.
      ValueError: there are no names, a range is empty, a file is named twice or lies in an object
        store.
    """
    if not paths:
        raise ValueError(f"source {source!r} takes {what} or patterns of them, got none")
    found = [file for path in paths for file in _files_of(os.fspath(path), what)]
    repeated = sorted(file for file, count in Counter(found).items() if count > 1)
    if repeated:
        raise ValueError(f"each file may be given once, but these are repeated: {repeated[:5]}")
    return found


def _files_of(path: str, what: str) -> list[str]:
    """The files of a name, of a pattern, or of a range."""
    path = os.fspath(local_path(path, what))
    span = _RANGE.search(path)
    if span:
        first, last = span[1], span[2]
        numbers = range(int(first), int(last) + 1)
        if not numbers:
            raise ValueError(f"{path} is an empty range")
        names = [f"{path[: span.start()]}{n:0{len(first)}d}{path[span.end() :]}" for n in numbers]
        return [file for name in names for file in _files_of(name, what)]
    if os.path.isfile(path):
        return [path]
    found = sorted(glob.glob(path)) if glob.has_magic(path) else []
    if not found:
        raise FileNotFoundError(f"no file at {path}")
    return found
