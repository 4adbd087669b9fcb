"""Studies: many configs by a few seeds, one table, one figure a claim.

`python -m studies.run --study=studies/NAME.py --out=DIR [--num_processes=1] [--report_only]`

A study file is Python with a function `get_study() -> Study`. Every run of every seed is a process
and a directory of its own, `DIR/runs/NAME/seed_0`. The same command goes on after a kill and never
repeats what is finished. The report is made from the run directories alone.
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import importlib.util
import io
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure
from ml_collections import ConfigDict
from rich.console import Console

from jevb_jax import files, messages, runner
from jevb_jax.checkpoints import changed_keys, config_hash
from jevb_jax.compilation import CACHE_VARIABLE
from jevb_jax.experiment import to_json_values
from jevb_jax.metrics_log import MetricsLog, standard_output, unbroken
from jevb_jax.settings import read
from jevb_jax.settings.saved_config import saved_config

_BUSY_STATUS = 75  # of a child whose directory another process uses
_COLORS = ("black", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999")  # Okabe and Ito
_DASHES = ("-", "--", ":", "-.")


@dataclasses.dataclass(frozen=True)
class Result:
    """A number of `results.json`.

    Attributes:
      label: names it in the table and the figures.
      name: of the result, such as "linear_accuracy".
      features: "representation", "embedding" or "prediction".
      encoder: the one after training or the one before it.
    """

    label: str
    name: str
    features: str = "representation"
    encoder: Literal["trained", "untrained"] = "trained"


@dataclasses.dataclass(frozen=True)
class Logged:
    """A number of `metrics.jsonl`.

    Attributes:
      label: names it in the table and the figures.
      key: such as "health/effective_rank".
      take: which of the logged values.
    """

    label: str
    key: str
    take: Literal["last", "max", "min"] = "last"


Measure = Result | Logged


class RunData(NamedTuple):
    """What a run directory holds; None or empty where it does not.

    Attributes:
      seed: `config.seed` of this run.
      results: of `results.json`: the run is finished.
      failure: of `failure.json`.
      records: of `metrics.jsonl`.
      environment: of `environment.json`.
    """

    seed: int
    results: dict[str, Any] | None
    failure: dict[str, Any] | None
    records: list[dict[str, Any]]
    environment: dict[str, Any] | None

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max((record["step"] for record in self.records), default=0)

    def result(self, measure: Result) -> dict[str, Any] | None:
        """The entry of `results.json`."""
        entries = (self.results or {}).get(measure.encoder, [])
        names = (measure.name, measure.features)
        return next((e for e in entries if (e["name"], e["features"]) == names), None)

    def series(self, key: str) -> dict[int, float]:
        """Logged values by step."""
        return {record["step"]: record[key] for record in self.records if key in record}

    def value(self, measure: Measure) -> float | None:
        """The number, of a finished run."""
        if self.results is None:
            return None
        if isinstance(measure, Result):
            entry = self.result(measure)
            return None if entry is None else float(entry["value"])
        values = list(self.series(measure.key).values())
        take = {"last": lambda v: v[-1], "max": max, "min": min}[measure.take]
        return float(take(values)) if values else None


class Evidence(NamedTuple):
    """The run directories of a study, read.

    Attributes:
      runs: data of every seed, by name of the run.
      measures: by label.
      averages: names of runs, by name of their average.
    """

    runs: Mapping[str, Sequence[RunData]]
    measures: Mapping[str, Measure]
    averages: Mapping[str, Sequence[str]] = types.MappingProxyType({})

    def values(self, run: str, label: str) -> dict[int, float]:
        """A measure by seed, of finished runs that have it; of an average where all of them do."""
        if run in self.averages:
            parts = [self.values(one, label) for one in self.averages[run]]
            seeds = set.intersection(*(set(part) for part in parts))
            return {seed: float(np.mean([part[seed] for part in parts])) for seed in sorted(seeds)}
        pairs = ((data.seed, data.value(self.measures[label])) for data in self.runs[run])
        return {seed: value for seed, value in pairs if value is not None}

    def failed(self, run: str) -> str:
        """How many seeds failed, or nothing."""
        count = sum(data.results is None and data.failure is not None for data in self.runs[run])
        return f"{count} of {len(self.runs[run])} failed" if count else ""

    def status(self, run: str) -> str:
        """What became of every seed."""
        if run in self.averages:
            return f"mean of {len(self.averages[run])} runs"
        seeds = self.runs[run]
        parts = [f"{sum(data.results is not None for data in seeds)} of {len(seeds)}"]
        failures: dict[str, list[str]] = {}
        for data in seeds:
            if data.results is None and data.failure is not None:
                failures.setdefault(data.failure["error"], []).append(str(data.failure["step"]))
            elif data.results is None:
                at = f"unfinished at step {data.last_step}" if data.environment else "not started"
                parts.append(f"seed {data.seed} {at}")
        for error, steps in failures.items():
            parts.append(f"{len(steps)} failed: {error} at step {', '.join(steps)}")
        return "; ".join(parts)


def _panels(
    count: int, title: str, *, width: float, height: float
) -> tuple[MatplotlibFigure, Iterable[Axes]]:
    figure = MatplotlibFigure(figsize=(max(width * count, 6), height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
    return figure, axes


def _add_legend(axis: Axes) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A point for every seed of every run, and their mean.

    Attributes:
      name: of the file, without `.png`.
      title: the claim.
      runs: rows, from the top.
      measures: labels; a panel each.
    """

    name: str
    title: str
    runs: Sequence[str]
    measures: Sequence[str]

    def draw(self, evidence: Evidence) -> MatplotlibFigure:
        """Draws the figure."""
        height = 1.3 + 0.33 * len(self.runs)
        figure, axes = _panels(len(self.measures), self.title, width=4, height=height)
        failed = [evidence.failed(run) for run in self.runs]
        names = [f"{n} ({f})" if f else n for n, f in zip(self.runs, failed, strict=True)]
        for column, (axis, label) in enumerate(zip(axes, self.measures, strict=True)):
            for row, run in enumerate(self.runs):
                values = list(evidence.values(run, label).values())
                if values:
                    axis.plot(values, [row] * len(values), "o", color="0.55", mfc="none", ms=5)
                    axis.plot(np.mean(values), row, "|", color="black", ms=15, mew=2)
            axis.set_yticks(range(len(names)), names if column == 0 else [""] * len(names))
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.set_xlabel(label)
        return figure


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Measures against one setting.

    Attributes:
      name: of the file, without `.png`.
      title: the claim.
      x_label: the setting.
      runs: run by value of the setting; infinity is drawn at the right edge.
      measures: labels; a panel each.
      log_x: whether the axis is logarithmic.
      references: runs drawn as horizontal lines.
    """

    name: str
    title: str
    x_label: str
    runs: Mapping[float, str]
    measures: Sequence[str]
    log_x: bool = False
    references: Sequence[str] = ()

    def _positions(self) -> dict[float, float]:
        """Where every value is drawn."""
        finite = sorted(x for x in self.runs if math.isfinite(x))
        positions = {x: x for x in finite}
        if math.inf in self.runs:
            first, last = (finite[0], finite[-1]) if finite else (1.0, 1.0)
            further = last * max((last / first) ** 0.15, 1.5) if self.log_x else 0.0
            positions[math.inf] = further or last + 0.15 * ((last - first) or 1.0)
        return positions

    def draw(self, evidence: Evidence) -> MatplotlibFigure:
        """Draws the figure."""
        figure, axes = _panels(len(self.measures), self.title, width=4.2, height=3.6)
        positions = self._positions()
        labels = ["∞" if x == math.inf else f"{x:g}" for x in positions]
        for axis, label in zip(axes, self.measures, strict=True):
            means: list[tuple[float, float, float]] = []
            for x, position in positions.items():
                run = self.runs[x]
                values = list(evidence.values(run, label).values())
                axis.plot([position] * len(values), values, "o", color="0.55", mfc="none", ms=5)
                if values:
                    means.append((x, position, float(np.mean(values))))
                if failed := evidence.failed(run):
                    where = {"transform": axis.get_xaxis_transform(), "ha": "center"}
                    axis.text(position, 0.03, failed, rotation=90, fontsize=7, **where)
            finite = [(position, mean) for x, position, mean in means if math.isfinite(x)]
            axis.plot(*np.reshape(finite, (-1, 2)).T, "k_-", ms=11, mew=2, lw=1.2)
            if means and not math.isfinite(means[-1][0]):  # apart: the axis is broken before it
                axis.plot(*np.array(means)[-2:, 1:].T, "k_:", ms=11, mew=2, lw=1.2)
            for color, run in zip(_COLORS[1:], self.references, strict=False):
                values = list(evidence.values(run, label).values())
                if values:
                    axis.axhline(float(np.mean(values)), color=color, ls="--", lw=1.2, label=run)
                    axis.axhspan(min(values), max(values), color=color, alpha=0.12, lw=0)
            _add_legend(axis)
            if self.log_x:
                axis.set_xscale("log")
            axis.set_xticks(list(positions.values()), labels)
            axis.set_xticks([], minor=True)
            axis.set_xlabel(self.x_label)
            axis.set_ylabel(label)
        return figure


@dataclasses.dataclass(frozen=True)
class Curves:
    """Logged values by step: mean and range over seeds; thin lines and a cross where seeds fail.

    Attributes:
      name: of the file, without `.png`.
      title: the claim.
      runs: a line each, at most 24.
      keys: of `metrics.jsonl`; a panel each.
      log_y: whether the axes are logarithmic.
    """

    name: str
    title: str
    runs: Sequence[str]
    keys: Sequence[str]
    log_y: bool = False

    def draw(self, evidence: Evidence) -> MatplotlibFigure:
        """Draws the figure."""
        figure, axes = _panels(len(self.keys), self.title, width=4.4, height=3.8)
        for axis, key in zip(axes, self.keys, strict=True):
            for number, run in enumerate(self.runs):
                failed = evidence.failed(run)
                _draw_curve(
                    axis,
                    [(data.series(key), data.failure is not None) for data in evidence.runs[run]],
                    color=_COLORS[number % len(_COLORS)],
                    dashes=_DASHES[number // len(_COLORS)],
                    label=f"{run} ({failed})" if failed else run,
                )
            if not axis.lines:
                axis.text(0.5, 0.5, "logged by none", transform=axis.transAxes, ha="center")
            if self.log_y:
                axis.set_yscale("log")
            axis.set_xlabel("step")
            axis.set_ylabel(key)
            _add_legend(axis)
        return figure


def _draw_curve(
    axis: Axes,
    seeds: Sequence[tuple[dict[int, float], bool]],
    *,
    color: str,
    dashes: str,
    label: str,
) -> None:
    """Draws `(values by step, whether it failed)` of the seeds of a run."""
    seeds = [(series, is_failed) for series, is_failed in seeds if series]
    if not seeds:
        return
    # Mean and range only of steps that every seed reached: they never jump where one ends.
    common = sorted(set[int]().union(*(s for s, _ in seeds)).intersection(*(s for s, _ in seeds)))
    values = np.array([[series[step] for step in common] for series, _ in seeds])
    if common:
        axis.fill_between(
            common, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, lw=0
        )
    mean = values.mean(axis=0) if common else []
    axis.plot(common, mean, dashes, color=color, lw=1.3, label=label)
    for series, is_failed in seeds:
        rest = sorted(step for step in series if not common or step >= common[-1])
        axis.plot(rest, [series[step] for step in rest], dashes, color=color, lw=0.7)
        finite = [step for step in sorted(series) if math.isfinite(series[step])]
        if is_failed and finite:
            axis.plot(finite[-1], series[finite[-1]], "x", color=color, ms=7, mew=1.8)


Figure = Comparison | Sweep | Curves


@dataclasses.dataclass(frozen=True)
class Study:
    """What to run, what to measure and what to draw.

    Attributes:
      title: heading above the table.
      runs: configs by name; the seed of each is set by the study.
      seeds: each config is run once with each.
      measures: columns of the table.
      figures: one for each claim.
      averages: further rows of the table, each the mean of several runs seed by seed, such as those of
        one-class detection over its classes.
    """

    title: str
    runs: Mapping[str, ConfigDict]
    seeds: Sequence[int]
    measures: Sequence[Measure]
    figures: Sequence[Figure] = ()
    averages: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses what does not fit, by name.

        Raises:
          ValueError: no runs or seeds, names that are no file names or occur twice, figures or
            averages of unknown runs or measures, two runs of one config.
        """
        # Read once: an iterator would be empty the second time. ConfigDict takes no NumPy integers.
        for field in ("seeds", "measures", "figures"):
            object.__setattr__(self, field, tuple(read.plain(tuple(getattr(self, field)))))
        bad_seeds = [seed for seed in self.seeds if not read.RUN["seed"].accepts(seed)]
        if bad_seeds:
            raise ValueError(f"every seed must be {read.RUN['seed'].says}, got {bad_seeds}")
        labels = [measure.label for measure in self.measures]
        figure_names = [figure.name for figure in self.figures]
        if not self.runs or not self.seeds:
            raise ValueError("a study needs at least one run and one seed")
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
            is_sweep = isinstance(figure, Sweep)
            runs = [*figure.runs.values(), *figure.references] if is_sweep else figure.runs
            measures = () if isinstance(figure, Curves) else figure.measures
            unknown = [run for run in runs if run not in self.runs]
            if unknown:
                raise ValueError(f"figure {figure.name}: no runs {unknown} among {[*self.runs]}")
            unknown = [label for label in measures if label not in labels]
            if unknown:
                raise ValueError(f"figure {figure.name}: no measures {unknown} among {labels}")
            if not runs or not (figure.keys if isinstance(figure, Curves) else measures):
                raise ValueError(f"figure {figure.name} has nothing to draw")
        by_hash: dict[str, str] = {}
        for name, config in self.runs.items():
            other = by_hash.setdefault(config_hash(to_json_values(config)), name)
            if other != name:
                raise ValueError(
                    f"runs {other} and {name} have the same config: make a new config for each, "
                    "and use one name in several figures"
                )


