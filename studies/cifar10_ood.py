"""Detection on CIFAR-10 with the same scores for JEVB, isotropic JEVB, VI-SimSiam and SimSiam.

jevb-study studies/cifar10_ood.py --out=runs/cifar10_ood --num_processes=2
python -m studies.detection_table runs/cifar10_ood/runs/*/seed_* --out=runs/cifar10_ood/detection

The recipe is that of `cifar10_small` with all 45,000 training images. Evaluation compares the test split
with the `.npz` files that `configs/ood.py` names. Human votes are read from `data/cifar10h.npz`.
"""

from typing import Any

from configs import ood
from jevb_study.spec import Comparison, Result, Study
from studies import cifar10_small

METHODS = ("jevb", "vi_simsiam", "simsiam")


def run_config(method: str, **changes: Any) -> Any:
    """The recipe for a method; `changes` are those of `cifar10_small.method_config`."""
    config = cifar10_small.method_config(method, **changes)
    config.data.num_train_examples = 0
    config.train.health_every_steps = 351
    config.evaluation.split = "test"
    section: Any = ood.get_config("cifar10_arrays")
    section.num_corrupted_images = 1000
    section.severities = (1, 3, 5)
    section.num_bootstrap = 50
    section.human_counts_path = "data/cifar10h.npz"
    config.ood = section
    return config


def get_study() -> Study:
    """Three methods and the isotropic ablation of JEVB."""
    runs = {method: run_config(method) for method in METHODS}
    runs["isotropic"] = run_config("jevb", model__isotropic=True)
    measures = [
        Result(f"{label}, {group}", f"auroc_{group}", f"{label}/mahalanobis")
        for label in ("embedding", "representation")
        for group in ("near", "far")
    ]
    return Study(
        title="Detection: CIFAR-10 at 16 pixels, 45,000 images, ResNet-8, 8 epochs, AUROC",
        runs=runs,
        seeds=(0,),
        measures=(
            Result("linear accuracy", "linear_accuracy"),
            Result("20-NN accuracy", "knn_20_accuracy"),
            *measures,
        ),
        figures=(
            Comparison(
                "detection",
                "Mahalanobis distance, AUROC",
                tuple(runs),
                tuple(measure.label for measure in measures),
            ),
        ),
    )
