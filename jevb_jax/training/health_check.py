"""The health of a run's state, on fixed validation images."""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jevb_jax import methods, parallel
from jevb_jax.images.batches import gather
from jevb_jax.images.views import multi_view, plain_views
from jevb_jax.networks.heads import DirectionalPrediction, Posterior
from jevb_jax.networks.joint import ViewOutputs
from jevb_jax.paper.likelihood import likelihood_scale
from jevb_jax.paper.objective import ElboTerms, conditional_elbo
from jevb_jax.training import health
from jevb_jax.training.experiment import Experiment
from jevb_jax.training.step import TrainState
from jevb_jax.xla_options import jit_once

_logger = logging.getLogger(__name__)


def health_check(experiment: Experiment) -> Any:
    """A compiled function from a state to its health on fixed validation images, or None.

    It is None where health is off or there are too few images. Every process computes it on its own
    first device.
    """
    settings = experiment.settings.train
    embedding_dim = experiment.settings.model.embedding_dim
    source = experiment.dataset.validation
    if settings.health_every_steps <= 0:
        return None
    count = min(len(source), settings.health_num_images)
    if count <= embedding_dim:
        _logger.warning(
            "No effective rank will be logged: it needs more images than embedding_dim = %d, and the "
            "validation split gives %d. Raise data.validation_fraction or train.health_num_images.",
            embedding_dim,
            count,
        )
    if count < 2:
        _logger.warning("No health will be logged: it needs 2 validation images, got %d.", count)
        return None
    images = gather(source, np.arange(count))
    view = experiment.view_augmentations[0]

    # Between two checks are hundreds of steps: compiling for speed would take longer than it saves.
    @jit_once
    def check(state: TrainState, images: Array) -> dict[str, Array]:
        views = plain_views(images, view)
        output: Any = experiment.model.apply(state.evaluation_variables, views, train=False)
        values = health.representation_health(output.embedding)
        if isinstance(output.prediction, Posterior):
            values |= _posterior_values(experiment, state, output)
        if isinstance(output.prediction, DirectionalPrediction):
            values["concentration_mean"] = jnp.mean(output.prediction.concentration)
        if isinstance(output.prediction, Posterior | DirectionalPrediction):
            values |= _information_values(experiment, state, images)
        if settings.health_pairs:
            values |= _pair_values(experiment, state, images)
        return values

    fixed = jnp.asarray(images)
    return lambda state: check(parallel.on_local_device(state._replace(opt_state=None)), fixed)


class _Keys(NamedTuple):
    """A key for each purpose. With one for all, views and noise would be the same random numbers."""

    views: Array
    information: Array
    latents: Array
    bound: Array


def _keys() -> _Keys:
    """Always the same, so that two checks differ by the state alone."""
    return _Keys(*jax.random.split(jax.random.key(0), len(_Keys._fields)))


def _posterior_values(
    experiment: Experiment, state: TrainState, output: ViewOutputs
) -> dict[str, Array]:
    """Size and spread of the posteriors, the share at the floor, the width of the radial likelihood."""
    settings: methods.JevbSettings = experiment.jevb_settings
    min_scale = experiment.settings.model.min_scale
    mean, scale = output.posterior_mean, output.posterior_scale
    summary = health.posterior_summary(mean, scale, prior_scale=settings.prior_scale)
    values = {f"posterior_{name}": value for name, value in summary._asdict().items()}
    values["posterior_scale_at_floor"] = health.share_at_floor(scale, min_scale=min_scale)
    likelihood = output.prediction.likelihood_scale
    if likelihood is not None:  # untied: it has its own head, with the same floor
        values["likelihood_scale_at_floor"] = health.share_at_floor(likelihood, min_scale=min_scale)
    width: Any = experiment.model.apply(state.evaluation_variables, method="radial_scale")
    if settings.likelihood.space == "linear":  # the width is a length: make it relative to radii
        log_radius = health.embedding_log_radius(output.embedding)
        width = width / (jnp.exp(log_radius) * np.sqrt(mean.shape[-1]))
    values["radial_width"] = width
    return values


def _two_views(
    experiment: Experiment, state: TrainState, images: Array
) -> tuple[ViewOutputs, ViewOutputs]:
    """Outputs of two augmented views of the images, always the same two."""
    views = multi_view(
        jax.random.split(_keys().views, len(images)), images, experiment.view_augmentations[:2]
    )
    apply: Any = functools.partial(experiment.model.apply, state.evaluation_variables)
    source, target = (apply(view, train=False) for view in views)
    return source, target


def _information_values(
    experiment: Experiment, state: TrainState, images: Array
) -> dict[str, Array]:
    """How much one view predicts of the other, and the mass of the likelihood on the sphere."""
    views = _two_views(experiment, state, images)
    radial_scale: Any = None
    if experiment.model.initial_radial_scale is not None:
        radial_scale = experiment.model.apply(state.evaluation_variables, method="radial_scale")
    keys = jax.random.split(_keys().information, len(images))
    output = experiment.method(keys, views, views, step=state.step, radial_scale=radial_scale)
    names = ("predictive_information", "directional_log_mass")
    return {name: jnp.mean(output.metrics[name]) for name in names if name in output.metrics}


def _pair_values(experiment: Experiment, state: TrainState, images: Array) -> dict[str, Array]:
    """Residuals, weights and gradients of JEVB's objective on two augmented views of the images.

    Residuals and weights are of the chordal density with joint tails. Of a run with another density
    they would not say what its gradients do, so it has the cosine alone.
    """
    settings: methods.JevbSettings = experiment.jevb_settings
    source, target = _two_views(experiment, state, images)
    apply: Any = functools.partial(experiment.model.apply, state.evaluation_variables)

    def terms_of(representation: Array) -> ElboTerms:
        view = apply(representation, train=False, method="outputs_of")
        return conditional_elbo(
            _keys().bound,
            target.embedding,
            view.posterior_mean,
            view.posterior_scale,
            settings.likelihood_at(apply(method="radial_scale")),
            untied_scale=settings.untied_scale(view),
            **settings.elbo_settings(state.step),
        )

    mean, scale = source.posterior_mean, source.posterior_scale
    untied = settings.untied_scale(source)
    likelihood = settings.likelihood
    own_scale = scale if untied is None else jnp.broadcast_to(jnp.asarray(untied), scale.shape)
    noise = jax.random.normal(_keys().latents, mean.shape) * (settings.location == "sample")
    pairs = health.pair_health(
        target.embedding,
        mean + scale * noise,
        likelihood_scale(own_scale, scale_units=likelihood.scale_units),
        df=likelihood.df,
    )
    gradients = health.term_gradient_norms(terms_of, source.representation)
    is_of_pairs = likelihood.is_factorised and likelihood.coordinates == "chordal"
    known = (
        pairs._asdict() if is_of_pairs and likelihood.tails == "joint" else {"cosine": pairs.cosine}
    )
    return {
        **{f"pair_{name}": value for name, value in known.items()},
        **{f"gradient_{name}": value for name, value in gradients.items()},
    }
