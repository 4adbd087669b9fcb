"""The shapes in the signatures are true: right ones pass a type checker, wrong ones do not."""

import importlib
import inspect
import pkgutil
from typing import Any

import beartype
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jevb_jax import paper
from jevb_jax.paper.likelihood import Likelihood
from jevb_jax.paper.objective import View
from jevb_jax.paper.scores import UncertaintyTerms

B, D = 3, 5
VECTORS, NUMBERS, NUMBER = np.full((B, D), 0.5), np.ones(B), np.ones(())
LIKELIHOOD = Likelihood(df=5.0, radial_df=NUMBERS, radial_scale=0.5)
CROPS = np.random.default_rng(0).normal(size=(3, B, D))
KEY = jax.random.key(0)
VIEW = View(*(jnp.asarray(VECTORS),) * 3)
VIEWS = View(*(jnp.full((2, B, D), 0.5),) * 3)
ONE_FOR_ALL = Likelihood(df=5.0, radial_df=5.0, radial_scale=0.5)
TERMS = UncertaintyTerms(*(jnp.asarray(NUMBERS),) * 6)

_pair = {"direction": VECTORS, "loc": VECTORS}
_densities: dict[str, Any] = {**_pair, "scale_diag": VECTORS, "df": NUMBERS}
_posterior = {"posterior_mean": VECTORS, "posterior_scale": VECTORS}
_four: dict[str, Any] = dict.fromkeys(
    ("prediction_1", "prediction_2", "target_1", "target_2"), VECTORS
)
_of_domain = {"name": "x", "given": NUMBERS, "cast": NUMBERS}
# Arguments of every public function, and for those that name a shape a wrong one: a batch or a width
# of its own, or one axis too many or too few.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "special.log1p_second_ratio": ({"x": NUMBERS}, {"x": 1.0}),
    "special.log1p_ratio": ({"x": NUMBERS}, {"x": 1.0}),
    "special.log_gamma_remainder": ({"z": NUMBERS}, {"z": 1.0}),
    "special.log_gamma_ratio": ({"a": NUMBERS, "b": NUMBERS}, {"b": NUMBER}),
    "special.digamma_difference": ({"a": NUMBERS, "b": NUMBERS}, {"a": VECTORS}),
    "sphere.safe_norm": ({"x": VECTORS}, {"x": NUMBER}),
    "sphere.safe_log": ({"x": VECTORS}, {}),
    "sphere.polar_decomposition": ({"x": VECTORS}, {"x": NUMBER}),
    "sphere.cosine_complements": (_pair, {"loc": VECTORS[:, 1:]}),
    "sphere.power_of_two_below": ({"x": NUMBERS}, {"x": 1.0}),
    "sphere.scaled_tangent_squared_length": (
        {**_pair, "scale_diag": 0.5, "coordinates": "stereographic"},
        {"scale_diag": VECTORS[:, 1:]},
    ),
    "sphere.bounded_tangent_squares": (
        {**_pair, "scale_diag": VECTORS, "coordinates": "chordal"},
        {"scale_diag": VECTORS[:1]},
    ),
    "domain.positive": (_of_domain, {"cast": 1.0}),
    "domain.degrees_of_freedom": (_of_domain, {"cast": 1.0}),
    "domain.concentration": (_of_domain, {"cast": 1.0}),
    "domain.radius": (_of_domain, {"cast": 1.0}),
    "domain.weight": ({"name": "x", "given": 1.0}, {}),
    "domain.unit_vectors": ({"name": "x", "given": VECTORS}, {}),
    "domain.whole_number": ({"name": "x", "value": 3, "minimum": 1}, {}),
    "domain.choice": ({"name": "x", "value": "a", "choices": ("a", "b")}, {}),
    "domain.sphere_of": ({"dim": 3, "minimum": 2, "name": "x"}, {}),
    "domain.same_matrices": ({"minimum_batch": 0, "a": VECTORS, "b": VECTORS}, {"b": 1.0}),
    "domain.spread": (
        {"name": "x", "value": NUMBER, "shape": (B,), "meaning": "a number"},
        {"value": 1.0},
    ),
    "domain.broadcast": ({"vectors": {"x": VECTORS}, "numbers": {"y": NUMBERS}}, {}),
    "mass.uniform_log_prob": ({"dim": D}, {}),
    "mass.check_tails": ({"tails": "joint", "coordinates": "chordal"}, {}),
    "mass.directional_log_mass": (
        {"scale_diag": VECTORS[:, :1], "loc": VECTORS, "df": 5.0},
        {"df": NUMBERS[1:]},
    ),
    "densities.directional_log_prob": (_densities, {"df": NUMBERS[1:]}),
    "densities.student_t_log_prob": (
        {"x": NUMBERS, "df": 5, "loc": 0.0, "scale": NUMBER},
        {"loc": NUMBERS[1:]},
    ),
    "densities.radial_log_prob": (
        {"radius": NUMBERS, "df": 5.0, "loc": NUMBERS, "scale": 1.0},
        {"loc": NUMBERS[1:]},
    ),
    "densities.multivariate_student_t_log_prob": (
        {"value": VECTORS, "loc": VECTORS[0], "scale_diag": 1.0, "df": NUMBERS},
        {"loc": VECTORS[0, 1:]},
    ),
    "densities.gaussian_kl_divergence": (
        {**_posterior, "prior_scale": 2.0},
        {"prior_scale": VECTORS[1:]},
    ),
    "densities.power_spherical_log_prob": (
        {**_pair, "concentration": NUMBERS},
        {"concentration": NUMBERS[1:]},
    ),
    "densities.power_spherical_entropy": ({"concentration": NUMBERS, "dim": D}, {}),
    "likelihood.likelihood_scale": ({"posterior_scale": VECTORS}, {"posterior_scale": NUMBER}),
    "likelihood.log_likelihood_terms": (
        {
            "embedding": VECTORS,
            "latent": VECTORS,
            "likelihood": LIKELIHOOD,
            "scale_diag": VECTORS,
        },
        {"latent": VECTORS[1:]},
    ),
    "likelihood.embedding_log_prob": (
        {"embedding": VECTORS, "latent": VECTORS[0], "likelihood": LIKELIHOOD, "scale_diag": 0.5},
        {"latent": VECTORS[0, 1:]},
    ),
    "likelihood.checked_numbers": (
        {
            "likelihood": LIKELIHOOD,
            **dict.fromkeys(("df", "radial_df", "radial_scale"), NUMBERS),
        },
        {"df": 1.0},
    ),
    "objective.conditional_elbo": (
        {
            "key": KEY,
            "target_embedding": VECTORS,
            **_posterior,
            "likelihood": LIKELIHOOD,
            "kl_weight": NUMBERS,
            "prior_scale": VECTORS[0],
            "untied_scale": 0.5,
        },
        {"target_embedding": VECTORS[:1]},
    ),
    "objective.predictive_information": (
        {"directional_log_likelihood": NUMBERS, "log_mass": NUMBERS, "dim": D},
        {"log_mass": VECTORS},
    ),
    "objective.symmetric_elbo": (
        {
            "key": KEY,
            "view_1": VIEW,
            "view_2": VIEW,
            "likelihood": LIKELIHOOD,
            "untied_scale": (VECTORS, VECTORS),
            "num_samples": 2,
        },
        {"untied_scale": (VECTORS, VECTORS[1:])},
    ),
    "objective.importance_weighted_bound": (
        {
            "key": jax.random.split(KEY, B),
            "embedding": VECTORS,
            **_posterior,
            "likelihood": LIKELIHOOD,
            "num_samples": 2,
        },
        {"key": jax.random.split(KEY, B + 1)},
    ),
    "baselines.simsiam_loss": (_four, {"target_1": VECTORS[1:]}),
    "baselines.byol_loss": (_four, {"target_2": VECTORS[:, 1:]}),
    "baselines.vi_simsiam_loss": (
        {
            "direction_1": VECTORS,
            "concentration_1": NUMBERS,
            "direction_2": VECTORS,
            "concentration_2": NUMBERS,
            "target_1": VECTORS,
            "target_2": VECTORS,
        },
        {"concentration_2": VECTORS[:, :1]},
    ),
    "baselines.vicreg_loss": (
        {"embedding_1": VECTORS, "embedding_2": VECTORS},
        {"embedding_2": VECTORS[None]},
    ),
    "baselines.fastsiam_loss": (
        {"predictions": CROPS, "targets": CROPS[:2]},
        {"targets": CROPS[:2, 1:]},
    ),
    "baselines.emp_ssl_loss": ({"embeddings": CROPS}, {"embeddings": VECTORS}),
    "baselines.barlow_twins_loss": (
        {"embedding_1": VECTORS, "embedding_2": VECTORS},
        {"embedding_2": VECTORS[1:]},
    ),
    "scores.dtype_of": ({"values": NUMBERS}, {}),
    "scores.real_numbers": ({"name": "x", "values": VECTORS}, {}),
    "scores.never_certain": ({"score": NUMBERS}, {}),
    "scores.uncertainty_terms": (
        {"key": KEY, "views": VIEWS, "likelihood": ONE_FOR_ALL, "num_samples": 2},
        {},
    ),
    **{
        f"scores.{name}": ({"terms": TERMS}, {})
        for name in (
            "negative_log_likelihood_score",
            "directional_score",
            "radial_score",
            "negative_elbo_score",
            "importance_weighted_score",
            "kl_score",
            "posterior_entropy_score",
            "cross_view_score",
            "typicality_features",
        )
    },
    "scores.concentration_score": ({"concentration": NUMBERS}, {}),
    "distrax_faces.gaussian_posterior": (_posterior, {"posterior_scale": VECTORS[:, 1:]}),
    "distrax_faces.gaussian_prior": ({"dim": D, "prior_scale": NUMBERS}, {}),
}


