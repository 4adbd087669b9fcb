"""The functional API under jit, vmap, grad, pmap and shard_map: the same numbers as plain calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jevb_jax

NUM_DEVICES = 8
DIM = 66

pytestmark = [
    pytest.mark.usefixtures("strict_dtypes"),
    pytest.mark.skipif(len(jax.devices()) < NUM_DEVICES, reason="needs eight (simulated) devices"),
]
# float32: a transformed program may fuse and reorder sums, and each number adds up hundreds.
assert_same = functools.partial(
    jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
)


def make_batch(seed=0):
    """Sixteen examples: keys, two views, and a row each of df (one infinite) and concentration."""
    rng = np.random.default_rng(seed)

    def view():
        return jevb_jax.View(
            jnp.asarray(rng.normal(size=(16, DIM)), jnp.float32),
            jnp.asarray(rng.normal(size=(16, DIM)), jnp.float32),
            jnp.asarray(np.exp(rng.uniform(-1, 0, size=(16, DIM))), jnp.float32),
        )

    df = np.exp(rng.normal(size=16)).astype(np.float32)
    df[3] = np.inf
    concentration = np.exp(2 * rng.normal(size=16)).astype(np.float32)
    keys = jax.random.split(jax.random.key(seed), 16)
    return keys, view(), view(), df, concentration


def every_function(keys, view_1, view_2, df, concentration):
    """The densities, `[batch]` numbers by name, or numbers for a single example."""
    del keys, view_2
    direction, radius = jevb_jax.polar_decomposition(view_1.embedding)
    loc, length = jevb_jax.polar_decomposition(view_1.posterior_mean)
    _, mean, scale = view_1
    likelihood = jevb_jax.Likelihood(df=df, radial_df=df, radial_scale=0.5)
    by_coordinates = {
        coordinates: jevb_jax.directional_log_prob(
            direction, loc=loc, scale_diag=scale, df=df, coordinates=coordinates
        )
        for coordinates in ("chordal", "stereographic")
    }
    by_space = {
        space: jevb_jax.radial_log_prob(radius, loc=length, scale=0.5, df=df, space=space)
        for space in ("log", "linear")
    }
    return {
        **by_coordinates,
        **by_space,
        "direction": direction,
        "kl": jevb_jax.gaussian_kl_divergence(mean, scale),
        "student_t": jevb_jax.student_t_log_prob(radius, df=df, loc=0.5, scale=2.0),
        "power_spherical": jevb_jax.power_spherical_log_prob(
            direction, loc=loc, concentration=concentration
        ),
        "entropy": jevb_jax.power_spherical_entropy(concentration, dim=DIM),
        "embedding": jevb_jax.embedding_log_prob(
            view_1.embedding, mean, likelihood, scale_diag=scale
        ),
    }


def every_bound(keys, view_1, view_2, df, concentration):
    """What draws samples, with one key for each example; a batch of any size."""
    del concentration
    model = jevb_jax.Likelihood(df=df, radial_df=df, radial_scale=0.5)
    return {
        "conditional": jevb_jax.conditional_elbo(
            keys, view_2.embedding, *view_1[1:], likelihood=model, num_samples=2
        ),
        "symmetric": jevb_jax.symmetric_elbo(keys, view_1, view_2, model, num_samples=2),
        "bound": jevb_jax.importance_weighted_bound(keys, *view_1, likelihood=model, num_samples=2),
    }


def everything(*batch):
    return every_function(*batch), every_bound(*batch)


@functools.cache
def plain():
    """The numbers of plain calls: finite, and one for each example."""
    numbers = everything(*make_batch())
    for leaf in jax.tree.leaves(numbers):
        assert leaf.shape[0] == 16
        assert leaf.dtype == jnp.float32
        assert np.all(np.isfinite(leaf))
    return numbers


@pytest.mark.slow
@pytest.mark.nightly
def test_jit():
    assert_same(jax.jit(everything)(*make_batch()), plain())


@pytest.mark.slow
def test_vmap_over_single_examples():
    # Under vmap the densities see no batch at all; the bounds get a batch of one.
    def one(*example):
        batch_of_one = jax.tree.map(lambda x: x[None], example)
        bounds = jax.tree.map(lambda x: x[0], every_bound(*batch_of_one))
        return every_function(*example), bounds

    assert_same(jax.jit(jax.vmap(one))(*make_batch()), plain())


def shards(batch):
    return jax.tree.map(lambda x: x.reshape((NUM_DEVICES, -1, *x.shape[1:])), batch)


@pytest.mark.slow
@pytest.mark.nightly
def test_pmap():
    outputs = jax.pmap(everything)(*shards(make_batch()))
    merged = jax.tree.map(lambda x: np.asarray(x).reshape((16, *x.shape[2:])), outputs)
    assert_same(merged, plain())


def data_mesh():
    return jax.make_mesh((NUM_DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.slow
@pytest.mark.nightly
def test_shard_map():
    spec = PartitionSpec("data")
    sharded = jax.shard_map(everything, mesh=data_mesh(), in_specs=spec, out_specs=spec)
    assert_same(jax.jit(sharded)(*make_batch()), plain())


@pytest.mark.slow
@pytest.mark.nightly
def test_jit_over_a_sharded_batch():
    batch = jax.device_put(make_batch(), NamedSharding(data_mesh(), PartitionSpec("data")))
    outputs = jax.jit(everything)(*batch)
    assert len(outputs[0]["chordal"].sharding.device_set) == NUM_DEVICES
    assert_same(outputs, plain())


def loss(parameters, keys, view_1, view_2, df, concentration):
    """The objective, in the parameters of a very small network."""
    del concentration
    views = (
        view._replace(
            posterior_mean=view.posterior_mean * parameters["mean"][None, :],
            posterior_scale=view.posterior_scale * jax.nn.softplus(parameters["scale"])[None, :],
        )
        for view in (view_1, view_2)
    )
    likelihood = jevb_jax.Likelihood(df=df, radial_df=df, radial_scale=0.5)
    terms = jevb_jax.symmetric_elbo(keys, *views, likelihood=likelihood)
    return -jnp.mean(terms.weighted_elbo)


@pytest.mark.slow
@pytest.mark.nightly
def test_gradients_agree_between_one_device_and_eight():
    batch = make_batch()
    parameters = {"mean": jnp.linspace(0.5, 1.5, DIM), "scale": jnp.linspace(-1.0, 1.0, DIM)}
    gradient = jax.grad(loss)
    expected = jax.jit(gradient)(parameters, *batch)
    for leaf in jax.tree.leaves(expected):
        assert np.all(np.isfinite(leaf))
        assert np.all(leaf != 0)

    def mean_gradient(parameters, *shard):
        return jax.lax.pmean(gradient(parameters, *shard), "data")

    spec = PartitionSpec("data")
    sharded = jax.shard_map(
        mean_gradient,
        mesh=data_mesh(),
        in_specs=(PartitionSpec(), *[spec] * len(batch)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    pmapped = jax.pmap(mean_gradient, axis_name="data", in_axes=(None, *[0] * len(batch)))
    per_device = pmapped(parameters, *shards(batch))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, jax.jit(sharded)(parameters, *batch), expected)
    jax.tree.map(lambda x, y: close(np.asarray(x)[0], y), per_device, expected)


@pytest.mark.slow
def test_repeated_calls_compile_once():
    traces = []

    @jax.jit
    def counted(batch, radial_scale):
        traces.append(1)
        keys, view_1, view_2, df, _ = batch
        likelihood = jevb_jax.Likelihood(df=df, radial_df=df, radial_scale=radial_scale)
        return jevb_jax.symmetric_elbo(keys, view_1, view_2, likelihood)

    for seed in range(3):
        batch = make_batch(seed)
        counted(batch, 0.5 + seed)
        # The Gaussian limit is a value, not another program.
        counted((*batch[:3], np.full_like(batch[3], np.inf), batch[4]), 1.0)
    assert len(traces) == 1
