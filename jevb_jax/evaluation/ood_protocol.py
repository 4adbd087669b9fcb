"""Out-of-distribution evaluation of a run: every score against every outside set, in one pass each.

A set is streamed through the encoder once; the features of a batch go to all scores in one compiled
call and are dropped. Only the scores are kept, so memory does not grow with the sets.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from jevb_jax import arguments, methods
from jevb_jax.evaluation import mixture, ood
from jevb_jax.evaluation.features import (
    FeatureExtractor,
    Features,
    TermsSettings,
    useful_batch_size,
)
from jevb_jax.evaluation.ood_metrics import (
    OODMetrics,
    bootstrap_intervals_of_scores,
    ood_metrics,
)
from jevb_jax.images import batches, corruptions, dataset
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.images.source import ArraySource, ImageSource, Subset
from jevb_jax.methods import METHODS
from jevb_jax.networks.heads import Posterior
from jevb_jax.networks.joint import JointEmbeddingModel, ViewOutputs
from jevb_jax.paper import sphere
from jevb_jax.paper.likelihood import likelihood_scale
from jevb_jax.paper.objective import View
from jevb_jax.settings.sections import OodSection, RunSettings

if TYPE_CHECKING:  # a loaded model scores without Optax and ml_collections, which these import
    from jevb_jax.evaluation import classification
    from jevb_jax.training.experiment import Experiment

# Severity 0 is the image itself.
CORRUPTED = "corrupted"
# Training images whose leave-one-out likelihood chooses the mixture's bandwidth.
_NUM_LEFT_OUT = 1000


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """Settings of the feature scores.

    Attributes:
      knn_k: one score for each.
      ssd_clusters: one score for each.
      residual_share: of the features, in (0, 1), that the principal subspace spans.
      mixture_df: degrees of freedom of the kernels of JEVB's mixture over training images.

    Raises:
      ValueError: counts below one, a share outside (0, 1), degrees of freedom that are not positive.
      TypeError: counts that are not integers, degrees of freedom that are not a number.
    """

    knn_k: tuple[int, ...]
    ssd_clusters: tuple[int, ...]
    residual_share: float
    mixture_df: float

    def __post_init__(self) -> None:
        for name in ("knn_k", "ssd_clusters"):
            given = getattr(self, name)
            if arguments.is_single(given) or isinstance(given, str):
                raise ValueError(f"ood.{name} must be a sequence, for example (5,), got {given!r}")
            counts = tuple(arguments.whole_number(f"ood.{name}", x, at_least=1) for x in given)
            object.__setattr__(self, name, counts)
        share = ood.checked_share("ood.residual_share", self.residual_share)
        object.__setattr__(self, "residual_share", share)
        df = arguments.real_number("ood.mixture_df", self.mixture_df)
        if not df > 0:
            raise ValueError(f"ood.mixture_df must be positive, got {df}")
        object.__setattr__(self, "mixture_df", df)

    def num_components(self, features: Any) -> int:
        """Of the principal subspace of features `[N, F]`."""
        num_features = features.shape[1]
        # A share below one leaves something over, also of few features.
        return max(1, min(round(self.residual_share * num_features), num_features - 1))


def score_settings(section: OodSection) -> ScoreSettings:
    """Those of the section `ood` of a config."""
    return ScoreSettings(
        knn_k=section.knn_k,
        ssd_clusters=section.ssd_clusters,
        residual_share=section.residual_share,
        mixture_df=section.mixture_df,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfTerms:
    """A score of JEVB's terms."""

    score: Callable[[ood.UncertaintyTerms], Array] = dataclasses.field(metadata={"static": True})

    def __call__(self, features: Features) -> Array:
        """Scores, `[N]`."""
        terms: Any = features.terms
        return self.score(terms)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfFeature:
    """A fitted score of the features called `name`."""

    score: Callable[[Array], Array]
    name: str = dataclasses.field(metadata={"static": True})

    def __call__(self, features: Features) -> Array:
        """Scores, `[N]`."""
        return self.score(feature(features, self.name))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfMixtureAndResidual:
    """Where the embedding lies, and how its posterior errs: two negative log-densities (docs eq. 36).

    Half a squared Mahalanobis distance is a Gaussian's negative log-density, up to a constant.
    """

    mixture: OfFeature
    residual: OfFeature

    def __call__(self, features: Features) -> Array:
        """Scores, `[N]`."""
        return self.mixture(features) + self.residual(features) / 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfProbe:
    """A score of the logits of a linear probe, or of its features and its logits."""

    probe: "classification.LinearProbe"
    vim: ood.VirtualLogit | None = None
    score: Callable[[Array], Array] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    def standardised(self, features: Features) -> Array:
        """`[N, F]`, what the logits are linear in."""
        x = jnp.asarray(features.representation)
        return (x - self.probe.feature_mean[None]) / self.probe.feature_std[None]

    def logits(self, features: Features) -> Array:
        """`[N, C]`."""
        products = jnp.matmul(
            self.standardised(features), self.probe.weights, precision=jax.lax.Precision.HIGHEST
        )
        return products + self.probe.bias[None]

    def __call__(self, features: Features) -> Array:
        """Scores, `[N]`."""
        if self.score is not None:
            return self.score(self.logits(features))
        vim: Any = self.vim
        return vim(self.standardised(features), self.logits(features))


