"""`jevb_jax.load` against the numbers of evaluate.py, and every wrong input."""

import collections
import copy
import dataclasses
import io
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import jevb_jax
from configs import smoke
from jevb_jax import export as export_module
from jevb_jax import forward, loading
from jevb_jax import model as model_module
from jevb_jax.detector import Detector, write_model
from jevb_jax.evaluation import detection_metrics, features, knn, score_json, score_table
from jevb_jax.evaluation.gaussian_detectors import Gaussians
from jevb_jax.evaluation.score_table import OfFeature, ScoreSettings, TrainingData
from jevb_jax.forward import _with_progress
from jevb_jax.images import corruptions, pixels
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.images.batches import load_resident
from jevb_jax.images.dataset import load_dataset
from jevb_jax.images.given import GivenImages, check_images, refuse_shared
from jevb_jax.images.image_files import FolderSource
from jevb_jax.images.source import ArraySource, num_classes
from jevb_jax.loading import load, load_detector
from jevb_jax.model import Model
from jevb_jax.networks.heads import DirectionalPrediction, Posterior
from jevb_jax.networks.joint import ViewOutputs
from jevb_jax.paper.scores import UncertaintyTerms
from jevb_jax.runs.archive import ArchiveError
from jevb_jax.runs.checkpoints import CheckpointError, CheckpointMismatchError
from jevb_jax.settings import read, run_config
from jevb_jax.training.experiment import to_json_values
from tests.marks import nightly

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
    """A process of a user. It compiles as the suite does: each night also with all optimizations."""
    done = subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
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
    test = load_dataset(**short_config().data.to_dict()).test
    assert test is not None
    return Run(directory, results, load(directory), load_resident(test))


class Untrained(NamedTuple):
    model: Model
    test_images: np.ndarray


def untrained_model(*, batch_size: int = 32) -> Model:
    config = to_json_values(short_config())
    shapes = loading.variable_shapes(read.saved_settings(config))
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

    dataset = load_dataset(**run.model.config["data"])
    train, test = dataset.train, dataset.test
    assert train.labels is not None
    assert test is not None
    assert test.labels is not None
    images = {
        "train": load_resident(train),
        "test": run.test_images,
        "outside": corruptions.corrupt(run.test_images, "contrast", severity=5, seed=0),
    }
    np.savez(tmp_path / "images.npz", **images)
    default = run.results["ood"]["default_score"]
    files = (str(tmp_path / name) for name in ("images.npz", "found.npz"))
    python("-c", USER, str(run.directory), *files, *SCORES, default)
    found = np.load(tmp_path / "found.npz")

    for score in SCORES:
        auroc = detection_metrics.ood_metrics(
            found[f"test {score}"], found[f"outside {score}"]
        ).auroc
        assert auroc == pytest.approx(rows[score, "contrast_5"], abs=1e-6), score
    np.testing.assert_array_equal(found["test default"], found[f"test {default}"])
    for name in ("representation", "embedding"):
        (accuracy,) = knn.knn_accuracies(
            found[f"train {name}"],
            train.labels,
            found[f"test {name}"],
            test.labels,
            num_classes=num_classes(train),
            votes=[knn.Vote(20)],
        )
        (expected,) = (
            row["value"]
            for row in run.results["trained"]
            if (row["name"], row["features"]) == ("knn_20_accuracy", name)
        )
        assert accuracy == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
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
    large = np.repeat(np.repeat(images, 2, axis=1), 2, axis=2)  # 32 x 32, resized to 16 x 16
    assert np.corrcoef(untrained.model.embed(large).ravel(), embeddings.ravel())[0, 1] > 0.9
    assert untrained.model.ood_score(images[0], "embedding/norm").shape == ()
    assert untrained.model.posterior(images[0]).mean.shape == (16,)
    assert re.search("convnet, step 0, images 16x16x3", repr(untrained.model))


