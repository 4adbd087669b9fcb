"""Whether values are known, or stand for those of a program that JAX is tracing."""

from typing import Any

import jax
from jax.core import Tracer


def is_traced(*values: Any) -> bool:
    """Whether an array in these trees is traced: under `jax.jit`, `jax.vmap`, `jax.grad` and the like.

    JAX keeps `Tracer` in `jax.core`, outside of its promises, and has no other way to ask without
    fetching the array. This is the one place to change when it moves.

    Args:
      *values: trees of anything.

    Returns:
      True where one is.
    """
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))
