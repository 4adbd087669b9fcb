"""Fine-tuning from a run or an export: what moves, what does not, what is reported."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from configs import default, finetune_digits, transfer
from configs import digits as digits_config
from jevb_jax import commands, export, finetuning, loading
from jevb_jax.evaluation.evaluate import evaluate_transfer
from jevb_jax.images import batches
from jevb_jax.images.data_record import ChangedDataError
from jevb_jax.images.dataset import Dataset, load_dataset
from jevb_jax.images.image_files import FolderSource
from jevb_jax.images.source import ArraySource, image_shape
from jevb_jax.loading import load
from jevb_jax.model import Model
from jevb_jax.parallel import StoppedError
from jevb_jax.runs import metrics_writers
from jevb_jax.runs.checkpoints import CheckpointAccessError, Checkpointer, CheckpointError
from jevb_jax.runs.files import DirectoryInUseError, lock_directory
from jevb_jax.runs.metrics_log import MetricsLog
from jevb_jax.settings import read, run_config
from jevb_jax.settings.sections import FinetuneSettings
from jevb_jax.training import from_settings, step
from jevb_jax.training.classification import BestEpoch
from jevb_jax.training.experiment import to_json_values
from jevb_jax.training.loop import NonFiniteError, RunLoop
from jevb_jax.training.resume import ChangedConfigError
from tests.marks import nightly

ROOT = Path(__file__).resolve().parent.parent


def quiet() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An untrained encoder of digits, as an export."""
    config: Any = digits_config.get_config()
    config.model.width = 4
    config.model.projector_hidden_dims = (8,)
    config.model.embedding_dim = 8
    config.model.head_hidden_dim = 8
    values = to_json_values(config)
    shapes = loading.variable_shapes(read.saved_settings(values))
    network = from_settings.make_network(read.saved_settings(values))
    variables = jax.jit(lambda key: network.init(key, jnp.zeros((2, 8, 8, 1)), train=True))(
        jax.random.key(0)
    )
    assert jax.tree.structure(variables) == jax.tree.structure(shapes)
    directory = tmp_path_factory.mktemp("encoders") / "digits"
    export.export_model(Model(values, variables, step=0), directory)
    return directory


def tuned(
    encoder, directory, mode: str, *, num_epochs: int = 2, console: Console | None = None, **changes
) -> dict[str, Any]:
    config: Any = finetune_digits.get_config(mode)
    config.init.workdir = str(encoder)
    config.data.num_train_examples = 256
    config.train.num_epochs = num_epochs
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return finetuning.finetune(to_json_values(config), directory, console=console or quiet())


@pytest.mark.slow
def test_images_are_read_as_those_of_the_encoder(encoder, tmp_path):
    cases: tuple[tuple[str, Any, str], ...] = (
        ("exif", "ignore", "data.exif = 'ignore', but the encoder was trained with 'apply'"),
        ("dtype", "uint16", "data.dtype = 'uint16', but the encoder was trained with 'uint8'"),
    )
    for name, value, message in cases:
        config: Any = finetune_digits.get_config("frozen")
        config.init.workdir = str(encoder)
        config.data.source, config.data.train_paths = "arrays", ("a.npz",)
        config.data[name] = value
        settings = read.finetune_settings(to_json_values(config))
        with pytest.raises(ValueError, match=message):
            finetuning._load_encoder(settings, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [pytest.param("frozen", marks=pytest.mark.nightly), "full"])
def test_learns_and_reports_what_the_saved_classifier_does(encoder, tmp_path, mode, caplog):
    results = tuned(encoder, tmp_path / "out", mode, num_epochs=12)
    assert len(results["validation_accuracies"]) == 13
    assert results["validation_accuracy"] == max(results["validation_accuracies"])
    assert results["validation_accuracies"][0] < 0.3  # zeros: the first class
    assert results["test_accuracy"] > results["validation_accuracies"][0] + 0.2
    classifier = finetuning.load_classifier(tmp_path / "out")
    dataset = load_dataset(source="digits")
    for part in ("validation", "test"):
        source = getattr(dataset, part)
        accuracy = np.mean(classifier.predict(batches.load_resident(source)) == source.labels)
        assert accuracy == pytest.approx(results[f"{part}_accuracy"], abs=1e-9)
    load(tmp_path / "out")
    assert ("encoder as it was before" in caplog.text) == (mode == "full")
    before, after = load(encoder).variables, classifier.model.variables
    moved = {
        name: not np.array_equal(before[kind][part][layer][leaf], after[kind][part][layer][leaf])
        for kind in before
        for part in before[kind]
        if part != "raw_radial_scale"
        for layer in before[kind][part]
        for leaf in before[kind][part][layer]
        for name in [f"{kind}.{part}.{layer}.{leaf}"]
    }
    should_move = {name for name in moved if mode == "full" and ".backbone." in name}
    assert {name for name, has_moved in moved.items() if has_moved} == should_move
    assert ("frozen" in results["protocol"]) == (mode == "frozen")
    assert "256 labeled images" in results["protocol"]