@jax.jit
def _probe_values(of_probe: OfProbe, features: Features) -> tuple[Array, Array]:
    """What the logits are linear in, and the logits."""
    return of_probe.standardised(features), of_probe.logits(features)


ScoreFunction = Callable[[Features], Array]


def feature(features: Features, name: str) -> Array:
    """The features that a score is of.

    Args:
      features: what `FeatureExtractor` returns.
      name: "representation", "embedding", "log_scale" (of the posterior, JEVB), "posterior_residual"
        (of the embedding against its posterior, in standard deviations, JEVB), "terms"
        (`ood.typicality_features`, JEVB) or "concentration" (VI-SimSiam).

    Returns:
      `[N, F]`, or `[N]` of a concentration.
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
        return ood.typicality_features(terms)
    return getattr(features, name)


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What scores are fitted to.

    Attributes:
      features: of in-distribution training images; with `terms` where a score is made of them, with
        labels where it needs labels.
      probe: of the representation, or None without labels.
    """

    features: Features
    probe: "classification.LinearProbe | None" = None
    _shared: dict[str, OfFeature] = dataclasses.field(default_factory=dict)

    def fit(self, name: str, function: Callable[[Any], Any]) -> OfFeature:
        """Fits a score to the features of a name; see `feature`."""
        return OfFeature(function(feature(self.features, name)), name)

    def fit_once(self, score: str, name: str, function: Callable[[Any], Any]) -> OfFeature:
        """As `fit`, for what two scores have in common: the second gets what the first fitted."""
        if score not in self._shared:
            self._shared[score] = self.fit(name, function)
        return self._shared[score]


@dataclasses.dataclass(frozen=True)
class ScoreEntry:
    """One score of `score_table`.

    Attributes:
      made_of: which features of an image it reads: "representation", "embedding", "posterior" (the
        embedding's, JEVB), "terms" (JEVB's, of views and samples), "cross_view" (the term between
        views), "concentration" (VI-SimSiam).
      is_fitted: to in-distribution images.
      needs_labels: of the training images.
      make: the score; of `TrainingData`, or of None where nothing is fitted.
    """

    made_of: str
    is_fitted: bool
    needs_labels: bool
    make: Callable[[Any], ScoreFunction]

    @property
    def needs_terms(self) -> bool:
        """Whether features must be extracted with JEVB's terms, of several views and samples."""
        return self.made_of in ("terms", "cross_view")


