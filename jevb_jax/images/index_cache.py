"""A cache of what is slow to find out about data: the index of an archive, the list of a folder.

It lies in the user's cache directory. An entry is used only if what it was made of is unchanged. If
there is none, or the directory cannot be written, everything works as without a cache.
"""

import hashlib
import io
import json
import logging
import os
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jevb_jax.runs import files

VARIABLE = "JEVB_JAX_CACHE"  # another directory for the cache
_STAMP = "stamp"
# A file that changed so recently may change again within the resolution of its time stamp.
SETTLED_SECONDS = 2.0

_logger = logging.getLogger(__name__)


def directory() -> Path:
    """The directory of the cache: `$JEVB_JAX_CACHE`, else `jevb_jax` in that of the user."""
    own = os.environ.get(VARIABLE)
    if own:
        return files.to_path(own)
    return files.to_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "jevb_jax"


def entry_name(kind: str, of: str) -> str:
    """The name of an entry, without ending."""
    return f"{kind}_{hashlib.sha256(os.fsencode(of)).hexdigest()[:32]}"


def cached(
    kind: str,
    of: str,
    stamp: Mapping[str, Any],
    build: Callable[[], Mapping[str, np.ndarray]],
    *,
    changed_at: float,
) -> Mapping[str, np.ndarray]:
    """Arrays from the cache, or built and kept there.

    Args:
      kind: what the entry is, a word.
      of: the path of the data.
      stamp: JSON values of which a change makes the entry invalid.
      build: makes the arrays.
      changed_at: time at which the data changed last, in seconds. A recent change is not kept.

    Returns:
      What `build` returns, now or earlier.
    """
    wanted = json.dumps(stamp, sort_keys=True)
    path = directory() / f"{entry_name(kind, os.path.abspath(of))}.npz"
    found = _read(path, wanted)
    if found is not None:
        return found
    is_settled = time.time() - changed_at > SETTLED_SECONDS
    made = build()
    if is_settled:
        _write(path, {**made, _STAMP: np.frombuffer(wanted.encode(), np.uint8)})
    return made


def _read(path: Path, wanted: str) -> Mapping[str, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            if file[_STAMP].tobytes() != wanted.encode():
                return None
            return {key: file[key] for key in file.files if key != _STAMP}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _logger.warning("%s is damaged and is made anew: %s", path, error)
        return None


def _write(path: Path, entries: Mapping[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, **entries)  # pyright: ignore[reportArgumentType]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes_atomically(path, content.getvalue())
    except OSError as error:
        _logger.warning(
            "The index cannot be kept in %s (%s); every start makes it anew. %s names another "
            "directory.",
            path.parent,
            error,
            VARIABLE,
        )


def packed_texts(texts: list[str]) -> np.ndarray:
    """Texts as bytes, to be kept in an array. No text holds a zero byte, as no path does."""
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), np.uint8)


def unpacked_texts(packed: np.ndarray, count: int) -> list[str]:
    """The texts of `packed_texts`.

    Args:
      packed: the bytes.
      count: number of texts.
    """
    return packed.tobytes().decode("utf-8", "surrogateescape").split("\0") if count else []