@pytest.mark.slow
def test_a_step_is_compiled_with_the_options_for_networks(encoder, tmp_path, monkeypatch):
    # Which options is known by the error of the compiler that gets one that it does not know.
    monkeypatch.setattr(step, "network_options", lambda: {"no_such_option": ""})
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        tuned(encoder, tmp_path / "out", "frozen")
    assert not (tmp_path / "out" / "results.json").exists()


class Killed(BaseException):
    """As sudden as a signal that nobody handles."""


def stop_at(monkeypatch, step: int) -> None:
    """Asks the loop to stop once it has taken so many steps."""
    record = RunLoop.record

    def recorded(self: Any, dispatch: Any, state: Any) -> Any:
        if int(state.step) == step:
            self.stop.request("the test")
        return record(self, dispatch, state)

    monkeypatch.setattr(RunLoop, "record", recorded)


def kill_at(monkeypatch, step: int) -> None:
    """Ends everything where an epoch's accuracy would be measured."""
    measure = BestEpoch.measure

    def measured(self: Any, state: Any, last: Any) -> Any:
        if int(state.step) == step:
            raise Killed
        return measure(self, state, last)

    monkeypatch.setattr(BestEpoch, "measure", measured)


SHORT: dict[str, Any] = {"num_epochs": 3, "train__batch_size": 64}  # of 4 steps


@pytest.mark.slow
def test_writers_are_asked_before_anything_is_written_and_get_every_line(
    encoder, tmp_path, monkeypatch
):
    told: list[Any] = []

    class Recorder:
        def log(self, step: int, values: Any) -> None:
            told.append({"step": step, **values})

        def forget_after(self, step: int) -> None:
            assert step == -1

        def finish(self, ending: str) -> None:
            told.append(ending)

    def open_writers(names: Any, run: Any) -> list[Recorder]:
        told.append((names, run.config["init"]["frozen"]))
        return [Recorder()]

    monkeypatch.setattr(metrics_writers, "open_writers", open_writers)
    monkeypatch.setattr(metrics_writers, "_is_installed", lambda name: name == "wandb")
    changes = {**SHORT, "num_epochs": 2}
    with pytest.raises(ValueError, match="names mlflow, but mlflow is not installed"):
        tuned(encoder, tmp_path / "x", "frozen", **changes, train__writers=("mlflow",))
    assert not (tmp_path / "x").exists()
    tuned(encoder, tmp_path / "x", "frozen", **changes, train__writers=("wandb",))
    records = MetricsLog.read(tmp_path / "x" / "training" / "metrics.jsonl")
    assert told == [(("wandb",), True), *records, "finished"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["frozen", pytest.param("full", marks=pytest.mark.nightly)])
