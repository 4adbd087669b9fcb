"""Images a second of every out-of-distribution score, beside the encoder's forward pass.

python -m benchmarks.ood_scores --out=runs/benchmark_ood
python -m benchmarks.ood_scores --out=runs/benchmark_ood --image_size=32 --width=64 --backbone=resnet18

Random weights and random images: time does not depend on them. The encoder and the scores take turns
in one process, and each score's time is given as a ratio to the encoder's in the same round: 0.1 means
that scoring a batch takes a tenth of the time of its forward pass. Writes `ood_scores.json` and
`ood_scores.md`.
"""

import argparse
import functools
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from configs import default
from jevb_jax.evaluation import detection, features, linear_probe, score_table, scoring
from jevb_jax.evaluation.score_table import ScoreSettings, TrainingData
from jevb_jax.images import augmentations
from jevb_jax.images.source import ArraySource
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


def main() -> None:
    """Measures and writes."""
    parser = measure.make_parser(__doc__, num_rounds=5)
    parser.add_argument("--num_images", type=int, default=10_000)
    parser.add_argument("--num_fit_images", type=int, default=10_000)
    parser.add_argument("--batch_size", type=int, default=500)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--width", type=int, default=16)
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
    timings = measure.interleave(
        {name: functools.partial(measure.seconds_of, call) for name, call in calls.items()},
        num_rounds=arguments.num_rounds,
    )
    rows = [
        {
            "work": name,
            "images/s": arguments.batch_size / timing.median,
            "time / encoder's": timing.ratio_to(timings["encoder"]),
        }
        for name, timing in timings.items()
    ]
    images = ArraySource(np.resize(pixels, (arguments.num_images, *pixels.shape[1:])))
    start = time.perf_counter()
    scoring.score_images(with_terms, variables, images, scorers)
    one_pass = time.perf_counter() - start  # with the compilation of all scores together
    start = time.perf_counter()
    scoring.score_images(with_terms, variables, images, scorers)
    second_pass = time.perf_counter() - start
    command = shlex.join(["python", "-m", "benchmarks.ood_scores", *sys.argv[1:]])
    facts = {
        **measure.environment(command, vars(arguments)),
        "num_views": made.config["ood"]["num_views"],
        "num_samples": made.config["ood"]["num_samples"],
        "all_scores_one_pass_seconds": one_pass,
        "all_scores_second_pass_seconds": second_pass,
    }
    print(measure.write_results(arguments.out, "ood_scores", facts, {"": rows}))


if __name__ == "__main__":
    main()
