"""Copies of the metrics: what each library is told, and what happens when one of them fails.

The libraries are fakes with the parts of their interfaces that are used; the slow tests run the real
wandb and mlflow offline.
"""

import importlib.util
import io
import logging
import subprocess
import sys
import threading
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs import smoke
from jevb_jax import commands
from jevb_jax.runs import metrics_writers
from jevb_jax.runs.files import read_json, to_path
from jevb_jax.runs.metrics_log import MetricsLog
from jevb_jax.training.experiment import to_json_values

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"method": "jevb", "jevb": {"df": float("inf")}, "train": {"writers": ["wandb"]}}
VARIABLES = (
    "WANDB_PROJECT",
    "WANDB_NAME",
    "WANDB_DIR",
    "TRACKIO_PROJECT",
    "MLFLOW_EXPERIMENT_NAME",
)


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


class Calls(list):
    """Remembers calls; raises in those that `broken` names."""

    broken: str | None = None
    delay: threading.Event | None = None

    def add(self, name: str, *values: Any) -> None:
        if self.delay is not None:
            self.delay.wait(30)
        if self.broken == name:
            raise ConnectionError(f"no network for {name}\nmore about it")
        self.append((name, *values))

    def named(self, name: str) -> list[Any]:
        return [values for found, *values in self if found == name]


def module(name: str, **content: Any) -> Any:
    made: Any = types.ModuleType(name)
    made.__spec__ = ModuleSpec(name, None, origin="fake")
    made.__dict__.update(content)
    return made


def fake_wandb(calls: Calls, *, starting_step: int = 0) -> Any:
    class Run:
        def __init__(self) -> None:
            self.starting_step = starting_step

        def log(self, values: Any, step: int) -> None:
            calls.add("log", step, values)

        def finish(self, exit_code: int) -> None:
            calls.add("finish", exit_code)

    def init(**given: Any) -> Run:
        calls.add("init", given)
        return Run()

    return module("wandb", init=init, Settings=lambda **given: given)


def fake_trackio(calls: Calls) -> Any:
    class Run:
        def log(self, values: Any, step: int) -> None:
            calls.add("log", step, values)

        def finish(self) -> None:
            calls.add("finish")

    def init(**given: Any) -> Run:
        calls.add("init", given)
        return Run()

    return module("trackio", init=init)


def fake_mlflow(calls: Calls) -> Any:
    class Client:
        def get_experiment_by_name(self, name: str) -> None:
            calls.add("experiment", name)

        def create_experiment(self, name: str) -> str:
            calls.add("create_experiment", name)
            return "7"

        def create_run(self, experiment_id: str, run_name: str) -> Any:
            calls.add("create_run", experiment_id, run_name)
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="remote"))

        def update_run(self, run_id: str, status: str) -> None:
            calls.add("update_run", run_id, status)

        def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
            assert len(metrics) <= 1000
            assert len(params) <= 100
            for metric in metrics:
                calls.add("log", metric[3], {metric[0]: metric[1]})
            for param in params:
                calls.add("param", *param)

        def set_terminated(self, run_id: str, status: str) -> None:
            calls.add("finish", run_id, status)

    entities = types.SimpleNamespace(Metric=lambda *of: of, Param=lambda *of: of)
    return module("mlflow", MlflowClient=Client, entities=entities)


FAKES = {"wandb": fake_wandb, "trackio": fake_trackio, "mlflow": fake_mlflow}


@pytest.fixture
def install(monkeypatch):
    def put(name: str, **given: Any) -> Calls:
        calls = Calls()
        monkeypatch.setitem(sys.modules, name, FAKES[name](calls, **given))
        return calls

    return put


def numbers(calls: Calls) -> list[tuple[int, str, float]]:
    return [(s, name, value) for s, values in calls.named("log") for name, value in values.items()]


def written(workdir: Path) -> list[dict[str, Any]]:
    return MetricsLog.read(workdir / "metrics.jsonl")


