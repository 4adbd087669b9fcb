"""Studies: fabricated run directories, children that are stubs, and (slow) the real thing."""

import csv
import dataclasses
import io
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from rich.console import Console

from configs import smoke
from jevb_jax import runner
from jevb_jax.checkpoints import config_hash
from jevb_jax.experiment import to_json_values
from studies import run as study
from studies.run import Comparison, Curves, Logged, Result, Study, Sweep

ROOT = Path(__file__).resolve().parent.parent.parent
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
    evaluation = {"k": (1, 2), "knn_uniform_k": (10,), **settings.pop("evaluation", {})}
    return ConfigDict({"seed": 0, "evaluation": evaluation, "df": 5.0, **settings})


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


@pytest.fixture
def fabricated(tmp_path) -> tuple[Study, Path]:
    made = Study(
        title="Tails",
        runs={
            "simsiam": config(method="simsiam"),
            "cauchy": config(df=1.0),
            "t": config(),
            "gaussian": config(df=math.inf),
        },
        seeds=(0, 1, 2),
        measures=MEASURES,
        figures=(
            Comparison("all", "All of them", ("simsiam", "t", "gaussian"), ("linear", "rank")),
            Sweep(
                "df",
                "Accuracy against the tail",
                "df",
                {math.inf: "gaussian", 5.0: "t", 1.0: "cauchy"},
                ("linear", "rank"),
                log_x=True,
                references=("simsiam",),
            ),
            Curves("limit", "The limit", ("t", "gaussian"), ("health/effective_rank", "train/no")),
        ),
    )
    for seed, accuracy in enumerate((0.5, 0.52, 0.57)):
        ranks = (3.0, 9.0 + seed, 6.0 - seed)
        fabricate(tmp_path, made, "t", seed, accuracy=accuracy, ranks=ranks)
        fabricate(tmp_path, made, "simsiam", seed, accuracy=accuracy - 0.01)
    fabricate(tmp_path, made, "cauchy", 0, accuracy=0.4, ranks=(2.0, 3.0, 20.5))
    fabricate(tmp_path, made, "cauchy", 1, ranks=(2.0,))
    fabricate(tmp_path, made, "gaussian", 0, accuracy=0.3, ranks=(2.0, 3.0, 4.0))
    fabricate(tmp_path, made, "gaussian", 1, ranks=(2.0, math.nan), failed_at=20)
    fabricate(tmp_path, made, "gaussian", 2, ranks=(1.0, 1.5), failed_at=21)
    return made, tmp_path


