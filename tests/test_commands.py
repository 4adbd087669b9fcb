"""Real processes: a kill, a signal, a changed setting, a loss that is not finite."""

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors import numpy as safetensors

import jevb_jax
from configs import finetune_digits, smoke, transfer
from jevb_jax import commands, export, finetuning, parallel, start_weights
from jevb_jax.images import batches
from jevb_jax.images.source import ArraySource
from jevb_jax.loading import load
from jevb_jax.model import Model
from jevb_jax.networks import torch_names
from jevb_jax.runs import files, provenance, result_files
from jevb_jax.runs.checkpoints import Checkpointer
from jevb_jax.runs.metrics_log import MetricsLog
from jevb_jax.settings import read, run_config
from jevb_jax.training import alarms, health_check, loop, pretraining, resume
from jevb_jax.training.experiment import Experiment, build_experiment, to_json_values
from jevb_jax.training.loop import RunLoop
from jevb_jax.training.pretraining import HealthWatch
from jevb_jax.training.resume import ChangedConfigError
from jevb_jax.training.step import TrainState
from tests.conftest import AS_USERS_RUN_IT

ROOT = Path(__file__).resolve().parent.parent
# Takes long to compile.
WITHOUT_COLOUR = ("augmentation.jitter_probability=0.0", "augmentation.grayscale_probability=0.0")


def command(workdir: Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "train.py"),
        f"--config={ROOT}/configs/smoke.py",
        f"--workdir={workdir}",
        *(f"--config.{override}" for override in overrides),
    ]


