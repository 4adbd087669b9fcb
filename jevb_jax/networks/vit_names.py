"""Weights of a `ClassTokenViT` under timm's names, both ways.

The original names of DINOv2 are the same, but for those of the registers, which are read as well.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jevb_jax.networks.class_token_vit import resample_positions, square_side
from jevb_jax.runs.array_names import differences, flatten_names, unflatten_names

# The classifier, which our networks do not have, and a token of DINOv2's own training.
_NOT_OURS = re.compile(r"head\.(weight|bias)|mask_token")
_POSITIONS = "pos_embed"
_QKV = ("query", "key", "value")
_DENSE = {"attention_out": "attn.proj", "mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2"}
_NORMS = {"attention_norm": "norm1", "mlp_norm": "norm2"}
_SCALES = {"attention_scale": "ls1.gamma", "mlp_scale": "ls2.gamma"}
# What names that are left over tell about a file.
_HINTS = {
    r"fc_norm\..*": "fc_norm: a network with its norm behind the mean over patches; ours has it before",
    r"dist_token|head_dist\..*": "dist_token: a distilled DeiT, with a second class token",
    r"reg_token|register_tokens": 'registers: set model.backbone="dinov2_small_registers"',
    r"blocks\.\d+\.ls[12]\.gamma": "ls1, ls2: LayerScale, which the backbones dinov2_* have",
    r"(embeddings|encoder)\..*": "embeddings, encoder: names of the library transformers, not timm's",
    r"blocks\.\d+\.\d+\..*": "blocks.N.N: a checkpoint of DINOv2's own training, in chunks of blocks",
}


def is_class_token_vit(variables: Any) -> bool:
    """Whether these are the variables of a `ClassTokenViT`, or their shapes."""
    return "class_token" in variables["params"]


def to_timm(variables: Any) -> dict[str, np.ndarray]:
    """The arrays of a `ClassTokenViT` as timm keeps them.

    Args:
      variables: with `params` of the network.

    Returns:
      Arrays by timm's names: kernels `[out, in]`, that of the patches `[out, channels, size, size]`,
      tokens and positions with a leading axis of one.
    """
    params = jax.tree.map(np.asarray, variables["params"])
    found = {
        "patch_embed.proj.weight": params["patch_embedding"]["kernel"].transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": params["patch_embedding"]["bias"],
        "cls_token": params["class_token"][None, None],
        "norm.weight": params["final_norm"]["scale"],
        "norm.bias": params["final_norm"]["bias"],
    }
    positions = params["positions"].reshape(-1, params["positions"].shape[-1])
    if "registers" in params:
        found["reg_token"] = params["registers"][None]
    else:
        positions = np.concatenate([params["class_position"][None], positions])
    found[_POSITIONS] = positions[None]
    for index in range(_depth(params)):
        block, prefix = params[f"block{index + 1}"], f"blocks.{index}"
        qkv = [block[name] for name in _QKV]
        found[f"{prefix}.attn.qkv.weight"] = np.concatenate([one["kernel"].T for one in qkv])
        found[f"{prefix}.attn.qkv.bias"] = np.concatenate([one["bias"] for one in qkv])
        for ours, theirs in _DENSE.items():
            found[f"{prefix}.{theirs}.weight"] = block[ours]["kernel"].T
            found[f"{prefix}.{theirs}.bias"] = block[ours]["bias"]
        for ours, theirs in _NORMS.items():
            found[f"{prefix}.{theirs}.weight"] = block[ours]["scale"]
            found[f"{prefix}.{theirs}.bias"] = block[ours]["bias"]
        for ours, theirs in _SCALES.items():
            if ours in block:
                found[f"{prefix}.{theirs}"] = block[ours]
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def from_timm(arrays: Mapping[str, Any], wanted: Any) -> Any:
    """The variables of a `ClassTokenViT` from arrays with timm's or DINOv2's names.

    Positions of another square grid are resampled to the wanted one, as timm does it
    (`class_token_vit.resample_matrix`); all other arrays are taken as they are. A network with
    registers has no position of its class token: where the file has one, it is added to the token.

    Args:
      arrays: by name, as in a `state_dict`. The classifier (`head`) and `mask_token` are left out.
      wanted: variables of the backbone, or their shapes; all are float32.

    Returns:
      A tree as `wanted`, of float32 arrays.

    Raises:
      ValueError: an array is missing, left over, or of another shape; every one is named.
    """
    found = {
        name: np.asarray(array).astype(np.float32)
        for name, array in arrays.items()
        if not _NOT_OURS.fullmatch(name)
    }
    shapes = to_timm(jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), wanted))
    if "reg_token" in shapes:
        found = _with_timm_registers(found)
    problems = differences(_on_grid(found, wanted, shapes), shapes, where="weights")
    if problems:
        hints = {
            f"  {hint}"
            for name in found.keys() - shapes.keys()
            for pattern, hint in _HINTS.items()
            if re.fullmatch(pattern, name)
        }
        raise ValueError(
            "these are not the weights of this network with timm's names:\n"
            + "\n".join([*problems, *sorted(hints)])
        )
    return unflatten_names(flatten_names(_ours(_on_grid(found, wanted, shapes), wanted)), wanted)


def remark(arrays: Mapping[str, Any], wanted: Any) -> str:
    """What to tell about weights that were taken: from which grid positions were resampled.

    Args:
      arrays: by name, those that `from_torch` took.
      wanted: variables of the network, or their shapes.

    Returns:
      A sentence, or nothing.
    """
    if not is_class_token_vit(wanted):
        return ""
    rows, columns, _ = wanted["params"]["positions"].shape
    has_class = "registers" not in wanted["params"] or "register_tokens" in arrays
    side = square_side(np.shape(arrays[_POSITIONS])[1] - has_class)
    if side is None or side * side == rows * columns:
        return ""
    return (
        f"its positions are for {side}x{side} patches, and a view of this run has {rows}x{columns}, so "
        "they were resampled as timm does it"
    )


def _with_timm_registers(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of DINOv2's original code in the form that timm gives to a network with registers."""
    names = ("register_tokens", "cls_token", _POSITIONS)
    if any(name not in found for name in names) or found[_POSITIONS].ndim != 3:
        return dict(found)
    rest = {name: array for name, array in found.items() if name not in names}
    return rest | {
        "reg_token": found["register_tokens"],
        "cls_token": found["cls_token"] + found[_POSITIONS][:, :1],
        _POSITIONS: found[_POSITIONS][:, 1:],
    }


