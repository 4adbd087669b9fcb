"""Whether values are known, or stand for values of a program that JAX is tracing."""

from typing import Any

import jax
from jax.core import Tracer


def is_traced(*values: Any) -> bool:
    """Whether any array in these trees is traced, for example under `jax.jit`, `vmap` or `grad`.

    `jax.core.Tracer` is not part of JAX's public interface, but there is no other way to ask
    without fetching the array. If it moves, only this function must change.
    """
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))
