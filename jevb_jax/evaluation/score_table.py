"""Every score: which features it reads, and how it is fitted and computed."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from jevb_jax import arguments
from jevb_jax.evaluation import (
    csi,
    detector_input,
    gaussian_detectors,
    labeled_detectors,
    loss_prediction,
    mixture_fit,
    neighbor_detectors,
    scaled_mahalanobis,
)
from jevb_jax.evaluation.features import (
    Features,
)
from jevb_jax.evaluation.gaussian_detectors import Residual
from jevb_jax.evaluation.labeled_detectors import VirtualLogit
from jevb_jax.evaluation.mixture import TrainingMixture
from jevb_jax.evaluation.products import exact_matmul
from jevb_jax.methods import METHODS
from jevb_jax.networks.heads import Posterior
from jevb_jax.paper import sphere
from jevb_jax.paper.likelihood import likelihood_scale
from jevb_jax.paper.scores import (
    UncertaintyTerms,
    concentration_score,
    cross_view_score,
    directional_score,
    importance_weighted_score,
    kl_score,
    negative_elbo_score,
    negative_log_likelihood_score,
    posterior_entropy_score,
    radial_score,
    typicality_features,
)
from jevb_jax.settings.sections import OodSection, RunSettings

# Which augmented views a score reads: none, those of JEVB's terms, or CSI's.
AugmentedViews = Literal["", "terms", "rotations"]

if TYPE_CHECKING:  # these import Optax and ml_collections, which a loaded model does not need
    from jevb_jax.evaluation.linear_probe import LinearProbe


# How many training images choose the bandwidth of the mixture by their leave-one-out likelihood.
_NUM_LEFT_OUT = 1000


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """Settings of the feature scores.

    Attributes:
      knn_k: numbers of neighbors; one score for each.
      ssd_clusters: numbers of clusters; one score for each.
      residual_share: share of the features, in (0, 1), that the principal subspace spans.
      mixture_df: degrees of freedom of the kernels of JEVB's mixture over training images.
      norm_exponents: exponents of `scaled_mahalanobis.fit_scaled_mahalanobis`; one score for each.
      norm_exponent_choices: exponents of `fit_by_local_dimension`; none = no such score.

    Raises:
      ValueError: a value is out of range; the message names its range.
      TypeError: a count is not an integer, or another value is not a number.
    """

    knn_k: tuple[int, ...]
    ssd_clusters: tuple[int, ...]
    residual_share: float
    mixture_df: float
    norm_exponents: tuple[float, ...] = ()
    norm_exponent_choices: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("knn_k", "ssd_clusters"):
            given = getattr(self, name)
            if arguments.is_single(given) or isinstance(given, str):
                raise ValueError(f"ood.{name} must be a sequence, for example (5,), got {given!r}")
            counts = tuple(arguments.whole_number(f"ood.{name}", x, at_least=1) for x in given)
            object.__setattr__(self, name, counts)
        share = detector_input.checked_share("ood.residual_share", self.residual_share)
        object.__setattr__(self, "residual_share", share)
        df = arguments.real_number("ood.mixture_df", self.mixture_df)
        if not df > 0:
            raise ValueError(f"ood.mixture_df must be positive, got {df}")
        object.__setattr__(self, "mixture_df", df)
        for name in ("norm_exponents", "norm_exponent_choices"):
            betas = scaled_mahalanobis.checked_exponents(f"ood.{name}", getattr(self, name))
            object.__setattr__(self, name, betas)

    def num_components(self, features: Any) -> int:
        """Dimension of the principal subspace of features `[N, F]`."""
        num_features = features.shape[1]
        # At least one feature stays outside, even if there are few.
        return max(1, min(round(self.residual_share * num_features), num_features - 1))


def score_settings(section: OodSection) -> ScoreSettings:
    """The settings in the section `ood` of a config."""
    fields = dataclasses.fields(ScoreSettings)
    return ScoreSettings(**{field.name: getattr(section, field.name) for field in fields})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfTerms:
    """A score computed from JEVB's terms."""

    score: Callable[[UncertaintyTerms], Array] = dataclasses.field(metadata={"static": True})

    def __call__(self, features: Features) -> Array:
        """Scores, `[N]`."""
        terms: Any = features.terms
        return self.score(terms)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfFeature:
    """A score of the features called `name`."""

    score: Callable[[Array], Array]
    name: str = dataclasses.field(metadata={"static": True})

    def __call__(self, features: Features) -> Array:
        """Scores, `[N]`."""
        return self.score(feature(features, self.name))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfMixtureAndResidual:
    """Sum of the mixture score and the posterior-residual score of an embedding (docs eq. 36).

    Both parts are negative log-densities up to a constant. For a Gaussian that is half the squared
    Mahalanobis distance.
    """

    mixture: OfFeature
    residual: OfFeature

    def __call__(self, features: Features) -> Array:
        """Scores, `[N]`."""
        return self.mixture(features) + self.residual(features) / 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfProbe:
    """A score computed from the logits of a linear probe; ViM also reads the features."""

    probe: "LinearProbe"
    vim: VirtualLogit | None = None
    score: Callable[[Array], Array] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    def standardized(self, features: Features) -> Array:
        """Standardized features, `[N, F]`. The logits are linear in them."""
        x = jnp.asarray(features.representation)
        return (x - self.probe.feature_mean[None]) / self.probe.feature_std[None]

    def logits(self, features: Features) -> Array:
        """Logits, `[N, C]`."""
        products = exact_matmul(self.standardized(features), self.probe.weights)
        return products + self.probe.bias[None]

    def __call__(self, features: Features) -> Array:
        """Scores, `[N]`."""
        if self.score is not None:
            return self.score(self.logits(features))
        vim: Any = self.vim
        return vim(self.standardized(features), self.logits(features))


