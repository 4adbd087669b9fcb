"""What people are told: their own mistakes in one message, ours with frames, lines without markup."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from rich.console import Console

from configs import smoke
from jevb_jax import arguments, messages
from jevb_jax.command_line import config_files, start
from jevb_jax.evaluation import detection_metrics
from jevb_jax.images import batch_order, random_bits
from jevb_jax.images.source import ArraySource
from jevb_jax.runs import files
from jevb_jax.runs.checkpoints import Checkpointer
from jevb_jax.settings import run_config
from jevb_jax.training import experiment, loop
from jevb_jax.training.loop import RunLoop

ROOT = Path(__file__).resolve().parent.parent


def caught(work: Callable[[], Any]) -> BaseException:
    try:
        work()
    except Exception as error:  # noqa: BLE001
        return error
    raise AssertionError("nothing was raised")


def out_of_memory() -> None:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")


def chained() -> None:
    try:
        raise MemoryError("Unable to allocate 9 GiB")
    except MemoryError as error:
        raise RuntimeError("could not be saved") from error


@pytest.mark.parametrize("work", [out_of_memory, chained, lambda: np.zeros(10**17)])
def test_memory_that_runs_out_says_what_takes_less(work):
    message = messages.for_person(caught(work))
    assert message is not None
    for name in ("train.batch_size", "num_small_crops", "model.width", "evaluation.batch_size"):
        assert name in message
    names = [word for word in message.replace(",", " ").replace("=", " ").split() if "." in word]
    told = [name for name in names if name.split(".")[0] in smoke.get_config()]
    assert set(told) <= set(config_files.settings_of(smoke.get_config()))
    assert len(told) >= 10


@pytest.mark.parametrize(
    "work",
    [
        lambda: files.to_path(""),
        lambda: ArraySource(np.zeros((1, 2, 2, 3))),  # TypeError by name, about the user's images
        lambda: files.read_json(Path("/no/such/file")),
        lambda: __import__("no_such_extra"),
        lambda: run_config.load_config("/no/such/run"),
    ],
)
def test_mistakes_of_people_are_messages(work):
    error = caught(work)
    assert messages.for_person(error) == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "work",
    [
        lambda: files.json_sha256(object()),  # TypeError, of json
        lambda: files.is_remote(5),  # type: ignore[arg-type]  # TypeError, by no statement of ours
        lambda: batch_order.steps_per_epoch("a", 1),  # type: ignore[arg-type]
        lambda: arguments.whole_number(
            "seed", 5.0
        ),  # TypeError by name, of an argument in the code
        lambda: detection_metrics.ood_metrics(np.array(["a"]), np.ones(1)),  # the same
        lambda: random_bits.permutation(-1, 0),  # ValueError, of NumPy
        lambda: jnp.zeros(3) @ jnp.zeros(4),  # TypeError, of JAX
        lambda: {}["a"],
        lambda: 1 / 0,
        lambda: [].index(1),  # ValueError, of this test
    ],
)
def test_faults_of_the_program_keep_their_frames(work):
    assert messages.for_person(caught(work)) is None


def test_a_fault_inside_a_block_that_cleans_up_keeps_its_frames():
    """`finally`, `with` and a bare `raise` pass an error on in the frame of our own code."""
    bodies = {
        "try: len(5)\n  finally: x = 1": None,
        "with contextlib.nullcontext(): len(5)": None,
        "try: len(5)\n  except TypeError: raise": None,
        "with contextlib.suppress(KeyError): int('x')": None,
        "try: raise ValueError('mine')\n  finally: x = 1": "ValueError: mine",
        "with contextlib.nullcontext(): raise ValueError('mine')": "ValueError: mine",
        "raise TypeError('mine')": None,
    }
    for body, told in bodies.items():
        own: dict[str, Any] = {"__name__": "jevb_jax.module", "contextlib": contextlib}
        exec(f"def work():\n  {body}\n", own)
        assert messages.for_person(caught(own["work"])) == told, body


def test_nothing_in_a_path_is_markup_and_checkpoints_are_found_under_any_name(tmp_path):
    directory = tmp_path / "sweep[lr=0.1] [bold]*?:key:"
    out = io.StringIO()
    messages.say(Console(file=out, width=20), f"Run files: {directory}")
    assert out.getvalue() == f"Run files: {directory}\n"
    state = {"a": jnp.arange(3.0)}
    for _ in range(2):  # saved, and found by another
        checkpointer = Checkpointer(directory / "checkpoints")
        checkpointer.save(1, state, config={})
        checkpointer.wait()
        restored: Any = checkpointer.restore_latest(state)
        checkpointer.close()
        assert restored[0] == 1
        np.testing.assert_array_equal(restored[1]["a"], [0, 1, 2])
    assert (directory / "checkpoints" / "1").is_dir()


@pytest.mark.parametrize(("every", "logged"), [(0, [4]), (1, [1, 2, 3, 4]), (3, [3, 4])])
def test_steps_that_are_logged(every, logged):
    run: Any = SimpleNamespace(
        plan=SimpleNamespace(num_steps=4, log_every_steps=every),
        learning_rate=lambda step: 0.1 * step,
        log=Mock(),
    )
    dispatch = loop._Dispatch(0, 4, {"loss": jnp.arange(4.0)}, jnp.asarray(True))
    RunLoop.record(run, dispatch, SimpleNamespace(step=4))  # type: ignore[arg-type]
    assert [call.args[0] for call in run.log.write.call_args_list] == logged
    rates = [call.args[1]["train/learning_rate"] for call in run.log.write.call_args_list]
    assert rates == [pytest.approx(0.1 * (step - 1)) for step in logged]


# --- The command line -----------------------------------------------------------------------------


def test_saved_config_is_given_back_with_overrides_on_top(tmp_path):
    config: Any = smoke.get_config()
    config.jevb.df = float("inf")
    config.ood.outside = ({"name": "NaN", "group": "far", "source": "arrays", "protocol": ""},)
    path = tmp_path / "config.json"
    files.write_json_atomically(path, experiment.to_json_values(config))
    for argv in (["x", f"--config={path}", "--a"], ["x", "--config", str(path), "--a"]):
        made = start._with_files(argv, "config")
        assert made[-1] == "--a"
        given = start._value(made, "config") or ""
        assert given == f"{ROOT}/configs/saved.py:{path}"
        loaded = config_files.load("config", given)
        assert loaded.to_dict() == config.to_dict()
        assert loaded.jevb.df == float("inf")
        loaded.seed = 5  # not locked: overrides change it
    path.write_text(json.dumps(experiment.to_json_values(config)))  # as before, with bare Infinity
    assert "Infinity," in path.read_text()
    assert run_config.read_config(path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no_such.py", "there is none at 'no_such.py'"),
        ("", "there is none at ''"),
        ("no_such", "those of the package are adjacent, cifar10, continued, default,"),
        ("{tmp}/digits.py", "the package has one: --config=digits"),
        ("smoke:byol", "takes no argument 'byol'"),
        ("cifar10:moco", "must be one of"),
        ("{tmp}", "the config of that run is {tmp}/config.json"),
        ("{tmp}/config.json", "is not JSON, or damaged"),
        ("{tmp}/other.json", "holds no config of a run"),
        ("{root}/configs/smoke.py:byol", "takes no argument 'byol'"),
        ("{root}/configs/cifar10.py:moco", "must be one of"),
        ("{root}/configs/recipes.py", "no get_config"),
        ("{tmp}/empty.py", "returns nothing"),
    ],
)
def test_configs_that_cannot_be_read_are_one_message(tmp_path, given, message):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "empty.py").write_text("def get_config(): pass")
    places = {"tmp": tmp_path, "root": ROOT}
    argv = start._with_files(["x", f"--config={given.format(**places)}"], "config")
    with pytest.raises(config_files.ConfigFileError) as error:
        config_files.load("config", start._value(argv, "config") or "")
    assert message.format(**places) in str(error.value)
    assert "Traceback" not in str(error.value)


def test_names_of_configs_of_the_package_and_files_that_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, method in (("digits", "jevb"), ("cifar10:byol", "byol")):
        file, _, argument = given.partition(":")
        expected = f"{ROOT}/configs/{file}.py" + (f":{argument}" if argument else "")
        assert start._with_files(["x", f"--config={given}"], "config")[1:] == [
            f"--config={expected}"
        ]
        assert start._with_files(["x", "--config", given], "config")[-1] == expected
        assert config_files.load("config", expected).method == method
    (tmp_path / "digits").mkdir()  # a run of that name is no file
    assert config_files.file_of("digits") == f"{ROOT}/configs/digits.py"
    (tmp_path / "smoke").write_text("")
    for given in ("smoke", "configs/smoke.py", "x.py:digits", "recipes", "digits.py", "../digits"):
        assert config_files.file_of(given) == given


def test_a_fault_in_a_config_file_is_not_hidden(tmp_path):
    (tmp_path / "bad.py").write_text("def get_config():\n    return {}['method']\n")
    with pytest.raises(KeyError):
        config_files.load("config", str(tmp_path / "bad.py"))


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.batchsize=3", "did you mean --config.train.batch_size"),
        ("batch_size=3", "train.batch_size"),
        ("optimiser.learning_rate=1", "--config.optimizer.learning_rate"),
        ("zzzz=3", "no such setting"),
    ],
)
def test_misspelt_settings_name_what_is_meant(override, meant):
    with pytest.raises(flags.Error) as error:
        start._check_overrides(["x", f"--config.{override}"], "config", smoke.get_config())
    assert meant in str(error.value)
    fine = ["x", "--config.train.batch_size=3", "--noconfig.train.health_pairs", "--configure=1"]
    start._check_overrides(fine, "config", smoke.get_config())


def test_a_missing_flag_is_named(monkeypatch, capsys):
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Directory.", flag_values=values, required=True)
    monkeypatch.setattr(start.flags, "FLAGS", values)
    with pytest.raises(SystemExit, match="2"):
        start.parse_flags(["train.py"])
    assert capsys.readouterr().err == "--workdir is missing.\n--help shows the flags.\n"


@pytest.mark.slow
def test_usage_errors_end_with_status_two_and_no_frames(tmp_path):
    files.write_json_atomically(
        tmp_path / "config.json", experiment.to_json_values(smoke.get_config())
    )
    wrong = "--config.train.batch_size=many"
    ended = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), f"--config={tmp_path / 'config.json'}",
         f"--workdir={tmp_path / 'run'}", wrong],
        capture_output=True, text=True, check=False, env=dict(os.environ), cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "train.batch_size" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) < 6
    assert not (tmp_path / "run").exists()


def test_a_warning_of_a_script_is_one_line():
    told = start._one_line("few images", UserWarning, "train.py", 18)
    assert told == "UserWarning: few images\n"