def score_table(method: str, settings: ScoreSettings, *, num_views: int) -> dict[str, ScoreEntry]:
    """Every score of a method, and what each needs.

    Args:
      method: its name in the config, such as "jevb".
      settings: neighbors, clusters and the like.
      num_views: of JEVB's terms.

    Returns:
      By name, `family/score`.
    """
    plain = functools.partial(ScoreEntry, is_fitted=False, needs_labels=False)
    fitted = functools.partial(ScoreEntry, is_fitted=True, needs_labels=False)
    with_labels = functools.partial(ScoreEntry, is_fitted=True, needs_labels=True)

    def of_terms(score: Callable[[ood.UncertaintyTerms], Array]) -> Callable[..., OfTerms]:
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

    def fit_residual(features: Any) -> ood.Residual:
        return ood.fit_residual(features, num_components=settings.num_components(features))

    def of_mixture(train: TrainingData) -> OfFeature:
        posterior = train.features.prediction
        return train.fit_once(
            "jevb/mixture",
            "embedding",
            functools.partial(_fit_mixture, posterior, settings.mixture_df),
        )

    def of_residual(train: TrainingData) -> OfFeature:
        return train.fit_once("jevb/residual", "posterior_residual", ood.fit_mahalanobis)

    table = {
        "jevb/negative_log_likelihood": plain(
            "terms", make=of_terms(ood.negative_log_likelihood_score)
        ),
        "jevb/directional": plain("terms", make=of_terms(ood.directional_score)),
        "jevb/radial": plain("terms", make=of_terms(ood.radial_score)),
        "jevb/negative_elbo": plain("terms", make=of_terms(ood.negative_elbo_score)),
        "jevb/importance_weighted": plain("terms", make=of_terms(ood.importance_weighted_score)),
        "jevb/kl": plain("terms", make=of_terms(ood.kl_score)),
        "jevb/posterior_entropy": plain("terms", make=of_terms(ood.posterior_entropy_score)),
        "jevb/cross_view": plain("cross_view", make=of_terms(ood.cross_view_score)),
        "jevb/typicality_mahalanobis": fitted("terms", make=fit("terms", ood.fit_mahalanobis)),
    }
    if settings.knn_k:
        knn = fit("terms", ood.fit_whitened_knn, k=min(settings.knn_k))
        table["jevb/typicality_knn"] = fitted("terms", make=knn)
    table |= {
        "jevb/scale_mahalanobis": fitted("posterior", make=fit("log_scale", ood.fit_mahalanobis)),
        "jevb/mixture": fitted("posterior", make=of_mixture),
        "jevb/residual_mahalanobis": fitted("posterior", make=of_residual),
        "jevb/mixture_and_residual": fitted(
            "posterior",
            make=lambda train: OfMixtureAndResidual(of_mixture(train), of_residual(train)),
        ),
        "vi_simsiam/concentration": plain(
            "concentration", make=of_feature("concentration", ood.concentration_score)
        ),
    }
    for name in ("representation", "embedding"):
        for k in settings.knn_k:
            table[f"{name}/knn_{k}"] = fitted(name, make=fit(name, ood.fit_knn, k=k))
        table[f"{name}/mahalanobis"] = fitted(name, make=fit(name, ood.fit_mahalanobis))
        for count in settings.ssd_clusters:
            ssd = fit(name, ood.fit_ssd, num_clusters=count)
            table[f"{name}/ssd_{count}"] = fitted(name, make=ssd)
        table[f"{name}/residual"] = fitted(name, make=fit(name, fit_residual))
        table[f"{name}/norm"] = plain(name, make=of_feature(name, ood.feature_norm_score))
    made_of = "representation"
    table |= {
        "probe/max_softmax": with_labels(made_of, make=of_logits(ood.max_softmax_score)),
        "probe/max_logit": with_labels(made_of, make=of_logits(ood.max_logit_score)),
        "probe/energy": with_labels(made_of, make=of_logits(ood.energy_score)),
        "probe/class_mahalanobis": with_labels(
            made_of, make=fit_classes(ood.fit_class_mahalanobis)
        ),
        "probe/relative_mahalanobis": with_labels(
            made_of, make=fit_classes(ood.fit_relative_mahalanobis)
        ),
        "probe/vim": with_labels(made_of, make=functools.partial(_fit_vim, settings)),
    }
    features = {"representation", "embedding"}
    if method == "jevb":
        features |= {"posterior", "terms"} | ({"cross_view"} if num_views > 1 else set())
    elif method == "vi_simsiam":
        features |= {"concentration"}
    return {name: entry for name, entry in table.items() if entry.made_of in features}


def _fit_mixture(posterior: Posterior, df: float, embedding: Array) -> mixture.TrainingMixture:
    """The training posteriors as a density. Units of the scales cancel in its bandwidth."""
    tied = posterior.likelihood_scale is None
    scale: Any = posterior.posterior_scale if tied else posterior.likelihood_scale
    return mixture.fit_training_mixture(
        posterior.posterior_mean,
        likelihood_scale(scale),
        df=df,
        embedding=embedding,
        num_queries=_NUM_LEFT_OUT,
    )


