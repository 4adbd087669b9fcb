"""Runs and data under gs://, with a directory in the place of the bucket.

The stand-in is a file system of fsspec, which etils.epath opens as it opens gcsfs; like a bucket it
refuses to append. Checkpoints go to the directory directly: TensorStore reaches buckets by itself.
"""

import json
import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from configs import smoke
from jevb_jax import commands
from jevb_jax.images import arrays
from jevb_jax.images.image_files import FolderSource
from jevb_jax.runs import files
from jevb_jax.runs.checkpoints import Checkpointer
from jevb_jax.runs.files import DirectoryInUseError
from jevb_jax.runs.metrics_log import MetricsLog
from jevb_jax.settings import run_config
from jevb_jax.training import loop
from jevb_jax.training.loop import RunLoop


class Bucket(DirFileSystem):
    """A directory, the present test's, as gs:// shows it."""

    protocol = "gcs"
    directory = ""  # etils keeps one instance for all tests

    def __init__(self, **_: Any):
        super().__init__("/", LocalFileSystem(auto_mkdir=True))

    @property
    def path(self) -> str:
        return Bucket.directory

    @path.setter
    def path(self, value: str) -> None:
        del value

    def _join(self, path: Any) -> Any:
        return super()._join(self._strip_protocol(path))

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return path.removeprefix("gs://").strip("/")

    def open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        if "a" in mode:
            raise ValueError("objects of a bucket cannot be appended to")
        return super().open(path, mode, *args, **kwargs)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that gs:// shows."""
    monkeypatch.setenv("EPATH_USE_TF", "false")
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    monkeypatch.setattr(Bucket, "directory", str(tmp_path / "bucket"))
    return tmp_path / "bucket"


def test_paths_are_local_or_urls(bucket):
    assert files.to_path("a/b") == Path.cwd() / "a" / "b"
    assert not files.is_remote(files.to_path("/a"))
    path = files.to_path("gs://x/runs") / "a.json"
    assert files.is_remote(path)
    assert os.fspath(path) == "gs://x/runs/a.json"
    files.write_json_atomically(path, {"x": 1})
    assert json.loads((bucket / "x/runs/a.json").read_text()) == {"x": 1}
    assert json.loads(path.read_text()) == {"x": 1}


def test_last_to_come_holds_a_bucket(bucket):
    path = files.to_path("gs://x/runs")
    with files.lock_directory(path) as check_first:
        check_first()
        with files.lock_directory(path) as check_second:
            check_second()
            with pytest.raises(DirectoryInUseError, match="was taken over by process"):
                check_first()


def test_log_of_a_bucket_is_written_as_a_whole(bucket):
    workdir = files.to_path("gs://x/run")
    log = MetricsLog(workdir)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log.flush()
    again = MetricsLog(workdir)
    again.truncate_after(2)
    again.write(3, {"loss": 9.0})
    again.close()
    records = MetricsLog.read(workdir / "metrics.jsonl")
    assert [record["loss"] for record in records] == [1.0, 2.0, 9.0]
    assert [path.name for path in (bucket / "x" / "run").iterdir()] == ["metrics.jsonl"]


def test_arrays_of_a_bucket_are_read_and_folders_refused(bucket):
    (bucket / "x").mkdir(parents=True)
    images = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8, 1)
    np.savez(bucket / "x" / "a.npz", images=images, labels=np.arange(2))
    source = arrays.arrays("gs://x/a.npz")
    np.testing.assert_array_equal(source[1], images[1])
    with pytest.raises(FileNotFoundError, match=r"gs://x/b\.npz"):
        arrays.arrays("gs://x/b.npz")
    with pytest.raises(ValueError, match=r"gs://x/images is an object store\. Use a TFDS"):
        FolderSource("gs://x/images")


@pytest.mark.slow
@pytest.mark.nightly
def test_run_in_a_bucket_stops_and_goes_on(bucket, monkeypatch):
    def local_checkpointer(directory: Any, **keywords: Any) -> Checkpointer:
        return Checkpointer(bucket / os.fspath(directory).removeprefix("gs://"), **keywords)

    for module in (commands, loop):
        monkeypatch.setattr(module, "Checkpointer", local_checkpointer)
    config: Any = smoke.get_config()
    config.method = "simsiam"  # compiles in less than half the time of JEVB
    config.augmentation.jitter_probability = 0.0  # takes long to compile
    config.augmentation.grayscale_probability = 0.0
    config.ood.corruptions = ("contrast",)
    config.evaluation.labels_per_class = 0
    assert commands.train(config, "gs://x/whole")
    # Another run takes the directory over: the first writes no more.
    original, calls = RunLoop.save, []

    def take_over(self: Any, state: Any) -> None:
        calls.append(int(state.step))
        if len(calls) == 2:
            files.write_text_atomically(self.workdir / ".lock", "process 7 elsewhere")
        original(self, state)

    monkeypatch.setattr(RunLoop, "save", take_over)
    with pytest.raises(DirectoryInUseError, match="process 7 elsewhere"):
        commands.train(config, "gs://x/cut")
    assert commands.train(config, "gs://x/cut")
    whole, cut = (bucket / "x" / name for name in ("whole", "cut"))
    assert (whole / "metrics.jsonl").read_text() == (cut / "metrics.jsonl").read_text()
    assert json.loads((whole / "results.json").read_text()) == json.loads(
        (cut / "results.json").read_text()
    )
    expected = {"views.png", "curves.png", "report.html", "results.csv", "config.json"}
    assert expected <= {path.name for path in cut.iterdir()}
    commands.evaluate(run_config.load_config("gs://x/cut"), "gs://x/cut", step=None)
