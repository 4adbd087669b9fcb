"""Reads the run directories of a study and the numbers in them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jevb_jax.runs import files
from jevb_jax.runs.checkpoints import changed_keys
from jevb_jax.runs.metrics_log import MetricsLog
from jevb_jax.settings.config_versions import saved_config
from jevb_study.spec import Measure, PlannedRun, Result, Study


class RunData(NamedTuple):
    """Content of a run directory; a missing file is None or empty."""

    config: dict[str, Any] | None  # with the defaults of settings that are newer than the run
    results: dict[str, Any] | None  # present if the run is finished
    failure: dict[str, Any] | None  # written by `train_one` if a step was not finite
    records: list[dict[str, Any]]  # lines of `metrics.jsonl`
    environment: dict[str, Any] | None

    @property
    def has_failed(self) -> bool:
        """Whether the run ended without results for a recorded reason."""
        return self.results is None and self.failure is not None

    @property
    def last_step(self) -> int:
        """The last logged step."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def views_per_step(self) -> int:
        """Views in a batch. A small crop counts as one view; 0 if the run has not started."""
        if self.config is None:
            return 0
        views = self.config["augmentation"]
        count = views["num_views"] + views["num_small_crops"]
        return self.config["train"]["batch_size"] * count

    def changes(self, config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Settings that differ: `{dotted key: (value in this run, value in the config)}`."""
        return {} if self.config is None else changed_keys(self.config, config)

    def entry(self, result: Result) -> dict[str, Any] | None:
        """The entry of `results.json` with the number and its protocol."""
        entries = (self.results or {}).get(result.encoder, [])
        names = (result.name, result.features)
        return next((e for e in entries if (e["name"], e["features"]) == names), None)

    def series(self, key: str) -> dict[int, float]:
        """Logged values by step."""
        return {record["step"]: record[key] for record in self.records if key in record}

    def value(self, measure: Measure) -> float | None:
        """Value of a measure; None if the run is not finished or does not have it."""
        if self.results is None:
            return None
        if isinstance(measure, Result):
            entry = self.entry(measure)
            return None if entry is None else float(entry["value"])
        values = list(self.series(measure.key).values())
        take = {"last": lambda v: v[-1], "max": max, "min": min}[measure.take]
        return float(take(values)) if values else None


def read_run(directory: Path) -> RunData:
    """Reads a run directory. The run may be finished, under way or not started."""

    def read(name: str) -> Any:
        path = directory / f"{name}.json"
        return files.read_json(path) if path.exists() else None

    config = read("config")
    return RunData(
        config=None if config is None else saved_config(config, directory / "config.json"),
        results=read("results"),
        failure=read("failure"),
        records=MetricsLog.read(directory / "metrics.jsonl"),
        environment=read("environment"),
    )


class Evidence(NamedTuple):
    """A study and the content of its run directories."""

    study: Study
    plan: Sequence[PlannedRun]
    runs: Mapping[str, Mapping[int, RunData]]  # by name and seed

    @property
    def found(self) -> list[RunData]:
        """All runs in the order of their names, including those that have not started."""
        return [data for seeds in self.runs.values() for data in seeds.values()]

    def values(self, run: str, label: str) -> dict[int, float]:
        """A measure by seed, for finished runs that have it. An average needs all its runs."""
        if run in self.study.averages:
            parts = [self.values(one, label) for one in self.study.averages[run]]
            seeds = set.intersection(*(set(part) for part in parts))
            return {seed: float(np.mean([part[seed] for part in parts])) for seed in sorted(seeds)}
        measure = next(one for one in self.study.measures if one.label == label)
        pairs = ((seed, data.value(measure)) for seed, data in self.runs[run].items())
        return {seed: value for seed, value in pairs if value is not None}

    def failed(self, run: str) -> str:
        """How many seeds failed, as text; empty if none."""
        count = sum(data.has_failed for data in self.runs[run].values())
        return f"{count} of {len(self.runs[run])} failed" if count else ""

    def status(self, run: str) -> str:
        """The state of every seed, as text."""
        if run in self.study.averages:
            return f"mean of {len(self.study.averages[run])} runs"
        seeds = self.runs[run]
        parts = [f"{sum(data.results is not None for data in seeds.values())} of {len(seeds)}"]
        failures: dict[str, list[str]] = {}
        for seed, data in seeds.items():
            if data.results is not None:
                continue
            if data.failure is not None:
                failures.setdefault(data.failure["error"], []).append(str(data.failure["step"]))
            else:
                at = f"unfinished at step {data.last_step}" if data.environment else "not started"
                parts.append(f"seed {seed} {at}")
        for error, steps in failures.items():
            parts.append(f"{len(steps)} failed: {error} at step {', '.join(steps)}")
        return "; ".join(parts)


def read_evidence(study: Study, out: Path) -> Evidence:
    """Reads every run directory of a study."""
    plan = study.plan(out)
    runs: dict[str, dict[int, RunData]] = {name: {} for name in study.runs}
    for run in plan:
        runs[run.name][run.seed] = read_run(run.directory)
    return Evidence(study, plan, runs)
