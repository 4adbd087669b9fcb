"""Trees of arrays as flat mappings of names to arrays, compared strictly."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def flatten_names(tree: Any) -> dict[str, Any]:
    """Names every leaf of a pytree by its path, `params.backbone.Conv_0.kernel`.

    Args:
      tree: any pytree.

    Returns:
      Leaves by name, in the order of the tree.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def unflatten_names(flat: Mapping[str, Any], template: Any) -> Any:
    """The inverse of `flatten_names`.

    Args:
      flat: leaves by name, exactly those of the template (see `differences`).
      template: a tree of the wanted structure.

    Returns:
      The tree.
    """
    return jax.tree.unflatten(
        jax.tree.structure(template), [flat[name] for name in flatten_names(template)]
    )


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], *, where: str) -> list[str]:
    """Every missing, extra and differently shaped array, in words.

    Args:
      saved: anything with shape and dtype, by name.
      wanted: the names, shapes and types that were expected.
      where: what to call the place where `saved` is from.

    Returns:
      One line each; none if the two agree.
    """
    problems = [f"  missing from the {where}: {name}" for name in wanted if name not in saved]
    problems += [f"  only in the {where}: {name}" for name in saved if name not in wanted]
    for name in wanted:
        if name in saved:
            got = tuple(saved[name].shape), jnp.dtype(saved[name].dtype)
            expected = tuple(wanted[name].shape), jnp.dtype(wanted[name].dtype)
            if got != expected:
                problems.append(f"  {name}: {where} has {got}, the model wants {expected}")
    return problems
