"""JEVB's recipe with Muon, one change at a time: the recipe of `cifar10_small`, blocks start active.

jevb-study studies/cifar10_small_recipe.py --out=runs/cifar10_small_recipe --num_processes=2

First Muon's learning rate; then, at a rate of 0.01, what else `configs/cifar10.py` sets for full size:
optimizer, weight decay, batch size, warm-up, target network, crops, colors, projector, dimension and
density. SimSiam and EMP-SSL are beside it, with a few rates of their own. All runs see 10,000 images
for 8 epochs; choices are made on the validation split.

Muon's weight decay shrinks a kernel by `rate * decay` in a step, so its effect over a run is the sum of
that. A run here has 624 steps at a mean rate of 0.005; one at full size 17,500 at 0.001. So a decay acts
here a fifth as much as there.
"""

import math
from typing import Any

from jevb_study.spec import Comparison, Curves, Logged, Result, Study, Sweep
from studies import cifar10_small_views
from studies.changed_settings import accuracy_alone, changed

RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
OTHER_RATES = (2e-3, 5e-3, 1e-2)  # of SimSiam and EMP-SSL
BASE_RATE = 1e-2
BASE_DECAY = 1e-4
WEIGHT_DECAYS = (BASE_DECAY, 0.03, 0.1, 0.3, 1.0)
BOTH = (
    "jevb_0.02_decay_0.3"  # the rate at which kernels grow most, and a decay that keeps them small
)

_KNN = "validation/knn_10_uniform_accuracy"

# Groups of changes of JEVB's recipe; a figure of curves each. Names are those of the runs.
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    **{
        f"adamw_{rate:g}": {"optimizer__name": "adamw", "optimizer__learning_rate": rate}
        for rate in (2e-3, 5e-3, 1e-2)
    },
    **{
        f"sgd_{rate:g}": {
            "optimizer__name": "sgd",
            "optimizer__learning_rate": rate,
            "optimizer__weight_decay": 5e-4,
        }
        for rate in (0.5, 2.0)
    },
    **{
        f"lars_{rate:g}": {
            "optimizer__name": "lars",
            "optimizer__learning_rate": rate,
            "optimizer__trust_coefficient": 0.02,
        }
        for rate in (0.1, 0.3)
    },
}
_SCHEDULES: dict[str, dict[str, Any]] = {
    # The rate grows as the square root of the batch.
    "batch_64": {"train__batch_size": 64, "optimizer__learning_rate": 7e-3},
    "batch_256": {"train__batch_size": 256, "optimizer__learning_rate": 1.4e-2},
    "warmup_0": {"optimizer__warmup_epochs": 0.0},
    "warmup_2": {"optimizer__warmup_epochs": 2.0},
    "target_0.9": {"train__target_decay": 0.9},
}
_VIEWS: dict[str, dict[str, Any]] = {
    "crop_0.08": {"augmentation__crop_scale": (0.08, 1.0)},
    "crop_0.4": {"augmentation__crop_scale": (0.4, 1.0)},
    "gray_0.1": {"augmentation__grayscale_probability": 0.1},
    "half_jitter": {
        "augmentation__brightness": 0.2,
        "augmentation__contrast": 0.2,
        "augmentation__saturation": 0.2,
        "augmentation__hue": 0.05,
    },
}
_DENSITIES: dict[str, dict[str, Any]] = {
    # The run `jevb_narrow` of `full_size`.
    "narrow": {
        "jevb__df": math.inf,
        "jevb__kl_weight": 0.1,
        "jevb__prior_scale": 1.0,
        "jevb__normalized": True,
    },
}
_HEADS: dict[str, dict[str, Any]] = {
    "projector_2": {"model__projector_hidden_dims": (256, 256)},
    "projector_wide": {"model__projector_hidden_dims": (1024,)},
    "dim_64": {"model__embedding_dim": 64},
    "dim_256": {"model__embedding_dim": 256},
}


def run_config(method: str, **changes: Any) -> Any:
    """The recipe for a method, with Muon, and changes such as `train__batch_size=64`."""
    config = cifar10_small_views.run_config(method, share=1)
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = BASE_RATE
    config.optimizer.weight_decay = BASE_DECAY
    return changed(accuracy_alone(config), changes)


def rate_name(rate: float, method: str = "jevb") -> str:
    """Name of the run of a method with a rate of Muon."""
    return f"{method}_{rate:g}"


def decay_name(decay: float) -> str:
    """Name of the run with a weight decay."""
    return rate_name(BASE_RATE) if decay == BASE_DECAY else f"decay_{decay:g}"


def get_study() -> Study:
    """Every change, two seeds of each."""
    changes = _OPTIMIZERS | _SCHEDULES | _VIEWS | _HEADS | _DENSITIES
    runs: dict[str, Any] = {
        rate_name(rate, method): run_config(method, optimizer__learning_rate=rate)
        for method, rates in (("jevb", RATES), ("simsiam", OTHER_RATES), ("emp_ssl", OTHER_RATES))
        for rate in rates
    }
    runs |= {
        decay_name(decay): run_config("jevb", optimizer__weight_decay=decay)
        for decay in WEIGHT_DECAYS
        if decay != BASE_DECAY
    }
    runs[BOTH] = run_config("jevb", optimizer__learning_rate=2e-2, optimizer__weight_decay=0.3)
    runs |= {name: run_config("jevb", **change) for name, change in changes.items()}
    base = rate_name(BASE_RATE)
    simsiam, emp_ssl = rate_name(BASE_RATE, "simsiam"), rate_name(BASE_RATE, "emp_ssl")
    curves = {
        "optimizers": ("Optimizers", _OPTIMIZERS),
        "schedules": ("Batch size, warm-up and a target network", _SCHEDULES),
        "views": ("Crops and colors", _VIEWS),
        "heads": ("Projector, dimension and a narrow posterior", _HEADS | _DENSITIES),
    }
    accuracies = ("linear accuracy", "20-NN accuracy")
    measures = (*accuracies, "effective rank")
    return Study(
        title="JEVB's recipe: CIFAR-10, 10,000 images at 16 pixels, ResNet-8, 8 epochs, validation",
        runs=runs,
        seeds=(0, 1),
        measures=(
            Result("linear accuracy", "linear_accuracy"),
            Result("20-NN accuracy", "knn_20_accuracy"),
            Logged("10-NN accuracy", _KNN),
            Logged("effective rank", "health/effective_rank"),
            Logged("posterior scale", "health/posterior_scale_mean"),
        ),
        figures=(
            Sweep(
                "rate",
                "Muon's learning rate",
                "learning rate",
                {rate: rate_name(rate) for rate in RATES},
                measures,
                log_x=True,
                references=(simsiam, emp_ssl),
            ),
            Sweep(
                "weight_decay",
                "Muon's weight decay",
                "weight decay",
                {decay: decay_name(decay) for decay in WEIGHT_DECAYS},
                measures,
                log_x=True,
            ),
            Comparison("changes", "One change at a time", (base, BOTH, *changes), accuracies),
            Curves("rates", "Rates", tuple(map(rate_name, RATES)), (_KNN,), over_views=True),
            *(
                Curves(name, title, (base, simsiam, emp_ssl, *group), (_KNN,), over_views=True)
                for name, (title, group) in curves.items()
            ),
        ),
    )