def load_study(path: str | Path) -> Study:
    """Loads a study file; it may import `configs`.

    Args:
      path: Python file with `get_study()`.

    Returns:
      Its study.

    Raises:
      FileNotFoundError: there is no such file.
      TypeError: it makes no study.
      ValueError: the study does not fit together.
    """
    path = files.to_path(path)
    root = str(Path(__file__).resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"--study must be a Python file with get_study(), got {path}")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    study = module.get_study() if hasattr(module, "get_study") else None
    if not isinstance(study, Study):
        raise TypeError(f"{path} must define get_study() that returns a Study, got {study!r}")
    return study


def check_settings(study: Study) -> None:
    """Refuses a study of which any run would be refused for its settings; loads no data.

    Args:
      study: what will be run.

    Raises:
      ValueError: the name of the run and its settings, as `read.run_settings`.
    """
    for name, config in study.runs.items():
        try:
            read.run_settings(to_json_values(config))
        except ValueError as error:
            raise ValueError(f"run {name}: {error}") from error


def _read_json(path: Path) -> Any:
    return files.read_json(path) if path.exists() else None


class _Run(NamedTuple):
    """A config with its seed, and where it runs."""

    name: str
    seed: int
    config: ConfigDict
    directory: Path

    def changes(self) -> dict[str, tuple[Any, Any]]:
        """Settings that differ from those of the run in the directory."""
        saved = _read_json(self.directory / "config.json")
        if saved is None:
            return {}
        return changed_keys(saved_config(saved, self.directory), to_json_values(self.config))

    def refused_changes(self) -> dict[str, tuple[Any, Any]]:
        """Those of them with which the run cannot go on."""
        saved = _read_json(self.directory / "config.json")
        if saved is None:
            return {}
        return runner.refused_changes(
            saved_config(saved, self.directory), to_json_values(self.config)
        )

    def read(self) -> RunData:
        """Everything that the directory holds."""
        results, failure, environment = (
            _read_json(self.directory / f"{name}.json")
            for name in ("results", "failure", "environment")
        )
        records = MetricsLog.read(self.directory / "metrics.jsonl")
        return RunData(self.seed, results, failure, records, environment)

    def write_failure(self, error: str, message: str) -> None:
        """Records why the run has no result."""
        evidence = self.directory.glob("nonfinite_step_*")
        steps = [int(path.name.rsplit("_", 1)[1]) for path in evidence]
        files.write_json_atomically(
            self.directory / "failure.json",
            {
                "error": error,
                "message": message,
                "step": max(steps) if steps else self.read().last_step,
                "config_hash": config_hash(to_json_values(self.config)),
            },
        )


