"""Scores computed from JEVB's terms. Larger is more out of distribution."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from jevb_jax.paper import domain, sphere
from jevb_jax.paper.densities import gaussian_kl_divergence
from jevb_jax.paper.likelihood import Likelihood, checked_numbers
from jevb_jax.paper.objective import (
    Keys,
    Location,
    View,
    conditional_elbo,
    importance_weighted_bound,
)


def dtype_of(values: Any) -> np.dtype:
    """The type of numbers, without a copy of them."""
    return np.dtype(values.dtype if hasattr(values, "dtype") else np.asarray(values).dtype)


def real_numbers(name: str, values: Real[ArrayLike, "..."]) -> Float[Array, "..."]:
    """Numbers as floating point of at least 32 bits, so that they neither tie nor wrap around."""
    dtype = dtype_of(values)
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name} must be real numbers, got {dtype}")
    (numbers,) = sphere.at_least_float32(values)
    return numbers


def never_certain(score: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Replaces minus infinity by infinity: an overflow does not make an image ordinary."""
    return jnp.where(jnp.isneginf(score), jnp.inf, score)


class UncertaintyTerms(NamedTuple):
    """JEVB's terms of images, each `[N]`, nats, as means over views and samples.

    In all but the last, each view is explained by its own posterior.

    Attributes:
      directional_log_likelihood: `E_q(z | h)[log p_dir(u | z)]`.
      radial_log_likelihood: `E_q(z | h)[log p_rad(r | z)]`.
      kl: `KL(q(z | h) || p(z))`.
      posterior_entropy: differential entropy of `q(z | h)`.
      importance_weighted_bound: a bound on `log p(h)` (docs eq. 15).
      cross_view_log_likelihood: `E_q(z | h_s)[log p(h_t | z)]` over ordered pairs of different
        views; None for a single view.
    """

    directional_log_likelihood: Float[Array, " batch"]
    radial_log_likelihood: Float[Array, " batch"]
    kl: Float[Array, " batch"]
    posterior_entropy: Float[Array, " batch"]
    importance_weighted_bound: Float[Array, " batch"]
    cross_view_log_likelihood: Float[Array, " batch"] | None


def uncertainty_terms(
    key: Keys,
    views: View,
    likelihood: Likelihood,
    *,
    num_samples: int,
    prior_scale: Real[ArrayLike, "..."] = 1.0,
    untied_scale: Real[ArrayLike, "..."] | None = None,
    location: Location = "sample",
) -> UncertaintyTerms:
    """JEVB's terms of images from one or more of their views (docs eq. 22).

    Args:
      key: one typed key, whose draws serve all images, or `[N]` keys, one for each image. In both
        cases a score does not depend on the batch.
      views: embedding, posterior_mean and posterior_scale of every view, each `[V, N, D]`.
      likelihood: as for `conditional_elbo`; its numbers are one for all, or `[N]`.
      num_samples: number of draws from each posterior.
      prior_scale: standard deviation of the prior; a number, `[D]` or `[N, D]`.
      untied_scale: as for `conditional_elbo`, a number or `[V, N, D]`.
      location: as for `conditional_elbo`. The importance-weighted bound always uses samples.

    Raises:
      ValueError: arrays are not `[V, N, D]`, or a setting is wrong, as for `conditional_elbo`. A
        posterior scale that is not positive gives NaN for its own image only.
    """
    shapes = {name: jnp.shape(values) for name, values in views._asdict().items()}
    if len(set(shapes.values())) > 1 or len(shapes["embedding"]) != 3:
        raise ValueError(f"views must share one shape [V, N, D], got {shapes}")
    if shapes["embedding"][0] < 1:
        raise ValueError(f"terms need at least 1 view, the first axis of views, got {shapes}")
    num_samples = domain.whole_number("num_samples", num_samples, 1)
    views = View(*sphere.at_least_float32(*views))
    mean = views.posterior_mean
    domain.positive("prior_scale", prior_scale, jnp.asarray(prior_scale, mean.dtype))
    numbers = likelihood.df, likelihood.radial_df, likelihood.radial_scale
    checked_numbers(likelihood, *sphere.at_least_float32(*numbers))
    if untied_scale is not None:
        untied = jnp.asarray(untied_scale, mean.dtype)
        domain.positive("untied_scale", untied_scale, untied)
        untied_scale = jnp.broadcast_to(untied, mean.shape)
    return _terms_of_views(
        key,
        views,
        likelihood,
        prior_scale,
        untied_scale,
        num_samples=num_samples,
        location=location,
    )


