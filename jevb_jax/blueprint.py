"""From the plain values of a config to networks and views: what training and a loaded model share.

Nothing here needs the libraries of training, so a model can be loaded and served without them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jevb_jax import augmentations, methods, pictures
from jevb_jax.networks import HeadName, JointEmbeddingModel, make_model

HEADS: dict[str, HeadName] = {
    "jevb": "posterior",
    "simsiam": "vector",
    "vi_simsiam": "direction",
    "byol": "vector",
    "vicreg": "none",
    "barlow_twins": "none",
}

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
    return {**config, "data": {**_BEFORE["data"], **config["data"]}}


def saved_config(value: Any, where: object) -> dict[str, Any]:
    """The completed config of a run, of the JSON that is said to hold it.

    Args:
      value: of the JSON.
      where: the file, for messages.

    Returns:
      See `completed_config`.

    Raises:
      ValueError: it is no config of a run, but another program's, for instance.
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
    return completed_config(value)


def make_network(config: Mapping[str, Any]) -> JointEmbeddingModel:
    """The networks that a config describes.

    Args:
      config: plain values.

    Returns:
      The model, without parameters.

    Raises:
      ValueError: a value that the networks refuse.
    """
    return make_model(
        head=HEADS[config["method"]],
        has_likelihood_scale=config["jevb"]["likelihood_scale"] == "untied",
        **config["model"],
    )


def view_augmentations(section: Mapping[str, Any]) -> tuple[augmentations.ViewAugmentation, ...]:
    """Two full views and the small crops, each with its own probabilities of blur and solarise.

    Args:
      section: `augmentation` of a config.

    Returns:
      One for each view.

    Raises:
      ValueError: a value out of its range.
    """
    # JSON has no tuples, and the views must be hashable.
    keywords: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in section.items()
    }
    size = keywords.pop("image_size")
    num_small_crops = keywords.pop("num_small_crops")
    small_size = keywords.pop("small_crop_size")
    small_scale = keywords.pop("small_crop_scale")
    blur, solarize = keywords.pop("blur_probability"), keywords.pop("solarize_probability")
    if len(blur) != 2 or len(solarize) != 2:
        raise ValueError(
            "augmentation.blur_probability and solarize_probability hold one value for each of the "
            f"two views, got {blur} and {solarize}"
        )
    full = tuple(
        augmentations.ViewAugmentation(
            size=size, blur_probability=blur[v], solarize_probability=solarize[v], **keywords
        )
        for v in range(2)
    )
    small = dataclasses.replace(full[0], size=small_size, crop_scale=small_scale)
    return full + (small,) * num_small_crops


def jevb_settings(config: Mapping[str, Any], *, steps_per_epoch: int) -> methods.JevbSettings:
    """Settings of the objective, those of another method's config too.

    Args:
      config: plain values.
      steps_per_epoch: for the warm-up of the KL's weight.

    Returns:
      The settings.

    Raises:
      ValueError: an unknown `jevb.likelihood_scale`.
    """
    settings = dict(config["jevb"])
    scale = settings.pop("likelihood_scale")
    if scale not in ("tied", "untied", "fixed"):
        raise ValueError(f"jevb.likelihood_scale must be tied, untied or fixed, got {scale!r}")
    return methods.JevbSettings(
        kl_warmup_steps=round(settings.pop("kl_warmup_epochs") * steps_per_epoch),
        fixed_scale=config["model"]["initial_scale"] if scale == "fixed" else None,
        **settings,
    )
