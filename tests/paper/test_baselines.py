"""Baselines against float64 re-derivations, hand-computed cases and their invariances."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from jevb_jax import power_spherical_entropy
from jevb_jax.paper import baselines
from tests.marks import nightly

PAIRED = {"simsiam": baselines.simsiam_loss, "byol": baselines.byol_loss}
COUPLED = {"vicreg": baselines.vicreg_loss, "barlow_twins": baselines.barlow_twins_loss}


pytestmark = pytest.mark.usefixtures("strict_dtypes")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@jax.jit
def every_loss(x: Any, k: Any) -> dict[str, Any]:
    """The five losses of `x`, `[4, batch, D]`, in one program."""
    return {
        **{name: loss(*x).loss for name, loss in PAIRED.items()},
        **{name: loss(x[0], x[1]).loss for name, loss in COUPLED.items()},
        "vi_simsiam": baselines.vi_simsiam_loss(x[0], k, x[1], k, x[2], x[3]).loss,
    }


# The oracles: NumPy, float64.


def simsiam_oracle(p1, p2, t1, t2):
    return -((unit(p1) * unit(t2)).sum(-1) + (unit(p2) * unit(t1)).sum(-1)) / 2


def byol_oracle(p1, p2, t1, t2):
    return 4 - 2 * (unit(p1) * unit(t2)).sum(-1) - 2 * (unit(p2) * unit(t1)).sum(-1)


def power_spherical_oracle(x: Any, mean: Any, k: Any) -> Any:
    """model: log C + k log(1 + <mu, x>), with the Gamma functions of SciPy."""
    dim = x.shape[-1]
    b = (dim - 1) / 2
    a = b + k
    log_normalizer = (
        (a + b) * np.log(2)
        + b * np.log(np.pi)
        + scipy.special.gammaln(a)
        - scipy.special.gammaln(a + b)
    )
    return k * np.log1p((unit(x) * unit(mean)).sum(-1)) - log_normalizer


def vicreg_oracle(e1, e2, weights=(25.0, 25.0, 1.0)):
    e1, e2 = np.asarray(e1, np.float64), np.asarray(e2, np.float64)
    dim = e1.shape[1]
    invariance = np.mean((e1 - e2) ** 2)
    variance = covariance = 0.0
    for e in (e1, e2):
        std = np.sqrt(e.var(axis=0, ddof=1) + 1e-4)
        variance += np.maximum(0, 1 - std).mean() / 2
        matrix = np.cov(e.T)
        for i in range(dim):
            for j in range(dim):
                covariance += matrix[i, j] ** 2 / dim if i != j else 0
    return weights[0] * invariance + weights[1] * variance + weights[2] * covariance


def barlow_oracle(e1, e2, weight=0.0051):
    e1, e2 = np.asarray(e1, np.float64), np.asarray(e2, np.float64)
    z1, z2 = ((e - e.mean(0)) / np.sqrt(e.var(0) + 1e-5) for e in (e1, e2))
    total = 0.0
    for i in range(e1.shape[1]):
        for j in range(e1.shape[1]):
            c = np.mean(z1[:, i] * z2[:, j])
            total += (c - 1) ** 2 if i == j else weight * c**2
    return total


def fastsiam_oracle(predictions, targets):
    total = 0.0
    for v, p in enumerate(predictions):
        others = [np.asarray(t, np.float64) for w, t in enumerate(targets) if w != v]
        total = total - (unit(p) * unit(np.mean(others, axis=0))).sum(-1)
    return total / len(predictions)


def emp_ssl_oracle(embeddings, weight=200.0, squared_epsilon=0.2):
    """Eigenvalues of the D x D matrix, whatever its size."""
    z = unit(embeddings)
    batch, dim = z.shape[1:]
    cosine = (z * unit(z.mean(0))).sum(-1).mean()
    rates = [
        np.log1p(np.maximum(dim / (batch * squared_epsilon) * np.linalg.eigvalsh(c.T @ c), 0)).sum()
        for c in z
    ]
    return -weight * cosine - np.mean(rates) / 2


ORACLES: dict[str, Any] = {
    "simsiam": simsiam_oracle,
    "byol": byol_oracle,
    "vicreg": vicreg_oracle,
    "barlow_twins": barlow_oracle,
}


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(2, 9),
    dim=st.integers(2, 12),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
)
def test_losses_equal_the_oracles(seed, batch, dim, scale):
    x = scale * normal(seed, 4, batch, dim)
    found = every_loss(x, np.ones(batch, np.float32))
    for name in PAIRED:
        np.testing.assert_allclose(found[name], ORACLES[name](*x), rtol=1e-5, atol=2e-6)
    for name in COUPLED:
        np.testing.assert_allclose(found[name], ORACLES[name](x[0], x[1]), rtol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ORACLES)
def test_gradients_equal_central_differences_of_the_oracles(name):
    x = normal(1, 4, 5, 3)
    if name in PAIRED:
        function, moving = PAIRED[name], [0, 1]
    else:
        function, moving, x = COUPLED[name], [0, 1], x[:2]
    found = jax.grad(lambda *a: jnp.sum(function(*a).loss), argnums=tuple(range(len(x))))(*x)
    for index in range(len(x)):
        if index not in moving:
            assert np.all(np.asarray(found[index]) == 0)
            continue
        expected = np.zeros(x[index].shape)
        for place in np.ndindex(*expected.shape):
            step = np.zeros(x.shape)
            step[(index, *place)] = 1e-5
            difference = np.sum(ORACLES[name](*(x + step))) - np.sum(ORACLES[name](*(x - step)))
            expected[place] = difference / 2e-5
        np.testing.assert_allclose(found[index], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("views", "full"), [(2, 2), nightly(4, 4), (5, 3)])
def test_fastsiam_is_the_oracle(views, full):
    p, t = normal(4, views, 6, 5), normal(5, full, 6, 5)
    found = baselines.fastsiam_loss(p, t)
    assert found.similarity.shape == (views, 6)
    np.testing.assert_allclose(found.loss, fastsiam_oracle(p, t), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "dim"), [(3, 7), (7, 3), (4, 4)])
def test_emp_ssl_is_the_oracle(batch, dim):
    z = normal(6, 3, batch, dim)
    found = baselines.emp_ssl_loss(z, invariance_weight=2.0)
    assert found.similarity.shape == (batch,)
    np.testing.assert_allclose(found.loss, emp_ssl_oracle(z, 2.0), rtol=1e-5)
    # Directions alone count, and so does the squared distortion.
    scaled = baselines.emp_ssl_loss(30 * z, invariance_weight=2.0, squared_epsilon=0.5)
    np.testing.assert_allclose(scaled.loss, emp_ssl_oracle(z, 2.0, 0.5), rtol=1e-5)
    default = baselines.emp_ssl_loss(z)
    np.testing.assert_allclose(default.loss, emp_ssl_oracle(z), rtol=1e-5)


def central_differences(function: Any, x: Any) -> np.ndarray:
    found = np.zeros(x.shape)
    for place in np.ndindex(*x.shape):
        step = np.zeros(x.shape)
        step[place] = 1e-5
        found[place] = np.sum(function(x + step)) - np.sum(function(x - step))
    return found / 2e-5


@pytest.mark.slow
@pytest.mark.nightly
def test_gradients_of_many_views_equal_central_differences():
    p, t = normal(7, 3, 4, 3), normal(8, 2, 4, 3)
    loss = jax.grad(lambda p, t: jnp.sum(baselines.fastsiam_loss(p, t).loss), argnums=(0, 1))
    of_predictions, of_targets = loss(p, t)
    expected = central_differences(lambda p: fastsiam_oracle(p, t), p)
    np.testing.assert_allclose(of_predictions, expected, rtol=1e-3, atol=1e-4)
    assert np.all(np.asarray(of_targets) == 0)
    for shape in ((2, 3, 4), (2, 4, 3)):
        z = normal(9, *shape)
        found = jax.grad(lambda z: baselines.emp_ssl_loss(z, invariance_weight=2.0).loss)(z)
        expected = central_differences(lambda z: emp_ssl_oracle(z, 2.0), z)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_stacks_of_views_that_do_not_fit_are_refused():
    x = normal(0, 3, 4, 5)
    for targets in (x[:1], x[:, 1:], x[0], normal(0, 4, 4, 5)):
        with pytest.raises(ValueError, match="2 <= full <= views"):
            baselines.fastsiam_loss(x, targets)
    for crops in (x[:1], x[0], x[:, :0]):
        with pytest.raises(ValueError, match="2 crops or more"):
            baselines.emp_ssl_loss(crops)
    with pytest.raises(ValueError, match="squared_epsilon must be"):
        baselines.emp_ssl_loss(x, squared_epsilon=0.0)
    with pytest.raises(ValueError, match="invariance_weight must be at least zero"):
        baselines.emp_ssl_loss(x, invariance_weight=-1.0)


def test_vi_simsiam_is_the_power_spherical_log_likelihood():
    m1, m2, t1, t2 = normal(2, 4, 6, 8)
    k1, k2 = np.exp(2 * normal(3, 2, 6))
    terms = baselines.vi_simsiam_loss(m1, k1, m2, k2, t1, t2)
    expected = power_spherical_oracle(t2, m1, np.float64(k1))
    np.testing.assert_allclose(terms.log_likelihood_2_given_1, expected, rtol=2e-5, atol=1e-5)
    other = power_spherical_oracle(t1, m2, np.float64(k2))
    np.testing.assert_allclose(terms.log_likelihood_1_given_2, other, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(terms.loss, -(expected + other) / 2, rtol=2e-5, atol=1e-5)
    swapped = baselines.vi_simsiam_loss(m2, k2, m1, k1, t2, t1)
    np.testing.assert_array_equal(swapped.loss, terms.loss)


@pytest.mark.slow
@pytest.mark.nightly
def test_vi_simsiam_check_values():
    # D = 64, k = 50: H = -47.7297 and E[cos] = k / (D - 1 + k) = 0.44248. The density at that cosine
    # and the entropy, both by the formulas, and the mean log-likelihood of samples that follow it.
    assert float(power_spherical_entropy(50.0, dim=64)) == pytest.approx(-47.7297, abs=1e-3)
    rng = np.random.default_rng(0)
    cosine = 2 * rng.beta(31.5 + 50, 31.5, size=20_000) - 1
    assert cosine.mean() == pytest.approx(50 / 113, abs=4 * cosine.std() / np.sqrt(20_000))
    mean = np.zeros((20_000, 64), np.float32)
    mean[:, 0] = 3.0  # normalized by the loss
    sample = np.zeros((20_000, 64), np.float32)
    sample[:, 0], sample[:, 1] = cosine, np.sqrt(1 - cosine**2)
    k = np.full(20_000, 50, np.float32)
    loss = np.asarray(baselines.vi_simsiam_loss(mean, k, mean, k, sample, sample).loss)
    assert loss.mean() == pytest.approx(-47.7297, abs=4 * loss.std() / np.sqrt(20_000))


@pytest.mark.slow
def test_vi_simsiam_gradients():
    m1, m2, t1, t2 = normal(2, 4, 6, 8)
    k1, k2 = np.exp(normal(3, 2, 6))

    def total(*arguments):
        return jnp.sum(baselines.vi_simsiam_loss(*arguments).loss)

    found = jax.grad(total, argnums=tuple(range(6)))(m1, k1, m2, k2, t1, t2)
    for stopped in found[4:]:
        assert np.all(np.asarray(stopped) == 0)
    step = 1e-4
    for index, (mean, k, target) in {1: (m1, k1, t2), 3: (m2, k2, t1)}.items():
        up, down = (power_spherical_oracle(target, mean, np.float64(k) + s) for s in (step, -step))
        np.testing.assert_allclose(found[index], -(up - down) / (4 * step), rtol=1e-3, atol=1e-5)
    # Only the direction counts: the gradient is across the vector and not zero.
    for index, mean in ((0, m1), (2, m2)):
        along = np.sum(np.asarray(found[index]) * mean, axis=1)
        np.testing.assert_allclose(along, 0, atol=1e-5)
        assert np.all(np.linalg.norm(found[index], axis=1) > 1e-4)


def test_hand_computed_cosines():
    p1 = np.array([[2.0, 0.0], [1.0, 0.0]], np.float32)
    p2 = np.array([[0.0, 1.0], [1.0, 1.0]], np.float32)
    t1 = np.array([[0.0, 5.0], [0.0, 1.0]], np.float32)
    t2 = np.array([[3.0, 0.0], [-1.0, 0.0]], np.float32)
    terms = baselines.simsiam_loss(p1, p2, t1, t2)
    np.testing.assert_allclose(terms.similarity_2_given_1, [1, -1], atol=1e-7)
    np.testing.assert_allclose(terms.similarity_1_given_2, [1, 0.5**0.5], rtol=1e-6)
    np.testing.assert_allclose(terms.loss, [-1, (1 - 0.5**0.5) / 2], rtol=1e-6)
    distances = baselines.byol_loss(p1, p2, t1, t2)
    np.testing.assert_allclose(distances.distance_2_given_1, [0, 4], atol=1e-7)
    np.testing.assert_allclose(distances.loss, [0, 4 + 2 - 2**0.5], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PAIRED)
def test_only_directions_count_and_swapping_views_changes_nothing(name):
    p1, p2, t1, t2 = normal(4, 4, 5, 7)
    loss = PAIRED[name]
    expected = loss(p1, p2, t1, t2).loss
    np.testing.assert_allclose(loss(3 * p1, p2 / 9, 2 * t1, t2).loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(loss(p2, p1, t2, t1).loss, expected)


def test_byol_is_simsiam_on_another_scale():
    x = normal(4, 4, 5, 7)
    simsiam, byol = baselines.simsiam_loss(*x), baselines.byol_loss(*x)
    np.testing.assert_allclose(byol.loss, 4 + 4 * simsiam.loss, rtol=1e-5)
    assert np.all(np.abs(simsiam.loss) <= 1)
    assert np.all((np.asarray(byol.loss) >= 0) & (np.asarray(byol.loss) <= 8))


def test_byol_distance_keeps_its_digits_near_zero():
    p = normal(5, 4, 16)
    tangent = normal(6, 4, 16)
    moved = p + np.float32(1e-4) * tangent
    found = baselines.byol_loss(p, p, moved, moved).loss
    expected = 2 * ((unit(p) - unit(moved)) ** 2).sum(-1)
    assert expected.max() < 1e-6  # 2 - 2 cos has no digit left here
    np.testing.assert_allclose(found, expected, rtol=2e-2)


def test_vicreg_terms_are_zero_where_they_must_be():
    # A Hadamard matrix: orthogonal columns of mean zero and equal variance.
    hadamard = np.array([[1, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]], np.float32)
    terms = baselines.vicreg_loss(2 * hadamard, 2 * hadamard)
    assert np.all(np.asarray(terms.invariance) == 0)
    assert float(terms.variance) == 0
    assert float(terms.covariance) < 1e-12
    # Halved, standard deviations are sqrt(4/3)/2 = 0.577.
    short = baselines.vicreg_loss(hadamard / 2, hadamard / 2)
    expected = 1 - np.sqrt(4 / 3 / 4 + 1e-4)
    np.testing.assert_allclose(short.variance, expected, rtol=1e-5)
    np.testing.assert_allclose(short.loss, 25 * expected, rtol=1e-5)
    # One column twice: covariance 4/3 in two places, over D = 2, for each of two views.
    twice = hadamard[:, [0, 0]]
    np.testing.assert_allclose(
        baselines.vicreg_loss(twice, twice).covariance, 2 * 2 * (4 / 3) ** 2 / 2, rtol=1e-5
    )
    far = baselines.vicreg_loss(hadamard, hadamard + np.float32(2))
    np.testing.assert_allclose(far.invariance, np.full(4, 4.0), rtol=1e-6)


def test_vicreg_invariances():
    e1, e2 = normal(7, 2, 9, 4)
    terms = baselines.vicreg_loss(e1, e2)
    shifted = baselines.vicreg_loss(e1 + np.float32(5), e2 - np.float32(3))
    np.testing.assert_allclose(shifted.variance, terms.variance, rtol=1e-4)
    np.testing.assert_allclose(shifted.covariance, terms.covariance, rtol=1e-4)
    order = np.random.default_rng(0).permutation(9)
    permuted = baselines.vicreg_loss(e1[order], e2[order])
    np.testing.assert_allclose(permuted.invariance, np.asarray(terms.invariance)[order], rtol=1e-6)
    np.testing.assert_allclose(permuted.loss, terms.loss, rtol=1e-5)
    features = baselines.vicreg_loss(e1[:, ::-1], e2[:, ::-1])
    np.testing.assert_allclose(features.loss, terms.loss, rtol=1e-5)
    np.testing.assert_allclose(baselines.vicreg_loss(e2, e1).loss, terms.loss, rtol=1e-6)
    weighted = baselines.vicreg_loss(
        e1, e2, invariance_weight=2.0, variance_weight=3.0, covariance_weight=5.0
    )
    np.testing.assert_allclose(weighted.loss, vicreg_oracle(e1, e2, (2, 3, 5)), rtol=1e-5)


def test_barlow_twins_identity_and_sign():
    hadamard = np.array([[1, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]], np.float32)
    same = baselines.barlow_twins_loss(hadamard, 3 * hadamard + np.float32(7))
    assert float(same.loss) < 1e-8  # epsilon alone
    flipped = baselines.barlow_twins_loss(hadamard, hadamard * np.array([1, -1, 1], np.float32))
    np.testing.assert_allclose(flipped.invariance, 4.0, rtol=1e-4)
    assert float(flipped.redundancy) < 1e-8
    # One column twice in both views: two off-diagonal ones.
    twice = hadamard[:, [0, 0]]
    doubled = baselines.barlow_twins_loss(twice, twice, redundancy_weight=0.3)
    np.testing.assert_allclose(doubled.redundancy, 2.0, rtol=1e-4)
    np.testing.assert_allclose(doubled.loss, 0.6, rtol=1e-4)


def test_barlow_twins_invariances():
    e1, e2 = normal(8, 2, 9, 4)
    expected = baselines.barlow_twins_loss(e1, e2).loss
    scaled = baselines.barlow_twins_loss(4 * e1 + np.float32(2), 9 * e2)
    np.testing.assert_allclose(scaled.loss, expected, rtol=1e-4)
    order = np.random.default_rng(0).permutation(9)
    np.testing.assert_allclose(
        baselines.barlow_twins_loss(e1[order], e2[order]).loss, expected, rtol=1e-5
    )
    np.testing.assert_allclose(baselines.barlow_twins_loss(e2, e1).loss, expected, rtol=1e-5)
    # A mean over the batch, a sum over features.
    twice = baselines.barlow_twins_loss(*np.tile((e1, e2), (1, 2, 1)))
    np.testing.assert_allclose(twice.loss, expected, rtol=1e-5)
    wide = baselines.barlow_twins_loss(*np.tile((e1, e2), (1, 1, 2)), redundancy_weight=0.0)
    narrow = baselines.barlow_twins_loss(e1, e2, redundancy_weight=0.0)
    np.testing.assert_allclose(wide.loss, 2 * narrow.loss, rtol=1e-5)


@pytest.mark.parametrize("name", COUPLED)
def test_a_large_mean_costs_no_digits(name):
    # Eight multiples of 1/64, so that the shift and the mean are exact in float32. The difference of
    # the mean square, 2e7, and the squared mean would have an error of about 1.
    e1, e2 = np.round(64 * normal(13, 2, 8, 4)) / np.float32(64)
    far = COUPLED[name](e1 + np.float32(4096), e2 + np.float32(4096))
    np.testing.assert_allclose(far.loss, COUPLED[name](e1, e2).loss, rtol=1e-6)


def test_a_sharded_batch_has_the_losses_of_the_whole():
    # VICReg and Barlow Twins couple examples: a mean within each device would show.
    x, k = normal(10, 4, 16, 3), np.exp(normal(11, 16))
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    along = jax.sharding.PartitionSpec
    sharded = every_loss(
        jax.device_put(x, jax.sharding.NamedSharding(mesh, along(None, "batch"))),
        jax.device_put(k, jax.sharding.NamedSharding(mesh, along("batch"))),
    )
    assert len(sharded["byol"].sharding.device_set) == 8
    for name, whole in every_loss(x, k).items():
        np.testing.assert_allclose(sharded[name], whole, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", COUPLED)
def test_products_are_float32_on_every_accelerator(name):
    # By default they are TensorFloat-32 on a GPU and bfloat16 on a TPU; a CPU cannot show it.
    e1, e2 = normal(12, 2, 6, 4)
    traced = jax.make_jaxpr(jax.grad(lambda *a: COUPLED[name](*a).loss, argnums=(0, 1)))(e1, e2)
    highest = jax.lax.Precision.HIGHEST
    precisions = [
        equation.params["precision"]
        for equation in traced.eqns
        if equation.primitive.name == "dot_general"
    ]
    assert len(precisions) >= 3  # forward, and to each view
    assert set(precisions) == {(highest, highest)}


@jax.jit
def every_gradient(x: Any, k: Any) -> dict[str, Any]:
    return {
        name: jax.grad(lambda x, name=name: jnp.sum(every_loss(x, k)[name]))(x)
        for name in (*ORACLES, "vi_simsiam")
    }


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.0, 1e-15, 1e8, 1e15])
def test_extremes_and_half_precision(size):
    vectors = size * normal(9, 4, 6, 5)
    vectors[:2, 0] = vectors[2:, 1] = 0  # a prediction of zero, and a target of zero
    x, k = jnp.asarray(vectors, jnp.float32), jnp.ones(6)
    losses, gradients = every_loss(x, k), every_gradient(x, k)
    for name, loss in losses.items():
        if name == "vicreg" and size > 1e9:  # its fourth power has overflown
            continue
        assert np.all(np.isfinite(loss)), name
        assert np.all(np.isfinite(gradients[name])), name
    half = x.astype(jnp.bfloat16)
    promoted = every_loss(half.astype(jnp.float32), k)
    for name, loss in every_loss(half, k).items():
        assert loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, promoted[name], rtol=1e-6, err_msg=name)


def test_bad_shapes_are_refused():
    x = normal(0, 4, 5, 3)
    for function in PAIRED.values():
        with pytest.raises(ValueError, match=r"\(5, 3\).*\(5, 2\)"):
            function(x[0], x[1], x[2], x[3][:, :2])
        with pytest.raises(ValueError, match=r"\[batch, D\]"):
            function(*x[:, 0])
    for function in COUPLED.values():
        with pytest.raises(ValueError, match="batch >= 2"):
            function(x[0][:1], x[1][:1])
    k = np.ones(5, np.float32)
    with pytest.raises(ValueError, match=r"\[batch\] = \(5,\)"):
        baselines.vi_simsiam_loss(x[0], k[:4], x[1], k, x[2], x[3])
    with pytest.raises(ValueError, match="D >= 2"):
        baselines.vi_simsiam_loss(x[0][:, :1], k, x[1][:, :1], k, x[2][:, :1], x[3][:, :1])


def test_a_batch_of_no_examples():
    x, k = np.zeros((4, 0, 5), np.float32), np.zeros(0, np.float32)
    losses = [function(*x).loss for function in PAIRED.values()]
    losses.append(baselines.vi_simsiam_loss(x[0], k, x[1], k, x[2], x[3]).loss)
    assert [loss.shape for loss in losses] == [(0,)] * 3
    for function in COUPLED.values():
        with pytest.raises(ValueError, match="batch >= 2"):
            function(x[0], x[1])


def test_settings_outside_of_their_domain_are_refused():
    x, k = normal(0, 4, 5, 3), np.ones(5, np.float32)
    for value in (-1.0, np.nan, np.inf):
        for name in ("invariance", "variance", "covariance"):
            with pytest.raises(ValueError, match=f"{name}_weight must be at least zero"):
                baselines.vicreg_loss(x[0], x[1], **{f"{name}_weight": value})
        with pytest.raises(ValueError, match="redundancy_weight must be at least zero"):
            baselines.barlow_twins_loss(x[0], x[1], redundancy_weight=value)
        with pytest.raises(ValueError, match="concentration_2 must be at least zero"):
            baselines.vi_simsiam_loss(x[0], k, x[1], value * k, x[2], x[3])
    # With zero, the gradient of a constant feature would be NaN.
    for value in (-1.0, 0.0, np.nan, np.inf):
        for function in COUPLED.values():
            with pytest.raises(ValueError, match="epsilon must be positive and finite"):
                function(x[0], x[1], epsilon=value)
    traced = jax.jit(baselines.vi_simsiam_loss)(x[0], k, x[1], -k, x[2], x[3])
    assert np.all(np.isnan(traced.log_likelihood_1_given_2))
    assert np.all(np.isfinite(traced.log_likelihood_2_given_1))


def test_float32_stays_float32_where_x64_is_enabled():
    with jax.enable_x64(True):
        found = jax.eval_shape(every_loss, normal(0, 4, 5, 3), np.ones(5, np.float32))
    assert {loss.dtype for loss in found.values()} == {jnp.dtype("float32")}
