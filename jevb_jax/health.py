"""Health of a representation: has it collapsed, and does its uncertainty say anything?

The measures are pure and jittable, so that they run on the device and their numbers are fetched
behind the computation. A NaN that goes in comes out. The alarms judge fetched numbers; they keep no
state, so that a resumed run judges as an uninterrupted one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax.paper import densities, domain, sphere
from jevb_jax.paper.objective import ElboTerms

# Thresholds of the alarms. "Healthy runs" are those of `docs/results`, and short runs of every
# method and of JEVB with other priors, at D from 16 to 512, looked at from step 20 on.

# The networks are judged with BatchNorm's running statistics, which keep 0.9 of the old value a
# step. Before this step more than 12% of their arbitrary start is left: healthy runs then show
# directions all alike (embedding_std 0.16) and radii 16 times too small.
ALARM_WARMUP_STEPS = 20
# A young likelihood is below the uniform density in healthy runs too: smoke runs of 48 steps end there.
INFORMATION_WARMUP_STEPS = 200
# The mean direction has a share 1 - std^2 = 0.91 of the energy. Healthy runs stay above 0.5; a
# projector without BatchNorm has 0.8, because ReLU leaves a common offset.
MIN_EMBEDDING_STD = 0.3
# Partial collapse of JEVB at the posterior's mean has 5.6 of 128 axes, and accuracy suffers. Healthy
# runs stay above 8 of 64 and, in few dimensions, above 0.4 D; so the lower of the two counts.
MIN_EFFECTIVE_RANK = 6.0
MIN_EFFECTIVE_RANK_SHARE = 0.2
# Over sqrt(D). A loss of distances collapses so (VICReg's invariance alone), and directions do not
# see it. Healthy runs stay above 0.3.
MIN_RADIUS = 0.01
# Of an image, not of a dimension: E[KL(q || p)] bounds the information, in nats, that a sample has of
# its image, at any D. To tell two halves of the images apart takes log 2 = 0.69.
MIN_POSTERIOR_KL_NATS = 0.5
# Of `softplus(raw) + min_scale`, the network then moves less than a tenth.
FLOOR_MARGIN = 1.1
MAX_SHARE_AT_FLOOR = 0.1
# Against sqrt(D), where a projector that ends with BatchNorm has it, and where one that does not
# begins within a factor of 1.6. Healthy runs stay within 3.
MAX_RADIUS_FACTOR = 5.0
# Below: a sample of the latent alone has a log-radius of standard deviation 1 / sqrt(2 D), more than
# this for every D under 100,000, and the network's own floor is 1e-3. Above: a factor of 20.
RADIAL_WIDTH_RANGE = (2e-3, 3.0)
# The power spherical density at its mean direction is 2^k times that at a right angle: 3.5% more. It
# starts at 0.69, its floor is 1e-3.
MIN_CONCENTRATION = 0.05
# Of the mean cosine k / (D - 1 + k): the directions are predicted to 2.6 degrees.
MAX_MEAN_COSINE = 0.999


class PosteriorSummary(NamedTuple):
    """What the posteriors of a set of images look like, one number each, `[]`.

    Attributes:
      scale_mean: mean standard deviation, over images and features.
      scale_anisotropy: mean over images of the standard deviation over features of `log scale`:
        0 when every feature is equally uncertain.
      scale_spread: standard deviation over images of the mean over features of `log scale`: 0 when
        every image is equally uncertain, and the uncertainty then ranks nothing.
      mean_rms: root mean square of the posterior means, near the prior's scale when the latent
        is used in full, 0 when the posterior has fallen onto the prior's mean.
      kl_per_dimension: mean over images of `KL(q || p) / D`, nats per dimension; 0 on posterior
        collapse.
      signal_to_noise: mean over images of `|mu| / sqrt(sum_i sigma_i^2)`: near 0 the direction of a
        sample says nothing of the image.
    """

    scale_mean: Array
    scale_anisotropy: Array
    scale_spread: Array
    mean_rms: Array
    kl_per_dimension: Array
    signal_to_noise: Array


def _as_matrix(name: str, values: ArrayLike) -> Array:
    (matrix,) = sphere.at_least_float32(values)
    if matrix.ndim != 2 or matrix.shape[0] < 2:
        raise ValueError(f"{name} must be [N, D] with at least 2 images, got shape {matrix.shape}")
    return matrix


def embedding_std(embedding: ArrayLike) -> Array:
    """Spread of the directions, SimSiam's collapse signal (Chen and He 2021, figure 2).

    The standard deviation over images of each coordinate of `h / |h|`, averaged over coordinates,
    times `sqrt(D)`.

    Args:
      embedding: `[N, D]`, `N >= 2`. A zero vector counts as the direction zero.

    Returns:
      `[]`, in `[0, 1]`: 1 when the directions fill the sphere evenly, 0 when they are all the same.
      It does not see dimensional collapse onto a few axes as zero: read it with `effective_rank`.

    Raises:
      ValueError: not two axes, or fewer than two images.
    """
    direction, _ = sphere.polar_decomposition(_as_matrix("embedding", embedding))
    return jnp.mean(jnp.std(direction, axis=0)) * float(np.sqrt(direction.shape[-1]))


def effective_rank(embedding: ArrayLike, *, centered: bool = True) -> Array:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007).

    `exp(-sum_i p_i log p_i)` with `p_i = sigma_i / sum_j sigma_j`. With `centered=False` it is
    RankMe (Garrido et al. 2023, eq. 1) without the paper's 1e-7 added to `p`.

    Singular values below the rounding error of `embedding` itself count as zero. Otherwise a
    constant embedding, which leaves only rounding noise once centred, would be reported as of full
    rank.

    Args:
      embedding: `[N, D]` with `N > D`.
      centered: subtract the mean over images first, so that a large common offset is not a
        direction.

    Returns:
      `[]`, in `[1, D]`; 1 at full collapse. The cost is that of a QR of `[N, D]` and an SVD of
      `[D, D]`: meant for a logging cadence, not for every step.

    Raises:
      ValueError: `N <= D`, where the value is bounded by the number of images and says nothing
        about the representation; not two axes.
    """
    matrix = _as_matrix("embedding", embedding)
    num_images, dim = matrix.shape
    if num_images <= dim:
        raise ValueError(
            f"effective_rank needs more images than dimensions, got N = {num_images}, D = {dim}: "
            f"the value would be bounded by N. Give it more than {dim} images, for instance the "
            "embeddings of several batches together"
        )
    # Largest entry one: squares neither overflow nor underflow, and the value has no units. A quarter
    # of large ones first: the reciprocal of the largest numbers underflows.
    largest = jnp.max(jnp.abs(matrix))
    quarter = jnp.where(largest > 1, 0.25, jnp.ones_like(largest))
    largest, matrix = largest * quarter, matrix * quarter
    matrix = matrix / jnp.where(largest == 0, jnp.ones_like(largest), largest)
    rounding = 4 * float(jnp.finfo(matrix.dtype).eps) * jnp.sqrt(jnp.sum(jnp.square(matrix)))
    if centered:
        matrix = matrix - jnp.mean(matrix, axis=0, keepdims=True)
    # Eigenvalues of the Gram matrix would be cheaper, but in float32 they lose every singular value
    # under 3e-4 of the largest; the triangular factor keeps them down to 1e-7.
    singular_values = jnp.linalg.svd(jnp.linalg.qr(matrix, mode="r"), compute_uv=False)
    # Not `where(> rounding, ...)`: a NaN must stay one.
    singular_values = jnp.where(singular_values <= rounding, 0, singular_values)
    total = jnp.sum(singular_values)
    shares = singular_values / jnp.where(total == 0, jnp.ones_like(total), total)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(shares)))


