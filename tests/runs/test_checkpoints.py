import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jevb_jax.runs.checkpoints import (
    CheckpointAccessError,
    Checkpointer,
    CheckpointError,
    CheckpointMismatchError,
    changed_keys,
    config_hash,
    fingerprint,
    saved_steps,
)

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"seed": 0, "train": {"batch_size": 4}}


def state(value: float = 1.0) -> dict:
    return {
        "step": jnp.asarray(3, jnp.int32),
        "params": {"kernel": jnp.full((3, 5), value), "half": jnp.ones(7, jnp.bfloat16)},
    }


def test_fingerprint_sees_every_single_bit():
    clean = np.linspace(-1, 1, 40, dtype=np.float32)
    expected = fingerprint({"x": jnp.asarray(clean)})
    for word in (0, 17, 39):
        for bit in (0, 15, 31):
            changed = clean.copy()
            changed.view(np.uint32)[word] ^= np.uint32(1) << np.uint32(bit)
            assert fingerprint({"x": jnp.asarray(changed)}) != expected
    assert fingerprint({"x": jnp.asarray(clean[::-1].copy())}) != expected


def test_changed_keys_and_hash():
    other = {"seed": 1, "train": {}, "new": 2}
    assert changed_keys(CONFIG, other) == {
        "seed": (0, 1),
        "train.batch_size": (4, "(absent)"),
        "new": ("(absent)", 2),
    }
    assert changed_keys(CONFIG, CONFIG) == {}
    assert config_hash({"b": 1, "a": 2}) == config_hash({"a": 2, "b": 1}) != config_hash(CONFIG)


