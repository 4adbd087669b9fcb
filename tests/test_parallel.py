"""One device against eight, one process against two, and who may start several."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from jevb_jax import parallel
from jevb_jax.images import batch_order, batches
from jevb_jax.networks import batch_norm as batch_norm_module
from jevb_jax.networks import vit
from jevb_jax.runs.checkpoints import Checkpointer
from jevb_jax.runs.files import lock_directory
from jevb_jax.runs.metrics_log import MetricsLog
from jevb_jax.training.experiment import Experiment, build_experiment
from jevb_jax.training.step import TrainState, make_train_chunk, state_shardings
from tests.marks import nightly

ROOT = Path(__file__).resolve().parent.parent
# Colour is an image's own business, takes long to compile and has tests of its own.
WITHOUT_COLOUR = {"augmentation.jitter_probability": 0.0, "augmentation.grayscale_probability": 0.0}
METHODS = ("jevb", "simsiam", "vi_simsiam", "byol", "vicreg", "barlow_twins")


def make_experiment(method: str = "jevb", changes: Any = None) -> Experiment:
    config: Any = smoke.get_config()
    config.method = method
    config.model.projector_normalizes_output = method in ("jevb", "simsiam", "vi_simsiam")
    config.train.target_decay = 0.9 if method == "byol" else 0.0
    # Adam's first steps are the signs of gradients, which rounding turns where they are near zero.
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 1e-4 if method == "barlow_twins" else 0.02
    config.update_from_flattened_dict(WITHOUT_COLOUR)
    config.update_from_flattened_dict(changes or {})
    return build_experiment(config)


@pytest.fixture
def without_kinks(monkeypatch):
    """Smooth networks: the same numbers on any devices, up to rounding.

    Where the input of a ReLU is zero up to rounding, it is on with one order of a sum and off with
    another, and that example's gradient differs by a share that no tolerance of rounding covers (about
    one step in twenty of these networks, 1e-5 to 3e-4 of a bias).
    """
    batch_norm = batch_norm_module.batch_norm

    def smooth(*arguments: Any) -> Any:
        *others, relu = arguments
        outputs: Any = batch_norm(*others, False)
        y, *statistics = outputs
        return vit.nn.softplus(y) if relu else y, *statistics

    monkeypatch.setattr(batch_norm_module, "batch_norm", smooth)  # it has a ReLU of its own
    monkeypatch.setattr(vit.nn, "relu", vit.nn.softplus)


def wait_for_a_signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def handlers() -> list[Any]:
    return [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]


def test_a_signal_is_a_flag_and_ends_waits_and_a_second_one_acts_at_once():
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        mine = handlers()
        with parallel.StopRequest() as stop:
            assert stop.is_heeding
            with stop.interrupting():
                pass
            with pytest.raises(parallel.StoppedError, match="SIGTERM"), stop.interrupting():
                wait_for_a_signal()
            assert stop.is_requested()
            with pytest.raises(parallel.StoppedError), stop.interrupting():
                raise AssertionError("a wait that begins after the signal does not begin")
            assert handlers() == mine
            os.kill(os.getpid(), signal.SIGTERM)
            assert told == [signal.SIGTERM]
        with parallel.StopRequest() as stop:  # outside a wait, nothing is raised
            os.kill(os.getpid(), signal.SIGTERM)
            assert (stop.signal_name, told) == ("SIGTERM", [signal.SIGTERM])
            assert stop.request("later")
            assert stop.signal_name == "SIGTERM"
        assert handlers() == mine
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_closed_terminal_stops_unless_the_process_is_to_outlive_it(handler):
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with parallel.StopRequest() as stop:
            if handler == signal.SIG_DFL:
                os.kill(os.getpid(), signal.SIGHUP)
            else:
                assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert stop.signal_name == ("SIGHUP" if handler == signal.SIG_DFL else None)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_handles_no_signals_and_changes_none():
    found: list[Any] = []
    before = handlers()

    def work() -> None:
        with parallel.StopRequest() as stop:
            with stop.interrupting():
                found.append((stop.is_heeding, stop.is_requested(), handlers()))
            stop.request("closed output")
            with stop.interrupting():
                found.append(stop.is_requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, False, before), True]


class Stepper:
    """One step from any state, on some devices."""

    def __init__(self, experiment: Experiment, devices: list[Any]):
        self.experiment, self.mesh = experiment, parallel.make_mesh(devices)
        is_cut = experiment.config["train"]["shard_optimizer_state"]
        self.shardings = state_shardings(
            experiment.initial_state(), self.mesh, shard_optimizer_state=is_cut
        )
        self.chunk = make_train_chunk(
            experiment.train_step, donate=False, mesh=self.mesh, shardings=self.shardings
        )
        images = batches.load_resident(experiment.dataset.train)
        self.images = parallel.put(images, parallel.replicated(self.mesh))

    def __call__(self, state: TrainState) -> tuple[TrainState, float]:
        """The state after, and the loss."""
        indices = batch_order.batch_indices(
            int(state.step),
            num_examples=len(self.images),
            batch_size=self.experiment.config["train"]["batch_size"],
            seed=0,
        )
        rows = parallel.put(indices[None], parallel.over_data(self.mesh, axis=1))
        key = parallel.put_key(self.experiment.key, self.mesh)
        state = parallel.put(state, self.shardings)
        state, metrics, _ = self.chunk(state, self.images, rows, jnp.int32(1), key)
        return state, float(metrics["loss"][0])


def run_steps(
    experiment: Experiment, devices: list[Any], num_steps: int, *, state: Any = None
) -> tuple[TrainState, list[float]]:
    """Steps from a state, the initial one by default, and their losses."""
    step, losses = Stepper(experiment, devices), []
    state = experiment.initial_state() if state is None else state
    for _ in range(num_steps):
        state, loss = step(state)
        losses.append(loss)
    return state, losses


def distance(a: Any, b: Any, *, floor: float = 1e-3) -> float:
    """Largest difference of a leaf relative to the leaf's own largest entry and a floor.

    The floor of statistics is 0.1: a mean is rounded against the spread of what it averages, not
    against its own size.
    """
    pairs = zip(
        jax.tree.leaves(parallel.to_host(a)), jax.tree.leaves(parallel.to_host(b)), strict=True
    )
    return max(float(np.max(np.abs(x - y)) / (np.max(np.abs(x)) + floor)) for x, y in pairs)


# --- Start-up and layout --------------------------------------------------------------------------


def test_processes_are_started_by_a_launcher_and_never_on_a_laptop():
    slurm = {"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}
    for environ, tpu, expected in (
        ({}, False, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False, None),
        ({"SLURM_NTASKS": "4"}, False, None),  # an allocation, not a task of it
        (slurm, False, "slurm"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, None),  # a notebook in a cluster
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
            False,
            "kubernetes",
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, True, None),
        ({}, True, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, None),
    ):
        assert parallel.detect_cluster(environ, has_tpu=tpu) == expected, environ


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_processes": 2}, "missing: --coordinator_address, --process_id"),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2},
            r"--process_id must be in \[0, 2\) .*, got 2",
        ),
    ],
)
def test_start_up_that_does_not_fit_is_refused(given, message, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("started"))
    nothing = {"coordinator_address": None, "num_processes": None, "process_id": None}
    with pytest.raises(ValueError, match=message):
        parallel.start_processes({}, **{**nothing, **given}, heartbeat_timeout_seconds=9)
    parallel.start_processes({}, **nothing, heartbeat_timeout_seconds=9)


@pytest.mark.parametrize("of_main", [True, False])
def test_every_process_does_what_process_0_holds_true(of_main, monkeypatch):
    assert parallel.as_main_says(of_main) is of_main  # a single process asks nobody
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        parallel.multihost_utils, "broadcast_one_to_all", lambda _: np.asarray(of_main)
    )
    assert parallel.as_main_says(not of_main) is of_main


def test_batch_that_does_not_divide_names_both_numbers():
    mesh = parallel.make_mesh()
    parallel.check_divisible(64, 2, mesh)
    with pytest.raises(
        ValueError, match=r"batch_size = 60 is global.*a multiple of 8, for 8 devices"
    ):
        parallel.check_divisible(60, 1, mesh)
    with pytest.raises(
        ValueError, match=r"multiple of 24, for 8 devices x train.num_micro_batches = 3"
    ):
        parallel.check_divisible(64, 3, mesh)


def test_arrays_lie_as_asked():
    mesh = parallel.make_mesh()
    tree = {"a": np.zeros((3, 16)), "b": np.zeros(5), "c": np.zeros(())}
    laid = parallel.put(tree, parallel.over_data_where_divisible(mesh, tree))
    assert {k: v.addressable_shards[0].data.shape for k, v in laid.items()} == {
        "a": (3, 2), "b": (5,), "c": (),
    }  # fmt: skip
    again = parallel.put(laid, parallel.over_data_where_divisible(mesh, tree))
    assert all(again[name] is laid[name] for name in tree)
    key = parallel.put_key(jax.random.key(3), mesh)
    assert jax.random.bits(key) == jax.random.bits(jax.random.key(3))
    assert parallel.local_rows(64) == slice(0, 64)


# --- Equal numbers --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("method", METHODS)
def test_each_of_twenty_steps_on_eight_devices_is_that_on_one(method, without_kinks):
    # Each from the same state: free-running, a change of 1e-7 of the first parameters on *one* device
    # grows to 1e-2 of the loss in 20 steps of these tiny networks, as the order of sums does.
    experiment = make_experiment(method)
    steppers = [Stepper(experiment, devices) for devices in (jax.devices()[:1], jax.devices())]
    state: Any = experiment.initial_state()
    losses, errors = [], []
    for _ in range(20):
        (after, loss), (other, other_loss) = (stepper(state) for stepper in steppers)
        losses.append(loss)
        errors.append(
            (
                abs(loss - other_loss) / (abs(loss) + 0.1),
                distance(after.params, other.params),
                distance(after.batch_stats, other.batch_stats, floor=0.1),
            )
        )
        state = jax.tree.map(np.asarray, after)
    assert np.ptp(losses) > 1e-3 * abs(losses[0])  # it trains
    worst = np.max(errors, axis=0)
    print(f"{method}: loss {worst[0]:.1e}, parameters {worst[1]:.1e}, statistics {worst[2]:.1e}")
    assert worst.max() < 2e-5


@pytest.mark.slow
@pytest.mark.nightly
def test_optimizer_state_that_is_cut_changes_no_number(without_kinks):
    changes = {"optimizer.momentum": 0.9}
    whole, _ = run_steps(make_experiment("simsiam", changes), jax.devices(), 5)
    changes["train.shard_optimizer_state"] = True
    cut, _ = run_steps(make_experiment("simsiam", changes), jax.devices(), 5)
    assert distance(whole.params, cut.params) < 1e-6
    assert distance(whole.opt_state, cut.opt_state) < 1e-5
    sizes = [
        (leaf.size, leaf.addressable_shards[0].data.size) for leaf in jax.tree.leaves(cut.opt_state)
    ]
    assert any(whole_size == 8 * shard for whole_size, shard in sizes)
    assert sum(shard for _, shard in sizes) < sum(size for size, _ in sizes) / 4
    params = jax.tree.leaves(cut.params)
    assert all(leaf.addressable_shards[0].data.shape == leaf.shape for leaf in params)


@pytest.mark.slow
@pytest.mark.nightly
def test_checkpoint_of_eight_devices_goes_on_with_one_and_four(tmp_path, without_kinks):
    experiment = make_experiment("simsiam")  # compiles in less than half the time of JEVB
    state, _ = run_steps(experiment, jax.devices(), 3)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, state, config=experiment.config)
    checkpointer.wait()
    expected, losses = run_steps(experiment, jax.devices(), 3, state=state)
    for count in (1, 4, 8):
        mesh = parallel.make_mesh(jax.devices()[:count])
        template = parallel.put(experiment.initial_state(), parallel.replicated(mesh))
        restored = checkpointer.restore(3, template)
        assert distance(restored, state) == 0
        found, others = run_steps(experiment, jax.devices()[:count], 3, state=restored)
        if count == 8:
            assert losses == others
            assert distance(found, expected) == 0
        np.testing.assert_allclose(others, losses, rtol=1e-5)
        assert distance(found.params, expected.params) < 1e-5
    checkpointer.close()


# --- Collectives ----------------------------------------------------------------------------------

_BYTES = {"f32": 4, "bf16": 2, "u32": 4, "s32": 4, "u8": 1, "pred": 1, "u64": 8, "s64": 8}
_COLLECTIVE = re.compile(
    r" = (\(.*?\)|\S+) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)


def collectives(program: str) -> dict[str, tuple[int, int]]:
    """`{kind: (how many, bytes of their results)}` in the text of a compiled program."""
    found: dict[str, tuple[int, int]] = {}
    for shapes, kind in _COLLECTIVE.findall(program):
        size = sum(
            _BYTES[dtype] * int(np.prod([int(n) for n in dims.split(",") if n]))
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
        count, total = found.get(kind, (0, 0))
        found[kind] = (count + 1, total + size)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes", "num_statistics", "most"),
    [
        # Means and variances of both views, forward and backward.
        nightly("jevb", {}, 4, 49),
        ("simsiam", {}, 4, 49),
        # The others concern the network alone, and with SimSiam compile in half the time.
        # Of both views, to average the running ones.
        nightly("simsiam", {"train.bn_group_size": 8}, 2, 20),
        nightly("simsiam", {"train.num_micro_batches": 4}, 4, 40),
        # Of three views, in one batch.
        nightly("simsiam", {"augmentation.num_views": 3}, 6, 26),
    ],
    ids=["jevb", "global", "grouped", "micro-batches", "many views"],
)
def test_a_step_reduces_gradients_and_statistics_and_moves_nothing_else(
    method, changes, num_statistics, most, optimized
):
    experiment = make_experiment(method, changes)
    mesh = parallel.make_mesh()
    state = experiment.initial_state()
    shardings = state_shardings(state, mesh, shard_optimizer_state=False)
    chunk: Any = make_train_chunk(experiment.train_step, mesh=mesh, shardings=shardings)
    program = chunk.lower(
        parallel.put(state, shardings),
        parallel.put(batches.load_resident(experiment.dataset.train), parallel.replicated(mesh)),
        parallel.put(np.zeros((1, 64), np.int32), parallel.over_data(mesh, axis=1)),
        jnp.int32(1),
        parallel.put_key(experiment.key, mesh),
    ).compile()
    found = collectives(program.as_text())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    statistics = sum(leaf.size for leaf in jax.tree.leaves(state.batch_stats))
    print(found, "parameters", parameters, "statistics", statistics)
    assert set(found) == {"all-reduce"}
    count, size = found["all-reduce"]
    assert count <= most  # as XLA of jaxlib 0.10.2 combines them
    # Gradients, of the two views apart or together; statistics; a few scalars. No image, activation or
    # embedding.
    bound = 4 * (2 * parameters + num_statistics * statistics) + 200
    assert 4 * parameters <= size <= bound


# --- Two processes --------------------------------------------------------------------------------


# `without_kinks` in another process: on one rounding or another, a ReLU is on or off, and after 40 steps
# losses differ by 5e-5.
SMOOTH = """
import runpy, sys
from flax import linen
from jevb_jax.networks import batch_norm as normalization
batch_norm = normalization.batch_norm
def smooth(*arguments):
    *others, relu = arguments
    y, *statistics = batch_norm(*others, False)
    return linen.softplus(y) if relu else y, *statistics
