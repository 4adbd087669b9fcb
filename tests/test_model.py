"""`jevb_jax.load` against the numbers of evaluate.py, and every wrong input."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from rich.console import Console

import jevb_jax
from configs import smoke
from jevb_jax import augmentations, data, runner
from jevb_jax import export as export_module
from jevb_jax import model as model_module
from jevb_jax.checkpoints import CheckpointError, CheckpointMismatchError
from jevb_jax.evaluation import classification, corruptions, ood_metrics
from jevb_jax.experiment import to_json_values
from jevb_jax.model import Model, load
from jevb_jax.networks import ViewOutputs
from tests.conftest import AS_USERS_RUN_IT

ROOT = Path(__file__).resolve().parent.parent


class Run(NamedTuple):
    directory: Path
    results: dict[str, Any]
    model: Model
    test_images: np.ndarray


# Over `configs/smoke.py`.
SHORT = {
    "data.num_train_examples": 192,
    "data.num_test_examples": 80,
    "train.num_epochs": 2,
    "train.ema_decay": 0.5,
    "checkpoint.every_steps": 3,
    "checkpoint.keep_best": 1,
    "ood.corruptions": ("contrast",),
    "ood.severities": (5,),
    "evaluation.labels_per_class": 0,
    "evaluation.compare_untrained": False,
    "evaluation.batch_size": 64,
    # Colour takes long to compile and has tests of its own.
    "augmentation.jitter_probability": 0.0,
    "augmentation.grayscale_probability": 0.0,
}


def short_config() -> Any:
    config: Any = smoke.get_config()
    config.update_from_flattened_dict(SHORT)
    return config


def python(*args: str) -> None:
    """A process of a user, who compiles with XLA's optimisations."""
    done = subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env={**os.environ, **AS_USERS_RUN_IT},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run of the real command, for the slow tests."""
    directory = tmp_path_factory.mktemp("runs") / "x"
    overrides = [f"--config.{name}={value}" for name, value in SHORT.items()]
    python("train.py", "--config=configs/smoke.py", f"--workdir={directory}", *overrides)
    results = json.loads((directory / "results.json").read_text())
    test = data.load_dataset(**short_config().data.to_dict()).test
    assert test is not None
    return Run(directory, results, load(directory), data.load_resident(test))


class Untrained(NamedTuple):
    model: Model
    test_images: np.ndarray


def untrained_model(*, batch_size: int = 32) -> Model:
    config = to_json_values(short_config())
    shapes = model_module.variable_shapes(config)
    leaves, tree = jax.tree.flatten(shapes)
    random = np.random.default_rng(0)
    values = [random.normal(0, 0.3, leaf.shape).astype(leaf.dtype) for leaf in leaves]
    variables = jax.tree.unflatten(tree, values)
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])  # variances
    return Model(config, variables, step=0, batch_size=batch_size)


@pytest.fixture(scope="module")
def untrained() -> Untrained:
    images = np.random.default_rng(1).integers(0, 256, (80, 16, 16, 3), np.uint8)
    return Untrained(untrained_model(), images)


# One score of each kind: a term, their typicality, fitted to the posterior, to both features.
SCORES = (
    "jevb/kl",
    "jevb/cross_view",
    "jevb/typicality_mahalanobis",
    "jevb/scale_mahalanobis",
    "jevb/mixture_and_residual",
    "embedding/mahalanobis",
    "representation/ssd_1",
    "embedding/norm",
)
# Arguments: run, images, what it writes, names of scores.
USER = """
import sys
import numpy as np
import jevb_jax

directory, images, out, *scores = sys.argv[1:]
model = jevb_jax.load(directory)
found = {}
for name, x in np.load(images).items():
    found |= {f"{name} representation": model.represent(x), f"{name} embedding": model.embed(x)}
    if name != "train":
        found |= {f"{name} {score}": model.ood_score(x, score) for score in scores}
        found[f"{name} default"] = model.ood_score(x)