def _fit_vim(settings: ScoreSettings, train: TrainingData) -> OfProbe:
    probe: Any = train.probe
    standardised, logits = _probe_values(OfProbe(probe), train.features._replace(labels=None))
    vim = ood.fit_vim(
        standardised,
        logits,
        origin=ood.vim_origin(probe.weights, probe.bias),
        num_components=settings.num_components(train.features.representation),
    )
    return OfProbe(probe, vim=vim)


def scores_of_run(settings: RunSettings, *, has_labels: bool) -> dict[str, ScoreEntry]:
    """Every score that a run will have, those that degenerate features leave out too.

    Args:
      settings: of the run.
      has_labels: whether the training images have labels.

    Returns:
      Entries of `score_table`.
    """
    table = score_table(
        settings.method, score_settings(settings.ood), num_views=settings.ood.num_views
    )
    return {name: entry for name, entry in table.items() if has_labels or not entry.needs_labels}


def default_score(settings: RunSettings) -> str:
    """The name of the score where nothing may be chosen: that of the config, or of its method."""
    return settings.ood.default_score or METHODS[settings.method].default_score


class Scorers(NamedTuple):
    """Scores by name, `family/score`.

    Attributes:
      scores: `Features -> [N]`, trees of arrays.
      with_labels: names of those that were fitted with labels.
      left_out: why, by name: features that do not vary have no density, and too few images no k-th
        neighbor.
    """

    scores: dict[str, ScoreFunction]
    with_labels: frozenset[str]
    left_out: dict[str, str]


def make_scorers(table: dict[str, ScoreEntry], train: TrainingData) -> Scorers:
    """Every score of a table, fitted to training images.

    Args:
      table: of `score_table`, without the scores that `train` has no labels for.
      train: features of in-distribution training images, with `terms` for JEVB.

    Returns:
      The scores.

    Raises:
      ValueError: settings that do not fit the features.
    """
    scores: dict[str, ScoreFunction] = {}
    left_out: dict[str, str] = {}
    for name, entry in table.items():
        try:
            scores[name] = entry.make(train)
        except ood.DegenerateFeaturesError as error:
            left_out[name] = str(error)
    with_labels = frozenset(name for name, entry in table.items() if entry.needs_labels)
    return Scorers(scores, with_labels, left_out)


@jax.jit
def _score_batch(scores: dict[str, ScoreFunction], features: Features) -> dict[str, Array]:
    return {name: score(features) for name, score in scores.items()}


