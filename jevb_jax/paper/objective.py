"""The JEVB objective: conditional and symmetric ELBO, importance-weighted bound.

The posterior of one view explains the embedding of the other view, whose gradient is stopped:

    elbo(t | s) = E_q(z|s)[ log p_dir(u_t | z) + log p_rad(r_t | z) ] - KL( q(z|s) || p(z) )

All values are for single examples, in nats; the caller reduces them over the batch. Equation
numbers are those of `docs/mathematics.md`. The functions use its symbols as names: `h` is an
embedding, `mu` and `sigma` are its posterior, `z` is a latent, `s` is the scale of the likelihood.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, TypeVar, Unpack, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Key, Real, UInt32

from jevb_jax.paper import domain, mass, sphere
from jevb_jax.paper.densities import gaussian_kl_divergence
from jevb_jax.paper.likelihood import (
    Likelihood,
    LogLikelihood,
    checked_numbers,
    likelihood_scale,
    log_likelihood_terms,
)

Location = Literal["sample", "mean"]
LOCATIONS: tuple[Location, ...] = ("sample", "mean")
# One key, or one for each example. Raw keys by `jax.random.PRNGKey` are accepted too.
Keys = (
    Key[Array, ""] | Key[Array, " batch"] | UInt32[Array, " words"] | UInt32[Array, "batch words"]
)
_T = TypeVar("_T")
# Noise of 256 KiB in float32 fits into the cache of a core together with the terms.
_SIDE_BY_SIDE_ELEMENTS = 2**16


class ElboTerms(NamedTuple):
    """Terms of a bound, one value for each example, in nats.

    Attributes:
      directional_log_likelihood: `E_q[log p_dir]`, larger is better. For an unfactorized
        likelihood, the whole log-likelihood.
      radial_log_likelihood: `E_q[log p_rad]`, larger is better; zero if unfactorized.
      kl: `KL(q || p)`, at least zero.
      radial_weight: weight of the radial term in the training objective.
      kl_weight: weight of the KL in the training objective.
      directional_log_mass: `E_q[log M]` (docs eq. 31), the mass of the density before it is divided
        by it. Without a gradient unless the density is normalized. None if unfactorized.
      predictive_information: result of the function of this name. None if unfactorized.
    """

    directional_log_likelihood: Float[Array, " batch"]
    radial_log_likelihood: Float[Array, " batch"]
    kl: Float[Array, " batch"]
    radial_weight: Float[Array, " batch"]
    kl_weight: Float[Array, " batch"]
    directional_log_mass: Float[Array, " batch"] | None = None
    predictive_information: Float[Array, " batch"] | None = None

    @property
    def log_likelihood(self) -> Float[Array, " batch"]:
        """Directional plus radial log-likelihood, nats; larger is better."""
        return self.directional_log_likelihood + self.radial_log_likelihood

    @property
    def elbo(self) -> Float[Array, " batch"]:
        """The bound in nats, with both weights one whatever they are in training; larger is better."""
        return self.log_likelihood - self.kl

    @property
    def weighted_elbo(self) -> Float[Array, " batch"]:
        """What training maximizes, nats. It is a bound if both weights are one."""
        return (
            self.directional_log_likelihood
            + self.radial_weight * self.radial_log_likelihood
            - self.kl_weight * self.kl
        )


class View(NamedTuple):
    """One view of a batch, as the networks return it.

    Attributes:
      embedding: `h`.
      posterior_mean: `mu` of `q(z | h)`.
      posterior_scale: `sigma` of `q(z | h)`, standard deviations, positive.
    """

    embedding: Float[Array, "*batch D"]
    posterior_mean: Float[Array, "*batch D"]
    posterior_scale: Float[Array, "*batch D"]


@runtime_checkable
class HasView(Protocol):
    """Any object with the three attributes of `View`."""

    @property
    def embedding(self) -> Float[Array, "batch D"]:
        """`h`."""
        ...

    @property
    def posterior_mean(self) -> Float[Array, "batch D"]:
        """`mu` of `q(z | h)`."""
        ...

    @property
    def posterior_scale(self) -> Float[Array, "batch D"]:
        """`sigma` of `q(z | h)`."""
        ...


class ElboSettings(TypedDict, total=False):
    """Settings of a bound besides its likelihood.

    Attributes:
      prior_scale: standard deviation of the prior.
      num_samples: number of reparameterized draws of `z` to average over.
      kl_weight: weight of the KL in `weighted_elbo`.
      radial_weight: weight of the radial term in `weighted_elbo`.
      location: center of the directional density, as for `conditional_elbo`.
    """

    prior_scale: ArrayLike
    num_samples: int
    kl_weight: ArrayLike
    radial_weight: ArrayLike
    location: Location


def conditional_elbo(
    key: Keys,
    target_embedding: Real[ArrayLike, "batch D"],
    posterior_mean: Real[ArrayLike, "batch D"],
    posterior_scale: Real[ArrayLike, "batch D"],
    likelihood: Likelihood,
    *,
    prior_scale: Real[ArrayLike, "#batch #D"] | Real[ArrayLike, " D"] | Real[ArrayLike, ""] = 1.0,
    num_samples: int = 1,
    kl_weight: Real[ArrayLike, " batch"] | Real[ArrayLike, ""] = 1.0,
    radial_weight: Real[ArrayLike, " batch"] | Real[ArrayLike, ""] = 1.0,
    untied_scale: Real[ArrayLike, "batch D"] | Real[ArrayLike, ""] | None = None,
    location: Location = "sample",
) -> ElboTerms:
    """ELBO of target embeddings given the posterior of the source view (docs eq. 13).

    The gradient of the target is stopped here. The polar Jacobian of the target is left out.

    Args:
      key: one key, or one for each example; consumed.
      target_embedding: `h_t`, `D >= 3`.
      posterior_mean: `mu` of `q(z | h_s)`.
      posterior_scale: `sigma` of `q(z | h_s)`, standard deviations, positive. It also gives the
        directional scale.
      likelihood: its numbers are one for all, or one for each example.
      prior_scale: standard deviation of the prior.
      num_samples: number of reparameterized draws of `z` to average over.
      kl_weight: weight of the KL in `weighted_elbo`, at least zero.
      radial_weight: weight of the radial term in `weighted_elbo`, at least zero.
      untied_scale: a scale of the likelihood to use and not the posterior's, in the same units;
        `scale_units` applies to it. None ties the scale to the posterior's.
      location: center of the directional density: "sample" is the direction of `z`, "mean" that of
        the posterior mean, which does not give a bound.

    Raises:
      ValueError: shapes differ, `D < 3`, `num_samples < 1`, a setting does not exist, a known scale
        or degrees of freedom are not positive, or a known weight is negative. Traced scales and
        degrees of freedom that are not positive give NaN.
    """
    domain.choice("location", location, LOCATIONS)
    h, mu, sigma, likelihood, p = _in_one_type(
        "target_embedding",
        target_embedding,
        posterior_mean,
        posterior_scale,
        likelihood,
        prior_scale,
    )
    radial_weight = _weight_of_examples("radial_weight", radial_weight, mu)
    kl_weight = _weight_of_examples("kl_weight", kl_weight, mu)
    h = jax.lax.stop_gradient(h)
    s = _scale_diag(sigma, untied_scale, likelihood)
    center = mu if location == "mean" else None
    noise = _standard_normal(key, num_samples, mu)
    of_samples = _over_samples(_log_p, noise, h, mu, sigma, s, center, likelihood)
    log_p_dir, log_p_rad, log_mass = (jnp.mean(values, axis=0) for values in of_samples)
    kl = gaussian_kl_divergence(mu, sigma, prior_scale=p)
    terms = ElboTerms(log_p_dir, log_p_rad, kl, radial_weight, kl_weight)
    return _with_information(terms, log_mass, likelihood, dim=mu.shape[-1])


def _log_p(
    noise: Float[Array, "batch D"],
    h: Float[Array, "batch D"],
    mu: Float[Array, "batch D"],
    sigma: Float[Array, "batch D"],
    s: Float[Array, "batch D"],
    center: Float[Array, "batch D"] | None,
    likelihood: Likelihood,
) -> LogLikelihood:
    """`log p(h | z)` of one sample `z = mu + sigma noise`, the integrand of eq. 13."""
    z = mu + sigma * noise
    return log_likelihood_terms(h, z, likelihood, scale_diag=s, location=center)


def _with_information(
    terms: ElboTerms, log_mass: Float[Array, " batch"], likelihood: Likelihood, *, dim: int
) -> ElboTerms:
    """Adds mass and information to the terms, unless the likelihood is unfactorized."""
    if not likelihood.is_factorised:
        return terms
    information = predictive_information(
        terms.directional_log_likelihood, None if likelihood.normalized else log_mass, dim=dim
    )
    return terms._replace(directional_log_mass=log_mass, predictive_information=information)


def predictive_information(
    directional_log_likelihood: Float[Array, "*batch"],
    log_mass: Float[Array, "*batch"] | None,
    *,
    dim: int,
) -> Float[Array, "*batch"]:
    """Predictive information `E_q[log p_dir(u_t | z) - log M] + log A_D`, nats (docs eq. 34).

    Below zero, the view predicts the other view worse than a uniform guess. The value bounds what
    one view tells about the other only while directions fill the sphere; a collapse increases it
    too.

    Args:
      directional_log_likelihood: `E_q[log p_dir]`, nats.
      log_mass: `E_q[log M]`; None if the density has mass one.
      dim: `D`.
    """
    information = directional_log_likelihood - mass.uniform_log_prob(dim)
    return information if log_mass is None else information - log_mass


def symmetric_elbo(
    key: Keys | tuple[Keys, Keys],
    view_1: HasView,
    view_2: HasView,
    likelihood: Likelihood,
    *,
    untied_scale: Real[ArrayLike, ""]
    | tuple[Real[ArrayLike, "batch D"], Real[ArrayLike, "batch D"]]
    | None = None,
    **settings: Unpack[ElboSettings],
) -> ElboTerms:
    """Mean of `elbo(2 | 1)` and `elbo(1 | 2)`, term by term (docs eq. 14).

    The training loss is `-mean(weighted_elbo) / D`, nats per dimension.

    Args:
      key: one key, or one for each example, or a pair of either. The first of a pair samples the
        posterior of `view_1`, the second that of `view_2`.
      view_1: has embedding, posterior_mean and posterior_scale.
      view_2: the other view.
      likelihood: as for `conditional_elbo`.
      untied_scale: None, one number, or a pair: the scale given view 1 and the scale given view 2.
      **settings: keyword arguments of `conditional_elbo`.

    Raises:
      ValueError: for the reasons of `conditional_elbo`.
    """
    key_1, key_2 = _key_for_each_view(key, view_1.embedding.shape[0])
    is_pair = isinstance(untied_scale, (tuple, list))
    scale_1, scale_2 = untied_scale if is_pair else (untied_scale, untied_scale)

    def elbo(target: HasView, source: HasView, key: Keys, scale: ArrayLike | None) -> ElboTerms:
        posterior = source.posterior_mean, source.posterior_scale
        return conditional_elbo(
            key, target.embedding, *posterior, likelihood, untied_scale=scale, **settings
        )

    both = elbo(view_2, view_1, key_1, scale_1), elbo(view_1, view_2, key_2, scale_2)
    return jax.tree.map(lambda a, b: (a + b) / 2, *both)


def importance_weighted_bound(
    key: Keys,
    embedding: Real[ArrayLike, "batch D"],
    posterior_mean: Real[ArrayLike, "batch D"],
    posterior_scale: Real[ArrayLike, "batch D"],
    likelihood: Likelihood,
    *,
    num_samples: int,
    prior_scale: Real[ArrayLike, "#batch #D"] | Real[ArrayLike, " D"] | Real[ArrayLike, ""] = 1.0,
    untied_scale: Real[ArrayLike, "batch D"] | Real[ArrayLike, ""] | None = None,
) -> Float[Array, " batch"]:
    """Bound `log 1/K sum_k p(h | z_k) p(z_k) / q(z_k | h)`, nats (docs eq. 15).

    The bound is that of Burda et al. 2016, eq. 8. Its expectation is the ELBO at `K = 1` and rises
    with `K` toward `log p(h)`. All `z` share one scale of the likelihood, which is the posterior's
    unless it is untied. The polar Jacobian is left out, as in training. No gradient is stopped.

    Args:
      key: one key, or one for each example; consumed.
      embedding: `h`.
      posterior_mean: `mu` of `q(z | h)`.
      posterior_scale: `sigma` of `q(z | h)`, positive.
      likelihood: as for `conditional_elbo`.
      num_samples: `K`.
      prior_scale: standard deviation of the prior.
      untied_scale: as for `conditional_elbo`.

    Returns:
      Nats, larger is better.

    Raises:
      ValueError: for the reasons of `conditional_elbo`.
    """
    h, mu, sigma, likelihood, p = _in_one_type(
        "embedding", embedding, posterior_mean, posterior_scale, likelihood, prior_scale
    )
    s = _scale_diag(sigma, untied_scale, likelihood)
    noise = _standard_normal(key, num_samples, mu)
    log_weights = _over_samples(_log_weight, noise, h, mu, sigma, s, p, likelihood)
    return jax.nn.logsumexp(log_weights, axis=0) - float(np.log(len(log_weights)))


def _log_weight(
    noise: Float[Array, "batch D"],
    h: Float[Array, "batch D"],
    mu: Float[Array, "batch D"],
    sigma: Float[Array, "batch D"],
    s: Float[Array, "batch D"],
    p: Float[Array, "batch D"],
    likelihood: Likelihood,
) -> Float[Array, " batch"]:
    """`log p(h | z) p(z) / q(z | h)` of one sample `z = mu + sigma noise`, the weight of eq. 15."""
    z = mu + sigma * noise
    log_p_dir, log_p_rad, _ = log_likelihood_terms(h, z, likelihood, scale_diag=s)
    # 2 log(p(z) / q(z | h)); the constants of the two Gaussians cancel. Subtract the logarithms of
    # the scales, because their quotient may underflow.
    log_ratio = jnp.square(noise) - jnp.square(z / p)
    log_ratio = log_ratio + 2 * (jnp.log(sigma) - jnp.log(p))
    return log_p_dir + log_p_rad + jnp.sum(log_ratio, axis=-1) / 2


# Checks of the arguments, and conversion to one float type.


def _in_one_type(
    name: str,
    embedding: ArrayLike,
    posterior_mean: ArrayLike,
    posterior_scale: ArrayLike,
    likelihood: Likelihood,
    prior_scale: ArrayLike,
) -> tuple[Array, Array, Array, Likelihood, Array]:
    """All arguments of a bound, checked and in one float type.

    Args:
      name: name of the embedding in errors.
      embedding: `h`.
      posterior_mean: `mu`.
      posterior_scale: `sigma`.
      likelihood: with numbers `[]` or `[batch]`.
      prior_scale: `p`.

    Returns:
      `h`, `mu` and `sigma`; the likelihood with one number for each example; `p` for each feature.
    """
    given = likelihood.df, likelihood.radial_df, likelihood.radial_scale
    h, mu, sigma, *numbers, p = sphere.at_least_float32(
        embedding, posterior_mean, posterior_scale, *given, prior_scale
    )
    domain.same_matrices(0, **{name: h, "posterior_mean": mu, "posterior_scale": sigma})
    sigma = domain.positive("posterior_scale", posterior_scale, sigma)
    # A column [batch, 1] would broadcast to all pairs of examples.
    of_examples = {
        name: domain.spread(name, number, mu.shape[:1], "a number or [batch]")
        for name, number in checked_numbers(likelihood, *numbers).items()
    }
    p = domain.positive("prior_scale", prior_scale, p)
    p = domain.spread("prior_scale", p, mu.shape, "a number, [D] or [batch, D]")
    return h, mu, sigma, dataclasses.replace(likelihood, **of_examples), p


def _weight_of_examples(
    name: str, given: ArrayLike, like: Float[Array, "batch D"]
) -> Float[Array, " batch"]:
    domain.weight(name, given)
    return domain.spread(
        name, jnp.asarray(given, like.dtype), like.shape[:1], "a number or [batch]"
    )


def _scale_diag(
    sigma: Float[Array, "batch D"], untied_scale: ArrayLike | None, likelihood: Likelihood
) -> Float[Array, "batch D"]:
    """The scale of the likelihood: tied to the posterior's unless another is given."""
    if untied_scale is not None:
        untied = jnp.asarray(untied_scale, sigma.dtype)
        untied = domain.positive("untied_scale", untied_scale, untied)
        sigma = domain.spread("untied_scale", untied, sigma.shape, "a number or [batch, D]")
    return likelihood_scale(sigma, scale_units=likelihood.scale_units)