np.savez(out, **found)
"""


@pytest.mark.slow
def test_numbers_are_those_of_evaluate(run, tmp_path):
    rows = {(row["score"], row["outside"]): row["auroc"] for row in run.results["ood"]["rows"]}
    label_free = {score for score, _ in rows if not score.startswith("probe/")}
    assert set(run.model.score_names()) == label_free | set(run.results["ood"]["left_out"])

    dataset = data.load_dataset(**run.model.config["data"])
    train, test = dataset.train, dataset.test
    assert train.labels is not None
    assert test is not None
    assert test.labels is not None
    images = {
        "train": data.load_resident(train),
        "test": run.test_images,
        "outside": corruptions.corrupt(run.test_images, "contrast", severity=5, seed=0),
    }
    np.savez(tmp_path / "images.npz", **images)
    default = run.results["ood"]["default_score"]
    files = (str(tmp_path / name) for name in ("images.npz", "found.npz"))
    python("-c", USER, str(run.directory), *files, *SCORES, default)
    found = np.load(tmp_path / "found.npz")

    for score in SCORES:
        auroc = ood_metrics.ood_metrics(found[f"test {score}"], found[f"outside {score}"]).auroc
        assert auroc == pytest.approx(rows[score, "contrast_5"], abs=1e-6), score
    np.testing.assert_array_equal(found["test default"], found[f"test {default}"])
    for name in ("representation", "embedding"):
        accuracy = classification.knn_accuracy(
            found[f"train {name}"],
            train.labels,
            found[f"test {name}"],
            test.labels,
            num_classes=data.num_classes(train),
            k=20,
        )
        (expected,) = (
            row["value"]
            for row in run.results["trained"]
            if (row["name"], row["features"]) == ("knn_20_accuracy", name)
        )
        assert accuracy == pytest.approx(expected, abs=1e-6)


def test_outputs_equal_the_network_by_hand(untrained):
    mean, std = (np.asarray(untrained.model.config["augmentation"][k]) for k in ("mean", "std"))
    views = ((untrained.test_images / 255 - mean) / std).astype(
        np.float32
    )  # already the network's size
    outputs: Any = untrained.model.network.apply(untrained.model.variables, views, train=False)
    assert isinstance(outputs, ViewOutputs)
    mean, scale = untrained.model.posterior(untrained.test_images)
    for got, expected in (
        (untrained.model.embed(untrained.test_images), outputs.embedding),
        (untrained.model.represent(untrained.test_images), outputs.representation),
        (mean, outputs.posterior_mean),
        (scale, outputs.posterior_scale),
    ):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_one_image_floats_and_grey(untrained):
    images = untrained.test_images[:5]
    embeddings = untrained.model.embed(images)
    assert untrained.model.embed(images[1]).shape == (16,)
    np.testing.assert_allclose(
        untrained.model.embed(images[1]), embeddings[1], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        untrained.model.embed(images / 255), embeddings, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        untrained.model.embed(jax.numpy.asarray(images)), embeddings, rtol=1e-6, atol=1e-6
    )
    grey = images[..., :1]
    np.testing.assert_array_equal(
        untrained.model.embed(grey), untrained.model.embed(np.repeat(grey, 3, axis=-1))
    )
    large = np.repeat(np.repeat(images, 2, axis=1), 3, axis=2)  # 32 x 48, resized to 16 x 16
    assert np.corrcoef(untrained.model.embed(large).ravel(), embeddings.ravel())[0, 1] > 0.9
    assert untrained.model.ood_score(images[0], "embedding/norm").shape == ()
    assert untrained.model.posterior(images[0]).mean.shape == (16,)
    assert re.search("convnet, step 0, images 16x16x3", repr(untrained.model))


def test_many_images_are_compiled_once_and_padding_changes_nothing(untrained, monkeypatch):
    model = untrained_model()
    traces = []
    original = augmentations.center_view
    monkeypatch.setattr(
        augmentations, "center_view", lambda *a, **k: (traces.append(1), original(*a, **k))[1]
    )
    embeddings = model.embed(untrained.test_images)  # 80 = 32 + 32 + 16
    assert len(traces) == 1
    model.represent(untrained.test_images[:40])
    model.posterior(untrained.test_images[:32])
    assert len(traces) == 1
    parts = [model.embed(untrained.test_images[i : i + 32]) for i in range(0, 64, 32)]
    np.testing.assert_array_equal(np.concatenate(parts), embeddings[:64])
    assert len(embeddings) == 80
    assert len(traces) == 1
    # Fewer than a batch are padded to a power of two, so that few sizes are compiled.
    for count in (5, 6, 7, 8):
        few = model.embed(untrained.test_images[:count])
        np.testing.assert_allclose(few, embeddings[:count], rtol=1e-4, atol=1e-5)
    assert len(traces) == 2


@pytest.mark.parametrize("score", ["jevb/kl", "jevb/cross_view", "embedding/norm"])
def test_scores_that_are_not_fitted_refuse_images_to_fit(untrained, score):
    images = untrained.test_images[:8]
    with pytest.raises(ValueError, match=f"{score} is not fitted to images: leave out fit_images"):
        untrained.model.ood_score(images, score, fit_images=images)


def test_a_bar_appears_when_it_takes_long(monkeypatch):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True)
    batches = list(model_module._with_progress(iter("abc"), total=3, console=console))
    assert batches == ["a", "b", "c"]
    assert "images" not in shown.getvalue()
    monkeypatch.setattr(model_module, "_PROGRESS_AFTER_SECONDS", -1.0)
    assert list(model_module._with_progress(iter("abc"), total=3, console=console)) == [*"abc"]
    assert "images" in shown.getvalue()


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (
            np.zeros((16, 16), np.uint8),
            ValueError,
            r"\[N, h, w, c\].*\(16, 16\).*images\[..., None\]",
        ),
        (np.zeros((2, 16, 16, 2), np.uint8), ValueError, r"1 or 3 channels.*\(2, 16, 16, 2\)"),
        (np.zeros((2, 16, 16, 3), np.int32), TypeError, r"uint8, or float in \[0, 1\], got int32"),
        (np.full((2, 16, 16, 3), np.nan, np.float32), ValueError, "NaN in 1,536 of 1,536"),
        (
            np.full((2, 16, 16, 3), 200.0),
            ValueError,
            r"\[0, 1\], got \[200, 200\].*divide them by 255",
        ),
        (np.full((2, 16, 16, 3), -0.1), ValueError, r"\[0, 1\], got \[-0.1"),
        (np.full((2, 16, 16, 3), np.inf), ValueError, r"\[0, 1\], got \[inf"),
        (np.zeros((0, 16, 16, 3), np.uint8), ValueError, r"no pixels in images of shape \(0,"),
        ([np.zeros((2, 2, 3)), np.zeros((3, 3, 3))], ValueError, "must all have one size"),
    ],
)
def test_wrong_images_are_refused(untrained, images, error, message):
    for ask in (untrained.model.embed, untrained.model.ood_score):
        with pytest.raises(error, match=message):
            ask(images)


@pytest.mark.slow
def test_detector_is_calibrated_on_validation_or_given_images(run):
    dataset = data.load_dataset(**run.model.config["data"])
    train, validation = (data.load_resident(x) for x in (dataset.train, dataset.validation))
    detector = run.model.detector(0.1, "embedding/mahalanobis")
    scores = run.model.ood_score(validation, "embedding/mahalanobis")
    assert detector.threshold == np.sort(scores)[int(np.ceil(0.9 * (len(scores) + 1))) - 1]
    assert detector.is_outside(validation).mean() <= 0.1
    assert detector.is_outside(validation[0]).shape == ()
    given = run.model.detector(
        0.1, "embedding/mahalanobis", fit_images=train, calibration_images=validation
    )
    assert given.threshold == pytest.approx(detector.threshold, rel=1e-5)
    # On other images, half of the test set, the share of alarms is what was asked for, within 4
    # standard deviations of a beta-binomial share of 40 with 40 to calibrate.
    half = run.model.detector(0.2, "jevb/kl", calibration_images=run.test_images[:40]).is_outside(
        run.test_images[40:]
    )
    assert half.mean() <= 0.2 + 4 * np.sqrt(0.2 * 0.8 * (1 / 40 + 1 / 40))
    with pytest.raises(ValueError, match="needs at least 99 calibration scores, got 48"):
        run.model.detector(0.01)


def test_scores_that_cannot_be_made_are_refused(untrained, monkeypatch):
    with pytest.raises(
        ValueError, match=r"score must be one of \['embedding/knn_50'.*probe need labels"
    ):
        untrained.model.ood_score(untrained.test_images, "probe/energy")
    with pytest.raises(ValueError, match="not fitted to images"):
        untrained.model.ood_score(
            untrained.test_images, "embedding/norm", fit_images=untrained.test_images
        )
    fresh = untrained_model()

    def no_data(**_: Any) -> Any:
        raise FileNotFoundError("train.npz")

    monkeypatch.setattr(data, "load_dataset", no_data)
    assert len(fresh.ood_score(untrained.test_images, "embedding/norm")) == 80
    with pytest.raises(ValueError, match=r"train.npz\): pass fit_images= with"):
        fresh.ood_score(untrained.test_images, "embedding/mahalanobis")
    with pytest.raises(ValueError, match="pass calibration_images="):
        fresh.detector(score="embedding/norm")
    images = untrained.test_images
    own = fresh.ood_score(images, "embedding/mahalanobis", fit_images=images)
    embeddings = fresh.embed(images)
    rank = np.linalg.matrix_rank(embeddings - embeddings.mean(axis=0, keepdims=True))
    assert own.mean() == pytest.approx(rank, rel=0.02)


@pytest.mark.slow
def test_steps_are_found_or_named(run):
    steps = sorted(
        int(p.name) for p in (run.directory / "checkpoints").iterdir() if p.name.isdigit()
    )
    assert run.model.step == steps[-1] == 6
    assert load(run.directory, "best").step in steps
    assert load(run.directory, 3).step == 3
    assert not np.array_equal(
        load(run.directory, 3).embed(run.test_images[0]), run.model.embed(run.test_images[0])
    )
    with pytest.raises(CheckpointError, match=r"has checkpoints \[3, 6\], not 5"):
        load(run.directory, 5)
    with pytest.raises(FileNotFoundError, match=r"neither config.json .* nor model.json"):
        load(run.directory / "checkpoints")


@pytest.mark.slow
def test_a_run_from_before_a_setting_keeps_the_value_it_was_trained_by(run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "checkpoints").symlink_to(run.directory / "checkpoints")
    config = json.loads((run.directory / "config.json").read_text())
    for section, name in (
        ("model", "head_input"),
        ("model", "zero_init_residual"),
        ("jevb", "tails"),
        ("jevb", "normalized"),
        ("ood", "mixture_df"),
    ):
        del config[section][name]
    (copy / "config.json").write_text(json.dumps(config))
    old = load(copy)
    assert old.network.head_input == "embedding"
    assert (old.config["jevb"]["tails"], old.config["jevb"]["normalized"]) == ("joint", False)
    loaded: Any = runner.load_config(copy)
    assert loaded.model.head_input == "embedding"


def test_another_config_or_method_is_refused_by_name(run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "checkpoints").symlink_to(run.directory / "checkpoints")
    config = json.loads((run.directory / "config.json").read_text())
    config["model"]["width"] = 8
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointMismatchError, match=r"params.backbone.conv1_1.kernel: checkpoint has"
    ):
        load(copy, 6)
    config["model"]["depth"] = 8
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"another version .*'depth'"):
        load(copy)
    del config["model"]["depth"], config["ood"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"another version .*'ood'"):
        load(copy)


@pytest.mark.slow
def test_best_of_a_run_that_kept_none(run, tmp_path):
    (tmp_path / "checkpoints").symlink_to(run.directory / "checkpoints")
    config = json.loads((run.directory / "config.json").read_text())
    config["checkpoint"]["keep_best"] = 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"keep_best above 0, or give one of the steps \[3, 6\]"
    ):
        load(tmp_path, "best")


@pytest.mark.slow
def test_an_export_is_loaded_without_the_libraries_of_training(run, tmp_path):
    status = export_module.main([f"--workdir={run.directory}", f"--out={tmp_path}/out", "--step=6"])
    assert status == 0
    np.save(tmp_path / "images.npy", run.test_images)
    code = f"""
