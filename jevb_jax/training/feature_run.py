"""What a run on features of a frozen encoder takes from its data."""

import dataclasses

from jevb_jax.images.dataset import Dataset
from jevb_jax.settings.sections import FeatureViewsSection, RunSettings


def section_of_data(settings: RunSettings, dataset: Dataset) -> FeatureViewsSection:
    """The section `feature_views` with the numbers that the data have in the place of zeros.

    Args:
      settings: of a run with `data.source = "features"`.
      dataset: its data.

    Raises:
      ValueError: the data have other numbers than the settings, or too few views.
    """
    section, shape = settings.feature_views, dataset.train[0].shape
    name, num_views = dataset.train.name, settings.augmentation.num_views
    found = {"num_features": shape[-1], "num_stored_views": shape[0] if len(shape) == 2 else 1}
    for setting, value in found.items():
        asked = getattr(section, setting)
        if asked not in (0, value):
            raise ValueError(
                f"feature_views.{setting} = {asked}, but {name} has {value}; give features like those "
                "of the run, or 0 for a new run"
            )
    stored = found["num_stored_views"]
    if stored > 1 and stored < num_views:
        raise ValueError(
            f"augmentation.num_views = {num_views} needs as many stored views of each example, but "
            f"{name} has {stored}"
        )
    if stored == 1 and not section.noise_scale and not section.mask_probability:
        raise ValueError(
            f"{name} has one view of each example, and feature_views.noise_scale and "
            "feature_views.mask_probability are 0, so all views would be equal: set one of them above "
            "0, or give features [N, V, F] of V augmented views"
        )
    return dataclasses.replace(section, **found)
