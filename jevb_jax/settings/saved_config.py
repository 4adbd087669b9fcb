"""Saved configs: the version of their form, and what older ones did not say yet."""

from collections.abc import Mapping
from typing import Any

from jevb_jax.images import pictures

# Of `config.json`: raised when a key is renamed, removed or means something else. A new key needs no new
# version, only its value in `_BEFORE`. Files without it are from before there were versions.
VERSION = 1
_VERSION_KEY = "version"

# Settings that came after the first runs, with the value that runs had before them.
_BEFORE: dict[str, dict[str, Any]] = {
    "data": {"max_image_pixels": pictures.MAX_PIXELS},
    "input": {"accept_changed_data": False},
    "model": {"zero_init_residual": True, "head_input": "embedding", "batch_norm": "fused"},
    "jevb": {"tails": "joint", "normalized": False},
    "ood": {"mixture_df": 5.0},
    "train": {"extend": False, "knn_every_epochs": 0},
    "evaluation": {"knn_uniform_k": []},  # as JSON has it
}
# Likewise, of sections that came later.
_SECTIONS_BEFORE: dict[str, dict[str, Any]] = {"init": {"workdir": "", "step": -1}}

# Likewise, of fine-tunes: they were never saved before their end, and held all images in memory.
_FINETUNE_BEFORE: dict[str, dict[str, Any]] = {
    "data": _BEFORE["data"],
    "input": {
        "placement": "resident",
        "resident_limit_bytes": 4_000_000_000,
        "num_workers": 0,
        "prefetch_batches": 4,
        "accept_changed_data": False,
    },
    "train": {"steps_per_dispatch": 0, "log_every_steps": 10},
    "checkpoint": {"every_epochs": 1, "keep_latest": 2},
}


def completed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config with the settings that did not exist yet when it was saved.

    Args:
      config: plain values.

    Returns:
      A new config: each missing setting has the value by which that run was trained.
    """
    added = {name: {**before, **config[name]} for name, before in _BEFORE.items() if name in config}
    sections = _SECTIONS_BEFORE if "train" in config else {}  # not a part of a config
    return {**sections, **config, **added}


def completed_finetune(config: Mapping[str, Any]) -> dict[str, Any]:
    """As `completed_config`, of a fine-tune.

    Args:
      config: plain values.

    Returns:
      A new config.
    """
    added = {name: {**before, **config.get(name, {})} for name, before in _FINETUNE_BEFORE.items()}
    return {**config, **added}


def saved_config(value: Any, where: object) -> dict[str, Any]:
    """The completed config of a run, of the JSON that is said to hold it.

    Args:
      value: what the JSON says.
      where: the file, for messages.

    Returns:
      See `completed_config`.

    Raises:
      ValueError: it is no config of a run, but another program's, for instance; or one of a later
        version of this library.
    """
    sections = ("data", "augmentation", "model", "train")
    is_config = (
        isinstance(value, dict)
        and "method" in value
        and all(isinstance(value.get(name), dict) for name in sections)
    )
    if not is_config:
        raise ValueError(
            f"{where} holds no config of a run, as train.py writes it: another program's file, or a "
            "part of one"
        )
    return completed_config(_unversioned(value, where))


def saved_finetune(value: Any, where: object) -> dict[str, Any]:
    """As `saved_config`, of a fine-tune.

    Args:
      value: what the JSON says.
      where: the file, for messages.

    Returns:
      See `completed_finetune`.

    Raises:
      ValueError: it is no config of a fine-tune, or one of a later version of this library.
    """
    sections = ("init", "data", "augmentation", "train")
    is_config = isinstance(value, dict) and all(
        isinstance(value.get(name), dict) for name in sections
    )
    if not is_config or "frozen" not in value["init"]:
        raise ValueError(f"{where} holds no config of a fine-tune, as finetune.py writes it")
    return completed_finetune(_unversioned(value, where))


def _unversioned(value: dict[str, Any], where: object) -> dict[str, Any]:
    """A config without the version of its form; that of a later version is refused."""
    version = value.get(_VERSION_KEY, 0)
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"{where} is of version {version!r}, and this jevb_jax reads versions up to {VERSION}: it "
            "was written by a later jevb_jax, update this one"
        )
    return {key: one for key, one in value.items() if key != _VERSION_KEY}


def versioned(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as `config.json` holds it: `saved_config` is the inverse.

    Args:
      config: plain values.

    Returns:
      A new config with the version of its form.
    """
    return {_VERSION_KEY: VERSION, **config}