def score_images(
    extract: FeatureExtractor, variables: Any, source: ImageSource, scorers: Scorers
) -> dict[str, np.ndarray]:
    """Every score of every image of a source, streamed.

    Args:
      extract: with terms for JEVB.
      variables: parameters and running statistics.
      source: images.
      scorers: of `make_scorers`.

    Returns:
      `[N]` by the score's name.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in scorers.scores}
    for features, mask in extract.stream(variables, source):
        for name, values in jax.device_get(_score_batch(scorers.scores, features)).items():
            parts[name].append(values[mask])
    return {name: _joined(values) for name, values in parts.items()}


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def score_features(
    features: Features, scorers: Scorers, *, batch_size: int
) -> dict[str, np.ndarray]:
    """Every score of features that are at hand.

    Args:
      features: of `N` images, with terms for JEVB.
      scorers: of `make_scorers`.
      batch_size: images at a time.

    Returns:
      `[N]` by the score's name.

    Raises:
      ValueError: `batch_size` below one.
      TypeError: it is not an integer.
    """
    batch_size = arguments.whole_number("batch_size", batch_size, at_least=1)
    num_images = len(features.representation)
    batch_size = useful_batch_size(batch_size, num_images)
    unlabelled = features._replace(labels=None)
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, num_images, batch_size):
        # The last batch repeats its last row, so that everything is compiled for one size.
        rows = np.minimum(np.arange(start, start + batch_size), num_images - 1)
        batch = jax.tree.map(lambda values, rows=rows: values[rows], unlabelled)
        # Where features that are streamed are too: one compiled program serves both.
        batch = jax.device_put(batch, jax.local_devices()[0])
        parts.append(jax.device_get(_score_batch(scorers.scores, batch)))
    return {name: _joined([part[name] for part in parts])[:num_images] for name in scorers.scores}


class OutsideSet(NamedTuple):
    """Images that are out of distribution.

    Attributes:
      name: what to call it; of a corruption `NAME_SEVERITY`.
      group: "near", "far", ... over which AUROC is averaged; `CORRUPTED` for corruptions.
      source: the images.
      protocol: what they are.
    """

    name: str
    group: str
    source: ImageSource
    protocol: str


def load_outside_set(*, name: str, group: str, protocol: str, **source: Any) -> OutsideSet:
    """A set that a config describes.

    Args:
      name: what to call it.
      group: sets of one group are averaged.
      protocol: what it is, in words: which release, which split list.
      **source: keyword arguments of `dataset.load_images`.

    Returns:
      The set.

    Raises:
      ValueError: as `dataset.load_images`.
      FileNotFoundError: likewise.
    """
    images = dataset.load_images(**source)
    return OutsideSet(name, group, images, protocol or f"{name}, {images.name}")


def corrupted_sets(
    images: np.ndarray, names: Sequence[str], severities: Sequence[int], *, of: str
) -> Iterator[OutsideSet]:
    """Corrupted copies of in-distribution images, made one set at a time.

    Args:
      images: `[N, h, w, c]` uint8.
      names: of `corruptions.CORRUPTIONS`.
      severities: 1 to 5.
      of: what the images are, for the protocol.

    Yields:
      One set for each corruption and severity.
    """
    for name in names:
        for severity in severities:
            corrupted = corruptions.corrupt(images, name, severity=severity, seed=0)
            yield OutsideSet(
                f"{name}_{severity}",
                CORRUPTED,
                ArraySource(corrupted, name=f"{name}, severity {severity}"),
                f"the first {len(images):,} images of {of} with {name}, severity {severity} of 5",
            )


class SetResult(NamedTuple):
    """One score against one set.

    Attributes:
      score: its name.
      outside: the set's name.
      group: the set's group.
      metrics: point estimates.
      low: ends of their intervals, of `bootstrap_intervals`; None where none were asked for.
      high: likewise.
      protocol: how they were made.
    """

    score: str
    outside: str
    group: str
    metrics: OODMetrics
    low: OODMetrics | None
    high: OODMetrics | None
    protocol: str


def compare(
    inside: dict[str, np.ndarray],
    outside: dict[str, np.ndarray],
    outside_set: OutsideSet,
    *,
    inside_name: str,
    num_bootstrap: int,
) -> list[SetResult]:
    """Metrics of every score for one outside set.

    Args:
      inside: scores of in-distribution images by name.
      outside: scores of the set by name.
      outside_set: the set.
      inside_name: of the in-distribution images.
      num_bootstrap: resamples of the intervals; 0 leaves the intervals out.

    Returns:
      One result for each score.
    """
    intervals: Sequence[tuple[OODMetrics | None, OODMetrics | None]] = [(None, None)] * len(inside)
    protocol = (
        f"outside: {outside_set.protocol} ({len(outside_set.source):,}); "
        "larger score = more out of distribution"
    )
    if num_bootstrap:
        intervals = bootstrap_intervals_of_scores(
            list(inside.values()),
            [outside[name] for name in inside],
            num_resamples=num_bootstrap,
            level=0.95,
            seed=0,
        )
        protocol += (
            f"; 95% intervals over images, {num_bootstrap} resamples for the areas of precision and "
            "recall"
        )
    return [
        SetResult(
            name,
            outside_set.name,
            outside_set.group,
            ood_metrics(scores, outside[name]),
            low,
            high,
            f"inside: {inside_name} ({len(scores):,}); {protocol}",
        )
        for (name, scores), (low, high) in zip(inside.items(), intervals, strict=True)
    ]


def group_means(results: Sequence[SetResult]) -> dict[str, dict[str, float]]:
    """AUROC averaged over the sets of a group, as OpenOOD averages near and far.

    Args:
      results: of `compare`.

    Returns:
      By score, then by group, in the order in which the groups first appear.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for result in results:
        groups = values.setdefault(result.score, {})
        groups.setdefault(result.group, []).append(result.metrics.auroc)
    return {
        score: {group: float(np.mean(aurocs)) for group, aurocs in groups.items()}
        for score, groups in values.items()
    }


# --- A run ----------------------------------------------------------------------------------------