def test_a_finetune_that_was_cut_is_the_uncut_one_bit_for_bit(encoder, tmp_path, monkeypatch, mode):
    changes = {**SHORT, "train__log_every_steps": 3}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    results = tuned(encoder, whole, mode, **changes)
    records = MetricsLog.read(whole / "training" / "metrics.jsonl")
    assert [r["step"] for r in records if "train/loss" in r] == [3, 6, 9, 12]
    measured = {r["step"]: r["validation/accuracy"] for r in records if "validation/accuracy" in r}
    assert list(measured) == [0, 4, 8, 12]
    assert list(measured.values()) == results["validation_accuracies"]

    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(StoppedError, match="the test: saved step 3 of 12"):
            tuned(encoder, cut, mode, **changes)
    with monkeypatch.context() as patch:
        kill_at(patch, 8)
        with pytest.raises(Killed):
            tuned(encoder, cut, mode, **changes)
    # Nothing is written before the end, and every attempt is in one place.
    assert {path.name for path in cut.iterdir()} == {".lock", "training"}
    out = io.StringIO()
    # What no number depends on may change.
    again = {**changes, "checkpoint__every_epochs": 3, "input__prefetch_batches": 1}
    found = tuned(encoder, cut, mode, console=Console(file=out, width=200), **again)
    assert f"Resuming {cut}/training at step " in out.getvalue()
    assert found == results
    for name in ("classifier.safetensors", "model.safetensors", "results.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    logs = [(path / "training" / "metrics.jsonl").read_text() for path in (cut, whole)]
    best = '"validation/best_accuracy"'  # of every save, as often as was saved
    logs = [[line for line in log.splitlines() if best not in line] for log in logs]
    assert logs[0] == logs[1]
    assert not list((cut / "training" / "checkpoints").glob("[0-9]*"))
    with pytest.raises(ValueError, match=r"holds results\.json already"):
        tuned(encoder, cut, mode, **changes)


@pytest.mark.slow
def test_a_finetune_with_other_settings_or_another_encoder_does_not_go_on(
    encoder, tmp_path, monkeypatch
):
    stop_at(monkeypatch, 2)
    own = tmp_path / "encoder"
    export.export_model(load(encoder), own)
    with pytest.raises(StoppedError):
        tuned(own, tmp_path / "out", "frozen", **SHORT)
    with pytest.raises(
        ChangedConfigError,
        match=r"(?s)holds a fine-tune of another config.*  optimizer\.learning_rate: the "
        r"fine-tune has 0\.01, got 0\.02\n.*  train\.num_epochs: the fine-tune has 3, got 4",
    ):
        tuned(
            own, tmp_path / "out", "frozen", **{**SHORT, "num_epochs": 4},
            optimizer__learning_rate=0.02,
        )  # fmt: skip
    model = load(encoder)
    other = jax.tree.map(lambda leaf: leaf + 1, model.variables)
    export.export_model(model.with_variables(other), own)
    with pytest.raises(ValueError, match="now holds another encoder, of step 0, than"):
        tuned(own, tmp_path / "out", "frozen", **SHORT)
    # What was not saved yet may begin with anything.
    for checkpoint in (tmp_path / "out" / "training" / "checkpoints").glob("[0-9]*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(StoppedError, match="saved step 2"):
        tuned(own, tmp_path / "out", "frozen", **SHORT)


@pytest.mark.slow
def test_the_best_epoch_survives_a_kill_and_the_earliest_of_equals_is_best(
    encoder, tmp_path, monkeypatch
):
    script: list[Any] = [0.1, 0.9, 0.9, 0.5, Killed, 0.5, 0.9, 0.25]  # the last on the test images
    seen = []

    def accuracy(classifier: finetuning.Classifier, *_: Any) -> float:
        value = script.pop(0)
        if value is Killed:
            raise Killed
        seen.append(dict(classifier.arrays))
        return value

    monkeypatch.setattr(finetuning, "_accuracy", accuracy)
    changes = {
        **SHORT,
        "num_epochs": 5,
        "checkpoint__every_epochs": 1,
        "checkpoint__keep_latest": 1,
    }
    with pytest.raises(Killed):
        tuned(encoder, tmp_path / "out", "frozen", **changes)
    checkpointer = Checkpointer(tmp_path / "out" / "training" / "checkpoints", keep_best=1)
    assert 4 in checkpointer.steps()
    assert checkpointer.best_step() == 4
    checkpointer.close()
    results = tuned(encoder, tmp_path / "out", "frozen", **changes)
    assert results["validation_accuracies"] == [0.1, 0.9, 0.9, 0.5, 0.5, 0.9]
    assert results["epoch"] == 1
    assert results["test_accuracy"] == 0.25
    saved = finetuning.load_classifier(tmp_path / "out").arrays
    for name in saved:
        np.testing.assert_array_equal(saved[name], seen[1][name])
    assert not np.array_equal(saved["kernel"], seen[2]["kernel"])


@pytest.mark.slow
def test_a_finetune_whose_log_lost_an_epoch_says_so(encoder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop_at(monkeypatch, 6)
    with pytest.raises(StoppedError):
        tuned(encoder, out, "frozen", **SHORT)
    log = out / "training" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if '"validation/accuracy"' not in line))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl lacks the accuracy after step 0"):
        tuned(encoder, out, "frozen", **SHORT)


@pytest.mark.slow
def test_other_images_are_refused_whatever_is_accepted(encoder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(StoppedError):
            tuned(encoder, tmp_path / "out", "frozen", **SHORT)
    loaded = finetuning.load_dataset

    def inverted(**settings: Any) -> Dataset:
        dataset = loaded(**settings)
        train = dataset.train
        images = 255 - batches.load_resident(train)
        return dataset._replace(train=ArraySource(images, train.labels, name=train.name))

    monkeypatch.setattr(finetuning, "load_dataset", inverted)
    with pytest.raises(ChangedDataError, match="have changed") as caught:
        tuned(encoder, tmp_path / "out", "frozen", **SHORT)
    assert "accept_changed_data" not in str(caught.value)
    with pytest.raises(ValueError, match=r"input\.accept_changed_data is for train\.py"):
        tuned(encoder, tmp_path / "new", "frozen", **SHORT, input__accept_changed_data=True)


@pytest.mark.slow
def test_a_kill_while_results_are_put_in_place_is_no_end(encoder, tmp_path, monkeypatch):
    out, changes = tmp_path / "out", SHORT
    replace = Path.replace

    def killed(self: Path, target: Any) -> Any:
        if Path(target).name == "model.json":
            raise Killed
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            tuned(encoder, out, "frozen", **changes)
    assert (out / "results.json").exists()
    results = tuned(encoder, out, "frozen", **changes)
    assert json.loads((out / "results.json").read_text()) == results
    assert finetuning.load_classifier(out).arrays["bias"].shape == (10,)
    # Without an unfinished fine-tune, files of these names are somebody else's.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds results\.json already"):
        tuned(encoder, tmp_path / "other", "frozen", **changes)


def damage(checkpoint: Path) -> None:
    for path in (checkpoint / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"no checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accuracies", "damaged", "again"),
    [
        # The newest, and best: the one before it is taken, whose best epoch is still there.
        ([0.1, 0.5, 0.4, 0.9], 12, [0.9, 0.25]),
        # The best: nothing can replace it.
        ([0.1, 0.9, 0.5, 0.4], 4, None),
    ],
)
def test_damaged_checkpoints(encoder, tmp_path, monkeypatch, accuracies, damaged, again):
    script: list[Any] = [*accuracies, Killed]

    def accuracy(*_: Any) -> float:
        value = script.pop(0)
        if value is Killed:
            raise Killed
        return value

    monkeypatch.setattr(finetuning, "_accuracy", accuracy)
    changes = {**SHORT, "checkpoint__every_epochs": 1}
    with pytest.raises(Killed):  # in the test
        tuned(encoder, tmp_path / "out", "frozen", **changes)
    damage(tmp_path / "out" / "training" / "checkpoints" / str(damaged))
    if again is None:
        with monkeypatch.context() as patch:
            whole = Checkpointer._restore

            def unreachable(self, step, *rest):
                if step == damaged:
                    raise ConnectionResetError("the peer closed the connection")
                return whole(self, step, *rest)

            patch.setattr(Checkpointer, "_restore", unreachable)
            with pytest.raises(
                CheckpointAccessError, match=r"checkpoint 4 in .* could not be read"
            ):
                tuned(encoder, tmp_path / "out", "frozen", **changes)
        with pytest.raises(CheckpointError, match=r"best epoch .* is lost: checkpoint 4 cannot be"):
            tuned(encoder, tmp_path / "out", "frozen", **changes)
    else:
        script = list(again)
        results = tuned(encoder, tmp_path / "out", "frozen", **changes)
        assert results["validation_accuracies"] == accuracies
        assert results["epoch"] == 3
        assert results["test_accuracy"] == 0.25


@pytest.mark.slow
def test_a_mistake_before_the_first_save_can_be_corrected(encoder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="smaller batch"):
        tuned(encoder, tmp_path / "out", "frozen", train__batch_size=512)
    stop_at(monkeypatch, 2)
    with pytest.raises(StoppedError, match="saved step 2 of 12"):
        tuned(encoder, tmp_path / "out", "frozen", **SHORT)
    saved: Any = run_config.read_config(tmp_path / "out" / "training" / "config.json")
    assert saved.train.batch_size == 64
    assert saved.init.frozen
    with pytest.raises(ValueError, match="holds training and no config"):
        commands.train(digits_config.get_config(), tmp_path / "out", console=quiet())


@pytest.mark.slow
def test_the_encoder_is_known_by_its_weights(encoder, tmp_path, monkeypatch):
    stop_at(monkeypatch, 2)
    with pytest.raises(StoppedError):
        tuned(encoder, tmp_path / "out", "frozen", **SHORT)
    # The same weights in another place, whose run has other settings of its evaluation.
    model = load(encoder)
    evaluation = {**model.config["evaluation"], "batch_size": 7}
    moved = Model({**model.config, "evaluation": evaluation}, model.variables, step=0)
    export.export_model(moved, tmp_path / "moved")
    stop_at(monkeypatch, 4)
    with pytest.raises(StoppedError, match="saved step 4"):
        tuned(tmp_path / "moved", tmp_path / "out", "frozen", **SHORT)


@pytest.mark.slow
def test_a_finetune_goes_on_from_the_step_of_the_run_that_it_began_with(
    encoder, tmp_path, monkeypatch
):
    asked = []

    def recorded(workdir: Any, step: Any, **settings: Any) -> Model:
        asked.append(step)
        return load(encoder, **settings)

    monkeypatch.setattr(loading, "load", recorded)
    config: Any = finetune_digits.get_config("frozen")
    config.init.workdir = str(tmp_path / "run")  # no export
    settings = read.finetune_settings(to_json_values(config))
    directory = tmp_path / "training"
    finetuning._load_encoder(settings, directory)
    checkpointer = Checkpointer(directory / "checkpoints")
    checkpointer.save(1, {"x": jnp.ones(2)}, config={})
    checkpointer.close()
    (directory / "encoder.json").write_text('{"step": 7, "sha256": ""}')
    finetuning._load_encoder(settings, directory)
    assert asked == [None, 7]


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_named_and_nothing_is_written(encoder, tmp_path):
    out = tmp_path / "out"
    changes = {
        **SHORT,
        "optimizer__name": "sgd",
        "optimizer__learning_rate": 1e38,
        "optimizer__warmup_epochs": 0.0,
    }
    with pytest.raises(NonFiniteError, match=r"step \d: the loss is (nan|inf)") as caught:
        tuned(encoder, out, "frozen", **changes)
    assert {path.name for path in out.iterdir()} == {".lock", "training"}
    (evidence,) = (out / "training").glob("nonfinite_step_*")
    assert str(evidence) in str(caught.value)
    taken = int(evidence.name.rsplit("_", 1)[1])
    assert taken < 4  # not only found at the end of an epoch
    batch = json.loads((evidence / "batch.json").read_text())
    assert batch["step"] == taken
    assert len(batch["train_indices"]) == 64
    with np.load(evidence / "state.npz", allow_pickle=False) as state:
        assert int(state["step"]) == taken
        assert np.isfinite(state["params.kernel"]).all()
    checkpointer = Checkpointer(out / "training" / "checkpoints")
    assert checkpointer.steps() == [0]
    checkpointer.close()


@pytest.mark.slow
@pytest.mark.nightly
def test_streamed_images_are_those_in_memory(encoder, tmp_path):
    results = [
        tuned(
            encoder, tmp_path / placement, "frozen", **SHORT,
            input__placement=placement, train__steps_per_dispatch=3,
        )
        for placement in ("stream", "resident")
    ]  # fmt: skip
    assert results[0] == results[1]
    files = [tmp_path / one / "classifier.safetensors" for one in ("stream", "resident")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_cannot_be_tuned_is_refused(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds results\.json already"):
        tuned(tmp_path / "nowhere", tmp_path, "full")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "model.safetensors").write_text("of another program")
    with pytest.raises(ValueError, match=r"holds model\.safetensors already"):
        tuned(tmp_path / "nowhere", tmp_path / "others", "full")
    with pytest.raises(FileNotFoundError, match=r"neither config.json"):
        tuned(tmp_path / "nowhere", tmp_path / "out", "full")
    config = to_json_values(finetune_digits.get_config())
    with pytest.raises(
        ValueError, match=r"init\.workdir must be a text that is not empty \(a run of train"
    ):
        finetuning.finetune(config, tmp_path / "out", console=quiet())
    with pytest.raises(ValueError, match="must be full or frozen, got 'half'"):
        finetune_digits.get_config("half")
    unlabeled = ArraySource(np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match="needs labels"):
        finetuning._labels(unlabeled)


def classifier_of(encoder: Model) -> finetuning.Classifier:
    random = np.random.default_rng(0)
    size = encoder.represent(np.zeros((1, 8, 8, 1), np.uint8)).shape[1]
    arrays = {
        "feature_mean": np.zeros(size, np.float32),
        "feature_std": np.ones(size, np.float32),
        "kernel": random.normal(size=(size, 10)).astype(np.float32),
        "bias": np.zeros(10, np.float32),
    }
    return finetuning.Classifier(encoder, arrays)


@pytest.mark.slow
def test_a_classifier_sees_photos_as_its_own_data_were_read(encoder, tmp_path):
    """The encoder's own data were stored images; the classifier's were read to 12 pixels."""
    y, x = np.mgrid[:24, :50]
    photo = np.rint(127.5 + 127 * np.sin(x / 5) * np.cos(y / 4)).astype(np.uint8)[..., None]
    Image.fromarray(photo[..., 0]).save(tmp_path / "x.png")
    seen = FolderSource(tmp_path, image_size=12)[0][..., :1]
    classifier = classifier_of(load(encoder).with_square_size(12))
    expected = classifier.logits(seen)
    for given in (photo, Image.fromarray(photo[..., 0])):
        np.testing.assert_allclose(classifier.logits(given), expected, rtol=1e-5, atol=1e-5)
        assert classifier.predict(given) == expected.argmax()
    both = classifier.logits([photo, seen])
    np.testing.assert_allclose(both, [expected, expected], rtol=1e-5, atol=1e-5)
    again = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_allclose(again.logits(photo), expected, rtol=1e-5, atol=1e-5)
    with jax.enable_x64(True):
        np.testing.assert_allclose(classifier.logits(photo), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_a_classifier_of_other_arrays_is_refused(encoder, damage):
    whole = classifier_of(load(encoder))
    arrays = dict(whole.arrays)
    if damage == "missing":
        del arrays["bias"]
    elif damage == "extra":
        arrays["more"] = arrays["bias"]
    else:
        arrays["kernel"] = arrays["kernel"][1:]
    with pytest.raises(ValueError, match=r"classifier (holds feature_mean|do not fit each other)"):
        finetuning.Classifier(whole.model, arrays)


def test_a_finetune_is_of_the_data_s_size_and_its_config_may_hold_numpy(
    encoder, tmp_path, monkeypatch
):
    seen = []

    def train(settings: FinetuneSettings, model: Model, *_: Any) -> Any:
        seen.append((settings, model))
        raise InterruptedError

    monkeypatch.setattr(finetuning, "_train", train)
    empty = Dataset(None, None, None)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(finetuning, "load_dataset", lambda **_: empty)
    config = to_json_values(finetune_digits.get_config("frozen"))
    config["init"]["workdir"] = str(encoder)
    config["data"]["image_size"] = np.int64(12)
    config["train"]["num_epochs"] = np.int32(2)
    with pytest.raises(InterruptedError):
        finetuning.finetune(config, tmp_path / "out", console=quiet())
    ((plain, model),) = seen
    assert model.square_size == 12
    assert type(plain.train.num_epochs) is int


def test_transfer_reads_photos_as_the_encoder_s_own_were(tmp_path, monkeypatch):
    section = transfer.get_config("folder")
    for part in ("train", "test"):
        for name, size in (("a", (20, 30)), ("b", (40, 12))):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", size, (number, 0, 0)).save(folder / f"{number}.png")
    section.train_paths, section.test_paths = (str(tmp_path / "train"),), (str(tmp_path / "test"),)
    section.validation_fraction = 0.25

    class Encoder:
        square_size, extractor, variables, step = 16, staticmethod(lambda: None), None, 0

    sizes = []

    def evaluate(settings: Any, extract: Any, variables: Any, dataset: Dataset) -> Any:
        sizes.append({image_shape(part) for part in dataset[:3] if part is not None})
        raise InterruptedError

    monkeypatch.setattr(loading, "load", lambda *_: Encoder)
    monkeypatch.setattr(commands, "evaluate_transfer", evaluate)
    for asked in (0, 24):  # what a section asks for is done
        section.image_size = asked
        with pytest.raises(InterruptedError):
            commands.evaluate_on(
                digits_config.get_config(), section, tmp_path, step=None, console=quiet()
            )
    assert sizes == [{(16, 16, 3)}, {(24, 24, 3)}]


def test_directory_that_cannot_be_used_is_known_before_training(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "_train", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        tuned(encoder, tmp_path / "file" / "out", "frozen")
    (tmp_path / "held").mkdir()
    with lock_directory(tmp_path / "held"), pytest.raises(DirectoryInUseError, match="in use by"):
        tuned(encoder, tmp_path / "held", "frozen")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["finetune.py", nightly("evaluate.py")])
def test_damage_is_one_message_of_the_scripts(encoder, tmp_path, script):
    for file in encoder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"x")
    config = json.loads((tmp_path / "model.json").read_text())["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = {
        "finetune.py": [
            f"--config={ROOT}/configs/finetune_digits.py",
            f"--config.init.workdir={tmp_path}",
            f"--workdir={tmp_path}/out",
        ],
        "evaluate.py": [f"--workdir={tmp_path}", f"--data={ROOT}/configs/transfer.py:digits"],
    }
    ended = subprocess.run(
        [sys.executable, str(ROOT / script), *flags[script]],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    (line,) = (line for line in ended.stderr.splitlines() if "Error" in line)
    assert line.startswith("ArchiveError: ")
    assert "is not what was written: 1 bytes" in line
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.nightly
def test_transfer_is_the_run_s_own_evaluation_on_its_own_data(encoder, tmp_path):
    config: Any = digits_config.get_config()
    config.evaluation.few_label_seeds = 1
    config.evaluation.l2_grid = (1e-3,)
    config.evaluation.knn_k = (20,)
    config.lock()
    directory = tmp_path / "run"
    directory.mkdir()
    for file in encoder.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    section = transfer.get_config("digits")
    results = commands.evaluate_on(config, section, directory, step=None, console=quiet())
    assert json.loads((directory / "results_on_digits.json").read_text()) == results
    assert (directory / "results_on_digits.csv").exists()
    # By hand: cosine similarity to 20 neighbours, weighted by exp(s / 0.1).
    dataset = load_dataset(source="digits")
    assert dataset.test is not None
    loaded = load(directory)
    bank, queries = (
        loaded.represent(batches.load_resident(x)) for x in (dataset.train, dataset.test)
    )
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    similarity = queries @ bank.T
    nearest = np.argsort(-similarity, axis=1)[:, :20]
    weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / 0.1)
    votes = np.zeros((len(queries), 10))
    labels: Any = dataset.train.labels
    for row in range(len(queries)):
        np.add.at(votes[row], labels[nearest[row]], weights[row])
    expected = np.mean(votes.argmax(axis=1) == dataset.test.labels)
    (found,) = (
        row
        for row in results["trained"]
        if (row["name"], row["features"]) == ("knn_20_accuracy", "representation")
    )
    assert found["value"] == pytest.approx(expected, abs=1 / len(queries) + 1e-9)  # of one near tie
    assert found["protocol"].startswith("on digits, other data: ")


def test_transfer_needs_labels_and_the_split():
    images = np.zeros((4, 8, 8, 1), np.uint8)
    labeled = ArraySource(images, np.arange(4))
    unlabeled = ArraySource(images, name="pictures")
    nothing: Any = None
    settings = read.evaluation_section(to_json_values(default.get_config())["evaluation"])
    dataset = Dataset(unlabeled, unlabeled, unlabeled)
    with pytest.raises(ValueError, match="pictures has no labels"):
        evaluate_transfer(settings, nothing, nothing, dataset)
    dataset = Dataset(labeled, labeled, None)
    with pytest.raises(ValueError, match="has no test part"):
        evaluate_transfer(settings, nothing, nothing, dataset)
