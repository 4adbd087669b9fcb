"""Images a second of every out-of-distribution score, beside the encoder's forward pass.

python -m benchmarks.ood_scores --out=runs/benchmark_ood
python -m benchmarks.ood_scores --out=runs/benchmark_ood --image_size=32 --width=64 --backbone=resnet18

Random weights and random images: time does not depend on them. The encoder and the scores take turns
in one process, and each score's time is given as a ratio to the encoder's in the same round: 0.1 means
that scoring a batch takes a tenth of the time of its forward pass. Writes `ood_scores.json` and
`ood_scores.md`.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs import default
from jevb_jax.evaluation import detection, features, linear_probe, score_table, scoring
from jevb_jax.evaluation.score_table import ScoreSettings, TrainingData
from jevb_jax.images import augmentations
from jevb_jax.images.source import ArraySource
from jevb_jax.runs import files
from jevb_jax.training import experiment
from jevb_jax.training.experiment import Experiment


def _experiment(arguments: argparse.Namespace) -> Experiment:
    config: Any = default.get_config()
    config.data.source = "shapes"
    config.data.num_train_examples = arguments.num_fit_images
    config.data.num_test_examples = 100
    config.augmentation.image_size = arguments.image_size
    config.model.backbone = arguments.backbone
    config.model.width = arguments.width
    config.model.projector_hidden_dims = (256,)
    config.model.embedding_dim = 128
    config.model.head_hidden_dim = 128
    config.train.batch_size = 128
    return experiment.build_experiment(config)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=10_000)
    parser.add_argument("--num_fit_images", type=int, default=10_000)
    parser.add_argument("--batch_size", type=int, default=500)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--num_rounds", type=int, default=5)
    arguments = parser.parse_args()

    made = _experiment(arguments)
    variables = made.initial_state().evaluation_variables
    view: Any = made.view_augmentations[0]
    keywords: Any = {"view": view, "batch_size": arguments.batch_size}
    plain = features.FeatureExtractor(made.model, **keywords)
    terms = detection.terms_settings(made)
    with_terms = features.FeatureExtractor(made.model, **keywords, terms=terms)

    train = with_terms(variables, made.dataset.train)
    labels: Any = made.dataset.train.labels
    probe = linear_probe.fit_linear_probe(
        train.representation, labels, num_classes=int(labels.max()) + 1, l2_regularization=1e-2
    )
    table = score_table.score_table(
        "jevb",
        ScoreSettings(knn_k=(50,), ssd_clusters=(1, 10), residual_share=0.5, mixture_df=5.0),
        num_views=made.config["ood"]["num_views"],
    )
    scorers = scoring.make_scorers(table, TrainingData(train, probe))
    pixels = np.random.default_rng(0).integers(
        0, 256, (arguments.batch_size, arguments.image_size, arguments.image_size, 3), np.uint8
    )
    source = ArraySource(pixels)
    batch, _ = next(iter(with_terms.stream(variables, source)))
    score = jax.jit(lambda fitted, batch: fitted(batch))
    calls: dict[str, Callable[[], Any]] = {
        "encoder": lambda: next(iter(plain.stream(variables, source)))[0],
        "encoder and jevb's terms": lambda: next(iter(with_terms.stream(variables, source)))[0],
        "one augmented view": lambda: augmentations.augment(
            jax.random.split(jax.random.key(0), len(pixels)), pixels, view
        ),
        **{
            name: (lambda fitted=fitted: score(fitted, batch))
            for name, fitted in scorers.scores.items()
        },
    }
    for call in calls.values():  # compiles
        jax.block_until_ready(call())
    rounds = [
        {name: _seconds(call) for name, call in calls.items()} for _ in range(arguments.num_rounds)
    ]
    rows = [
        {
            "name": name,
            "images_per_second": arguments.batch_size
            / statistics.median(one[name] for one in rounds),
            "ratio_to_encoder": statistics.median(one[name] / one["encoder"] for one in rounds),
        }
        for name in calls
    ]
    images = ArraySource(np.resize(pixels, (arguments.num_images, *pixels.shape[1:])))
    start = time.perf_counter()
    scoring.score_images(with_terms, variables, images, scorers)
    one_pass = time.perf_counter() - start  # with the compilation of all scores together
    start = time.perf_counter()
    scoring.score_images(with_terms, variables, images, scorers)
    second_pass = time.perf_counter() - start
    facts = {
        "command": " ".join(["python -m benchmarks.ood_scores", *sys.argv[1:]]),
        "machine": platform.platform(),
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "jax": jax.__version__,
        "settings": {name: str(value) for name, value in vars(arguments).items()},
        "num_views": made.config["ood"]["num_views"],
        "num_samples": made.config["ood"]["num_samples"],
        "all_scores_one_pass_seconds": one_pass,
        "all_scores_second_pass_seconds": second_pass,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    files.write_json_atomically(arguments.out / "ood_scores.json", {**facts, "rows": rows})
    lines = [f"* {name}: {value}" for name, value in facts.items()]
    lines += ["", "| | images/s | time / encoder's |", "|---|---|---|"]
    lines += [
        f"| {row['name']} | {row['images_per_second']:,.0f} | {row['ratio_to_encoder']:.3f} |"
        for row in rows
    ]
    text = "\n".join(lines) + "\n"
    files.write_text_atomically(arguments.out / "ood_scores.md", text)
    print(text)


if __name__ == "__main__":
    main()
