"""Stages of a backbone, by the names of its parameters: rates by depth, and frozen stages.

A stage is a stage of a ResNet or of the ConvNet, or a block of a vision transformer. What comes before
the first one (stem, patches, tokens, positions) is stage 0. The final LayerNorm is in no stage.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

_BEFORE = ("stem_", "patch_embedding", "class_", "positions", "registers")
_NUMBER = re.compile(r"(?:stage|block|conv|bn)(\d+)(?:_\w+)?")


def stage_of(path: Any) -> int | None:
    """The stage of a parameter or statistic.

    Args:
      path: as `jax.tree_util.tree_map_with_path` gives it; the backbone's are below `backbone`.

    Returns:
      Its number, 0 before the first stage; None for all that is in no stage of a backbone.
    """
    names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    if "backbone" not in names[:-1]:
        return None
    name = names[names.index("backbone") + 1]
    if name.startswith(_BEFORE):
        return 0
    found = _NUMBER.fullmatch(name)
    return None if found is None else int(found[1])


def scale_by_stage(*, layer_decay: float, frozen_stages: int) -> optax.GradientTransformation:
    """Multiplies the steps of stage `i` of `L` by `layer_decay**(L - i)`; zero for frozen stages.

    As the last part of an optimizer, it scales the whole step, weight decay too. All that is in no
    stage keeps its step.

    Args:
      layer_decay: 1 keeps all steps.
      frozen_stages: stages 0 to this one get no step; 0 freezes none, stage 0 neither.

    Returns:
      An Optax transformation without a state.
    """

    def update(updates: Any, params: Any = None) -> Any:
        del params
        leaves, structure = jax.tree.flatten_with_path(updates)
        stages = [stage_of(path) for path, _ in leaves]
        last = max((stage for stage in stages if stage is not None), default=0)

        def scaled(stage: int | None, leaf: jax.Array) -> jax.Array:
            if stage is None:
                return leaf
            if frozen_stages and stage <= frozen_stages:
                return jnp.zeros_like(leaf)
            return layer_decay ** (last - stage) * leaf

        return jax.tree.unflatten(
            structure,
            [scaled(stage, leaf) for stage, (_, leaf) in zip(stages, leaves, strict=True)],
        )

    return optax.stateless(update)


def keep_frozen(old: Any, new: Any, *, frozen_stages: int) -> Any:
    """The new statistics, with the old ones in frozen stages.

    Frozen BatchNorm does not update them, but an average over groups may round.

    Args:
      old: running statistics before a step.
      new: after it, the same tree.
      frozen_stages: as for `scale_by_stage`.

    Returns:
      The same tree.
    """
    if not frozen_stages:
        return new

    def kept(path: Any, before: jax.Array, after: jax.Array) -> jax.Array:
        stage = stage_of(path)
        return before if stage is not None and stage <= frozen_stages else after

    return jax.tree_util.tree_map_with_path(kept, old, new)