def test_round_trip_strictness_and_fall_back(tmp_path, caplog):
    checkpointer = Checkpointer(tmp_path, keep_latest=2)
    for step in (1, 2, 3):
        checkpointer.save(step, state(step), config=CONFIG)
    checkpointer.close()
    checkpointer = Checkpointer(tmp_path, keep_latest=2)  # as a later process would
    assert checkpointer.steps() == [2, 3]
    restored = checkpointer.restore(3, state(0))
    np.testing.assert_array_equal(restored["params"]["kernel"], np.full((3, 5), 3.0))
    assert restored["params"]["half"].dtype == jnp.bfloat16
    assert checkpointer.read_meta(3)["config"] == CONFIG

    wrong = state()
    wrong["params"] = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(2)}
    with pytest.raises(CheckpointMismatchError) as error:
        checkpointer.restore_latest(wrong)
    for fragment in ("missing from the checkpoint: params.bias", "params.half", "(3, 5)", "(3, 4)"):
        assert fragment in str(error.value)

    # A flipped byte of the data, which no file format notices in an uncompressed chunk, and a file cut
    # short: each must lead to the checkpoint before.
    files = [path for path in (tmp_path / "3" / "state").rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = checkpointer.restore_latest(state(0))
    assert found is not None
    step, restored = found
    assert step == 2
    np.testing.assert_array_equal(restored["params"]["kernel"], np.full((3, 5), 2.0))
    assert "falling back" in caplog.text
    checkpointer.discard_after(2)
    assert checkpointer.steps() == [2]
    (tmp_path / "2" / "meta" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):
        checkpointer.restore_latest(state(0))
    checkpointer.close()


class StoreError(Exception):
    """As a library of an object store raises."""


class ProtobufError(Exception):
    """As a file is read that is no message."""


StoreError.__module__ = "aiohttp.client_exceptions"
ProtobufError.__module__ = "google.protobuf.message"
OF_ACCESS = (
    ConnectionResetError("the peer closed the connection"),
    PermissionError(13, "Permission denied"),
    TimeoutError("no answer"),
    OSError(5, "Input/output error"),
    MemoryError(),
    StoreError("503, Service Unavailable"),
    ValueError("UNAVAILABLE: CURL error Could not resolve host"),
    ValueError("Error reading from Google Cloud Storage: PERMISSION_DENIED: 403"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 10 bytes"),
)
OF_DAMAGE = (
    FileNotFoundError(2, "No such file or directory"),
    IsADirectoryError(21, "Is a directory"),
    ValueError("NOT_FOUND: Metadata at ... does not exist"),
    ValueError("DATA_LOSS: checksum does not match"),
    ValueError("DATA_LOSS: of the file /runs/ABORTED/state/d/1"),
    ProtobufError("Error parsing message"),
    KeyError("params"),
)


def caused(by: BaseException) -> Exception:
    error = RuntimeError("a part of the checkpoint failed")
    error.__cause__ = by
    return error


@pytest.mark.parametrize("wrap", [lambda error: error, caused], ids=["itself", "as cause"])
def test_what_could_not_be_reached_is_not_damaged(tmp_path, monkeypatch, wrap):
    checkpointer = Checkpointer(tmp_path, keep_latest=2)
    for step in (1, 2):
        checkpointer.save(step, state(step), config=CONFIG)
    checkpointer.wait()
    read = checkpointer._read

    def fail_at_2(error):
        def read_or_fail(step, abstract):
            if step == 2:
                raise wrap(error)
            return read(step, abstract)

        monkeypatch.setattr(checkpointer, "_read", read_or_fail)

    for error in OF_ACCESS:
        fail_at_2(error)
        with pytest.raises(CheckpointAccessError, match="Nothing says that it is damaged"):
            checkpointer.restore_latest(state(0))
    for error in OF_DAMAGE:
        fail_at_2(error)
        found = checkpointer.restore_latest(state(0))
        assert found is not None
        assert found[0] == 1
    checkpointer.close()


def test_restore_refuses_bits_that_changed(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state(), config=CONFIG)
    checkpointer.wait()
    true_meta = checkpointer.read_meta(1)
    true_meta["fingerprint"]["params.kernel"] ^= 1
    monkeypatch.setattr(checkpointer, "read_meta", lambda step: true_meta)
    with pytest.raises(CheckpointError, match=r"damaged.*params\.kernel"):
        checkpointer.restore(1, state())
    checkpointer.close()


def test_a_part_is_read_whatever_the_rest_is(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)
    unknown = {"renamed": (jnp.ones(2), {"by": jnp.zeros((2, 2))})}
    checkpointer.save(1, {**state(2.0), "opt_state": unknown}, config=CONFIG)
    checkpointer.wait()
    params = {"params": state(0.0)["params"]}
    with pytest.raises(
        CheckpointMismatchError, match=r"only in the checkpoint: opt_state\.renamed"
    ):
        checkpointer.restore(1, params)
    found = checkpointer.restore_latest(params, is_whole=False)
    assert found is not None
    step, restored = found
    assert step == 1
    assert restored.keys() == {"params"}
    np.testing.assert_array_equal(restored["params"]["kernel"], np.full((3, 5), 2.0))
    assert restored["params"]["half"].dtype == jnp.bfloat16

    # Of the fields that are asked for, nothing may be missing, extra or of another shape.
    for wrong, message in (
        ({"kernel": jnp.ones((3, 5))}, "only in the checkpoint: params.half"),
        ({**params["params"], "bias": jnp.ones(2)}, "missing from the checkpoint: params.bias"),
        ({**params["params"], "kernel": jnp.ones((5, 3))}, "params.kernel"),
    ):
        with pytest.raises(CheckpointMismatchError, match=message):
            checkpointer.restore(1, {"params": wrong}, is_whole=False)

    # Damage counts where it is read.
    meta = checkpointer.read_meta(1)
    monkeypatch.setattr(checkpointer, "read_meta", lambda step: meta)
    meta["fingerprint"]["step"] ^= 1
    checkpointer.restore(1, params, is_whole=False)
    meta["fingerprint"]["params.half"] ^= 1
    with pytest.raises(CheckpointError, match=r"damaged.*params\.half"):
        checkpointer.restore(1, params, is_whole=False)
    checkpointer.close()


def test_latest_and_best_are_kept(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_latest=1, keep_best=1)
    for step, score in enumerate((0.9, 0.8, 0.1, 0.2)):
        checkpointer.save(step, state(step), config=CONFIG, score=score)
    checkpointer.wait()
    assert checkpointer.steps() == [0, 3]
    assert checkpointer.best_step() == 0
    checkpointer.close()


def test_bad_settings(tmp_path):
    with pytest.raises(ValueError, match="keep_latest"):
        Checkpointer(tmp_path, keep_latest=0)


@pytest.mark.slow
def test_save_on_a_full_disk_is_an_error_that_leaves_what_was_there(tmp_path):
    # A process that may write no file above 4 KiB stands for a full disk.
    code = """
import resource, sys
import jax, numpy as np
from jevb_jax.runs.checkpoints import Checkpointer, CheckpointError

checkpointer = Checkpointer(sys.argv[1])
state = {"w": np.random.default_rng(0).normal(size=100_000)}
checkpointer.save(1, state, config={})
checkpointer.wait()
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
try:
    checkpointer.save(2, state, config={})
    checkpointer.wait()
except CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
again = Checkpointer(sys.argv[1])
print(again.steps(), (again.restore(1, state)["w"] == state["w"]).all())
again.save(2, state, config={})
again.close()
print(again.steps())
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "checkpoints")],
        cwd=ROOT,
        env={**os.environ, "JAX_ENABLE_X64": "true"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    first, *rest = ended.stdout.splitlines()
    assert "could not be saved" in first, ended.stderr
    assert "The checkpoints of steps [1] in" in first
    assert rest == ["[1] True", "[1, 2]"]


def test_steps_that_are_kept_in_any_case(tmp_path):
    assert saved_steps(tmp_path / "checkpoints") == []
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep_latest=1, keep_steps=(2, 7))
    for step in (1, 2, 3, 4):
        checkpointer.save(step, state(step), config=CONFIG)
    checkpointer.close()
    assert saved_steps(tmp_path / "checkpoints") == [2, 4]