def _on_grid(
    found: Mapping[str, np.ndarray], wanted: Any, shapes: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The arrays with positions for the grid of the network, where they are of another square one."""
    given, shape = found.get(_POSITIONS), shapes[_POSITIONS].shape
    rows, columns, width = wanted["params"]["positions"].shape
    if given is None or given.shape == shape or given.shape != (1, *given.shape[1:2], width):
        return dict(found)
    num_first = shape[1] - rows * columns  # the position of the class token, or none
    side = square_side(given.shape[1] - num_first)
    if side is None:
        return dict(found)
    grid = given[0, num_first:].reshape(side, side, width)
    resampled = resample_positions(grid, rows, columns).reshape(1, -1, width)
    return {**found, _POSITIONS: np.concatenate([given[:, :num_first], resampled], axis=1)}


def _ours(found: Mapping[str, np.ndarray], wanted: Any) -> Any:
    """The variables of our network from arrays with timm's names that fit it."""
    params: dict[str, Any] = {
        "patch_embedding": {
            "kernel": found["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
            "bias": found["patch_embed.proj.bias"],
        },
        "class_token": found["cls_token"][0, 0],
        "final_norm": {"scale": found["norm.weight"], "bias": found["norm.bias"]},
    }
    positions = found[_POSITIONS][0]
    if "reg_token" in found:
        params["registers"] = found["reg_token"][0]
    else:
        params["class_position"], positions = positions[0], positions[1:]
    params["positions"] = positions.reshape(wanted["params"]["positions"].shape)
    for index in range(_depth(wanted["params"])):
        prefix = f"blocks.{index}"
        kernels = np.split(found[f"{prefix}.attn.qkv.weight"], 3)
        biases = np.split(found[f"{prefix}.attn.qkv.bias"], 3)
        block: dict[str, Any] = {
            name: {"kernel": kernel.T, "bias": bias}
            for name, kernel, bias in zip(_QKV, kernels, biases, strict=True)
        }
        for ours, theirs in _DENSE.items():
            weight, bias = (found[f"{prefix}.{theirs}.{leaf}"] for leaf in ("weight", "bias"))
            block[ours] = {"kernel": weight.T, "bias": bias}
        for ours, theirs in _NORMS.items():
            weight, bias = (found[f"{prefix}.{theirs}.{leaf}"] for leaf in ("weight", "bias"))
            block[ours] = {"scale": weight, "bias": bias}
        for ours, theirs in _SCALES.items():
            if f"{prefix}.{theirs}" in found:
                block[ours] = found[f"{prefix}.{theirs}"]
        params[f"block{index + 1}"] = block
    return jax.tree.map(np.ascontiguousarray, {"params": params})


def _depth(params: Any) -> int:
    return sum(name.startswith("block") for name in params)