def _plan(study: Study, out: Path) -> list[_Run]:
    """Every run of the first seed, then of the next: an early table has them all."""
    runs = []
    for seed in study.seeds:
        for name, config in study.runs.items():
            copy: Any = config.copy_and_resolve_references()
            copy.seed = seed
            runs.append(_Run(name, seed, copy, out / "runs" / name / f"seed_{seed}"))
    return runs


def _select(runs: Sequence[_Run], *, retry_failed: bool) -> list[_Run]:
    """The runs that are still to do.

    Raises:
      ChangedConfigError: directories hold runs of other configs.
    """
    changes = [run.changes() for run in runs]
    refused = [
        f"  {run.directory}, {key}: the run has {old!r}, got {new!r}"
        for run in runs
        for key, (old, new) in run.refused_changes().items()
    ]
    if refused:
        raise runner.ChangedConfigError(
            "the study has changed since these runs were started:\n" + "\n".join(refused) + "\n"
            "Nothing was run. Give another --out, other names to the changed runs, or the old settings."
        )
    todo = []
    for run, changed in zip(runs, changes, strict=True):
        data = run.read()
        is_done = data.results is not None
        # Of other evaluations, or of a shorter run.
        is_old = any(key.startswith(("evaluation.", "train.num_epochs")) for key in changed)
        if is_done and not is_old:
            continue
        current = config_hash(to_json_values(run.config))
        known = not is_done and data.failure is not None and data.failure["config_hash"] == current
        if not known or retry_failed:
            todo.append(run)
    return todo


