"""From the settings of a run to networks and views: what training and a loaded model share.

Nothing here needs the libraries of training, so a model can be loaded and served without them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax import Array

from jevb_jax import methods
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.images.crop_boxes import HostCrops, key_words
from jevb_jax.images.feature_views import ColumnStatistics, FeatureView
from jevb_jax.images.views import View, view_shape
from jevb_jax.networks.joint import JointEmbeddingModel, make_model
from jevb_jax.paper.likelihood import Likelihood
from jevb_jax.settings.sections import AugmentationSection, RunSettings


def make_network(settings: RunSettings, *, frozen_stages: int = 0) -> JointEmbeddingModel:
    """The networks that settings describe.

    Args:
      settings: what the run asks for.
      frozen_stages: stages of the backbone that do not learn, `init.frozen_stages` in the run itself;
        a loaded encoder has none, because a fine-tune trains it whole.

    Returns:
      The model, without parameters.

    Raises:
      ValueError: a value that the networks refuse.
    """
    return make_model(
        head=methods.METHODS[settings.method].head,
        has_likelihood_scale=settings.jevb.likelihood_scale == "untied",
        num_features=settings.feature_views.num_features,
        standardize=settings.feature_views.standardize,
        frozen_stages=frozen_stages,
        **vars(settings.model),
    )


def views(settings: RunSettings, statistics: ColumnStatistics | None) -> tuple[View, ...]:
    """The views of a step: of images, or of features.

    Args:
      settings: what the run asks for.
      statistics: of the columns of features; None for images.

    Returns:
      One for each view.

    Raises:
      ValueError: a value out of its range, or features without statistics.
    """
    if settings.model.backbone != "identity":
        return view_augmentations(settings.augmentation)
    if statistics is None:
        raise ValueError("views of features need the statistics of the columns")
    section = settings.feature_views
    view = FeatureView(statistics, section.noise_scale, section.mask_probability)
    return (view,) * settings.augmentation.num_views


def saved_statistics(settings: RunSettings, variables: Any) -> ColumnStatistics | None:
    """The statistics of the columns that a network of features was trained with, else None.

    Args:
      settings: of the run.
      variables: parameters and running statistics.
    """
    if settings.model.backbone != "identity":
        return None
    found: Mapping[str, Any] = variables["batch_stats"]["backbone"]
    return ColumnStatistics(mean=found["mean"], std=found["std"])


def shape_of_view(settings: RunSettings) -> tuple[int, ...]:
    """Shape of what the networks read: `(height, width, channels)` or `(F,)`."""
    if settings.model.backbone == "identity":
        return (settings.feature_views.num_features,)
    return view_shape(view_augmentations(settings.augmentation)[0])


def view_augmentations(section: AugmentationSection) -> tuple[ViewAugmentation, ...]:
    """The full views and the small crops, each with its own probabilities of blur and solarization.

    Views 1, 3, 5 and so on have the first probability of a pair, views 2, 4, 6 and so on the second.

    Returns:
      One for each view.

    Raises:
      ValueError: a value out of its range.
    """
    own = {field.name for field in dataclasses.fields(ViewAugmentation)}
    shared = {name: value for name, value in vars(section).items() if name in own}
    pair = tuple(
        ViewAugmentation(
            **shared
            | {
                "size": section.image_size,
                "blur_probability": blur,
                "solarize_probability": solarize,
            }
        )
        for blur, solarize in zip(
            section.blur_probability, section.solarize_probability, strict=True
        )
    )
    full = tuple(pair[index % 2] for index in range(section.num_views))
    small = dataclasses.replace(
        full[0], size=section.small_crop_size, crop_scale=section.small_crop_scale
    )
    return full + (small,) * section.num_small_crops


def host_crops(section: AugmentationSection, key: Array) -> HostCrops | None:
    """What the host cuts out of whole pictures, for the views of `view_augmentations`.

    Args:
      section: what the views are.
      key: the key of the run.

    Returns:
      The crops of all views; None where the device cuts them out of squares.

    Raises:
      ValueError: JAX is set to draw other random bits than it does by default.
    """
    if section.crop_from == "square":
        return None
    views = view_augmentations(section)
    return HostCrops(
        key=key_words(key),
        sizes=tuple(view.size for view in views),
        scales=tuple(view.crop_scale for view in views),
        ratio=section.crop_ratio,
        interpolation=section.interpolation,
        resizer=section.crop_resizer,
    )


def jevb_settings(settings: RunSettings, *, steps_per_epoch: int) -> methods.JevbSettings:
    """Settings of JEVB's objective. They are made for every method; the other losses ignore them.

    Args:
      settings: what the run asks for.
      steps_per_epoch: for the warm-up of the KL's weight.

    Returns:
      The settings.
    """
    section = dict(vars(settings.jevb))
    is_fixed = section.pop("likelihood_scale") == "fixed"
    of_likelihood = {field.name for field in dataclasses.fields(Likelihood)} - {"radial_scale"}
    return methods.JevbSettings(
        likelihood=Likelihood(
            radial_scale=settings.model.initial_radial_scale,
            **{name: section.pop(name) for name in of_likelihood},
        ),
        kl_warmup_steps=round(section.pop("kl_warmup_epochs") * steps_per_epoch),
        fixed_scale=settings.model.initial_scale if is_fixed else None,
        **section,
    )
