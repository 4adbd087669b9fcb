"""ONNX: onnxruntime computes what JAX and the model compute, and what cannot be written says so."""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from jax import lax
from sklearn.datasets import load_sample_images

import jevb_jax
from jevb_jax import export
from jevb_jax.evaluation import score_table
from jevb_jax.images.arrays import digits
from jevb_jax.model import Model
from jevb_jax.runs.archive import ArchiveError
from jevb_jax.to_onnx import check, convert
from jevb_jax.to_onnx.graph import ConversionError
from jevb_jax.training import experiment
from tests.test_export import small_model
from tests.test_model_names import tiles
from tests.training.test_feature_run import config_of


def written(function, shape, dtype=np.float32) -> bytes:
    return convert.to_onnx(
        function,
        input_name="x",
        shape=shape,
        dtype=dtype,
        metadata={"note": "a text"},
        producer=("tests", "1"),
    )


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# --- One operation at a time ----------------------------------------------------------------------

_KERNEL = normal(3, 3, 4, 6)
_TABLE = normal(5, 6)


def convolved(x, padding, strides, groups=1):
    kernel = jnp.asarray(_KERNEL)[:, :, : 4 // groups]
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=numbers, feature_group_count=groups
    )


def picked(x):
    """Rows and elements at places that depend on the example, as the mixture picks them."""
    values, places = jax.vmap(lambda row: lax.top_k(row, 2))(x)
    rows = jnp.asarray(_TABLE.T).at[places].get(mode="promise_in_bounds")
    changed = jax.vmap(lambda row, place, new: row.at[place].set(-new))(x, places, values)
    return {"values": values, "rows": rows, "changed": changed, "places": places}


def looped(x):
    """A loop with a state, fixed values, rows, the same row again, and outputs of each step."""

    def step(state, rows):
        state = rows[0] + 0.5 * state * x - rows[1]
        return state, state.sum(axis=-1)

    steps = jnp.asarray(_TABLE)[:, None, :]
    again = jnp.broadcast_to(jnp.tanh(x)[None], (5, *x.shape))
    last, sums = lax.scan(step, jnp.zeros_like(x), (steps, again))
    return {"last": last, "sums": sums.T}


@jax.custom_vjp
def _halved(x):
    return x / 2


_halved.defvjp(lambda x: (x / 2, None), lambda _, given: (given / 2,))


