"""Turns plain values into typed settings. Every key is checked; one error lists all that is wrong.

There are three kinds of config: of a run (`configs/default.py`), of a fine-tune
(`configs/finetune_default.py`), and single sections. The error gives each wrong setting with its
domain and the value that it had. What depends on the data is checked when these are loaded, by
`experiment.build_experiment` and `evaluation.readiness`, before the first step.
"""

import dataclasses
import difflib
import os
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jevb_jax.images import corruptions
from jevb_jax.images.dataset import PICTURE_SOURCES
from jevb_jax.methods import METHODS
from jevb_jax.settings.domains import Domain
from jevb_jax.settings.sections import (
    DataSection,
    EvaluationSection,
    FinetuneSettings,
    OutsideSetSection,
    RunSettings,
    TrainSection,
)

_Settings = TypeVar("_Settings")


def domains(kind: type, prefix: str = "") -> dict[str, Domain]:
    """The domain of each setting of a class, by dotted key.

    Args:
      kind: a class of `sections`.
      prefix: what the keys begin with.
    """
    found: dict[str, Domain] = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            found |= domains(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = hint.__metadata__[0]
    return found


RUN = domains(RunSettings)
FINETUNE = domains(FinetuneSettings)
OUTSIDE_SET = domains(OutsideSetSection)
_ALWAYS_GIVEN = ("name", "group", "source", "protocol")
# A set, and a group of sets, that the evaluation makes itself.
_OTHER_CLASSES, _CORRUPTED = "other_classes", "corrupted"


def plain(value: Any) -> Any:
    """A copy in JSON types: tuples, ranges and arrays become lists, NumPy scalars numbers.

    Values that JSON does not have, such as iterators, stay as they are. The checks refuse them.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    for kind in (int, float, str):  # for subclasses, such as IntEnum; a bool stays a bool
        if isinstance(value, kind) and type(value) not in (kind, bool):
            return kind(value)
    return value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _refuse(problems: Sequence[str]) -> None:
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError("\n  ".join([f"{len(problems)} settings cannot be used:", *problems]))


def _shown(value: Any) -> str:
    shown = repr(tuple(value) if isinstance(value, list) else value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _problems(values: Mapping[str, Any], table: Mapping[str, Domain], prefix: str) -> list[str]:
    """One text for each wrong value."""
    problems = []
    for key, domain in table.items():
        if key in values and not domain.accepts(values[key]):
            got = _shown(values[key])
            hint = ""
            if isinstance(values[key], str) and not domain.says.startswith(("a text", "one of")):
                hint = ", a text: leave out the quotes"
            problems.append(f"{prefix}{key} must be {domain.says}, got {got}{hint}")
    return problems


_KINDS = (
    ("train.py", RUN, "method"),
    ("finetune.py", FINETUNE, "init.frozen"),
)


def _check_keys(
    values: Mapping[str, Any], table: Mapping[str, Domain], *, prefix: str = ""
) -> None:
    """Raises ValueError for settings that the table does not have, or that the config lacks."""
    unknown = [key for key in values if key not in table]
    missing = [key for key in table if key not in values]
    if not unknown and not missing:
        return
    asked = next((script for script, known, _ in _KINDS if known is table), None)
    for script, _, mark in _KINDS:
        if asked and script != asked and mark in values and mark not in table:
            raise ValueError(
                f"this is a config for {script}, but {asked} needs its own config (configs/"
                f"{'default.py' if asked == 'train.py' else 'finetune_default.py'} has all its settings)"
            )
    problems = []
    for key in unknown:
        near = difflib.get_close_matches(key, [*missing, *table], n=1)
        hint = f"; did you mean {prefix}{near[0]}?" if near else ""
        problems.append(f"{prefix}{key} is no setting{hint}")
    if missing:
        names = ", ".join(prefix + key for key in missing[:8])
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        problems.append(f"the config lacks {names}{more}")
    _refuse(problems)


def _built(kind: type[_Settings], values: Mapping[str, Any]) -> _Settings:
    """Builds an object of a class of `sections` from plain values with exactly its keys."""
    made: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        value = values[name]
        if dataclasses.is_dataclass(hint):
            made[name] = _built(typing.cast(type, hint), value)
        else:
            made[name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)


def _check_outside_sets(sets: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    problems = []
    names: list[Any] = []
    made = [f"{name}_{n + 1}" for name in corruptions.CORRUPTIONS for n in range(5)]
    for number_of_set, one in enumerate(sets):
        prefix = f"{where}[{number_of_set}]."
        name = one.get("name")
        missing = [key for key in _ALWAYS_GIVEN if key not in one]
        unknown = [key for key in one if key not in OUTSIDE_SET]
        if missing or unknown:
            what = [f"lacks {', '.join(missing)}"] if missing else []
            what += [f"has {', '.join(unknown)}, which no set has"] if unknown else []
            problems.append(f"{where}[{number_of_set}], {name!r}, {' and '.join(what)}")
        problems += _problems(one, OUTSIDE_SET, prefix)
        if name in names:
            problems.append(f"{prefix}name: two sets are called {name!r}; give each its own")
        if name in made or name == _OTHER_CLASSES:
            problems.append(f"{prefix}name: {name!r} is a set that the evaluation makes itself")
        if one.get("group") == _CORRUPTED:
            problems.append(f"{prefix}group: {_CORRUPTED!r} is the group of the corrupted images")
        names.append(name)
    return problems


def run_settings(config: Mapping[str, Any]) -> RunSettings:
    """The typed settings of a run. Each value, and how they fit each other, is checked.

    Args:
      config: plain values, with the sections of configs/default.py.

    Raises:
      ValueError: lists all wrong settings, each with its name, its domain and its value.
    """
    values = _flatten(config)
    _check_keys(values, RUN)
    problems = _problems(values, RUN, "")
    for part in ("outside", "choice"):
        if RUN[f"ood.{part}"].accepts(values[f"ood.{part}"]):
            problems += _check_outside_sets(values[f"ood.{part}"], f"ood.{part}")
    _refuse(problems)
    settings = _built(RunSettings, config)
    _refuse(_misfits(settings))
    return settings


def saved_settings(config: Mapping[str, Any]) -> RunSettings:
    """The typed settings of a run that was already trained. Values are not checked again.

    Args:
      config: plain values, completed by `saved_config.completed_config`.

    Raises:
      ValueError: a setting is missing, or this version does not have it.
    """
    _check_keys(_flatten(config), RUN)
    return _built(RunSettings, config)


def data_section(section: Mapping[str, Any]) -> DataSection:
    """The section `data` of a config, alone.

    Args:
      section: plain values, as in configs/transfer.py.

    Raises:
      ValueError: lists all wrong settings.
    """
    made = _section(DataSection, section, "data.")
    _refuse(_source_misfits(made))
    return made


def evaluation_section(section: Mapping[str, Any]) -> EvaluationSection:
    """The section `evaluation` of a config, alone.

    Args:
      section: its values; collections may be tuples or lists.

    Raises:
      ValueError: lists all wrong settings.
    """
    return _section(EvaluationSection, plain(section), "evaluation.")


def _section(kind: type[_Settings], section: Mapping[str, Any], prefix: str) -> _Settings:
    values, table = _flatten(section), domains(kind)
    _check_keys(values, table, prefix=prefix)
    _refuse(_problems(values, table, prefix))
    return _built(kind, section)


def finetune_settings(config: Mapping[str, Any]) -> FinetuneSettings:
    """The typed settings of a fine-tune.

    Args:
      config: plain values, with the sections of configs/finetune_default.py.

    Raises:
      ValueError: lists all wrong settings.
    """
    values = _flatten(config)
    _check_keys(values, FINETUNE)
    _refuse(_problems(values, FINETUNE, ""))
    settings = _built(FinetuneSettings, config)
    optimizer, train = settings.optimizer, settings.train
    problems = _source_misfits(settings.data)
    if settings.data.source == "features":
        problems.append("data.source = 'features' is for train.py: a fine-tune needs images")
    if optimizer.constant_head_rate:
        problems.append("optimizer.constant_head_rate is of pre-training: set it to False")
    if optimizer.warmup_epochs >= train.num_epochs:
        problems.append(
            f"optimizer.warmup_epochs = {optimizer.warmup_epochs:g} must be shorter than the run, "
            f"train.num_epochs = {train.num_epochs}"
        )
    _refuse(problems)
    return settings


def _misfits(settings: RunSettings) -> list[str]:
    """Settings that are allowed alone, but not together."""
    return [
        *_method_misfits(settings),
        *_batch_misfits(settings.train),
        *_view_misfits(settings),
        *_crop_misfits(settings),
        *_posterior_misfits(settings),
        *_detection_misfits(settings),
        *_source_misfits(settings.data),
        *_feature_misfits(settings),
    ]


def _method_misfits(settings: RunSettings) -> list[str]:
    """Settings that the method needs or would ignore."""
    problems = []
    name, method, train = settings.method, METHODS[settings.method], settings.train
    views = settings.augmentation
    if not method.takes_many_views and (views.num_views > 2 or views.num_small_crops):
        problems.append(
            f"{name} would ignore all but two views: set augmentation.num_views = "
            f"{views.num_views} to 2 and augmentation.num_small_crops = {views.num_small_crops} to 0"
        )
    if method.head != "posterior" and train.health_pairs:
        problems.append(f"train.health_pairs needs method jevb, got {name}: set it to False")
    if method.target == "needed" and not train.target_decay:
        problems.append(f"method {name} needs train.target_decay above 0, for instance 0.99")
    if method.target == "none" and train.target_decay:
        problems.append(f"{name} has no target network: set train.target_decay to 0")
    if settings.optimizer.warmup_epochs >= train.num_epochs:
        problems.append(
            f"optimizer.warmup_epochs = {settings.optimizer.warmup_epochs:g} must be shorter than "
            f"the run, train.num_epochs = {train.num_epochs:g}"
        )
    return problems


def _batch_misfits(train: TrainSection) -> list[str]:
    """Wrong numbers of parts of a batch, and of groups of BatchNorm."""
    if train.batch_size % train.num_micro_batches:
        return [
            "train.num_micro_batches must divide train.batch_size, got "
            f"{train.num_micro_batches} and {train.batch_size}"
        ]
    seen, group = train.batch_size // train.num_micro_batches, train.bn_group_size
    if seen < 2:
        return [
            f"train.num_micro_batches = {train.num_micro_batches} leaves {seen} example of "
            f"train.batch_size = {train.batch_size} to a part: BatchNorm needs at least 2"
        ]
    if group and (group < 2 or seen % group):
        return [
            f"train.bn_group_size = {group} must be at least 2 and divide the {seen} examples "
            "that BatchNorm sees at once (batch_size / num_micro_batches), or be 0"
        ]
    return []


def _view_misfits(settings: RunSettings) -> list[str]:
    """Wrong sizes and channels of views, and patches that do not divide them."""
    problems = []
    views, model = settings.augmentation, settings.model
    if len(views.mean) != len(views.std):
        problems.append(
            "augmentation.mean and augmentation.std need one value for each channel, got "
            f"{len(views.mean)} and {len(views.std)} values"
        )
    sizes = {"image_size": views.image_size}
    if views.num_small_crops:
        sizes["small_crop_size"] = views.small_crop_size
    for name, size in sizes.items():
        if model.backbone.startswith("vit") and size % model.patch_size:
            problems.append(
                f"model.patch_size = {model.patch_size} must divide augmentation.{name} = {size}"
            )
        taps = views.blur_kernel_size
        if max(views.blur_probability) > 0 and taps // 2 >= size:
            problems.append(
                f"augmentation.blur_kernel_size = {taps} is too wide for views of {size} pixels "
                f"(augmentation.{name}): at most {2 * size - 1}, or 0"
            )
    return problems


def _crop_misfits(settings: RunSettings) -> list[str]:
    """Crops of whole pictures, where there are no pictures or where they are not read anew."""
    views = settings.augmentation
    simd = 'augmentation.crop_resizer = "simd"'
    if views.crop_from == "square":
        needs = f'{simd} needs augmentation.crop_from = "image"; the device resizes squares'
        return [needs] if views.crop_resizer == "simd" else []
    asked = 'augmentation.crop_from = "image"'
    problems = []
    if settings.data.source not in PICTURE_SOURCES:
        problems.append(
            f"{asked} needs picture files, data.source {' or '.join(PICTURE_SOURCES)}, got "
            f'"{settings.data.source}": set it to "square"'
        )
    if settings.input.placement == "resident":
        problems.append(
            f'{asked} reads every picture again at each step: set input.placement = "resident" to '
            '"stream" or "auto", or augmentation.crop_from to "square"'
        )
    data, kind = settings.data, views.interpolation
    if views.crop_resizer == "simd" and (
        kind != "bilinear" or data.num_channels == 4 or data.dtype != "uint8"
    ):
        problems.append(
            f"{simd} needs bilinear crops of color or gray with 8 bits, got "
            f'augmentation.interpolation = "{kind}", data.num_channels = {data.num_channels}, '
            f'data.dtype = "{data.dtype}": set it to "pillow"'
        )
    return problems


def _posterior_misfits(settings: RunSettings) -> list[str]:
    """Settings that a likelihood on the sphere does not allow."""
    problems = []
    model, jevb, head = settings.model, settings.jevb, METHODS[settings.method].head
    if head == "posterior":
        if model.min_scale >= model.initial_scale:
            problems.append(
                f"model.min_scale = {model.min_scale} must be below model.initial_scale = "
                f"{model.initial_scale}"
            )
        if jevb.tails == "feature" and jevb.coordinates != "chordal":
            problems.append('jevb.tails = "feature" needs jevb.coordinates = "chordal"')
        if jevb.likelihood == "factorised" and model.embedding_dim < 3:
            problems.append(
                f"model.embedding_dim = {model.embedding_dim} must be at least 3 for method jevb: "
                "its directions lie on a sphere"
            )
    if head == "direction" and model.embedding_dim < 2:
        problems.append(
            f"model.embedding_dim = {model.embedding_dim} must be at least 2 for method "
            f"{settings.method}"
        )
    return problems


def _detection_misfits(settings: RunSettings) -> list[str]:
    problems = []
    ood = settings.ood
    if ood.corruptions and not ood.severities:
        problems.append("ood.severities is empty and ood.corruptions is not: give some of 1 to 5")
    if ood.corruptions and settings.data.dtype != "uint8":
        problems.append(
            f'ood.corruptions need data.dtype = "uint8", got "{settings.data.dtype}": set them to ()'
        )
    if len(set(ood.corruptions)) < len(ood.corruptions):
        problems.append(f"ood.corruptions names one twice: {_shown(ood.corruptions)}")
    return problems


def _source_misfits(section: DataSection) -> list[str]:
    """Settings that the source of the data lacks."""
    source = section.source
    try:
        levels = section.levels
    except ValueError as error:
        return [f"data.value_range: {error}"]
    has_only_bytes = source not in ("arrays", *PICTURE_SOURCES) or source == "tfds"
    if has_only_bytes and levels.dtype != "uint8":
        return [
            f'data.dtype = "{levels.dtype}" is for arrays and picture files, got data.source = {source!r}'
        ]
    if source == "tfds" and not section.tfds_name:
        return ["data.tfds_name must name the data set where data.source is tfds"]
    if source == "tfds" and section.train_split == section.test_split:
        return [f"data.train_split and data.test_split are both {section.train_split!r}"]
    named = {
        "arrays": ".npz or .npy files",
        "features": ".npz or .npy files",
        "folder": "one directory",
        "paths": "one text or CSV file",
        "webdataset": "tar files",
        "hf": "a directory of save_to_disk, or parquet or Arrow files",
    }
    if source in named and not section.train_paths:
        return [f"data.train_paths must name {named[source]} where data.source is {source}, got ()"]
    if section.skip_broken == "skip" and source not in PICTURE_SOURCES:
        return [
            f'data.skip_broken = "skip" needs pictures that are decoded one by one, got data.source = '
            f'{source!r}: set it to "refuse"'
        ]
    return []


def _feature_misfits(settings: RunSettings) -> list[str]:
    """What features of a frozen encoder do not allow, and images do not have."""
    is_of_features, ood = settings.data.source == "features", settings.ood
    if is_of_features != (settings.model.backbone == "identity"):
        return [
            'data.source = "features" and model.backbone = "identity" need each other, got '
            f"{settings.data.source!r} and {settings.model.backbone!r}"
        ]
    problems = [
        f"ood.{part}[{number}].source = {one['source']!r}, but the data are "
        f"{'features' if is_of_features else 'images'}: give outside sets of the same kind"
        for part, sets in (("outside", ood.outside), ("choice", ood.choice))
        for number, one in enumerate(sets)
        if (one["source"] == "features") != is_of_features
    ]
    if not is_of_features:
        return problems
    if settings.init.workdir.endswith(".safetensors"):
        problems.append(
            "init.workdir names a file of a backbone, and features have none: give a run"
        )
    of_images: dict[str, Any] = {
        "augmentation.num_small_crops": settings.augmentation.num_small_crops,
        "data.image_size": settings.data.image_size,
        "ood.corruptions": ood.corruptions,
        "ood.csi_crops": ood.csi_crops,
    }
    return problems + [
        f"{name} = {_shown(value)} is for images, and data.source is features: set it to "
        f"{'()' if isinstance(value, tuple) else 0}"
        for name, value in of_images.items()
        if value
    ]
