"""Densities of mass one: tails, coordinates, degrees of freedom, prior and weight of the KL.

jevb-study studies/cifar10_densities.py --out=runs/cifar10_densities

The older sweeps compare sub-densities, whose masses differ by tens of nats (docs eq. 31). Here every
density has mass one, because it is divided by its mass or uses stereographic coordinates. The recipe is
that of `cifar10_uncertainty` with three of its eight epochs (468 steps). Accuracies are on validation.

At full size, Muon prevented a collapse that AdamW did not (`docs/full_size.md`). The last runs ask if
it also does so here, at a low weight of the KL.
"""

import math
from typing import Any

from jevb_study.spec import Comparison, Logged, Result, Study
from studies import cifar10_uncertainty

SETTINGS: dict[str, dict[str, Any]] = {
    "df 5": {},
    "df 5, prior 2": {"prior_scale": 2.0},
    "df 127": {"df": 127.0},
    "Gaussian": {"df": math.inf},
    "Gaussian, prior 2": {"df": math.inf, "prior_scale": 2.0},
    "Gaussian, KL 0.3": {"df": math.inf, "kl_weight": 0.3},
    "Gaussian, KL 0.1": {"df": math.inf, "kl_weight": 0.1},
    "df 127, KL 0.1": {"df": 127.0, "kl_weight": 0.1},
    "df 5, KL 0.1": {"kl_weight": 0.1},
    "feature-wise df 5": {"tails": "feature"},
    "feature-wise df 5, KL 0.1": {"tails": "feature", "kl_weight": 0.1},
    "stereographic df 5": {"coordinates": "stereographic"},
    "stereographic df 5, KL 0.1": {"coordinates": "stereographic", "kl_weight": 0.1},
    "sub-density df 5, prior 2": {"prior_scale": 2.0, "normalized": False},
    "Muon, df 5": {"optimizer__name": "muon"},
    "Muon, Gaussian": {"optimizer__name": "muon", "df": math.inf},
    "Muon, df 5, KL 0.1": {"optimizer__name": "muon", "kl_weight": 0.1},
    "Muon, Gaussian, KL 0.1": {"optimizer__name": "muon", "df": math.inf, "kl_weight": 0.1},
}


def run_config(settings: dict[str, Any]) -> Any:
    """The recipe with a density of mass one and a unit prior, unless the settings change these.

    Args:
      settings: settings of the section `jevb`, or of another as `optimizer__name`.
    """
    is_stereographic = settings.get("coordinates") == "stereographic"
    settings = {"prior_scale": 1.0, "normalized": not is_stereographic} | settings
    changes = {name if "__" in name else f"jevb__{name}": value for name, value in settings.items()}
    config = cifar10_uncertainty.run_config("jevb", **changes)
    config.train.num_epochs = 3
    config.train.health_every_steps = 78
    config.evaluation.split = "validation"
    config.ood.outside = ()
    return config


def get_study() -> Study:
    """Every setting, one seed."""
    names = {name.replace(",", "").replace(" ", "_"): name for name in SETTINGS}
    return Study(
        title="Densities of mass one: CIFAR-10 at 16 pixels, 20,000 images, ResNet-8, 3 epochs",
        runs={key: run_config(SETTINGS[name]) for key, name in names.items()},
        seeds=(0,),
        measures=(
            Result("20-NN accuracy", "knn_20_accuracy"),
            Result("linear accuracy", "linear_accuracy"),
            Logged("effective rank", "health/effective_rank"),
            Logged("embedding std", "health/embedding_std"),
            Logged("posterior scale", "health/posterior_scale_mean"),
            Logged("KL per dimension, nats", "health/posterior_kl_per_dimension"),
            Logged("log mass, nats", "health/directional_log_mass"),
            Logged("predictive information, nats", "health/predictive_information"),
        ),
        figures=(
            Comparison(
                "densities",
                "Densities of mass one",
                tuple(names),
                ("20-NN accuracy", "linear accuracy", "effective rank", "posterior scale"),
            ),
        ),
    )
