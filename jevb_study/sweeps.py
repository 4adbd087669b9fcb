"""A study from the command line: one config, and the values that some of its settings take.

`jevb-study --config=digits --vary=jevb.df=1,5,inf --seeds=0,1,2 --out=runs/df`
"""

import argparse
import ast
import copy
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jevb_jax.command_line import config_files
from jevb_study.spec import Comparison, Figure, Logged, Measure, Result, Study, Sweep


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `from_options` reads."""
    parser.add_argument(
        "--config", help="instead of a study file: a config's name or file, as for jevb-train"
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="SETTING=VALUE,VALUE",
        help="values of a setting of the config; several --vary give all combinations",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="another setting of the config, the same in every run",
    )
    parser.add_argument(
        "--measure",
        action="append",
        default=[],
        metavar="NAME",
        help="a column of the table: a number of results.json, such as linear_accuracy or "
        "auroc_far:own/likelihood (name:features), or a logged one, such as health/effective_rank; "
        "by default the accuracies of the representation and the effective rank",
    )


def is_asked(options: argparse.Namespace) -> bool:
    """Whether the command line describes a study itself, and names no file."""
    return options.config is not None


def from_options(options: argparse.Namespace, seeds: Sequence[int]) -> Study:
    """The study that the command line describes.

    Args:
      options: what the options of `add_options` were given.
      seeds: of every run.

    Returns:
      A study with a run for each combination of values.

    Raises:
      ConfigFileError: there is no such config or setting; the message suggests similar names.
      ValueError: a value does not fit its setting, or an option is not understood.
    """
    base = config_files.load("config", config_files.file_of(options.config))
    known = config_files.settings_of(base)
    for text in options.set:
        setting, values = _setting_and_values(text, "--set", known)
        if len(values) != 1:
            raise ValueError(f"--set takes one value, got --set={text}; --vary takes several")
        _assign(base, setting, values[0])
    varied = dict(_setting_and_values(text, "--vary", known) for text in options.vary)
    if len(varied) < len(options.vary):
        raise ValueError(f"give each setting once, got --vary={' --vary='.join(options.vary)}")
    runs = {}
    for combination in itertools.product(*varied.values()):
        config = copy.deepcopy(base)
        for setting, value in zip(varied, combination, strict=True):
            _assign(config, setting, value)
        runs["+".join(map(_name, varied, combination)) or "as_given"] = config
    measures = [*map(_measure, options.measure)] or _usual_measures(base)
    return Study(
        title=f"{options.config}: {', '.join(varied) or 'as given'}",
        runs=runs,
        seeds=seeds,
        measures=measures,
        figures=[_figure(varied, list(runs), [one.label for one in measures])],
    )


def _setting_and_values(text: str, option: str, known: Sequence[str]) -> tuple[str, list[Any]]:
    """`jevb.df=1,inf` as `("jevb.df", [1, inf])`."""
    setting, equals, listed = text.partition("=")
    if not equals or not listed:
        raise ValueError(f"{option} takes SETTING=VALUE, got {option}={text}")
    if setting not in known:
        near = ", ".join(config_files.near(setting, known))
        raise config_files.ConfigFileError(
            f"{option}={text}: the config has no setting {setting}"
            + (f"; did you mean {near}?" if near else "")
        )
    values = [*_values(listed)]
    if len(set(map(str, values))) < len(values):
        raise ValueError(f"every value must occur once, got {option}={text}")
    return setting, values


def _values(listed: str) -> Iterator[Any]:
    """Python literals between commas; what is none is text. Commas in brackets separate nothing."""
    for part in re.findall(r"(?:\([^()]*\)|\[[^\[\]]*\]|[^,()\[\]])+", listed):
        try:
            yield math.inf if part == "inf" else ast.literal_eval(part)
        except (SyntaxError, ValueError):
            yield part


def _assign(config: Any, setting: str, value: Any) -> None:
    """Sets a value in place. ConfigDict refuses a value of another type, except that it widens int."""
    *sections, name = setting.split(".")
    section = config
    for each in sections:
        section = section[each]
    try:
        section[name] = tuple(value) if isinstance(value, list) else value
    except TypeError as error:
        raise ValueError(
            f"{setting} cannot be {value!r}; the config has {section[name]!r}, and a value must be of "
            "its type"
        ) from error


def _name(setting: str, value: Any) -> str:
    """Of a run's directory: `jevb.df=5`."""
    return re.sub(r"[^\w.=+-]+", "_", f"{setting}={value}").strip("_")


def _measure(text: str) -> Measure:
    name, _, features = text.partition(":")
    if "/" in name:
        return Logged(name, name)
    return Result(text, name, features or "representation")


def _usual_measures(config: Any) -> list[Measure]:
    neighbors = [
        *(f"knn_{k}_accuracy" for k in config.evaluation.knn_k),
        *(f"knn_{k}_uniform_accuracy" for k in config.evaluation.knn_uniform_k),
    ]
    accuracies = ["linear_accuracy", *neighbors]
    return [*map(_measure, accuracies), Logged("effective rank", "health/effective_rank")]


def _figure(varied: dict[str, list[Any]], runs: list[str], measures: list[str]) -> Figure:
    """A curve over one setting with numbers; points otherwise."""
    if len(varied) == 1:
        ((setting, values),) = varied.items()
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            by_value = dict(zip(values, runs, strict=True))
            is_wide = min(values) > 0 and max(values) >= 10 * min(values)
            return Sweep("sweep", f"Measures over {setting}", setting, by_value, measures, is_wide)
    return Comparison("comparison", f"Measures over {', '.join(varied) or 'seeds'}", runs, measures)
