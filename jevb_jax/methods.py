"""Methods: the loss of each, as a function of one form, so that one training step serves all.

The loss of a method is a function `(key, views, targets, *, step, radial_scale) -> MethodOutput`:

* `key`: `[batch]` keys, one for each example;
* `views`: `ViewOutputs` of the full views, two or more, then of smaller crops;
* `targets`: what is predicted: outputs of the full views, by the same network or by an averaged one.
  The losses stop their gradient;
* `step`: steps done, for schedules; `radial_scale`: learned, or None.

A loss ignores what it does not need. The caller averages over examples. With more than two views, a
loss of two views becomes its mean over pairs of a source, which is any view, and a target, which is
another full view. The table `METHODS` at the end lists the methods and everything else that differs
between them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax.networks.heads import HeadName
from jevb_jax.networks.joint import ViewOutputs
from jevb_jax.paper import baselines, objective
from jevb_jax.paper.likelihood import Likelihood


class MethodOutput(NamedTuple):
    """The loss of a batch and its terms.

    Attributes:
      loss: `[batch]`, or `[]` where the loss couples examples; minimized.
      metrics: terms by name, each `[batch]` or `[]`.
    """

    loss: Array
    metrics: dict[str, Array]


class Loss(Protocol):
    """The type of a loss; the docstring of the module explains it."""

    def __call__(
        self,
        key: Array,
        views: Sequence[ViewOutputs],
        targets: Sequence[ViewOutputs],
        *,
        step: ArrayLike,
        radial_scale: Array | None,
    ) -> MethodOutput:
        """Loss and terms of a batch."""
        ...


# From a source, a target and the number of their pair to a tree of arrays.
OfPair = Callable[[ViewOutputs, ViewOutputs, Array], Any]


def _stacked(outputs: Sequence[ViewOutputs]) -> Any:
    """Outputs of several views, with a leading axis for the views."""
    return jax.tree.map(lambda *values: jnp.stack(values), *outputs)


def _interleaved(outputs: Sequence[ViewOutputs]) -> Any:
    """Outputs of several views as one batch, with all views of an example next to each other.

    So each device keeps its own examples.
    """

    def interleave(*values: Array) -> Array:
        return jnp.stack(values, axis=1).reshape(-1, *values[0].shape[1:])

    return jax.tree.map(interleave, *outputs)


def _sum_over_pairs(
    of_pair: OfPair, views: Sequence[ViewOutputs], targets: Sequence[ViewOutputs], is_pair: Any
) -> Any:
    """Sum over those pairs of a view and a target that `is_pair`, `[views, targets]`, names.

    It compiles once for all pairs, and holds the intermediate values of one source at a time.
    Pairs are numbered with small crops first, from `len(targets)` on.
    """
    num_views, num_targets = is_pair.shape
    wanted = _stacked(targets)
    place = (np.arange(num_views)[:, None] - num_targets) % num_views
    numbers = num_targets + (num_targets + 1) * place + np.arange(num_targets)

    def of_source(source: tuple[ViewOutputs, Array, Array]) -> Any:
        outputs, counts, pair_numbers = source
        values = jax.vmap(of_pair, in_axes=(None, 0, 0))(outputs, wanted, pair_numbers)

        def total(value: Array) -> Array:
            counts_along = counts.reshape(-1, *(1,) * (value.ndim - 1))
            return jnp.sum(jnp.where(counts_along, value, 0), axis=0)

        return jax.tree.map(total, values)

    sources = _stacked(views)
    sums = jax.lax.map(
        jax.checkpoint(of_source), (sources, jnp.asarray(is_pair), jnp.asarray(numbers))
    )
    return jax.tree.map(lambda values: jnp.sum(values, axis=0), sums)


def mean_over_pairs(
    of_pair: Callable[[ViewOutputs, ViewOutputs], MethodOutput],
    views: Sequence[ViewOutputs],
    targets: Sequence[ViewOutputs],
) -> MethodOutput:
    """Mean of the loss and of each metric over all pairs of a source and a target.

    Args:
      of_pair: from the outputs of the source and of the target.
      views: sources: full views, then small crops.
      targets: of the full views, in their order. No view is its own target.

    Returns:
      As `of_pair`.
    """
    is_pair = ~np.eye(len(views), len(targets), dtype=bool)
    total = _sum_over_pairs(
        lambda source, target, _: of_pair(source, target), views, targets, is_pair
    )
    return jax.tree.map(lambda value: value / is_pair.sum(), total)


@dataclasses.dataclass(frozen=True)
class JevbSettings:
    """Settings of JEVB's objective (`conditional_elbo`), and how its KL is warmed up.

    Attributes:
      likelihood: with the `radial_scale` that training starts from; `likelihood_at` replaces it.
      fixed_scale: the scale of the likelihood in the units of the latent; None where it is tied or
        learned.
      kl_warmup_steps: the weight of the KL rises linearly from zero to `kl_weight` over this many
        steps.
    """

    likelihood: Likelihood
    prior_scale: float
    num_samples: int
    kl_weight: float
    radial_weight: float
    location: objective.Location
    fixed_scale: float | None
    kl_warmup_steps: int

    def likelihood_at(self, radial_scale: ArrayLike) -> Likelihood:
        """The likelihood with a radial scale that was learned."""
        return dataclasses.replace(self.likelihood, radial_scale=radial_scale)

    def elbo_settings(self, step: ArrayLike) -> objective.ElboSettings:
        """The keyword arguments of a bound at `step`, without the likelihood and the scales."""
        kl_weight: ArrayLike = self.kl_weight
        if self.kl_warmup_steps:
            share = jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / self.kl_warmup_steps)
            kl_weight = self.kl_weight * share
        return {
            "prior_scale": self.prior_scale,
            "num_samples": self.num_samples,
            "kl_weight": kl_weight,
            "radial_weight": self.radial_weight,
            "location": self.location,
        }

    def untied_scale(self, view: ViewOutputs) -> ArrayLike | None:
        """The scale of the likelihood, or None where it is the posterior's own."""
        return self.fixed_scale if self.fixed_scale else view.prediction.likelihood_scale


