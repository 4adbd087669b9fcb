"""The allowed values of arguments of densities, and their checks.

A known value (outside of `jit`, `vmap` and `grad`) that is not allowed raises an error with its
name. A traced value cannot raise an error: it is replaced by NaN, so that no wrong result looks
plausible.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from jevb_jax.paper.tracing import is_traced

# Vectors normalized in bfloat16 are off by 0.004; vectors that nobody normalized are off by more.
_UNIT_TOLERANCE = 0.02
# In float32, terms with the square of 1 / df overflow below about 1e-16; no density needs less.
LEAST_DF = 1e-12


def _known(value: ArrayLike) -> np.ndarray | None:
    """The value as a NumPy array, or None if it is traced or lies on other hosts."""
    if is_traced(value):
        return None
    if not getattr(value, "is_fully_addressable", True):
        return None
    return np.asarray(value)


def _within(
    name: str, given: ArrayLike, cast: Array, meaning: str, is_valid: Callable[..., ArrayLike]
) -> Array:
    known = _known(given)
    if known is None:
        return jnp.where(is_valid(cast), cast, jnp.full_like(cast, jnp.nan))
    with np.errstate(over="ignore", invalid="ignore"):
        known = known.astype(cast.dtype)
        wrong = ~np.asarray(is_valid(known))
    if wrong.any():
        raise ValueError(
            f"{name} must be {meaning}, got {known[wrong].flat[0]}"
            + (f" ({wrong.sum()} of {wrong.size} values are not)" if wrong.size > 1 else "")
        )
    return cast


def positive(name: str, given: ArrayLike, cast: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Checks a scale: positive, finite, and at least the smallest normal number.

    Args:
      name: name of the argument in the error.
      given: the argument as the caller gave it.
      cast: the same as an array of a float type.

    Returns:
      `cast`; if it is traced, with NaN for values that are not allowed.

    Raises:
      ValueError: a known value is not positive and finite.
    """
    least, most = float(jnp.finfo(cast.dtype).tiny), float(jnp.finfo(cast.dtype).max)
    return _within(name, given, cast, "positive and finite", lambda x: (x >= least) & (x <= most))