def posterior_summary(
    posterior_mean: ArrayLike, posterior_scale: ArrayLike, *, prior_scale: ArrayLike = 1.0
) -> PosteriorSummary:
    """Size and spread of the posterior scales, and how far the posterior has left the prior.

    Args:
      posterior_mean: `[N, D]`.
      posterior_scale: `[N, D]`, standard deviations, positive.
      prior_scale: standard deviation of the prior.

    Returns:
      `PosteriorSummary` of scalars.

    Raises:
      ValueError: shapes that differ, not two axes, fewer than two images, a known `prior_scale` that
        is not positive.
    """
    mean = _as_matrix("posterior_mean", posterior_mean)
    scale = _as_matrix("posterior_scale", posterior_scale)
    if mean.shape != scale.shape:
        raise ValueError(
            "posterior_mean and posterior_scale must share one shape [N, D], "
            f"got {mean.shape} and {scale.shape}"
        )
    (prior,) = sphere.at_least_float32(prior_scale)
    prior_scale = domain.positive("prior_scale", prior_scale, prior)
    log_scale = jnp.log(scale)
    # Compiled, where a scale that diverged is NaN and no error.
    kl = jax.jit(densities.gaussian_kl_divergence)(mean, scale, prior_scale=prior_scale)
    return PosteriorSummary(
        scale_mean=jnp.mean(scale),
        scale_anisotropy=jnp.mean(jnp.std(log_scale, axis=-1)),
        scale_spread=jnp.std(jnp.mean(log_scale, axis=-1)),
        mean_rms=sphere.safe_norm(mean.ravel()) / float(np.sqrt(mean.size)),
        kl_per_dimension=jnp.mean(kl) / mean.shape[-1],
        signal_to_noise=jnp.mean(sphere.safe_norm(mean) / sphere.safe_norm(scale)),
    )


