"""JEVB on features of a frozen EfficientNet-Lite0: detection and accuracy, by two kinds of views.

python -m studies.wheel_features --weights=weights.npz --out=runs/wheel_features
jevb-study studies/frozen_features.py --out=runs/frozen_features

The first command writes the features (see its file). Training is that of `configs/features.py` as it
is, so nothing was chosen on outside sets. The evaluation is shortened for a CPU. Rows of the table:

* `noise`: views are made by noise and mask, of standardized features.
* `stored`: the two views are the image and a mirrored crop of it, with noise and mask as well.
"""

from typing import Any

from configs import features
from jevb_study.spec import Comparison, Result, Study

DIRECTORY = "runs/wheel_features"
GROUPS = {
    "cifar100": "near",
    "tiny_imagenet": "near",
    "mnist": "far",
    "fashion_mnist": "far",
    "textures": "far",
}
SCORES = {
    "default score": "jevb/mixture_and_residual",
    "likelihood": "jevb/negative_log_likelihood",
    "embedding Mahalanobis": "embedding/mahalanobis",
    "embedding SSD": "embedding/ssd_1",
    "representation Mahalanobis": "representation/mahalanobis",
    "representation 50-NN": "representation/knn_50",
    "representation SSD": "representation/ssd_1",
}


def run_config(suffix: str = "") -> Any:
    """`configs/features.py` on the files with the suffix, evaluated against the outside sets."""
    config: Any = features.get_config()
    config.data.train_paths = (f"{DIRECTORY}/train{suffix}.npz",)
    config.data.test_paths = (f"{DIRECTORY}/test{suffix}.npz",)
    config.evaluation.split = "test"
    config.evaluation.compare_untrained = False
    config.evaluation.labels_per_class = 0
    config.evaluation.l2_grid = (1e-4, 1e-3, 1e-2)
    config.ood.ssd_clusters = (1,)  # ten have fewer images each than there are features
    config.ood.name = "CIFAR-10 against plain test sets, features of EfficientNet-Lite0"
    config.ood.num_views = 1  # the plain image
    config.ood.outside = tuple(
        {
            "name": name,
            "group": group,
            "source": "features",
            "paths": (f"{DIRECTORY}/{name}{suffix}.npz",),
            "protocol": "1,000 images, drawn with seed 0 by studies/wheel_features.py",
        }
        for name, group in GROUPS.items()
    )
    return config


def get_study() -> Study:
    """Two kinds of views, three seeds each."""
    accuracies = [
        Result(f"{features} {label}", name, features)
        for features in ("representation", "embedding")
        for label, name in (("linear", "linear_accuracy"), ("20-NN", "knn_20_accuracy"))
    ]
    detection = [
        Result(f"{label}, {group}", f"auroc_{group}", score)
        for label, score in SCORES.items()
        for group in ("near", "far")
    ]
    compared = ("default score", "representation SSD")
    shown = [f"{label}, {group}" for group in ("near", "far") for label in compared]
    runs = {"noise": run_config(), "stored": run_config("_views")}
    return Study(
        title="Features of EfficientNet-Lite0: CIFAR-10, 6,000 images, AUROC and accuracy",
        runs=runs,
        seeds=(0, 1, 2),
        measures=(*accuracies, *detection),
        figures=(
            Comparison(
                "detection",
                "JEVB on features of a network from a wheel, AUROC",
                tuple(runs),
                shown,
            ),
        ),
    )