def test_many_images_are_compiled_once_and_padding_changes_nothing(untrained, monkeypatch):
    model = untrained_model()
    traces = []
    original = pixels.center_view
    monkeypatch.setattr(
        pixels, "center_view", lambda *a, **k: (traces.append(1), original(*a, **k))[1]
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


def same(got: Any, expected: Any) -> None:
    """But for rounding, which moves with the place of an array in memory."""
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Something smooth, and another thing at each end: what is squashed looks otherwise."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (3 + seed) + c) * np.cos(y / 5 - c) for c in range(3)]
    return np.rint(127.5 + 127.4 * np.stack(waves, axis=-1)).astype(np.uint8)


SIZES = ((16, 16), (28, 56), (57, 31), (9, 7), (16, 40), (200, 17))


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, size in enumerate(SIZES):
        Image.fromarray(photo(*size, seed=number)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_photos_are_seen_as_the_evaluation_sees_their_files(untrained, folder):
    model = untrained.model
    source = FolderSource(folder, image_size=16)
    seen = features.FeatureExtractor(
        model.network,
        view=ViewAugmentation(
            16,
            tuple(model.config["augmentation"]["mean"]),
            tuple(model.config["augmentation"]["std"]),
        ),
        batch_size=8,
    )(model.variables, source)
    photos = [photo(*size, seed=number) for number, size in enumerate(SIZES)]
    pictures = [Image.open(path) for path in source.paths]
    mixed = [*photos[:3], *pictures[3:]]
    for given in (photos, pictures, tuple(mixed), iter(mixed), np.array(photos, dtype=object)):
        same(model.embed(given), seen.embedding)
    same(model.represent(photos), seen.representation)
    for number in range(6):  # alone
        for one in (photos[number], pictures[number]):
            np.testing.assert_allclose(
                model.embed(one), seen.embedding[number], rtol=1e-4, atol=1e-5
            )
    # Floats are resized without the rounding of levels, which moves a pixel by less than 1/255.
    floats = model.embed([image / 255 for image in photos])
    similarity = np.sum(floats * seen.embedding, axis=1) / np.linalg.norm(floats, axis=1)
    np.testing.assert_allclose(similarity, np.linalg.norm(seen.embedding, axis=1), rtol=1e-3)


@pytest.mark.slow
def test_a_model_of_stored_images_cuts_photos_too(untrained):
    model = untrained.model.with_square_size(0)
    photos = [photo(*size) for size in ((28, 56), (48, 16), (16, 16), (30, 30))]
    together = model.embed(photos)
    for number, image in enumerate(photos):
        np.testing.assert_allclose(model.embed(image), together[number], rtol=1e-3, atol=1e-4)
    middle = model.embed(photos[1][16:32])
    np.testing.assert_allclose(together[1], middle, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "1", "CMYK"])
def test_pictures_of_every_mode_are_decoded_as_files_are(untrained, tmp_path, mode):
    rgb = Image.fromarray(photo(20, 30))
    picture = rgb.quantize(32) if mode == "P" else rgb.convert(mode)
    name = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    picture.save(name)
    picture = Image.open(name)
    assert picture.mode == mode
    read = FolderSource(tmp_path, image_size=16)[0]
    same(untrained.model.embed(picture), untrained.model.embed(read))


def test_arrays_of_every_type_and_layout_mean_the_same(untrained):
    model, images = untrained.model, untrained.test_images[:4]
    expected = model.embed(images)
    read_only = images.copy()
    read_only.flags.writeable = False
    levels = (
        read_only,
        np.asfortranarray(images),
        np.repeat(images, 2, axis=0)[::2],
        images[::-1][::-1],
        images.astype(np.int64),
        images.astype(np.int32).tolist(),
        list(images),
        jnp.asarray(images),
    )
    for given in levels:
        same(model.embed(given), expected)
    floats = model.embed((images / 255).astype(np.float32))
    np.testing.assert_allclose(floats, expected, rtol=1e-3, atol=1e-4)
    same(model.embed(images / 255), floats)
    assert np.abs(model.embed((images / 255).astype(np.float16)) - expected).max() < 0.05
    mask = images > 127
    same(model.embed(mask), model.embed(mask * np.uint8(255)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
def test_a_rounding_beyond_the_range_is_clipped(untrained, dtype):
    white = np.full((4, 16, 16, 3), 1.0, dtype)
    beyond = (
        np.nextafter(white, np.asarray(2, dtype)) if dtype != jnp.bfloat16 else white + dtype(2**-7)
    )
    assert (beyond > 1).all()
    model = untrained.model
    same(model.embed(beyond), model.embed(white))
    same(model.embed(np.full((4, 16, 16, 3), -1e-7, np.float32)), model.embed(white * 0))


@pytest.mark.parametrize("number", [True, "7", 2.5, 3.0, None])
def test_numbers_that_are_not_whole_are_refused(untrained, number):
    model = untrained.model
    with pytest.raises(TypeError, match="step must be one whole number, got"):
        Model(model.config, model.variables, step=number)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Model(model.config, model.variables, step=0, batch_size=0)
    with pytest.raises(ValueError, match="square_size must be at least 0, got -1"):
        Model(model.config, model.variables, step=0, square_size=-1)


def test_numbers_of_numpy_and_jax_are_numbers(untrained):
    model = untrained.model
    pairs: Any = ((np.int64(3), np.uint8(8)), (jnp.asarray(3), np.asarray(8)))
    for step, size in pairs:
        other = Model(model.config, model.variables, step=step, batch_size=size)
        assert (type(other.step), other.step, other.extractor()._batch_size) == (int, 3, 8)


@pytest.mark.slow
def test_what_is_drawn_for_an_image_depends_on_no_other(untrained):
    model = untrained.model

    def draw(_: Any, key: Any, outputs: Any) -> Any:
        return jnp.broadcast_to(jax.random.normal(key), outputs.embedding.shape[1])

    settings = features.TermsSettings(
        terms_of=draw,
        augmentation=model._forward.view,
        num_views=1,
    )
    extract = features.FeatureExtractor(
        model.network,
        view=model._forward.view,
        batch_size=8,
        terms=settings,
    )
    draws: Any = extract(model.variables, ArraySource(untrained.test_images[:20])).terms
    assert len(draws) == 20
    np.testing.assert_array_equal(draws, draws[0])
    first = jax.random.fold_in(jax.random.key(0), 0)
    expected = jax.random.normal(jax.random.fold_in(first, 0))  # of samples, not of a view
    assert draws[0] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("score", ["jevb/negative_elbo", "jevb/cross_view"])
def test_scores_and_verdicts_do_not_depend_on_the_place(untrained, score):
    model, images = untrained.model, untrained.test_images
    detector = model.detector(0.1, score, calibration_images=images[:40])
    scores = detector.score(images)
    assert np.std(scores) > 0
    order = np.random.default_rng(0).permutation(len(images))
    same(detector.score(images[order]), scores[order])
    others = images[40:]  # not those of which one is the threshold, but for rounding
    np.testing.assert_array_equal(
        detector.is_outside(others[::-1])[::-1], scores[40:] > detector.threshold
    )
    copies = detector.score(np.repeat(images[5:6], 32, axis=0))
    np.testing.assert_allclose(copies, copies[0], rtol=1e-5)
    np.testing.assert_allclose(copies[0], scores[5], rtol=1e-4)
    alone = untrained_model(batch_size=7).ood_score(images[5], score)
    np.testing.assert_allclose(alone, scores[5], rtol=1e-4)
    with jax.enable_x64(True):
        same(untrained_model().ood_score(images, score), scores)


@pytest.mark.slow
@pytest.mark.parametrize("score", [nightly("jevb/negative_elbo"), "jevb/mixture_and_residual"])
def test_any_order_and_any_split_give_an_image_the_same_score(untrained, score):
    """Networks and terms are equal bit for bit where calls are filled up to the same batch size.

    The mixture multiplies matrices, and the CPU rounds a row by its place in a block.
    """
    model, images = untrained.model, untrained.test_images
    is_fitted = model._score_entries[score].is_fitted
    scorer = model.scorer(score, images if is_fitted else None)
    random = np.random.default_rng(4)
    expected = model.scores_of(images, score, scorer)
    assert np.std(expected) > 0
    for _ in range(2):
        order = random.permutation(len(images))
        # Calls of 17 to 32 images are all filled up to the batch size of 32.
        ends = np.cumsum(random.integers(17, 33, size=5))
        for part in (order, *(part for part in np.split(order, ends) if len(part) > 16)):
            found = model.scores_of(images[part], score, scorer)
            if is_fitted:
                np.testing.assert_allclose(found, expected[part], rtol=1e-4)
            else:
                np.testing.assert_array_equal(found, expected[part])


def small_detector(
    model: Model, images: np.ndarray, score: str = "embedding/mahalanobis"
) -> Detector:
    fit_images = images[:40] if model._score_entries[score].is_fitted else None
    return model.detector(0.1, score, fit_images=fit_images, calibration_images=images[40:])


def test_a_threshold_from_images_of_the_fit_is_refused(untrained):
    model, images = untrained.model, untrained.test_images
    for fit_images in (images[:41], iter(images[:41])):
        with pytest.raises(ValueError, match="1 of 40 calibration_images are also fit_images"):
            model.detector(
                0.1, "embedding/mahalanobis", fit_images=fit_images, calibration_images=images[40:]
            )
    # Images of several sizes, and the same numbers in another type, which are other images.
    stacks = [np.zeros((3, 4, 4, 1), np.uint8), np.ones((2, 8, 2, 1), np.uint8)]
    rows = [np.arange(3), np.arange(3, 5)]
    some, same_bytes = GivenImages(stacks, rows, False), stacks[0][:1].view(np.bool_)
    other = GivenImages([np.ones((1, 4, 4, 1), np.uint8), same_bytes], [rows[0][:1]] * 2, False)
    refuse_shared(some, other)
    with pytest.raises(ValueError, match="5 of 5 calibration_images"):
        refuse_shared(some, some)


@pytest.mark.slow
def test_models_and_detectors_can_be_pickled_and_copied(untrained):
    images = untrained.test_images
    model = untrained_model()
    fresh = pickle.loads(pickle.dumps(model))  # before the first call
    expected = model.embed(images)
    detector = small_detector(model, images)
    scores = detector.score(images)
    for again in (fresh, pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
        same(again.embed(images), expected)
        assert repr(again) == repr(model)
        assert again.square_size == model.square_size
    for other in (pickle.loads(pickle.dumps(detector)), copy.deepcopy(detector)):
        np.testing.assert_allclose(other.score(images), scores, rtol=1e-3)
        assert other.threshold == detector.threshold


@pytest.mark.slow
def test_a_detector_is_saved_without_a_pickle(untrained, tmp_path):
    images = untrained.test_images
    for score in ("embedding/mahalanobis", "embedding/norm", "embedding/mahalanobis"):
        detector = small_detector(untrained.model, images, score)
        detector.save(tmp_path / "d")  # over the one before
        again = load_detector(tmp_path / "d")
        np.testing.assert_allclose(again.score(images), detector.score(images), rtol=1e-3)
        np.testing.assert_array_equal(
            again.is_outside(images[:40]), detector.is_outside(images[:40])
        )
        for name in ("score_name", "false_alarm_rate", "threshold"):
            assert getattr(again, name) == getattr(detector, name)
    names = {path.name for path in (tmp_path / "d").iterdir()}
    assert names == {"model.json", "model.safetensors", "detector.safetensors"}
    same(load(tmp_path / "d").embed(images[:32]), untrained.model.embed(images[:32]))
    with pytest.raises(ValueError, match=r"holds a model \(detector\): give another directory"):
        export_module.export_model(untrained.model, tmp_path / "d")
    content = bytearray((tmp_path / "d" / "detector.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "d" / "detector.safetensors").write_bytes(content)
    with pytest.raises(ArchiveError, match=r"detector.safetensors is not what was written"):
        load_detector(tmp_path / "d")
    with pytest.raises(FileNotFoundError, match=r"Detector.save writes it"):
        load_detector(tmp_path / "nothing")
    write_model(untrained.model, tmp_path / "m", manifest={}, extra_files={})
    with pytest.raises(ArchiveError, match="a model without a detector"):
        load_detector(tmp_path / "m")
    with pytest.raises(ValueError, match=r"holds a model \(export\)"):
        detector.save(tmp_path / "m")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run"):
        detector.save(tmp_path)


def test_a_score_that_is_not_a_number_is_an_alarm(untrained):
    images = untrained.test_images
    detector = small_detector(untrained.model, images, "embedding/norm")
    nothing = detector.model.with_variables(
        jax.tree.map(lambda x: x * np.nan, detector.model.variables)
    )
    assert dataclasses.replace(detector, model=nothing).is_outside(images).all()


@pytest.mark.slow
def test_a_detector_keeps_its_false_alarm_rate(untrained):
    # Exchangeable images: of 39 for the calibration, the 36th smallest score is above a new one's
    # with probability 36/40. Over splits of 120 images the mean share of alarms is 0.1.
    images = np.random.default_rng(2).integers(0, 256, (120, 16, 16, 3), np.uint8)
    rng = np.random.default_rng(3)
    orders = [rng.permutation(len(images)) for _ in range(60)]
    detectors = [
        untrained.model.detector(0.1, "embedding/norm", calibration_images=images[order[:39]])
        for order in orders
    ]
    shares = [
        detector.is_outside(images[order[39:]]).mean()
        for detector, order in zip(detectors, orders, strict=True)
    ]
    assert np.std(shares) > 0
    assert abs(np.mean(shares) - 0.1) < 4 * np.std(shares) / np.sqrt(len(shares))
    scores = -np.linalg.norm(
        untrained.model.embed(images[orders[0][:39]]).astype(np.float64), axis=1
    )
    assert detectors[0].threshold == pytest.approx(np.sort(scores)[35], rel=1e-5)


def fitted_scores(prediction: Any, terms: Any, size: int = 60) -> dict[str, Any]:
    random = np.random.default_rng(0)
    found = features.Features(
        random.normal(size=(size, 6)).astype(np.float32),
        random.normal(size=(size, 4)).astype(np.float32),
        prediction,
        terms,
        None,
    )
    settings = ScoreSettings(
        knn_k=(5,), ssd_clusters=(2,), residual_share=0.5, mixture_df=float("inf")
    )
    method = "vi_simsiam" if terms is None else "jevb"
    table = score_table.score_table(method, settings, num_views=2)
    train = TrainingData(found)
    return {
        name: (entry.make(train), found) for name, entry in table.items() if not entry.needs_labels
    }


@pytest.mark.slow
def test_every_score_is_rebuilt_from_json_and_arrays():
    random = np.random.default_rng(1)
    mean = jnp.asarray(random.normal(size=(60, 4)), jnp.float32)
    terms = UncertaintyTerms(*jnp.asarray(random.normal(size=(6, 60)), jnp.float32))
    scores = fitted_scores(Posterior(mean, jnp.exp(mean / 4)), terms)
    scores |= fitted_scores(DirectionalPrediction(mean, jnp.exp(mean[:, 0])), None)
    assert {"jevb/mixture_and_residual", "vi_simsiam/concentration", "embedding/knn_5"} <= set(
        scores
    )
    for name, (score, found) in scores.items():
        description, arrays = score_json.describe(score)
        again = score_json.rebuild(json.loads(json.dumps(description, allow_nan=False)), arrays)
        np.testing.assert_allclose(again(found), score(found), rtol=1e-6, err_msg=name)
        assert jax.tree.structure(again) == jax.tree.structure(score), name


def test_a_saved_score_holds_names_of_ours_alone():
    score = OfFeature(
        Gaussians(*(jnp.zeros(1), jnp.zeros((1, 1, 1)), jnp.zeros((1, 1)))), "embedding"
    )
    description, arrays = score_json.describe(score)
    assert sorted(arrays) == [
        f"score.score.{name}" for name in ("center", "whitened_mean", "whitening")
    ]
    with pytest.raises(score_json.SavedScoreError, match="no part of the score names"):
        score_json.rebuild(description, arrays | {"more": np.zeros(1)})
    with pytest.raises(score_json.SavedScoreError, match="center is missing"):
        score_json.rebuild(description, {})
    for wrong in (
        {"function": "os:system"},
        {"function": "..commands:train"},
        {"function": "commands:train"},
        {"function": "evaluation.gaussian_detectors:jnp"},
        {"function": "ood:jnp"},
        {"function": "ood:np"},
        {"class": "ood:DegenerateFeaturesError", "fields": {}},
        {"class": "ood:Gaussians", "fields": {"center": None}},
        {"code": "1"},
        [1],
    ):
        with pytest.raises(score_json.SavedScoreError):
            score_json.rebuild(wrong, {})
    with pytest.raises(TypeError, match=r"is not defined at the top of a module"):
        score_json.describe(lambda x: x)


def test_a_score_is_fitted_and_computed_in_32_bits_in_a_process_of_64(untrained):
    seen = []

    def score(features: Any) -> Any:
        seen.append(jnp.zeros(1).dtype)
        return features.embedding[:, 0] + jnp.zeros(1)

    def make(_: Any) -> Any:
        seen.append(jnp.zeros(1).dtype)
        return jax.tree_util.Partial(score)

    model = untrained_model()
    entry = score_table.ScoreEntry("embedding", False, False, make)
    model.__dict__["_score_entries"] = {"a/score": entry}
    encoder = jevb_jax.wrap(np.asarray).fit(np.eye(3, 4))
    encoder.__dict__["_entries"] = {"score": entry}
    with jax.enable_x64(True):
        scorer = model.scorer("a/score", None)
        values = model.scores_of(untrained.test_images[:5], "a/score", scorer)
        encoder.scorer("score")
    assert values.dtype == np.float32
    assert seen == [np.float32] * 3


@pytest.mark.slow
def test_a_process_of_64_bits_has_the_numbers_of_32(untrained, tmp_path):
    images = untrained.test_images
    model = untrained.model
    detector = small_detector(model, images)
    detector.save(tmp_path)
    with jax.enable_x64(True):
        loaded = load(tmp_path)
        for again in (loaded, model, untrained_model()):
            assert again.embed(images).dtype == np.float32
            same(again.embed(images), model.embed(images))
            same(again.posterior(images), model.posterior(images))
        again = load_detector(tmp_path).score(images)
        np.testing.assert_allclose(again, detector.score(images), rtol=1e-3)
        other = small_detector(loaded, images)
        assert jnp.zeros(1).dtype == np.float64  # the process keeps its own
    np.testing.assert_allclose(other.threshold, detector.threshold, rtol=1e-3)


@pytest.mark.slow
def test_a_run_is_loaded_at_steps_of_numpy_and_in_a_process_of_64_bits(run):
    expected = run.model.embed(run.test_images[:8])
    steps: Any = (np.int64(6), np.asarray([3, 6]).max(), jnp.asarray(6))
    for step in steps:
        assert type(load(run.directory, step).step) is int
    with pytest.raises(CheckpointError, match=r"step must be one of \[3, 6\].*got 5"):
        load(run.directory, np.int64(5))
    for number in (2.5, 6.0):
        with pytest.raises(TypeError, match=r"step must be one whole number, got"):
            load(run.directory, number)  # pyright: ignore[reportArgumentType]
    with jax.enable_x64(True):
        same(load(run.directory).embed(run.test_images[:8]), expected)


def test_a_threshold_that_cannot_be_is_known_before_the_fit(untrained, monkeypatch):
    monkeypatch.setattr(Model, "scorer", lambda *_: pytest.fail("fitted"))
    for rate, message in ((0.001, "needs at least 999"), (1.5, r"in \(0, 1\)")):
        with pytest.raises(ValueError, match=message):
            untrained.model.detector(
                rate, "embedding/mahalanobis", calibration_images=untrained.test_images
            )


def test_a_bar_appears_when_it_takes_long(monkeypatch):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True)
    batches = list(_with_progress(iter("abc"), total=3, console=console))
    assert batches == ["a", "b", "c"]
    assert "images" not in shown.getvalue()
    monkeypatch.setattr(forward, "_PROGRESS_AFTER_SECONDS", -1.0)
    assert list(_with_progress(iter("abc"), total=3, console=console)) == [*"abc"]
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
        ([np.zeros((2, 2, 3)), np.zeros((3, 3, 2))], ValueError, r"image 1 must have 1 or 3 chan"),
        ([[[[0.0]], [[0.0], [1.0]]]], ValueError, "nested lists .* must all have one size"),
        (np.zeros((2, 3, 16, 16), np.uint8), ValueError, r"channels come first, give np.moveaxis"),
        (np.zeros((5, 16, 16)), ValueError, r"gray images need an axis .*images\[\.\.\., None\]"),
        (np.zeros((16, 16, 4), np.uint8), ValueError, r"transparent images give images\[..., :3\]"),
        (np.full((16, 16, 3), 300, np.int64), ValueError, r"0 to 255, got \[300, 300\] of int64"),
        (np.full((16, 16, 3), 200, np.uint16), TypeError, r"uint16 in \[200, 200\].*not clear"),
        (np.full((16, 16, 3), 1.0011), ValueError, r"got \[1.0011, 1.0011\]: clip"),
        (np.full((16, 16, 3), -0.0011), ValueError, r"got \[-0.0011, -0.0011\]: clip"),
        (["a.png"], TypeError, "PIL.Image.open"),
        ([], ValueError, r"got shape \(0,\)"),
        (Image.new("I;16", (16, 16)), ValueError, "8 bits per channel, got mode I;16"),
    ],
)
def test_wrong_images_are_refused(untrained, images, error, message):
    for ask in (untrained.model.embed, untrained.model.ood_score):
        with pytest.raises(error, match=message):
            ask(images)


@pytest.mark.slow
def test_detector_is_calibrated_on_validation_or_given_images(run):
    dataset = load_dataset(**run.model.config["data"])
    train, validation = (load_resident(x) for x in (dataset.train, dataset.validation))
    detector = run.model.detector(0.1, "embedding/mahalanobis")
    scores = run.model.ood_score(validation, "embedding/mahalanobis")
    # The run has computed the threshold, in another process and by another program.
    threshold = np.sort(scores)[int(np.ceil(0.9 * (len(scores) + 1))) - 1]
    assert detector.threshold == pytest.approx(threshold, rel=1e-5)
    assert np.mean(scores > detector.threshold * (1 + 1e-5)) <= 0.1
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

    monkeypatch.setattr(model_module, "load_dataset", no_data)
    assert len(fresh.ood_score(untrained.test_images, "embedding/norm")) == 80
    with pytest.raises(ValueError, match=r"train.npz\)\. Pass fit_images= with"):
        fresh.ood_score(untrained.test_images, "embedding/mahalanobis")
    with pytest.raises(ValueError, match="Pass calibration_images="):
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
    with pytest.raises(CheckpointError, match=r"step must be one of \[3, 6\].*got 5"):
        load(run.directory, 5)
    with pytest.raises(FileNotFoundError, match=r"neither config.json .* nor model.json"):
        load(run.directory / "checkpoints")


@pytest.mark.slow
def test_a_run_from_before_a_setting_keeps_the_value_it_was_trained_by(run, tmp_path):
    other = tmp_path / "copy"
    other.mkdir()
    (other / "checkpoints").symlink_to(run.directory / "checkpoints")
    config = json.loads((run.directory / "config.json").read_text())
    for section, name in (
        ("model", "head_input"),
        ("model", "zero_init_residual"),
        ("model", "batch_norm"),
        ("jevb", "tails"),
        ("jevb", "normalized"),
        ("ood", "mixture_df"),
        ("ood", "csi_crops"),
        ("ood", "loss_prediction"),
    ):
        del config[section][name]
    (other / "config.json").write_text(json.dumps(config))
    old = load(other)
    assert old.network.head_input == "embedding"
    assert (old.config["jevb"]["tails"], old.config["jevb"]["normalized"]) == ("joint", False)
    loaded: Any = run_config.load_config(other)
    assert loaded.model.head_input == "embedding"


@pytest.mark.slow
def test_another_config_or_method_is_refused_by_name(run, tmp_path):
    other = tmp_path / "copy"
    other.mkdir()
    (other / "checkpoints").symlink_to(run.directory / "checkpoints")
    config = json.loads((run.directory / "config.json").read_text())
    config["model"]["width"] = 8
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointMismatchError, match=r"params.backbone.conv1_1.kernel: checkpoint has"
    ):
        load(other, 6)
    config["model"]["depth"] = 8
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"another version .*model\.depth is no setting"):
        load(other)
    del config["model"]["depth"], config["ood"]
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"another version .*lacks ood\.name"):
        load(other)


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
model._data = None  # no call of it: the default score needs no images of the run
np.savez({str(tmp_path / "got.npz")!r}, embedding=model.embed(images), mean=model.posterior(images).mean,
         kl=model.ood_score(images, "jevb/kl"),
         mahalanobis=model.ood_score(images, "embedding/mahalanobis", fit_images=images),
         default=model.ood_score(images), is_outside=model.detector(0.1).is_outside(images))