# The score of a method where nothing may be chosen (docs/ood.md says why).
class OODEvaluation(NamedTuple):
    """What `evaluate_ood` found.

    Attributes:
      results: one for each score and set.
      inside: scores of the evaluated images by name.
      outside: by set, then by score.
      default_score: fixed before any result was seen.
      chosen_score: the best on validation images against the sets of `ood.choice`, or None.
      choice_protocol: how it was chosen.
      with_labels: scores that were fitted with labels.
      left_out: why a score is missing, by name.
    """

    results: list[SetResult]
    inside: dict[str, np.ndarray]
    outside: dict[str, dict[str, np.ndarray]]
    default_score: str
    chosen_score: str | None
    choice_protocol: str
    with_labels: frozenset[str]
    left_out: dict[str, str]


def terms_settings(experiment: "Experiment") -> TermsSettings | None:
    """How the run's own terms are computed, or None for a method that has none.

    Args:
      experiment: with the section `ood` in its config.

    Returns:
      Settings for the feature extractor.
    """
    if experiment.settings.method != "jevb":
        return None
    return jevb_terms_settings(
        experiment.model,
        experiment.jevb_settings,
        experiment.settings.ood,
        augmentation=experiment.view_augmentations[0],
    )


def jevb_terms_settings(
    model: JointEmbeddingModel,
    settings: methods.JevbSettings,
    section: OodSection,
    *,
    augmentation: ViewAugmentation,
) -> TermsSettings:
    """How JEVB's terms are computed.

    Args:
      model: networks.
      settings: of the objective. The weight of the KL is in no term, nor is its warm-up.
      section: how many views and samples.
      augmentation: what makes all views but the first, which is the plain image.

    Returns:
      Settings for the feature extractor.
    """

    def terms_of(variables: Any, key: Array, views: ViewOutputs) -> ood.UncertaintyTerms:
        radial_scale: Any = model.apply(variables, method=model.radial_scale)
        return ood.uncertainty_terms(
            key,
            View(views.embedding, views.posterior_mean, views.posterior_scale),
            settings.likelihood_at(radial_scale),
            num_samples=section.num_samples,
            prior_scale=settings.prior_scale,
            untied_scale=settings.untied_scale(views),
            location=settings.location,
        )

    return TermsSettings(terms_of=terms_of, augmentation=augmentation, num_views=section.num_views)


def is_asked(settings: RunSettings) -> bool:
    """Whether a config has anything to detect."""
    section = settings.ood
    return bool(section.outside or section.corruptions or settings.data.inlier_class >= 0)


def fit_rows(num_images: int, most: int) -> np.ndarray:
    """Which training images scores are fitted to: a fixed choice, in order.

    Args:
      num_images: in the training split.
      most: how many of them; 0 for all.

    Returns:
      `[M]` row numbers.

    Raises:
      ValueError: `most` below zero.
      TypeError: it is not an integer.
    """
    most = arguments.whole_number("ood.max_fit_images", most, at_least=0)
    if not 0 < most < num_images:
        return np.arange(num_images)
    return np.sort(np.random.default_rng(0).permutation(num_images)[:most])


def _fit_features(
    experiment: "Experiment", variables: Any, extract: FeatureExtractor, train: Features
) -> Features:
    """Features of the training images that scores are fitted to, with terms for JEVB."""
    rows = fit_rows(len(train.representation), experiment.settings.ood.max_fit_images)
    if experiment.settings.method == "jevb":
        return extract(variables, Subset(experiment.dataset.train, rows))
    return jax.tree.map(lambda values: values[rows], train)


def _sets(experiment: "Experiment", inside: ImageSource, split: str) -> Iterator[OutsideSet]:
    """The sets of a config, each loaded or made when its turn comes."""
    settings = experiment.settings.ood
    left_out = experiment.dataset.outside
    if left_out is not None:
        name = f"the {split} images of the other classes"
        yield OutsideSet("other_classes", "other_classes", left_out, name)
    for description in settings.outside:
        yield load_outside_set(**description)
    if settings.corruptions:
        count = min(len(inside), settings.num_corrupted_images)
        images = batches.load_resident(Subset(inside, np.arange(count)))
        yield from corrupted_sets(images, settings.corruptions, settings.severities, of=split)


def _no_numbers(
    name: str, inside: dict[str, np.ndarray], outside: Sequence[dict[str, np.ndarray]]
) -> str:
    """Why a score cannot be ranked, or nothing: it is NaN of some images."""
    for where, scores in (
        ("inside", inside[name]),
        *(("outside", values[name]) for values in outside),
    ):
        count = int(np.isnan(scores).sum())
        if count:
            return (
                f"{count} of {len(scores)} scores of {where} images are NaN: look for a diverged network "
                "or features outside the score's domain"
            )
    return ""


