"""Processes that read ahead: they start or say why, and they end."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jevb_jax import commands, finetuning
from jevb_jax.images import batches, workers
from jevb_jax.images.source import ArraySource
from jevb_jax.images.workers import Carried, ReadAhead, WorkerError

ROOT = Path(__file__).resolve().parents[2]


def test_a_carried_function_is_a_short_message_whatever_it_holds():
    images = np.arange(10**6)
    carried = Carried(lambda row: int(images[row]))  # not by name, as in a notebook
    message = pickle.dumps(carried)
    assert len(message) < 4096  # a pipe takes 65,536 bytes that nobody reads
    assert pickle.loads(message)(777) == 777
    carried.remove()
    with pytest.raises(FileNotFoundError):
        pickle.loads(message)(777)
    assert carried(5) == 5
    with pytest.raises(TypeError, match="pickle"):
        Carried((i for i in range(3)).__next__)  # pyright: ignore[reportArgumentType]


class Pipeline:
    """What `ReadAhead` takes of a Grain iterator."""

    def __init__(self, *items: object):
        self.items = list(items)
        self.num_closed = 0

    def __next__(self) -> object:
        if not self.items:
            raise StopIteration
        item = self.items.pop(0)
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        self.num_closed += 1


def test_a_worker_that_ended_is_named_and_other_errors_are_themselves():
    died = "Worker process was terminated unexpectedly with exit code 1. Search the logs above."
    pipeline = Pipeline(1, RuntimeError(died), 2)
    stream = ReadAhead(pipeline, 3)
    assert next(stream) == 1
    with pytest.raises(WorkerError, match=r"3 worker processes .* exit code 1\b.*__main__"):
        next(stream)
    assert list(stream) == []  # closed
    pipeline = Pipeline(RuntimeError("of reading"), 2)
    stream = ReadAhead(pipeline, 1)
    with pytest.raises(RuntimeError, match=r"^of reading$"):
        next(stream)
    assert list(stream) == [2]
    stream.close()
    assert pipeline.num_closed == 1


class Interrupted(Exception):  # noqa: N818 - what a signal's handler raises
    pass


def test_an_interrupted_item_is_the_next_calls():
    came = threading.Event()

    class Slow(Pipeline):
        def __next__(self) -> object:
            came.wait(60)
            return super().__next__()

    def interrupt(*_: object) -> None:
        raise Interrupted

    carried = Carried(str)
    pipeline = Slow(1, 2)
    stream = ReadAhead(pipeline, 1, carried)  # pyright: ignore[reportArgumentType]
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Interrupted):
            next(stream)
    finally:
        signal.signal(signal.SIGALRM, before)
    came.set()
    assert list(stream) == [1, 2]
    assert pipeline.num_closed == 1


NOTHING: Any = None  # never looked at
DOORS: dict[str, Callable[[Path], object]] = {
    "train": lambda path: commands.train(NOTHING, path),
    "evaluate": lambda path: commands.evaluate(NOTHING, path, step=None),
    "evaluate_on": lambda path: commands.evaluate_on(NOTHING, NOTHING, path, step=None),
    "finetune": lambda path: finetuning.finetune(NOTHING, path),
    "stream": lambda _: batches.stream_batches(
        ArraySource(np.zeros((8, 4, 4, 1), np.uint8)),
        start_step=0,
        num_steps=1,
        batch_size=8,
        seed=0,
    ),
}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_work_that_a_starting_worker_repeats_is_refused(tmp_path, monkeypatch, door):
    workers.check_not_starting()
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(WorkerError, match="has no guard: put what the script does under"):
        door(tmp_path)
    assert not list(tmp_path.iterdir())


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
import numpy as np
from jevb_jax.images.batches import stream_batches
from jevb_jax.images.source import ArraySource
def work():
    source = ArraySource(np.zeros((400, 16, 16, 3), np.uint8))  # more than a pipe holds
    stream = stream_batches(
        source, start_step=0, num_steps=10**6, batch_size=8, seed=0, num_workers=2
    )
    for _ in range(4):
        print(next(stream).shape, flush=True)
    time.sleep(300)
{end}
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_script_without_a_guard_fails_and_one_with_it_leaves_no_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), end="work()"))
    ended = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    last = ended.stderr.strip().splitlines()[-1]
    assert "WorkerError: one of the 2 worker processes of input.num_workers ended" in last
    assert "WorkerError: this is a worker process that runs the script again" in ended.stderr

    script.write_text(SCRIPT.format(root=str(ROOT), end="if __name__ == '__main__':\n    work()"))
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        readers = wait_for_readers(process.pid)
        for pid in readers:  # as a terminal sends it to all of them; they have hardly begun
            os.kill(pid, signal.SIGINT)
        assert [process.stdout.readline() for _ in range(4)] == ["(8, 16, 16, 3)\n"] * 4
        assert wait_for_readers(process.pid) == readers
        process.kill()  # the parent cannot tell them
    deadline = time.monotonic() + 60
    while any("spawn_main" in command_of(pid) for pid in readers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


STUCK = """
import sys, time
sys.path.insert(0, {root!r})
import numpy as np
from jevb_jax import parallel
from jevb_jax.images.batches import stream_batches
from jevb_jax.images.source import ArraySource
class Stuck(ArraySource):
    def __getitem__(self, index):
        time.sleep(1e6)  # a file system that does not answer
if __name__ == "__main__":
    source = Stuck(np.zeros((16, 4, 4, 3), np.uint8))
    stream = stream_batches(
        source, start_step=0, num_steps=9, batch_size=8, seed=0, num_workers=2
    )
    try:
        with parallel.StopRequest() as stop, stop.interrupting():
            next(stream)
    except parallel.StoppedError as error:
        print(error, flush=True)
        stream.close()
        print("closed")
"""


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_workers_that_do_not_answer_are_ended(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(STUCK.format(root=str(ROOT)))
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True
    ) as process:
        readers = wait_for_readers(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=120)[0].splitlines()[1:] == ["closed"]
        assert process.returncode == 0
    assert not any("spawn" in command_of(pid) for pid in readers)


def wait_for_readers(pid: int) -> list[int]:
    """The two workers of a process, as soon as they are there."""
    deadline = time.monotonic() + 120
    readers: list[int] = []
    while len(readers) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        # They are children of the thread that started them.
        threads = Path(f"/proc/{pid}/task").glob("*/children")
        listed = " ".join(path.read_text() for path in threads).split()
        readers = [child for child in map(int, listed) if "spawn_main" in command_of(child)]
    return readers


def command_of(pid: int) -> str:
    """The command line of a process, or nothing."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


OWN_FLAGS = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
from absl import flags
from jevb_jax.images.batches import stream_batches
from jevb_jax.images.source import ArraySource

flags.DEFINE_integer("own", 3, "")

if __name__ == "__main__":
    source = ArraySource(np.zeros((16, 4, 4, 3), np.uint8))
    stream = stream_batches(
        source, start_step=0, num_steps=2, batch_size=8, seed=0, num_workers=1
    )
    print(len(list(stream)))
    try:
        print(flags.FLAGS.own)
    except flags.UnparsedFlagAccessError:
        print("refused")
"""


@pytest.mark.slow
def test_workers_leave_the_flags_of_a_program_that_parsed_none(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(OWN_FLAGS.format(root=str(ROOT)))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.stdout.split() == ["2", "refused"], done.stderr
