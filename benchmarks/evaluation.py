"""Time of k-NN, linear probes, detection metrics and features, beside scikit-learn, faiss and torch.

python -m benchmarks.evaluation --out=runs/evaluation --num_cores=1 --width=16 \
    --peer_python=PEERS/bin/python

Features are random: Gaussian classes, so that a probe has something to learn. k-NN is the search alone,
the same exact neighbours by cosine on every side; how many agree is in the table. The probes minimise one
objective, penalized cross-entropy of standardized features; each gets the loosest tolerance, in powers of
ten, at which its objective is within `--probe_gap` of the best that any reached. With few labels the
whole grid is fitted, from the strongest penalty to the weakest, each from the solution before. Metrics of
detection are five, with intervals from `--num_resamples` resamples of the images. Features are of random
images: uint8 arrays here, ready float batches in torch. Writes `evaluation.json` and `evaluation.md`.
PEERS: `python -m venv PEERS`, `PEERS/bin/pip install torch torchvision lightly kornia faiss-cpu`.
"""

import argparse
import contextlib
import functools
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score, roc_curve
from sklearn.neighbors import NearestNeighbors

from benchmarks import measure
from benchmarks.peer_process import PeerProcess
from configs import cifar10
from jevb_jax.evaluation import (
    detection_metrics,
    features,
    labeled_features,
    linear_probe,
    neighbors,
)
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.images.source import ArraySource
from jevb_jax.networks.joint import make_model

TOLERANCES = tuple(10.0**-power for power in range(1, 7))
MAX_ITERATIONS = 1000
L2_GRID = tuple(10.0**-power for power in range(1, 7))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings.

    Args:
      arguments: None takes those of the command line.

    Returns:
      The settings, by name.
    """
    parser = measure.make_parser(__doc__, num_rounds=3)
    measure.add_peer_arguments(parser, num_cores=0, needs="faiss and torch")
    parser.add_argument("--num_bank", type=int, default=50_000)
    parser.add_argument("--num_queries", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument("--num_classes", type=int, default=10)
    parser.add_argument("--num_probe", type=int, default=10_000, help="examples of the probe")
    parser.add_argument("--l2_regularization", type=float, default=1e-3)
    parser.add_argument("--probe_gap", type=float, default=1e-4, help="relative, of the objective")
    parser.add_argument("--labels_per_class", type=int, default=10, help="of the few-label probe")
    parser.add_argument("--num_scores", type=int, nargs="+", default=[2000, 10_000])
    parser.add_argument("--num_resamples", type=int, default=100)
    parser.add_argument("--num_images", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=256, help="of feature extraction")
    parser.add_argument("--backbone", default="resnet18", help="another has no torch peer")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args(arguments)


def draw_features(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gaussian classes.

    Args:
      arguments: of `parse`.

    Returns:
      bank: `[num_bank, dim]` float32.
      labels: of the bank.
      queries: `[num_queries, dim]`.
    """
    draw = np.random.default_rng(0)
    centers = draw.normal(size=(arguments.num_classes, arguments.dim)) / 8

    def some(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = draw.integers(arguments.num_classes, size=count)
        noise = draw.standard_normal((count, arguments.dim), np.float32)
        return (centers[labels] + noise).astype(np.float32), labels

    bank, labels = some(arguments.num_bank)
    return bank, labels, some(arguments.num_queries)[0]


def _timers(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], float]]:
    return {name: functools.partial(measure.seconds_of, call) for name, call in calls.items()}


def overlap(mine: np.ndarray, theirs: np.ndarray) -> float:
    """Share of neighbours that two searches have in common, query by query.

    Args:
      mine: `[queries, k]` rows of the bank.
      theirs: likewise.

    Returns:
      Mean over the queries, in [0, 1].
    """
    pairs = zip(mine, theirs, strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in pairs]))


def loosest(objective_at: Callable[[float], float], *, best: float, gap: float) -> float:
    """The largest tolerance that is good enough.

    Args:
      objective_at: tolerance -> objective reached.
      best: objective that any solver reached.
      gap: relative excess that is allowed.

    Returns:
      The tolerance.

    Raises:
      ValueError: none of `TOLERANCES` gets there.
    """
    for tolerance in TOLERANCES:
        if objective_at(tolerance) <= best * (1 + gap):
            return tolerance
    raise ValueError(f"no tolerance down to {TOLERANCES[-1]} reaches {best} within {gap}")


