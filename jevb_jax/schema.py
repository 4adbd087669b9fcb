"""Every setting with the values that it may have, checked before anything is loaded or trained.

One table for each kind of config: `RUN` (configs/default.py), `FINETUNE` (configs/finetune_default.py),
and `OUTSIDE_SET` for each set of `ood.outside` and `ood.choice`. A check takes plain values, lists all
settings that cannot be meant in one error, and names each with its domain and the value that came.
What depends on the data is checked once these are loaded, by `experiment` and by
`evaluation.readiness`; still before the first step.
"""

import difflib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jevb_jax import augmentations, data, mass, networks, objective, sphere
from jevb_jax.blueprint import HEADS
from jevb_jax.evaluation import corruptions

# --- Domains --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """The values that a setting may have.

    Attributes:
      says: what they are, to follow "must be".
      accepts: whether a plain value is one of them.
    """

    says: str
    accepts: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """A float or an integer that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 1e300


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def integer(low: int, high: int | None = None, *, note: str = "") -> Domain:
    """Integers from `low` to `high`, both included; no bool, no float."""
    bounds = f"of at least {low}" if high is None else f"from {low} to {high:,}"
    return Domain(
        f"an integer {bounds}{f' ({note})' if note else ''}",
        lambda value: _is_integer(value) and low <= value and (high is None or value <= high),
    )


def odd_or_zero(*, note: str) -> Domain:
    """Odd positive integers, and 0."""
    return Domain(
        f"an odd positive integer, or 0 ({note})",
        lambda value: _is_integer(value) and value >= 0 and (value == 0 or value % 2 == 1),
    )


def number(
    low: float,
    high: float = math.inf,
    *,
    low_open: bool = False,
    high_open: bool = False,
    infinite: bool = False,
    note: str = "",
) -> Domain:
    """Numbers from `low` to `high`, without an end where it is open; finite unless `infinite`."""
    is_bounded = math.isfinite(high)
    if is_bounded:
        says = f"a number in {'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
    elif math.isfinite(low):
        says = f"a number {'above' if low_open else 'of at least'} {low:g}"
    else:
        says = "a number"
    says += ", finite" if not is_bounded and not infinite else ""
    says += f" ({note})" if note else ""

    def accepts(value: Any) -> bool:
        if not _is_number(value) or math.isnan(value) or (math.isinf(value) and not infinite):
            return False
        above = value > low if low_open else value >= low
        return above and (value < high if high_open else value <= high)

    return Domain(says, accepts)


def choice(*names: str) -> Domain:
    """One of some texts."""
    says = _list(names) if len(names) < 3 else f"one of {_list(names)}"
    return Domain(says, lambda value: isinstance(value, str) and value in names)


def text(*, note: str = "", is_empty_allowed: bool = True) -> Domain:
    """Any text."""
    says = ("a text" if is_empty_allowed else "a text that is not empty") + (
        f" ({note})" if note else ""
    )
    return Domain(says, lambda v: isinstance(v, str) and (is_empty_allowed or bool(v.strip())))


BOOLEAN = Domain("True or False", lambda value: isinstance(value, bool))


def many(domain: Domain, *, length: Sequence[int] = (), minimum: int = 0, note: str = "") -> Domain:
    """A tuple of values of one domain.

    Args:
      domain: what each value must be.
      length: how many there may be; any number where it is empty.
      minimum: at least so many.
      note: what to say beside it.

    Returns:
      The domain of the tuple.
    """
    if length:
        count = f"{_list([str(n) for n in length])} values"
    else:
        count = f"at least {minimum} values" if minimum > 1 else "values"
    empty = "" if minimum or length else ", or ()"
    says = f"a tuple of {count}, each {domain.says}{empty}" + (f" ({note})" if note else "")
    if minimum == 1:
        says = says.replace("a tuple of values", "a tuple, not empty, of values")
    return Domain(
        says,
        lambda value: (
            isinstance(value, list)
            and len(value) >= minimum
            and (not length or len(value) in length)
            and all(domain.accepts(item) for item in value)
        ),
    )


def interval(low: float, high: float = math.inf) -> Domain:
    """`(from, to)`, rising, within `(low, high]`; finite."""
    one = number(low, high, low_open=True)
    within = f"in ({low:g}, {high:g}]" if math.isfinite(high) else f"above {low:g}, finite"
    return Domain(
        f"a range (from, to) of two numbers {within}, from at most to",
        lambda value: (
            isinstance(value, list)
            and len(value) == 2
            and all(one.accepts(item) for item in value)
            and value[0] <= value[1]
        ),
    )


