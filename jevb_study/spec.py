"""Definition of a study: configs, seeds, the numbers of its table, the claims of its figures.

A study file is Python with a function `get_study() -> Study`.
"""

import collections
import dataclasses
import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ml_collections import ConfigDict

from jevb_jax.runs import files
from jevb_jax.runs.checkpoints import config_hash
from jevb_jax.settings import read
from jevb_jax.training.experiment import to_json_values


@dataclasses.dataclass(frozen=True)
class Result:
    """A number of `results.json`."""

    label: str  # in the table and the figures
    name: str  # such as "linear_accuracy"
    features: str = "representation"  # or "embedding", "prediction", a score of detection
    encoder: Literal["trained", "untrained"] = "trained"


@dataclasses.dataclass(frozen=True)
class Logged:
    """A number of `metrics.jsonl`."""

    label: str  # in the table and the figures
    key: str  # such as "health/effective_rank"
    take: Literal["last", "max", "min"] = "last"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A figure with a point for every seed of every run, and their mean."""

    name: str  # of the file, without .png
    title: str  # the claim
    runs: Sequence[str]  # rows, from the top
    measures: Sequence[str]  # labels; a panel each


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A figure of measures as functions of one setting."""

    name: str  # of the file, without .png
    title: str  # the claim
    x_label: str  # the setting
    runs: Mapping[float, str]  # by value of the setting; infinity is drawn at the right edge
    measures: Sequence[str]  # labels; a panel each
    log_x: bool = False
    references: Sequence[str] = ()  # runs drawn as horizontal lines


@dataclasses.dataclass(frozen=True)
class Curves:
    """A figure of logged values by step or by views seen, with a cross where a seed failed."""

    name: str  # of the file, without .png
    title: str  # the claim
    runs: Sequence[str]  # a line each, at most 24
    keys: Sequence[str]  # of `metrics.jsonl`; a panel each
    log_y: bool = False
    over_views: bool = False  # the x axis is views seen, which compares unequal batches fairly


Measure = Result | Logged
Figure = Comparison | Sweep | Curves


class PlannedRun(NamedTuple):
    """A config with its seed, as plain values, and the directory where it runs."""

    name: str
    seed: int
    config: dict[str, Any]
    directory: Path