def _core_shares(num_processes: int) -> list[set[int] | None]:
    """Cores of every process at once; None where they are not divided."""
    if num_processes == 1 or sys.platform != "linux":
        return [None] * num_processes
    cores = sorted(os.sched_getaffinity(0))
    if num_processes > len(cores):
        raise ValueError(f"--num_processes={num_processes} is more than the {len(cores)} cores")
    return [set(map(int, share)) for share in np.array_split(cores, num_processes)]


def _child_command(directory: Path) -> list[str]:
    code = "import sys; from studies import run as study; sys.exit(study.run_child())"
    return [
        sys.executable,
        "-u",
        "-c",
        code,
        str(directory),
    ]  # the directory: for who looks with ps


def _start(run: _Run, cores: set[int] | None, environment: dict[str, str]) -> subprocess.Popen:
    """Starts a run; the child reads its config from the pipe and lives as long as that is open."""
    run.directory.mkdir(parents=True, exist_ok=True)
    (run.directory / "failure.json").unlink(missing_ok=True)
    # Results of a shorter run or of another evaluation stay, under another name.
    results = _read_json(run.directory / "results.json")
    if results is not None and "train.num_epochs" in run.changes():
        runner.rename_results(run.directory, "", f"_step_{results['step']}")
    elif results is not None:
        wanted = runner.settings_sha256(to_json_values(run.config))
        runner.keep_other_results(run.directory, "", wanted)
        (run.directory / "results.json").unlink()
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((run.directory / "log.txt").open("a", encoding="utf-8"))
        if cores is not None and sys.platform == "linux":
            # Inherited by the child, so that it has them before JAX counts its cores.
            stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            os.sched_setaffinity(0, cores)
        process = subprocess.Popen(
            _child_command(run.directory),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the study, which tells its children once
        )
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # it died at once: its exit status will tell
            pickle.dump(run, process.stdin)
            process.stdin.flush()
    return process


