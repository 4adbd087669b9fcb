"""What the uncertainty is worth: what the head sees, the tails, the weight of the KL. Three seeds.

python -m jevb_jax.study --study=studies/cifar10_uncertainty.py --out=runs/cifar10_uncertainty

The recipe of `cifar10_ood` on 20,000 images, with residual blocks open.
"""

import math
from typing import Any

from studies import cifar10_ood

NARROW = {"jevb__kl_weight": 0.1, "jevb__prior_scale": 1.0}
GAUSSIAN = {"jevb__df": math.inf}


def run_config(method: str, **changes: Any) -> Any:
    """The recipe for a method, with changes as `cifar10_small.method_config` takes them."""
    config = cifar10_ood.run_config(method, **changes)
    config.data.num_train_examples = 20_000
    config.model.zero_init_residual = False
    config.train.health_every_steps = 156
    config.ood.corruptions = ()
    return config


def runs() -> dict[str, Any]:
    """Every run, by name."""
    unit_prior = {"jevb__prior_scale": 1.0}
    feature = {"jevb__tails": "feature", **unit_prior}
    normalized = {"jevb__normalized": True}
    return {
        "direction": run_config("jevb", model__head_input="direction"),
        "embedding": run_config("jevb", model__head_input="embedding"),
        "both": run_config("jevb", model__head_input="direction_and_radius"),
        "gaussian_narrow": run_config("jevb", **GAUSSIAN, **NARROW),
        "gaussian_narrow_normalized": run_config("jevb", **GAUSSIAN, **NARROW, **normalized),
        "feature": run_config("jevb", **feature),
        "feature_normalized": run_config("jevb", **feature, **normalized),
        "feature_normalized_narrow": run_config(
            "jevb", **feature, **normalized, jevb__kl_weight=0.1
        ),
        "normalized_narrow": run_config("jevb", **NARROW, **normalized),
        "simsiam": run_config("simsiam"),
        "vi_simsiam": run_config("vi_simsiam"),
        "vi_simsiam_direction": run_config("vi_simsiam", model__head_input="direction"),
    }
