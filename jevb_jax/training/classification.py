"""The supervised step: cross-entropy of a linear classifier on a backbone, tuned with it or frozen."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jevb_jax.images import augmentations
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.training.plan import Measured
from jevb_jax.training.step import TrainState

_ACCURACY = "validation/accuracy"


class Tuned(NamedTuple):
    """What is learned: `params` of the state.

    Attributes:
      kernel: `[F, C]`, of the classifier on standardized representations.
      bias: `[C]`.
      backbone: parameters of the encoder, or None where it is frozen.
    """

    kernel: Array
    bias: Array
    backbone: Any


def initial_state(
    features: np.ndarray,
    *,
    num_classes: int,
    tuned_backbone: Mapping[str, Any] | None,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """The state before the first step: a classifier of zeros.

    Args:
      features: `[N, F]`, representations of the training images. Their mean and deviation standardize
        what the classifier sees, so that one learning rate suits every encoder. Both stay fixed, so
        that the classifier stays linear, and lie in `batch_stats` of the state.
      num_classes: C.
      tuned_backbone: `params` and `batch_stats` to start from, or None where the backbone is frozen.
      optimizer: as given to `train_step`.

    Returns:
      The state; `params` is `Tuned`.
    """
    std = features.std(axis=0)
    # Copies: a step reuses the memory of its state.
    backbone = jax.tree.map(jnp.copy, tuned_backbone or {"params": None, "batch_stats": {}})
    params = Tuned(
        kernel=jnp.zeros((features.shape[1], num_classes)),
        bias=jnp.zeros(num_classes),
        backbone=backbone["params"],
    )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats={
            "backbone": backbone["batch_stats"],
            "feature_mean": jnp.asarray(features.mean(axis=0)),
            "feature_std": jnp.where(std > 1e-6 * np.abs(features).max(), std, 1.0),
        },
        opt_state=optimizer.init(params),
        ema_params=None,
        target_params=None,
    )


def train_step(
    state: TrainState,
    batch: tuple[Array, Array],
    key: Array,
    *,
    network: nn.Module,
    frozen_backbone: Mapping[str, Any] | None,
    view: ViewAugmentation,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Array]]:
    """One step, a pure function.

    Args:
      state: before the step.
      batch: images `[batch, h, w, c]` uint8, gray or of the network's channels, and labels `[batch]`.
      key: the run's key; the step folds in its own number.
      network: the backbone.
      frozen_backbone: its variables, or None where the state has them.
      view: the random view that is seen of an image.
      optimizer: as in `initial_state`.

    Returns:
      The state after the step, `loss` and `gradient_norm`.
    """
    images, labels = batch
    keys = jax.random.split(jax.random.fold_in(key, state.step), len(images))
    images = jnp.broadcast_to(images, (*images.shape[:-1], len(view.mean)))
    views = augmentations.augment(keys, images, view)
    statistics = state.batch_stats

    def loss_fn(tuned: Tuned) -> tuple[Array, Any]:
        if frozen_backbone is not None:
            found: Any = network.apply(frozen_backbone, views, train=False)
            backbone_stats = statistics["backbone"]
        else:
            variables = {"params": tuned.backbone, "batch_stats": statistics["backbone"]}
            found, updates = network.apply(variables, views, train=True, mutable=["batch_stats"])
            backbone_stats = updates.get("batch_stats", {})
        found = (found - statistics["feature_mean"][None]) / statistics["feature_std"][None]
        logits = found @ tuned.kernel + tuned.bias[None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses), backbone_stats

    (loss, backbone_stats), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    stepped = state._replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats={**statistics, "backbone": backbone_stats},
        opt_state=opt_state,
    )
    return stepped, {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}


class BestEpoch:
    """Measures validation accuracy before the first step and after every epoch; knows the best.

    Attributes:
      accuracies: by step.
    """

    at_start = True
    status = ""

    def __init__(
        self, accuracy: Callable[[TrainState], float], *, steps_per_epoch: int, num_epochs: int
    ):
        """Takes the function that measures.

        Args:
          accuracy: of a state, on the validation split.
          steps_per_epoch: whole batches in the training images.
          num_epochs: length of the fine-tune, for the printed line.
        """
        self.every_steps = steps_per_epoch
        self.accuracies: dict[int, float] = {}
        self._accuracy = accuracy
        self._num_epochs = num_epochs

    @property
    def best_step(self) -> int:
        """The step of the highest accuracy; the earliest of several."""
        return min(self.accuracies, key=lambda step: (-self.accuracies[step], step))

    def resume(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes up the accuracies of the epochs before."""
        self.accuracies = {r["step"]: r[_ACCURACY] for r in records if _ACCURACY in r}

    def measure(self, state: TrainState, last: Mapping[str, float]) -> Measured:
        """See `plan.Measurement`; a state better than all before is to be saved."""
        step = int(state.step)
        accuracy = self.accuracies[step] = self._accuracy(state)
        line = (
            f"epoch {step // self.every_steps}/{self._num_epochs}  "
            f"loss {last.get('train/loss', math.nan):.4f}  validation accuracy {accuracy:.4f}"
        )
        return Measured({_ACCURACY: accuracy}, [line] if step else [], self.best_step == step)

    def score(self, state: TrainState) -> float:
        """The accuracy of a state that is better than all before it; no other may be chosen."""
        step = int(state.step)
        is_best = step in self.accuracies and self.best_step == step
        return self.accuracies[step] if is_best else -math.inf

    def closing_lines(self, step: int) -> Sequence[str]:
        """Nothing: results are printed once the test images were read."""
        del step
        return []