def run_child() -> int:
    """The process of one run, which `_start` makes.

    Returns:
      Exit status.
    """

    def die_with_parent() -> None:
        os.read(0, 1)  # returns when the study is gone, however it went
        os.killpg(os.getpgid(0), signal.SIGKILL)

    run: _Run = pickle.load(sys.stdin.buffer)
    threading.Thread(target=die_with_parent, daemon=True).start()
    try:
        runner.train(run.config, run.directory)
    except runner.USER_ERRORS as error:
        traceback.print_exc()
        if isinstance(error, files.DirectoryInUseError):
            return _BUSY_STATUS  # says nothing of the run
        run.write_failure(type(error).__name__, str(error))
        return 1
    except Exception as error:
        if not messages.is_out_of_memory(error):
            raise  # a crash: the study says so
        traceback.print_exc()
        run.write_failure(
            "OutOfMemory",
            str(
                messages.for_person(error, packages=("jevb_jax", "configs", "studies", "__main__"))
            ),
        )
        return 1
    return 0


def _settle(run: _Run, status: int, *, is_stopping: bool) -> str:
    """What became of a run whose process has ended."""
    data = run.read()
    is_told = status in (0, _BUSY_STATUS, -signal.SIGTERM, -signal.SIGINT) or is_stopping
    if data.results is None and data.failure is None and not is_told:
        # Neither a result nor an error of its own: a crash.
        cause = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        tail = (run.directory / "log.txt").read_text(encoding="utf-8", errors="replace")[-2000:]
        run.write_failure(cause, tail)
        data = run.read()
    if data.results is not None:
        return "finished"
    if data.failure is not None:
        cause = f"{data.failure['error']} at step {data.failure['step']}"
        return f"FAILED, {cause}; see {run.directory / 'log.txt'}"
    why = "another process uses its directory" if status == _BUSY_STATUS else "stopped"
    return f"unfinished at step {data.last_step}, {why}"


