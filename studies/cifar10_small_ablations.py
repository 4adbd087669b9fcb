"""Ablations of JEVB with the unit prior: one change at a time in the recipe of `cifar10_small`.

jevb-study studies/cifar10_small_ablations.py --out=runs/ablations --num_processes=2
"""

import math
from typing import Any

from jevb_study.spec import Comparison, Curves, Study, Sweep
from studies.cifar10_small import ACCURACIES, MEASURES, method_config

DFS = (1.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1e3, 1e4, math.inf)
ABLATIONS: dict[str, dict[str, Any]] = {
    "jevb": {},
    "kl_0.1": {"jevb__kl_weight": 0.1},
    "location_mean": {"jevb__location": "mean"},
    "fixed": {"jevb__likelihood_scale": "fixed"},
    "unit": {"jevb__scale_units": "unit"},
    "prior_2": {"jevb__prior_scale": 2.0},
    "initial_0.3": {"model__initial_scale": 0.3},
    "unfactorised": {"jevb__likelihood": "unfactorised", "jevb__scale_units": "unit"},
    "untied": {"jevb__likelihood_scale": "untied"},
    "isotropic": {"model__isotropic": True},
    "radial_off": {"jevb__radial_weight": 0.0},
    "stereographic": {"jevb__coordinates": "stereographic"},
    "kl_0.01": {"jevb__kl_weight": 0.01},
    "samples_4": {"jevb__num_samples": 4},
    "prior_0.5": {"jevb__prior_scale": 0.5},
    "radial_linear": {"jevb__space": "linear"},
    "kl_0": {"jevb__kl_weight": 0.0},
    "samples_16": {"jevb__num_samples": 16},
}


def get_study() -> Study:
    """Every ablation, and the degrees of freedom."""
    names = {df: "jevb" if df == 5.0 else f"df_{df:g}" for df in DFS}
    changes = {names[df]: {"jevb__df": df} for df in DFS if df != 5.0} | ABLATIONS
    runs = {
        name: method_config("jevb", **({"jevb__prior_scale": 1.0} | changes[name]))
        for name in (*ABLATIONS, *names.values())
    }
    return Study(
        title="Ablations: CIFAR-10, 10,000 images at 16 pixels, ResNet-8, 8 epochs",
        runs=runs,
        seeds=(0,),
        measures=MEASURES,
        figures=(
            Comparison(
                "ablations",
                "One change at a time from JEVB with the unit prior",
                tuple(ABLATIONS),
                (*ACCURACIES, "effective rank"),
            ),
            Sweep(
                "df",
                "Degrees of freedom with the unit prior",
                "df",
                names,
                (*ACCURACIES, "effective rank", "effective pairs"),
                log_x=True,
            ),
            Curves(
                "mechanism",
                "What the directional term sees",
                ("jevb", "location_mean", "kl_0.01", "unit", "fixed"),
                (
                    "health/posterior_signal_to_noise",
                    "health/pair_residual_over_df",
                    "health/pair_effective_pairs",
                ),
                log_y=True,
            ),
        ),
    )
