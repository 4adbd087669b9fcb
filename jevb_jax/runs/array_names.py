"""Trees of arrays as flat mappings from names to arrays, and their strict comparison."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def flatten_names(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree by name, for example `params.backbone.Conv_0.kernel`, in its order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def unflatten_names(flat: Mapping[str, Any], template: Any) -> Any:
    """Builds a pytree from leaves by name, the inverse of `flatten_names`.

    Args:
      flat: exactly the leaves of the template, by name.
      template: a tree with the wanted structure.
    """
    return jax.tree.unflatten(
        jax.tree.structure(template), [flat[name] for name in flatten_names(template)]
    )


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], *, where: str) -> list[str]:
    """One line for every array that is missing, extra, or of another shape or type.

    Args:
      saved: objects with shape and dtype, by name.
      wanted: the expected objects with shape and dtype, by name.
      where: name of the place that `saved` comes from, in messages.
    """
    problems = [f"  missing from the {where}: {name}" for name in wanted if name not in saved]
    problems += [f"  only in the {where}: {name}" for name in saved if name not in wanted]
    for name in wanted:
        if name in saved:
            got = tuple(saved[name].shape), jnp.dtype(saved[name].dtype)
            expected = tuple(wanted[name].shape), jnp.dtype(wanted[name].dtype)
            if got != expected:
                problems.append(f"  {name}: {where} has {got}, the model needs {expected}")
    return problems