def rising(domain: Domain) -> Domain:
    """A tuple of values of one domain, each larger than the one before."""
    plain_many = many(domain)
    return Domain(
        f"{plain_many.says}, rising",
        lambda value: plain_many.accepts(value) and sorted(set(value)) == value,
    )


def _outside_sets() -> Domain:
    return Domain(
        "a tuple of outside sets (configs/ood.py makes them), or ()",
        lambda value: isinstance(value, list) and all(isinstance(item, dict) for item in value),
    )


_PROBABILITY = number(0, 1)
_WEIGHT = number(0)
_DF = number(0, low_open=True, infinite=True, note="inf is the Gaussian")
_SEED = integer(0, 2**32 - 1, note="the keys of JAX take 32 bits: of a longer hash, hash % 2**32")
_PAIR = many(_PROBABILITY, length=(2,), note="one for each of the two views")
_PATHS = many(text(is_empty_allowed=False))

# --- Tables ---------------------------------------------------------------------------------------

_DATA = {
    "source": choice(*data.SOURCES),
    "train_paths": _PATHS,
    "test_paths": _PATHS,
    "tfds_name": text(),
    "data_dir": text(note='"" = the default of TFDS'),
    "train_split": text(),
    "test_split": text(),
    "image_size": integer(0, note="0 = as stored"),
    "max_image_pixels": integer(1),
    "num_train_examples": integer(0, note="0 = all"),
    "num_test_examples": integer(0, note="0 = all"),
    "validation_fraction": number(0, 1, low_open=True, high_open=True),
    "split_seed": integer(0),
    "inlier_class": integer(-1, note="-1 = all classes"),
}
_OPTIMIZER = {
    "name": choice("sgd", "lars", "larc", "adamw"),
    "learning_rate": number(0),
    "momentum": number(0, 1, high_open=True),
    "weight_decay": number(0, note="0 = none"),
    "trust_coefficient": number(0, low_open=True),
    "bias_rate_factor": number(0),
    "constant_head_rate": BOOLEAN,
    "warmup_epochs": number(0, note="0 = none"),
    "final_learning_rate": number(0),
    "max_gradient_norm": number(0, note="0 = no clipping"),
}
_SECTIONS: dict[str, dict[str, Domain]] = {
    "init": {
        "workdir": text(note='"" = weights drawn by the seed'),
        "step": integer(-1, note="-1 = the latest"),
    },
    "data": _DATA,
    "input": {
        "placement": choice("auto", "resident", "stream"),
        "resident_limit_bytes": integer(0),
        "num_workers": integer(0, note="0 = threads of this process"),
        "prefetch_batches": integer(1),
        "accept_changed_data": BOOLEAN,
    },
    "augmentation": {
        "image_size": integer(1),
        "crop_scale": interval(0, 1),
        "crop_ratio": interval(0),
        "interpolation": choice(*augmentations.INTERPOLATIONS),
        "flip_probability": _PROBABILITY,
        "jitter_probability": _PROBABILITY,
        "brightness": _WEIGHT,
        "contrast": _WEIGHT,
        "saturation": _WEIGHT,
        "hue": number(0, 0.5),
        "grayscale_probability": _PROBABILITY,
        "blur_probability": _PAIR,
        "blur_sigma": interval(0),
        "blur_kernel_size": odd_or_zero(note="0 = about a tenth of the image"),
        "solarize_probability": _PAIR,
        "solarize_threshold": number(0, 1),
        "num_small_crops": integer(0),
        "small_crop_size": integer(1),
        "small_crop_scale": interval(0, 1),
        "mean": many(number(-math.inf), length=(1, 3), note="one value for each channel"),
        "std": many(number(0, low_open=True), length=(1, 3), note="one value for each channel"),
    },
    "model": {
        "backbone": choice(
            "resnet8", "resnet18", "resnet34", "resnet50", "convnet", "vit_tiny", "vit_small"
        ),
        "width": integer(0, note="0 = the network's own"),
        "stem": choice("cifar", "imagenet"),
        "zero_init_residual": BOOLEAN,
        "batch_norm": choice("fused", "plain"),
        "patch_size": integer(1),
        "projector_hidden_dims": many(integer(1), minimum=1),
        "projector_normalizes_output": BOOLEAN,
        "embedding_dim": integer(1),
        "head_input": choice(*networks.HEAD_INPUTS),
        "head_hidden_dim": integer(1),
        "initial_scale": number(0, low_open=True),
        "min_scale": number(0),
        "isotropic": BOOLEAN,
        "initial_radial_scale": number(1e-3, low_open=True),
        "dtype": choice("float32", "bfloat16"),
    },
    "jevb": {
        "df": _DF,
        "radial_df": _DF,
        "scale_units": choice(*objective.SCALE_UNITS),
        "prior_scale": number(0, low_open=True),
        "coordinates": choice(*sphere.COORDINATES),
        "space": choice("log", "linear"),
        "tails": choice(*mass.TAILS),
        "normalized": BOOLEAN,
        "num_samples": integer(1),
        "kl_weight": _WEIGHT,
        "kl_warmup_epochs": number(0, note="0 = none"),
        "radial_weight": _WEIGHT,
        "likelihood_scale": choice("tied", "untied", "fixed"),
        "location": choice(*objective.LOCATIONS),
        "likelihood": choice(*objective.LIKELIHOODS),
    },
    "vicreg": {
        "invariance_weight": _WEIGHT,
        "variance_weight": _WEIGHT,
        "covariance_weight": _WEIGHT,
    },
    "barlow_twins": {"redundancy_weight": _WEIGHT, "loss_weight": _WEIGHT},
    "optimizer": _OPTIMIZER,
    "train": {
        "batch_size": integer(2, note="BatchNorm needs at least 2"),
        "num_epochs": number(0, low_open=True),
        "extend": BOOLEAN,
        "num_micro_batches": integer(1),
        "bn_group_size": integer(0, note="0 = the global batch"),
        "ema_decay": number(0, 1, high_open=True, note="0 = off"),
        "target_decay": number(0, 1, high_open=True, note="0 = none"),
        "shard_optimizer_state": BOOLEAN,
        "steps_per_dispatch": integer(0, note="0 = 1 on the CPU, else 10"),
        "log_every_steps": integer(0, note="0 = the last step alone"),
        "health_every_steps": integer(0, note="0 = off"),
        "health_pairs": BOOLEAN,
        "health_num_images": integer(1),
        "knn_every_epochs": integer(0, note="0 = off"),
    },
    "checkpoint": {
        "every_steps": integer(0, note="0 = at the end alone"),
        "keep_latest": integer(1),
        "keep_best": integer(0, note="0 = off"),
    },
    "evaluation": {
        "batch_size": integer(1),
        "split": choice("test", "validation"),
        "knn_k": many(integer(1), minimum=1),
        "knn_temperature": number(0, low_open=True),
        "knn_uniform_k": many(integer(1)),
        "l2_grid": many(number(0), minimum=1),
        "labels_per_class": integer(0, note="0 = off"),
        "few_label_seeds": integer(1),
        "compare_untrained": BOOLEAN,
    },
    "ood": {
        "name": text(),
        "outside": _outside_sets(),
        "choice": _outside_sets(),
        "corruptions": many(choice(*corruptions.CORRUPTIONS)),
        "severities": rising(integer(1, corruptions.NUM_SEVERITIES)),
        "num_corrupted_images": integer(1),
        "default_score": text(note='"" = the method\'s own'),
        "num_views": integer(1),
        "num_samples": integer(1),
        "max_fit_images": integer(0, note="0 = all"),
        "knn_k": many(integer(1), minimum=1),
        "ssd_clusters": many(integer(1)),
        "mixture_df": _DF,
        "residual_share": number(0, 1, low_open=True, high_open=True),
        "num_bootstrap": integer(1),
        "human_counts_path": text(note='"" = none'),
    },
}


