"""What runs a study: children that are stubs, and (slow) the real thing."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from rich.console import Console

from configs import smoke
from jevb_jax import commands
from jevb_jax.runs import files
from jevb_jax.runs.checkpoints import config_hash
from jevb_jax.runs.files import DirectoryInUseError
from jevb_jax.training.resume import ChangedConfigError
from jevb_study import run
from jevb_study.evidence import read_run
from jevb_study.spec import Study
from tests.jevb_study.fabricated import ENVIRONMENT, MEASURES, config, directory, fabricate, rows

ROOT = Path(__file__).resolve().parents[2]

# What a child does, without JAX: it finishes, is not finite, breaks, or waits until it is to stop.
CHILD = f"""
import hashlib, json, os, signal, sys, time
from pathlib import Path
where = Path(sys.argv[1]); name = where.parent.name; seed = int(where.name[5:])
with (where.parent.parent.parent / "order.txt").open("a") as file: file.write(f"{{name}} {{seed}}\\n")
keys = ("JEVB_JAX_COMPILE_CACHE", "XLA_PYTHON_CLIENT_MEM_FRACTION")
seen = {{key: os.environ.get(key) for key in keys}} | {{"cores": sorted(os.sched_getaffinity(0))}}
(where / "seen.json").write_text(json.dumps(seen))
asked = json.loads((where / "asked_config.json").read_text())
(where / "config.json").write_text(json.dumps(asked))
(where / "environment.json").write_text(json.dumps({ENVIRONMENT!r}))
if name == "nan":
    canonical = json.dumps(asked, sort_keys=True, separators=(",", ":"))
    failure = dict(error="NonFiniteError", message="", step=3,
        config_hash=hashlib.sha256(canonical.encode()).hexdigest())
    (where / "failure.json").write_text(json.dumps(failure)); sys.exit(1)
if name == "crash": print("last words", flush=True); os.kill(os.getpid(), signal.SIGKILL)
if name == "bug": raise TypeError("no such argument")
if name in ("slow", "stubborn"):
    (where / "pid").write_text(str(os.getpid())); (where / "ready").touch()
    os.read(0, 1); (where / "told").touch()
    if name == "slow": sys.exit(9)  # it stumbles on its way out, which is nothing of the run's
    time.sleep(600)
results = dict(trained=[dict(name="linear_accuracy", features="representation", value=0.5 + seed,
    protocol="p")], step=1)
time.sleep(0.2)
(where / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def stubbed(monkeypatch):
    def command(directory: Path) -> list[str]:
        return [sys.executable, "-S", "-c", CHILD, str(directory)]

    monkeypatch.setattr(run, "_command", command)
    monkeypatch.delenv("JEVB_JAX_COMPILE_CACHE", raising=False)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)


def tiny(*names: str, seeds: tuple[int, ...] = (0, 1)) -> Study:
    runs = {name: config(name=name) for name in names}
    return Study("Tiny", runs, seeds, MEASURES[:1])


def execute(made: Study, out: Path, **settings: Any) -> tuple[int, str]:
    text = io.StringIO()
    console = Console(file=text, width=80)
    status = run.run_study(made, out, command="the command", console=console, **settings)
    return status, text.getvalue()


def started(out: Path) -> list[str]:
    path = out / "order.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def contents(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (out / "runs").rglob("*") if path.is_file()}


def test_every_run_once_and_failures_do_not_stop_the_rest(tmp_path, stubbed):
    made = tiny("a", "nan", "b")
    status, text = execute(made, tmp_path)
    assert status == 0  # not finite: a result
    assert started(tmp_path) == [f"{n} {s}" for s in (0, 1) for n in ("a", "nan", "b")]
    assert "6 runs, 0 done before, 6 to do." in text
    assert "[1/6] a, seed 0, 0.0 min, 5 remain: finished" in text
    assert "[2/6] nan, seed 0, 0.0 min, 4 remain: FAILED, NonFiniteError at step 3; see " in text
    table = rows(tmp_path)
    assert table["a"] == ["2 of 2", "1.0000 ± 0.7071"]
    assert table["nan"] == ["0 of 2; 2 failed: NonFiniteError at step 3, 3", "-"]
    seen = json.loads((directory(tmp_path, "a", 0) / "seen.json").read_text())
    assert seen["JEVB_JAX_COMPILE_CACHE"] == str(tmp_path / "compile_cache")
    assert seen["XLA_PYTHON_CLIENT_MEM_FRACTION"] is None

    before = contents(tmp_path)
    status, text = execute(made, tmp_path)
    assert (status, started(tmp_path)) == (0, [])
    assert "6 done before, 0 to do." in text
    assert contents(tmp_path) == before


