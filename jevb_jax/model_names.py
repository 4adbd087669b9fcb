"""What names a model: a path, a name of an encoder of the package, or a repository of the Hub.

`jevb_jax.load("jevb-cifar10-resnet18")` loads an encoder that comes with the package.
"""

import os
import re
from pathlib import Path

from jevb_jax import hub
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


def directory_of(name: str | os.PathLike[str]) -> Path:
    """The directory of a model, wherever it is named. All that reads a model uses this.

    Args:
      name: a path, the URL of an object store, the name of a published encoder, or a repository of
        the Hugging Face Hub, `hf://org/name` or `hf://org/name@revision`, which is downloaded.

    Returns:
      The directory. Only that of a repository is known to hold a model.

    Raises:
      HubError, ArchiveError: as for `hub.download`.
      ValueError: a repository without an organization, or as for `files.to_path`.
    """
    repository = hub.parse(name)
    if repository is not None:
        return hub.download(repository)
    if isinstance(name, str) and name.startswith("hf://"):
        raise ValueError(
            f"a model of the Hub is hf://org/name or hf://org/name@revision, got {name}"
        )
    return find(name) or files.to_path(name)
