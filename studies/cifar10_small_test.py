"""Evaluates the methods of `cifar10_small` on the test split, after all choices are made.

jevb-study studies/cifar10_small_test.py --out=runs/cifar10_test --num_processes=2

If `--out` holds copies of finished run directories of `cifar10_small`, they are evaluated again and not
trained again.
"""

from typing import Any

from jevb_study.spec import Comparison, Study
from studies.cifar10_small import ACCURACIES, MEASURES, METHODS, method_config


def get_study() -> Study:
    """Every method with its chosen settings, and JEVB with the unit prior."""
    runs: dict[str, Any] = {method: method_config(method) for method in METHODS}
    runs["prior_1"] = method_config("jevb", jevb__prior_scale=1.0)
    for config in runs.values():
        config.evaluation.split = "test"
    return Study(
        title="Test split: CIFAR-10, 10,000 images at 16 pixels, ResNet-8, 8 epochs",
        runs=runs,
        seeds=(0, 1, 2),
        measures=MEASURES[:4],
        figures=(
            Comparison("methods", "Test split", tuple(runs), (*ACCURACIES, "effective rank")),
        ),
    )