def _execute(todo: Sequence[_Run], out: Path, *, num_processes: int, console: Console) -> int:
    """Runs what is to do; returns the number of the signal that stopped it, or 0."""
    environment = dict(os.environ)
    # One seed's programs are another's: measured, half of the time of a short run or more.
    environment.setdefault(CACHE_VARIABLE, str(out / "compile_cache"))
    if num_processes > 1:
        fraction = f"{0.9 / num_processes:.3f}"
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", fraction)
    free = _core_shares(num_processes)
    waiting = collections.deque(todo)
    active: dict[subprocess.Popen, tuple[_Run, set[int] | None, float]] = {}
    received: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        while previous:
            signal.signal(*previous.popitem())

    def stop(number: int, _: Any) -> None:
        received.append(number)
        restore()  # a second signal acts at once

    # Python lets no other thread handle signals: there they do what they did before.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, stop)
    try:
        while active or (waiting and not received):
            while waiting and free and not received:
                run, cores = waiting.popleft(), free.pop()
                active[_start(run, cores, environment)] = (run, cores, time.monotonic())
            time.sleep(0.1)
            if len(received) == 1:
                received.append(received[0])  # the children are told once
                for process in active:
                    process.terminate()
            for process in [process for process in active if process.poll() is not None]:
                process.communicate()  # closes the pipe
                run, cores, start = active.pop(process)
                free.append(cores)
                outcome = _settle(run, process.returncode, is_stopping=bool(received))
                messages.say(
                    console,
                    f"[{len(todo) - len(waiting) - len(active)}/{len(todo)}] {run.name}, seed "
                    f"{run.seed}: {outcome}, {(time.monotonic() - start) / 60:.1f} min; "
                    f"{len(waiting) + len(active)} remain",
                )
    finally:
        for process in active:
            process.kill()
            process.communicate()
        restore()
    return received[0] if received else 0


def _number(value: float, *, near: float) -> str:
    """Digits that suit a number of the size of `near`."""
    size = abs(near)
    return (
        f"{value:.3e}" if size >= 1e5 or 0 < size < 1e-2 else f"{value:.{4 if size < 10 else 2}f}"
    )


def _cell(values: Sequence[float], num_finished: int) -> str:
    """Mean ± sample standard deviation, with n where it is not that of the row."""
    if not values:
        return "-"
    mean = float(np.mean(values))
    spread = _number(float(np.std(values, ddof=1)), near=mean) if len(values) > 1 else "-"
    count = "" if len(values) == num_finished else f" (n = {len(values)})"
    return f"{_number(mean, near=mean)} ± {spread}{count}"