def degrees_of_freedom(
    name: str, given: ArrayLike, cast: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Checks degrees of freedom: at least `LEAST_DF`, or `inf`. See `positive` for the rest."""
    meaning = f"positive, at least {LEAST_DF:g} (inf is the Gaussian)"
    # The number itself may be a little below itself in float32.
    return _within(name, given, cast, meaning, lambda x: x >= np.asarray(LEAST_DF, cast.dtype))


def concentration(
    name: str, given: ArrayLike, cast: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Checks a concentration: at least zero, finite. Arguments and errors as in `positive`."""
    most = float(jnp.finfo(cast.dtype).max)
    return _within(name, given, cast, "at least zero and finite", lambda x: (x >= 0) & (x <= most))


def radius(name: str, given: ArrayLike, cast: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Checks a radius: not negative; data, so NaN passes. Arguments and errors as in `positive`."""
    return _within(name, given, cast, "at least zero", lambda x: ~(x < 0))


def weight(name: str, given: ArrayLike) -> None:
    """Raises ValueError for a known weight that is negative or not finite."""
    if _known(given) is not None:
        concentration(name, given, jnp.zeros((), jnp.float32))


def unit_vectors(name: str, given: ArrayLike) -> None:
    """Checks known vectors: the norm is one, or zero for a vector without direction.

    Raises:
      ValueError: a norm differs by more than 0.02, or the value is not a vector.
    """
    known = _known(given)
    if known is None:
        return
    if known.ndim < 1:
        raise ValueError(f"{name} must be vectors [..., D], got the number {known}")
    if known.dtype.kind != "f" or known.dtype.itemsize < 4:
        known = known.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        norm = np.sqrt(np.einsum("...i,...i->...", known, known))
        wrong = (np.abs(norm - 1) > _UNIT_TOLERANCE) & (norm != 0)
    if wrong.any():
        raise ValueError(
            f"{name} must be unit vectors along the last axis, got one of norm "
            f"{norm[wrong].flat[0]:.4g} ({wrong.sum()} of {wrong.size} are not): normalize them, for "
            "example by polar_decomposition"
        )


def whole_number(name: str, value: ArrayLike, minimum: int) -> int:
    """Checks a count and returns it as a Python int.

    Integers of NumPy and JAX, and floats without a fraction, are accepted.

    Raises:
      ValueError: the value has a fraction, or is below `minimum`.
    """
    # Arrays of one whole number are counts too, unless they are traced.
    if isinstance(value, (np.ndarray, Array)) and not is_traced(value) and not value.ndim:
        value = value.item()
    is_number = isinstance(value, (int, float, np.integer, np.floating))
    if not is_number or not float(value).is_integer() or value < minimum:
        raise ValueError(f"{name} must be a whole number, at least {minimum}, got {value!r}")
    return int(value)


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError for a setting that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def sphere_of(dim: int, minimum: int, name: str) -> None:
    """Raises ValueError if a sphere is too small for a density, `dim < minimum`."""
    if dim < minimum:
        raise ValueError(
            f"{name} needs an embedding dimension D >= {minimum} (the last axis), got D = {dim}"
        )


def same_matrices(minimum_batch: int = 0, **values: Float[Array, "..."]) -> None:
    """Raises ValueError unless all arguments share one shape `[batch, D]`.

    Other shapes might broadcast silently.
    """
    shapes = [value.shape for value in values.values()]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][0] < minimum_batch:
        at_least = f" with batch >= {minimum_batch}" if minimum_batch else ""
        raise ValueError(
            f"{', '.join(values)} must share one shape [batch, D]{at_least}, "
            f"got {', '.join(map(str, shapes))}"
        )


def spread(
    name: str, value: Float[Array, "..."], shape: tuple[int, ...], meaning: str
) -> Float[Array, "..."]:
    """Broadcasts `value` to exactly `shape`, which it must not enlarge.

    Args:
      name: name of the argument in the error.
      value: the argument as an array.
      shape: the shape of the result.
      meaning: the allowed shapes in words, for the error.

    Raises:
      ValueError: the value does not broadcast to `shape`.
    """
    try:
        return jnp.broadcast_to(value, shape)
    except ValueError as error:
        raise ValueError(
            f"{name} must be {meaning}, to broadcast to {shape}, got shape {value.shape}"
        ) from error


def broadcast(
    vectors: dict[str, Float[Array, "..."]],
    numbers: dict[str, Float[Array, "..."]],
    scales: dict[str, Float[Array, "..."]] | None = None,
) -> tuple[Float[Array, "..."], ...]:
    """Broadcasts vectors, scales and numbers to one batch shape, and vectors and scales to one `D`.

    Args:
      vectors: by name, `[..., D]`.
      numbers: by name, `[...]`.
      scales: by name, `[..., D]`; or a number, or `[..., 1]`, for all features.

    Returns:
      The vectors and scales, `[..., D]`, then the numbers, `[...]`; each in the given order.

    Raises:
      ValueError: the shapes do not broadcast.
    """
    scales = {name: x if x.ndim else x[None] for name, x in (scales or {}).items()}
    shapes = ", ".join(f"{k} {v.shape}" for k, v in {**vectors, **scales, **numbers}.items())
    if any(x.ndim < 1 for x in vectors.values()):
        raise ValueError(f"expected vectors [..., D], got shapes {shapes}")
    width = next(iter(vectors.values())).shape[-1] if vectors else 1
    if any(x.shape[-1] != width for x in vectors.values()) or any(
        x.shape[-1] not in (1, width) for x in scales.values()
    ):
        raise ValueError(f"the last axis D must be the same for all vectors, got {shapes}")
    try:
        batch = jnp.broadcast_shapes(
            *(x.shape[:-1] for x in (*vectors.values(), *scales.values())),
            *(x.shape for x in numbers.values()),
        )
    except ValueError as error:
        raise ValueError(
            f"arguments must broadcast against one batch shape [...], got {shapes}"
        ) from error
    return (
        *(jnp.broadcast_to(x, (*batch, width)) for x in (*vectors.values(), *scales.values())),
        *(jnp.broadcast_to(x, batch) for x in numbers.values()),
    )