def test_a_run_that_broke_is_shown_not_recorded_and_tried_again(tmp_path, stubbed):
    made = tiny("bug", "crash", "a", seeds=(0,))
    for _ in range(2):
        status, text = execute(made, tmp_path)
        assert status == 1
        assert "remain: unfinished at step 0, BROKEN, exit status 1; the same command" in text
        assert text.count("Traceback (most recent call last):") == 1  # of this attempt alone
        assert "TypeError: no such argument" in text
        assert "unfinished at step 0, BROKEN, SIGKILL" in text
        assert "last words" in text
        assert rows(tmp_path)["bug"] == ["0 of 1; seed 0 unfinished at step 0", "-"]
        assert not list(tmp_path.rglob("failure.json"))
    assert started(tmp_path) == ["bug 0", "crash 0", "a 0", "bug 0", "crash 0"]


def test_a_directory_in_use_is_skipped_and_nothing_changes_there(tmp_path, stubbed):
    made = tiny("a", "b", seeds=(0,))
    used = fabricate(tmp_path, made, "a", 0, failed_at=3)
    failure = json.loads((used / "failure.json").read_text()) | {"config_hash": "another"}
    (used / "failure.json").write_text(json.dumps(failure))  # so it would be tried again
    with files.lock_directory(used):
        before = contents(used.parent.parent.parent)
        status, text = execute(made, tmp_path)
        after = contents(tmp_path)
    assert status == 1
    assert "a, seed 0, 0.0 min, 1 remain: skipped: " in text
    assert "in use by process" in text
    assert started(tmp_path) == ["b 0"]
    assert {path: after[path] for path in before} == before


def test_failures_of_other_kinds_that_older_studies_recorded_are_tried_again(tmp_path, stubbed):
    made = tiny("a", seeds=(0,))
    failed = fabricate(tmp_path, made, "a", 0, failed_at=3)
    assert execute(made, tmp_path)[0] == 0
    assert started(tmp_path) == []
    failure = json.loads((failed / "failure.json").read_text()) | {"error": "OutOfMemory"}
    (failed / "failure.json").write_text(json.dumps(failure))
    assert execute(made, tmp_path)[0] == 0
    assert started(tmp_path) == ["a 0"]
    assert not (failed / "failure.json").exists()