def multi_view_elbo(
    key: Array,
    views: Sequence[ViewOutputs],
    targets: Sequence[ViewOutputs],
    *,
    step: ArrayLike,
    radial_scale: Array,
    settings: JevbSettings,
) -> objective.ElboTerms:
    """Mean of `elbo(t | s)` over targets `t` in the full views and sources `s != t`.

    With two views it is `symmetric_elbo`. Small crops are sources only.

    Args:
      key: `[batch]` keys, one for each example.
      views: full views, at least two, then small crops.
      targets: what is predicted of the full views.
      step: steps done.
      radial_scale: width of the radial density, positive.
      settings: degrees of freedom, weights and the like.

    Returns:
      `ElboTerms` of `[batch]` arrays.
    """
    likelihood, elbo_settings = settings.likelihood_at(radial_scale), settings.elbo_settings(step)

    def elbo(key: Array, source: ViewOutputs, target: ViewOutputs) -> objective.ElboTerms:
        return objective.conditional_elbo(
            key,
            target.embedding,
            source.posterior_mean,
            source.posterior_scale,
            likelihood,
            untied_scale=settings.untied_scale(source),
            **elbo_settings,
        )

    def further(source: ViewOutputs, target: ViewOutputs, number: Array) -> objective.ElboTerms:
        return elbo(jax.vmap(jax.random.fold_in, (0, None))(key, number), source, target)

    # Both directions of the first two views are one batch, so that the bound is traced once.
    keys = jax.vmap(jax.random.split)(key).reshape(-1)
    pair = elbo(keys, _interleaved(views[:2]), _interleaved((targets[1], targets[0])))
    total = jax.tree.map(lambda value: jnp.sum(value.reshape(-1, 2), axis=1), pair)

    is_pair = ~np.eye(len(views), len(targets), dtype=bool)
    num_pairs = is_pair.sum()
    is_pair[:2, :2] = False  # in `total`
    if is_pair.any():
        total = jax.tree.map(jnp.add, total, _sum_over_pairs(further, views, targets, is_pair))
    return jax.tree.map(lambda value: value / num_pairs, total)


