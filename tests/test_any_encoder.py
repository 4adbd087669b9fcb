"""Detectors on features of encoders that are not ours: plain functions, Flax, Equinox, PyTorch."""

import re
import types
from pathlib import Path
from typing import Any

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.covariance import EmpiricalCovariance
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

import jevb_jax
from configs import features
from jevb_jax import loading
from jevb_jax.any_encoder import FittedEncoder, WrappedEncoder
from jevb_jax.any_encoder_training import TrainedEncoder
from jevb_jax.detector import TrainedDetector
from jevb_jax.evaluation.detector_input import DegenerateFeaturesError
from jevb_jax.evaluation.score_table import ScoreSettings
from jevb_jax.model import Model
from jevb_jax.runs import archive
from jevb_jax.runs.archive import ArchiveError
from jevb_jax.settings import read
from jevb_jax.sklearn_transformer import JEVBTransformer
from jevb_jax.training.experiment import to_json_values

WIDTH = 6
SETTINGS = ScoreSettings(knn_k=(3,), ssd_clusters=(1,), residual_share=0.5, mixture_df=5.0)


def vectors(seed: int, count: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(WIDTH, WIDTH))
    return (rng.normal(size=(count, WIDTH)) @ mixing + 5 + shift).astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> FittedEncoder:
    return jevb_jax.wrap(np.asarray, batch_size=16).fit(vectors(1, 100), settings=SETTINGS)


def test_scores_are_those_of_scikit_learn(fitted):
    train, test = vectors(1, 100), vectors(2, 37)
    covariance = EmpiricalCovariance().fit(train.astype(np.float64))
    np.testing.assert_allclose(
        fitted.ood_score(test), covariance.mahalanobis(test.astype(np.float64)), rtol=1e-3
    )
    neighbors = NearestNeighbors(n_neighbors=3, metric="cosine").fit(train.astype(np.float64))
    distance = neighbors.kneighbors(test.astype(np.float64))[0][:, -1]
    found = fitted.ood_score(test, "knn_3")
    np.testing.assert_allclose(np.argsort(found), np.argsort(distance))


def test_every_score_prefers_shifted_features_and_ignores_the_batch(fitted):
    inside, outside = vectors(2, 21), vectors(3, 21, shift=-30.0)
    other_batches = WrappedEncoder(np.asarray, 5).fit(vectors(1, 100), settings=SETTINGS)
    assert {"knn_3", "mahalanobis", "ssd_1", "residual", "norm"} <= set(fitted.score_names())
    for score in fitted.score_names():
        values = np.concatenate([fitted.ood_score(part, score) for part in (inside, outside)])
        assert values.dtype == np.float32
        if score != "norm":  # small features count as strange
            assert roc_auc_score(np.arange(42) >= 21, values) > 0.95, score
        again = other_batches.ood_score(np.concatenate([inside, outside])[::-1], score)[::-1]
        np.testing.assert_allclose(again, values, rtol=1e-5, atol=1e-5)


def test_detector_keeps_its_false_alarm_rate_and_survives_a_save(fitted, tmp_path):
    assert repr(fitted) == "FittedEncoder(100 images, 6 features)"
    detector = fitted.detector(vectors(4, 199), false_alarm_rate=0.1)
    assert re.fullmatch(
        r"WrappedDetector\(mahalanobis, threshold [\d.]+, false_alarm_rate 0.1, 6 features\)",
        repr(detector),
    )
    assert detector.is_outside(vectors(5, 2000)).mean() == pytest.approx(0.1, abs=0.05)
    assert detector.is_outside(vectors(3, 20, shift=-30.0)).all()
    assert detector.is_outside(np.full((1, WIDTH), np.nan, np.float32)).all()
    detector.save(tmp_path)
    detector.save(tmp_path)
    again = fitted.encoder.load_detector(tmp_path)
    queries = vectors(6, 9)
    np.testing.assert_array_equal(again.score(queries), detector.score(queries))
    assert (again.threshold, again.score_name) == (detector.threshold, detector.score_name)
    with pytest.raises(ArchiveError, match=r"jevb_jax\.wrap"):
        jevb_jax.load(tmp_path)
    with pytest.raises(ValueError, match="width of the fitted ones, 6, got 4"):
        again.score(queries[:, :4])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArchiveError, match="not what was written"):
        fitted.encoder.load_detector(tmp_path)


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(5)(x.reshape(len(x), -1))


def linen_encoder() -> Any:
    network = LinenNetwork()
    variables = network.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    return lambda images: network.apply(variables, images)