def embedding_log_radius(embedding: ArrayLike) -> Array:
    """Mean over images of `log(|h| / sqrt(D))`: 0 where the features have variance one.

    Args:
      embedding: `[N, D]`, `N >= 2`. A radius of zero counts as the smallest normal number.

    Returns:
      `[]`.

    Raises:
      ValueError: not two axes, or fewer than two images.
    """
    matrix = _as_matrix("embedding", embedding)
    # Not `safe_log`, which reads a NaN as the smallest number.
    radius = jnp.maximum(sphere.safe_norm(matrix), float(jnp.finfo(matrix.dtype).tiny))
    return jnp.mean(jnp.log(radius)) - float(np.log(matrix.shape[-1])) / 2


def share_at_floor(scale: ArrayLike, *, min_scale: float) -> Array:
    """Share of scales that are `FLOOR_MARGIN * min_scale` or less.

    Args:
      scale: of any shape, positive.
      min_scale: the floor, `model.min_scale`.

    Returns:
      `[]`, in `[0, 1]`.

    Raises:
      ValueError: no scales, a known `min_scale` that is negative or not finite.
    """
    (values,) = sphere.at_least_float32(scale)
    if not values.size:
        raise ValueError(f"scale must hold at least one scale, got shape {values.shape}")
    domain.weight("min_scale", min_scale)
    is_low = (values <= FLOOR_MARGIN * min_scale).astype(values.dtype)
    return jnp.mean(jnp.where(jnp.isnan(values), values, is_low))  # a NaN must stay one


def representation_health(embedding: ArrayLike) -> dict[str, Array]:
    """The signals of collapse and the radius together, ready to be logged.

    Args:
      embedding: `[N, D]`, `N >= 2`.

    Returns:
      Scalars by name: `embedding_std`, `embedding_log_radius` and, if `N > D`, `effective_rank`.

    Raises:
      ValueError: not two axes, or fewer than two images.
    """
    matrix = _as_matrix("embedding", embedding)
    values = {
        "embedding_std": embedding_std(matrix),
        "embedding_log_radius": embedding_log_radius(matrix),
    }
    if matrix.shape[0] > matrix.shape[1]:
        values["effective_rank"] = effective_rank(matrix)
    return values


class PairHealth(NamedTuple):
    """How the directional term sees pairs of views, one number each, `[]`.

    Attributes:
      cosine: mean of `<m, u>`, the latent's direction against the target's.
      residual_over_df: mean of `Q / df`, or of `Q / (D - 1)` at `df = inf`. Far above 1 the residuals
        are in the tail, where a pair's weight falls as `1 / Q`.
      effective_pairs: share of pairs that carry the gradient, `(sum w)^2 / (N sum w^2)` of the weights
        `w = (df + n) / (df + Q)`: 1 when all weigh alike, as in the Gaussian limit.
    """

    cosine: Array
    residual_over_df: Array
    effective_pairs: Array


