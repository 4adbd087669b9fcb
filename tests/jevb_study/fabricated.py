"""Run directories as the runner leaves them, made by hand."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import smoke
from jevb_jax.runs.checkpoints import config_hash
from jevb_jax.training.experiment import to_json_values
from jevb_study.spec import Logged, Result, Study

ENVIRONMENT = {
    "commit": "abc123",
    "uncommitted_changes": False,
    "versions": {"jax": "0.10.2"},
    "devices": ["cpu"],
}
MEASURES = (
    Result("linear", "linear_accuracy"),
    Result("k-NN before", "knn_20_accuracy", encoder="untrained"),
    Logged("rank", "health/effective_rank"),
    Logged("largest rank", "health/effective_rank", take="max"),
    Logged("lowest rank", "health/effective_rank", take="min"),
)


def config(**settings: Any) -> ConfigDict:
    """The config of a run, with settings that no other config has."""
    made: Any = smoke.get_config()
    with made.unlocked():
        made.evaluation.update({"k": (1, 2), **settings.pop("evaluation", {})})
        made.update({"df": 5.0, **settings})
    return made


def directory(out: Path, name: str, seed: int) -> Path:
    return out / "runs" / name / f"seed_{seed}"


def entry(name: str, value: float, protocol: str) -> dict[str, Any]:
    return {"name": name, "features": "representation", "value": value, "protocol": protocol}


def fabricate(
    out: Path,
    made: Study,
    name: str,
    seed: int,
    *,
    accuracy: float | None = None,
    ranks: tuple[float, ...] = (),
    failed_at: int | None = None,
) -> Path:
    """A run directory as the runner leaves it; steps 10, 20, ... of `ranks`."""
    where = directory(out, name, seed)
    where.mkdir(parents=True)
    values = {**to_json_values(made.runs[name]), "seed": seed}
    files = {"config": values, "environment": ENVIRONMENT}
    if accuracy is not None:
        files["results"] = {
            "trained": [entry("linear_accuracy", accuracy, "probe on test")],
            "untrained": [entry("knn_20_accuracy", accuracy / 2, f"seed {seed % 2} on test")],
            "step": 30,
        }
    if failed_at is not None:
        files["failure"] = {
            "error": "NonFiniteError",
            "message": "loss nan",
            "step": failed_at,
            "config_hash": config_hash(values),
        }
    for file, content in files.items():
        (where / f"{file}.json").write_text(json.dumps(content))
    lines = [{"step": 10 * i, "health/effective_rank": r} for i, r in enumerate(ranks, start=1)]
    (where / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return where


def rows(out: Path) -> dict[str, list[str]]:
    lines = (out / "table.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}
