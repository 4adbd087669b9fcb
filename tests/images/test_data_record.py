"""What a run remembers of its data: which changes are seen, which are not, and what is refused."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs import smoke
from jevb_jax import commands
from jevb_jax.images import data_record
from jevb_jax.images.data_record import ChangedDataError, changes, fingerprint
from jevb_jax.images.dataset import Dataset, load_dataset
from jevb_jax.images.image_files import FolderSource
from jevb_jax.model import Model

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
LABELS = np.arange(40) % 4


def arrays(root: Path, images: np.ndarray = IMAGES, labels: np.ndarray = LABELS) -> Dataset:
    root.mkdir(parents=True, exist_ok=True)
    np.savez(root / "train.npz", images=images, labels=labels)
    np.savez(root / "test.npz", images=IMAGES[:9], labels=LABELS[:9])
    return load(root, "arrays")


def load(root: Path, source: str, **keywords: Any) -> Dataset:
    suffix = ".npz" if source == "arrays" else ""
    train, test = ((str(root / f"{part}{suffix}"),) for part in ("train", "test"))
    return load_dataset(source=source, train_paths=train, test_paths=test, **keywords)


def folder(root: Path) -> None:
    """BMP files: each of the same size, whatever it shows."""
    for part, count in (("train", 40), ("test", 9)):
        for i in range(count):
            path = root / part / f"c{LABELS[i]}" / f"{i:03d}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(IMAGES[i]).save(path)


# --- Fingerprints ---


def test_only_the_images_count(tmp_path):
    first, again = arrays(tmp_path / "a"), arrays(tmp_path / "b")
    assert changes(fingerprint(first), fingerprint(again)) == []
    folder(tmp_path / "f")
    before = json.loads(json.dumps(fingerprint(load(tmp_path / "f", "folder"))))
    os.utime(tmp_path / "f" / "train" / "c0" / "000.bmp", (1, 1))
    (tmp_path / "f" / "train" / "notes.txt").write_text("no picture")
    (tmp_path / "f").rename(tmp_path / "g")
    now = fingerprint(load(tmp_path / "g", "folder", image_size=4))
    assert changes(before, now) == []
    sizes = (before["sources"]["training set"]["images"], before["parts"]["train"]["images"])
    assert sizes == (40, 36)
    # Procedural images are the config's own: they may differ by a level between machines.
    drawn = [
        load_dataset(source="shapes", image_size=8, num_train_examples=n, num_test_examples=9)
        for n in (50, 50, 60)
    ]
    prints = [fingerprint(one) for one in drawn]
    assert changes(prints[0], prints[1]) == []
    assert "found 67" in changes(prints[0], prints[2])[0]
    digits = fingerprint(load_dataset(source="digits", inlier_class=3))
    assert list(digits["sources"]) == ["training set"]
    assert digits["parts"].keys() == {"train", "validation", "test", "outside"}


def test_names_below_the_working_directory_do_not_tell_where_it_is(tmp_path, monkeypatch):
    home = tmp_path / "home"
    arrays(home / "data")
    folder(home / "pictures")
    whole = fingerprint(load(home / "data", "arrays"))
    monkeypatch.setattr(data_record.Path, "cwd", lambda: Path("/home"))  # a part of the path alone
    assert fingerprint(load(home / "data", "arrays")) == whole
    monkeypatch.undo()
    monkeypatch.chdir(home)
    train, more, test = (str(home / "data" / f"{part}.npz") for part in ("train", "more", "test"))
    np.savez(more, images=IMAGES, labels=LABELS)
    two = load_dataset(source="arrays", train_paths=(train, more), test_paths=(test,))
    assert str(tmp_path) not in json.dumps(fingerprint(two))
    for source, directory, name in (
        ("arrays", Path("data"), "data/train.npz"),
        ("arrays", home / "data", "data/train.npz"),
        ("folder", Path("pictures"), "pictures/train"),
    ):
        found = fingerprint(load(directory, source))
        assert found["sources"]["training set"]["name"] == name
        assert str(tmp_path) not in json.dumps(found)
    assert changes(whole, fingerprint(load(Path("data"), "arrays"))) == []
    assert str(home) in whole["sources"]["training set"]["name"]


def one_pixel(images: np.ndarray) -> np.ndarray:
    changed = images.copy()
    changed[-1, -1, -1, -1] ^= 1
    return changed


@pytest.mark.parametrize(
    ("images", "labels", "seen"),
    [
        (np.concatenate([IMAGES, IMAGES]), np.tile(LABELS, 2), "images: the run has 40, found 80"),
        (IMAGES[:-1], LABELS[:-1], "images: the run has 40, found 39"),
        (IMAGES[:, :, :4], LABELS, "bytes: the run has 7,680, found 3,840"),
        (one_pixel(IMAGES), LABELS, "contents: the run has"),
        (IMAGES[::-1], LABELS[::-1], "contents: the run has"),
        (IMAGES, LABELS[::-1], "labels: the run has"),
    ],
)
def test_every_change_of_arrays_is_seen(tmp_path, images, labels, seen):
    before = fingerprint(arrays(tmp_path / "a"))
    arrays(tmp_path / "b")
    np.savez(tmp_path / "b" / "train.npz", images=images, labels=labels)
    if images.shape[1:] != IMAGES.shape[1:]:
        np.savez(tmp_path / "b" / "test.npz", images=images[:9], labels=labels[:9])
    lines = changes(before, fingerprint(load(tmp_path / "b", "arrays")))
    assert any(line.startswith(f"training set, {seen}") for line in lines), lines


def test_records_of_before_hold_labels_that_are_ignored(tmp_path):
    folder(tmp_path)
    rows = "".join(f"train/c{LABELS[i]}/{i:03d}.bmp {LABELS[i]}\n" for i in range(40))
    (tmp_path / "a.txt").write_text(rows)
    arguments: Any = {"source": "paths", "train_paths": (str(tmp_path / "a.txt"),)}
    found = fingerprint(load_dataset(labels="none", **arguments))
    whole = found["sources"]["training set"]
    assert not {"labels", "class names"} & whole.keys()
    before = {**found, "sources": {"training set": {**whole, "labels": "1", "class names": "2"}}}
    assert changes(before, found) == []
    assert changes(found, found | {"sources": {"training set": whole | {"images": 3}}}) != []


def test_every_change_of_a_folder_is_seen(tmp_path):
    def seen(what: str) -> list[str]:
        lines = changes(before, fingerprint(load(tmp_path, "folder")))
        assert any(what in line for line in lines), lines
        return lines

    folder(tmp_path)
    before = fingerprint(load(tmp_path, "folder"))
    one, train = tmp_path / "train" / "c1" / "021.bmp", tmp_path / "train"
    whole = one.read_bytes()
    one.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # of the same size
    assert seen("training set, contents: the run has") == seen("contents")[:1]
    one.write_bytes(whole + b"\0")
    seen("training set, bytes: the run has")
    one.write_bytes(whole)
    one.rename(one.with_name("999.bmp"))
    seen("training set, file names: the run has")
    one.with_name("999.bmp").rename(train / "c2" / "021.bmp")
    seen("training set, labels: the run has")
    (train / "c2" / "021.bmp").unlink()
    lines = seen("training set, images: the run has 40, found 39")
    assert any("validation split" in line or "train split" in line for line in lines)
    one.write_bytes(whole)
    assert changes(before, fingerprint(load(tmp_path, "folder"))) == []
    (tmp_path / "test" / "c0" / "new.bmp").write_bytes(whole)
    assert seen("test set, images: the run has 9, found 10")


def test_contents_of_large_sets_are_sampled_evenly(tmp_path, monkeypatch):
    folder(tmp_path)
    source = FolderSource(tmp_path / "train")
    total = sum(os.path.getsize(path) for path in source.paths)
    for limit, value in (("_MAX_BYTES", total // 4), ("_MAX_FILES", 10)):
        with monkeypatch.context() as patch:
            patch.setattr(data_record, limit, value)
            before = data_record._of_files(source.names, source.paths)
            noticed = 0
            for path in map(Path, source.paths):
                whole = path.read_bytes()
                path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
                noticed += before != data_record._of_files(source.names, source.paths)
                path.write_bytes(whole)
            assert 6 <= noticed <= 10, limit


# --- Runs ---


def begun(workdir: Path) -> Path:
    (workdir / "checkpoints" / "5").mkdir(parents=True)
    return workdir


def test_a_run_is_held_to_the_data_it_was_begun_on(tmp_path, caplog):
    workdir = tmp_path / "run"
    workdir.mkdir()
    few, many = arrays(tmp_path / "few", IMAGES[:20], LABELS[:20]), arrays(tmp_path / "many")
    # Until there is a checkpoint, nothing was learned: the data are those of the new beginning.
    assert data_record.check_training(workdir, many, accept_change=False) == []
    assert data_record.check_training(workdir, few, accept_change=False) == []
    begun(workdir)
    assert data_record.check_training(workdir, few, accept_change=False) == []
    assert data_record.check_evaluation(workdir, few, accept_change=False) == []
    record = (workdir / "data.json").read_bytes()
    for check, how in (
        (data_record.check_training, "--config.input.accept_changed_data=True"),
        (data_record.check_evaluation, "--accept_changed_data"),
    ):
        with pytest.raises(ChangedDataError) as caught:
            check(workdir, many, accept_change=False)
        for text in (
            "training set, images: the run has 20, found 40",
            "train split, images: the run has 18, found 36",
            "Images that were trained on may now be validation images",
            how,
        ):
            assert text in str(caught.value)
    assert not caplog.records
    lines = data_record.check_evaluation(workdir, many, accept_change=True)
    assert "training set, images: the run has 20, found 40" in lines
    assert (workdir / "data.json").read_bytes() == record
    # Accepted once, the new data are the run's; what changed stays known.
    assert data_record.check_training(workdir, many, accept_change=True) == lines
    assert "the run has 20, found 40" in caplog.text
    assert data_record.check_training(workdir, many, accept_change=False) == lines
    assert data_record.check_evaluation(workdir, many, accept_change=False) == lines
    with pytest.raises(ChangedDataError, match="the run has 40, found 20"):
        data_record.check_training(workdir, few, accept_change=False)


def test_runs_from_before_the_record_go_on(tmp_path, caplog):
    workdir = begun(tmp_path / "run")
    dataset = arrays(tmp_path / "data")
    assert data_record.check_evaluation(workdir, dataset, accept_change=False) == []
    assert not (workdir / "data.json").exists()
    assert data_record.check_training(workdir, dataset, accept_change=False) == []
    assert "recorded now: 36 train, 4 validation, 9 test" in caplog.text
    # Of a folder, they had read fewer files than are read now.
    other = begun(tmp_path / "other")
    folder(tmp_path)
    (tmp_path / "train" / "c0" / "x.png").write_bytes(
        (tmp_path / "train" / "c0" / "000.bmp").read_bytes()
    )
    pictures = load(tmp_path, "folder")
    with pytest.raises(
        ChangedDataError, match=r"only PNG and JPEG files \(1 of them now\), found 41"
    ):
        data_record.check_training(other, pictures, accept_change=False)
    assert len(data_record.check_training(other, pictures, accept_change=True)) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2}', '{"format": 1, "fingerprint": []}']
)
def test_a_damaged_record_is_named(tmp_path, text):
    workdir = begun(tmp_path)
    (workdir / "data.json").write_text(text)
    with pytest.raises(ValueError, match=r"data\.json is damaged .*remove it"):
        data_record.read(workdir)


def test_train_evaluate_and_a_loaded_model_refuse_before_any_work(tmp_path, caplog):
    config: Any = smoke.get_config()
    root, workdir = tmp_path / "data", tmp_path / "run"
    dataset = arrays(root)
    config.data.update({"source": "arrays", "train_paths": (str(root / "train.npz"),)})
    config.data.update({"test_paths": (str(root / "test.npz"),), "image_size": 0})
    config.data.update({"num_train_examples": 0, "num_test_examples": 0})
    config.train.batch_size = 8
    config.evaluation.knn_k = (5,)
    config.ood.knn_k = (5,)
    workdir.mkdir()
    data_record.check_training(workdir, dataset, accept_change=False)
    begun(workdir)
    (workdir / "config.json").write_text(json.dumps(commands.to_json_values(config)))
    np.savez(root / "train.npz", images=IMAGES[:-1], labels=LABELS[:-1])
    with pytest.raises(ChangedDataError, match="the run has 40, found 39"):
        commands.train(config, workdir)
    with pytest.raises(ChangedDataError, match="the run has 40, found 39"):
        commands.evaluate(config, workdir, step=None)
    written = {path.name for path in workdir.iterdir()}
    assert written == {"config.json", "data.json", "checkpoints", ".lock"}
    with caplog.at_level(logging.ERROR):
        loaded = Model(
            commands.to_json_values(config), {}, step=0, recorded_data=data_record.read(workdir)
        )
        with pytest.raises(ChangedDataError, match=r"(?s)found 39.*fit_images="):
            loaded.detector(score="embedding/mahalanobis")