# Sampling.


def _example_keys(key: Keys, batch: int) -> Key[Array, " batch"]:
    """One typed key for each example, so that its draw does not depend on the other examples."""
    if not isinstance(key, (Array, np.ndarray)):
        raise ValueError(f"key must be made by jax.random.key, got {key!r}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.random.split(key, batch)
    if key.shape != (batch,):
        raise ValueError(
            f"key must be one key or one for each of the {batch} examples, got shape {key.shape}"
        )
    return key


def _key_for_each_view(key: Keys | tuple[Keys, Keys], batch: int) -> tuple[Keys, Keys]:
    """A pair of keys stays as it is. Otherwise the key of each example is split in two."""
    if isinstance(key, (tuple, list)):
        key_1, key_2 = key
        return key_1, key_2
    pairs = jax.vmap(jax.random.split)(_example_keys(key, batch))
    return pairs[:, 0], pairs[:, 1]


def _standard_normal(
    key: Keys, num_samples: int, like: Float[Array, "batch D"]
) -> Float[Array, "samples batch D"]:
    """Noise of the dtype of `like`, drawn for each example from its own key."""
    num_samples = domain.whole_number("num_samples", num_samples, 1)
    draw = jax.vmap(lambda k: jax.random.normal(k, (num_samples, like.shape[-1]), like.dtype))
    return jnp.swapaxes(draw(_example_keys(key, like.shape[0])), 0, 1)


# One program: called on arrays, each of its hundreds of operations would be compiled for each shape,
# and the loop at each call.
@functools.partial(jax.jit, static_argnames="terms")
def _over_samples(
    terms: Callable[..., _T], noise: Float[Array, "samples batch D"], *arguments: Any
) -> _T:
    """Stacks `terms(noise[k], *arguments)` over the samples `k`, with bounded memory.

    All samples at once would keep about eighteen arrays `[batch, D]` for each sample until the
    gradient is taken. So large samples are computed one after the other, and again for the
    gradient. Small samples are computed in groups that fit into a cache, because a loop of small
    steps is slow.

    Args:
      terms: a function of a module, because its program is kept. It returns arrays without the
        axis `D`.
      noise: one draw for each sample.
      *arguments: the same for all samples.

    Returns:
      The terms, with a leading axis for the samples.
    """
    num_samples = noise.shape[0]
    # An empty batch has no noise.
    at_once = max(1, _SIDE_BY_SIDE_ELEMENTS // max(1, noise.size // num_samples))
    if num_samples <= at_once:
        return jax.vmap(lambda one: terms(one, *arguments))(noise)
    # In the loop the compiler cannot merge the second computation with the first.
    checkpointed = jax.checkpoint(lambda one: terms(one, *arguments), prevent_cse=False)
    return jax.lax.map(checkpointed, noise, batch_size=at_once)