def probe_objective(
    weights: np.ndarray, bias: np.ndarray, x: np.ndarray, labels: np.ndarray, l2: float
) -> float:
    """Penalised mean cross-entropy in float64: `weights [F, C]`, `bias [C]`, `x [N, F]`."""
    logits = x.astype(np.float64) @ weights + bias
    logits -= logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits).sum(axis=1))
    return float(
        np.mean(log_sum - logits[np.arange(len(labels)), labels]) + l2 / 2 * (weights**2).sum()
    )


def _knn(
    arguments: argparse.Namespace, folder: Path, facts: dict[str, Any], num_threads: int
) -> list[dict[str, Any]]:
    bank, _, queries = draw_features(arguments)
    found: dict[str, np.ndarray] = {}
    on_device = jnp.asarray(bank), jnp.asarray(queries)

    def ours() -> Any:
        _, index = neighbors.nearest_neighbours(*on_device, k=arguments.k)
        found["jevb_jax"] = np.asarray(index)

    def by_sklearn(*, metric: str) -> None:
        # On unit vectors the nearest by distance are the nearest by cosine, and scikit-learn has a
        # faster program for distances.
        units = bank, queries
        if metric == "euclidean":
            units = tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in units)
        search = NearestNeighbors(n_neighbors=arguments.k, algorithm="brute", metric=metric)
        index = search.fit(units[0]).kneighbors(units[1], return_distance=False)
        found[f"scikit-learn, {metric}"] = np.asarray(index)

    calls: dict[str, Callable[[], Any]] = {"jevb_jax": ours} | {
        f"scikit-learn, {metric}": functools.partial(by_sklearn, metric=metric)
        for metric in ("cosine", "euclidean")
    }
    timers = _timers(calls)
    with contextlib.ExitStack() as stack:
        if arguments.peer_python:
            np.savez(folder / "features.npz", bank=bank, queries=queries)
            settings = {
                "features": str(folder / "features.npz"),
                "result": str(folder / "found.npy"),
                "k": arguments.k,
                "num_threads": num_threads,
            }
            peer = stack.enter_context(
                PeerProcess(arguments.peer_python, "faiss_search.py", settings)
            )
            facts["faiss"] = peer.facts
            timers["faiss"] = functools.partial(peer.seconds, "search")
        timings = measure.interleave(timers, num_rounds=arguments.num_rounds)
    if arguments.peer_python:
        found["faiss"] = np.load(folder / "found.npy")
    return [
        {
            "k-NN search": name,
            "seconds": timing.median,
            "queries/s": arguments.num_queries / timing.median,
            "time / ours": timing.ratio_to(timings["jevb_jax"]),
            "same neighbours": overlap(found["jevb_jax"], found[name]),
        }
        for name, timing in timings.items()
    ]