CASES = {
    # Where an even image is padded on one side only.
    "same, stride 2": ((8, 10, 4), lambda x: convolved(x, "SAME", (2, 2))),
    "padded, stride 2": ((8, 10, 4), lambda x: convolved(x, [(1, 1), (2, 0)], (2, 1))),
    "groups": ((6, 6, 4), lambda x: convolved(x, "VALID", (1, 1), groups=2)),
    "max pool": (
        (7, 8, 3),
        lambda x: lax.reduce_window(
            x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (2, 1), (0, 1), (0, 0))
        ),
    ),
    "matrix": ((4, 6), lambda x: jnp.einsum("bij,kj->bik", x, jnp.asarray(_TABLE))),
    "matrix, other axis": ((6, 4), lambda x: jnp.einsum("bij,ki->bjk", x, jnp.asarray(_TABLE))),
    "attention": ((4, 2, 6), lambda x: jnp.einsum("bqhd,bkhd->bhqk", x, x)),
    "two axes": ((4, 6), lambda x: jnp.einsum("bij,ij->b", x, jnp.asarray(_TABLE[:4]))),
    "outer": ((6,), lambda x: x[:, :, None] * x[:, None, :]),
    "elements": (
        (6,),
        lambda x: jnp.where(x > 0, jnp.tanh(x), jnp.exp(x)) / jnp.sqrt(1 + x**2) + jnp.sign(x),
    ),
    "powers": ((6,), lambda x: lax.integer_pow(x, 3) + lax.integer_pow(x, -2) + lax.rsqrt(x * x)),
    "polynomial": ((6,), lambda x: jnp.polyval(jnp.array([2.0, -1.0, 0.5, 3.0]), x)),
    "special": ((6,), lambda x: lax.erf(x) + jax.nn.sigmoid(x) + jnp.floor(x) - jnp.ceil(3 * x)),
    "softmax": ((6,), lambda x: jax.nn.softmax(x) + jax.nn.logsumexp(x, axis=-1)[:, None]),
    "bounds": ((6,), lambda x: jnp.clip(x, -0.5, 0.5) + lax.clamp(0.0, x, 1.0)),
    "rounded": ((6,), lambda x: jnp.rint(4 * x) + jnp.round(2 * jnp.rint(4 * x) / 4)),
    "whole numbers": ((6,), lambda x: (x * 10).astype(jnp.int32).astype(jnp.float32)),
    "any, all": (
        (4, 6),
        lambda x: {
            "any": (x > 1.5).any(axis=-1),
            "all": jnp.all(x[..., :2] > -1, axis=(1, 2)),
            "either": jnp.where(x[:, 0] > 0, x[:, 1] > 0, x[:, 2] <= 0),
            "unequal": x != jnp.abs(x),
        },
    ),
    "least, most": ((4, 6), lambda x: {"least": x.min(axis=1), "most": x.max(axis=(1, 2))}),
    "sorted": ((6,), lambda x: jnp.sort(x, axis=-1)[:, 1:5:2]),
    "picked": ((6,), picked),
    "columns": ((6,), lambda x: jnp.concatenate([x[:, 3:], x[:, :1]], axis=1)[..., None]),
    "looped": ((6,), looped),
    "reversed loop": (
        (6,),
        lambda x: lax.scan(lambda s, _: (s * x, s), x, length=3, reverse=True)[1].swapaxes(0, 1),
    ),
    "functions called": ((6,), lambda x: jax.checkpoint(_halved)(jax.jit(jnp.tanh)(x) + x)),
    # What depends on no image has a row for each image all the same.
    "constant": ((6,), lambda x: jnp.zeros_like(x) + lax.lgamma(jnp.float32(4.5))),
    "constant rows": (
        (2, 3),
        lambda x: jnp.broadcast_to(jnp.arange(3.0), x.shape).sum(axis=2) + x.reshape(-1, 6)[:, :2],
    ),
    "flattened": (
        (2, 3),
        lambda x: (x + 1).reshape(x.shape[0], 6).T.reshape(3, 2, -1).sum(axis=0).T,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operation_is_that_of_jax(name):
    shape, function = CASES[name]

    def of_names(x):
        found = function(x)
        return found if isinstance(found, dict) else {"y": found}

    content = written(of_names, shape)
    for count in (5, 1):
        x = normal(5, *shape)[:count]
        found, wanted = check.run(content, x), jax.device_get(jax.jit(of_names)(x))
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[key].dtype == value.dtype, key
            np.testing.assert_allclose(found[key], value, rtol=2e-6, atol=2e-6, err_msg=key)


def test_logarithms_near_one_keep_all_digits():
    """The oracle is NumPy in float64."""
    x = np.array([0, 1e-30, 1e-8, -1e-8, 1e-7, 3e-4, -0.3, 1, 5e7, 1e38, np.inf, -1, -2, np.nan])
    x = x.astype(np.float32)[:, None]
    found = check.run(written(lambda x: {"y": jnp.log1p(x)}, (1,)), x)["y"]
    with np.errstate(all="ignore"):
        wanted = np.log1p(x.astype(np.float64))
    np.testing.assert_allclose(found, wanted, rtol=3e-7)


def test_numbers_are_rounded_to_powers_of_two_as_jax_does():
    """The oracle is NumPy's view of the bits: a carry from the mantissa, ties to even exponents."""
    edges = np.array([0, np.inf, -np.inf, 3e38, 1e-40, 1.2e-38], np.float32)
    powers = 2.0 ** np.arange(-126, 128)
    shares = np.array([1, 1.2, 1.4999999, 1.5, 1.5000001, 1.8, 1.9999999])
    x = np.concatenate([edges, (powers[:, None] * shares).ravel(), -3.3 * powers[:-2]])
    x = x.astype(np.float32)[:, None]
    bits = x.view(np.uint32)
    is_odd = (bits >> 23) & 1
    wanted = ((bits + 0x3FFFFF + is_odd) & 0xFF800000).astype(np.uint32).view(np.float32)
    wanted = np.where(np.abs(x) < 2.0**-126, 0, wanted)  # XLA flushes what is subnormal

    def function(x):
        return {"y": lax.reduce_precision(x, exponent_bits=8, mantissa_bits=0)}

    content = written(function, (1,))
    np.testing.assert_array_equal(check.run(content, x)["y"], wanted)
    nan = np.full((1, 1), np.nan, np.float32)
    assert np.isnan(check.run(content, nan)["y"])


def test_what_is_not_finite_is_passed_on():
    x = np.array([[np.nan, 1], [np.inf, 2], [-np.inf, 3], [4, 5]], np.float32)

    def function(x):
        return {
            "finite": jnp.isfinite(x).all(axis=1),
            "max": jnp.maximum(x, 0.0),
            "min": jnp.minimum(x[:, 0], x[:, 1]),
            "most": x.max(axis=1),
            "below": x[:, 0] <= 2,
        }

    found = check.run(written(function, (2,)), x)
    for key, value in function(jnp.asarray(x)).items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: lax.lgamma(x), "operation lgamma is not among those"),
        (lambda x: lax.while_loop(lambda y: y.sum() < 9, lambda y: y + 1, x), "operation while"),
        (lambda x: x.astype(jnp.bfloat16) * 2, "computes with bfloat16"),
        (lambda x: lax.scan(lambda s, _: (s * x, None), x, length=999)[0], "loop of 999 steps"),
        (lambda x: lax.reduce_precision(x, 8, 7), "keeps 7 bits"),
        (
            lambda x: jnp.ones((x.shape[0] * 2, 2)) + x.sum(),
            r"array of 2\*b rows",
        ),
        (lambda x: x + x.shape[0], "computes with the batch size"),
    ],
)
def test_what_cannot_be_written_is_named(function, message):
    with pytest.raises(ConversionError, match=message):
        written(lambda x: {"y": function(x)}, (3,))