def pair_health(
    target_embedding: ArrayLike, latent: ArrayLike, scale_diag: ArrayLike, *, df: ArrayLike
) -> PairHealth:
    """Residuals and weights of the chordal directional term (docs eq. 2 and 4).

    Args:
      target_embedding: `[N, D]`.
      latent: `[N, D]`, of the other view: a sample, or the posterior's mean.
      scale_diag: `[N, D]`, of the directional term, in units of the sphere.
      df: degrees of freedom, `inf` allowed.

    Returns:
      `PairHealth` of scalars.

    Raises:
      ValueError: not two axes, fewer than two images, shapes that do not broadcast, a `df` that is no
        number or not positive, a known scale that is not positive.
    """
    if np.ndim(df):
        raise ValueError(f"df must be a number, got shape {np.shape(df)}")
    (nu,) = sphere.at_least_float32(df)
    nu = domain.degrees_of_freedom("df", df, nu)
    direction, _ = sphere.polar_decomposition(_as_matrix("target_embedding", target_embedding))
    loc, _ = sphere.polar_decomposition(_as_matrix("latent", latent))
    squared_length, _ = sphere.scaled_tangent_squared_length(
        direction, loc, _as_matrix("scale_diag", scale_diag), coordinates="chordal"
    )
    n = loc.shape[-1] - 1
    is_gaussian = jnp.isinf(nu)
    df = jnp.where(is_gaussian, 1.0, nu).astype(squared_length.dtype)
    weight = jnp.where(is_gaussian, 1.0, (df + n) / (df + squared_length))
    return PairHealth(
        cosine=jnp.mean(jnp.sum(direction * loc, axis=-1)),
        residual_over_df=jnp.mean(squared_length) / jnp.where(is_gaussian, n, df),
        effective_pairs=jnp.square(jnp.mean(weight)) / jnp.mean(jnp.square(weight)),
    )


def term_gradient_norms(
    terms_of: Callable[[Array], ElboTerms], representation: ArrayLike
) -> dict[str, Array]:
    """How hard each term of the bound pulls at the encoder.

    `sqrt(mean_i |d term_i / d x|^2 mean_i |x_i|^2)`, nats for a relative change of the representation
    by one: free of the representation's units, which the projector's BatchNorm makes arbitrary.

    Args:
      terms_of: representation `[N, F]` to terms `[N]`.
      representation: `[N, F]`.

    Returns:
      Scalars by the term's name.
    """
    x = _as_matrix("representation", representation)
    terms, pull_back = jax.vjp(terms_of, x)
    size = jnp.mean(jnp.sum(jnp.square(x), axis=-1))
    norms = {}
    for name in ("directional_log_likelihood", "radial_log_likelihood", "kl"):
        zero = jax.tree.map(jnp.zeros_like, terms)
        one = jnp.ones_like(getattr(terms, name))
        (gradient,) = pull_back(zero._replace(**{name: one}))
        norms[name] = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(gradient), axis=-1)) * size)
    return norms


class Alarm(NamedTuple):
    """A value that left the band of healthy runs.

    Attributes:
      name: `collapse`, `posterior_is_prior`, `scale_at_floor`, `radius_drift`, `concentration` or
        `no_information`.
      message: one line: what was measured, the threshold, what it means and what to try.
    """

    name: str
    message: str


class AlarmPeriod(NamedTuple):
    """A time in which an alarm was raised.

    Attributes:
      step: of the health check that raised it.
      name: as `Alarm`'s.
      message: of that check, as `Alarm`'s, and when it cleared.
    """

    step: int
    name: str
    message: str


def _is_outside(value: float, lower: float = -math.inf, upper: float = math.inf) -> bool:
    """Whether a value is out of a band; one that is NaN or infinite is."""
    return not (math.isfinite(value) and lower <= value <= upper)


