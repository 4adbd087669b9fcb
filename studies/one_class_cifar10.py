"""One-class detection on CIFAR-10: ten runs, each trained on one class, and their mean AUROC.

jevb-study studies/one_class_cifar10.py --out=runs/one_class_cifar10

Reads CIFAR-10 through TFDS and needs an accelerator. The version for a CPU is `one_class_digits.py`.
"""

from jevb_study.spec import Study
from studies import one_class_digits


def get_study() -> Study:
    """Ten runs and their mean."""
    return one_class_digits.get_study("cifar10")
