"""The weight of the KL by the degrees of freedom, in the recipe of `cifar10_small`.

python -m jevb_jax.study --study=studies/cifar10_small_kl.py --out=runs/cifar10_kl --num_processes=2
"""

import math
from typing import Any

from jevb_jax.study import Comparison, Curves, Study, Sweep
from studies.cifar10_small import ACCURACIES, MEASURES, METHODS, method_config

KL_WEIGHTS = (0.03, 0.1, 0.3)
DFS = (5.0, 127.0, math.inf)
NEIGHBOURS = METHODS[1:]


def name(kl_weight: float, df: float) -> str:
    """Name of a run."""
    return f"kl_{kl_weight:g}_df_{df:g}"


def get_study() -> Study:
    """The grid, the chosen cell beside the neighbours, and what moves between the cells."""
    grid: dict[str, Any] = {
        name(kl_weight, df): method_config("jevb", jevb__kl_weight=kl_weight, jevb__df=df)
        for kl_weight in KL_WEIGHTS
        for df in DFS
    }
    bound = {name(1.0, 5.0): method_config("jevb")}
    neighbours = {method: method_config(method) for method in NEIGHBOURS}
    by_weight = {w: name(w, 5.0) for w in (*KL_WEIGHTS, 1.0)}
    return Study(
        title="Weight of the KL: CIFAR-10, 10,000 images at 16 pixels, ResNet-8, 8 epochs",
        runs={**bound, **grid, **neighbours},
        seeds=(0, 1, 2),
        measures=MEASURES,
        figures=(
            Comparison(
                "grid",
                "Weight of the KL and degrees of freedom, beside the neighbours",
                (*bound, *grid, *neighbours),
                (*ACCURACIES, "effective rank"),
            ),
            Sweep(
                "kl_weight",
                "Weight of the KL, df = 5",
                "weight of the KL",
                by_weight,
                (*ACCURACIES, "effective rank", "effective pairs"),
                log_x=True,
                references=("simsiam",),
            ),
            Curves(
                "mechanism",
                "What the directional term sees",
                tuple(by_weight.values()),
                (
                    "health/posterior_signal_to_noise",
                    "health/pair_cosine",
                    "health/pair_effective_pairs",
                    "health/effective_rank",
                ),
            ),
        ),
    )
