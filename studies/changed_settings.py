"""Configs of studies that differ from another one in a few settings."""

from collections.abc import Mapping
from typing import Any


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """The config with changes such as `train__batch_size=256`, made in place."""
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def accuracy_alone(config: Any) -> Any:
    """The config with little of what accuracies do not need: one penalty, hardly any detection.

    Args:
      config: changed in place.

    Returns:
      The config.
    """
    config.evaluation.l2_grid = (1e-3,)
    config.evaluation.labels_per_class = 0
    config.ood.corruptions = ()
    config.ood.num_views = 2
    config.ood.num_samples = 1
    config.ood.num_bootstrap = 2
    config.ood.max_fit_images = 2000
    config.checkpoint.fitted_megabytes = 0
    return config
