"""Weights of our networks under the names of PyTorch's libraries, both ways.

ResNets have torchvision's names; timm's `resnet18`, `resnet34` and `resnet50` have the same names and
are the same networks. `ClassTokenViT` has timm's names, see `vit_names`. `ViT` has no counterpart
there: it has no class token, and its positions are fixed.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jevb_jax.networks import vit_names
from jevb_jax.runs.array_names import differences, flatten_names, unflatten_names

# The classifier, which our networks do not have, and a counter that only matters without a momentum.
_NOT_OURS = re.compile(r"fc\.(weight|bias)|(.*\.)?num_batches_tracked")
_LEAVES = {
    "params.kernel": "weight",
    "params.scale": "weight",
    "params.bias": "bias",
    "batch_stats.mean": "running_mean",
    "batch_stats.var": "running_var",
}
_LAYERS = {
    "stem_conv": "conv1",
    "stem_bn": "bn1",
    "shortcut_conv": "downsample.0",
    "shortcut_bn": "downsample.1",
}
_BLOCK = re.compile(r"stage(\d+)_block(\d+)")


def torch_name(name: str) -> str:
    """Torchvision's name of an array of our ResNet.

    Args:
      name: ours, such as `params.stage1_block2.conv1.kernel`.

    Returns:
      Such as `layer1.1.conv1.weight`.
    """
    collection, *layers, leaf = name.split(".")
    blocks = [
        _BLOCK.sub(lambda match: f"layer{match[1]}.{int(match[2]) - 1}", layer) for layer in layers
    ]
    return ".".join(
        [_LAYERS.get(layer, layer) for layer in blocks] + [_LEAVES[f"{collection}.{leaf}"]]
    )


def to_torch(variables: Any) -> dict[str, np.ndarray]:
    """The arrays of a ResNet as torchvision keeps them, or those of a `ClassTokenViT` as timm does.

    Args:
      variables: `params` and `batch_stats` of a `networks.resnet.ResNet`, or `params` of a
        `ClassTokenViT`. Kernels of convolutions are `[height, width, in, out]`.

    Returns:
      Arrays by torchvision's or timm's names; kernels of convolutions are
      `[out, in, height, width]`.

    Raises:
      ValueError: these are the variables of another network.
    """
    if vit_names.is_class_token_vit(variables):
        return vit_names.to_timm(variables)
    _check_is_resnet(variables)
    flat = {name: np.asarray(leaf) for name, leaf in flatten_names(variables).items()}
    return {
        torch_name(name): np.ascontiguousarray(
            array.transpose(3, 2, 0, 1) if array.ndim == 4 else array
        )
        for name, array in flat.items()
    }


def from_torch(arrays: Mapping[str, Any], wanted: Any) -> Any:
    """The variables of our ResNet or `ClassTokenViT` from arrays with PyTorch's names.

    Args:
      arrays: by name, as in a `state_dict`. `fc` and `num_batches_tracked` are left out. For a
        `ClassTokenViT` see `vit_names.from_timm`.
      wanted: variables of the backbone, or their shapes; all are float32.

    Returns:
      A tree as `wanted`, of float32 arrays.

    Raises:
      ValueError: an array is missing, left over, or of another shape; every one is named.
    """
    if vit_names.is_class_token_vit(wanted):
        return vit_names.from_timm(arrays, wanted)
    _check_is_resnet(wanted)
    shapes = flatten_names(wanted)
    ours = {torch_name(name): name for name in shapes}
    found: dict[str, np.ndarray] = {}
    for theirs, array in arrays.items():
        if not _NOT_OURS.fullmatch(theirs):
            values = np.asarray(array).astype(np.float32)
            values = values.transpose(2, 3, 1, 0) if values.ndim == 4 else values
            found[ours.get(theirs, theirs)] = np.ascontiguousarray(values)
    problems = differences(found, shapes, where="weights")
    if problems:
        raise ValueError(
            "these are not the weights of this network with torchvision's names:\n"
            + "\n".join(problems)
        )
    return unflatten_names(found, wanted)


def _check_is_resnet(variables: Any) -> None:
    if "stem_conv" not in variables["params"]:
        raise ValueError(
            "only ResNets and the backbones timm_vit_* and dinov2_* have names in PyTorch's libraries, "
            f"got a network with the parts {sorted(variables['params'])}"
        )