def _probe(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    bank, labels, _ = draw_features(arguments)
    x, y = bank[: arguments.num_probe], labels[: arguments.num_probe]
    mean, std = x.mean(axis=0), x.std(axis=0)
    standard, l2 = (x - mean) / std, arguments.l2_regularization
    on_device = jnp.asarray(x), jnp.asarray(y)

    def ours(tolerance: float) -> Any:
        return linear_probe.fit_linear_probe(
            *on_device,
            num_classes=arguments.num_classes,
            l2_regularization=l2,
            solver="lbfgs",
            tolerance=tolerance,
            max_iterations=MAX_ITERATIONS,
        )

    def by_sklearn(tolerance: float) -> Any:
        probe = LogisticRegression(C=1 / (len(x) * l2), tol=tolerance, max_iter=MAX_ITERATIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return probe.fit((x - x.mean(axis=0)) / x.std(axis=0), y)

    @functools.cache
    def ours_at(tolerance: float) -> tuple[float, int]:
        probe = ours(tolerance)
        weights, bias = np.asarray(probe.weights, np.float64), np.asarray(probe.bias, np.float64)
        return probe_objective(weights, bias, standard, y, l2), int(probe.num_iterations)

    @functools.cache
    def sklearn_at(tolerance: float) -> tuple[float, int]:
        probe = by_sklearn(tolerance)
        return (
            probe_objective(probe.coef_.T.astype(np.float64), probe.intercept_, standard, y, l2),
            int(probe.n_iter_[0]),
        )

    sides = {"jevb_jax": (ours, ours_at), "scikit-learn": (by_sklearn, sklearn_at)}
    best = min(at(TOLERANCES[-1])[0] for _, at in sides.values())
    chosen = {
        name: loosest(lambda t, at=at: at(t)[0], best=best, gap=arguments.probe_gap)
        for name, (_, at) in sides.items()
    }
    calls = {name: functools.partial(fit, chosen[name]) for name, (fit, _) in sides.items()}
    timings = measure.interleave(_timers(calls), num_rounds=arguments.num_rounds)
    return [
        {
            "linear probe": name,
            "seconds": timing.median,
            "time / ours": timing.ratio_to(timings["jevb_jax"]),
            "tolerance": chosen[name],
            "iterations": sides[name][1](chosen[name])[1],
            "objective / best - 1": sides[name][1](chosen[name])[0] / best - 1,
        }
        for name, timing in timings.items()
    ]


def _few_labels(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    bank, labels, _ = draw_features(arguments)
    rows = labeled_features.labels_per_class_subset(
        labels, labels_per_class=arguments.labels_per_class, seed=0
    )
    x, y = bank[rows], labels[rows]
    held_out = np.setdiff1d(np.arange(len(bank)), rows)[: arguments.num_probe]
    validation = bank[held_out], labels[held_out]
    accuracies: dict[str, float] = {}
    iterations: dict[str, int] = {}

    def ours() -> None:
        selection = linear_probe.select_linear_probe(
            x, y, *validation, num_classes=arguments.num_classes, l2_grid=L2_GRID
        )
        accuracies["jevb_jax"] = selection.validation_accuracy
        iterations["jevb_jax"] = sum(point.num_iterations for point in selection.grid)

    def by_sklearn() -> None:
        probe = LogisticRegression(tol=1e-5, max_iter=MAX_ITERATIONS, warm_start=True)
        mean, std = x.mean(axis=0), x.std(axis=0)
        scores, counts = [], []
        for l2 in sorted(L2_GRID, reverse=True):
            probe.set_params(C=1 / (len(x) * l2)).fit((x - mean) / std, y)
            scores.append(float(probe.score((validation[0] - mean) / std, validation[1])))
            counts.append(int(probe.n_iter_[0]))
        accuracies["scikit-learn"], iterations["scikit-learn"] = max(scores), sum(counts)

    calls = {"jevb_jax": ours, "scikit-learn": by_sklearn}
    timings = measure.interleave(_timers(calls), num_rounds=arguments.num_rounds)
    return [
        {
            "few labels": name,
            "seconds": timing.median,
            "time / ours": timing.ratio_to(timings["jevb_jax"]),
            "iterations": iterations[name],
            "validation accuracy": accuracies[name],
        }
        for name, timing in timings.items()
    ]


def metrics_by_sklearn(
    inside: np.ndarray, outside: np.ndarray, *, tpr: float = 0.95
) -> tuple[float, ...]:
    """The five of `ood_metrics`, in its order.

    Args:
      inside: scores `[N]`, finite.
      outside: scores `[M]`.
      tpr: of the two rates.

    Returns:
      The metrics.
    """
    is_outside = np.arange(len(inside) + len(outside)) >= len(inside)
    scores = np.concatenate([inside, outside])

    def area(positive: np.ndarray, values: np.ndarray) -> float:
        precision, recall, _ = precision_recall_curve(positive, values)
        return float(auc(recall, precision))

    def rate(positive: np.ndarray, values: np.ndarray) -> float:
        false, true, _ = roc_curve(positive, values, drop_intermediate=False)
        return float(false[np.argmax(true >= tpr)])

    return (
        float(roc_auc_score(is_outside, scores)),
        area(is_outside, scores),
        area(~is_outside, -scores),
        rate(is_outside, scores),
        rate(~is_outside, -scores),
    )


def _detection(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for num_scores in arguments.num_scores:
        draw = np.random.default_rng(0)
        inside, outside = (draw.normal(mean, size=num_scores) for mean in (0.0, 0.5))
        found: dict[str, tuple[float, float]] = {}

        def ours(inside: Any = inside, outside: Any = outside, found: Any = found) -> None:
            low, high = detection_metrics.bootstrap_intervals(
                inside, outside, num_resamples=arguments.num_resamples, seed=0
            )
            found["jevb_jax"] = low.auroc, high.auroc

        def by_sklearn(inside: Any = inside, outside: Any = outside, found: Any = found) -> None:
            draw = np.random.default_rng(0)
            values = [
                metrics_by_sklearn(
                    draw.choice(inside, len(inside)), draw.choice(outside, len(outside))
                )
                for _ in range(arguments.num_resamples)
            ]
            found["scikit-learn"] = tuple(np.quantile(np.array(values)[:, 0], (0.025, 0.975)))

        calls = {"jevb_jax": ours, "scikit-learn": by_sklearn}
        timings = measure.interleave(_timers(calls), num_rounds=arguments.num_rounds)
        rows += [
            {
                "metrics and intervals": name,
                "images inside and outside": num_scores,
                "seconds": timing.median,
                "time / ours": timing.ratio_to(timings["jevb_jax"]),
                "AUROC from": found[name][0],
                "to": found[name][1],
            }
            for name, timing in timings.items()
        ]
    return rows


def _features(
    arguments: argparse.Namespace, folder: Path, facts: dict[str, Any], num_threads: int
) -> list[dict[str, Any]]:
    config: Any = cifar10.get_config()
    config.model.backbone = arguments.backbone
    config.model.width, config.model.dtype = arguments.width, arguments.dtype
    model = make_model(head="none", has_likelihood_scale=False, **config.model.to_dict())
    view = config.augmentation
    source = ArraySource(
        np.random.default_rng(0).integers(
            0, 256, (arguments.num_images, view.image_size, view.image_size, 3), np.uint8
        )
    )
    init = jax.jit(functools.partial(model.init, train=False))
    variables: Any = init(jax.random.key(0), jnp.zeros((2, view.image_size, view.image_size, 3)))
    extract = features.FeatureExtractor(
        model,
        view=ViewAugmentation(view.image_size, view.mean, view.std),
        batch_size=arguments.batch_size,
    )
    num_batches = -(-arguments.num_images // arguments.batch_size)
    timers: dict[str, Callable[[], float]] = {
        "jevb_jax": functools.partial(measure.seconds_of, lambda: extract(variables, source))
    }
    with contextlib.ExitStack() as stack:
        if arguments.peer_python:
            np.savez(folder / "images.npz", images=source.images)
            settings = {
                "images": str(folder / "images.npz"),
                "image_size": view.image_size,
                "width": arguments.width,
                "head_dim": 64,
                "batch_size": arguments.batch_size,
                "num_threads": num_threads,
                "num_workers": 0,
                "dtype": arguments.dtype,
                "matmul_size": 64,
                "mean": view.mean,
                "std": view.std,
            }
            peer = stack.enter_context(
                PeerProcess(arguments.peer_python, "torch_simsiam.py", settings)
            )
            facts["torch"] = peer.facts
            for mode in ("eager", "channels_last"):
                timers[f"torch, {mode}, encoder alone"] = functools.partial(
                    peer.seconds, f"features/{mode}", num_batches
                )
        timings = measure.interleave(timers, num_rounds=arguments.num_rounds)
    return [
        {
            "features": name,
            "images/s": num_batches * arguments.batch_size / timing.median,
            "time / ours": timing.ratio_to(timings["jevb_jax"]),
        }
        for name, timing in timings.items()
    ]


def main(arguments: argparse.Namespace) -> str:
    """Measures and writes.

    Args:
      arguments: of `parse`.

    Returns:
      The Markdown.

    Raises:
      ValueError: a peer with another backbone than its own.
    """
    if arguments.backbone != "resnet18" and arguments.peer_python:
        raise ValueError(
            f"the peer has resnet18 alone, got --backbone={arguments.backbone}: leave out --peer_python"
        )
    if arguments.num_cores:  # before JAX and torch count the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.num_cores])
    num_threads = len(os.sched_getaffinity(0))
    facts = measure.environment(
        " ".join(["python -m benchmarks.evaluation", *sys.argv[1:]]), vars(arguments)
    )
    facts |= {"threads": num_threads}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tables = {
            "k-NN": _knn(arguments, folder, facts, num_threads),
            "Linear probe": _probe(arguments),
            "Few labels": _few_labels(arguments),
            "Detection": _detection(arguments),
            "Feature extraction": _features(arguments, folder, facts, num_threads),
        }
    return measure.write_results(arguments.out, "evaluation", facts, tables)


if __name__ == "__main__":
    print(main(parse()))