def test_changed_configs_are_refused_by_name_and_nothing_runs(tmp_path, stubbed):
    made = tiny("a")
    fabricate(tmp_path, made, "a", 0, accuracy=0.1)
    fabricate(tmp_path, made, "a", 1, failed_at=3)
    other = Study("Other", {"a": config(name="a", df=3.0), "b": config()}, (0, 1), made.measures)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    with pytest.raises(ChangedConfigError, match=r"seed_0, df: the run has 5.0, got 3.0"):
        execute(other, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before
    assert started(tmp_path) == []
    # A report is still made of them, and says so.
    run.write_report(other, tmp_path, command="")
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


@pytest.mark.parametrize(
    ("section", "changes", "kept"),
    [
        ("evaluation", {"k": (3,)}, "results_*.json"),
        ("ood", {"knn_k": (3,)}, "results_*.json"),
        ("train", {"num_epochs": 99, "extend": True}, "results_step_30.json"),
    ],
)
def test_older_results_are_kept_and_never_pass_for_those_asked_for(
    tmp_path, stubbed, section, changes, kept
):
    made = Study("Before", {"bug": smoke.get_config()}, (0,), MEASURES[:1])
    where = fabricate(tmp_path, made, "bug", 0, accuracy=0.1)
    old = (where / "results.json").read_bytes()
    other = smoke.get_config()
    other.update({section: changes})
    assert execute(Study("After", {"bug": other}, (0,), MEASURES[:1]), tmp_path)[0] == 1
    assert rows(tmp_path)["bug"] == ["0 of 1; seed 0 unfinished at step 0", "-"]
    assert [path.read_bytes() for path in where.glob(kept)] == [old]


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


@pytest.fixture
def interruptible():
    """Ctrl-C as a terminal has it: the workers of pytest-xdist ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_once_there_is(*paths: Path) -> None:
    def send() -> None:
        for path in paths:
            while not path.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_the_children_and_says_how_to_go_on(tmp_path, stubbed):
    where = directory(tmp_path, "slow", 0)
    interrupt_once_there_is(where / "ready")
    status, text = execute(tiny("a", "slow", "b"), tmp_path)
    assert status == 130
    assert (where / "told").exists()
    assert "4 remain: unfinished at step 0, stopped; the same command goes on" in text
    assert "Stopped. The same command goes on from there:\nthe command" in text
    assert started(tmp_path) == ["a 0", "slow 0"]
    assert rows(tmp_path)["slow"][0].startswith("0 of 2; seed 0 unfinished at step 0")


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_ends_the_study_and_its_children_at_once(tmp_path, stubbed):
    where = directory(tmp_path, "stubborn", 0)
    interrupt_once_there_is(where / "ready", where / "told")
    with pytest.raises(KeyboardInterrupt):
        execute(tiny("stubborn"), tmp_path)
    assert not is_running(int((where / "pid").read_text()))
    assert not (where / "failure.json").exists()
    with files.lock_directory(tmp_path):
        pass


def test_two_studies_in_one_directory(tmp_path, stubbed):
    with (
        files.lock_directory(tmp_path),
        pytest.raises(DirectoryInUseError, match="in use by process"),
    ):
        execute(tiny("a"), tmp_path)


def test_training_in_a_directory_in_use_is_refused_and_changes_nothing(tmp_path):
    with (
        files.lock_directory(tmp_path),
        pytest.raises(DirectoryInUseError, match="in use by process"),
    ):
        commands.train(smoke.get_config(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_command_line(tmp_path, capsys):
    path = tmp_path / "mine.py"
    text = (
        "from configs import smoke\nfrom jevb_study.spec import Logged, Study\n"
        "def get_study():\n"
        "    return Study('Mine', {'a': smoke.get_config()}, (0,), (Logged('m', 'k'),))\n"
    )
    path.write_text(text)
    flags = [str(path), f"--out={tmp_path}", "--report_only"]
    assert run.main(flags) == 0
    assert capsys.readouterr().out == f"Report: {tmp_path / 'table.md'}\n"
    assert rows(tmp_path)["a"] == ["0 of 1; seed 0 not started", "-"]
    command = f"jevb-study {path} --out={tmp_path} --report_only"
    assert command in (tmp_path / "table.md").read_text()
    with pytest.raises(SystemExit, match="no does not exist"):
        run.main([str(path), f"--out={tmp_path}/no", "--report_only"])
    with pytest.raises(SystemExit, match=r"FileNotFoundError.*no\.py"):
        run.main([f"{tmp_path}/no.py", f"--out={tmp_path}"])
    path.write_text(text.replace("smoke.get_config()", "smoke.get_config(1)"))
    with pytest.raises(TypeError, match="get_config"):  # a fault of the file: its frames are shown
        run.main(flags)
    path.write_text("x = 1")
    with pytest.raises(SystemExit, match=r"must define get_study\(\)"):
        run.main(flags)
    with pytest.raises(SystemExit, match="2"):
        run.main([*flags, "--num_processes=0"])
    assert "--num_processes must be at least 1, got 0" in capsys.readouterr().err


def test_the_command_stops_in_order_whatever_its_entry_point_set(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        monkeypatch.setattr(run, "main", lambda _: 0)
        assert run.start() == 0
        assert {signal.getsignal(number) for number in before} == {signal.default_int_handler}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_second_ctrl_c_is_told_without_frames(monkeypatch, capsys):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        monkeypatch.setattr(run, "main", Mock(side_effect=KeyboardInterrupt))
        assert run.start() == 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    said = "Stopped at once. The same command goes on; each run from its last saved step."
    assert capsys.readouterr().err == f"{said}\n"


def test_command_line_for_a_part_of_a_study(tmp_path, stubbed, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import smoke\nfrom jevb_study.spec import Logged, Study\n"
        "def get_study():\n"
        "    runs = {'a': smoke.get_config(), 'b': smoke.get_config()}\n"
        "    runs['b'].jevb.df = 3.0\n"
        "    return Study('Mine', runs, (0, 1), (Logged('m', 'k'),))\n"
    )
    out = tmp_path / "out"
    assert run.main([str(path), f"--out={out}", "--runs=b", "--seeds=1"]) == 0
    assert [found.parent.name for found in out.glob("runs/*/*")] == ["b"]
    assert rows(out).keys() == {"run", "b"}
    assert "--runs=b --seeds=1" in (out / "table.md").read_text()
    capsys.readouterr()
    assert run.main([str(path), f"--out={out}", "--report_only"]) == 0
    assert "No finished run has k" in capsys.readouterr().out
    assert run.main([str(path), f"--out={out}"]) == 0
    assert rows(out).keys() == {"run", "a", "b"}
    with pytest.raises(SystemExit, match=r"study's runs.*'b'\], got \['c'\]"):
        run.main([str(path), f"--out={out}", "--runs=c"])


def test_settings_that_a_run_refuses_are_refused_before_any_runs(tmp_path, stubbed):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import smoke\nfrom jevb_study.spec import Logged, Study\n"
        "def get_study():\n"
        "    bad = smoke.get_config()\n"
        "    bad.train.num_epochs = -1\n"
        "    runs = {'good': smoke.get_config(), 'bad': bad}\n"
        "    return Study('Mine', runs, (0,), (Logged('m', 'k'),))\n"
    )
    with pytest.raises(SystemExit, match=r"run bad: .*train\.num_epochs"):
        run.main([str(path), f"--out={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


def is_running(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"


def wait_until(condition: Any, *, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


STUDY = """
from configs import smoke
from jevb_study.spec import Comparison, Curves, Logged, Result, Study

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
@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_killed_and_stopped_study_goes_on_and_agrees_with_single_runs(tmp_path):
    file, out = tmp_path / "mine.py", tmp_path / "out"
    file.write_text(STUDY)
    settings: Any = {"env": {**os.environ, "JAX_PLATFORMS": "cpu"}, "cwd": ROOT}
    command = [sys.executable, "-m", "jevb_study", str(file), f"--out={out}"]
    killed, stopped = directory(out, "a", 0), directory(out, "b", 0)
    for number, where in ((signal.SIGKILL, killed), (signal.SIGTERM, stopped)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **settings) as process:
            saved = where / "checkpoints" / "5"
            wait_until(lambda: saved.exists() or process.poll() is not None)  # noqa: B023
            assert process.poll() is None
            process.send_signal(number)
            said = process.communicate()[0]
        child = int((where / ".lock").read_text().split()[1])
        wait_until(lambda: not is_running(child))  # noqa: B023
        assert not (where / "results.json").exists()
    assert process.returncode == 130
    assert "b, seed 0" in said
    assert "The same command goes on from there:" in said
    before = contents(killed)

    again = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, **settings
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "3 runs, 1 done before, 2 to do." in again.stdout
    assert "FAILED, NonFiniteError at step" in again.stdout
    assert contents(killed) == before
    assert "Resuming" in (killed / "log.txt").read_text()
    assert "Resuming" in (stopped / "log.txt").read_text()
    table = rows(out)
    assert table["a"][0] == table["b"][0] == "1 of 1"
    assert table["diverges"][0].startswith("0 of 1; 1 failed: NonFiniteError at step")
    assert {"all.png", "loss.png", "table.csv"} <= {path.name for path in out.iterdir()}
    diverged = read_run(directory(out, "diverges", 0))
    assert diverged.failure is not None
    assert diverged.failure["config_hash"] == config_hash(diverged.config or {})

    code = (
        "import sys; from jevb_jax import commands; from jevb_study.spec import load_study; "
        "commands.train(load_study(sys.argv[1]).runs['b'], sys.argv[2])"
    )
    alone = tmp_path / "alone"
    single = [sys.executable, "-c", code, str(file), str(alone)]
    subprocess.run(single, check=True, timeout=300, **settings)
    for name in ("results.json", "metrics.jsonl", "config.json"):
        assert (alone / name).read_text() == (stopped / name).read_text(), name
