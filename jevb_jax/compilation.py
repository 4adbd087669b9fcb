"""Compiling what runs once."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from jax.core import Tracer

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# LLVM's passes are most of the time that a CPU takes to compile. Other platforms name their options
# otherwise, and keep their defaults.
_QUICK_ON_CPU: dict[str, bool | int] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def jit_once(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`jax.jit` for a program that runs once: on a CPU it is compiled fast and not to be fast.

    Args:
      function: of arrays; static values belong in its closure.

    Returns:
      The compiled function; inside another one, or under `jax.eval_shape`, it is `jax.jit`'s. Its
      numbers differ from those of `jax.jit` by rounding, as those of any two compilations may.
    """
    plain = jax.jit(function)
    quick = jax.jit(function, compiler_options=_QUICK_ON_CPU)

    def call(*args: Any, **kwargs: Any) -> Any:
        is_traced = any(isinstance(x, Tracer) for x in jax.tree.leaves((args, kwargs)))
        return (plain if is_traced or jax.default_backend() != "cpu" else quick)(*args, **kwargs)

    return call