def _flat(sections: Mapping[str, Mapping[str, Domain]]) -> dict[str, Domain]:
    return {
        f"{section}.{key}": domain
        for section in sections
        for key, domain in sections[section].items()
    }


RUN: dict[str, Domain] = {"method": choice(*HEADS), "seed": _SEED, **_flat(_SECTIONS)}
FINETUNE: dict[str, Domain] = {
    "seed": _SEED,
    **_flat(
        {
            "init": {
                "workdir": text(is_empty_allowed=False, note="a run of train.py, or an export"),
                "step": integer(-1, note="-1 = the latest"),
                "frozen": BOOLEAN,
            },
            "data": _DATA,
            "augmentation": {
                key: _SECTIONS["augmentation"][key]
                for key in ("crop_scale", "crop_ratio", "flip_probability")
            },
            "optimizer": _OPTIMIZER,
            "train": {"batch_size": integer(1), "num_epochs": integer(1)},
            "evaluation": {"batch_size": integer(1)},
        }
    ),
}
# Of each set of `ood.outside` and `ood.choice`; those of the second line may be left out.
OUTSIDE_SET: dict[str, Domain] = {
    "name": text(is_empty_allowed=False),
    "group": text(is_empty_allowed=False),
    "source": choice("arrays", "folder", "image_list", "tfds"),
    "protocol": text(),
    "paths": _PATHS,
    "tfds_name": text(),
    "data_dir": text(),
    "split": text(),
    "image_size": integer(0, note="0 = as stored"),
    "exclude_labels": many(integer(0)),
    "num_examples": integer(0, note="0 = all"),
    "split_seed": integer(0),
}
_ALWAYS_GIVEN = ("name", "group", "source", "protocol")
# Of sets that the evaluation makes itself: a set and a group.
_OTHER_CLASSES, _CORRUPTED = "other_classes", "corrupted"

