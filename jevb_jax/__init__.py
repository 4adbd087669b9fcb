"""Joint Embedding Variational Bayes: the names of the functional interface.

The densities and the objective are pure functions of arrays and need no network framework. Some
names are loaded on first use: the distrax distributions, because distrax imports TensorFlow
Probability, and the functions that load a trained model, because they import Flax.
"""

from typing import TYPE_CHECKING

from jevb_jax import extras
from jevb_jax.paper.densities import (
    directional_log_prob,
    gaussian_kl_divergence,
    multivariate_student_t_log_prob,
    power_spherical_entropy,
    power_spherical_log_prob,
    radial_log_prob,
    student_t_log_prob,
)
from jevb_jax.paper.likelihood import Likelihood, embedding_log_prob, likelihood_scale
from jevb_jax.paper.mass import directional_log_mass, uniform_log_prob
from jevb_jax.paper.objective import (
    ElboTerms,
    View,
    conditional_elbo,
    importance_weighted_bound,
    predictive_information,
    symmetric_elbo,
)
from jevb_jax.paper.sphere import polar_decomposition

if TYPE_CHECKING:
    from jevb_jax.any_encoder import wrap
    from jevb_jax.detector import Detector
    from jevb_jax.loading import load, load_detector
    from jevb_jax.model import Model
    from jevb_jax.paper.distrax_faces import (
        PowerSpherical,
        SphericalStudentT,
        gaussian_posterior,
        gaussian_prior,
    )

__version__ = "0.2.0"

__all__ = [
    "Detector",
    "ElboTerms",
    "Likelihood",
    "Model",
    "PowerSpherical",
    "SphericalStudentT",
    "View",
    "conditional_elbo",
    "directional_log_mass",
    "directional_log_prob",
    "embedding_log_prob",
    "gaussian_kl_divergence",
    "gaussian_posterior",
    "gaussian_prior",
    "importance_weighted_bound",
    "likelihood_scale",
    "load",
    "load_detector",
    "multivariate_student_t_log_prob",
    "polar_decomposition",
    "power_spherical_entropy",
    "power_spherical_log_prob",
    "predictive_information",
    "radial_log_prob",
    "student_t_log_prob",
    "symmetric_elbo",
    "uniform_log_prob",
    "wrap",
]

_DISTRAX_NAMES = ("PowerSpherical", "SphericalStudentT", "gaussian_posterior", "gaussian_prior")
_LOADING_NAMES = ("load", "load_detector")


def __getattr__(name: str) -> object:
    with extras.explained():
        if name in _DISTRAX_NAMES:
            from jevb_jax.paper import distrax_faces

            return getattr(distrax_faces, name)
        if name == "wrap":
            from jevb_jax.any_encoder import wrap

            return wrap
        if name == "Model":
            from jevb_jax.model import Model

            return Model
        if name == "Detector":
            from jevb_jax.detector import Detector

            return Detector
        if name in _LOADING_NAMES:
            from jevb_jax import loading

            return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