def _choose(
    experiment: "Experiment", variables: Any, extract: FeatureExtractor, scorers: Scorers
) -> tuple[str | None, str]:
    """The label-free score with the best mean AUROC on the sets of `ood.choice`, and how."""
    descriptions = experiment.settings.ood.choice
    if not descriptions:
        return None, ""
    validation = experiment.dataset.validation
    inside = score_images(extract, variables, validation, scorers)
    sets = [load_outside_set(**description) for description in descriptions]
    outside = [score_images(extract, variables, one.source, scorers) for one in sets]
    candidates = [name for name in scorers.scores if name not in scorers.with_labels]
    # A score that is no number on some image cannot be chosen.
    candidates = [name for name in candidates if not _no_numbers(name, inside, outside)]
    if not candidates:
        return None, ""
    mean = {
        name: np.mean([ood_metrics(inside[name], scores[name]).auroc for scores in outside])
        for name in candidates
    }
    names = ", ".join(one.protocol for one in sets)
    return max(candidates, key=lambda name: mean[name]), (
        f"best mean AUROC of {len(candidates)} label-free scores on validation ({len(validation):,}) "
        f"against {names}"
    )


def evaluate_ood(
    experiment: "Experiment",
    variables: Any,
    *,
    extract: FeatureExtractor,
    train: Features,
    inside: Features,
    inside_source: ImageSource,
    probe: "classification.LinearProbe | None",
    split: str,
    has_intervals: bool = True,
) -> OODEvaluation:
    """Every score against every set of the config.

    Args:
      experiment: data, networks and settings.
      variables: parameters and running statistics.
      extract: with `terms_settings`.
      train: features of the training split.
      inside: features of the evaluated in-distribution images, with terms for JEVB.
      inside_source: those images.
      probe: of the representation, or None.
      split: name of the evaluated split.
      has_intervals: whether the metrics get intervals.

    Returns:
      The evaluation.

    Raises:
      ValueError: settings or sets that do not fit the run.
    """
    settings = experiment.settings.ood
    fit_features = _fit_features(experiment, variables, extract, train)
    table = scores_of_run(experiment.settings, has_labels=probe is not None)
    scorers = make_scorers(table, TrainingData(fit_features, probe))
    default = default_score(experiment.settings)
    if default not in scorers.scores and default not in scorers.left_out:
        raise ValueError(
            f"ood.default_score must be one of {sorted(scorers.scores)}, got {default!r}"
        )
    inside_scores = score_features(
        inside, scorers, batch_size=experiment.settings.evaluation.batch_size
    )
    results: list[SetResult] = []
    outside_scores: dict[str, dict[str, np.ndarray]] = {}
    not_numbers: dict[str, str] = {}
    for outside in _sets(experiment, inside_source, split):
        if outside.name in outside_scores:
            raise ValueError(f"two outside sets are called {outside.name!r}")
        scores = score_images(extract, variables, outside.source, scorers)
        outside_scores[outside.name] = scores
        for name in scores:
            reason = _no_numbers(name, inside_scores, [scores])
            if reason:
                not_numbers.setdefault(name, reason)
        # A corrupted image is compared with the images that were corrupted.
        count = len(outside.source) if outside.group == CORRUPTED else None
        ranked = [name for name in scores if name not in not_numbers]
        results += compare(
            {name: inside_scores[name][:count] for name in ranked},
            scores,
            outside,
            inside_name=f"{experiment.dataset.train.name}, {split}",
            num_bootstrap=settings.num_bootstrap if has_intervals else 0,
        )
    # One set on which a score is no number leaves it out of all: its means would be of other sets.
    results = [result for result in results if result.score not in not_numbers]
    inside_scores, *numbers = (
        {name: values for name, values in scores.items() if name not in not_numbers}
        for scores in (inside_scores, *outside_scores.values())
    )
    outside_scores = dict(zip(outside_scores, numbers, strict=True))
    chosen, choice_protocol = _choose(experiment, variables, extract, scorers)
    return OODEvaluation(
        results=results,
        inside=inside_scores,
        outside=outside_scores,
        default_score=default,
        chosen_score=chosen,
        choice_protocol=choice_protocol,
        with_labels=scorers.with_labels,
        left_out=scorers.left_out | not_numbers,
    )