normalization.batch_norm = smooth
linen.relu = linen.softplus
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(
    workdir: Path,
    port: int,
    *,
    count: int = 2,
    script: str = "train.py",
    method: str = "jevb",
    corruptions: tuple[str, ...] = ("contrast",),
) -> list[subprocess.Popen[str]]:
    """Processes of four devices together, of train.py on the smoke config or of evaluate.py."""
    changes = {
        **WITHOUT_COLOUR,
        "method": method,
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.02,
        "evaluation.labels_per_class": 0,
        "ood.corruptions": corruptions,
        "ood.severities": (5,),
    }
    config = [f"--config={ROOT}/configs/smoke.py"]
    config += [f"--config.{name}={value}" for name, value in changes.items()]
    distributed = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={count}"]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(4 // count),
        # Most programs compile in less time than the suite's limit, and here five commands need them.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                SMOOTH,
                str(ROOT / script),
                f"--workdir={workdir}",
                *(config if script == "train.py" else []),
                *([*distributed, f"--process_id={i}"] if count > 1 else []),
                "--heartbeat_timeout_seconds=10",
            ],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out) for process, out in zip(processes, outputs, strict=True)]


def wait_for_step(workdir: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and all(p.poll() is None for p in processes):
        if any(r["step"] >= step for r in MetricsLog.read(workdir / "metrics.jsonl")):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached: {finish(processes)}")


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def saved(workdir: Path) -> tuple[list[int], dict[str, int]]:
    checkpointer = Checkpointer(workdir / "checkpoints")
    steps = checkpointer.steps()
    meta = checkpointer.read_meta(steps[-1])
    checkpointer.close()
    return steps, meta["fingerprint"]


def values(workdir: Path) -> dict[str, float]:
    results = json.loads((workdir / "results.json").read_text())
    return {f"{row['features']} {row['name']}": row["value"] for row in results["trained"]}


@pytest.mark.slow
@pytest.mark.timeout(3000)
# SimSiam compiles in half the time of JEVB.
@pytest.mark.parametrize("method", ["simsiam", nightly("jevb")])
def test_two_processes_train_like_one(tmp_path, method):
    # The reference: four devices of one process.
    one, two = tmp_path / "one", tmp_path / "two"
    ((code, out),) = finish(start(one, 0, count=1, method=method, corruptions=()))
    assert code == 0, out
    # Two processes of two devices, undisturbed: the numbers of one process.
    done = finish(start(two, free_port(), method=method, corruptions=()))
    assert [code for code, _ in done] == [0, 0], done
    assert "Run files" in done[0][1]
    assert "Run files" not in done[1][1]
    logs = [MetricsLog.read(path / "metrics.jsonl") for path in (one, two)]
    assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]]
    losses = [[r["train/loss"] for r in log if "train/loss" in r] for log in logs]
    # SimSiam's loss is a mean of cosines: it is rounded against one and not against its own size.
    absolute, relative = (2e-6, 0.0) if method == "simsiam" else (0.0, 2e-6)
    np.testing.assert_allclose(losses[1], losses[0], rtol=relative, atol=absolute)
    assert values(two).keys() == values(one).keys()


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("method", ["simsiam", "jevb"])
def test_two_processes_evaluate_like_one(tmp_path, method):
    ((code, out),) = finish(start(tmp_path, 0, count=1, method=method))
    assert code == 0, out
    # The numbers of k-NN, probe and detection. They are counts of ranks, which rounding turns where
    # scores are nearly tied: by an image of the 200 at most.
    one_values = values(tmp_path)
    done = finish(start(tmp_path, free_port(), script="evaluate.py"))
    assert [code for code, _ in done] == [0, 0], done
    assert values(tmp_path) == pytest.approx(one_values, rel=0, abs=1.01 / 200)
    turned = [n for n, value in values(tmp_path).items() if value != one_values[n]]
    print(f"{len(turned)} of {len(one_values)} values turned: {turned}")
    assert len(turned) < len(one_values) / 20
    assert not any("accuracy" in name for name in turned)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_two_processes_that_are_stopped_or_killed_go_on_exactly(tmp_path):
    two = tmp_path / "two"
    done = finish(start(two, free_port()))
    assert [code for code, _ in done] == [0, 0], done
    # SIGTERM to one of them: both save the same step and stop; the same commands go on exactly.
    stopped = tmp_path / "stopped"
    processes = start(stopped, free_port())
    wait_for_step(stopped, 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    done = finish(processes)
    assert [code for code, _ in done] == [0, 0], done
    assert "SIGTERM to a process of the run: saved step" in done[0][1]
    # SIGKILL to one: the other ends by itself, within its heartbeat.
    processes = start(stopped, free_port())
    wait_for_step(stopped, saved(stopped)[0][-1] + 2, processes)
    processes[1].send_signal(signal.SIGKILL)
    done = finish(processes)
    assert done[0][0] not in (0, None), done
    assert re.search(r"(?i)heartbeat|unhealthy|disconnect|connection (reset|closed)", done[0][1])
    done = finish(start(stopped, free_port()))
    assert [code for code, _ in done] == [0, 0], done
    assert saved(stopped)[1] == saved(two)[1]
    assert values(stopped) == values(two)

    # A directory in use is refused to every process of a second run.
    with lock_directory(two):
        refused = finish(start(two, free_port()))
    assert [code for code, _ in refused] == [1, 1], refused
    assert "is in use by process" in refused[0][1]
    assert "MainProcessError: process 0 failed" in refused[1][1]
