"""The origin of a number: command, commit, versions, devices."""

import importlib.metadata
import platform
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax

import jevb_jax
from jevb_jax.runs import files


def environment() -> dict[str, Any]:
    """What a published number needs besides its config: command, commit, versions, devices."""
    packages = (
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "distrax",
        "orbax-checkpoint",
        "numpy",
    )
    # Not from the metadata: another version may be installed beside a checkout that runs.
    versions: dict[str, str | None] = {"jevb-jax": jevb_jax.__version__}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None  # distrax, which training does not need
    commit, is_dirty = _own_commit(Path(__file__).resolve().parents[2])
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


def _own_commit(root: Path) -> tuple[str | None, bool]:
    """Commit of a checkout, and whether its tracked files differ from it.

    Args:
      root: the directory that holds the package.

    Returns:
      (None, False) if it is no checkout of this project. An installed package, or a copy of it, may
      lie in another project's repository, whose commit says nothing about it.
    """

    def git(*arguments: str) -> str | None:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        top = git("rev-parse", "--show-toplevel")
        if top is None or Path(top).resolve() != root or not _is_own_project(root):
            return None, False
        if git("ls-files", "--error-unmatch", "jevb_jax/__init__.py") is None:
            return None, False
        commit = git("rev-parse", "HEAD")
        return commit, commit is not None and bool(
            git("status", "--porcelain", "--untracked-files=no")
        )
    except FileNotFoundError:  # git is not installed
        return None, False


def _is_own_project(root: Path) -> bool:
    """Whether this directory's `pyproject.toml` is that of the package."""
    path = root / "pyproject.toml"
    if not path.is_file():
        return False
    project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
    return project.get("name") == "jevb-jax"


def read_environment(workdir: Path) -> dict[str, Any]:
    """What `environment` wrote for a run; empty values if the run was copied without the file."""
    path = workdir / "environment.json"
    return files.read_json(path) if path.exists() else {"command": []}
