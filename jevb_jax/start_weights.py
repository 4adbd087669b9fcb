"""The weights that a run starts from, if `init.workdir` names some."""

import logging
from typing import Any

import jax
from safetensors import SafetensorError
from safetensors import flax as safetensors

from jevb_jax import loading
from jevb_jax.networks import torch_names, vit_names
from jevb_jax.runs import files
from jevb_jax.runs.array_names import differences, flatten_names
from jevb_jax.training.experiment import Experiment
from jevb_jax.training.step import TrainState

_logger = logging.getLogger(__name__)


def start_variables(experiment: Experiment) -> dict[str, Any]:
    """Parameters and statistics of the encoder that `init.workdir` names.

    Args:
      experiment: with a run, an export or a file of weights in its section `init`.

    Returns:
      `params` and `batch_stats`; from a file with PyTorch's names, those of the backbone alone.

    Raises:
      FileNotFoundError: there is no such file, run or export.
      ValueError: they are those of another network; every difference is named.
    """
    settings = experiment.settings.init
    shapes = jax.eval_shape(experiment.initial_state)
    if settings.workdir.endswith(".safetensors"):
        return _start_backbone(settings.workdir, settings.step, shapes)
    loaded = loading.load(settings.workdir, None if settings.step < 0 else settings.step)
    wanted = {"params": shapes.params, "batch_stats": shapes.batch_stats}
    problems = differences(
        flatten_names(loaded.variables), flatten_names(wanted), where="init.workdir"
    )
    if problems:
        raise ValueError(
            f"init.workdir = {settings.workdir} holds another network:\n"
            + "\n".join(problems)
            + "\nGive the method and the section model of that run, or leave init.workdir empty."
        )
    return loaded.variables


def _start_backbone(file: str, step: int, shapes: TrainState) -> dict[str, Any]:
    """The backbone of a file with names of PyTorch's libraries; see `networks.torch_names`."""
    if step >= 0:
        raise ValueError(f"init.step = {step}, but {file} has no steps: leave init.step at -1")
    wanted = {
        "params": shapes.params["backbone"],
        "batch_stats": shapes.batch_stats.get("backbone", {}),
    }
    try:
        arrays = safetensors.load(files.to_path(file).read_bytes())
        backbone = torch_names.from_torch(arrays, wanted)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"init.workdir = {file}: {error}") from error
    if remark := vit_names.remark(arrays, wanted):
        _logger.warning("init.workdir = %s: %s", file, remark)
    # A network without BatchNorm has no entry among the statistics.
    return {part: {"backbone": one} if one else {} for part, one in backbone.items()}
