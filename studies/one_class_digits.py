"""One-class detection on digits: ten runs, each trained on one digit, and their mean AUROC.

jevb-study studies/one_class_digits.py --out=runs/one_class_digits --num_processes=2

The scores are those of `configs/ood.py`, fitted without labels. No choice uses outside images.
"""

from typing import Any

from configs import one_class
from jevb_study.spec import Comparison, Result, Study

SCORES = {
    "scale": "jevb/scale_mahalanobis",
    "typicality": "jevb/typicality_mahalanobis",
    "negative ELBO": "jevb/negative_elbo",
    "-KL": "jevb/kl",
    "embedding k-NN": "embedding/knn_K",
    "embedding SSD": "embedding/ssd_1",
    "representation k-NN": "representation/knn_K",
    "representation Mahalanobis": "representation/mahalanobis",
}


def get_study(data_set: str = "digits") -> Study:
    """Ten runs of "digits" or "cifar10", and their mean."""
    runs: dict[str, Any] = {
        f"class_{c}": one_class.get_config(f"{data_set},{c}") for c in range(10)
    }
    k = runs["class_0"].ood.knn_k[0]

    def auroc(label: str, score: str, encoder: Any = "trained") -> Result:
        return Result(label, "auroc_other_classes", score.replace("K", str(k)), encoder)

    measures = [auroc(label, score) for label, score in SCORES.items()]
    measures.append(auroc("k-NN before training", "representation/knn_K", "untrained"))
    labels = tuple(measure.label for measure in measures[:4])
    return Study(
        title=f"One-class {data_set}, AUROC",
        runs=runs,
        seeds=(0,),
        measures=measures,
        figures=(Comparison("one_class", f"One-class {data_set}, AUROC", tuple(runs), labels),),
        averages={"mean": tuple(runs)},
    )
