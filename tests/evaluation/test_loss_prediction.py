"""Loss prediction: NumPy in float64 for the loss, known losses for the fit, a tiny run as a whole."""

import dataclasses
import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import spearmanr

from jevb_jax.evaluation import evaluate, loss_prediction, score_json, score_table
from jevb_jax.evaluation.detector_input import DegenerateFeaturesError
from jevb_jax.evaluation.features import Features
from jevb_jax.evaluation.linear_probe import fit_linear_probe
from jevb_jax.evaluation.loss_prediction import fit_loss_prediction, pairwise_ranking_loss
from jevb_jax.evaluation.score_table import ScoreSettings, TrainingData
from jevb_jax.images import batches
from jevb_jax.model import Model
from jevb_jax.paper.scores import UncertaintyTerms
from jevb_jax.training.experiment import Experiment, build_experiment
from tests.evaluation.test_detection import make_config

NAMES = {"probe/loss_prediction", "jevb/loss_prediction"}
SETTINGS = ScoreSettings(knn_k=(5,), ssd_clusters=(1,), residual_share=0.5, mixture_df=5.0)
WIDTH = 6
SHORT: dict[str, Any] = {"num_steps": 20, "num_pairs": 16, "width": 8}


def oracle_loss(score: Any, losses: Any, margin: float) -> list[float]:
    """The loss of pairs, pair by pair."""
    values = []
    for (first, second), (loss, other) in zip(score, losses, strict=True):
        wanted = 0 if loss == other else (first - second if loss > other else second - first)
        values.append(max(0.0, margin - wanted))
    return values


@pytest.mark.parametrize("margin", [1.0, 0.25])
def test_the_ranking_loss_of_pairs(margin, same):
    random = np.random.default_rng(0)
    score = random.normal(size=(200, 2))
    losses = random.integers(0, 4, (200, 2))  # with ties
    sign = np.sign(losses[:, 0] - losses[:, 1])
    pairs = (jnp.asarray(x) for x in (score[:, 0], score[:, 1], sign))
    found = pairwise_ranking_loss(*pairs, margin=margin)
    expected = oracle_loss(score, losses, margin)
    same("loss prediction, ranking loss", found, expected, rtol=2e-6, atol=2e-7)
    assert 0 in expected
    np.testing.assert_allclose(np.asarray(found)[sign == 0], margin)


def test_a_gradient_moves_wrong_and_close_pairs_apart_only():
    # Right by more than the margin; right but close; wrong; equal losses.
    score, other = jnp.array([2.0, 0.5, 0.0, 3.0]), jnp.array([0.0, 0.0, 2.0, 0.0])
    sign = jnp.array([1, 1, 1, 0])

    def mean(score: Any, other: Any) -> Any:
        return jnp.mean(pairwise_ranking_loss(score, other, sign))

    first, second = jax.grad(mean, (0, 1))(score, other)
    np.testing.assert_array_equal(first, [0, -0.25, -0.25, 0])
    np.testing.assert_array_equal(second, [0, 0.25, 0.25, 0])
    flipped = jax.grad(lambda x: jnp.sum(pairwise_ranking_loss(x, other, -sign)))(score)
    np.testing.assert_array_equal(flipped, [1, 1, 0, 0])  # the third is now right by 2


def test_cross_entropies_keep_their_order_near_zero():
    random = np.random.default_rng(0)
    logits = random.normal(size=(50, 4)) * 5
    labels = random.integers(0, 4, 50)
    logits[0] = [0, 60, 0, 0]
    logits[1] = [0, 61, 0, 0]
    labels[:2] = 1
    found = loss_prediction.cross_entropies(logits, labels)
    total: Any = logsumexp(logits, axis=1)
    expected = total - logits[np.arange(50), labels]
    np.testing.assert_allclose(found[2:], expected[2:], rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found[:2], 3 * np.exp([-60.0, -61.0]), rtol=1e-12)
    for wrong in (labels[:-1], labels.astype(float), np.where(labels == 1, 4, labels)):
        with pytest.raises(ValueError, match="labels must be"):
            loss_prediction.cross_entropies(logits, wrong)
    with pytest.raises(ValueError, match="labels must be in"):
        loss_prediction.cross_entropies(logits, labels - 1)
    with pytest.raises(ValueError, match="logits must be finite"):
        loss_prediction.cross_entropies(np.full((50, 4), np.nan), labels)


