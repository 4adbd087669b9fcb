"""How the posterior's scale depends on the radius of the embedding, inside and outside.

python -m studies.head_mechanism --runs RUN [RUN ...] --out=runs/head_mechanism

The published table is of the runs `direction` and `embedding` of `cifar10_uncertainty`. A head that
sees the embedding can give long embeddings another scale than short ones; a head that sees the
direction cannot, except where length and direction go together. For the test images and each
outside set, this study writes the rank correlation of radius and scale within the set, and the
medians of both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from jevb_jax import load
from studies import measured_runs, own_scores

FIELDS: tuple[str, ...] = (
    "run",
    "head_input",
    "set",
    "group",
    "rank_correlation",
    "radius",
    "scale",
)


def measure(directory: str) -> list[dict[str, Any]]:
    """A row for the test images and each outside set. A scale is the geometric mean over features."""
    model = load(directory)
    images, groups = own_scores.read_images(model, directory)
    rows = []
    for name in ("test", *groups):
        radius = np.linalg.norm(model.embed(images[name]), axis=1)
        scale = np.exp(np.log(model.posterior(images[name]).scale).mean(axis=1))
        correlation: Any = stats.spearmanr(radius, scale)
        rows.append(
            {
                "run": "/".join(Path(directory).parts[-2:]),
                "head_input": model.settings.model.head_input,
                "set": name,
                "group": groups.get(name, "inside"),
                "rank_correlation": float(correlation.statistic),
                "radius": float(np.median(radius)),
                "scale": float(np.median(scale)),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    measured_runs.write_table(
        measure, FIELDS, "head_mechanism.csv", about=__doc__, arguments=arguments
    )


if __name__ == "__main__":
    main()
