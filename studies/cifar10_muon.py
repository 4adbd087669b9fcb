"""JEVB's uncertainty when Muon trains it, beside SimSiam and VI-SimSiam with Muon.

jevb-study studies/cifar10_muon.py --out=runs/cifar10_muon

With AdamW and a tenth of the KL weight, heavy tails collapse in every seed, and the Gaussian in most
(`docs/study.md`). With Muon, neither did in the short runs of `cifar10_densities`. *Narrow* settings have
that tenth, a unit prior and mass one. The recipe is that of `cifar10_uncertainty`, so its table holds
the same with AdamW.
"""

import dataclasses
import math

from jevb_study.spec import Comparison, Result, Study
from studies import cifar10_uncertainty

# Feature scores that every method has, by the name of the column.
FEATURE_SCORES = {
    "representation": "representation/mahalanobis",
    "representation, SSD of 10": "representation/ssd_10",
    "embedding, SSD of 1": "embedding/ssd_1",
    "embedding, SSD of 10": "embedding/ssd_10",
}


def get_study() -> Study:
    """Three densities and two other methods, three seeds of each."""
    muon = {"optimizer__name": "muon"}
    narrow = {"jevb__prior_scale": 1.0, "jevb__kl_weight": 0.1, "jevb__normalized": True, **muon}
    base = cifar10_uncertainty.get_study()
    return dataclasses.replace(
        base,
        title="Muon: CIFAR-10 at 16 pixels, 20,000 images, ResNet-8, 8 epochs, AUROC",
        runs={
            "default": cifar10_uncertainty.run_config("jevb", **muon),
            "narrow": cifar10_uncertainty.run_config("jevb", **narrow),
            "gaussian_narrow": cifar10_uncertainty.run_config("jevb", jevb__df=math.inf, **narrow),
            "simsiam": cifar10_uncertainty.run_config("simsiam", **muon),
            "vi_simsiam": cifar10_uncertainty.run_config("vi_simsiam", **muon),
        },
        measures=(
            *base.measures,
            *(
                Result(f"{label}, {group}", f"auroc_{group}", score)
                for label, score in FEATURE_SCORES.items()
                for group in ("near", "far")
            ),
        ),
        figures=(
            Comparison(
                "muon",
                "Muon",
                ("default", "narrow", "gaussian_narrow", "simsiam", "vi_simsiam"),
                ("20-NN accuracy", "effective rank", "embedding, near", "embedding, far"),
            ),
        ),
    )