def problem(count: int, seed: int) -> tuple[Any, Any]:
    """Features of different units, and losses that are a curved function of two of them."""
    z = np.random.default_rng(seed).normal(size=(count, WIDTH))
    losses = np.exp(z[:, 0] + 2 * np.abs(z[:, 1]))
    return (z * 10.0 ** np.arange(-2, 4) + 5).astype(np.float32), losses


def rank_correlation(x: Any, y: Any) -> float:
    found: Any = spearmanr(x, y)
    return float(found.statistic)


@functools.cache
def fitted() -> Any:
    return fit_loss_prediction(*problem(1500, 0))


@pytest.mark.slow
def test_it_ranks_images_that_were_not_fitted():
    features, losses = problem(1000, 1)
    score = np.asarray(fitted()(features))
    assert score.shape == (1000,)
    assert rank_correlation(score, losses) > 0.95
    # A linear function of the features could not do so.
    inputs = np.c_[features.astype(float), np.ones(1000)]
    linear = np.linalg.lstsq(inputs, np.log(losses), rcond=None)[0]
    assert rank_correlation(inputs @ linear, losses) < 0.8


@pytest.mark.slow
def test_a_score_is_the_network_of_standardized_features():
    features, _ = problem(1500, 0)
    new, _ = problem(40, 2)
    score = fitted()
    standardized = (new.astype(float) - features.astype(float).mean(0)) / features.std(0, float)
    weights, bias, output = (np.asarray(x, float) for x in score.layers)
    expected = np.maximum(standardized @ weights + bias, 0) @ output
    np.testing.assert_allclose(score(new), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jit(lambda s, x: s(x))(score, new), expected, 1e-4, 1e-4)


def test_a_seed_may_have_more_than_32_bits():
    features, losses = problem(40, 0)
    scores = [
        np.asarray(fit_loss_prediction(features, losses, seed=seed, num_steps=2)(features))
        for seed in (3, 2**31 + 3, 2**63 - 1)
    ]
    assert np.abs(scores[0] - scores[1]).max() > 0.01


def test_seed_and_order_of_losses_say_everything():
    features, losses = problem(100, 0)
    new, _ = problem(40, 1)

    def scores(losses: Any, **changes: Any) -> np.ndarray:
        return np.asarray(fit_loss_prediction(features, losses, **(SHORT | changes))(new))

    first = scores(losses)
    np.testing.assert_array_equal(scores(losses), first)
    np.testing.assert_array_equal(scores(1e-12 * losses + 1), first)  # equal in float32
    np.testing.assert_array_equal(scores(np.log(losses), seed=0), first)
    assert np.abs(scores(losses, seed=1) - first).max() > 0.1
    assert np.abs(scores(-losses) - first).max() > 0.1


def test_strange_features():
    features, losses = problem(100, 0)
    features[:, 2] = 7
    score = fit_loss_prediction(features, losses, **SHORT)
    new, _ = problem(5, 1)
    other = new.copy()
    other[:, 2] += 1e6
    np.testing.assert_array_equal(score(new), score(other))  # it did not vary in the fit
    assert np.isfinite(score(new)).all()
    new[0, 0] = np.inf
    new[1, 0] = -np.inf
    new[2, 2] = np.inf
    new[3] = 3e38
    new[4, 0] = np.nan
    found = np.asarray(score(new))
    assert np.isposinf(found[:3]).all()
    assert not np.isnan(found[3])
    assert not np.isneginf(found[3])
    assert np.isnan(found[4])
    # A network that predicts no loss below the mean.
    layers = loss_prediction.Layers(jnp.ones((1, 2)), jnp.zeros(2), jnp.ones(2))
    half = loss_prediction.PredictedLoss(jnp.zeros(1), jnp.ones(1), layers)
    np.testing.assert_array_equal(half(np.array([[-2.0], [-np.inf], [1.5]])), [0, np.inf, 3])
    with pytest.raises(ValueError, match=r"features must be \[N, 6\]"):
        score(np.ones((3, 5)))