# --- Plain values ---------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A value as JSON has it: tuples, ranges and arrays become lists, NumPy's scalars Python's.

    Args:
      value: a plain value, as JSON has it.

    Returns:
      A copy. What JSON does not know, an iterator say, stays as it is: the checks refuse it.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    for kind in (int, float, str):  # subclasses of these, as an IntEnum; a bool stays one
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


# --- Checks ---------------------------------------------------------------------------------------


def _refuse(problems: Sequence[str]) -> None:
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError("\n  ".join([f"{len(problems)} settings cannot be used:", *problems]))


def _shown(value: Any) -> str:
    shown = repr(tuple(value) if isinstance(value, list) else value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _problems(values: Mapping[str, Any], table: Mapping[str, Domain], prefix: str) -> list[str]:
    """What is wrong with flat values, one text each."""
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
    """Refuses settings that the table does not know, and a config that lacks some."""
    unknown = [key for key in values if key not in table]
    missing = [key for key in table if key not in values]
    if not unknown and not missing:
        return
    asked = next((script for script, known, _ in _KINDS if known is table), None)
    for script, _, mark in _KINDS:
        if asked and script != asked and mark in values and mark not in table:
            raise ValueError(
                f"this is a config of {script}, and {asked} needs one of its own (configs/"
                f"{'default.py' if asked == 'train.py' else 'finetune_default.py'} holds all settings)"
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


def check_run(config: Mapping[str, Any]) -> None:
    """Refuses a config of a run in which a value cannot be meant, or values do not fit each other.

    Args:
      config: of `plain`, with the sections of configs/default.py.

    Raises:
      ValueError: all such settings, each with its name, its domain and its value.
    """
    values = _flatten(config)
    _check_keys(values, RUN)
    problems = _problems(values, RUN, "")
    for part in ("outside", "choice"):
        if RUN[f"ood.{part}"].accepts(values[f"ood.{part}"]):
            problems += _check_outside_sets(values[f"ood.{part}"], f"ood.{part}")
    _refuse(problems)
    _refuse(_misfits(config))


def _misfits(config: Mapping[str, Any]) -> list[str]:
    """Settings that are right alone and wrong together."""
    problems = []
    method, train, model = config["method"], config["train"], config["model"]
    jevb, views, ood = config["jevb"], config["augmentation"], config["ood"]
    if method != "jevb" and views["num_small_crops"]:
        problems.append(
            f"augmentation.num_small_crops = {views['num_small_crops']} needs method jevb: {method} "
            "would ignore the small crops; set it to 0"
        )
    if method != "jevb" and train["health_pairs"]:
        problems.append(f"train.health_pairs needs method jevb, got {method}: set it to False")
    if method == "byol" and not train["target_decay"]:
        problems.append("method byol needs train.target_decay above 0, for instance 0.99")
    if method in ("vicreg", "barlow_twins") and train["target_decay"]:
        problems.append(f"{method} has no target network: set train.target_decay to 0")
    if train["batch_size"] % train["num_micro_batches"]:
        problems.append(
            "train.num_micro_batches must divide train.batch_size, got "
            f"{train['num_micro_batches']} and {train['batch_size']}"
        )
    else:
        seen = train["batch_size"] // train["num_micro_batches"]
        group = train["bn_group_size"]
        if seen < 2:
            problems.append(
                f"train.num_micro_batches = {train['num_micro_batches']} leaves {seen} example of "
                f"train.batch_size = {train['batch_size']} to a part: BatchNorm needs at least 2"
            )
        elif group and (group < 2 or seen % group):
            problems.append(
                f"train.bn_group_size = {group} must be at least 2 and divide the {seen} examples "
                "that BatchNorm sees at once (batch_size / num_micro_batches), or be 0"
            )
    if len(views["mean"]) != len(views["std"]):
        problems.append(
            "augmentation.mean and augmentation.std need one value for each channel, got "
            f"{len(views['mean'])} and {len(views['std'])} values"
        )
    sizes = {"image_size": views["image_size"]}
    if views["num_small_crops"]:
        sizes["small_crop_size"] = views["small_crop_size"]
    for name, size in sizes.items():
        if model["backbone"].startswith("vit") and size % model["patch_size"]:
            problems.append(
                f"model.patch_size = {model['patch_size']} must divide augmentation.{name} = {size}"
            )
        taps = views["blur_kernel_size"]
        if max(views["blur_probability"]) > 0 and taps // 2 >= size:
            problems.append(
                f"augmentation.blur_kernel_size = {taps} is too wide for views of {size} pixels "
                f"(augmentation.{name}): at most {2 * size - 1}, or 0"
            )
    if method == "jevb":
        if model["min_scale"] >= model["initial_scale"]:
            problems.append(
                f"model.min_scale = {model['min_scale']} must be below model.initial_scale = "
                f"{model['initial_scale']}"
            )
        if jevb["tails"] == "feature" and jevb["coordinates"] != "chordal":
            problems.append('jevb.tails = "feature" needs jevb.coordinates = "chordal"')
        if jevb["likelihood"] == "factorised" and model["embedding_dim"] < 3:
            problems.append(
                f"model.embedding_dim = {model['embedding_dim']} must be at least 3 for method jevb: "
                "its directions lie on a sphere"
            )
    if method == "vi_simsiam" and model["embedding_dim"] < 2:
        problems.append(
            f"model.embedding_dim = {model['embedding_dim']} must be at least 2 for method vi_simsiam"
        )
    if config["optimizer"]["warmup_epochs"] >= train["num_epochs"]:
        problems.append(
            f"optimizer.warmup_epochs = {config['optimizer']['warmup_epochs']:g} must be shorter than "
            f"the run, train.num_epochs = {train['num_epochs']:g}"
        )
    if ood["corruptions"] and not ood["severities"]:
        problems.append("ood.severities is empty and ood.corruptions is not: give some of 1 to 5")
    if len(set(ood["corruptions"])) < len(ood["corruptions"]):
        problems.append(f"ood.corruptions names one twice: {_shown(ood['corruptions'])}")
    problems += _source_misfits(config["data"])
    return problems


def _source_misfits(section: Mapping[str, Any]) -> list[str]:
    """What a source of data needs."""
    source = section["source"]
    if source == "tfds" and not section["tfds_name"]:
        return ["data.tfds_name must name the data set where data.source is tfds"]
    if source == "tfds" and section["train_split"] == section["test_split"]:
        return [f"data.train_split and data.test_split are both {section['train_split']!r}"]
    if source in ("arrays", "folder") and not section["train_paths"]:
        what = ".npz files" if source == "arrays" else "one directory"
        return [f"data.train_paths must name {what} where data.source is {source}, got ()"]
    return []


def check_data_section(section: Mapping[str, Any]) -> None:
    """Refuses the section `data` of a config, alone, in which a value cannot be meant.

    Args:
      section: of `plain`, as configs/transfer.py makes it.

    Raises:
      ValueError: as `check_run`.
    """
    values = _flatten(section)
    _check_keys(values, _DATA, prefix="data.")
    _refuse(_problems(values, _DATA, "data."))
    _refuse(_source_misfits(section))


def check_evaluation_section(section: Mapping[str, Any]) -> None:
    """Refuses the section `evaluation` of a config, alone, in which a value cannot be meant.

    Args:
      section: its values; collections may be tuples or lists.

    Raises:
      ValueError: as `check_run`.
    """
    values, table = plain(section), _SECTIONS["evaluation"]
    _check_keys(values, table, prefix="evaluation.")
    _refuse(_problems(values, table, "evaluation."))


def check_finetune(config: Mapping[str, Any]) -> None:
    """Refuses a config of a fine-tune in which a value cannot be meant.

    Args:
      config: of `plain`, with the sections of configs/finetune_default.py.

    Raises:
      ValueError: as `check_run`.
    """
    values = _flatten(config)
    _check_keys(values, FINETUNE)
    _refuse(_problems(values, FINETUNE, ""))
    problems = _source_misfits(config["data"])
    if config["optimizer"]["constant_head_rate"]:
        problems.append("optimizer.constant_head_rate is of pre-training: set it to False")
    if config["optimizer"]["warmup_epochs"] >= config["train"]["num_epochs"]:
        problems.append(
            f"optimizer.warmup_epochs = {config['optimizer']['warmup_epochs']:g} must be shorter than "
            f"the run, train.num_epochs = {config['train']['num_epochs']}"
        )
    _refuse(problems)
