"""Width of the likelihood relative to the prior: KL weight, prior scale, degrees of freedom.

jevb-study studies/cifar10_small_scale.py --out=runs/cifar10_scale --num_processes=2

Uses the recipe of `cifar10_small` to choose defaults. One seed can only show where to look further.
"""

import math
from typing import Any

from jevb_study.spec import Comparison, Curves, Study, Sweep
from studies.cifar10_small import ACCURACIES, MEASURES, method_config

# (weight of the KL, scale of the prior, degrees of freedom)
CELLS = (
    (1.0, 1.0, 5.0),
    (1.0, 2.0, 5.0),
    (0.1, 1.0, 5.0),
    (1.0, 4.0, 5.0),
    (0.3, 1.0, 5.0),
    (1.0, 2.0, math.inf),
    (0.3, 2.0, 5.0),
    (0.1, 1.0, math.inf),
    (1.0, 3.0, 5.0),
    (0.03, 1.0, 5.0),
    (0.03, 1.0, 127.0),
    (0.1, 2.0, 5.0),
)


def name(kl_weight: float, prior_scale: float, df: float) -> str:
    """Name of a run."""
    return f"kl_{kl_weight:g}_prior_{prior_scale:g}_df_{df:g}"


def config(kl_weight: float, prior_scale: float, df: float) -> Any:
    """Config of a run."""
    return method_config(
        "jevb",
        jevb__kl_weight=kl_weight,
        jevb__prior_scale=prior_scale,
        jevb__df=df,
    )


def get_study() -> Study:
    """All cells; sweeps over the prior scale and the KL weight."""
    runs = {name(*cell): config(*cell) for cell in CELLS}
    by_prior = {p: name(1.0, p, 5.0) for p in (1.0, 2.0, 3.0, 4.0)}
    by_weight = {w: name(w, 1.0, 5.0) for w in (0.03, 0.1, 0.3, 1.0)}
    panels = (*ACCURACIES, "effective rank", "effective pairs")
    keys = (
        "health/posterior_signal_to_noise",
        "health/pair_cosine",
        "health/pair_effective_pairs",
        "health/effective_rank",
    )
    return Study(
        title="Width of the likelihood: CIFAR-10, 10,000 images at 16 pixels, ResNet-8, 8 epochs",
        runs=runs,
        seeds=(0,),
        measures=MEASURES,
        figures=(
            Comparison("cells", "Every cell", tuple(runs), (*ACCURACIES, "effective rank")),
            Sweep("prior_scale", "Scale of the prior", "prior_scale", by_prior, panels),
            Sweep("kl_weight", "Weight of the KL", "kl_weight", by_weight, panels, log_x=True),
            Curves(
                "mechanism",
                "What the directional term sees",
                (
                    name(1.0, 1.0, 5.0),
                    name(1.0, 2.0, 5.0),
                    name(1.0, 4.0, 5.0),
                    name(0.1, 1.0, 5.0),
                ),
                keys,
            ),
        ),
    )