def test_what_cannot_be_fitted_says_why():
    features, losses = problem(30, 0)
    with pytest.raises(DegenerateFeaturesError, match="all losses are 2, and equal losses"):
        fit_loss_prediction(features, np.full(30, 2.0))
    with pytest.raises(DegenerateFeaturesError, match="features do not vary"):
        fit_loss_prediction(np.ones((30, 3)), losses)
    for few in (0, 1):
        with pytest.raises(ValueError, match="at least 2 images"):
            fit_loss_prediction(features[:few], losses[:few])
    wrong = losses.copy()
    wrong[3] = np.nan
    with pytest.raises(ValueError, match="losses must be finite: 1 of 30"):
        fit_loss_prediction(features, wrong)
    wrong[3] = np.inf
    with pytest.raises(ValueError, match="losses must be finite"):
        fit_loss_prediction(features, wrong)
    with pytest.raises(ValueError, match="features must be finite"):
        fit_loss_prediction(np.full((30, 3), np.nan), losses)
    for shape in (losses[:-1], losses[:, None]):
        with pytest.raises(ValueError, match=r"losses must be \[30\]"):
            fit_loss_prediction(features, shape)
    with pytest.raises(TypeError, match="losses must be real numbers"):
        fit_loss_prediction(features, losses.astype(complex))
    for name in ("num_steps", "num_pairs", "width"):
        with pytest.raises(ValueError, match=name):
            fit_loss_prediction(features, losses, **{name: 0})
    for rate in (0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="learning_rate must be positive"):
            fit_loss_prediction(features, losses, learning_rate=rate)
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match="seed"):
            fit_loss_prediction(features, losses, seed=seed)


def test_it_is_saved_as_plain_arrays():
    new, _ = problem(20, 1)
    again = score_json.rebuild(*score_json.describe(fitted()))
    np.testing.assert_array_equal(again(new), fitted()(new))


@pytest.mark.slow
def test_applying_a_score_needs_no_optax():
    code = "import sys, jevb_jax.evaluation.loss_prediction; sys.exit('optax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def names(method: str, num_views: int, **keywords: Any) -> set[str]:
    return set(score_table.score_table(method, SETTINGS, num_views=num_views, **keywords))


def test_a_table_has_it_only_if_asked():
    for method, num_views, added in (
        ("jevb", 2, NAMES),
        ("jevb", 1, {"probe/loss_prediction"}),
        ("simsiam", 2, {"probe/loss_prediction"}),
    ):
        with_it = names(method, num_views, predicts_loss=True)
        assert with_it - names(method, num_views) == added
        assert not names(method, num_views) & NAMES