assert not blocked & {{name.split(".")[0] for name in sys.modules}}
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=environment)
    with np.load(tmp_path / "got.npz") as got:
        default = run.model.ood_score(run.test_images)
        threshold = run.model.detector(0.1).threshold
        is_clear = np.abs(default - threshold) > 1e-3 * np.abs(default)
        np.testing.assert_array_equal(got["is_outside"][is_clear], (default > threshold)[is_clear])
        expected = {
            "default": default,
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


def test_pictures_of_every_collection_are_pictures():
    """NumPy takes the numbers of a palette for levels."""
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 2, (3, 3)).astype(np.uint8), "P")
    picture.putpalette([250, 10, 20, 30, 240, 40])
    given = [picture, picture]
    wanted = np.stack([np.asarray(picture.convert("RGB"))] * 2)
    for images in (given, collections.deque(given), dict(enumerate(given)).values(), iter(given)):
        checked = check_images(images, num_channels=3, square_size=0)
        np.testing.assert_array_equal(checked.stacks[0], wanted)
        assert not checked.is_single
    with pytest.raises(TypeError, match="must be uint8"):
        check_images({"a": wanted}, num_channels=3, square_size=0)


def test_a_batch_far_larger_than_the_set_is_not_filled_up(monkeypatch):
    asked: list[int] = []

    def of_batch(self: Any, variables: Any, images: Any) -> Any:
        asked.append(len(images))
        return images

    monkeypatch.setattr(features.FeatureExtractor, "of_batch", of_batch)
    source = ArraySource(np.zeros((9, 1, 1, 3), np.uint8))
    for batch_size in (4, 512, 3_000_000):
        network: Any = None
        extract = features.FeatureExtractor(
            network, view=ViewAugmentation(1, (0.0,) * 3, (1.0,) * 3), batch_size=batch_size
        )
        masks = [mask for _, mask in extract.stream({}, source)]
        assert sum(mask.sum() for mask in masks) == 9
    assert asked == [4, 4, 4, 512, 4096]
