"""Real processes: a kill, a signal, a changed setting, a loss that is not finite."""

import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import smoke
from jevb_jax import health, parallel, runner
from jevb_jax.checkpoints import Checkpointer
from jevb_jax.experiment import Experiment, build_experiment
from jevb_jax.metrics_log import MetricsLog
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
def test_killed_and_terminated_run_equals_the_uninterrupted_one(tmp_path):
    env = {**os.environ, **AS_USERS_RUN_IT}
    settings = ("train.ema_decay=0.9", *WITHOUT_COLOUR, "ood.corruptions=('contrast',)")
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
    # What no number depends on may change.
    allowed = run(workdir, *settings, "evaluation.few_label_seeds=1", env=env)
    assert allowed.returncode == 0, allowed.stderr

    evaluated = subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), f"--workdir={workdir}"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert evaluated.returncode == 0, evaluated.stderr
    after = json.loads((workdir / "results.json").read_text())
    knn = [[r["value"] for r in x["trained"] if "knn" in r["name"]] for x in (after, results[0])]
    assert knn[0] == knn[1]


@pytest.mark.slow
def test_streaming_sees_the_batches_of_the_resident_run(tmp_path):
    losses = []
    for placement in ("resident", "stream"):
        workdir = tmp_path / placement
        finished = run(
            workdir,
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
        "optimizer.name=sgd",
        "optimizer.learning_rate=1e30",
        "optimizer.warmup_epochs=0",
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
@pytest.mark.parametrize("scale", ["untied", "fixed"])
def test_health_of_pairs_is_logged_for_jevb(scale):
    config: Any = smoke.get_config()
    config.train.health_pairs = True
    config.jevb.likelihood_scale = scale
    config.jevb.space = "linear" if scale == "fixed" else "log"
    experiment = build_experiment(config)
    check = runner._health_check(experiment)
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
    assert runner.train(config, tmp_path / "run", console=Console(quiet=True))
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
    assert runner.train(config, tmp_path / "run", console=Console(quiet=True))


def test_alarms_are_logged_and_said_once_when_they_change(tmp_path, monkeypatch):
    experiment = build_experiment(smoke.get_config())
    out = io.StringIO()
    healthy = {"embedding_std": 0.9, "effective_rank": 9.0, "embedding_log_radius": 0.0}
    sick = {**healthy, "effective_rank": float("nan")}

    def check(run: Any, step: int, values: dict[str, float]) -> str:
        run.check_health = lambda state: values
        out.seek(0)
        out.truncate()
        run.record_health(types.SimpleNamespace(step=step))
        return out.getvalue()

    # A narrow console, and brackets that are no markup.
    make = functools.partial(
        runner._Run,
        experiment,
        tmp_path,
        mesh=parallel.make_mesh(),
        stop=parallel.StopRequest(),
        check_held=lambda: None,
    )
    run = make(Console(file=out, width=30))
    assert check(run, 10, sick) == ""  # too early to judge
    assert check(run, 20, healthy) == ""
    said = check(run, 40, sick)
    assert said.startswith("Health alarm at step 40, collapse: effective rank nan of D = 16")
    assert said.count("\n") == 1
    assert check(run, 60, sick) == ""
    run.log.close()

    # A resumed run knows what was raised, and says no more than the uninterrupted one.
    monkeypatch.setattr(Experiment, "initial_state", lambda self: None)
    resumed = make(Console(file=out, width=30))
    resumed.checkpointer.restore_latest = lambda template: (60, template)
    resumed.restore()
    assert resumed.alarms == run.alarms
    assert check(resumed, 80, sick) == ""
    assert check(resumed, 100, healthy) == "Health alarm cleared at step 100: collapse\n"
    assert check(resumed, 120, healthy) == ""
    for each in (run, resumed):
        each.checkpointer.close()
    resumed.log.close()

    records = MetricsLog.read(tmp_path / "metrics.jsonl")
    flags = [(record["step"], record.get("health/alarm_collapse")) for record in records]
    assert flags == [(10, None), (20, 0), (40, 1), (60, 1), (80, 1), (100, 0), (120, 0)]


def test_too_few_validation_images_leave_out_the_rank_alone(caplog):
    config: Any = smoke.get_config()
    config.train.health_num_images = 16
    check: Any = runner._health_check(build_experiment(config))
    assert "No effective rank will be logged" in caplog.text
    assert check is not None
    config.train.health_num_images = 1
    assert runner._health_check(build_experiment(config)) is None
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
    run = runner._Run(
        experiment,
        tmp_path,
        Console(file=out, width=80),
        mesh,
        parallel.StopRequest(),
        lambda: None,
    )
    state = run.train(run.restore())
    run.checkpointer.close()
    run.log.close()

    assert int(state.step) == 48  # no alarm stops a run
    raised = [{cause}] if cause else [set()]
    raised += [{cause, other} for other in beside]
    assert run.alarms.keys() in raised
    said = out.getvalue()
    records = MetricsLog.read(tmp_path / "metrics.jsonl")
    checks = [record for record in records if "health/embedding_std" in record]
    assert [record["step"] for record in checks] == [10, 20, 30, 40, 48]  # and at the end
    flags = {name: [r.get(name) for r in checks] for name in checks[-1] if "/alarm_" in name}
    assert all(values[0] is None for values in flags.values())
    history = health.alarm_history(records, embedding_dim=32)
    if cause is None:
        assert all(values[1:] == [0, 0, 0, 0] for values in flags.values())
        assert history == []
        assert "Health alarm at" not in said
        assert said.endswith("Health alarms at the end: none\n")
        return
    assert flags[f"health/alarm_{cause}"][-1] == 1
    assert said.count(f"Health alarm at step {history[0].step}, {cause}: ") == 1
    summary = said[said.index("Health alarms at the end: ") :]
    assert f"\n  {cause}: {run.alarms[cause]}\n" in summary
    standing = {
        p.name for p in history if p.message.endswith("Not cleared by the last health check.")
    }
    assert standing == run.alarms.keys()
    # The flags and the history tell one story.
    rises = sum(
        values[i] == 1 and not values[i - 1] for values in flags.values() for i in range(1, 5)
    )
    assert rises == len(history)
