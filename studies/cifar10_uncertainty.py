"""The quality of JEVB's uncertainty for several head inputs, tails, masses and KL weights.

jevb-study studies/cifar10_uncertainty.py --out=runs/cifar10_uncertainty

The recipe is that of `cifar10_ood` with 20,000 images (1,248 steps); residual blocks start active.
Detection is measured on the 10,000 test images against 1,000 images of each outside set. These sets are
the `.npz` files that `configs/ood.py` names. Human votes are read from `data/cifar10h.npz`.
"""

import math
from typing import Any

from jevb_study.spec import Comparison, Logged, Result, Study
from studies import cifar10_ood

# Scores of the table, by the name of the column.
SCORES = {
    "own": "jevb/mixture_and_residual",
    "mixture": "jevb/mixture",
    "residual": "jevb/residual_mahalanobis",
    "scales": "jevb/scale_mahalanobis",
    "likelihood": "jevb/directional",
    "views": "jevb/cross_view",
    "k": "vi_simsiam/concentration",
    "embedding": "embedding/mahalanobis",
    "embedding k-NN": "embedding/knn_50",
}


def run_config(method: str, **changes: Any) -> Any:
    """The recipe for a method; `changes` are those of `cifar10_small.method_config`."""
    head_input = "direction" if method == "jevb" else "embedding"
    config = cifar10_ood.run_config(method, **{"model__head_input": head_input, **changes})
    config.data.num_train_examples = 20_000
    config.model.zero_init_residual = False
    config.train.health_every_steps = 156
    config.ood.corruptions = ()
    config.ood.outside = tuple({**one, "num_examples": 1000} for one in config.ood.outside)
    config.ood.max_fit_images = 6000
    config.ood.num_views = 2
    config.ood.num_samples = 4
    config.ood.num_bootstrap = 20
    return config


def runs() -> dict[str, Any]:
    """Every run, by name."""
    unit_prior = {"jevb__prior_scale": 1.0}
    narrow = {**unit_prior, "jevb__kl_weight": 0.1}
    gaussian = {"jevb__df": math.inf}
    feature = {"jevb__tails": "feature", **unit_prior}
    normalized = {"jevb__normalized": True}
    return {
        "direction": run_config("jevb", model__head_input="direction"),
        "embedding": run_config("jevb", model__head_input="embedding"),
        "both": run_config("jevb", model__head_input="direction_and_radius"),
        "gaussian_narrow": run_config("jevb", **gaussian, **narrow),
        "gaussian_narrow_normalized": run_config("jevb", **gaussian, **narrow, **normalized),
        "feature": run_config("jevb", **feature),
        "feature_normalized": run_config("jevb", **feature, **normalized),
        "normalized_narrow": run_config("jevb", **narrow, **normalized),
        "simsiam": run_config("simsiam"),
        "vi_simsiam": run_config("vi_simsiam"),
        "vi_simsiam_direction": run_config("vi_simsiam", model__head_input="direction"),
    }


def get_study() -> Study:
    """The settings above, three seeds of each."""
    detection = [
        Result(f"{label}, {group}", f"auroc_{group}", score)
        for label, score in SCORES.items()
        for group in ("near", "far")
    ]
    names = tuple(runs())
    return Study(
        title="Uncertainty: CIFAR-10 at 16 pixels, 20,000 images, ResNet-8, 8 epochs, AUROC",
        runs=runs(),
        seeds=(0, 1, 2),
        measures=(
            Result("20-NN accuracy", "knn_20_accuracy"),
            Result("linear accuracy", "linear_accuracy"),
            Logged("effective rank", "health/effective_rank"),
            Logged("posterior scale", "health/posterior_scale_mean"),
            Logged("log mass, nats", "health/directional_log_mass"),
            Logged("predictive information, nats", "health/predictive_information"),
            *detection,
        ),
        figures=(
            Comparison(
                "detection",
                "JEVB's own score beside a Gaussian of the embedding, AUROC",
                names,
                ("own, near", "embedding, near", "own, far", "embedding, far"),
            ),
        ),
    )
