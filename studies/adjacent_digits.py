"""Adjacent detection on digits: five draws of the classes that stay outside, and their mean AUROC.

jevb-study studies/adjacent_digits.py --out=runs/adjacent_digits --num_processes=2

Inside and outside images differ by their class alone (`configs/adjacent.py`). All scores are fitted
without labels, except the one marked so. No choice uses outside images.
"""

from typing import Any

from configs import adjacent
from jevb_study.spec import Comparison, Result, Study

SCORES = {
    "default score": "jevb/mixture_and_residual",
    "likelihood": "jevb/negative_log_likelihood",
    "embedding Mahalanobis": "embedding/mahalanobis",
    "representation Mahalanobis": "representation/mahalanobis",
    "representation SSD": "representation/ssd_1",
    "max softmax, with labels": "probe/max_softmax",
}


def get_study() -> Study:
    """Five runs and their mean."""
    runs: dict[str, Any] = {
        f"classes_{seed}": adjacent.get_config(f"digits,{seed}") for seed in range(5)
    }
    measures = [Result(label, "auroc_other_classes", score) for label, score in SCORES.items()]
    before = "representation SSD before training"
    measures.append(Result(before, "auroc_other_classes", "representation/ssd_1", "untrained"))
    return Study(
        title="Adjacent digits, AUROC",
        runs=runs,
        seeds=(0,),
        measures=measures,
        figures=(Comparison("adjacent", "Adjacent digits, AUROC", tuple(runs), tuple(SCORES)[:4]),),
        averages={"mean": tuple(runs)},
    )