def jevb(
    key: Array,
    views: Sequence[ViewOutputs],
    targets: Sequence[ViewOutputs],
    *,
    step: ArrayLike,
    radial_scale: Array | None,
    settings: JevbSettings,
) -> MethodOutput:
    """JEVB: the negative weighted bound, nats per dimension (docs eq. 14)."""
    if radial_scale is None:
        raise ValueError("jevb needs the radial scale of a model whose head gives a posterior")
    terms = multi_view_elbo(
        key, views, targets, step=step, radial_scale=radial_scale, settings=settings
    )
    metrics = {
        "elbo": terms.elbo,
        "directional_log_likelihood": terms.directional_log_likelihood,
        "radial_log_likelihood": terms.radial_log_likelihood,
        "kl": terms.kl,
        "posterior_scale": jnp.mean(views[0].posterior_scale, axis=-1),
        "radial_scale": radial_scale,
    } | _information(terms.predictive_information, terms.directional_log_mass)
    return MethodOutput(-terms.weighted_elbo / targets[0].embedding.shape[-1], metrics)


def _information(predictive: Array | None, log_mass: Array | None) -> dict[str, Array]:
    """Metrics of a likelihood on the sphere: predictive information in nats and bits, and log mass."""
    if predictive is None or log_mass is None:
        return {}
    return {
        "predictive_information": predictive,
        "predictive_information_bits": predictive / math.log(2),
        "directional_log_mass": log_mass,
    }


def simsiam(
    key: Array, views: Sequence[ViewOutputs], targets: Sequence[ViewOutputs], **_: object
) -> MethodOutput:
    """SimSiam: negative cosine between predictions and the other view's embedding."""
    if len(views) > 2:
        return mean_over_pairs(lambda s, t: simsiam(key, (s, s), (t, t)), views, targets)
    terms = baselines.simsiam_loss(
        views[0].prediction, views[1].prediction, targets[0].embedding, targets[1].embedding
    )
    return MethodOutput(terms.loss, {"cosine_similarity": -terms.loss})


def byol(
    key: Array, views: Sequence[ViewOutputs], targets: Sequence[ViewOutputs], **_: object
) -> MethodOutput:
    """BYOL: squared distance of normalized predictions to the averaged network's embeddings."""
    if len(views) > 2:
        return mean_over_pairs(lambda s, t: byol(key, (s, s), (t, t)), views, targets)
    terms = baselines.byol_loss(
        views[0].prediction, views[1].prediction, targets[0].embedding, targets[1].embedding
    )
    return MethodOutput(terms.loss, {"cosine_similarity": 1 - terms.loss / 4})


def vi_simsiam(
    key: Array, views: Sequence[ViewOutputs], targets: Sequence[ViewOutputs], **_: object
) -> MethodOutput:
    """VI-SimSiam: negative power spherical log-likelihood of the other view's direction, nats."""
    if len(views) > 2:
        return mean_over_pairs(lambda s, t: vi_simsiam(key, (s, s), (t, t)), views, targets)
    prediction_1, prediction_2 = views[0].prediction, views[1].prediction
    terms = baselines.vi_simsiam_loss(
        prediction_1.direction,
        prediction_1.concentration,
        prediction_2.direction,
        prediction_2.concentration,
        targets[0].embedding,
        targets[1].embedding,
    )
    # The power spherical density has mass one.
    predictive = objective.predictive_information(
        -terms.loss, None, dim=targets[0].embedding.shape[-1]
    )
    metrics = {
        "log_likelihood": -terms.loss,
        "concentration": prediction_1.concentration,
        **_information(predictive, jnp.zeros_like(predictive)),
    }
    return MethodOutput(terms.loss, metrics)


def vicreg(
    key: Array,
    views: Sequence[ViewOutputs],
    targets: Sequence[ViewOutputs],
    *,
    invariance_weight: float,
    variance_weight: float,
    covariance_weight: float,
    **_: object,
) -> MethodOutput:
    """VICReg: invariance, variance and covariance of the two views' embeddings."""
    weights = {
        "invariance_weight": invariance_weight,
        "variance_weight": variance_weight,
        "covariance_weight": covariance_weight,
    }
    if len(views) > 2:
        return mean_over_pairs(
            lambda s, t: vicreg(key, (s, t), (s, t), **weights), views, views[: len(targets)]
        )
    terms = baselines.vicreg_loss(views[0].embedding, views[1].embedding, **weights)
    metrics = {name: getattr(terms, name) for name in ("invariance", "variance", "covariance")}
    return MethodOutput(terms.loss, metrics)