@pytest.mark.slow
def test_targets_are_the_probes_losses_and_the_views_disagreement(monkeypatch):
    random = np.random.default_rng(0)
    representation, _ = problem(60, 0)
    labels = random.integers(0, 3, 60)
    rows = jnp.asarray(random.normal(size=(6, 60)), jnp.float32)
    features = Features(representation, None, None, UncertaintyTerms(*rows), labels)
    probe = fit_linear_probe(representation, labels, num_classes=3, l2_regularization=1e-2)
    given: list[Any] = []

    def fit(features: Any, *, losses: Any) -> Any:
        given.append((np.asarray(features), np.asarray(losses)))
        return fit_loss_prediction(features, losses, **SHORT)

    monkeypatch.setattr(loss_prediction, "fit_loss_prediction", fit)
    table = score_table.score_table("jevb", SETTINGS, num_views=2, predicts_loss=True)
    train = TrainingData(features, probe)
    of_probe, of_views = (table[name].make(train) for name in sorted(NAMES, reverse=True))
    parameters: Any = probe.feature_mean, probe.feature_std, probe.weights, probe.bias
    mean, std, weights, bias = (np.asarray(x, float) for x in parameters)
    logits = (representation.astype(float) - mean) / std @ weights + bias
    total: Any = logsumexp(logits, axis=1)
    expected = total - logits[np.arange(60), labels]
    for (read, losses), wanted in zip(given, (expected, -np.asarray(rows[5])), strict=True):
        np.testing.assert_array_equal(read, representation)
        np.testing.assert_allclose(losses, wanted, rtol=1e-4, atol=1e-5)
    # Labels may be any numbers; a class without fitted images has no number.
    table["probe/loss_prediction"].make(
        TrainingData(features._replace(labels=labels * 7 + 2), probe)
    )
    np.testing.assert_array_equal(given[2][1], given[0][1])
    lacking = np.where(labels == 1, 0, labels)
    with pytest.raises(DegenerateFeaturesError, match="of 2 of 3 classes"):
        table["probe/loss_prediction"].make(TrainingData(features._replace(labels=lacking), probe))
    # A fitted score reads the representation alone.
    only = Features(representation, None, None, None, None)
    assert np.isfinite(of_probe(only)).all()
    assert np.isfinite(of_views(only)).all()
    assert not np.array_equal(of_probe(only), of_views(only))
    # Where all images have the same loss, the table leaves the score out.
    terms = UncertaintyTerms(*rows)._replace(cross_view_log_likelihood=jnp.ones(60))
    same = features._replace(terms=terms)
    with pytest.raises(DegenerateFeaturesError):
        table["jevb/loss_prediction"].make(TrainingData(same, probe))


@functools.cache
def tiny(predicts_loss: bool) -> Experiment:
    config = make_config("jevb")
    config.ood.corruptions = ("contrast",)
    config.ood.severities = (5,)
    config.ood.loss_prediction = predicts_loss
    return build_experiment(config)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_reports_it_and_nothing_else_changes():
    experiment = tiny(True)
    variables = experiment.initial_state().evaluation_variables
    _, found = evaluate.evaluate(experiment, variables, keeps_fitted=True)
    assert found.ood is not None
    assert found.fitted is not None
    reported = {result.score for result in found.ood.results}
    assert reported >= NAMES
    for name in NAMES:
        assert np.isfinite(found.ood.inside[name]).all()
        assert np.std(found.ood.inside[name]) > 0
    # The label-free score is saved, and a loaded model gives the same; that with labels is not.
    saved = found.fitted
    assert NAMES & set(saved.scorers) == NAMES & set(saved.calibration) == {"jevb/loss_prediction"}
    dataset: Any = experiment.dataset
    test = batches.load_resident(dataset.test)
    model = Model(experiment.config, variables, step=0, batch_size=64, read_fitted=lambda: saved)
    np.testing.assert_allclose(
        model.ood_score(test, "jevb/loss_prediction"),
        found.ood.inside["jevb/loss_prediction"],
        rtol=1e-3,
        atol=1e-3,
    )
    train = batches.load_resident(dataset.train)
    own = model.ood_score(test[:5], "jevb/loss_prediction", fit_images=train[:40])
    assert np.isfinite(own).all()
    # All other scores are those of a run without it.
    _, without = evaluate.evaluate(tiny(False), variables)
    assert without.ood is not None
    assert set(without.ood.inside) == set(found.ood.inside) - NAMES
    for name, values in without.ood.inside.items():
        np.testing.assert_allclose(
            found.ood.inside[name], values, rtol=1e-3, atol=1e-3, err_msg=name
        )


def test_the_setting_is_off_by_default():
    settings = tiny(False).settings
    assert not build_experiment(make_config("jevb")).settings.ood.loss_prediction
    table = score_table.scores_of_run(settings, has_labels=True)
    on = dataclasses.replace(settings, ood=dataclasses.replace(settings.ood, loss_prediction=True))
    assert set(score_table.scores_of_run(on, has_labels=True)) - set(table) == NAMES