import sys
blocked = {{"orbax", "optax", "ml_collections", "distrax", "tensorflow_datasets", "grain", "matplotlib",
            "sklearn", "tensorflow", "torch", "tensorboardX"}}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocker())
import numpy as np, jevb_jax
images = np.load({str(tmp_path / "images.npy")!r})
model = jevb_jax.load({str(tmp_path / "out")!r})
np.savez({str(tmp_path / "got.npz")!r}, embedding=model.embed(images), mean=model.posterior(images).mean,
         kl=model.ood_score(images, "jevb/kl"),
         mahalanobis=model.ood_score(images, "embedding/mahalanobis", fit_images=images))
assert not blocked & {{name.split(".")[0] for name in sys.modules}}
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=environment)
    with np.load(tmp_path / "got.npz") as got:
        expected = {
            "embedding": run.model.embed(run.test_images),
            "mean": run.model.posterior(run.test_images).mean,
            "kl": run.model.ood_score(run.test_images, "jevb/kl"),
            "mahalanobis": run.model.ood_score(
                run.test_images, "embedding/mahalanobis", fit_images=run.test_images
            ),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(got[name], values, rtol=1e-3, atol=1e-4, err_msg=name)


def test_names_are_exported():
    assert jevb_jax.load is load
    assert jevb_jax.Model is Model
