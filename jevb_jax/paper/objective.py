"""The JEVB objective: conditional and symmetric ELBO, importance-weighted bound.

One view's posterior explains the other view's embedding, whose gradient is stopped:

    elbo(t | s) = E_q(z|s)[ log p_dir(u_t | z) + log p_rad(r_t | z) ] - KL( q(z|s) || p(z) )

Everything is per example, `[batch]`, in nats. The reduction over the batch belongs to the caller.
Equation numbers are those of `docs/mathematics.md`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax.paper import densities, domain, mass, sphere

ScaleUnits = Literal["sphere", "unit"]
SCALE_UNITS: tuple[ScaleUnits, ...] = ("sphere", "unit")
Likelihood = Literal["factorised", "unfactorised"]
LIKELIHOODS: tuple[Likelihood, ...] = ("factorised", "unfactorised")
Location = Literal["sample", "mean"]
_T = TypeVar("_T")
# Noise of 256 KiB in float32, what a core's cache holds with the terms.
_SIDE_BY_SIDE_ELEMENTS = 2**16
LOCATIONS: tuple[Location, ...] = ("sample", "mean")


class ElboTerms(NamedTuple):
    """Terms of a bound, one value for each example, `[batch]`, nats.

    Attributes:
      directional_log_likelihood: `E_q[log p_dir]`, larger is better; of an unfactorised likelihood
        the whole.
      radial_log_likelihood: `E_q[log p_rad]`, larger is better; zero if unfactorised.
      kl: `KL(q || p)`, at least zero.
      radial_weight: weight of the radial term in the training objective.
      kl_weight: weight of the KL in the training objective.
      directional_log_mass: `E_q[log M]`, the mass of the density before any division by it
        (docs eq. 31). Without a gradient unless the density is normalised. None if unfactorised.
      predictive_information: `E_q[log p_norm(u_t | z)]` of the density divided by its mass, minus the
        uniform log-density (docs eq. 34). Below zero the view explains the other worse than chance.
        It bounds what one view tells of the other only while directions fill the sphere: a collapse
        raises it too. None if unfactorised.
    """

    directional_log_likelihood: Array
    radial_log_likelihood: Array
    kl: Array
    radial_weight: Array
    kl_weight: Array
    directional_log_mass: Array | None = None
    predictive_information: Array | None = None

    @property
    def log_likelihood(self) -> Array:
        """Directional plus radial, `[batch]`, nats, larger is better."""
        return self.directional_log_likelihood + self.radial_log_likelihood

    @property
    def elbo(self) -> Array:
        """The bound: both weights one, whatever was trained with. `[batch]`, larger is better."""
        return self.log_likelihood - self.kl

    @property
    def weighted_elbo(self) -> Array:
        """What training maximises, `[batch]`, nats: the bound when both weights are one."""
        return (
            self.directional_log_likelihood
            + self.radial_weight * self.radial_log_likelihood
            - self.kl_weight * self.kl
        )


class View(NamedTuple):
    """One view of a batch, as the networks give it.

    Attributes:
      embedding: `[batch, D]`, `h`.
      posterior_mean: `[batch, D]`, of `q(z | h)`.
      posterior_scale: `[batch, D]`, its standard deviations, positive.
    """

    embedding: Array
    posterior_mean: Array
    posterior_scale: Array


class HasView(Protocol):
    """Anything with the three attributes of `View`."""

    @property
    def embedding(self) -> Array:
        """`[batch, D]`."""
        ...

    @property
    def posterior_mean(self) -> Array:
        """`[batch, D]`."""
        ...

    @property
    def posterior_scale(self) -> Array:
        """`[batch, D]`."""
        ...


def likelihood_scale(posterior_scale: ArrayLike, *, scale_units: ScaleUnits = "sphere") -> Array:
    """The tied scale of the directional term, `s_i = c_D sigma_i` (docs eq. 11).

    Args:
      posterior_scale: `[..., D]`, standard deviations of the latent.
      scale_units: "sphere": `c_D = 1/sqrt(D)`, the length of a latent deviation on the unit sphere,
        since the prior's radius is near `sqrt(D)`. "unit": `c_D = 1`.

    Returns:
      `[..., D]`.

    Raises:
      ValueError: unknown `scale_units`, a known scale that is not positive. A traced one that is not
        positive has the value NaN.
    """
    _check_choice("scale_units", scale_units, SCALE_UNITS)
    (scale,) = sphere.at_least_float32(posterior_scale)
    scale = domain.positive("posterior_scale", posterior_scale, scale)
    if scale.ndim < 1:
        raise ValueError(f"posterior_scale must be [..., D], got the number {posterior_scale}")
    return scale / float(np.sqrt(scale.shape[-1])) if scale_units == "sphere" else scale


def _likelihood_terms(
    target_embedding: Array,
    latent: Array,
    scale_diag: Array,
    *,
    df: ArrayLike,
    radial_df: ArrayLike,
    radial_scale: ArrayLike,
    coordinates: sphere.Coordinates,
    space: densities.Space,
    directional_latent: Array | None = None,
    likelihood: Likelihood = "factorised",
    tails: mass.Tails = "joint",
    normalized: bool = False,
) -> tuple[Array, Array, Array]:
    """`log p_dir(u | m, s)`, `log p_rad(r | rho)` and `log M(m, s)`, `[...]`, of targets given latents.

    The directional term takes its location from `directional_latent`, if there is one.
    """
    if likelihood == "unfactorised":
        loc = latent if directional_latent is None else directional_latent
        joint = densities.multivariate_student_t_log_prob(
            target_embedding, loc=loc, scale_diag=scale_diag, df=df
        )
        return joint, jnp.zeros_like(joint), jnp.zeros_like(joint)
    direction, radius = sphere.polar_decomposition(target_embedding)
    loc, latent_radius = sphere.polar_decomposition(latent)
    if directional_latent is not None:
        loc, _ = sphere.polar_decomposition(directional_latent)
    density = {"df": df, "coordinates": coordinates, "tails": tails}
    directional = densities.directional_log_prob(
        direction, loc=loc, scale_diag=scale_diag, **density
    )
    held = (lambda x: x) if normalized else jax.lax.stop_gradient
    log_mass = mass.directional_log_mass(held(scale_diag), loc=held(loc), **density)
    radial = densities.radial_log_prob(
        radius, loc=latent_radius, scale=radial_scale, df=radial_df, space=space
    )
    return directional - log_mass if normalized else directional, radial, log_mass


def embedding_log_prob(
    embedding: ArrayLike,
    latent: ArrayLike,
    *,
    scale_diag: ArrayLike,
    df: ArrayLike,
    radial_df: ArrayLike,
    radial_scale: ArrayLike,
    coordinates: sphere.Coordinates = "chordal",
    space: densities.Space = "log",
    tails: mass.Tails = "joint",
    normalized: bool = False,
) -> Array:
    """`log p(h | z)` as a density in `R^D`, with the polar Jacobian `-(D - 1) log r` (docs eq. 12).

    The training objective leaves the Jacobian out: it is constant in the parameters.

    Args:
      embedding: `[..., D]`, `h`, not the zero vector; all arguments broadcast.
      latent: `[..., D]`, `z`.
      scale_diag: `[..., D]`, scale of the directional term, in units of the sphere.
      df: degrees of freedom of the directional term.
      radial_df: degrees of freedom of the radial term.
      radial_scale: scale of the radial term.
      coordinates: see `directional_log_prob`.
      space: see `radial_log_prob`.
      tails: see `directional_log_prob`.
      normalized: see `directional_log_prob`.

    Returns:
      `[...]`, nats.

    Raises:
      ValueError: as `directional_log_prob` and `radial_log_prob`.
    """
    h, z, s, nu, radial_nu, width = sphere.at_least_float32(
        embedding, latent, scale_diag, df, radial_df, radial_scale
    )
    s = domain.positive("scale_diag", scale_diag, s)
    nu = domain.degrees_of_freedom("df", df, nu)
    radial_nu = domain.degrees_of_freedom("radial_df", radial_df, radial_nu)
    width = domain.positive("radial_scale", radial_scale, width)
    embedding, latent, scale_diag, df, radial_df, radial_scale = domain.broadcast(
        {"embedding": h, "latent": z},
        {"df": nu, "radial_df": radial_nu, "radial_scale": width},
        {"scale_diag": s},
    )
    directional, radial, _ = _likelihood_terms(
        embedding,
        latent,
        scale_diag,
        df=df,
        radial_df=radial_df,
        radial_scale=radial_scale,
        coordinates=coordinates,
        space=space,
        tails=tails,
        normalized=normalized,
    )
    log_radius = sphere.safe_log(sphere.safe_norm(embedding))
    return directional + radial - (embedding.shape[-1] - 1) * log_radius


def _example_keys(key: Array, batch: int) -> Array:
    """One typed key for each example, so that its draw does not depend on its neighbours."""
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


def _check_posterior(target_embedding: Array, mean: Array, scale: Array) -> None:
    if not mean.ndim == 2 or not target_embedding.shape == mean.shape == scale.shape:
        raise ValueError(
            "target_embedding, posterior_mean and posterior_scale must share one shape [batch, D], "
            f"got {target_embedding.shape}, {mean.shape} and {scale.shape}"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _scale_diag(
    posterior_scale: Array, untied_scale: ArrayLike | None, *, scale_units: ScaleUnits
) -> Array:
    """`[batch, D]`, the likelihood's scale: tied to the posterior's unless another is given."""
    if untied_scale is not None:
        untied = jnp.asarray(untied_scale, posterior_scale.dtype)
        untied = domain.positive("untied_scale", untied_scale, untied)
        posterior_scale = domain.spread(
            "untied_scale", untied, posterior_scale.shape, "a number or [batch, D]"
        )
    return likelihood_scale(posterior_scale, scale_units=scale_units)


class _Density(NamedTuple):
    """The numbers of the likelihood and the prior, of one float type."""

    df: Array
    radial_df: Array
    radial_scale: Array
    prior_scale: Array


def _in_one_type(
    embedding: ArrayLike,
    posterior_mean: ArrayLike,
    posterior_scale: ArrayLike,
    **numbers: ArrayLike,
) -> tuple[Array, Array, Array, _Density]:
    """All arguments of a bound, checked and in one float type, lest its terms differ in theirs."""
    names = ("df", "radial_df", "radial_scale", "prior_scale")
    embedding, mean, scale, *rest = sphere.at_least_float32(
        embedding, posterior_mean, posterior_scale, *(numbers[name] for name in names)
    )
    _check_posterior(embedding, mean, scale)
    scale = domain.positive("posterior_scale", posterior_scale, scale)
    checks = (
        domain.degrees_of_freedom,
        domain.degrees_of_freedom,
        domain.positive,
        domain.positive,
    )
    checked = [
        check(name, numbers[name], cast)
        for check, name, cast in zip(checks, names, rest, strict=True)
    ]
    *of_examples, prior = checked
    # A column [batch, 1] would pair every example with the number of every other.
    of_examples = [
        domain.spread(name, number, mean.shape[:1], "a number or [batch]")
        for name, number in zip(names, of_examples, strict=False)
    ]
    prior = domain.spread("prior_scale", prior, mean.shape, "a number, [D] or [batch, D]")
    nu, radial_nu, width = of_examples
    return embedding, mean, scale, _Density(nu, radial_nu, width, prior)


def _standard_normal(key: Array, num_samples: int, like: Array) -> Array:
    """`[num_samples, batch, D]` standard normal noise of the dtype of `like` `[batch, D]`."""
    draw = jax.vmap(lambda k: jax.random.normal(k, (num_samples, like.shape[-1]), like.dtype))
    return jnp.swapaxes(draw(_example_keys(key, like.shape[0])), 0, 1)


def _over_samples(terms: Callable[[Array], _T], noise: Array) -> _T:
    """Stacks `terms(noise[s])` over samples, at the memory of few samples and of drawing the noise.

    Side by side, the terms and what their gradient needs are some eighteen arrays `[batch, D]` for each
    sample. One after the other, and computed anew for the gradient, they are needed once. Where a
    sample is small, as many as fit are taken side by side, since a loop of small steps is slow.

    Args:
      terms: of noise `[batch, D]`, arrays without the axis `D`.
      noise: `[num_samples, batch, D]`.

    Returns:
      The terms, with a leading axis `[num_samples]`.
    """
    num_samples = noise.shape[0]
    # A batch of no examples has no noise.
    at_once = max(1, _SIDE_BY_SIDE_ELEMENTS // max(1, noise.size // num_samples))
    if num_samples <= at_once:
        return jax.vmap(terms)(noise)
    # The loop itself keeps the compiler from merging the second computation with the first.
    checkpointed = jax.checkpoint(terms, prevent_cse=False)
    return jax.lax.map(checkpointed, noise, batch_size=at_once)


def conditional_elbo(
    key: Array,
    target_embedding: ArrayLike,
    posterior_mean: ArrayLike,
    posterior_scale: ArrayLike,
    *,
    df: ArrayLike,
    radial_df: ArrayLike,
    radial_scale: ArrayLike,
    scale_units: ScaleUnits = "sphere",
    prior_scale: ArrayLike = 1.0,
    coordinates: sphere.Coordinates = "chordal",
    space: densities.Space = "log",
    tails: mass.Tails = "joint",
    normalized: bool = False,
    num_samples: int = 1,
    kl_weight: ArrayLike = 1.0,
    radial_weight: ArrayLike = 1.0,
    untied_scale: ArrayLike | None = None,
    location: Location = "sample",
    likelihood: Likelihood = "factorised",
) -> ElboTerms:
    """ELBO of target embeddings given the source view's posterior (docs eq. 13).

    The target's gradient is stopped here. The polar Jacobian of the target is left out.

    Args:
      key: one key, or `[batch]` keys, one for each example; consumed.
      target_embedding: `[batch, D]`, `h_t`, `D >= 3`.
      posterior_mean: `[batch, D]`, of `q(z | h_s)`.
      posterior_scale: `[batch, D]`, its standard deviations, positive; also the directional scale.
      df: degrees of freedom of the directional term: positive, `inf` is the Gaussian.
      radial_df: degrees of freedom of the radial term.
      radial_scale: scale of the radial term, positive.
      scale_units: units of the tied scale, see `likelihood_scale`.
      prior_scale: standard deviation of the prior.
      coordinates: see `directional_log_prob`.
      space: see `radial_log_prob`.
      tails: see `directional_log_prob`.
      normalized: see `directional_log_prob`.
      num_samples: reparameterised draws of `z` averaged over.
      kl_weight: weight of the KL in `weighted_elbo`, at least zero, a number or `[batch]`.
      radial_weight: weight of the radial term in `weighted_elbo`, likewise.
      untied_scale: a scale of the likelihood in the latent's units, a number or `[batch, D]`, in place
        of the posterior's; None ties the two. `scale_units` applies to it.
      location: of the directional term: the "sample" of `z`, or the posterior "mean", which is no
        longer a bound.
      likelihood: "factorised", or "unfactorised": one Student-t about `z` in `R^D` (docs eq. 16).

    Returns:
      `ElboTerms` of `[batch]` arrays, of one float type.

    Raises:
      ValueError: shapes that differ, `D < 3`, `num_samples < 1`, a setting that does not exist; known
        scales or degrees of freedom that are not positive, known weights that are negative. Traced
        scales and degrees of freedom that are not positive have the value NaN.
    """
    target, mean, scale, density = _in_one_type(
        target_embedding,
        posterior_mean,
        posterior_scale,
        df=df,
        radial_df=radial_df,
        radial_scale=radial_scale,
        prior_scale=prior_scale,
    )
    num_samples = domain.whole_number("num_samples", num_samples, 1)
    weights = []
    for name, given in (("kl_weight", kl_weight), ("radial_weight", radial_weight)):
        domain.weight(name, given)
        weight = jnp.asarray(given, mean.dtype)
        weights.append(domain.spread(name, weight, mean.shape[:1], "a number or [batch]"))
    target = jax.lax.stop_gradient(target)
    _check_choice("location", location, LOCATIONS)
    _check_choice("likelihood", likelihood, LIKELIHOODS)
    scale_diag = _scale_diag(scale, untied_scale, scale_units=scale_units)

    def sample_terms(noise: Array) -> tuple[Array, Array, Array]:
        return _likelihood_terms(
            target,
            mean + scale * noise,
            scale_diag,
            df=density.df,
            radial_df=density.radial_df,
            radial_scale=density.radial_scale,
            coordinates=coordinates,
            space=space,
            tails=tails,
            normalized=normalized,
            directional_latent=mean if location == "mean" else None,
            likelihood=likelihood,
        )

    directional, radial, log_mass = (
        jnp.mean(values, axis=0)
        for values in _over_samples(sample_terms, _standard_normal(key, num_samples, mean))
    )
    is_factorised = likelihood == "factorised"
    information = directional - mass.uniform_log_prob(mean.shape[-1])
    return ElboTerms(
        directional_log_likelihood=directional,
        radial_log_likelihood=radial,
        kl=densities.gaussian_kl_divergence(mean, scale, prior_scale=density.prior_scale),
        kl_weight=weights[0],
        radial_weight=weights[1],
        directional_log_mass=log_mass if is_factorised else None,
        predictive_information=(
            (information if normalized else information - log_mass) if is_factorised else None
        ),
    )


def symmetric_elbo(
    key: Array | tuple[Array, Array],
    view_1: HasView,
    view_2: HasView,
    *,
    df: ArrayLike,
    radial_df: ArrayLike,
    radial_scale: ArrayLike,
    scale_units: ScaleUnits = "sphere",
    prior_scale: ArrayLike = 1.0,
    coordinates: sphere.Coordinates = "chordal",
    space: densities.Space = "log",
    tails: mass.Tails = "joint",
    normalized: bool = False,
    num_samples: int = 1,
    kl_weight: ArrayLike = 1.0,
    radial_weight: ArrayLike = 1.0,
    untied_scale: ArrayLike | tuple[Array, Array] | None = None,
    location: Location = "sample",
    likelihood: Likelihood = "factorised",
) -> ElboTerms:
    """Mean of `elbo(2 | 1)` and `elbo(1 | 2)`, term by term (docs eq. 14).

    The training loss is `-mean(weighted_elbo) / D`, nats per dimension.

    Args:
      key: one key; or `[batch]` keys; or a pair of either, of which the first samples the posterior of
        `view_1` and the second that of `view_2`.
      view_1: embedding, posterior_mean and posterior_scale, each `[batch, D]`.
      view_2: the same for the other view.
      df: see `conditional_elbo`, also for all that follow.
      radial_df: degrees of freedom of the radial term.
      radial_scale: scale of the radial term, positive.
      scale_units: units of the tied scale.
      prior_scale: standard deviation of the prior.
      coordinates: coordinates of the directional term.
      space: space of the radial term.
      tails: joint or feature-wise.
      normalized: whether the directional density is divided by its mass.
      num_samples: draws for each posterior.
      kl_weight: weight of the KL in `weighted_elbo`.
      radial_weight: weight of the radial term in `weighted_elbo`.
      untied_scale: None, one number, or a pair of `[batch, D]`, of the likelihoods given view 1 and
        given view 2.
      location: where the directional density is centered: a sample or the mean.
      likelihood: factorised or not.

    Returns:
      `ElboTerms` of `[batch]` arrays.

    Raises:
      ValueError: as `conditional_elbo`.
    """
    if isinstance(key, (tuple, list)):
        key_1, key_2 = key
    else:
        keys = _example_keys(key, view_1.embedding.shape[0])
        pairs = jax.vmap(jax.random.split)(keys)
        key_1, key_2 = pairs[:, 0], pairs[:, 1]

    is_pair = isinstance(untied_scale, (tuple, list))
    scale_1, scale_2 = untied_scale if is_pair else (untied_scale,) * 2

    def direction_elbo(
        sample_key: Array, source: HasView, target: HasView, untied_scale: ArrayLike | None
    ) -> ElboTerms:
        return conditional_elbo(
            sample_key,
            target.embedding,
            source.posterior_mean,
            source.posterior_scale,
            df=df,
            radial_df=radial_df,
            radial_scale=radial_scale,
            scale_units=scale_units,
            prior_scale=prior_scale,
            coordinates=coordinates,
            space=space,
            tails=tails,
            normalized=normalized,
            num_samples=num_samples,
            kl_weight=kl_weight,
            radial_weight=radial_weight,
            untied_scale=untied_scale,
            location=location,
            likelihood=likelihood,
        )

    elbo_2_given_1 = direction_elbo(key_1, view_1, view_2, scale_1)
    elbo_1_given_2 = direction_elbo(key_2, view_2, view_1, scale_2)
    return jax.tree.map(lambda a, b: (a + b) / 2, elbo_2_given_1, elbo_1_given_2)


def importance_weighted_bound(
    key: Array,
    embedding: ArrayLike,
    posterior_mean: ArrayLike,
    posterior_scale: ArrayLike,
    *,
    num_samples: int,
    df: ArrayLike,
    radial_df: ArrayLike,
    radial_scale: ArrayLike,
    scale_units: ScaleUnits = "sphere",
    prior_scale: ArrayLike = 1.0,
    coordinates: sphere.Coordinates = "chordal",
    space: densities.Space = "log",
    tails: mass.Tails = "joint",
    normalized: bool = False,
    untied_scale: ArrayLike | None = None,
    likelihood: Likelihood = "factorised",
) -> Array:
    """`log 1/K sum_k p(h | z_k) p(z_k) / q(z_k | h)` (docs eq. 15; Burda et al. 2016, eq. 8).

    Its expectation is the ELBO at `K = 1` and rises with `K` towards `log p(h)`. The scale of the
    likelihood, the posterior's unless it is untied, is held for all `z`. The polar Jacobian is left
    out, as in training. No gradient is stopped.

    Args:
      key: one key, or `[batch]` keys; consumed.
      embedding: `[batch, D]`, `h`.
      posterior_mean: `[batch, D]`.
      posterior_scale: `[batch, D]`, positive.
      num_samples: `K`.
      df: see `conditional_elbo`, also for all that follow.
      radial_df: degrees of freedom of the radial term.
      radial_scale: scale of the radial term, positive.
      scale_units: units of the tied scale.
      prior_scale: standard deviation of the prior.
      coordinates: coordinates of the directional term.
      space: space of the radial term.
      tails: joint or feature-wise.
      normalized: whether the directional density is divided by its mass.
      untied_scale: of the likelihood, if it is not the posterior's.
      likelihood: factorised or not.

    Returns:
      `[batch]`, nats, larger is better.

    Raises:
      ValueError: as `conditional_elbo`.
    """
    target, mean, scale, density = _in_one_type(
        embedding,
        posterior_mean,
        posterior_scale,
        df=df,
        radial_df=radial_df,
        radial_scale=radial_scale,
        prior_scale=prior_scale,
    )
    prior = density.prior_scale
    num_samples = domain.whole_number("num_samples", num_samples, 1)
    _check_choice("likelihood", likelihood, LIKELIHOODS)
    scale_diag = _scale_diag(scale, untied_scale, scale_units=scale_units)

    def log_weight(noise: Array) -> Array:
        latent = mean + scale * noise
        directional, radial, _ = _likelihood_terms(
            target,
            latent,
            scale_diag,
            df=density.df,
            radial_df=density.radial_df,
            radial_scale=density.radial_scale,
            coordinates=coordinates,
            space=space,
            tails=tails,
            normalized=normalized,
            likelihood=likelihood,
        )
        # log p(z) - log q(z), in which the constants of the two Gaussians cancel. Of the logarithms:
        # the quotient of the scales may underflow.
        log_ratio = jnp.square(noise) - jnp.square(latent / prior)
        log_ratio = log_ratio + 2 * (jnp.log(scale) - jnp.log(prior))
        return directional + radial + jnp.sum(log_ratio, axis=-1) / 2

    log_weights = _over_samples(log_weight, _standard_normal(key, num_samples, mean))
    return jax.nn.logsumexp(log_weights, axis=0) - float(np.log(num_samples))