# --- What each is told ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAKES)
def test_every_number_arrives_at_its_step(tmp_path, install, name):
    calls = install(name)
    log = MetricsLog(tmp_path, writers=(name,), config=CONFIG)
    assert calls == []  # an evaluation of a trained run opens nothing
    log.write(1, {"train/loss": 0.5, "x": 2.0})
    log.write(1, {"health/rank": 3.0})
    log.write(2, {"train/loss": 0.25})
    log.close("finished")
    assert numbers(calls) == [
        (1, "train/loss", 0.5), (1, "x", 2.0), (1, "health/rank", 3.0), (2, "train/loss", 0.25),
    ]  # fmt: skip
    assert len(written(tmp_path)) == 3
    assert calls[-1][0] == "finish"


def test_wandb_is_told_the_run_its_config_and_its_end(tmp_path, install):
    for ending, code in (("finished", 0), ("stopped", 1), ("failed", 1)):
        workdir = tmp_path / ending
        workdir.mkdir()
        calls = install("wandb")
        log = MetricsLog(workdir, writers=("wandb",), config=CONFIG)
        log.write(1, {"x": 1.0})
        log.close(ending)  # pyright: ignore[reportArgumentType]
        ((given,),) = calls.named("init")
        assert given["config"] == CONFIG
        assert (given["project"], given["name"]) == ("jevb_jax", ending)
        assert given["dir"] == str(workdir)
        assert given["resume"] == "allow"
        assert given["id"] == read_json(workdir / "writers.json")["wandb"]
        assert calls.named("finish") == [[code]]


def test_mlflow_is_told_the_run_its_config_and_its_end(tmp_path, install):
    calls = install("mlflow")
    wide = {**CONFIG, "many": {f"p{i}": i for i in range(150)}}
    log = MetricsLog(tmp_path, writers=("mlflow",), config=wide)
    log.write(1, {"x": 1.0})
    log.close("stopped")
    assert calls.named("create_run") == [["7", tmp_path.name]]
    params = dict(calls.named("param"))
    assert params["jevb.df"] == "inf"
    assert params["many.p149"] == "149"
    assert len(params) == 153
    assert calls.named("finish") == [["remote", "KILLED"]]


def test_the_environment_names_projects(tmp_path, install, monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, f"mine_{name}")
    wandb, trackio, mlflow = (install(name) for name in ("wandb", "trackio", "mlflow"))
    log = MetricsLog(tmp_path, writers=("wandb", "trackio", "mlflow"))
    log.write(1, {"x": 1.0})
    log.close()
    ((given,),) = wandb.named("init")
    assert [given[key] for key in ("project", "name", "dir")] == [
        f"mine_{x}" for x in VARIABLES[:3]
    ]
    assert trackio.named("init")[0][0]["project"] == "mine_TRACKIO_PROJECT"
    assert mlflow.named("create_experiment") == [["mine_MLFLOW_EXPERIMENT_NAME"]]


@pytest.mark.parametrize("name", FAKES)
def test_a_resumed_run_continues_the_remote_one(tmp_path, install, name):
    key = {"wandb": "id", "trackio": "name"}.get(name)
    calls = install(name)
    log = MetricsLog(tmp_path, writers=(name,), config=CONFIG)
    for step in (1, 2, 3):
        log.write(step, {"x": step / 2})
    log.close("stopped")
    again = install(name, **({"starting_step": 4} if name == "wandb" else {}))
    log = MetricsLog(tmp_path, writers=(name,), config=CONFIG)
    log.truncate_after(2)  # its checkpoint
    for step in (3, 4):
        log.write(step, {"x": step / 2})
    log.close("finished")
    # wandb refuses steps that it has; the others take the same number again.
    expected = [(4, "x", 2.0)] if name == "wandb" else [(3, "x", 1.5), (4, "x", 2.0)]
    assert numbers(again) == expected
    if key is None:
        assert again.named("update_run") == [["remote", "RUNNING"]]
        assert not again.named("create_run")
    else:
        ((first,),), ((second,),) = calls.named("init"), again.named("init")
        assert first[key] == second[key]
    # Another run is another one.
    (tmp_path / "other").mkdir()
    other = install(name)
    log = MetricsLog(tmp_path / "other", writers=(name,), config=CONFIG)
    log.write(1, {"x": 1.0})
    log.close()
    if key is not None:
        assert other.named("init")[0][0][key] != calls.named("init")[0][0][key]
    else:
        assert other.named("create_run")