def barlow_twins(
    key: Array,
    views: Sequence[ViewOutputs],
    targets: Sequence[ViewOutputs],
    *,
    redundancy_weight: float,
    loss_weight: float,
    **_: object,
) -> MethodOutput:
    """Barlow Twins: the cross-correlation of the two views' embeddings against the identity."""
    weights = {"redundancy_weight": redundancy_weight, "loss_weight": loss_weight}
    if len(views) > 2:
        return mean_over_pairs(
            lambda s, t: barlow_twins(key, (s, t), (s, t), **weights), views, views[: len(targets)]
        )
    terms = baselines.barlow_twins_loss(
        views[0].embedding, views[1].embedding, redundancy_weight=redundancy_weight
    )
    metrics = {name: getattr(terms, name) for name in ("invariance", "redundancy")}
    return MethodOutput(loss_weight * terms.loss, metrics)


def fastsiam(
    key: Array, views: Sequence[ViewOutputs], targets: Sequence[ViewOutputs], **_: object
) -> MethodOutput:
    """FastSiam: negative cosine between predictions and the mean of the other views' embeddings."""
    del key
    terms = baselines.fastsiam_loss(
        jnp.stack([view.prediction for view in views]),
        jnp.stack([target.embedding for target in targets]),
    )
    return MethodOutput(terms.loss, {"cosine_similarity": -terms.loss})


def emp_ssl(
    key: Array,
    views: Sequence[ViewOutputs],
    targets: Sequence[ViewOutputs],
    *,
    invariance_weight: float,
    squared_epsilon: float,
    **_: object,
) -> MethodOutput:
    """EMP-SSL: similarity of each crop to the mean over crops, and the coding rate of each crop."""
    del key, targets
    terms = baselines.emp_ssl_loss(
        jnp.stack([view.embedding for view in views]),
        invariance_weight=invariance_weight,
        squared_epsilon=squared_epsilon,
    )
    return MethodOutput(
        terms.loss, {"cosine_similarity": terms.similarity, "coding_rate": terms.coding_rate}
    )


@dataclasses.dataclass(frozen=True)
class Method:
    """What differs between methods.

    Attributes:
      loss: see the module; it also takes the settings of its section as keyword arguments.
      head: the network after the projector.
      default_score: the score of detection where the user names none.
      uncertainty_score: what the report draws as the uncertainty of an image; "" is `default_score`.
      target: whether an averaged network is needed, possible, or makes no sense.
      takes_many_views: whether the loss uses more than two views.
      section: the section of the config that is the method's own, or "". Its settings are keyword
        arguments of the loss, except those of `jevb`, which come as one `JevbSettings`.
    """

    loss: Callable[..., MethodOutput]
    head: HeadName
    default_score: str
    uncertainty_score: str = ""
    target: Literal["needed", "possible", "none"] = "possible"
    takes_many_views: bool = False
    section: str = ""


# Adding a method is one function above and one row here (docs/adding_a_method.md).
METHODS: dict[str, Method] = {
    "jevb": Method(
        jevb,
        head="posterior",
        default_score="jevb/mixture_and_residual",
        uncertainty_score="jevb/posterior_entropy",
        takes_many_views=True,
        section="jevb",
    ),
    "simsiam": Method(
        simsiam, head="vector", default_score="embedding/mahalanobis", takes_many_views=True
    ),
    "vi_simsiam": Method(
        vi_simsiam,
        head="direction",
        default_score="vi_simsiam/concentration",
        takes_many_views=True,
    ),
    "byol": Method(
        byol,
        head="vector",
        default_score="embedding/mahalanobis",
        target="needed",
        takes_many_views=True,
    ),
    "vicreg": Method(
        vicreg,
        head="none",
        default_score="embedding/mahalanobis",
        target="none",
        takes_many_views=True,
        section="vicreg",
    ),
    "barlow_twins": Method(
        barlow_twins,
        head="none",
        default_score="embedding/mahalanobis",
        target="none",
        takes_many_views=True,
        section="barlow_twins",
    ),
    "fastsiam": Method(
        fastsiam, head="vector", default_score="embedding/mahalanobis", takes_many_views=True
    ),
    "emp_ssl": Method(
        emp_ssl,
        head="none",
        default_score="embedding/mahalanobis",
        target="none",
        takes_many_views=True,
        section="emp_ssl",
    ),
}
