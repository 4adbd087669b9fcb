"""Does a score tell held-out images from other held-out images? None may.

python -m studies.null_test --model=jevb-cifar10-resnet18 --out=docs/results/null_test

Every score of a model is fitted to some of its training images. Then validation images are the
inside, and test images are the outside. Both are new to the score and of the same kind, so the true
AUROC is 0.5, unless the score or its test is wrong. The last column shows what such a mistake looks
like: there, the images that the score was fitted to are the inside. A score may then learn nothing of
them (0.5) or recognize them (up to 1).

The encoder has seen the training images, too, so the last column also holds what the encoder
remembers of them.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jevb_jax import load
from jevb_jax.evaluation.detection_metrics import bootstrap_intervals, ood_metrics
from jevb_jax.evaluation.features import Features
from jevb_jax.evaluation.linear_probe import fit_linear_probe
from jevb_jax.evaluation.score_table import TrainingData, scores_of_run
from jevb_jax.evaluation.scoring import make_scorers, score_features
from jevb_jax.images.dataset import load_dataset
from jevb_jax.images.source import Subset, num_classes
from jevb_jax.model import Model
from jevb_jax.report import tables
from jevb_jax.runs import files

HEAD = ("score", "auroc", "low", "high", "auroc against fitted images")
_BATCH = 256
_PROBE_PENALTY = 1e-3  # any probe serves: no number of it is reported


def score_splits(model: Model, num_images: int) -> dict[str, dict[str, np.ndarray]]:
    """Every score of fitted, validation and test images, `[N]` by name, by the name of the split.

    Args:
      model: of a run whose data is labeled and can be loaded here.
      num_images: largest number of images of a split; they are drawn with seed 0.
    """
    dataset: Any = load_dataset(**vars(model.settings.data))
    entries = scores_of_run(model.settings, has_labels=True)
    # Only JEVB's scores read terms.
    views = "terms" if any(entry.views == "terms" for entry in entries.values()) else ""
    random = np.random.default_rng(0)
    features: dict[str, Features] = {}
    for name in ("train", "validation", "test"):
        source = getattr(dataset, name)
        rows = np.sort(random.permutation(len(source))[:num_images])
        features[name] = model.extractor(views)(model.variables, Subset(source, rows))
    train = features["train"]
    labels: Any = train.labels  # there are some, or `num_classes` raises
    probe = fit_linear_probe(
        train.representation,
        labels,
        num_classes=num_classes(dataset.train),
        l2_regularization=_PROBE_PENALTY,
    )
    scorers = make_scorers(entries, TrainingData(train, probe))
    return {
        name: score_features(values, scorers, batch_size=_BATCH)
        for name, values in features.items()
    }


def null_rows(scores: Mapping[str, Mapping[str, np.ndarray]]) -> list[tuple[str, ...]]:
    """A row for each score, with the columns of `HEAD`; intervals are 95%."""
    rows = []
    for name, inside in scores["validation"].items():
        outside = scores["test"][name]
        found = ood_metrics(inside, outside).auroc
        low, high = bootstrap_intervals(inside, outside, num_resamples=1, seed=0)
        fitted = ood_metrics(scores["train"][name], outside).auroc
        rows.append((name, *(f"{x:.4f}" for x in (found, low.auroc, high.auroc, fitted))))
    return sorted(rows)


def summary(rows: Sequence[Sequence[str]]) -> str:
    """How many intervals leave 0.5 out, beside the number that chance explains."""
    outside = [row[0] for row in rows if not float(row[2]) <= 0.5 <= float(row[3])]
    named = f" ({', '.join(outside)})" if outside else ""
    return (
        f"{len(outside)} of {len(rows)} intervals leave 0.5 out{named}. At 95% each, chance explains "
        f"about {0.05 * len(rows):.1f}; the scores are related, so they leave it together."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m studies.null_test", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--model", required=True, help="run, export or name of the package's weights"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the tables")
    parser.add_argument("--num_images", type=int, default=2500, help="of each split")
    options = parser.parse_args(arguments)
    rows = null_rows(score_splits(load(options.model), options.num_images))
    command = f"python -m studies.null_test --model={options.model} --out={options.out}"
    head = [f"validation against test: {HEAD[1]}", *HEAD[2:]]
    lines = [
        "# Null test",
        "",
        f"* command: `{command} --num_images={options.num_images}`",
        f"* jax: {jax.__version__}; device: {jax.devices()[0].device_kind}",
        "",
        summary(rows),
        "",
        *tables.markdown_table([HEAD[0], *head], [[f"`{name}`", *rest] for name, *rest in rows]),
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    files.write_text_atomically(options.out / "table.csv", tables.csv_table(HEAD, rows))
    files.write_text_atomically(options.out / "table.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
