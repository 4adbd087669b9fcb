"""Saved configs: the version of their format, and settings that older configs lack."""

from collections.abc import Mapping
from typing import Any

from jevb_jax.images import decoding
from jevb_jax.runs import metrics_writers

# Version of `config.json`. Raise it when a key is renamed, is removed or changes its meaning. A new
# key needs no new version, only a value in `_BEFORE`. Files without a version are older than
# versions.
VERSION = 1
_VERSION_KEY = "version"

# Settings added after the first runs, with the values that runs had before them.
_BEFORE: dict[str, dict[str, Any]] = {
    "data": {
        "max_image_pixels": decoding.MAX_PIXELS,
        "inlier_classes": [],  # as in JSON
        "image_column": "image",
        "label_column": "label",
        "exif": "apply",
        "skip_broken": "refuse",
        "labels": "given",
        "num_channels": 0,
        "dtype": "uint8",
        "value_range": [],
    },
    "augmentation": {"num_views": 2, "crop_from": "square", "crop_resizer": "pillow"},
    "init": {"frozen_stages": 0},
    "optimizer": {"layer_decay": 1.0},
    "input": {"accept_changed_data": False},
    "model": {
        "zero_init_residual": True,
        "head_input": "embedding",
        "batch_norm": "fused",
        "pool": "class",  # no network of the old runs reads it
    },
    "jevb": {"tails": "joint", "normalized": False},
    "ood": {
        "mixture_df": 5.0,
        "csi_crops": 0,
        "loss_prediction": False,
        "norm_exponents": [],
        "norm_exponent_choices": [],
    },
    "train": {
        "extend": False,
        "knn_every_epochs": 0,
        "bn_over_views": False,
        "writers": [metrics_writers.AUTO],
    },
    "evaluation": {"knn_uniform_k": []},  # a list, as in JSON
    # The old runs saved none. If one is evaluated again, it gets them.
    "checkpoint": {"fitted_megabytes": 100},
}
# The same for whole sections that were added later.
_SECTIONS_BEFORE: dict[str, dict[str, Any]] = {
    "init": {"workdir": "", "step": -1, "frozen_stages": 0},
    "emp_ssl": {"invariance_weight": 200.0, "squared_epsilon": 0.2},
    # Runs on images; they do not read it.
    "feature_views": {
        "num_features": 0,
        "num_stored_views": 0,
        "standardize": True,
        "noise_scale": 0.5,
        "mask_probability": 0.2,
    },
}

# The same for fine-tunes, which held all images in memory and saved nothing before their end.
_FINETUNE_BEFORE: dict[str, dict[str, Any]] = {
    "data": _BEFORE["data"],
    "optimizer": _BEFORE["optimizer"],
    "input": {
        "placement": "resident",
        "resident_limit_bytes": 4_000_000_000,
        "num_workers": 0,
        "prefetch_batches": 4,
        "accept_changed_data": False,
    },
    "train": {"steps_per_dispatch": 0, "log_every_steps": 10, "writers": [metrics_writers.AUTO]},
    "checkpoint": {"every_epochs": 1, "keep_latest": 2},
}


def completed_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config with the settings that did not exist when it was saved.

    Returns:
      A new config. Each missing setting gets the value that the run was trained with.
    """
    added = {name: {**before, **config[name]} for name, before in _BEFORE.items() if name in config}
    sections = _SECTIONS_BEFORE if "train" in config else {}  # only for a whole config
    return {**sections, **config, **added}


def completed_finetune(config: Mapping[str, Any]) -> dict[str, Any]:
    """The saved config of a fine-tune with the settings that did not exist when it was saved."""
    added = {name: {**before, **config.get(name, {})} for name, before in _FINETUNE_BEFORE.items()}
    return {**config, **added}


def saved_config(value: Any, where: object) -> dict[str, Any]:
    """The completed config of a run, from the JSON value that should hold it.

    Args:
      value: the JSON value.
      where: the file, for messages.

    Returns:
      The result of `completed_config`.

    Raises:
      ValueError: the value is not a config of a run, or it is of a later version of this library.
    """
    sections = ("data", "augmentation", "model", "train")
    is_config = (
        isinstance(value, dict)
        and "method" in value
        and all(isinstance(value.get(name), dict) for name in sections)
    )
    if not is_config:
        raise ValueError(
            f"{where} holds no config of a run as train.py writes it; it may be the file of another "
            "program, or only a part"
        )
    return completed_config(_unversioned(value, where))


def is_finetune(value: Any) -> bool:
    """Whether this is the config of a fine-tune and not that of a run."""
    sections = ("init", "data", "augmentation", "train")
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), dict) for name in sections)
        and "frozen" in value["init"]
    )


def saved_finetune(value: Any, where: object) -> dict[str, Any]:
    """The config of a fine-tune from its JSON, completed by `completed_finetune`.

    Args:
      value: the content of the file.
      where: the file, for error messages.

    Raises:
      ValueError: this is not the config of a fine-tune, or a later version of this library wrote it.
    """
    if not is_finetune(value):
        raise ValueError(f"{where} holds no config of a fine-tune, as finetune.py writes it")
    return completed_finetune(_unversioned(value, where))


def _unversioned(value: dict[str, Any], where: object) -> dict[str, Any]:
    """A config without the version of its form; that of a later version is refused."""
    version = value.get(_VERSION_KEY, 0)
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"{where} is of version {version!r}, but this jevb_jax reads versions up to {VERSION}. A "
            "later jevb_jax wrote it; update this one"
        )
    return {key: one for key, one in value.items() if key != _VERSION_KEY}


def versioned(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the version of its format, as in `config.json`; inverse of `saved_config`."""
    return {_VERSION_KEY: VERSION, **config}
