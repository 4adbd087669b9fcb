"""Encoders that come with the package, by name: `jevb_jax.load("jevb-cifar10-resnet18")`."""

import os
import re
from pathlib import Path

from jevb_jax.runs import archive, files

VARIABLE = "JEVB_JAX_WEIGHTS"  # a directory of further encoders, which is searched first
_SHIPPED = Path(__file__).parent / "weights"


def _directories() -> list[Path]:
    own = os.environ.get(VARIABLE, "")
    return [*([files.to_path(own)] if own else []), _SHIPPED]


def names() -> list[str]:
    """Names of the encoders that can be loaded by name, sorted."""
    found = {
        path.name
        for directory in _directories()
        if directory.is_dir()
        for path in directory.iterdir()
        if archive.is_archive(path)
    }
    return sorted(found)


def find(name: str | os.PathLike[str]) -> Path | None:
    """The directory of a published encoder.

    Args:
      name: a name without slashes. A path gives None, and so does a name that is also a file or
        folder of the working directory.

    Returns:
      The directory, or None if no encoder has this name.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or Path(name).exists():
        return None
    for directory in _directories():
        if archive.is_archive(directory / name):
            return directory / name
    return None