def test_only_the_first_process_of_a_run_writes(tmp_path, install):
    calls = [install(name) for name in FAKES]
    log = MetricsLog(tmp_path, is_writer=False, writers=("auto", *FAKES), config=CONFIG)
    log.truncate_after(-1)
    log.write(1, {"x": 1.0})
    log.flush()
    log.close()
    assert calls == [[], [], []]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_sends_its_config_and_every_line(tmp_path, install, monkeypatch):
    monkeypatch.setattr(commands, "_evaluate_and_report", lambda *_, **__: {})
    config: Any = smoke.get_config()
    config.method = "simsiam"  # little is compiled
    config.augmentation.update({"jitter_probability": 0.0, "grayscale_probability": 0.0})
    config.train.update({"num_epochs": 1, "log_every_steps": 1, "health_every_steps": 0})
    config.train.writers = ("wandb",)
    config.optimizer.warmup_epochs = 0.0
    config.data.num_train_examples = 256
    calls = install("wandb")
    assert commands.train(config, tmp_path, console=Console(file=io.StringIO()))
    ((given,),) = calls.named("init")
    assert given["config"] == to_json_values(config)
    records = written(tmp_path)
    assert [(step, values) for step, values in calls.named("log")] == [
        (record.pop("step"), record) for record in records
    ]
    assert records
    assert calls.named("finish") == [[0]]


# --- Failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_writer_that_fails_warns_once_and_the_others_go_on(
    tmp_path, install, caplog, name, broken
):
    calls, other = install(name), install("trackio" if name == "wandb" else "wandb")
    calls.broken = "create_run" if (name, broken) == ("mlflow", "init") else broken
    names = [name, "trackio" if name == "wandb" else "wandb"]
    log = MetricsLog(tmp_path, writers=names, config=CONFIG)
    for step in range(1, 21):
        log.write(step, {"x": float(step)})
        time.sleep(0.001)
    log.close("finished")
    assert [step for step, *_ in numbers(other)] == list(range(1, 21))
    assert [record["step"] for record in written(tmp_path)] == list(range(1, 21))
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.getMessage() == (
        f"{name} takes no more metrics of this process (ConnectionError: no network for "
        f"{calls.broken}). The work goes on, and metrics.jsonl has every number."
    )


def test_a_server_that_hangs_holds_up_nothing(tmp_path, install, caplog, monkeypatch):
    monkeypatch.setattr(metrics_writers, "_FINISH_SECONDS", 0.1)
    calls = install("mlflow")
    calls.delay = threading.Event()
    log = MetricsLog(tmp_path, writers=("mlflow",), config=CONFIG)
    started = time.monotonic()
    for step in range(100):
        log.write(step, {"x": 1.0})
    log.close()
    assert time.monotonic() - started < 2
    calls.delay.set()
    (warning,) = caplog.records
    assert "TimeoutError: not everything was sent within" in warning.getMessage()


def test_what_is_missing_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    installed = metrics_writers._is_installed
    monkeypatch.setattr(
        metrics_writers, "_is_installed", lambda name: name != "trackio" and installed(name)
    )
    config: Any = smoke.get_config()
    config.train.writers = ("auto", "trackio")
    with pytest.raises(
        ValueError, match=r"trackio is not installed: pip install 'jevb-jax\[trackio\]'"
    ):
        commands.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for name, package in metrics_writers._PACKAGES.items():
        monkeypatch.setattr(metrics_writers, "_is_installed", lambda _: False)
        with pytest.raises(ValueError, match=f"names {name}, but {package} is not installed"):
            metrics_writers.check([name], tmp_path)
    metrics_writers.check(["auto"], tmp_path)
    metrics_writers.check([], tmp_path)