@jax.jit
def _probe_values(of_probe: OfProbe, features: Features) -> tuple[Array, Array]:
    """Standardized features and logits."""
    return of_probe.standardized(features), of_probe.logits(features)


ScoreFunction = Callable[[Features], Array]


def feature(features: Features, name: str) -> Array:
    """The features that a score reads.

    Args:
      features: from `FeatureExtractor`.
      name: one of these. All methods: "representation", "embedding". JEVB: "log_scale" (of the
        posterior), "posterior_residual" (embedding minus posterior mean, in standard deviations),
        "terms" (`scores.typicality_features`). VI-SimSiam: "concentration". With `ood.csi_crops`:
        "rotations".

    Returns:
      `[N, F]`; `[N]` for a concentration; `[N, 4, D]` for rotations.
    """
    if name == "concentration":
        return jnp.asarray(features.prediction.concentration)
    if name == "log_scale":
        (scale,) = sphere.at_least_float32(features.prediction.posterior_scale)
        return jnp.log(scale)
    if name == "posterior_residual":
        embedding, mean, scale = sphere.at_least_float32(
            features.embedding, *features.prediction[:2]
        )
        return (embedding - mean) / scale
    if name == "terms":
        terms: Any = jax.tree.map(jnp.asarray, features.terms)
        return typicality_features(terms)
    return getattr(features, name)


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The data that scores are fitted to.

    Attributes:
      features: those of in-distribution training images, with `terms` and labels if scores need
        them.
      probe: linear probe fitted on the representation; None without labels.
    """

    features: Features
    probe: "LinearProbe | None" = None
    _shared: dict[str, OfFeature] = dataclasses.field(default_factory=dict)

    def fit(self, name: str, function: Callable[[Any], Any]) -> OfFeature:
        """Fits a score to the features called `name`."""
        return OfFeature(function(feature(self.features, name)), name)

    def fit_once(self, score: str, name: str, function: Callable[[Any], Any]) -> OfFeature:
        """Like `fit`, but two scores with the same `score` share the first fit."""
        if score not in self._shared:
            self._shared[score] = self.fit(name, function)
        return self._shared[score]


@dataclasses.dataclass(frozen=True)
class ScoreEntry:
    """One score of `score_table`.

    Attributes:
      made_of: what the score reads: "representation", "embedding", "posterior" (JEVB), "terms"
        (JEVB's terms over views and samples), "cross_view" (JEVB's term between views, as a score
        or to fit one to the representation),
        "concentration" (VI-SimSiam) or "rotations" (CSI's views).
      is_fitted: whether the score is fitted to in-distribution images.
      needs_labels: whether the training images must have labels.
      make: makes the score from `TrainingData`, or from None if nothing is fitted.
    """

    made_of: str
    is_fitted: bool
    needs_labels: bool
    make: Callable[[Any], ScoreFunction]

    @property
    def views(self) -> AugmentedViews:
        """Which augmented views must be extracted: for JEVB's terms, for CSI's rotations, or none."""
        if self.made_of == "rotations":
            return "rotations"
        return "terms" if self.made_of in ("terms", "cross_view") else ""

    @property
    def needs_views(self) -> bool:
        """Whether augmented views must be extracted."""
        return bool(self.views)


def score_table(
    method: str,
    settings: ScoreSettings,
    *,
    num_views: int,
    csi_crops: int = 0,
    predicts_loss: bool = False,
) -> dict[str, ScoreEntry]:
    """Every score of a method, by its name `family/score`.

    Args:
      method: name in the config, for example "jevb".
      settings: numbers of neighbors, clusters and so on.
      num_views: number of views of an image that JEVB's terms are averaged over.
      csi_crops: number of crops of each rotation for CSI's score; 0 leaves it out.
      predicts_loss: whether there are scores by loss prediction.
    """
    plain = functools.partial(ScoreEntry, is_fitted=False, needs_labels=False)
    fitted = functools.partial(ScoreEntry, is_fitted=True, needs_labels=False)
    with_labels = functools.partial(ScoreEntry, is_fitted=True, needs_labels=True)

    def of_terms(score: Callable[[UncertaintyTerms], Array]) -> Callable[..., OfTerms]:
        return lambda _: OfTerms(score)

    def of_feature(name: str, score: Callable[[Array], Array]) -> Callable[..., OfFeature]:
        return lambda _: OfFeature(Partial(score), name)

    def of_logits(score: Callable[[Array], Array]) -> Callable[..., OfProbe]:
        return lambda train: OfProbe(train.probe, score=score)

    def fit(name: str, function: Callable[..., Any], **keywords: Any) -> Callable[..., OfFeature]:
        return lambda train: train.fit(name, functools.partial(function, **keywords))

    def fit_classes(function: Callable[..., Any]) -> Callable[..., OfFeature]:
        return lambda train: train.fit(
            "representation", functools.partial(function, labels=train.features.labels)
        )

    def fit_residual(features: Any) -> Residual:
        return gaussian_detectors.fit_residual(
            features, num_components=settings.num_components(features)
        )

    def of_mixture(train: TrainingData) -> OfFeature:
        posterior = train.features.prediction
        return train.fit_once(
            "jevb/mixture",
            "embedding",
            functools.partial(_fit_mixture, posterior, settings.mixture_df),
        )

    def of_residual(train: TrainingData) -> OfFeature:
        return train.fit_once(
            "jevb/residual", "posterior_residual", gaussian_detectors.fit_mahalanobis
        )

    table = {
        "jevb/negative_log_likelihood": plain(
            "terms", make=of_terms(negative_log_likelihood_score)
        ),
        "jevb/directional": plain("terms", make=of_terms(directional_score)),
        "jevb/radial": plain("terms", make=of_terms(radial_score)),
        "jevb/negative_elbo": plain("terms", make=of_terms(negative_elbo_score)),
        "jevb/importance_weighted": plain("terms", make=of_terms(importance_weighted_score)),
        "jevb/kl": plain("terms", make=of_terms(kl_score)),
        "jevb/posterior_entropy": plain("terms", make=of_terms(posterior_entropy_score)),
        "jevb/cross_view": plain("cross_view", make=of_terms(cross_view_score)),
        "jevb/typicality_mahalanobis": fitted(
            "terms", make=fit("terms", gaussian_detectors.fit_mahalanobis)
        ),
    }
    if settings.knn_k:
        knn = fit("terms", neighbor_detectors.fit_whitened_knn, k=min(settings.knn_k))
        table["jevb/typicality_knn"] = fitted("terms", make=knn)
    table |= {
        "jevb/scale_mahalanobis": fitted(
            "posterior", make=fit("log_scale", gaussian_detectors.fit_mahalanobis)
        ),
        "jevb/mixture": fitted("posterior", make=of_mixture),
        "jevb/residual_mahalanobis": fitted("posterior", make=of_residual),
        "jevb/mixture_and_residual": fitted(
            "posterior",
            make=lambda train: OfMixtureAndResidual(of_mixture(train), of_residual(train)),
        ),
        "vi_simsiam/concentration": plain(
            "concentration", make=of_feature("concentration", concentration_score)
        ),
    }
    for name in ("representation", "embedding"):
        for k in settings.knn_k:
            table[f"{name}/knn_{k}"] = fitted(name, make=fit(name, neighbor_detectors.fit_knn, k=k))
        plain_distance = fit(name, gaussian_detectors.fit_mahalanobis)
        table[f"{name}/mahalanobis"] = fitted(name, make=plain_distance)
        for count in settings.ssd_clusters:
            ssd = fit(name, gaussian_detectors.fit_ssd, num_clusters=count)
            table[f"{name}/ssd_{count}"] = fitted(name, make=ssd)
        table[f"{name}/residual"] = fitted(name, make=fit(name, fit_residual))
        norm = of_feature(name, neighbor_detectors.feature_norm_score)
        table[f"{name}/norm"] = plain(name, make=norm)
    made_of = "representation"
    for beta in settings.norm_exponents:
        scaled = fit(made_of, scaled_mahalanobis.fit_scaled_mahalanobis, exponent=beta)
        table[f"representation/mahalanobis_beta_{beta:g}"] = fitted(made_of, make=scaled)
    if betas := settings.norm_exponent_choices:
        chosen = fit(made_of, scaled_mahalanobis.fit_by_local_dimension, exponents=betas)
        table["representation/mahalanobis_beta_by_dimension"] = fitted(made_of, make=chosen)
    table |= {
        "representation/ssd_published": fitted(
            made_of, make=fit(made_of, gaussian_detectors.fit_published_ssd)
        ),
        # Without labels, Mahalanobis++ has one mean: it is SSD with one cluster.
        "representation/mahalanobis_plus_plus": fitted(
            made_of, make=fit(made_of, gaussian_detectors.fit_ssd)
        ),
        "embedding/csi": fitted("rotations", make=fit("rotations", csi.fit_csi)),
    }
    table |= {
        "probe/max_softmax": with_labels(
            made_of, make=of_logits(labeled_detectors.max_softmax_score)
        ),
        "probe/max_logit": with_labels(made_of, make=of_logits(labeled_detectors.max_logit_score)),
        "probe/energy": with_labels(made_of, make=of_logits(labeled_detectors.energy_score)),
        "probe/class_mahalanobis": with_labels(
            made_of, make=fit_classes(labeled_detectors.fit_class_mahalanobis)
        ),
        "probe/mahalanobis_plus_plus": with_labels(
            made_of, make=fit_classes(labeled_detectors.fit_class_mahalanobis_plus_plus)
        ),
        "probe/relative_mahalanobis": with_labels(
            made_of, make=fit_classes(labeled_detectors.fit_relative_mahalanobis)
        ),
        "probe/vim": with_labels(made_of, make=functools.partial(_fit_vim, settings)),
    }
    if predicts_loss:
        table |= {
            "probe/loss_prediction": with_labels(made_of, make=_fit_probe_loss),
            "jevb/loss_prediction": fitted("cross_view", make=_fit_cross_view_loss),
        }
    features = {"representation", "embedding"} | ({"rotations"} if csi_crops else set())
    head = METHODS[method].head
    if head == "posterior":
        features |= {"posterior", "terms"} | ({"cross_view"} if num_views > 1 else set())
    elif head == "direction":
        features |= {"concentration"}
    return {name: entry for name, entry in table.items() if entry.made_of in features}


def _fit_mixture(posterior: Posterior, df: float, embedding: Array) -> TrainingMixture:
    """Fits the mixture of training posteriors. Its bandwidth absorbs the unit of the scales."""
    tied = posterior.likelihood_scale is None
    scale: Any = posterior.posterior_scale if tied else posterior.likelihood_scale
    return mixture_fit.fit_training_mixture(
        posterior.posterior_mean,
        likelihood_scale(scale),
        df=df,
        embedding=embedding,
        num_queries=_NUM_LEFT_OUT,
    )


def _fit_vim(settings: ScoreSettings, train: TrainingData) -> OfProbe:
    probe: Any = train.probe
    standardized, logits = _probe_values(OfProbe(probe), train.features._replace(labels=None))
    vim = labeled_detectors.fit_vim(
        standardized,
        logits,
        origin=labeled_detectors.vim_origin(probe.weights, probe.bias),
        num_components=settings.num_components(train.features.representation),
    )
    return OfProbe(probe, vim=vim)


def _fit_probe_loss(train: TrainingData) -> OfFeature:
    """Predicts the probe's loss. Its training images are among those that the probe was fitted to."""
    probe: Any = train.probe
    labels: Any = train.features.labels
    _, logits = _probe_values(OfProbe(probe), train.features._replace(labels=None))
    # The probe numbers the classes that occur, and these images may be a part of its images.
    classes = np.unique(labels)
    if len(classes) != logits.shape[-1]:
        raise detector_input.DegenerateFeaturesError(
            f"the fitted images are of {len(classes)} of {logits.shape[-1]} classes: raise "
            "ood.max_fit_images"
        )
    losses = loss_prediction.cross_entropies(logits, np.searchsorted(classes, labels))
    return train.fit(
        "representation", functools.partial(loss_prediction.fit_loss_prediction, losses=losses)
    )


def _fit_cross_view_loss(train: TrainingData) -> OfFeature:
    """Predicts from the representation how badly the views of an image explain each other."""
    terms: Any = train.features.terms
    return train.fit(
        "representation",
        functools.partial(loss_prediction.fit_loss_prediction, losses=cross_view_score(terms)),
    )


def scores_of_run(settings: RunSettings, *, has_labels: bool) -> dict[str, ScoreEntry]:
    """Every score of a run, as entries of `score_table`, by name.

    It includes scores that degenerate features may leave out later.
    """
    table = score_table(
        settings.method,
        score_settings(settings.ood),
        num_views=settings.ood.num_views,
        csi_crops=settings.ood.csi_crops,
        predicts_loss=settings.ood.loss_prediction,
    )
    return {name: entry for name, entry in table.items() if has_labels or not entry.needs_labels}


def default_score(settings: RunSettings) -> str:
    """Name of the score to use if none may be chosen by results: the config's, or the method's."""
    return settings.ood.default_score or METHODS[settings.method].default_score