def equinox_encoder() -> Any:
    layer = equinox.nn.Linear(48, 5, key=jax.random.key(0))
    return jax.jit(lambda images: jax.vmap(layer)(images.reshape(len(images), -1)))


def bfloat16_encoder() -> Any:
    return lambda images: jnp.asarray(images, jnp.bfloat16).reshape(len(images), -1)[:, ::10]


def nnx_encoder() -> Any:
    layer = nnx.Linear(48, 5, rngs=nnx.Rngs(0))
    return nnx.jit(lambda images: layer(images.reshape(len(images), -1)))


def onnx_encoder() -> Any:
    """A session of a model of one matrix product, made here."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    weights = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)
    helper = onnx.helper
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["features"]),
    ]
    single = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("images", single, ["n", 4, 4, 3])],
        [helper.make_tensor_value_info("features", single, ["n", 5])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return lambda images: session.run(None, {"images": images})[0]


ENCODERS = [linen_encoder, nnx_encoder, equinox_encoder, onnx_encoder, bfloat16_encoder]


@pytest.mark.parametrize("make", ENCODERS)
def test_jax_encoders(make):
    images = np.random.default_rng(0).uniform(size=(70, 4, 4, 3)).astype(np.float32)
    fitted = jevb_jax.wrap(make(), batch_size=32).fit(images[:50])
    scores = fitted.ood_score(np.concatenate([images[50:], 9 * images[50:]]), "mahalanobis")
    assert np.isfinite(scores).all()
    assert scores[:20].max() < scores[20:].min()


def test_torch_encoder():
    torch = pytest.importorskip("torch")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
    images = torch.rand(60, 3, 4, 4)
    with pytest.raises(ValueError, match=r"return features\.detach\(\)"):
        jevb_jax.wrap(network).features(images)
    fitted = jevb_jax.wrap(lambda batch: network(batch).detach()).fit(images[:50])
    assert np.isfinite(fitted.ood_score(images[50:])).all()


@pytest.mark.slow
@pytest.mark.nightly
def test_train_gives_an_encoder_a_posterior_and_jevb_s_scores():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(300, 4, 4, 3)).astype(np.float32)
    encoder = jevb_jax.wrap(linen_encoder(), batch_size=64)
    settings: Any = {"embedding_dim": 4, "hidden_dim": 16, "num_epochs": 2, "batch_size": 64}
    trained = encoder.train(images[:200], **settings)
    again = JEVBTransformer(**settings).fit(encoder.features(images[:200]))
    new = images[200:]
    posterior = trained.posterior(new)
    np.testing.assert_array_equal(
        posterior.mean, again.model_.posterior(encoder.features(new)).mean
    )
    assert posterior.scale.shape == (100, 4)
    assert (posterior.scale > 0).all()
    np.testing.assert_array_equal(trained.embed(new), again.transform(encoder.features(new)))
    np.testing.assert_allclose(
        trained.ood_score(new), -again.score_samples(encoder.features(new)), rtol=1e-6
    )
    norm = np.linalg.norm(trained.embed(new).astype(np.float64), axis=1)
    np.testing.assert_allclose(trained.ood_score(new, "embedding/norm"), -norm, rtol=1e-5)
    # JEVB's own terms are means over views, so they only follow those of the row as it is.
    entropy = np.log(posterior.scale).sum(axis=1)
    found = trained.ood_score(new, "jevb/posterior_entropy")
    assert np.corrcoef(entropy, found)[0, 1] > 0.5
    detector = trained.detector(new, 0.1, "embedding/mahalanobis")
    assert detector.is_outside(new).sum() <= 10
    assert trained.detector(new).score_name == "jevb/mixture_and_residual"
    assert detector.is_outside(50 * rng.normal(size=(20, 4, 4, 3))).mean() > 0.9
    with pytest.raises(ValueError, match=r"score must be one of .*jevb/kl.*, got 'mahalanobis'"):
        trained.ood_score(new, "mahalanobis")
    with pytest.raises(ValueError, match="calibration"):
        trained.detector(new[:5], 0.05)
    with pytest.raises(TypeError, match="no_such"):
        encoder.train(images, no_such=1)


def untrained(tmp_path: Path, encoder: WrappedEncoder) -> TrainedEncoder:
    """JEVB on features with random weights; nothing is compiled for it."""
    train = encoder.features(vectors(1, 100))
    np.savez(tmp_path / "train.npz", features=train, labels=np.arange(len(train)) % 2)
    config: Any = features.get_config()
    config.data.train_paths = config.data.test_paths = (str(tmp_path / "train.npz"),)
    config.feature_views.num_features = WIDTH
    config.model.projector_hidden_dims, config.model.embedding_dim = (8,), 4
    config.model.head_hidden_dim = 8
    values = to_json_values(config)
    shapes = loading.variable_shapes(read.saved_settings(values))
    random = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: random.uniform(0.1, 1, leaf.shape).astype(leaf.dtype), shapes
    )
    return TrainedEncoder(encoder, Model(values, variables, step=0), train)


def test_a_trained_detector_survives_a_save_with_its_networks(fitted, tmp_path):
    encoder = jevb_jax.wrap(lambda rows: np.asarray(rows)[:, ::-1], batch_size=16)
    trained = untrained(tmp_path, encoder)
    detector = trained.detector(vectors(4, 199), 0.1, "embedding/mahalanobis")
    queries = np.concatenate([vectors(6, 9), vectors(3, 9, shift=-30.0)])
    scores = detector.score(queries)
    np.testing.assert_array_equal(scores, trained.ood_score(queries, "embedding/mahalanobis"))
    detector.save(tmp_path / "saved")
    again = encoder.load_detector(tmp_path / "saved")
    assert isinstance(again, TrainedDetector)
    assert repr(trained).startswith("TrainedEncoder(100 images, Model(jevb, ")
    assert repr(again).startswith("TrainedDetector(Detector(embedding/mahalanobis, threshold ")
    np.testing.assert_allclose(again.score(queries), scores, rtol=1e-6)
    np.testing.assert_array_equal(again.is_outside(queries), detector.is_outside(queries))
    assert again.is_outside(queries).sum() >= 9
    for name in ("score_name", "threshold", "false_alarm_rate"):
        assert getattr(again, name) == getattr(detector, name)
    # Without the encoder, the same directory is a detector of features.
    of_features = jevb_jax.load_detector(tmp_path / "saved")
    np.testing.assert_allclose(of_features.score(queries[:, ::-1]), scores, rtol=1e-6)
    with pytest.raises(ValueError, match=r"6 features"):
        jevb_jax.wrap(lambda rows: np.asarray(rows)[:, :4]).load_detector(tmp_path / "saved").score(
            queries
        )
    with pytest.raises(ValueError, match="holds a model"):  # of the other kind
        fitted.detector(vectors(4, 30)).save(tmp_path / "saved")


def test_a_detector_with_its_own_encoder_is_refused(fitted, tmp_path, monkeypatch):
    archive.write_archive(tmp_path, arrays={}, manifest={"detector": {}}, extra_files={})
    of_images = types.SimpleNamespace(model=types.SimpleNamespace(num_features=0))
    monkeypatch.setattr(loading, "load_detector", lambda directory: of_images)
    with pytest.raises(ArchiveError, match=r"read it with jevb_jax\.load_detector"):
        fitted.encoder.load_detector(tmp_path)


def test_lists_of_images_of_any_kind():
    encoder = jevb_jax.wrap(lambda texts: [[len(t), t.count("a")] for t in texts], batch_size=2)
    np.testing.assert_array_equal(encoder.features(["aa", "b", "ab"]), [[2, 2], [1, 0], [2, 1]])


class Unreadable:
    def __array__(self, *arguments: Any, **keywords: Any) -> np.ndarray:
        raise RuntimeError("can't convert a tensor that requires grad")


@pytest.mark.parametrize(
    ("features_fn", "error", "match"),
    [
        (
            lambda x: Unreadable(),
            ValueError,
            r"Unreadable: can't convert(.|\n)*detach\(\)\.cpu\(\)",
        ),
        (lambda x: np.zeros((len(x), 2, 2, 3)), ValueError, "Average feature maps"),
        (lambda x: np.zeros(3), ValueError, r"one row for each of the 10 images, got shape \(3,\)"),
        (lambda x: np.zeros((1, 4)), ValueError, r"got shape \(1, 4\)"),
        (lambda x: np.zeros((len(x), 0)), ValueError, r"got shape \(10, 0\)"),
        (lambda x: np.zeros((len(x), 4), complex), TypeError, "real numbers, got complex128"),
        (lambda x: np.array([["a"]] * len(x)), TypeError, "real numbers, got <U1"),
        (lambda x: np.full((len(x), 4), np.nan), ValueError, "10 of 10 rows hold NaN"),
        (lambda x: np.zeros((len(x), len(x))), ValueError, "of one width, got 10 and 2"),
    ],
)
def test_features_that_cannot_be_used(features_fn, error, match):
    images = np.zeros((12 if "one width" in match else 10, 3))
    with pytest.raises(error, match=match):
        jevb_jax.wrap(features_fn, batch_size=10).fit(images)


def test_other_mistakes(fitted, tmp_path):
    with pytest.raises(TypeError, match=r"features_fn must be a function .*got ndarray"):
        jevb_jax.wrap(np.zeros(3))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"images must have a length and slices.*got generator"):
        fitted.encoder.fit(row for row in vectors(1, 9))
    with pytest.raises(ValueError, match="1 of 9 rows hold NaN"):
        fitted.encoder.train(np.where(np.arange(9)[:, None] == 3, np.nan, vectors(1, 9)))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        jevb_jax.wrap(np.asarray, batch_size=0)
    with pytest.raises(ValueError, match="at least one image"):
        fitted.ood_score(np.zeros((0, WIDTH)))
    with pytest.raises(ValueError, match="score must be one of"):
        fitted.ood_score(vectors(1, 2), "knn_50")
    with pytest.raises(ValueError, match="at least 19 calibration scores, got 5"):
        fitted.detector(vectors(1, 5))
    constant = jevb_jax.wrap(np.asarray).fit(np.ones((9, 3)))
    with pytest.raises(DegenerateFeaturesError, match="do not vary"):
        constant.ood_score(np.ones((2, 3)))
    with pytest.raises(FileNotFoundError, match=r"holds no model\.json"):
        fitted.encoder.load_detector(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run"):
        fitted.detector(vectors(4, 30)).save(tmp_path)


PAGE = Path(__file__).parents[1] / "docs" / "any_encoder.md"


def code_of_page() -> dict[str, str]:
    """The code of each part of the page, by heading; several blocks of a part are one program."""
    parts = re.split(r"(?m)^##? ", PAGE.read_text(encoding="utf-8"))[1:]
    return {
        part.splitlines()[0]: "\n".join(
            line[4:] for line in part.splitlines() if line.startswith("    ") or not line
        )
        for part in parts
    }


def test_the_page_runs():
    code = code_of_page()
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(150, 4, 4, 1)).astype(np.float32)
    linen = nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(5)])
    layer = equinox.nn.Linear(16, 5, key=jax.random.key(0))
    names: dict[str, Any] = {
        "jax": jax,
        "jevb_jax": jevb_jax,
        "images": images[:20],
        "train_images": images[20:100],
        "other_ordinary_images": images[100:],
        "features": images[:20].reshape(20, -1),
        "train_features": images[20:100].reshape(80, -1),
        "features_fn": lambda batch: batch.reshape(len(batch), -1),
    }
    first, _, sklearn, transformer, existing, flax, eqx = list(code)[:7]
    assert (existing, flax, eqx) == ("Features that exist already", "Flax", "Equinox")
    exec(code[first], names)
    assert names["alarms"].shape == names["scores"].shape == (20,)
    exec(code[sklearn], names)
    assert set(names["labels"]) <= {1, -1}
    exec(code[existing], names)
    assert names["scores"].shape == (20,)
    variables = linen.init(jax.random.key(0), images)
    exec(code[flax], {**names, "network": linen, "variables": variables})
    exec(code[eqx], {**names, "network": lambda image: layer(image.reshape(-1))})
    for text in (code[transformer], *list(code.values())[7:]):
        compile(text, str(PAGE), "exec")


@pytest.mark.slow
@pytest.mark.nightly
def test_the_training_of_the_page_runs():
    rows = np.random.default_rng(0).normal(size=(120, 5)).astype(np.float32)
    names: dict[str, Any] = {
        "encoder": jevb_jax.wrap(np.asarray),
        "images": rows[:20],
        "train_images": rows[20:80],
        "other_ordinary_images": rows[80:],
    }
    exec(code_of_page()["JEVB's posterior for your encoder"], names)
    assert names["posterior"].mean.shape == (20, 64)
    assert names["scores"].shape == names["alarms"].shape == (20,)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_transformer_of_the_page_runs():
    rows = np.random.default_rng(0).normal(size=(60, 5))
    names: dict[str, Any] = {"features": rows[:20], "train_features": rows[20:]}
    exec(code_of_page()["JEVB as a scikit-learn transformer"], names)
    assert names["embeddings"].shape == (20, 64)
    assert names["ordinary"].shape == (20,)