def run(
    workdir: Path, *overrides: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(workdir, *overrides),
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        records = MetricsLog.read(workdir / "metrics.jsonl")
        if any(record["step"] >= step for record in records):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached: {process.communicate(timeout=10)}")


def final_fingerprint(workdir: Path) -> tuple[int, dict[str, int]]:
    checkpointer = Checkpointer(workdir / "checkpoints")
    step = checkpointer.steps()[-1]
    meta = checkpointer.read_meta(step)
    checkpointer.close()
    return step, meta["fingerprint"]


@pytest.mark.slow
@pytest.mark.nightly
def test_killed_and_terminated_run_equals_the_uninterrupted_one(tmp_path):
    env = {**os.environ, **AS_USERS_RUN_IT}
    settings = (
        "train.ema_decay=0.9",
        "train.knn_every_epochs=1",
        *WITHOUT_COLOUR,
        "ood.corruptions=('contrast',)",
    )
    reference = tmp_path / "reference"
    finished = run(reference, *settings, env=env)
    assert finished.returncode == 0, finished.stderr
    assert "Run files" in finished.stdout

    workdir = tmp_path / "killed"
    for kill_after, number in ((7, signal.SIGKILL), (25, signal.SIGTERM)):
        with subprocess.Popen(
            command(workdir, *settings),
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            wait_for_step(workdir, kill_after, process)
            process.send_signal(number)
            out, err = process.communicate(timeout=120)
            if number == signal.SIGTERM:
                assert process.returncode == 0, err
                assert "SIGTERM: saved step" in out
    resumed = run(workdir, *settings, env=env)
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming" in resumed.stdout

    # Parameters, statistics, optimizer and average, bit for bit, and every logged number.
    assert final_fingerprint(workdir) == final_fingerprint(reference)
    assert MetricsLog.read(workdir / "metrics.jsonl") == MetricsLog.read(
        reference / "metrics.jsonl"
    )
    logged = {
        record["step"]: record["validation/knn_10_uniform_accuracy"]
        for record in MetricsLog.read(workdir / "metrics.jsonl")
        if "validation/knn_20_accuracy" in record
    }
    assert list(logged) == [10, 20, 30, 40]
    assert len(set(logged.values())) > 1
    results = [json.loads((path / "results.json").read_text()) for path in (workdir, reference)]
    assert results[0] == results[1]
    for name in ("views.png", "curves.png", "config.json", "environment.json"):
        assert (workdir / name).stat().st_size > 100, name

    # The run is complete; another config in its place is refused by name, and nothing changes.
    changed = ("train.ema_decay=0.5", "optimizer.learning_rate=0.5")
    refused = run(workdir, *settings, *changed, env=env)
    assert refused.returncode == 1
    assert "train.ema_decay: the run has 0.9, got 0.5" in refused.stderr
    assert "optimizer.learning_rate" in refused.stderr
    assert "Traceback" not in refused.stderr
    # What no number depends on may change. A complete run is then evaluated again.
    others = ("evaluation.few_label_seeds=1", "train.knn_every_epochs=0")
    allowed = run(workdir, *settings, *others, env=env)
    assert allowed.returncode == 0, allowed.stderr
    after = json.loads((workdir / "results.json").read_text())
    assert after != results[0]
    knn = [[r["value"] for r in x["trained"] if "knn" in r["name"]] for x in (after, results[0])]
    assert knn[0] == knn[1]


@pytest.mark.slow
@pytest.mark.nightly
def test_streaming_sees_the_batches_of_the_resident_run(tmp_path):
    losses = []
    for placement in ("resident", "stream"):
        workdir = tmp_path / placement
        finished = run(
            workdir,
            "method=simsiam",  # compiles in less than half the time of JEVB
            f"input.placement={placement}",
            "train.num_epochs=2",
            *WITHOUT_COLOUR,
            "evaluation.labels_per_class=0",
            "ood.corruptions=()",
        )
        assert finished.returncode == 0, finished.stderr
        records = MetricsLog.read(workdir / "metrics.jsonl")
        losses.append([r["train/loss"] for r in records if "train/loss" in r])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_before_the_next_save(tmp_path):
    workdir = tmp_path / "run"
    finished = run(
        workdir,
        "method=simsiam",  # compiles in less than half the time of JEVB
        "optimizer.name=sgd",
        "optimizer.learning_rate=1e30",
        "optimizer.warmup_epochs=0",
        *WITHOUT_COLOUR,
    )
    assert finished.returncode == 1
    assert "NonFiniteError: step" in finished.stderr
    evidence = next(workdir.glob("nonfinite_step_*"))
    step = int(evidence.name.rsplit("_", 1)[1])
    batch = json.loads((evidence / "batch.json").read_text())
    assert batch["step"] == step
    assert len(batch["train_indices"]) == 64
    with np.load(evidence / "state.npz", allow_pickle=False) as state:
        assert int(state["step"]) == step
    checkpointer = Checkpointer(workdir / "checkpoints")
    assert all(saved <= step for saved in checkpointer.steps())
    checkpointer.close()


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("scale", ["untied", "fixed"])
def test_health_of_pairs_is_logged_for_jevb(scale):
    config: Any = smoke.get_config()
    config.train.health_pairs = True
    config.jevb.likelihood_scale = scale
    config.jevb.space = "linear" if scale == "fixed" else "log"
    experiment = build_experiment(config)
    check = health_check.health_check(experiment)
    values = {name: float(value) for name, value in check(experiment.initial_state()).items()}
    assert np.all(np.isfinite([*values.values()]))
    assert values["gradient_kl"] > 0
    assert values["gradient_directional_log_likelihood"] > 0
    assert 0 < values["pair_effective_pairs"] <= 1
    # At the start every scale is the initial one.
    assert values["posterior_scale_mean"] == pytest.approx(1.0)
    assert -1 < values["pair_cosine"] < 1
    assert values["posterior_scale_at_floor"] == 0
    assert values.get("likelihood_scale_at_floor") == (0 if scale == "untied" else None)
    # A length in "linear": over the radius, exp(log-radius) sqrt(16).
    radius = 4 * np.exp(values["embedding_log_radius"]) if scale == "fixed" else 1.0
    assert values["radial_width"] == pytest.approx(0.5 / radius)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("method", ["vi_simsiam", "byol", "vicreg"])
def test_other_methods_train_and_are_evaluated(tmp_path, method):
    config: Any = smoke.get_config()
    config.method = method
    config.model.projector_normalizes_output = method in ("simsiam", "vi_simsiam")
    config.train.target_decay = 0.9 if method == "byol" else 0.0
    config.augmentation.jitter_probability = 0.0  # takes long to compile
    config.augmentation.grayscale_probability = 0.0
    config.train.num_epochs = 1
    config.optimizer.warmup_epochs = 0.0
    config.evaluation.labels_per_class = 0
    config.evaluation.split = "validation"
    assert commands.train(config, tmp_path / "run", console=Console(quiet=True))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    protocols = {r["name"]: r["protocol"] for r in results["trained"]}
    scores = {r["features"] for r in results["trained"] if r["name"] == "auroc_corrupted"}
    assert "embedding/mahalanobis" in scores
    assert ("vi_simsiam/concentration" in scores) == (method == "vi_simsiam")
    assert not any(name.startswith("jevb/") for name in scores)
    assert results["split"] == "validation"
    assert "validation (" in protocols["linear_accuracy"]
    assert "errors of linear on validation (" in protocols["error_auroc_linear"]
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000
    # Finished: the same command trains no more, and evaluates.
    assert commands.train(config, tmp_path / "run", console=Console(quiet=True))


def test_alarms_are_logged_and_said_once_when_they_change(tmp_path, monkeypatch):
    experiment = build_experiment(smoke.get_config())
    out = io.StringIO()
    healthy = {"embedding_std": 0.9, "effective_rank": 9.0, "embedding_log_radius": 0.0}
    sick = {**healthy, "effective_rank": float("nan")}

    def make() -> tuple[RunLoop, HealthWatch]:
        plan = pretraining.make_plan(experiment, validate=lambda _: {}, best_measure="")
        (watch,) = plan.measurements
        assert isinstance(watch, HealthWatch)
        # A narrow console, and brackets that are no markup.
        console = Console(file=out, width=30)
        stop = parallel.StopRequest()
        return RunLoop(plan, tmp_path, console, parallel.make_mesh(), stop, lambda: None), watch

    def check(run: RunLoop, watch: HealthWatch, step: int, values: dict[str, float]) -> str:
        watch.check = lambda state: values
        out.seek(0)
        out.truncate()
        state: Any = types.SimpleNamespace(step=step)
        assert not run.measure(watch, state, {})
        return out.getvalue()

    run, watch = make()
    assert check(run, watch, 10, sick) == ""  # too early to judge
    assert check(run, watch, 20, healthy) == ""
    said = check(run, watch, 40, sick)
    assert said.startswith("Health alarm at step 40, collapse: effective rank nan of D = 16")
    assert said.count("\n") == 1
    assert check(run, watch, 60, sick) == ""
    run.log.close()

    # A resumed run knows what was raised, and says no more than the uninterrupted one.
    monkeypatch.setattr(Experiment, "initial_state", lambda self: None)
    resumed, second = make()
    monkeypatch.setattr(resumed.checkpointer, "restore_latest", lambda template: (60, template))
    resumed.restore()
    assert second.alarms == watch.alarms
    assert check(resumed, second, 80, sick) == ""
    assert check(resumed, second, 100, healthy) == "Health alarm cleared at step 100: collapse\n"
    assert check(resumed, second, 120, healthy) == ""
    for each in (run, resumed):
        each.checkpointer.close()
    resumed.log.close()

    records = MetricsLog.read(tmp_path / "metrics.jsonl")
    flags = [(record["step"], record.get("health/alarm_collapse")) for record in records]
    assert flags == [(10, None), (20, 0), (40, 1), (60, 1), (80, 1), (100, 0), (120, 0)]


def test_too_few_validation_images_leave_out_the_rank_alone(caplog):
    config: Any = smoke.get_config()
    config.train.health_num_images = 16
    check: Any = health_check.health_check(build_experiment(config))
    assert "No effective rank will be logged" in caplog.text
    assert check is not None
    config.train.health_num_images = 1
    assert health_check.health_check(build_experiment(config)) is None
    assert "No health will be logged" in caplog.text


# What causes it, and what may be raised beside it: who trains at such rates loses axes as well.
CAUSES = {
    "healthy": ({}, None, ()),
    # The invariance alone is best where all embeddings are the same point.
    "collapse": (
        {
            "method": "vicreg",
            "model.projector_normalizes_output": False,
            "vicreg.variance_weight": 0.0,
            "vicreg.covariance_weight": 0.0,
            "optimizer.learning_rate": 0.05,
        },
        "collapse",
        (),
    ),
    "posterior is prior": (
        {"jevb.kl_weight": 1e3, "jevb.prior_scale": 1.0, "optimizer.learning_rate": 0.01},
        "posterior_is_prior",
        (),
    ),
    # Without the KL nothing keeps the scales up.
    "scale at floor": (
        {
            "jevb.kl_weight": 0.0,
            "jevb.scale_units": "unit",
            "model.min_scale": 0.5,
            "optimizer.learning_rate": 0.02,
        },
        "scale_at_floor",
        ("collapse",),
    ),
    # No BatchNorm at the end, and steps that dwarf the weights.
    "radius drift": (
        {"model.projector_normalizes_output": False, "optimizer.learning_rate": 0.5},
        "radius_drift",
        ("collapse",),
    ),
    # Crops of one pixel: a view says nothing of the other.
    "concentration": (
        {
            "method": "vi_simsiam",
            "augmentation.crop_scale": (0.02, 0.05),
            "optimizer.learning_rate": 1.0,
        },
        "concentration",
        ("collapse",),
    ),
}


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(("changes", "cause", "beside"), CAUSES.values(), ids=CAUSES)
def test_alarms_of_runs_that_cause_them(tmp_path, changes, cause, beside):
    config: Any = smoke.get_config()
    config.update_from_flattened_dict(
        {
            "data.source": "digits",
            "data.image_size": 0,
            "data.num_train_examples": 800,
            "data.num_test_examples": 100,
            "augmentation.image_size": 8,
            "augmentation.mean": (0.3053,),
            "augmentation.std": (0.3761,),
            "augmentation.flip_probability": 0.0,
            "augmentation.jitter_probability": 0.0,
            "augmentation.saturation": 0.0,
            "augmentation.hue": 0.0,
            "augmentation.grayscale_probability": 0.0,
            "model.embedding_dim": 32,
            "optimizer.warmup_epochs": 0.0,
            "train.health_every_steps": 10,
            "checkpoint.every_steps": 0,
            **changes,
        }
    )
    experiment = build_experiment(config)
    out = io.StringIO()
    mesh = parallel.make_mesh(jax.devices()[:1])
    plan = pretraining.make_plan(experiment, validate=lambda _: {}, best_measure="")
    (watch,) = plan.measurements
    assert isinstance(watch, HealthWatch)
    console = Console(file=out, width=80)
    run = RunLoop(plan, tmp_path, console, mesh, parallel.StopRequest(), lambda: None)
    state = run.train(run.restore())
    run.checkpointer.close()
    run.log.close()

    assert int(state.step) == 48  # no alarm stops a run
    raised = [{cause}] if cause else [set()]
    raised += [{cause, other} for other in beside]
    assert watch.alarms.keys() in raised
    said = out.getvalue()
    records = MetricsLog.read(tmp_path / "metrics.jsonl")
    checks = [record for record in records if "health/embedding_std" in record]
    assert [record["step"] for record in checks] == [10, 20, 30, 40, 48]  # and at the end
    flags = {name: [r.get(name) for r in checks] for name in checks[-1] if "/alarm_" in name}
    assert all(values[0] is None for values in flags.values())
    history = alarms.alarm_history(records, embedding_dim=32)
    if cause is None:
        assert all(values[1:] == [0, 0, 0, 0] for values in flags.values())
        assert history == []
        assert "Health alarm at" not in said
        assert said.endswith("Health alarms at the end: none\n")
        return
    assert flags[f"health/alarm_{cause}"][-1] == 1
    assert said.count(f"Health alarm at step {history[0].step}, {cause}: ") == 1
    summary = said[said.index("Health alarms at the end: ") :]
    assert f"\n  {cause}: {watch.alarms[cause]}\n" in summary
    standing = {
        p.name for p in history if p.message.endswith("Not cleared by the last health check.")
    }
    assert standing == watch.alarms.keys()
    # The flags and the history tell one story.
    rises = sum(
        values[i] == 1 and not values[i - 1] for values in flags.values() for i in range(1, 5)
    )
    assert rises == len(history)


# --- Running, stopping, going on ---


def test_a_process_of_64_bits_trains_in_32(tmp_path, monkeypatch):
    seen = []

    def build(_: Any) -> Any:
        seen.append(jnp.zeros(1).dtype)
        raise InterruptedError

    monkeypatch.setattr(commands, "build_experiment", build)
    with jax.enable_x64(True), pytest.raises(InterruptedError):
        commands.train(smoke.get_config(), tmp_path / "run")
    assert seen == [np.float32]


def short_config(**changes: Any) -> Any:
    """Two epochs of 10 steps; the learning rate does not depend on the length of the run."""
    config: Any = smoke.get_config()
    config.update_from_flattened_dict(
        {
            **{one.split("=")[0]: 0.0 for one in WITHOUT_COLOUR},
            "optimizer.warmup_epochs": 0.0,
            "optimizer.final_learning_rate": config.optimizer.learning_rate,
            "train.num_epochs": 2,
            "train.health_every_steps": 15,
            "checkpoint.every_steps": 0,
            "evaluation.labels_per_class": 0,
            "evaluation.l2_grid": (1e-3,),
            "ood.corruptions": (),
            **{name.replace("__", "."): value for name, value in changes.items()},
        }
    )
    return config


def text_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def as_experiment(config: Any) -> Any:
    """What the check of a directory reads of an experiment."""
    return types.SimpleNamespace(config=to_json_values(config), steps_per_epoch=10)


@pytest.mark.parametrize("is_main", [True, False])
def test_a_run_may_train_in_any_thread_and_says_what_that_means(tmp_path, monkeypatch, is_main):
    monkeypatch.setattr(commands, "_train_and_evaluate", lambda *_: True)
    console, found = text_console(), []

    def work() -> None:
        found.append(commands.train(short_config(), tmp_path, console=console))

    if is_main:
        work()
    else:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [True]
    assert ("This is not the main thread" in said(console)) == (not is_main)


@pytest.mark.slow
def test_a_signal_while_a_batch_is_waited_for_saves_and_ends(tmp_path, monkeypatch):
    def take(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(300)  # a worker that does not answer

    monkeypatch.setattr(loop._Batches, "take", take)
    console = text_console()
    config = short_config(train__health_every_steps=0)
    assert not commands.train(config, tmp_path, console=console)
    assert "SIGTERM: saved step 0 of 20" in said(console)
    assert (tmp_path / "checkpoints" / "0").is_dir()


def test_output_that_nobody_reads_any_more_asks_a_run_to_stop(tmp_path, monkeypatch, caplog):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    def train(_: Any, __: Any, console: Console, ___: Any, stop: Any, *____: Any) -> bool:
        assert not stop.is_requested()
        console.print("step 1")
        console.print("step 2")
        return not stop.is_requested()

    monkeypatch.setattr(commands, "_train_and_evaluate", train)
    assert not commands.train(short_config(), tmp_path, console=Console(file=Gone()))
    assert caplog.text.count("It saves its state and stops") == 1


def results_of(directory: Path, suffix: str, sha256: str | None) -> None:
    for name in (f"results{suffix}.csv", f"report{suffix}.html"):
        (directory / name).write_text(f"{name} of {sha256}")
    found = {"step": 16, "trained": [], "made by": sha256}
    if sha256 is not None:
        found["settings_sha256"] = sha256
    (directory / f"results{suffix}.json").write_text(json.dumps(found))


def names_of(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_results_of_other_settings_are_kept_and_those_of_the_same_are_not(tmp_path):
    result_files.keep_other_results(tmp_path, "", "a" * 64)  # nothing there
    results_of(tmp_path, "", "a" * 64)
    before = names_of(tmp_path)
    result_files.keep_other_results(tmp_path, "", "a" * 64)
    assert names_of(tmp_path) == before == ["report.html", "results.csv", "results.json"]
    result_files.keep_other_results(tmp_path, "", "b" * 64)
    kept = {f"{name.split('.')[0]}_aaaaaaaa.{name.split('.')[1]}" for name in before}
    assert set(names_of(tmp_path)) == {*before, *kept}
    for name in before:
        stem, kind = name.split(".")
        copy = (tmp_path / f"{stem}_aaaaaaaa.{kind}").read_text()
        assert copy == (tmp_path / name).read_text()
    # Of a version that wrote no hash, and of a step.
    results_of(tmp_path, "_step_8", None)
    result_files.keep_other_results(tmp_path, "_step_8", "b" * 64)
    (copy,) = tmp_path.glob("results_step_8_*.json")
    assert copy.read_text() == (tmp_path / "results_step_8.json").read_text()


def test_an_evaluation_killed_before_its_last_file_does_not_cost_the_results_it_saved(tmp_path):
    results_of(tmp_path, "", "a" * 64)
    for _ in range(2):  # the same command again, after it was killed
        result_files.keep_other_results(tmp_path, "", "b" * 64)
        for name in ("results.csv", "report.html"):
            (tmp_path / name).write_text(f"{name} of b")
    copies = result_files.result_files(tmp_path, "_aaaaaaaa")
    assert ["a" * 64 in copy.read_text() for copy in copies] == [True] * 3


def started_run(directory: Path, config: Any, *steps: int) -> None:
    """A directory as a run of a config leaves it that has saved some steps."""
    directory.mkdir(exist_ok=True)
    for name in ("config", "environment"):
        text = json.dumps(to_json_values(config) if name == "config" else {"command": []})
        (directory / f"{name}.json").write_text(text)
    for step in steps:
        (directory / "checkpoints" / str(step)).mkdir(parents=True)


def test_a_longer_run_is_refused_with_the_setting_that_allows_it(tmp_path):
    experiment = as_experiment(short_config(train__num_epochs=4))
    started_run(tmp_path, short_config(), 20)
    before = names_of(tmp_path)
    with pytest.raises(ChangedConfigError) as caught:
        resume.check_config(tmp_path, experiment, lambda: None)
    assert "train.num_epochs: the run has 2, got 4" in str(caught.value)
    assert "--config.train.extend=True" in str(caught.value)
    for refused in (
        {"train__num_epochs": 1, "train__extend": True},
        {"train__num_epochs": 4, "train__extend": True, "seed": 1},
    ):
        changed = as_experiment(short_config(**refused))
        with pytest.raises(ChangedConfigError) as caught:
            resume.check_config(tmp_path, changed, lambda: None)
        assert "--config.train.extend=True" not in str(caught.value)
    assert names_of(tmp_path) == before
    resume.check_config(tmp_path, as_experiment(short_config(train__extend=True)), lambda: None)
    assert "extensions.json" not in names_of(tmp_path)  # no longer than it was


def test_extensions_are_recorded_and_what_was_before_them_is_kept(tmp_path):
    def extend(num_epochs: int) -> list[tuple[int, int]]:
        config = short_config(train__num_epochs=num_epochs, train__extend=True)
        resume.check_config(tmp_path, as_experiment(config), lambda: None)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["train"]["num_epochs"] == num_epochs
        return [(one.num_steps, one.until_step) for one in resume.read_extensions(tmp_path)]

    started_run(tmp_path, short_config())
    assert extend(3) == []  # killed before its first save: nothing of it counts
    started_run(tmp_path, short_config(), 8, 20)  # finished
    results_of(tmp_path, "", "a" * 64)
    (tmp_path / "curves.png").write_bytes(b"curves")
    assert extend(4) == [(20, 20)]
    assert not (tmp_path / "results.json").exists()  # the longer run is not finished
    assert json.loads((tmp_path / "results_step_20.json").read_text())["made by"] == "a" * 64
    kept = json.loads((tmp_path / "config_until_step_20.json").read_text())
    assert kept["train"]["num_epochs"] == 2
    expected = {"report_step_20.html", "curves_step_20.png", "environment_until_step_20.json"}
    assert expected <= set(names_of(tmp_path))
    assert extend(5) == [(20, 20)]  # stopped before a save of its own
    (tmp_path / "checkpoints" / "30").mkdir()
    assert extend(6) == [(20, 20), (50, 30)]  # stopped on the way
    # Its later checkpoints are lost: what is done again follows the schedules that held there.
    for step in ("20", "30"):
        (tmp_path / "checkpoints" / step).rmdir()
    assert extend(7) == [(20, 8)]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """Two epochs, trained and evaluated in a thread, as a server would."""
    directory = tmp_path_factory.mktemp("short") / "run"
    found = []
    thread = threading.Thread(
        target=lambda: found.append(
            commands.train(short_config(), directory, console=text_console())
        )
    )
    thread.start()
    thread.join()
    assert found == [True]
    return directory


def copy_of(run: Path, directory: Path) -> Path:
    shutil.copytree(run, directory)
    return directory


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_an_extended_run_is_the_longer_one_bit_for_bit(finished_run, tmp_path, monkeypatch):
    """Where the rate does not depend on the length, nothing tells the two apart."""
    whole = tmp_path / "whole"
    assert commands.train(short_config(train__num_epochs=4), whole, console=text_console())
    extended, console = copy_of(finished_run, tmp_path / "extended"), text_console()
    longer = short_config(train__num_epochs=4, train__extend=True)
    # Stopped once on the way, and gone on by the same command.
    measure = RunLoop.measure

    def stop_at_30(run: Any, watch: Any, state: TrainState, last: Any) -> bool:
        if int(state.step) == 30:
            run.stop.request("the test")
        return measure(run, watch, state, last)

    with monkeypatch.context() as patch:
        patch.setattr(RunLoop, "measure", stop_at_30)
        assert not commands.train(longer, extended, console=console)
    assert "A run of 20 steps until step 20, extended." in said(console)
    assert "the test: saved step 30 of 40" in said(console)
    assert commands.train(longer, extended, console=console)
    assert final_fingerprint(extended) == final_fingerprint(whole)
    losses = [
        [
            (r["step"], r["train/loss"])
            for r in MetricsLog.read(path / "metrics.jsonl")
            if "train/loss" in r
        ]
        for path in (extended, whole)
    ]
    assert losses[0] == losses[1]
    results = [json.loads((path / "results.json").read_text()) for path in (extended, whole)]
    assert results[0]["trained"] == results[1]["trained"]
    assert results[0]["earlier_lengths"] == [{"num_steps": 20, "until_step": 20}]
    short = json.loads((finished_run / "results.json").read_text())
    assert json.loads((extended / "results_step_20.json").read_text()) == short
    checkpointer = Checkpointer(extended / "checkpoints")
    assert 20 in checkpointer.steps()
    checkpointer.close()


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_that_starts_from_another_s_weights(finished_run, tmp_path):
    config = short_config(train__num_epochs=1, seed=5, init__workdir=str(finished_run))
    workdir = tmp_path / "run"
    assert commands.train(config, workdir, console=text_console())
    start, end = Checkpointer(workdir / "checkpoints"), Checkpointer(finished_run / "checkpoints")
    saved, given = start.read_meta(0)["fingerprint"], end.read_meta(20)["fingerprint"]
    start.close()
    end.close()
    names = [name for name in given if name.startswith(("params", "batch_stats"))]
    assert len(names) > 10
    assert all(saved[name] == given[name] for name in names)
    assert saved["step"] != given["step"]
    other = short_config(init__workdir=str(finished_run), model__embedding_dim=8)
    with pytest.raises(ValueError, match=r"init\.workdir = .* holds another network:\n"):
        commands.train(other, tmp_path / "other", console=text_console())
    assert not (tmp_path / "other").exists()


def test_a_run_that_starts_from_an_export(tmp_path):
    config = short_config(init__workdir=str(tmp_path / "encoder"))
    experiment = build_experiment(config)
    state: Any = jax.jit(experiment.initial_state)()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    export.export_model(Model(experiment.config, variables, step=3), tmp_path / "encoder")
    found = start_weights.start_variables(experiment)
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    other = short_config(init__workdir=str(tmp_path / "encoder"), model__embedding_dim=8)
    with pytest.raises(ValueError, match=r"init\.workdir = .* holds another network:\n"):
        start_weights.start_variables(build_experiment(other))


@pytest.mark.slow
def test_a_run_that_starts_from_a_backbone_of_torch(tmp_path):
    file = tmp_path / "backbone.safetensors"
    config = short_config(model__backbone="resnet8", model__width=4, init__workdir=str(file))
    experiment = build_experiment(config)
    drawn = jax.jit(experiment.initial_state)()
    other = {
        "params": jax.tree.map(lambda leaf: leaf + 1, drawn.params["backbone"]),
        "batch_stats": jax.tree.map(lambda leaf: leaf + 2, drawn.batch_stats["backbone"]),
    }
    with pytest.raises(FileNotFoundError, match="backbone"):
        start_weights.start_variables(experiment)
    file.write_bytes(safetensors.save(torch_names.to_torch(other)))
    start = start_weights.start_variables(experiment)
    state = pretraining.started_from(drawn, start)
    for part, before in (("params", drawn.params), ("batch_stats", drawn.batch_stats)):
        after = getattr(state, part)
        assert jax.tree.structure(after) == jax.tree.structure(before)
        jax.tree.map(np.testing.assert_array_equal, after["backbone"], other[part])
        for name in set(before) - {"backbone"}:
            jax.tree.map(np.testing.assert_array_equal, after[name], before[name])

    def mistake(match: str, **changes: Any) -> None:
        changed = short_config(**{"model__backbone": "resnet8", "model__width": 4, **changes})
        changed.init.workdir = str(file)
        with pytest.raises(ValueError, match=match):
            start_weights.start_variables(build_experiment(changed))

    mistake(r"no steps: leave init\.step", init__step=3)
    mistake(r"init\.workdir = (.|\n)*stem_conv\.kernel: weights has", model__width=8)
    mistake("only ResNets", model__backbone="convnet")
    file.write_bytes(file.read_bytes()[:-9])
    mistake(r"init\.workdir = .*backbone\.safetensors: ")


@pytest.mark.slow
def test_a_vision_transformer_starts_from_a_file_of_another_size(tmp_path, caplog):
    file = tmp_path / "vit.safetensors"

    def config(**changes: Any) -> Any:
        given = {"backbone": "timm_vit_tiny", "width": 6, "patch_size": 4}
        return short_config(
            init__workdir=str(file),
            **{f"model__{name}": value for name, value in {**given, **changes}.items()},
        )

    experiment = build_experiment(config())
    drawn = jax.tree.map(  # from the shapes alone: nothing is compiled
        lambda leaf: jnp.ones(leaf.shape, leaf.dtype), jax.eval_shape(experiment.initial_state)
    )
    backbone = drawn.params["backbone"]
    rows = backbone["positions"].shape[0]
    # Positions that rise along a row of five patches: resampled, they rise all the same.
    other = {**backbone, "positions": np.broadcast_to(np.arange(5.0)[None, :, None], (5, 5, 6))}
    file.write_bytes(safetensors.save(torch_names.to_torch({"params": other})))
    with caplog.at_level(logging.WARNING):
        start = start_weights.start_variables(experiment)
    assert f"for 5x5 patches, and a view of this run has {rows}x{rows}" in caplog.text
    state = pretraining.started_from(drawn, start)
    assert jax.tree.structure(state) == jax.tree.structure(drawn)
    found = state.params["backbone"]["positions"]
    assert found.shape == (rows, rows, 6)
    assert (np.diff(found, axis=1) > 0).all()
    np.testing.assert_allclose(np.diff(found, axis=0), 0, atol=1e-6)
    for name in set(backbone) - {"positions"}:
        jax.tree.map(np.testing.assert_array_equal, state.params["backbone"][name], backbone[name])
    for changes, match in (
        ({"patch_size": 8}, r"patch_embed\.proj\.weight: weights has"),
        ({"backbone": "dinov2_small"}, r"missing from the weights: blocks\.0\.ls1\.gamma"),
        ({"backbone": "vit_tiny", "width": 12}, "only ResNets and the backbones timm_vit"),
    ):
        with pytest.raises(ValueError, match=match):
            start_weights.start_variables(build_experiment(config(**changes)))


@pytest.mark.slow
@pytest.mark.nightly
def test_transfer_results_of_files_of_one_name_stand_side_by_side(finished_run, tmp_path):
    run = copy_of(finished_run, tmp_path / "run")
    generator = np.random.default_rng(0)
    config = run_config.load_config(run)

    def evaluate(name: str, num_train_examples: int = 0) -> None:
        section: Any = transfer.get_config()
        section.train_paths = (str(tmp_path / name / "train.npz"),)
        section.test_paths = (str(tmp_path / name / "test.npz"),)
        section.num_train_examples = num_train_examples
        commands.evaluate_on(config, section, run, step=None, console=text_console())

    def found() -> dict[str, str]:
        return {path.name: path.read_text() for path in run.glob("results_on_*.json")}

    for name in ("flowers", "birds"):
        (tmp_path / name).mkdir()
        for part in ("train", "test"):
            images = generator.integers(0, 256, (60, 16, 16, 3)).astype(np.uint8)
            np.savez(tmp_path / name / f"{part}.npz", images=images, labels=np.arange(60) % 5)
    evaluate("flowers")
    (first,) = found()
    evaluate("birds")
    evaluate("birds", num_train_examples=50)
    both = found()
    assert len(both) == 3
    assert len(list(run.glob("results_on_*.csv"))) == 3
    assert "flowers" in both[first]
    evaluate("flowers")
    evaluate("birds")
    assert found() == both


def test_a_run_is_not_trained_where_an_export_lies(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an export"):
        commands.train(short_config(), tmp_path)
    assert names_of(tmp_path) == ["model.json"]


OTHERS_CONFIGS = (
    "[1, 2]",
    '"text"',
    "3",
    '{"model_type": "bert"}',
    '{"method": "jevb", "data": 3}',
)


@pytest.mark.parametrize("content", OTHERS_CONFIGS)
def test_a_config_of_another_program_is_refused_by_every_reader(tmp_path, monkeypatch, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    for reads in (run_config.read_config, run_config.load_config, load):
        with pytest.raises(ValueError, match=r"config\.json holds no config of a run"):
            reads(path if reads is run_config.read_config else tmp_path)
    monkeypatch.setattr(commands.readiness, "check", lambda _: None)
    with pytest.raises(ValueError, match=r"config\.json holds no config of a run"):
        commands.train(short_config(), tmp_path, console=text_console())
    assert path.read_text() == content
    assert set(names_of(tmp_path)) <= {".lock", "config.json"}


def test_a_file_is_no_directory_of_a_run(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(
        NotADirectoryError, match=r"must be a directory, and .*notes\.txt is a file"
    ):
        commands.train(short_config(), path, console=text_console())
    with pytest.raises(NotADirectoryError, match="must be a directory"):
        finetuning.finetune({}, path, console=text_console())
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.csv", "report.html", "checkpoints"])
def test_a_run_begins_neither_over_another_s_files_nor_on_unknown_settings(
    tmp_path, monkeypatch, name
):
    (tmp_path / name).write_text('{"loss": 3}\n')
    monkeypatch.setattr(commands.readiness, "check", lambda _: None)
    with pytest.raises(ValueError, match=rf"holds {name} and no config\.json"):
        commands.train(short_config(), tmp_path, console=text_console())
    assert (tmp_path / name).read_text() == '{"loss": 3}\n'
    assert set(names_of(tmp_path)) <= {".lock", name}


def test_results_of_accepted_other_data_are_others():
    config = to_json_values(short_config())
    before = result_files.settings_sha256(config)
    assert before == result_files.settings_sha256(config, [])
    changed = [result_files.settings_sha256(config, [line]) for line in ("a", "b")]
    assert len({before, *changed}) == 3


def test_transfer_results_of_replaced_files_stand_side_by_side(tmp_path, monkeypatch):
    encoder = types.SimpleNamespace(square_size=0, extractor=lambda: None, variables=None, step=1)
    monkeypatch.setattr(commands.loading, "load", lambda *_: encoder)
    monkeypatch.setattr(commands, "evaluate_transfer", lambda *_: {})
    monkeypatch.setattr(commands.tables, "results_csv", lambda _: "")
    monkeypatch.setattr(commands.tables, "classification_table", lambda _: "")
    section: Any = transfer.get_config()
    section.train_paths, section.test_paths = ("train.npz",), ("test.npz",)
    for level, place in enumerate(("a", "b", "a")):  # relative paths, and files that are replaced
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        for part in ("train", "test"):
            images = np.full((20, 4, 4, 3), level, np.uint8)
            np.savez(f"{part}.npz", images=images, labels=np.arange(20) % 2)
        for _ in range(2):
            commands.evaluate_on(
                short_config(), section, tmp_path, step=None, console=text_console()
            )
        assert len(list(tmp_path.glob("results_on_*.json"))) == level + 1


def test_a_run_that_was_copied_without_its_environment_has_a_report_all_the_same(
    tmp_path, monkeypatch
):
    found = []
    monkeypatch.setattr(commands.page, "write_page", lambda *_, **given: found.append(given))
    monkeypatch.setattr(commands.evidence, "gather_evidence", lambda *_: None)
    monkeypatch.setattr(commands.tables, "results_csv", lambda _: "")
    monkeypatch.setattr(commands.tables, "classification_table", lambda _: "")
    config = to_json_values(short_config())
    experiment: Any = types.SimpleNamespace(
        num_train_steps=4,
        config=config,
        settings=read.run_settings(config),
        dataset=types.SimpleNamespace(train=types.SimpleNamespace(name="digits"), test=range(359)),
    )
    results = {"step": 4, "settings_sha256": "a" * 64}
    evaluation: Any = types.SimpleNamespace(ood=None, fitted=None)
    commands._write_results(experiment, tmp_path, results, evaluation, text_console())
    assert found[0]["environment"] == {"command": []}
    assert found[0]["num_images"] == 359
    assert json.loads((tmp_path / "results.json").read_text()) == results


@pytest.mark.parametrize("mode", ["full", "frozen"])
def test_the_config_of_a_finetune_or_an_export_can_be_given_again(tmp_path, mode):
    tune: Any = finetune_digits.get_config(mode)
    train = to_json_values(short_config())
    tune.init.workdir = "runs/x"
    tuned = to_json_values(tune)
    del tuned["data"]["max_image_pixels"]  # of a version before it
    path = tmp_path / "model.json"
    files.write_json_atomically(path, {"config": train, "finetuned": tuned})
    again = to_json_values(run_config.read_config(path))
    assert again == to_json_values(tune)
    read.finetune_settings(again)
    files.write_json_atomically(path, {"config": train})
    assert to_json_values(run_config.read_config(path)) == train


def test_batches_are_those_of_a_longer_run_from_any_step():
    """Order does not depend on how many steps a run has."""
    source = ArraySource(np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1))
    whole = batches.stream_batches(source, start_step=0, num_steps=12, batch_size=8, seed=3)
    first = batches.stream_batches(source, start_step=0, num_steps=7, batch_size=8, seed=3)
    rest = batches.stream_batches(source, start_step=7, num_steps=5, batch_size=8, seed=3)
    np.testing.assert_array_equal([*first, *rest], [*whole])


def test_the_commit_of_a_run_is_that_of_the_package_and_of_no_project_around_it(tmp_path):
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false", *arguments],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip

    named = '[project]\nname = "jevb-jax"\n'
    own = tmp_path / "jevb_jax" / "__init__.py"
    installed = tmp_path / ".venv" / "jevb_jax" / "__init__.py"
    for file in (own, installed):
        file.parent.mkdir(parents=True)
        file.write_text("x = 1\n")
        file.parent.with_name("pyproject.toml").write_text(named)
    inside = installed.parent.parent
    assert provenance._own_commit(tmp_path) == (None, False)  # no repository
    git("init", "--quiet")
    assert provenance._own_commit(tmp_path) == (None, False)  # no commit
    git("add", "pyproject.toml")
    git("commit", "--quiet", "-m", "x")
    assert provenance._own_commit(tmp_path) == (None, False)  # not in it
    git("add", str(own), str(installed))  # even a copy that the project tracks is not its own
    git("commit", "--quiet", "-m", "y")
    commit = git("rev-parse", "HEAD")
    assert provenance._own_commit(tmp_path) == (commit, False)
    assert provenance._own_commit(inside) == (None, False)
    own.write_text("x = 2\n")
    assert provenance._own_commit(tmp_path) == (commit, True)
    for text in ('[project]\nname = "theirs"\n', "[tool]\n", None):  # a copy at a project's top
        (tmp_path / "pyproject.toml").unlink()
        if text is not None:
            (tmp_path / "pyproject.toml").write_text(text)
        assert provenance._own_commit(tmp_path) == (None, False)
    found = provenance.environment()
    assert set(found) >= {"commit", "uncommitted_changes", "versions"}
    assert found["versions"]["jevb-jax"] == jevb_jax.__version__


ASKED = """
from jevb_jax import commands
from jevb_jax.command_line import scripts
commands.evaluate = lambda config, *_, **__: print(config.ood.name, config.ood.default_score)
scripts.evaluate()
"""


@pytest.mark.slow
@pytest.mark.nightly
def test_a_protocol_without_a_default_score_leaves_that_of_the_run(tmp_path):
    config: Any = smoke.get_config()
    config.ood.default_score = "representation/ssd_1"
    (tmp_path / "config.json").write_text(json.dumps(to_json_values(config)))
    for changes, expected in (
        ([], "representation/ssd_1"),
        (["--ood.default_score=embedding/norm"], "embedding/norm"),
    ):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                ASKED,
                f"--workdir={tmp_path}",
                "--ood=ood:cifar10_arrays",
                *changes,
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1] == expected
