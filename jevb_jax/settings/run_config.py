"""Reads the config of a run from its directory."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jevb_jax.runs import archive, files
from jevb_jax.settings.config_versions import (
    completed_finetune,
    is_finetune,
    saved_config,
    saved_finetune,
)


def load_config(workdir: str | Path) -> ConfigDict:
    """The config of a run directory, locked; its lists are tuples again.

    Raises:
      FileNotFoundError: no run was started there.
    """
    path = files.to_path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; --workdir must be a directory of train.py")
    config = read_config(path)
    config.lock()
    return config


def read_config(path: str | Path) -> ConfigDict:
    """The config that a run saved, not locked, so that it can be changed and used again.

    Its lists are tuples again. Settings that did not exist at that time have the value that the run
    was trained with.

    Args:
      path: a `config.json` of a run or of an unfinished fine-tune (`training/config.json`), or the
        `model.json` of a fine-tune or an export.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not a config.
    """

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tuples(item) for key, item in value.items()}
        return tuple(tuples(item) for item in value) if isinstance(value, list) else value

    path = files.to_path(path)
    found = files.read_json(path)
    if path.name == archive.MANIFEST and isinstance(found, dict):
        if "finetuned" in found:
            return ConfigDict(tuples(completed_finetune(found["finetuned"])))
        found = found.get("config")
    elif isinstance(found, dict) and is_finetune(found):
        return ConfigDict(tuples(saved_finetune(found, path)))
    return ConfigDict(tuples(saved_config(found, path)))