def rows(out: Path) -> dict[str, list[str]]:
    lines = (out / "table.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}


def test_average_of_runs_is_taken_seed_by_seed(tmp_path):
    made = Study(
        title="One class",
        runs={f"class_{c}": config(df=float(c)) for c in (1, 2)},
        seeds=(0, 1),
        measures=MEASURES[:1],
        averages={"mean": ("class_1", "class_2")},
    )
    values = {("class_1", 0): 0.5, ("class_1", 1): 0.7, ("class_2", 0): 0.6}
    for (name, seed), accuracy in values.items():
        fabricate(tmp_path, made, name, seed, accuracy=accuracy)
    study.write_report(made, tmp_path, command="x")
    assert rows(tmp_path)["mean"] == ["mean of 2 runs", "0.5500 ± -"]  # seed 1 is not there yet
    fabricate(tmp_path, made, "class_2", 1, accuracy=0.9)
    study.write_report(made, tmp_path, command="x")
    spread = np.std([0.55, 0.8], ddof=1)
    assert rows(tmp_path)["mean"] == ["mean of 2 runs", f"0.6750 ± {spread:.4f}"]
    assert "mean,mean of 2 runs,0.675" in (tmp_path / "table.csv").read_text()
    for averages in ({"class_1": ("class_2",)}, {"mean": ("class_3",)}, {"mean": ()}):
        with pytest.raises(ValueError, match="needs a name of its own and runs among"):
            dataclasses.replace(made, averages=averages)


def test_table_agrees_with_numpy(fabricated):
    made, out = fabricated
    study.write_report(made, out, command="python -m studies.run --this")
    table = rows(out)
    assert table["run"] == ["finished", *(measure.label for measure in MEASURES)]
    mean, spread = np.mean([0.5, 0.52, 0.57]), np.std([0.5, 0.52, 0.57], ddof=1)
    assert table["t"][:2] == ["3 of 3", f"{mean:.4f} ± {spread:.4f}"]
    assert table["t"][2] == f"{mean / 2:.4f} ± {spread / 2:.4f}"
    assert table["t"][3:] == ["5.0000 ± 1.0000", "10.00 ± 1.00", "3.0000 ± 0.0000"]
    assert table["simsiam"][3:] == ["-", "-", "-"]  # it logs no rank
    unfinished = "1 of 3; seed 1 unfinished at step 10; seed 2 not started"
    assert table["cauchy"] == [
        unfinished, "0.4000 ± -", "0.2000 ± -", "20.50 ± -", "20.50 ± -", "2.0000 ± -"
    ]  # fmt: skip
    assert table["gaussian"][0] == "1 of 3; 2 failed: NonFiniteError at step 20, 21"
    assert table["gaussian"][1] == "0.3000 ± -"  # of the finished seed alone

    text = (out / "table.md").read_text()
    for fact in (
        "# Tails",
        "command: `python -m studies.run --this`",
        "seeds: 0, 1, 2",
        "commit: abc123",
        "jax: 0.10.2",
        "device: 1 x cpu",
        "linear: `linear_accuracy`, representation, trained encoder; probe on test\n",
        "; seed 0 on test (6 of 8); seed 1 on test (2 of 8)",
        "rank: last logged value of `health/effective_rank`",
    ):
        assert fact in text, fact
    for figure in made.figures:
        assert f"({figure.name}.png)" in text
        with Image.open(out / f"{figure.name}.png") as image:
            assert min(image.size) > 300

    by_run = {r["run"]: r for r in csv.DictReader(io.StringIO((out / "table.csv").read_text()))}
    assert float(by_run["t"]["linear: mean"]) == mean
    assert float(by_run["t"]["linear: std"]) == spread
    assert [by_run["t"][f"linear: seed {s}"] for s in range(3)] == ["0.5", "0.52", "0.57"]
    cauchy = [by_run["cauchy"][f"linear: {p}"] for p in ("mean", "std", "n", "seed 0", "seed 1")]
    assert cauchy == ["0.4", "", "1", "0.4", ""]
    assert by_run["gaussian"]["rank: n"] == "1"


def test_a_measure_of_some_seeds_or_of_no_run_says_so(fabricated):
    made, out = fabricated
    (directory(out, "t", 2) / "metrics.jsonl").unlink()
    made = Study("x", made.runs, made.seeds, (*MEASURES, Result("typo", "linear_acuracy")))
    study.write_report(made, out, command="")
    assert rows(out)["t"][3] == "5.5000 ± 0.7071 (n = 2)"
    assert rows(out)["t"][6] == "-"
    text = (out / "table.md").read_text()
    assert text.count("(no finished run has it)") == 1
    assert "typo: `linear_acuracy`, representation, trained encoder (no finished" in text


@pytest.mark.parametrize(
    ("value", "near", "text"),
    [
        (0.5, 0.5, "0.5000"), (0.0, 0.0, "0.0000"), (-9.99999, -9.99999, "-10.0000"),
        (1.25, 12.0, "1.25"), (2e-5, 2e-5, "2.000e-05"), (1.0, 3e6, "1.000e+00"),
    ],
)  # fmt: skip
def test_digits_suit_the_mean(value, near, text):
    assert study._number(value, near=near) == text


def evidence(made: Study, out: Path) -> study.Evidence:
    data = {n: [r.read() for r in study._plan(made, out) if r.name == n] for n in made.runs}
    return study.Evidence(data, {measure.label: measure for measure in made.measures})


def points(axis: Any) -> list[list[list[float]]]:
    return [np.asarray(line.get_xydata()).tolist() for line in axis.lines]


def test_comparison_shows_seeds_and_means(fabricated):
    made, out = fabricated
    linear, rank = made.figures[0].draw(evidence(made, out)).axes
    names = [label.get_text() for label in linear.get_yticklabels()]
    assert names == ["simsiam", "t", "gaussian (2 of 3 failed)"]
    assert linear.get_ylim() == (2.5, -0.5)  # the first on top
    seeds, mean = points(linear)[2:4]
    assert seeds == [[0.5, 1], [0.52, 1], [0.57, 1]]
    np.testing.assert_allclose(mean, [[0.53, 1]])
    assert points(rank)[0] == [[6, 1], [5, 1], [4, 1]]  # simsiam has none


def test_sweep_draws_infinity_at_the_edge_and_references(fabricated):
    made, out = fabricated
    linear, _ = made.figures[1].draw(evidence(made, out)).axes
    assert [label.get_text() for label in linear.get_xticklabels()] == ["1", "5", "∞"]
    edge = linear.get_xticks()[2]
    assert edge > 5
    assert linear.get_xscale() == "log"
    np.testing.assert_allclose(points(linear)[3], [[1, 0.4], [5, 0.53]])
    np.testing.assert_allclose(points(linear)[4], [[5, 0.53], [edge, 0.3]])
    assert linear.get_legend().get_texts()[0].get_text() == "simsiam"
    np.testing.assert_allclose([y for _, y in points(linear)[5]], [0.52, 0.52])
    assert [text.get_text() for text in linear.texts] == ["2 of 3 failed"]


@pytest.mark.parametrize(
    ("values", "log_x", "edge"),
    [([1.0, 5.0], True, 7.5), ([1.0, 1e4], True, 1e4 * 1e4**0.15), ([0.0, 10.0], False, 11.5)],
)
def test_edge_of_a_sweep(values, log_x, edge):
    runs = dict.fromkeys((math.inf, *values), "a")
    positions = Sweep("s", "", "x", runs, ("m",), log_x=log_x)._positions()
    assert list(positions) == [*values, math.inf]
    np.testing.assert_allclose(positions[math.inf], edge)


def test_sweep_of_the_limit_alone_or_without_results(fabricated, tmp_path):
    made, out = fabricated
    for runs, where in (({math.inf: "t"}, out), ({math.inf: "t", 1.0: "cauchy"}, tmp_path / "x")):
        figure = Sweep("s", "", "df", runs, ("linear",))
        figure.draw(evidence(made, where)).savefig(io.BytesIO())


def test_curves_show_the_range_and_where_seeds_end(fabricated):
    made, out = fabricated
    rank, nothing = made.figures[2].draw(evidence(made, out)).axes
    lines = points(rank)
    np.testing.assert_allclose(lines[0], [[10, 3], [20, 10], [30, 5]])  # the mean of t
    band = rank.collections[0].get_paths()[0].vertices
    for corner in ([20, 9], [20, 11], [30, 4], [30, 6]):
        assert corner in band.tolist()
    texts = [text.get_text() for text in rank.get_legend().get_texts()]
    assert texts == ["t", "gaussian (2 of 3 failed)"]
    crosses = [line.get_xydata()[-1].tolist() for line in rank.lines if line.get_marker() == "x"]
    assert crosses == [[10, 2], [20, 1.5]]  # the last finite values
    assert [[20, 3], [30, 4]] in [line[-2:] for line in lines]  # the seed that went on
    assert [text.get_text() for text in nothing.texts] == ["logged by none"]


def test_curves_without_a_common_step_draw_every_seed(fabricated):
    made, out = fabricated
    where = directory(out, "t", 2) / "metrics.jsonl"
    where.write_text('{"step": 11, "health/effective_rank": 1.0}\n')
    lines = points(made.figures[2].draw(evidence(made, out)).axes[0])
    assert [[11, 1]] in lines
    assert [[10, 3], [20, 9], [30, 6]] in lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": {}}, "at least one run"),
        ({"seeds": ()}, "one seed"),
        ({"seeds": (1, 2, 1)}, r"every seed .*\[1\]"),
        ({"runs": {"a/b": config()}}, "a/b"),
        ({"runs": {"": config()}}, "file names"),
        ({"runs": {"a": config(), "b": config()}}, "runs a and b have the same config"),
        ({"measures": (Logged("x", "k"), Logged("x", "l"))}, r"measure .*\['x'\]"),
        ({"figures": (Comparison("c", "", ("a", "z"), ("m",)),)}, r"figure c: no runs \['z'\]"),
        ({"figures": (Comparison("c", "", ("a",), ("n",)),)}, r"no measures \['n'\] among \['m'\]"),
        ({"figures": (Sweep("s", "", "x", {1.0: "z"}, ("m",)),)}, r"no runs \['z'\]"),
        ({"figures": (Sweep("s", "", "x", {1.0: "a"}, ("m",), references=("y",)),)}, "'y'"),
        ({"figures": (Curves("c", "", ("z",), ("k",)),)}, r"\['z'\] among \['a'\]"),
        ({"figures": (Curves("c", "", ("a",), ()),)}, "nothing to draw"),
        ({"figures": (Curves("c", "", ("a",), ("k",)),) * 2}, r"figure .*\['c'\]"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    fitting = {"runs": {"a": config()}, "seeds": (0,), "measures": (Logged("m", "k"),)}
    Study("fits", **fitting)
    with pytest.raises(ValueError, match=message):
        Study("does not", **(fitting | changes))


# What a child does, without JAX: it finishes, is not finite, crashes, or waits for a signal.
CHILD = f"""
import json, os, signal, sys, time
from pathlib import Path
where = Path(sys.argv[1]); name = where.parent.name; seed = int(where.name[5:])
with (where.parent.parent.parent / "order.txt").open("a") as file: file.write(f"{{name}} {{seed}}\\n")
keys = ("JEVB_JAX_COMPILE_CACHE", "XLA_PYTHON_CLIENT_MEM_FRACTION")
seen = {{key: os.environ.get(key) for key in keys}} | {{"cores": sorted(os.sched_getaffinity(0))}}
(where / "seen.json").write_text(json.dumps(seen))
(where / "environment.json").write_text(json.dumps({ENVIRONMENT!r}))
if name == "nan":
    failure = dict(error="NonFiniteError", message="", step=3, config_hash=sys.argv[2])
    (where / "failure.json").write_text(json.dumps(failure)); sys.exit(1)
if name == "crash": print("last words", flush=True); os.kill(os.getpid(), signal.SIGKILL)
if name == "exit": sys.exit(7)
if name == "busy": sys.exit(75)
if name == "slow":  # it stumbles on its way out, which is no failure of the run
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(9)); (where / "ready").touch(); time.sleep(60)
if name == "stubborn":
    signal.signal(signal.SIGTERM, lambda *_: (where / "told").touch())
    (where / "pid").write_text(str(os.getpid())); (where / "ready").touch()
    while True: time.sleep(60)
results = dict(trained=[dict(name="linear_accuracy", features="representation", value=0.5 + seed,
    protocol="p")], step=1)
time.sleep(0.2)
(where / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def stubbed(monkeypatch):
    def command(run: Path) -> list[str]:
        # The hash of what the stub fails with: df is its seed's, see `tiny`.
        made = config(name=run.parent.name)
        values = {**to_json_values(made), "seed": int(run.name[5:])}
        return [sys.executable, "-S", "-c", CHILD, str(run), config_hash(values)]

    monkeypatch.setattr(study, "_child_command", command)
    monkeypatch.delenv("JEVB_JAX_COMPILE_CACHE", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)


def tiny(*names: str, seeds: tuple[int, ...] = (0, 1)) -> Study:
    runs = {name: config(name=name) for name in names}
    return Study("Tiny", runs, seeds, MEASURES[:1])


def execute(made: Study, out: Path, **settings: Any) -> tuple[int, str]:
    text = io.StringIO()
    console = Console(file=text, width=80)
    status = study.run_study(made, out, command="the command", console=console, **settings)
    return status, text.getvalue()


def started(out: Path) -> list[str]:
    path = out / "order.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_every_run_once_and_failures_do_not_stop_the_rest(tmp_path, stubbed):
    made = tiny("a", "nan", "crash", "b")
    status, text = execute(made, tmp_path)
    assert status == 1  # for the crash
    assert started(tmp_path) == [f"{n} {s}" for s in (0, 1) for n in ("a", "nan", "crash", "b")]
    assert "8 runs, 0 done before, 8 to do." in text
    assert "[1/8] a, seed 0: finished, 0.0 min; 7 remain" in text
    assert "[2/8] nan, seed 0: FAILED, NonFiniteError at step 3; see " in text
    assert "crash, seed 1: FAILED, SIGKILL at step 0" in text
    table = rows(tmp_path)
    assert table["a"] == ["2 of 2", "1.0000 ± 0.7071"]
    assert table["nan"] == ["0 of 2; 2 failed: NonFiniteError at step 3, 3", "-"]
    assert table["crash"][0] == "0 of 2; 2 failed: SIGKILL at step 0, 0"
    failure = json.loads((directory(tmp_path, "crash", 0) / "failure.json").read_text())
    assert failure["message"] == "last words\n"
    seen = json.loads((directory(tmp_path, "a", 0) / "seen.json").read_text())
    assert seen["JEVB_JAX_COMPILE_CACHE"] == str(tmp_path / "compile_cache")
    assert seen["XLA_PYTHON_CLIENT_MEM_FRACTION"] is None

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    status, text = execute(made, tmp_path)
    assert "8 done before, 0 to do." in text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")} == times
    assert execute(made, tmp_path, retry_failed=True)[0] == 1
    assert started(tmp_path) == ["nan 0", "crash 0", "nan 1", "crash 1"]


def test_exit_status(tmp_path, stubbed):
    assert execute(tiny("a", "nan"), tmp_path / "nan")[0] == 0  # not finite: a result
    assert execute(tiny("exit"), tmp_path / "exit")[0] == 1
    assert rows(tmp_path / "exit")["exit"][0] == "0 of 2; 2 failed: exit status 7 at step 0, 0"
    status, text = execute(tiny("busy", seeds=(3,)), tmp_path / "busy")
    assert status == 1
    assert "busy, seed 3: unfinished at step 0, another process uses its directory" in text
    assert not (directory(tmp_path / "busy", "busy", 3) / "failure.json").exists()


def test_changed_configs_are_refused_by_name_and_nothing_runs(tmp_path, stubbed):
    made = tiny("a")
    fabricate(tmp_path, made, "a", 0, accuracy=0.1)
    fabricate(tmp_path, made, "a", 1, failed_at=3)
    other = Study("Other", {"a": config(name="a", df=3.0), "b": config()}, (0, 1), made.measures)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    with pytest.raises(runner.ChangedConfigError, match=r"seed_0, df: the run has 5.0, got 3.0"):
        execute(other, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before
    assert started(tmp_path) == []
    # A report is still made of them, and says so.
    study.write_report(other, tmp_path, command="")
    assert "* a, seed 0 ran with df = 5.0; now 3.0" in (tmp_path / "table.md").read_text()


def test_another_evaluation_is_made_again_and_a_mended_failure_runs(tmp_path, stubbed):
    made = tiny("a")
    fabricate(tmp_path, made, "a", 0, accuracy=0.1)
    failed = fabricate(tmp_path, made, "a", 1, failed_at=0)
    (failed / "config.json").unlink()  # as when the runner refuses the config
    assert execute(made, tmp_path)[0] == 0
    assert started(tmp_path) == []
    changed = Study("x", {"a": config(name="a", evaluation={"k": (3,)})}, (0, 1), made.measures)
    assert execute(changed, tmp_path)[0] == 0
    assert started(tmp_path) == ["a 0", "a 1"]
    assert not (failed / "failure.json").exists()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_processes_at_once_have_their_own_cores(tmp_path, stubbed, monkeypatch):
    cores = os.sched_getaffinity(0)
    with pytest.raises(ValueError, match=f"more than the {len(cores)} cores"):
        execute(tiny("a"), tmp_path, num_processes=len(cores) + 1)
    monkeypatch.setenv("JEVB_JAX_COMPILE_CACHE", "mine")
    assert execute(tiny("a", "b"), tmp_path, num_processes=2)[0] == 0
    seen = [
        json.loads((directory(tmp_path, name, seed) / "seen.json").read_text())
        for seed in (0, 1)
        for name in ("a", "b")
    ]
    first, second = set(seen[0]["cores"]), set(seen[1]["cores"])
    assert not first & second
    assert first | second == cores == os.sched_getaffinity(0)
    assert {one["XLA_PYTHON_CLIENT_MEM_FRACTION"] for one in seen} == {"0.450"}
    assert {one["JEVB_JAX_COMPILE_CACHE"] for one in seen} == {"mine"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_children_and_says_how_to_go_on(tmp_path, stubbed, number):
    def send() -> None:
        while not (directory(tmp_path, "slow", 0) / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    threading.Thread(target=send, daemon=True).start()
    status, text = execute(tiny("a", "slow", "b"), tmp_path)
    assert status == 128 + number
    assert "slow, seed 0: unfinished at step 0, stopped" in text
    assert f"{number.name}: stopped. The same command goes on from there:\nthe command" in text
    assert started(tmp_path) == ["a 0", "slow 0"]
    assert rows(tmp_path)["slow"][0].startswith("0 of 2; seed 0 unfinished at step 0")
    assert signal.getsignal(number) == handler


@pytest.fixture
def interruptible():
    """Ctrl-C as a terminal has it: the workers of pytest-xdist ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_ends_the_study_and_its_children_at_once(tmp_path, stubbed):
    where = directory(tmp_path, "stubborn", 0)

    def send() -> None:
        for mark in ("ready", "told"):
            while not (where / mark).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        execute(tiny("stubborn"), tmp_path)
    assert not is_running(int((where / "pid").read_text()))
    assert not (where / "failure.json").exists()
    with study.files.lock_directory(tmp_path):
        pass


def test_two_studies_in_one_directory(tmp_path, stubbed):
    with (
        study.files.lock_directory(tmp_path),
        pytest.raises(study.files.DirectoryInUseError, match="in use by process"),
    ):
        execute(tiny("a"), tmp_path)


def test_training_in_a_directory_in_use_is_refused_and_changes_nothing(tmp_path):
    with (
        study.files.lock_directory(tmp_path),
        pytest.raises(runner.USER_ERRORS, match="in use by process"),
    ):
        runner.train(smoke.get_config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("error", "status", "failure"),
    [
        (None, 0, None),
        (runner.NonFiniteError("loss nan"), 1, ("NonFiniteError", "loss nan", 12)),
        (ValueError("bad setting"), 1, ("ValueError", "bad setting", 12)),
        (study.files.DirectoryInUseError("in use"), 75, None),
    ],
)
def test_a_child_tells_its_failure(tmp_path, monkeypatch, error, status, failure):
    def train(got: ConfigDict, where: Path) -> bool:
        assert (got.to_dict(), where) == (run.config.to_dict(), tmp_path)
        (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n{"step": 12}\n{"ste')
        if error is not None:
            raise error
        return True

    run = study._Run("a", 3, config(seed=3), tmp_path)
    pipe = SimpleNamespace(buffer=io.BytesIO(pickle.dumps(run)))
    monkeypatch.setattr(study, "sys", SimpleNamespace(stdin=pipe))
    monkeypatch.setattr(study, "threading", SimpleNamespace(Thread=Mock()))
    monkeypatch.setattr(runner, "train", train)
    assert study.run_child() == status
    written = run.read().failure
    if failure is None:
        assert written is None
    else:
        assert written is not None
        assert (written["error"], written["message"], written["step"]) == failure
        assert written["config_hash"] == config_hash(to_json_values(run.config))


def test_flags(tmp_path, capsys):
    path = tmp_path / "mine.py"
    text = (
        "from configs import smoke\nfrom studies.run import Logged, Study\n"
        "def get_study():\n"
        "    return Study('Mine', {'a': smoke.get_config()}, (0,), (Logged('m', 'k'),))\n"
    )
    path.write_text(text)
    flags = [f"--study={path}", f"--out={tmp_path}", "--report_only"]
    assert study.main(flags) == 0
    assert rows(tmp_path)["a"] == ["0 of 1; seed 0 not started", "-"]
    command = f"python -m studies.run --study={path} --out={tmp_path} --report_only"
    assert command in (tmp_path / "table.md").read_text()
    path.write_text("x = 1")
    assert study.main(flags) == 1
    assert "must define get_study()" in capsys.readouterr().err
    assert study.main([f"--study={tmp_path}/no.py", f"--out={tmp_path}"]) == 1
    assert "FileNotFoundError" in capsys.readouterr().err
    with pytest.raises(TypeError):
        study.main([*flags, "--traceback"])
    path.write_text(text)
    assert study.main([flags[0], f"--out={tmp_path}/no", "--report_only"]) == 1
    assert "no does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study.main([*flags, "--num_processes=0"])


@pytest.mark.slow
def test_a_child_dies_with_its_study(tmp_path):
    code = (
        "import time; from jevb_jax import runner; from studies import run as study\n"
        "runner.train = lambda *_: (print('training', flush=True), time.sleep(300))\n"
        "study.run_child()"
    )
    parent = (
        "import sys, time; from pathlib import Path; from configs import smoke\n"
        "from studies import run as study\n"
        f"study._child_command = lambda _: [sys.executable, '-c', {code!r}]\n"
        "run = study._Run('a', 0, smoke.get_config(), Path(sys.argv[1]))\n"
        "print(study._start(run, None, None).pid, flush=True); time.sleep(60)"
    )
    log = tmp_path / "log.txt"
    command = [sys.executable, "-c", parent, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        wait_until(lambda: log.exists() and log.read_text() == "training\n")
        os.kill(child, 0)  # it lives
        process.kill()
    wait_until(lambda: not is_running(child), seconds=20)


def is_running(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"


def wait_until(condition: Any, *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


STUDY = """
from configs import smoke
from studies.run import Comparison, Curves, Logged, Result, Study

def config(split_seed=0):
    made = smoke.get_config()
    made.data.num_train_examples = 320
    made.data.split_seed = split_seed  # other data, the same program
    made.train.num_epochs = 10
    made.train.health_every_steps = 0
    made.checkpoint.every_steps = 5
    made.evaluation.labels_per_class = 0
    made.ood.corruptions = ()
    made.augmentation.jitter_probability = 0.0
    made.augmentation.grayscale_probability = 0.0
    return made

def get_study():
    diverges = config()
    diverges.optimizer.name, diverges.optimizer.learning_rate = "sgd", 1e30
    diverges.optimizer.warmup_epochs = 0.0
    return Study(
        "Killed", {"a": config(), "b": config(1), "diverges": diverges}, (0,),
        (Result("k-NN", "knn_20_accuracy"), Logged("loss", "train/loss")),
        (Comparison("all", "All", ("a", "b"), ("k-NN",)),
         Curves("loss", "Loss", ("a", "diverges"), ("train/loss",))),
    )
"""


@pytest.mark.slow
def test_killed_study_goes_on_and_agrees_with_single_runs(tmp_path):
    file, out = tmp_path / "mine.py", tmp_path / "out"
    file.write_text(STUDY)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "studies.run", f"--study={file}", f"--out={out}"]
    finished, killed = directory(out, "a", 0), directory(out, "b", 0)
    with subprocess.Popen(command, env=environment, cwd=ROOT) as process:
        saved = killed / "checkpoints" / "5"
        wait_until(lambda: saved.exists() or process.poll() is not None)
        assert process.poll() is None
        process.kill()
    child = int((killed / ".lock").read_text().split()[1])
    wait_until(lambda: not is_running(child), seconds=10)
    assert (finished / "results.json").exists()
    assert not (killed / "results.json").exists()
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}

    again = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "3 runs, 1 done before, 2 to do." in again.stdout
    assert "diverges, seed 0: FAILED, NonFiniteError at step" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert "Resuming" in (killed / "log.txt").read_text()
    table = rows(out)
    assert table["a"][0] == table["b"][0] == "1 of 1"
    assert table["diverges"][0].startswith("0 of 1; 1 failed: NonFiniteError at step")
    assert {"all.png", "loss.png", "table.csv"} <= {path.name for path in out.iterdir()}

    code = (
        "import sys; from jevb_jax import runner; from studies import run as study; "
        "runner.train(study.load_study(sys.argv[1]).runs['b'], sys.argv[2])"
    )
    alone = tmp_path / "alone"
    subprocess.run(
        [sys.executable, "-c", code, str(file), str(alone)],
        env=environment,
        cwd=ROOT,
        check=True,
        timeout=300,
    )
    for name in ("results.json", "metrics.jsonl", "config.json"):
        assert (alone / name).read_text() == (killed / name).read_text(), name