def _csv_table(study: Study, evidence: Evidence) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = ("mean", "std", "n", *(f"seed {seed}" for seed in study.seeds))
    labels = [measure.label for measure in study.measures]
    writer.writerow(
        ["run", "finished", *(f"{label}: {part}" for label in labels for part in parts)]
    )
    for run in (*study.runs, *study.averages):
        row: list[Any] = [run, evidence.status(run)]
        for label in labels:
            values = evidence.values(run, label)
            numbers = list(values.values())
            row.append(float(np.mean(numbers)) if numbers else "")
            row.append(float(np.std(numbers, ddof=1)) if len(numbers) > 1 else "")
            row += [len(numbers), *(values.get(seed, "") for seed in study.seeds)]
        writer.writerow(row)
    return text.getvalue()


def _facts(study: Study, evidence: Evidence, command: str) -> list[str]:
    """Lines above the table: what made it."""
    environments = [
        d.environment for seeds in evidence.runs.values() for d in seeds if d.environment
    ]
    dirty = {True: " with uncommitted changes", False: ""}
    facts = {
        "commit": {
            f"{e['commit'] or 'unknown'}{dirty[e['uncommitted_changes']]}" for e in environments
        },
        "jax": {e["versions"]["jax"] for e in environments},
        "device": {f"{len(e['devices'])} x {e['devices'][0]}" for e in environments},
    }
    lines = [f"command: `{command}`", f"seeds: {', '.join(map(str, study.seeds))}"]
    return lines + [f"{name}: {', '.join(sorted(values))}" for name, values in facts.items()]


def _footnotes(study: Study, evidence: Evidence) -> list[str]:
    """What every measure is, in the words of the protocol."""
    finished = [d for seeds in evidence.runs.values() for d in seeds if d.results is not None]
    lines = []
    for measure in study.measures:
        if isinstance(measure, Result):
            entries = [entry for data in finished if (entry := data.result(measure))]
            texts = collections.Counter(entry["protocol"] for entry in entries)
            what = f"`{measure.name}`, {measure.features}, {measure.encoder} encoder"
            several = {text: f" ({n} of {len(entries)})" for text, n in texts.items()}
            what += "".join(f"; {text}{several[text] if len(texts) > 1 else ''}" for text in texts)
        else:
            what = f"{measure.take} logged value of `{measure.key}`"
        has_value = any(data.value(measure) is not None for data in finished)
        lines.append(
            f"{measure.label}: {what}" + ("" if has_value else " (no finished run has it)")
        )
    return lines


def _local_directory(out: str | Path) -> Path:
    path = files.to_path(out)
    if files.is_remote(path):
        raise ValueError(f"a study is run in a directory of this machine, got {path}")
    return path


def write_report(study: Study, out: str | Path, *, command: str) -> None:
    """Writes `table.md`, `table.csv` and a PNG for each figure, from the run directories alone.

    Args:
      study: what was run.
      out: directory of the study.
      command: said to regenerate the report.

    Raises:
      FileNotFoundError: there is no such directory.
    """
    out = _local_directory(out)
    if not out.is_dir():
        raise FileNotFoundError(f"--out must be the directory of a study, {out} does not exist")
    plan = _plan(study, out)
    data = {name: [run.read() for run in plan if run.name == name] for name in study.runs}
    by_label = {measure.label: measure for measure in study.measures}
    evidence = Evidence(data, by_label, study.averages)
    labels = [measure.label for measure in study.measures]
    lines = [f"# {study.title}", "", *(f"* {fact}" for fact in _facts(study, evidence, command))]
    for run in plan:
        for key, (old, new) in run.changes().items():
            lines.append(f"* {run.name}, seed {run.seed} ran with {key} = {old!r}; now {new!r}")
    lines += ["", "Mean ± sample standard deviation over the finished seeds.", ""]
    lines += [f"| run | finished | {' | '.join(labels)} |", "|---" * (2 + len(labels)) + "|"]
    for name in (*study.runs, *study.averages):
        seeds = [evidence.values(name, label) for label in labels]
        is_average = name in study.averages
        count = (
            max(map(len, seeds)) if is_average else sum(d.results is not None for d in data[name])
        )
        cells = [_cell([*values.values()], count) for values in seeds]
        lines.append(f"| {' | '.join([name, evidence.status(name), *cells])} |")
    lines += ["", *(f"* {note}" for note in _footnotes(study, evidence))]
    for figure in study.figures:
        figure.draw(evidence).savefig(out / f"{figure.name}.png", format="png", dpi=150)
        lines += ["", f"![{figure.title}]({figure.name}.png)"]
    files.write_text_atomically(out / "table.md", "\n".join(lines) + "\n")
    files.write_text_atomically(out / "table.csv", _csv_table(study, evidence))