def test_a_folder_of_the_same_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "trackio_of_nobody").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.util.find_spec("trackio_of_nobody") is not None
    assert not metrics_writers._is_installed("trackio_of_nobody")
    assert metrics_writers._is_installed("json")


def test_events_cannot_go_into_an_object_store():
    with pytest.raises(ValueError, match="is in an object store, which cannot append events"):
        metrics_writers.check(["tensorboard"], to_path("gs://bucket/run"))
    metrics_writers.check(["auto"], to_path("gs://bucket/run"))


@pytest.mark.parametrize(
    ("names", "has_events"), [((), False), (("auto",), True), (("tensorboard", "auto"), True)]
)
def test_tensorboard_is_written_where_it_is_asked_for(tmp_path, names, has_events):
    log = MetricsLog(tmp_path, writers=names)
    log.write(1, {"x": 1.0})
    log.close()
    files = (
        list((tmp_path / "tensorboard").iterdir()) if (tmp_path / "tensorboard").exists() else []
    )
    assert len(files) == has_events


@pytest.mark.slow
def test_nothing_is_imported_that_was_not_asked_for(tmp_path):
    code = (
        "import sys, pathlib; from jevb_jax.runs.metrics_log import MetricsLog; "
        "log = MetricsLog(pathlib.Path(sys.argv[1]), writers=sys.argv[2:]); log.write(1, {'x': 1.0}); "
        "log.close(); print({'wandb', 'mlflow', 'trackio', 'tensorboardX'} & set(sys.modules))"
    )
    for names, found in (([], "set()"), (["tensorboard"], "{'tensorboardX'}")):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), *names],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == found


# --- The real libraries, offline ------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for ending, steps in (("stopped", (1, 2, 3)), ("finished", (3, 4))):
        log = MetricsLog(tmp_path, writers=("wandb",), config=CONFIG)
        log.truncate_after(steps[0] - 1)
        for step in steps:
            log.write(step, {"train/loss": 0.5**step, "y": float("nan")})
        log.close(ending)  # pyright: ignore[reportArgumentType]
    identity = read_json(tmp_path / "writers.json")["wandb"]
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    # wandb's own process closes the file a moment after `finish`.
    for file, values in zip(files, (("0.5", "0.25", "0.125"), ("0.125", "0.0625")), strict=True):
        expected = [b"train/loss", *(value.encode() for value in values)]
        until = time.monotonic() + 20
        while time.monotonic() < until and not all(x in file.read_bytes() for x in expected):
            time.sleep(0.05)
        assert [x for x in expected if x not in file.read_bytes()] == []


@pytest.mark.slow
def test_the_real_mlflow_with_files(tmp_path, monkeypatch):
    """A resumed run continues; nothing of the process's own state is used."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    (tmp_path / "run").mkdir()
    for ending, steps, status in (
        ("stopped", (1, 2, 3), "KILLED"),
        ("finished", (3, 4), "FINISHED"),
    ):
        log = MetricsLog(tmp_path / "run", writers=("mlflow",), config=CONFIG)
        log.truncate_after(steps[0] - 1)
        for step in steps:
            log.write(step, {"train/loss": 0.5**step, "y": float("nan")})
        log.close(ending)  # pyright: ignore[reportArgumentType]
        client = mlflow.MlflowClient()
        identity = read_json(tmp_path / "run" / "writers.json")["mlflow"]
        assert client.get_run(identity).info.status == status
    assert mlflow.active_run() is None
    experiment = client.get_experiment_by_name("jevb_jax")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.data.params["jevb.df"] == "inf"
    history = client.get_metric_history(identity, "train/loss")
    assert sorted((one.step, one.value) for one in history) == [
        (1, 0.5), (2, 0.25), (3, 0.125), (3, 0.125), (4, 0.0625),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_real_mlflow_without_a_server_is_a_warning(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    log = MetricsLog(tmp_path, writers=("mlflow",), config=CONFIG)
    log.write(1, {"x": 1.0})
    log.close()
    assert any("mlflow takes no more metrics" in record.getMessage() for record in caplog.records)
    assert written(tmp_path) == [{"step": 1, "x": 1.0}]