def public_functions() -> dict[str, Any]:
    found = {}
    for module in pkgutil.iter_modules(paper.__path__):
        contents = vars(importlib.import_module(f"jevb_jax.paper.{module.name}"))
        for name, value in contents.items():
            is_own = getattr(value, "__module__", "").endswith(f".paper.{module.name}")
            if inspect.isfunction(value) and is_own and not name.startswith("_"):
                found[f"{module.name}.{name}"] = value
    return found


def checked(function: Any, arguments: dict[str, Any]) -> None:
    """Calls a function under the type checker, of traced arrays: nothing is compiled."""
    typed = jaxtyping.jaxtyped(typechecker=beartype.beartype)(function)
    arrays = {k: v for k, v in arguments.items() if is_made_of_arrays(v)}
    others = {k: v for k, v in arguments.items() if k not in arrays}
    arrays = jax.tree.map(jnp.asarray, arrays)

    def call(arrays: dict[str, Any]) -> None:
        typed(**others, **arrays)

    jax.eval_shape(call, arrays)


def is_made_of_arrays(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, (np.ndarray, jax.Array)) for leaf in leaves)


def test_every_public_function_is_called_here_and_names_its_shapes():
    functions = public_functions()
    # Of any number of arrays of any shapes: nothing to call with a wrong one.
    assert set(functions) - {"sphere.at_least_float32", "tracing.is_traced"} == set(CALLS)
    for name, function in functions.items():
        for argument, annotation in inspect.get_annotations(function).items():
            assert annotation is not jax.Array, f"{name}: {argument} is an array of no shape"


@pytest.mark.parametrize("name", CALLS)
def test_right_shapes_are_honored_and_a_wrong_one_is_refused(name):
    function, (arguments, wrong) = public_functions()[name], CALLS[name]
    checked(function, arguments)
    if wrong:
        with pytest.raises(jaxtyping.TypeCheckError):
            checked(function, {**arguments, **wrong})