def _collapse(values: Mapping[str, float], embedding_dim: int) -> str | None:
    seen = []
    if _is_outside(std := values["embedding_std"], MIN_EMBEDDING_STD):
        seen.append(
            f"embedding_std {std:.3g} is not above {MIN_EMBEDDING_STD}: the embeddings share one "
            "direction"
        )
    rank = values.get("effective_rank")
    lowest = min(MIN_EFFECTIVE_RANK, MIN_EFFECTIVE_RANK_SHARE * embedding_dim)
    if rank is not None and _is_outside(rank, lowest):
        seen.append(
            f"effective rank {rank:.3g} of D = {embedding_dim} is not above {lowest:.3g}: the "
            "embeddings vary along few axes"
        )
    log_radius = values.get("embedding_log_radius")
    if log_radius is not None and _is_outside(log_radius, math.log(MIN_RADIUS)):
        seen.append(
            f"mean radius {math.exp(log_radius):.3g} sqrt(D) is not above {MIN_RADIUS}: the "
            "embeddings shrink to a point"
        )
    if not seen:
        return None
    return (
        f"{'; '.join(seen)}. Try a lower optimizer.learning_rate or weight_decay, for jevb "
        "jevb.location = 'sample', for others the weights of their published loss."
    )


def _posterior_is_prior(values: Mapping[str, float], embedding_dim: int) -> str | None:
    kl = values["posterior_kl_per_dimension"] * embedding_dim
    if not _is_outside(kl, MIN_POSTERIOR_KL_NATS):
        return None
    return (
        f"KL(q || p) {kl:.3g} nats an image is not above {MIN_POSTERIOR_KL_NATS}: the posterior is "
        "the prior, whatever the image, and its uncertainty says nothing. Try a lower "
        "jevb.kl_weight, a longer jevb.kl_warmup_epochs or another jevb.prior_scale."
    )


def _scale_at_floor(values: Mapping[str, float], embedding_dim: int) -> str | None:
    del embedding_dim
    seen = []
    for name in ("posterior", "likelihood"):
        share = values.get(f"{name}_scale_at_floor")
        if share is not None and _is_outside(share, upper=MAX_SHARE_AT_FLOOR):
            seen.append(f"{share:.1%} of the {name} scales")
    if not seen:
        return None
    return (
        f"{' and '.join(seen)}, not under {MAX_SHARE_AT_FLOOR:.0%}, are within "
        f"{FLOOR_MARGIN - 1:.0%} of model.min_scale: the floor sets them, not the images. Try a "
        "higher jevb.kl_weight, or a lower model.min_scale if the scales are meant to be so small."
    )


def _radius_drift(values: Mapping[str, float], embedding_dim: int) -> str | None:
    del embedding_dim
    seen = []
    log_radius, limit = values["embedding_log_radius"], math.log(MAX_RADIUS_FACTOR)
    if _is_outside(log_radius, -limit, limit):
        seen.append(
            f"mean radius {math.exp(log_radius):.3g} sqrt(D) is not within a factor of "
            f"{MAX_RADIUS_FACTOR:g} of sqrt(D): nothing holds the embeddings' radius"
        )
    if _is_outside(width := values["radial_width"], *RADIAL_WIDTH_RANGE):
        lower, upper = RADIAL_WIDTH_RANGE
        seen.append(
            f"relative width of the radial likelihood is {width:.3g}, not in [{lower:g}, {upper:g}]: "
            "the radial term has become a spike or says nothing"
        )
    if not seen:
        return None
    return (
        f"{'; '.join(seen)}. Try model.projector_normalizes_output = True, a lower "
        "optimizer.learning_rate or weight_decay, or jevb.space = 'log'."
    )


def _concentration(values: Mapping[str, float], embedding_dim: int) -> str | None:
    concentration = values["concentration_mean"]
    highest = MAX_MEAN_COSINE / (1 - MAX_MEAN_COSINE) * (embedding_dim - 1)
    if not _is_outside(concentration, MIN_CONCENTRATION, highest):
        return None
    return (
        f"mean concentration {concentration:.3g} is not in [{MIN_CONCENTRATION}, {highest:.3g}]: the "
        "predicted distributions are all uniform, or all points, and their uncertainty says nothing. "
        "Try a lower optimizer.learning_rate or weight_decay."
    )


