"""Which published numbers we reach, and how far our protocols can be trusted; parts of a page.

`studies.comparison` writes them to `docs/comparison.md`.
"""

import csv
import dataclasses
import textwrap
from collections.abc import Mapping, Sequence

from jevb_jax.report.tables import markdown_table
from studies.null_test import summary
from studies.published_numbers import RESULTS, Ours

_FULL = ("full_size/third_runs.csv", "jevb, test")
_FITTED = "auroc against fitted images"
_EVALUATION = "python evaluate.py --workdir=runs/full_size/runs/jevb/seed_0"

# What each protocol is compared with, in the tests. None shares code with ours.
REFERENCES = {
    "AUROC, AUPR and FPR95": "scikit-learn",
    "CSI": "the authors' formula, image by image, in float64, without the classifier of rotations",
    "Mahalanobis": "scikit-learn's `EmpiricalCovariance`, float64",
    "Mahalanobis of x / |x|^beta": "SciPy, float64; beta of 0 to 3, features of size 1e-8 to 1e8",
    "Mahalanobis to the nearest class": "NumPy, float64",
    "Mahalanobis++, with labels": "scikit-learn on unit features, float64",
    "Mahalanobis++, without labels": "scikit-learn on unit features, float64",
    "R-AUROC": "scikit-learn's `roc_auc_score`",
    "R@1, right or wrong": "a loop over images, float64",
    "SSD, as published": "the authors' functions, written again in float64",
    "crops are less certain": "a loop over images",
    "k-NN distance": "scikit-learn's `NearestNeighbors` on unit features, float64",
    "k-NN, equal votes, predicted classes": "scikit-learn's `KNeighborsClassifier`",
    "k-NN, equal votes, shares": "scikit-learn's `KNeighborsClassifier`",
    "k-NN, weighted votes, shares": "scikit-learn's `KNeighborsClassifier`, float64",
    "local dimension": "the double loop over points, float64",
    "loss prediction, ranking loss": "pair by pair, float64",
    "people's entropy, rank correlation": "SciPy",
    "relative Mahalanobis": "scikit-learn, float64",
}


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A published number with the number of ours that comes nearest in kind.

    Attributes:
      what: what is measured.
      published: the number to reach; larger is better.
      source: who reached it.
      ours: our best number of the kind.
      why: why it is reached or not, or what the comparison leaves open.
    """

    what: str
    published: float
    source: str
    ours: Ours
    why: str

    @property
    def is_reached(self) -> bool:
        """Whether our number is at least the published one."""
        return float(self.ours.value.split(" ")[0]) >= self.published


def _full(what: str, measure: str) -> Ours:
    return Ours(what, *_FULL, measure, "test; one seed", _EVALUATION)


_SHORT = "100 epochs; the longer runs need a GPU, and none has been at hand for them"
ANCHORS = (
    Anchor(
        "k-NN accuracy, 100 epochs",
        0.832,
        "SimCLR",
        _full("JEVB", "10-NN accuracy"),
        "45,000 of the 50,000 training images",
    ),
    Anchor(
        "linear accuracy, 100 epochs",
        0.856,
        "SimCLR",
        _full("JEVB", "linear accuracy"),
        "45,000 of the 50,000 training images",
    ),
    Anchor("k-NN accuracy, any length", 0.903, "SimCLR", _full("JEVB", "10-NN accuracy"), _SHORT),
    Anchor(
        "AUROC, near sets",
        0.906,
        "SSD",
        _full("JEVB, norm", "norm, near"),
        f"a smaller network and {_SHORT}; the published number is of CIFAR-100 alone",
    ),
    Anchor(
        "AUROC, far sets",
        0.976,
        "SSD",
        _full("JEVB, SSD", "SSD, far"),
        f"a smaller network and {_SHORT}; the published number is of textures alone",
    ),
    Anchor(
        "R-AUROC",
        0.739,
        "loss prediction, with labels",
        _full("JEVB, norm", "norm, R-AUROC"),
        "by the norm, without labels; the likelihood of one image is far behind (0.556)",
    ),
    Anchor(
        "crops are less certain",
        0.87,
        "loss prediction, with labels",
        _full("JEVB, likelihood", "likelihood, cropped images are less certain"),
        "by JEVB's likelihood, without labels; the best published share is 0.95",
    ),
    Anchor(
        "people's entropy",
        0.095,
        "best of 324 runs",
        _full("JEVB, norm", "norm, people's entropy"),
        "by the norm; over CIFAR-10H alone, and the published number is a mean over several sets",
    ),
)
_NOT_HELD = (
    "Three anchors have no number of ours beside them: one class of CIFAR-10 and adjacent classes were "
    "run only on small images, and CIFAR-10-C and CIFAR-10.1 can be read but are not at hand."
)


def _rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def anchor_lines(anchors: Sequence[Anchor] = ANCHORS) -> list[str]:
    """The section on anchors, as paragraphs and tables of Markdown."""
    rows = [
        [
            one.what,
            f"{one.published:.3f}, {one.source}",
            f"{one.ours.value}, {one.ours.what}",
            "yes" if one.is_reached else "no",
            one.why,
        ]
        for one in anchors
    ]
    reached = sum(one.is_reached for one in anchors)
    return [
        "## Which published numbers do we reach?",
        textwrap.fill(f"{reached} of {len(anchors)}. {_NOT_HELD}", 100),
        "\n".join(markdown_table(["measure", "published", "ours", "reached", "why"], rows)),
    ]


def difference_lines(
    rows: Sequence[Mapping[str, str]] | None = None,
    references: Mapping[str, str] = REFERENCES,
) -> list[str]:
    """The section on the differences from references, as paragraphs and tables of Markdown.

    Args:
      rows: of the table that the tests write; by default the committed one.
      references: what each protocol is compared with.

    Raises:
      ValueError: the table and the references name different protocols.
    """
    rows = _rows("protocols") if rows is None else rows
    names = [row["protocol"] for row in rows]
    if sorted(names) != sorted(references):
        raise ValueError(
            f"only one of the table of protocols and REFERENCES has {set(names) ^ set(references)}"
        )
    cells = [
        [row["protocol"], references[row["protocol"]], row["values"], row["largest difference"]]
        for row in rows
    ]
    text = (
        "The tests compute each protocol a second time, without our code. A difference is relative to "
        "the largest value of its comparison. Scores are float32, which has seven digits."
    )
    return [
        "## How far are the protocols from their references?",
        textwrap.fill(text, 100),
        "\n".join(markdown_table(["protocol", "reference", "values", "largest difference"], cells)),
        "    JEVB_JAX_TESTS=optimized pytest -n 0 tests/evaluation "
        "--differences=docs/results/protocols/table.csv",
    ]


def null_test_lines() -> list[str]:
    """The section on the null test, as paragraphs and tables of Markdown."""
    rows = _rows("null_test")
    text = (
        "Validation images are the inside, and test images the outside. Both are new to every score, so "
        "0.5 is right. The last column is a mistake made on purpose: the images that a score was fitted "
        "to are the inside. A detector tested like that reports up to the number there. "
        + summary([list(row.values()) for row in rows])
    )
    cells = [
        [f"`{row['score']}`", row["auroc"], f"{row['low']} to {row['high']}", row[_FITTED]]
        for row in rows
    ]
    head = ["score", "AUROC", "95% interval", "the mistake"]
    return [
        "## Null test: can a score tell held-out images from held-out images?",
        textwrap.fill(text, 100),
        "\n".join(markdown_table(head, cells)),
        "    python -m studies.null_test --model=jevb-cifar10-resnet18 --out=docs/results/null_test"
        "  # needs a download",
    ]
