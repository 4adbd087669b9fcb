"""The origin of a number: command, commit, versions, devices."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from jevb_jax.runs import files


def environment() -> dict[str, Any]:
    """What a published number needs besides its config: command, commit, versions, devices."""
    packages = (
        "jevb-jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "distrax",
        "orbax-checkpoint",
        "numpy",
    )
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None  # a checkout that is not installed
    commit, is_dirty = _own_commit(Path(__file__).resolve())
    return {
        "command": sys.argv,
        "commit": commit,
        "uncommitted_changes": is_dirty,
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "devices": [device.device_kind for device in jax.devices()],
        "backend": jax.default_backend(),
    }


def _own_commit(file: Path) -> tuple[str | None, bool]:
    """Commit of a source file, and whether tracked files differ from it. None if it is installed.

    An installed package may lie in another project's repository, for example under `.venv`. That
    repository does not track the package, so its commit says nothing about it.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", *arguments], cwd=file.parent, capture_output=True, text=True, check=False
        )

    try:
        if git("ls-files", "--error-unmatch", file.name).returncode != 0:
            return None, False
        is_dirty = bool(git("status", "--porcelain", "--untracked-files=no").stdout)
        return git("rev-parse", "HEAD").stdout.strip() or None, is_dirty
    except FileNotFoundError:  # git is not installed
        return None, False


def read_environment(workdir: Path) -> dict[str, Any]:
    """What `environment` wrote for a run; empty values if the run was copied without the file."""
    path = workdir / "environment.json"
    return files.read_json(path) if path.exists() else {"command": []}