def run_study(
    study: Study,
    out: str | Path,
    *,
    command: str,
    num_processes: int = 1,
    retry_failed: bool = False,
    console: Console | None = None,
) -> int:
    """Runs what is not yet finished, and writes the report.

    Args:
      study: what to run.
      out: directory of the study; made if it does not exist, continued if it holds one.
      command: that does this, for the report.
      num_processes: runs at once, each on its share of the cores.
      retry_failed: whether runs that failed before are tried again.
      console: where people read; standard output by default.

    Returns:
      Exit status: 128 + n when signal n stopped it, 1 when runs are missing for another reason than
      numbers that were not finite, which are a result, else 0.

    Raises:
      ChangedConfigError: `out` holds runs of other configs; nothing was run.
      DirectoryInUseError: another process works on `out`.
      ValueError: more processes than cores.
    """
    console = console or standard_output()
    out = _local_directory(out)
    out.mkdir(parents=True, exist_ok=True)
    # Who reads the lines may leave before the study ends: the report has everything.
    with files.lock_directory(out), unbroken(console):
        plan = _plan(study, out)
        todo = _select(plan, retry_failed=retry_failed)
        console.print(f"{len(plan)} runs, {len(plan) - len(todo)} done before, {len(todo)} to do.")
        number = _execute(todo, out, num_processes=num_processes, console=console)
        write_report(study, out, command=command)
        messages.say(console, f"Report: {out / 'table.md'}")
        if number:
            messages.say(
                console,
                f"{signal.Signals(number).name}: stopped. The same command goes on from there:\n"
                f"{command}",
            )
            return 128 + number
    ends = [run.read() for run in plan]
    is_missing = (
        d.results is None and (d.failure is None or d.failure["error"] != "NonFiniteError")
        for d in ends
    )
    return int(any(is_missing))


def main(arguments: Sequence[str]) -> int:
    """Runs the flags.

    Args:
      arguments: what the command line was parsed to.

    Returns:
      Exit status.
    """
    parser = argparse.ArgumentParser("python -m studies.run", description=__doc__)
    parser.add_argument("--study", required=True, help="Python file with get_study()")
    parser.add_argument("--out", required=True, help="directory of the study")
    parser.add_argument("--num_processes", type=int, default=1, help="runs at once")
    parser.add_argument("--report_only", action="store_true", help="run nothing")
    parser.add_argument("--retry_failed", action="store_true", help="try failed runs again")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    flags = parser.parse_args(arguments)
    if flags.num_processes < 1:
        parser.error(f"--num_processes must be at least 1, got {flags.num_processes}")
    command = f"python -m studies.run --study={flags.study} --out={flags.out}"
    try:
        study = load_study(flags.study)
        if flags.report_only:
            write_report(study, flags.out, command=f"{command} --report_only")
            return 0
        check_settings(study)
        return run_study(
            study,
            flags.out,
            command=command,
            num_processes=flags.num_processes,
            retry_failed=flags.retry_failed,
        )
    except Exception as error:
        message = messages.for_person(
            error, packages=("jevb_jax", "configs", "studies", "__main__")
        )
        if message is None or flags.traceback:
            raise
        print(message, file=sys.stderr)
        return 1


if __name__ == "__main__":
    # Study files import this module by its name: run that copy, so that there is one Study.
    from studies import run as _study

    sys.exit(_study.main(sys.argv[1:]))