def _no_information(values: Mapping[str, float], embedding_dim: int) -> str | None:
    del embedding_dim
    information = values["predictive_information"]
    if not _is_outside(information, 0.0):
        return None
    return (
        f"predictive information {information:.3g} nats an image is below zero: the likelihood of a "
        "view given the other is worse than the uniform density, so its nats say nothing. Try a longer "
        "run, for jevb a lower jevb.kl_weight and jevb.prior_scale with jevb.df = inf."
    )


# By the alarm's name: the value without which it is not judged, and the judgement.
_ALARMS: dict[str, tuple[str, Callable[[Mapping[str, float], int], str | None]]] = {
    "collapse": ("embedding_std", _collapse),
    "posterior_is_prior": ("posterior_kl_per_dimension", _posterior_is_prior),
    "scale_at_floor": ("posterior_scale_at_floor", _scale_at_floor),
    "radius_drift": ("radial_width", _radius_drift),
    "concentration": ("concentration_mean", _concentration),
    "no_information": ("predictive_information", _no_information),
}


def judge(values: Mapping[str, float], *, step: int, embedding_dim: int) -> dict[str, str | None]:
    """Every alarm that can be judged from a health check, raised or not.

    Args:
      values: of a health check, by name: those of `representation_health` for all methods; for JEVB
        also `posterior_kl_per_dimension`, `posterior_scale_at_floor`, `radial_width` (of the radial
        likelihood, relative to the radius) and, where it is untied, `likelihood_scale_at_floor`; for
        VI-SimSiam `concentration_mean`; for both `predictive_information`. A value that is not
        finite raises its alarm.
      step: at which the values were measured.
      embedding_dim: D.

    Returns:
      The message by the alarm's name, None where the value is healthy. Alarms of values that are not
      there are left out, `no_information` also before `INFORMATION_WARMUP_STEPS`; before
      `ALARM_WARMUP_STEPS` it is empty.
    """
    if step < ALARM_WARMUP_STEPS:
        return {}
    return {
        name: message_of(values, embedding_dim)
        for name, (needed, message_of) in _ALARMS.items()
        if needed in values and not (name == "no_information" and step < INFORMATION_WARMUP_STEPS)
    }


def health_alarms(values: Mapping[str, float], *, step: int, embedding_dim: int) -> list[Alarm]:
    """The alarms that a health check raises.

    Args:
      values: as `judge`.
      step: as `judge`.
      embedding_dim: D.

    Returns:
      The raised alarms, in a fixed order.
    """
    judged = judge(values, step=step, embedding_dim=embedding_dim)
    return [Alarm(name, message) for name, message in judged.items() if message is not None]


def logged_health(record: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a health check by name, from a line of `metrics.jsonl`; empty if it has none."""
    return {
        name.removeprefix("health/"): value
        for name, value in record.items()
        if name.startswith("health/")
    }


def alarm_history(records: Sequence[Mapping[str, Any]], *, embedding_dim: int) -> list[AlarmPeriod]:
    """When which alarm was raised in a run, and until when, judged anew from the logged values.

    Args:
      records: lines of `metrics.jsonl`, in order; those without a health check are passed over.
      embedding_dim: D, `model.embedding_dim` of the run's config.

    Returns:
      Periods in the order of their first steps.
    """
    periods: list[AlarmPeriod] = []
    raised: dict[str, int] = {}  # positions in `periods`
    for record in records:
        step: int = record["step"]
        judged = judge(logged_health(record), step=step, embedding_dim=embedding_dim)
        for name, message in judged.items():
            if message is not None and name not in raised:
                raised[name] = len(periods)
                periods.append(AlarmPeriod(step, name, message))
            elif message is None and name in raised:
                index = raised.pop(name)
                cleared = f"{periods[index].message} Cleared at step {step}."
                periods[index] = periods[index]._replace(message=cleared)
    for index in raised.values():
        standing = f"{periods[index].message} Not cleared by the last health check."
        periods[index] = periods[index]._replace(message=standing)
    return periods
