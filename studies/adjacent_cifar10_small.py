"""Adjacent detection on small color images: three draws of the classes that stay outside, two methods.

jevb-study studies/adjacent_cifar10_small.py --out=runs/adjacent_cifar10_small

Inside and outside images are of CIFAR-10 and differ by their class alone (`configs/adjacent.py`). The
recipe is that of `cifar10_small`. All scores are fitted without labels, except the one marked so. No
choice uses outside images.
"""

from typing import Any

from configs import adjacent
from jevb_study.spec import Comparison, Result, Study
from studies import cifar10_small
from studies.adjacent_digits import SCORES

METHODS = ("jevb", "simsiam")
DRAWS = range(3)


def run_config(method: str, draw: int) -> Any:
    """The recipe of `cifar10_small` on the classes of a draw; the others are outside."""
    config = cifar10_small.method_config(method)
    chosen: Any = adjacent.get_config(f"cifar10,{draw}")
    config.data.inlier_classes = chosen.data.inlier_classes
    config.ood = chosen.ood
    config.ood.default_score = ""
    config.evaluation.split = "test"
    return config


def get_study() -> Study:
    """Three runs of each method and their means."""
    runs = {f"{method}_{draw}": run_config(method, draw) for method in METHODS for draw in DRAWS}
    measures = [Result("linear accuracy", "linear_accuracy")]
    measures += [Result(label, "auroc_other_classes", score) for label, score in SCORES.items()]
    shown = ("representation Mahalanobis", "representation SSD", "max softmax, with labels")
    return Study(
        title="Adjacent classes of CIFAR-10 at 16 pixels, AUROC",
        runs=runs,
        seeds=(0,),
        measures=measures,
        figures=(Comparison("adjacent", "Adjacent classes of CIFAR-10", tuple(runs), shown),),
        averages={method: [f"{method}_{draw}" for draw in DRAWS] for method in METHODS},
    )
