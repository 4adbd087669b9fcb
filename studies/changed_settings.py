"""Configs of studies that differ from another one in a few settings."""

from collections.abc import Mapping
from typing import Any


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """The config with changes such as `train__batch_size=256`, made in place."""
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config