def test_a_file_that_computes_something_else_is_refused():
    x = normal(3, 4)
    content = written(lambda x: {"y": x, "z": x.sum(axis=1)}, (4,))
    assert (
        check.largest_difference(content, lambda x: {"y": x, "z": x.sum(axis=1)}, x, at_most=1e-6)
        < 1e-6
    )
    for other, message in (
        (lambda x: {"y": x * 1.1, "z": x.sum(axis=1)}, r"y differs from JAX's by 9\.\de-02"),
        (lambda x: {"y": x, "z": x.sum(axis=1) * jnp.nan}, "z differs from JAX's by inf"),
        (lambda x: {"y": x}, "z has another shape or type"),
        (lambda x: {"y": x, "z": x}, "z has another shape or type"),
    ):
        with pytest.raises(ConversionError, match=message):
            check.largest_difference(content, other, x, at_most=0.01)


# --- Exports --------------------------------------------------------------------------------------


def detector_of(model, score=None):
    images = digits().images
    name = score or score_table.default_score(model.settings)
    is_fitted = score_table.scores_of_run(model.settings, has_labels=False)[name].is_fitted
    fit_images = images[:300] if is_fitted else None
    return model.detector(0.05, name, fit_images=fit_images, calibration_images=images[300:500])


def assert_computes_the_same(content, model, detector, images, *, of_score=1e-5, quick=False):
    """The oracle is the model itself, which shares none of the graph."""
    wanted = {"embedding": model.embed(images)}
    if not quick:
        wanted["representation"] = model.represent(images)
    if model.settings.method == "jevb" and not quick:
        wanted["posterior_mean"], wanted["posterior_scale"] = model.posterior(images)
    scores = detector.score(images)
    most = of_score * np.abs(scores).max()
    near = np.abs(scores - detector.threshold) < most
    for count in (len(images), 1):
        found = check.run(content, images[:count])
        assert quick or found.keys() == {*wanted, "score", "is_outside"}
        for name, values in wanted.items():
            apart = np.linalg.norm(found[name] - values[:count]) / np.linalg.norm(values[:count])
            assert apart < 1e-5, name
        np.testing.assert_allclose(found["score"], scores[:count], rtol=0, atol=most)
        verdicts = np.where(near[:count], found["is_outside"], scores[:count] > detector.threshold)
        np.testing.assert_array_equal(found["is_outside"], verdicts)
        assert found["is_outside"].dtype == np.bool_
    assert near.mean() < 0.2 or of_score > 1e-5


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export of a tiny network for digits, with a detector, and what made it."""
    directory = tmp_path_factory.mktemp("onnx") / "digits"
    model = small_model()
    detector = detector_of(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "detector", lambda self, rate: detector)
        export.export_model(model, directory, false_alarm_rate=0.05, onnx=True)
    return directory, model, detector


@pytest.mark.slow
def test_digits_are_embedded_and_scored_as_by_the_model(exported):
    directory, model, detector = exported
    images = digits().images[500:700]
    content = export.read_onnx(directory, export.ONNX_DETECTOR)
    assert_computes_the_same(content, model, detector, images)
    plain = check.run(export.read_onnx(directory), images)
    assert plain.keys() == {"embedding", "representation", "posterior_mean", "posterior_scale"}
    # The other form of the same functions.
    served: Any = export.read_serving(directory, export.SERVED_DETECTOR).call(images)
    found = check.run(content, images)
    assert served.keys() == found.keys()
    for name, values in served.items():
        assert found[name].dtype == values.dtype
        assert found[name].shape == values.shape


@pytest.mark.slow
def test_the_file_says_what_it_takes(exported, tmp_path):
    directory, model, detector = exported
    file = onnx.load_model_from_string(export.read_onnx(directory, export.ONNX_DETECTOR))
    onnx.checker.check_model(file, full_check=True)
    (given,) = file.graph.input
    dims = given.type.tensor_type.shape.dim
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [one.dim_param or one.dim_value for one in dims] == ["b", 8, 8, 1]
    texts = {one.key: one.value for one in file.metadata_props}
    assert "uint8 levels from 0 to 255" in texts["input"]
    assert json.loads(texts["mean"]) == list(model.config["augmentation"]["mean"])
    assert float(texts["threshold"]) == np.float32(detector.threshold)
    assert texts["score"].startswith("jevb/mixture_and_residual,")
    assert (texts["step"], texts["method"]) == ("7", "jevb")
    assert (file.producer_name, file.producer_version) == ("jevb_jax", jevb_jax.__version__)
    manifest = json.loads((directory / "model.json").read_text())
    assert manifest["onnx"]["images"] == ["b", 8, 8, 1]
    assert 0 < manifest["onnx_detector"]["largest_difference"] < 1e-3
    assert "platforms" not in manifest["onnx"]
    (tmp_path / "model.json").write_text((directory / "model.json").read_text())
    (tmp_path / export.ONNX).write_bytes(b"another")
    with pytest.raises(ArchiveError, match=r"model\.onnx is not what was written"):
        export.read_onnx(tmp_path)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("family", "count"), [("embedding", 6), ("jevb", 4), ("representation", 2)]
)
def test_every_score_that_is_served_is_written(family, count):
    model, images = small_model(), digits().images[500:560]
    table = score_table.scores_of_run(model.settings, has_labels=False)
    served = {
        name for name, entry in table.items() if name.startswith(family) and not entry.needs_views
    }
    # Those of the embedding are the same as those of the representation.
    again = {f"representation/{one}" for one in ("knn_50", "mahalanobis", "norm", "residual")}
    again |= {"representation/ssd_1", "representation/ssd_10"}
    assert len(served - again) == count
    for name in sorted(served - again):
        detector = detector_of(model, name)
        content, apart = export.export_onnx(model, height=8, width=8, detector=detector)
        assert apart is not None
        # Whitening makes rounding larger. JAX's own scores move as much with the size of the batch.
        assert_computes_the_same(content, model, detector, images, of_score=5e-4)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("jevb", {"backbone": "resnet18", "width": 8}),
        ("vi_simsiam", {"backbone": "vit_tiny", "width": 48}),
        ("simsiam", {"backbone": "timm_vit_tiny", "width": 48, "pool": "mean"}),
        ("vicreg", {"backbone": "resnet50", "width": 4, "stem": "imagenet"}),
    ],
)
def test_every_kind_of_network_is_written(method, settings):
    model = small_model(method, **settings)
    detector = detector_of(model)
    content, _ = export.export_onnx(model, height=8, width=8, detector=detector)
    images = digits().images[500:560]
    assert_computes_the_same(content, model, detector, images, of_score=1e-3)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    "name",
    [pytest.param("jevb-cifar10-resnet18", marks=pytest.mark.nightly), "jevb-cifar10-resnet8"],
)
def test_shipped_encoders_agree_on_real_photographs(name):
    model = jevb_jax.load(name)
    detector = model.detector(false_alarm_rate=0.05)
    content, _ = export.export_onnx(model, height=32, width=32, detector=detector)
    photographs = np.concatenate([tiles(one, 32)[::50] for one in load_sample_images().images])
    assert_computes_the_same(content, model, detector, photographs, quick=True)


@pytest.mark.slow
def test_photos_are_resized_inside():
    model = small_model(square_size=12)
    photo = np.rint(127.5 + 127 * np.sin(np.arange(660).reshape(1, 20, 33, 1) / 7)).astype(np.uint8)
    content, _ = export.export_onnx(model, height=20, width=33)
    found, wanted = check.run(content, photo)["embedding"], model.embed(photo)
    # A level between two may be the other, as in the serving form.
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-2


@pytest.mark.slow
def test_a_model_of_features_is_written(tmp_path):
    made = experiment.build_experiment(config_of(tmp_path))
    model = Model(made.config, made.initial_state().evaluation_variables, step=0)
    features = normal(150, model.num_features)
    detector = model.detector(
        0.05, "embedding/knn_50", fit_images=features, calibration_images=features[:60] + 1
    )
    content, _ = export.export_onnx(model, detector=detector)
    assert_computes_the_same(content, model, detector, 2 * features)
    texts = {one.key: one.value for one in onnx.load_model_from_string(content).metadata_props}
    assert texts["input"].startswith("features of the frozen encoder, float32 [b, F]")


def test_nothing_is_written_if_a_network_cannot_be(tmp_path):
    model = small_model(dtype="bfloat16")
    with pytest.raises(
        ValueError, match=r"this network cannot be written as ONNX: it computes with"
    ):
        export.export_model(model, tmp_path / "x", onnx=True)
    assert not (tmp_path / "x").exists()


def test_a_score_that_cannot_be_written_is_named(monkeypatch):
    model = small_model()
    detector = detector_of(model, "embedding/norm")
    monkeypatch.delitem(convert.RULES, "reduce_sum")
    with pytest.raises(
        ValueError, match=r"a detector with embedding/norm .* as archive and as Sta"
    ):
        export.export_onnx(model, height=8, width=8, detector=detector)


@pytest.mark.slow
def test_a_wrong_translation_is_found_before_anything_is_written(tmp_path, monkeypatch):
    model = small_model()
    monkeypatch.setitem(convert.RULES, "max", lambda graph, inputs, eqn: [inputs[0]])
    with pytest.raises(
        ValueError, match=r"cannot be written as ONNX: embedding differs from JAX's"
    ):
        export.export_model(model, tmp_path / "x", onnx=True)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_command_says_how_it_was_checked(tmp_path, monkeypatch, capsys):
    model = small_model()
    export.export_model(model, tmp_path / "run")
    command = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]
    assert export.main([*command, "--onnx"]) == 0
    assert "model.onnx in onnxruntime differs from JAX by at most" in capsys.readouterr().out
    monkeypatch.setattr(check, "can_run", lambda: False)
    assert export.main([*command, "--onnx"]) == 0
    assert "model.onnx was not checked: onnxruntime is not installed" in capsys.readouterr().out
    # A later export without it leaves no file of other weights.
    assert export.main(command) == 0
    assert "onnx" not in capsys.readouterr().out
    assert not (tmp_path / "out" / export.ONNX).exists()


def test_without_the_package_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("jevb_jax.to_onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jevb-jax\[onnx\]'"):
        export.export_onnx(small_model(), height=8, width=8)
