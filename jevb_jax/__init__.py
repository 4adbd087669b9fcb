"""Joint Embedding Variational Bayes: the names of the functional interface.

The densities and the objective are pure functions of arrays and need no network framework. A name is
imported when it is first used. So `import jevb_jax` itself takes hardly any time, and a command can
say at once that it has started. Modules of the package are found in the same way, for example
`jevb_jax.export`.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from jevb_jax import extras

if TYPE_CHECKING:
    from jevb_jax.any_encoder import wrap
    from jevb_jax.detector import Detector
    from jevb_jax.loading import load, load_detector
    from jevb_jax.model import Model
    from jevb_jax.paper.densities import (
        directional_log_prob,
        gaussian_kl_divergence,
        multivariate_student_t_log_prob,
        power_spherical_entropy,
        power_spherical_log_prob,
        radial_log_prob,
        student_t_log_prob,
    )
    from jevb_jax.paper.distrax_faces import (
        PowerSpherical,
        SphericalStudentT,
        gaussian_posterior,
        gaussian_prior,
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

_HOMES = {
    "Detector": "detector",
    "ElboTerms": "paper.objective",
    "Likelihood": "paper.likelihood",
    "Model": "model",
    "PowerSpherical": "paper.distrax_faces",
    "SphericalStudentT": "paper.distrax_faces",
    "View": "paper.objective",
    "conditional_elbo": "paper.objective",
    "directional_log_mass": "paper.mass",
    "directional_log_prob": "paper.densities",
    "embedding_log_prob": "paper.likelihood",
    "gaussian_kl_divergence": "paper.densities",
    "gaussian_posterior": "paper.distrax_faces",
    "gaussian_prior": "paper.distrax_faces",
    "importance_weighted_bound": "paper.objective",
    "likelihood_scale": "paper.likelihood",
    "load": "loading",
    "load_detector": "loading",
    "multivariate_student_t_log_prob": "paper.densities",
    "polar_decomposition": "paper.sphere",
    "power_spherical_entropy": "paper.densities",
    "power_spherical_log_prob": "paper.densities",
    "predictive_information": "paper.objective",
    "radial_log_prob": "paper.densities",
    "student_t_log_prob": "paper.densities",
    "symmetric_elbo": "paper.objective",
    "uniform_log_prob": "paper.mass",
    "wrap": "any_encoder",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name, name)
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{home}") is not None:
        with extras.explained():
            module = importlib.import_module(f"{__name__}.{home}")
        found = getattr(module, name) if name in _HOMES else module
        globals()[name] = found  # the next time, Python finds it without asking
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