# One program: called on arrays, its loop would be compiled at each call.
@functools.partial(jax.jit, static_argnames=("num_samples", "location"))
def _terms_of_views(
    key: Keys,
    views: View,
    likelihood: Likelihood,
    prior_scale: Any,
    untied_scale: Any,
    *,
    num_samples: int,
    location: Location,
) -> UncertaintyTerms:
    """`uncertainty_terms` of arguments that are checked."""
    num_views, num_images, dim = views.embedding.shape

    def flat(values: Array) -> Array:
        """`[V, N, ...]` as the batch `[N * V, ...]`, so that each device keeps its own images."""
        return jnp.swapaxes(values, 0, 1).reshape(-1, *values.shape[2:])

    def over_views(values: Array) -> Array:
        return jnp.mean(values.reshape(num_images, num_views), axis=1)

    def keys(purpose: ArrayLike) -> Array:
        """A key for each view of each image; all images share them if there is one `key`."""
        numbers = purpose * num_views + jnp.arange(num_views)
        of_views = jax.vmap(jax.random.fold_in, (None, 0), out_axes=-1)
        of_images = of_views if key.ndim == 0 else jax.vmap(of_views, (0, None))
        return jnp.broadcast_to(of_images(key, numbers), (num_images, num_views)).reshape(-1)

    mean, given = flat(views.posterior_mean), flat(views.posterior_scale)
    scale = domain.positive("posterior_scale", given, given)  # for the entropy, which has no check
    likelihood, prior_scale = _of_images(likelihood, prior_scale, num_views, views.posterior_mean)
    settings: Any = {
        "prior_scale": prior_scale,
        "num_samples": num_samples,
        "untied_scale": None if untied_scale is None else flat(untied_scale),
    }

    def log_likelihoods(shift: Array) -> tuple[Array, Array]:
        """Log-likelihoods when the target of view `v` is view `v + shift`."""
        target = flat(jnp.roll(views.embedding, -shift, axis=0))
        terms = conditional_elbo(
            keys(shift), target, mean, scale, likelihood, location=location, **settings
        )
        return (
            over_views(terms.directional_log_likelihood),
            over_views(terms.radial_log_likelihood),
        )

    # One shift after the other: the program is compiled once, and memory stays bounded.
    directional, radial = jax.lax.map(log_likelihoods, jnp.arange(num_views))
    cross_view = None
    if num_views > 1:
        cross_view = jnp.mean((directional + radial)[1:], axis=0)
    bound = importance_weighted_bound(
        keys(num_views), flat(views.embedding), mean, scale, likelihood, **settings
    )
    kl = gaussian_kl_divergence(mean, scale, prior_scale=prior_scale)
    entropy = jnp.sum(jnp.log(scale), axis=-1) + dim / 2 * math.log(2 * math.pi * math.e)
    return UncertaintyTerms(
        directional_log_likelihood=directional[0],
        radial_log_likelihood=radial[0],
        kl=over_views(kl),
        posterior_entropy=over_views(entropy),
        importance_weighted_bound=over_views(bound),
        cross_view_log_likelihood=cross_view,
    )


