"""The effect of the start of residual blocks and of the optimizer (`docs/full_size.md`).

jevb-study studies/cifar10_small_start.py --out=runs/cifar10_start --num_processes=2

Uses the recipe of `cifar10_small` with its AdamW and with the SGD that `configs/cifar10.py` used
before. One seed.
"""

from typing import Any

from jevb_study.spec import Comparison, Study
from studies.cifar10_small import ACCURACIES, MEASURES, method_config

# (method, optimizer, its rate, weight decay)
RECIPES = (
    ("simsiam", "sgd", 0.06, 5e-4),
    ("jevb", "sgd", 0.06, 5e-4),
    ("jevb", "sgd", 0.5, 5e-4),
    ("jevb", "adamw", 2e-3, 1e-4),
)


def name(method: str, optimizer: str, rate: float, *, is_zero: bool) -> str:
    """Name of a run."""
    return f"{method}_{optimizer}_{rate:g}_from_{0 if is_zero else 1}"


def config(method: str, optimizer: str, rate: float, decay: float, *, is_zero: bool) -> Any:
    """Config of a run."""
    return method_config(
        method,
        model__zero_init_residual=is_zero,
        optimizer__name=optimizer,
        optimizer__learning_rate=rate,
        optimizer__weight_decay=decay,
    )


def get_study() -> Study:
    """Every recipe with blocks that start as their shortcuts (scale 0) and active (scale 1)."""
    cells = [(*recipe, is_zero) for recipe in RECIPES for is_zero in (True, False)]
    runs = {
        name(m, o, rate, is_zero=is_zero): config(m, o, rate, decay, is_zero=is_zero)
        for m, o, rate, decay, is_zero in cells
    }
    return Study(
        title="Start of residual blocks: CIFAR-10, 10,000 images at 16 pixels, ResNet-8, 8 epochs",
        runs=runs,
        seeds=(0,),
        measures=MEASURES,
        figures=(
            Comparison("start", "Blocks start with scale 0 or scale 1", tuple(runs), ACCURACIES),
        ),
    )
