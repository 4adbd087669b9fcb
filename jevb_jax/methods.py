"""Methods: the loss of each, as a function of one form, so that one training step serves all.

The loss of a method is a function `(key, views, targets, *, step, radial_scale) -> MethodOutput`:

* `key`: `[batch]` keys, one for each example;
* `views`: `ViewOutputs` of two views, then of smaller crops;
* `targets`: what is predicted: outputs of the first two views, by the same network or by an averaged
  one. The losses stop their gradient;
* `step`: steps done, for schedules; `radial_scale`: learned, or None.

A loss ignores what it does not need. The caller averages over examples. The table `METHODS` at the
end lists the methods and everything else that differs between them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
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
    """Mean of `elbo(t | s)` over targets `t` in the first two views and sources `s != t`.

    With two views it is `symmetric_elbo`. Further views are smaller crops: sources only.

    Args:
      key: `[batch]` keys, one for each example.
      views: two views, then small crops.
      targets: what is predicted of the first two views.
      step: steps done.
      radial_scale: width of the radial density, positive.
      settings: degrees of freedom, weights and the like.

    Returns:
      `ElboTerms` of `[batch]` arrays.
    """
    likelihood, elbo_settings = settings.likelihood_at(radial_scale), settings.elbo_settings(step)
    sources = [
        objective.View(target.embedding, view.posterior_mean, view.posterior_scale)
        for view, target in zip(views, targets, strict=False)
    ]
    scale_1, scale_2, *small_scales = (settings.untied_scale(view) for view in views)
    pair = scale_1 if scale_1 is None else (jnp.asarray(scale_1), jnp.asarray(scale_2))
    terms = objective.symmetric_elbo(
        key, *sources, likelihood=likelihood, untied_scale=pair, **elbo_settings
    )
    num_pairs = 2
    total = jax.tree.map(lambda value: num_pairs * value, terms)
    for index, (small, scale) in enumerate(zip(views[2:], small_scales, strict=True)):
        for target in targets:
            pair_keys = jax.vmap(jax.random.fold_in, (0, None))(key, num_pairs + index)
            pair_terms = objective.conditional_elbo(
                pair_keys,
                target.embedding,
                small.posterior_mean,
                small.posterior_scale,
                likelihood,
                untied_scale=scale,
                **elbo_settings,
            )
            total = jax.tree.map(jnp.add, total, pair_terms)
            num_pairs += 1
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
    del key
    terms = baselines.simsiam_loss(
        views[0].prediction, views[1].prediction, targets[0].embedding, targets[1].embedding
    )
    return MethodOutput(terms.loss, {"cosine_similarity": -terms.loss})


def byol(
    key: Array, views: Sequence[ViewOutputs], targets: Sequence[ViewOutputs], **_: object
) -> MethodOutput:
    """BYOL: squared distance of normalized predictions to the averaged network's embeddings."""
    del key
    terms = baselines.byol_loss(
        views[0].prediction, views[1].prediction, targets[0].embedding, targets[1].embedding
    )
    return MethodOutput(terms.loss, {"cosine_similarity": 1 - terms.loss / 4})


def vi_simsiam(
    key: Array, views: Sequence[ViewOutputs], targets: Sequence[ViewOutputs], **_: object
) -> MethodOutput:
    """VI-SimSiam: negative power spherical log-likelihood of the other view's direction, nats."""
    del key
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
    del key, targets
    terms = baselines.vicreg_loss(
        views[0].embedding,
        views[1].embedding,
        invariance_weight=invariance_weight,
        variance_weight=variance_weight,
        covariance_weight=covariance_weight,
    )
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
    del key, targets
    terms = baselines.barlow_twins_loss(
        views[0].embedding, views[1].embedding, redundancy_weight=redundancy_weight
    )
    metrics = {name: getattr(terms, name) for name in ("invariance", "redundancy")}
    return MethodOutput(loss_weight * terms.loss, metrics)


@dataclasses.dataclass(frozen=True)
class Method:
    """What differs between methods.

    Attributes:
      loss: see the module; it also takes the settings of its section as keyword arguments.
      head: the network after the projector.
      default_score: the score of detection where the user names none.
      uncertainty_score: what the report draws as the uncertainty of an image; "" is `default_score`.
      target: whether an averaged network is needed, possible, or makes no sense.
      takes_small_crops: whether the loss uses further views.
      section: the section of the config that is the method's own, or "". Its settings are keyword
        arguments of the loss, except those of `jevb`, which come as one `JevbSettings`.
    """

    loss: Callable[..., MethodOutput]
    head: HeadName
    default_score: str
    uncertainty_score: str = ""
    target: Literal["needed", "possible", "none"] = "possible"
    takes_small_crops: bool = False
    section: str = ""


# Adding a method is one function above and one row here (docs/adding_a_method.md).
METHODS: dict[str, Method] = {
    "jevb": Method(
        jevb,
        head="posterior",
        default_score="jevb/mixture_and_residual",
        uncertainty_score="jevb/posterior_entropy",
        takes_small_crops=True,
        section="jevb",
    ),
    "simsiam": Method(simsiam, head="vector", default_score="embedding/mahalanobis"),
    "vi_simsiam": Method(vi_simsiam, head="direction", default_score="vi_simsiam/concentration"),
    "byol": Method(byol, head="vector", default_score="embedding/mahalanobis", target="needed"),
    "vicreg": Method(
        vicreg,
        head="none",
        default_score="embedding/mahalanobis",
        target="none",
        section="vicreg",
    ),
    "barlow_twins": Method(
        barlow_twins,
        head="none",
        default_score="embedding/mahalanobis",
        target="none",
        section="barlow_twins",
    ),
}