@dataclasses.dataclass(frozen=True)
class Study:
    """What to run, what to measure and what to draw.

    Raises:
      ValueError: parts do not fit together; the message names them.
    """

    title: str  # heading above the table
    runs: Mapping[str, ConfigDict]  # by name; the study sets the seed of each
    seeds: Sequence[int]  # each config runs once with each seed
    measures: Sequence[Measure]  # columns of the table
    figures: Sequence[Figure] = ()  # one for each claim
    # Further rows of the table. Each is the mean of several runs, seed by seed, for example the mean
    # over the classes in one-class detection.
    averages: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        # Iterators become tuples, because they can be read only once. ConfigDict refuses NumPy integers.
        for field in ("seeds", "measures", "figures"):
            object.__setattr__(self, field, tuple(read.plain(tuple(getattr(self, field)))))
        bad_seeds = [seed for seed in self.seeds if not read.RUN["seed"].accepts(seed)]
        if bad_seeds:
            raise ValueError(f"every seed must be {read.RUN['seed'].says}, got {bad_seeds}")
        if not self.runs or not self.seeds:
            raise ValueError("a study needs at least one run and one seed")
        labels = [measure.label for measure in self.measures]
        figure_names = [figure.name for figure in self.figures]
        for what, names in (("seed", self.seeds), ("measure", labels), ("figure", figure_names)):
            twice = [name for name, n in collections.Counter(names).items() if n > 1]
            if twice:
                raise ValueError(f"every {what} must occur once, these occur more often: {twice}")
        bad = [n for n in (*self.runs, *figure_names) if not re.fullmatch(r"\w[\w.=+-]*", n)]
        if bad:
            raise ValueError(f"names are file names: letters, digits and _ . = + -, got {bad}")
        for name, runs in self.averages.items():
            if name in self.runs or not runs or not set(runs) <= set(self.runs):
                raise ValueError(
                    f"average {name} needs a name of its own and runs among {[*self.runs]}, "
                    f"got {list(runs)}"
                )
        for figure in self.figures:
            self._check_figure(figure, labels)
        by_hash: dict[str, str] = {}
        for name, config in self.runs.items():
            other = by_hash.setdefault(config_hash(to_json_values(config)), name)
            if other != name:
                raise ValueError(
                    f"runs {other} and {name} have the same config: make a new config for each, "
                    "and use one name in several figures"
                )

    def _check_figure(self, figure: Figure, labels: Sequence[str]) -> None:
        """Refuses a figure that needs runs or measures that the study does not have."""
        is_sweep = isinstance(figure, Sweep)
        runs = [*figure.runs.values(), *figure.references] if is_sweep else figure.runs
        panels = figure.keys if isinstance(figure, Curves) else figure.measures
        if not runs or not panels:
            raise ValueError(f"figure {figure.name} has nothing to draw")
        unknown = [run for run in runs if run not in self.runs]
        if unknown:
            raise ValueError(f"figure {figure.name}: no runs {unknown} among {[*self.runs]}")
        unknown = [label for label in panels if label not in labels]
        if unknown and not isinstance(figure, Curves):
            raise ValueError(f"figure {figure.name}: no measures {unknown} among {labels}")

    def part(self, *, runs: Sequence[str] | None, seeds: Sequence[int] | None) -> "Study":
        """The study with some of its runs and seeds, and what can be drawn and averaged of them.

        Args:
          runs: names; None is all. Order and configs stay those of the study.
          seeds: None is all.

        Raises:
          ValueError: the study has no such run or seed.
        """
        kept_runs = _chosen("run", runs, [*self.runs])
        kept_seeds = _chosen("seed", seeds, self.seeds)
        figures = (_of_runs(figure, kept_runs) for figure in self.figures)
        return dataclasses.replace(
            self,
            runs={name: self.runs[name] for name in kept_runs},
            seeds=kept_seeds,
            figures=[figure for figure in figures if figure is not None],
            averages={
                name: averaged
                for name, averaged in self.averages.items()
                if set(averaged) <= set(kept_runs)
            },
        )

    def plan(self, out: Path) -> list[PlannedRun]:
        """All runs of the first seed, then of the next, so that an early table has every run."""
        runs = []
        for seed in self.seeds:
            for name, config in self.runs.items():
                values = {**to_json_values(config), "seed": seed}
                runs.append(PlannedRun(name, seed, values, out / "runs" / name / f"seed_{seed}"))
        return runs

    def check_settings(self) -> None:
        """Refuses settings that a run would refuse, without loading data.

        Raises:
          ValueError: names the run and its wrong settings, as in `read.run_settings`.
        """
        for name, config in self.runs.items():
            try:
                read.run_settings(to_json_values(config))
            except ValueError as error:
                raise ValueError(f"run {name}: {error}") from error


def _chosen(what: str, asked: Sequence[Any] | None, known: Sequence[Any]) -> list[Any]:
    """Those of `known` that are asked for, in their own order."""
    if asked is None:
        return list(known)
    if not asked or not set(asked) <= set(known):
        raise ValueError(f"give some of the study's {what}s, {list(known)}, got {list(asked)}")
    return [one for one in known if one in asked]


def _of_runs(figure: Figure, runs: Sequence[str]) -> Figure | None:
    """The figure with some of its runs only. None if it would show nothing."""
    if not isinstance(figure, Sweep):
        kept = [run for run in figure.runs if run in runs]
        return dataclasses.replace(figure, runs=kept) if kept else None
    by_value = {value: run for value, run in figure.runs.items() if run in runs}
    references = [run for run in figure.references if run in runs]
    return dataclasses.replace(figure, runs=by_value, references=references) if by_value else None


def load_study(path: str | Path) -> Study:
    """Loads a study file.

    Args:
      path: Python file with `get_study()`.

    Returns:
      Its study.

    Raises:
      FileNotFoundError: there is no such file.
      TypeError: `get_study()` is missing or returns no `Study`.
    """
    path = files.to_path(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"a study is a Python file with get_study(), got {path}")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    study = module.get_study() if hasattr(module, "get_study") else None
    if not isinstance(study, Study):
        raise TypeError(f"{path} must define get_study() that returns a Study, got {study!r}")
    return study
