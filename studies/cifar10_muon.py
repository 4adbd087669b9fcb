"""JEVB's uncertainty when Muon trains it: with the default density, and with a tenth of the KL weight.

jevb-study studies/cifar10_muon.py --out=runs/cifar10_muon

With AdamW and a tenth of the KL weight, heavy tails collapse in every seed, and the Gaussian in most
(`docs/study.md`). With Muon, neither did in the short runs of `cifar10_densities`. The recipe is that of
`cifar10_uncertainty`, so its table holds the same with AdamW.
"""

import dataclasses
import math

from jevb_study.spec import Comparison, Study
from studies import cifar10_uncertainty


def get_study() -> Study:
    """Three densities, three seeds of each."""
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
        },
        # Only VI-SimSiam has a concentration.
        measures=tuple(one for one in base.measures if not one.label.startswith("k, ")),
        figures=(
            Comparison(
                "muon",
                "JEVB with Muon",
                ("default", "narrow", "gaussian_narrow"),
                ("20-NN accuracy", "effective rank", "own, near", "mixture, near"),
            ),
        ),
    )
