"""Turns plain values into typed settings. Every key is checked; one error lists all that is wrong.

There are three kinds of config: of a run (`configs/default.py`), of a fine-tune
(`configs/finetune_default.py`), and single sections. The error gives each wrong setting with its
domain and the value that it had. What depends on the data is checked when these are loaded, by
`experiment.build_experiment` and `evaluation.readiness`, before the first step.
"""

import ast
import dataclasses
import difflib
import os
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jevb_jax.images import corruptions
from jevb_jax.runs.dotted_keys import flatten
from jevb_jax.settings.domains import Domain, shown
from jevb_jax.settings.misfits import misfits, misfits_of_source, warmup_misfits
from jevb_jax.settings.sections import (
    DataSection,
    EvaluationSection,
    FinetuneSettings,
    OutsideSetSection,
    RunSettings,
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


def _refuse(problems: Sequence[str]) -> None:
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError("\n  ".join([f"{len(problems)} settings cannot be used:", *problems]))


def _problems(values: Mapping[str, Any], table: Mapping[str, Domain], prefix: str) -> list[str]:
    """One text for each wrong value."""
    problems = []
    for key, domain in table.items():
        if key in values and not domain.accepts(values[key]):
            got, hint = shown(values[key]), _hint(values[key], domain)
            problems.append(f"{prefix}{key} must be {domain.says}, got {got}{hint}")
    return problems


def _hint(value: Any, domain: Domain) -> str:
    """What to write and not a wrong value, where that is plain; else nothing."""
    if not isinstance(value, list) and domain.accepts([value]):
        return f"; write ({value!r},)"
    if isinstance(value, str) and domain.accepts(_without_quotes(value)):
        return ", a text: leave out the quotes"
    return ""


def _without_quotes(text: str) -> Any:
    """The value that a text would be without its quotes, or None."""
    for value_of in (int, float, ast.literal_eval):  # the last does not know "inf"
        try:
            return plain(value_of(text))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return None


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
    severities = range(1, corruptions.NUM_SEVERITIES + 1)
    made = [f"{name}_{severity}" for name in corruptions.CORRUPTIONS for severity in severities]
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
    values = flatten(config)
    _check_keys(values, RUN)
    problems = _problems(values, RUN, "")
    for part in ("outside", "choice"):
        if RUN[f"ood.{part}"].accepts(values[f"ood.{part}"]):
            problems += _check_outside_sets(values[f"ood.{part}"], f"ood.{part}")
    _refuse(problems)
    settings = _built(RunSettings, config)
    _refuse(misfits(settings))
    return settings


def saved_settings(config: Mapping[str, Any]) -> RunSettings:
    """The typed settings of a run that was already trained. Values are not checked again.

    Args:
      config: plain values, completed by `config_versions.completed_config`.

    Raises:
      ValueError: a setting is missing, or this version does not have it.
    """
    _check_keys(flatten(config), RUN)
    return _built(RunSettings, config)


def data_section(section: Mapping[str, Any]) -> DataSection:
    """The section `data` of a config, alone.

    Args:
      section: plain values, as in configs/transfer.py.

    Raises:
      ValueError: lists all wrong settings.
    """
    made = _section(DataSection, section, "data.")
    _refuse(misfits_of_source(made))
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
    values, table = flatten(section), domains(kind)
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
    values = flatten(config)
    _check_keys(values, FINETUNE)
    _refuse(_problems(values, FINETUNE, ""))
    settings = _built(FinetuneSettings, config)
    optimizer = settings.optimizer
    problems = misfits_of_source(settings.data)
    if settings.data.source == "features":
        problems.append("data.source = 'features' is for train.py: a fine-tune needs images")
    if optimizer.constant_head_rate:
        problems.append("optimizer.constant_head_rate is of pre-training: set it to False")
    if settings.init.frozen and optimizer.layer_decay != 1:
        problems.append("optimizer.layer_decay is of an encoder that is trained: set it to 1.0")
    problems += warmup_misfits(optimizer, num_epochs=settings.train.num_epochs)
    _refuse(problems)
    return settings