def _of_images(
    likelihood: Likelihood,
    prior_scale: ArrayLike,
    num_views: int,
    mean: Float[Array, "views batch D"],
) -> tuple[Likelihood, Float[Array, "batch_of_views D"]]:
    """The likelihood's numbers, `[N * V]`, and the prior's scale, `[N * V, D]`, of each image."""
    given = likelihood.df, likelihood.radial_df, likelihood.radial_scale
    _, *numbers, prior = sphere.at_least_float32(mean, *given, prior_scale)
    of_images = {
        name: domain.spread(name, number, mean.shape[1:2], "a number or [N]")
        for name, number in checked_numbers(likelihood, *numbers).items()
    }
    prior = domain.spread("prior_scale", prior, mean.shape[1:], "a number, [D] or [N, D]")
    of_views = {name: jnp.repeat(number, num_views) for name, number in of_images.items()}
    return dataclasses.replace(likelihood, **of_views), jnp.repeat(prior, num_views, axis=0)


def negative_log_likelihood_score(terms: UncertaintyTerms) -> Float[Array, " batch"]:
    """`-E_q[log p_dir + log p_rad]`, `[N]`, nats (docs eq. 23)."""
    return -(terms.directional_log_likelihood + terms.radial_log_likelihood)


def directional_score(terms: UncertaintyTerms) -> Float[Array, " batch"]:
    """`-E_q[log p_dir]`, `[N]`, nats (docs eq. 23)."""
    return -terms.directional_log_likelihood


def radial_score(terms: UncertaintyTerms) -> Float[Array, " batch"]:
    """`-E_q[log p_rad]`, `[N]`, nats (docs eq. 23)."""
    return -terms.radial_log_likelihood


def negative_elbo_score(terms: UncertaintyTerms) -> Float[Array, " batch"]:
    """The negative bound with both weights one, `[N]`, nats (docs eq. 23)."""
    return negative_log_likelihood_score(terms) + terms.kl


def importance_weighted_score(terms: UncertaintyTerms) -> Float[Array, " batch"]:
    """The negative importance-weighted bound, `[N]`, nats (docs eq. 23)."""
    return -terms.importance_weighted_bound


def kl_score(terms: UncertaintyTerms) -> Float[Array, " batch"]:
    """`-KL(q || p)`, `[N]`, nats (docs eq. 23). It is large if the posterior is close to the prior.

    This sign follows the idea that an uncertain encoder returns the prior. It is wrong for some
    sets of images; see `typicality_features`.
    """
    return never_certain(-terms.kl)


def posterior_entropy_score(terms: UncertaintyTerms) -> Float[Array, " batch"]:
    """Differential entropy of the posterior, `[N]`, nats (docs eq. 23)."""
    return never_certain(terms.posterior_entropy)


def cross_view_score(terms: UncertaintyTerms) -> Float[Array, " batch"]:
    """`-E_q(z | h_s)[log p(h_t | z)]` over pairs of views, `[N]`, nats (docs eq. 23).

    It is large if the views of an image disagree.

    Raises:
      ValueError: the terms are of a single view.
    """
    if terms.cross_view_log_likelihood is None:
        raise ValueError("the cross-view score needs terms of at least 2 views")
    return -terms.cross_view_log_likelihood


def typicality_features(terms: UncertaintyTerms) -> Float[Array, "batch terms"]:
    """The vector of JEVB's terms, `[N, 5]` (`[N, 4]` for a single view), nats (docs eq. 24).

    A single term rates images that are simpler than the training images as more likely (Nalisnick
    et al. 2019). A density of these vectors, fitted to in-distribution images by `fit_mahalanobis`
    or `fit_whitened_knn`, rates deviations to both sides as strange.
    """
    columns = [
        terms.directional_log_likelihood,
        terms.radial_log_likelihood,
        terms.kl,
        terms.posterior_entropy,
    ]
    if terms.cross_view_log_likelihood is not None:
        columns.append(terms.cross_view_log_likelihood)
    return jnp.stack(columns, axis=-1)


def concentration_score(concentration: Real[ArrayLike, "*batch"]) -> Float[Array, "*batch"]:
    """VI-SimSiam's uncertainty `-k`, large if uncertain (docs eq. 23; Nakamura et al. 2023).

    Args:
      concentration: `k`, `[N]`, positive.

    Returns:
      `[N]`.
    """
    return never_certain(-real_numbers("concentration", concentration))
