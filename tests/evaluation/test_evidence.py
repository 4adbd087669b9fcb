"""What a page draws of an evaluation: images in their order, curves and neighbors by hand."""

import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn.decomposition import PCA

from jevb_jax.evaluation import evidence
from jevb_jax.evaluation.detection import OODEvaluation, SetResult
from jevb_jax.evaluation.detection_metrics import OODMetrics
from jevb_jax.evaluation.evaluate import Evaluation
from jevb_jax.evaluation.evidence import embedding_map, gather_evidence, separation
from jevb_jax.evaluation.features import Features
from jevb_jax.evaluation.outside_sets import CORRUPTED
from jevb_jax.evaluation.reliability import RiskCoverage
from jevb_jax.images.dataset import Dataset
from jevb_jax.images.source import ArraySource
from jevb_jax.networks.heads import Posterior

RNG = np.random.default_rng(0)
NUM_TRAIN, NUM_TEST = 30, 40
CLASSES = ("cat", "dog", "emu")
SCORES = ("jevb/posterior_entropy", "jevb/mixture_and_residual", "jevb/negative_elbo")
CURVE = RiskCoverage(np.array([0.5, 1.0]), np.array([0.0, 0.25]), 0.1)


def images(count: int, *, has_labels: bool = True) -> ArraySource:
    pixels = RNG.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)
    return ArraySource(pixels, np.arange(count) % 3 if has_labels else None, CLASSES)


def features(count: int, labels: Any) -> Features:
    values = RNG.normal(size=(count, 5)).astype(np.float32)
    scale = np.exp(RNG.normal(size=(count, 5)))
    return Features(
        values, values + 1, Posterior(jnp.asarray(values), jnp.asarray(scale)), None, labels
    )


def make(*, method: str = "jevb", has_labels: bool = True, has_ood: bool = True) -> Any:
    """An experiment and its evaluation, without networks; and the scores of the sets."""
    dataset = Dataset(
        train=images(NUM_TRAIN, has_labels=has_labels),
        validation=images(9, has_labels=has_labels),
        test=images(NUM_TEST, has_labels=has_labels),
    )
    section = types.SimpleNamespace
    settings = section(
        method=method,
        evaluation=section(split="test"),
        ood=section(corruptions=("blur",), severities=(1, 4)),
        jevb=section(prior_scale=2.0),
    )
    sizes = {"far_set": 25, "blur_1": 10, "blur_4": 10}
    scores = (*SCORES, "other/score")
    inside = {name: RNG.normal(size=NUM_TEST) for name in scores}
    outside = {
        name: {score: RNG.normal(1, size=size) for score in scores} for name, size in sizes.items()
    }
    results = [
        SetResult(
            *(score, name, "far" if name == "far_set" else CORRUPTED),
            OODMetrics(index / 100, 0, 0, 0, 0),
            *(None, None, ""),
        )
        for index, (score, name) in enumerate((s, n) for s in scores for n in sizes)
    ]
    default = SCORES[1] if method == "jevb" else "other/score"
    found = OODEvaluation(results, inside, outside, default, None, "", frozenset(), {}, {})
    train, test = dataset.train, dataset.test
    evaluation = Evaluation(
        results=[],
        train=features(NUM_TRAIN, train.labels),
        test=features(NUM_TEST, test.labels if test is not None else None),
        probe=None,
        ood=found if has_ood else None,
        risk_coverage={score: {"linear": CURVE} for score in scores},
    )
    return section(settings=settings, dataset=dataset), evaluation


def test_images_are_ordered_by_uncertainty():
    experiment, evaluation = make()
    found = gather_evidence(experiment, evaluation)
    assert found.uncertainty_score == SCORES[0]
    values = evaluation.ood.inside[SCORES[0]]
    order = sorted(range(NUM_TEST), key=lambda row: -values[row])
    test = experiment.dataset.test
    for shown, rows in (
        (found.most_uncertain, order[:16]),
        (found.least_uncertain, order[::-1][:16]),
    ):
        assert shown is not None
        np.testing.assert_array_equal(shown.images, [test[row] for row in rows])
        np.testing.assert_array_equal(shown.uncertainty, [values[row] for row in rows])
        assert shown.labels == [CLASSES[row % 3] for row in rows]
    assert found.risk_coverage == {"linear": CURVE}
    np.testing.assert_array_equal(found.posterior_scale, evaluation.test.prediction.posterior_scale)
    assert found.prior_scale == 2.0


def test_neighbors_are_those_of_a_full_search():
    experiment, evaluation = make()
    bank, queries = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (evaluation.train.representation, evaluation.test.representation)
    )
    rows = gather_evidence(experiment, evaluation).neighbors
    assert len(rows) == 4
    for query, row in enumerate(rows):
        cosine = bank.astype(np.float64) @ queries[query].astype(np.float64)
        nearest = np.argsort(-cosine)[:8]
        np.testing.assert_allclose(row.cosine, cosine[nearest], atol=1e-6)
        np.testing.assert_array_equal(row.images, experiment.dataset.train.images[nearest])
        assert row.labels == [CLASSES[i % 3] for i in nearest]
        assert row.label == CLASSES[query % 3]
        np.testing.assert_array_equal(row.image, experiment.dataset.test[query])


def test_a_corruption_is_drawn_at_its_worst_against_the_images_that_were_corrupted():
    experiment, evaluation = make()
    found = gather_evidence(experiment, evaluation)
    assert list(found.separations) == [SCORES[1], SCORES[2]]  # the default, and the pathology
    published = {(r.score, r.outside): r.metrics.auroc for r in evaluation.ood.results}
    for score, separations in found.separations.items():
        assert [one.outside_set for one in separations] == ["far_set", "blur_4"]
        for one, count in zip(separations, (NUM_TEST, 10), strict=True):
            np.testing.assert_array_equal(one.inside, evaluation.ood.inside[score][:count])
            assert one.auroc == published[score, one.outside_set]
    (curve,) = found.severity
    assert curve.corruption == "blur"
    np.testing.assert_array_equal(curve.severity, [0, 1, 4])
    score = SCORES[0]
    columns = [
        evaluation.ood.inside[score][:10],
        *(evaluation.ood.outside[f"blur_{level}"][score] for level in (1, 4)),
    ]
    np.testing.assert_allclose(curve.mean, [np.mean(column) for column in columns])
    np.testing.assert_allclose(curve.lower_quartile, [np.percentile(c, 25) for c in columns])
    np.testing.assert_allclose(curve.upper_quartile, [np.percentile(c, 75) for c in columns])


def test_other_methods_are_uncertain_by_their_default_score():
    found = gather_evidence(*make(method="simsiam"))
    assert found.uncertainty_score == "other/score"


def test_without_labels_or_detection_there_is_less_to_draw():
    found = gather_evidence(*make(has_labels=False, has_ood=False))
    assert found.uncertainty_score is found.most_uncertain is found.least_uncertain is None
    assert not found.separations
    assert not found.severity
    assert not found.risk_coverage
    assert found.embedding_map is not None
    assert found.embedding_map.labels is found.embedding_map.uncertainty is None
    assert found.embedding_map.class_names == ()
    assert found.neighbors[0].label is found.neighbors[0].labels is None


def test_map_holds_the_first_images(monkeypatch):
    monkeypatch.setattr(evidence, "_NUM_MAPPED", 12)
    experiment, evaluation = make()
    found = gather_evidence(experiment, evaluation)
    assert found.embedding_map is not None
    expected = embedding_map(evaluation.test.embedding[:12])
    np.testing.assert_array_equal(found.embedding_map.coordinates, expected)
    np.testing.assert_array_equal(found.embedding_map.labels, np.arange(12) % 3)
    values = evaluation.ood.inside[SCORES[0]][:12]
    np.testing.assert_array_equal(found.embedding_map.uncertainty, values)
    assert found.embedding_map.class_names == CLASSES
    assert found.posterior_scale is not None
    assert len(found.posterior_scale) == 12


def test_roc_curve_has_the_area_of_the_ranks():
    inside, outside = np.round(RNG.normal(size=80), 1), np.round(RNG.normal(1, size=50), 1)
    one = separation("set", inside, outside, auroc=0.5)
    statistic = stats.mannwhitneyu(outside, inside).statistic
    assert np.trapezoid(one.found, one.flagged) == pytest.approx(statistic / (80 * 50), abs=1e-12)
    for threshold in (-0.5, 0.0, 1.0):  # a point of the curve, or on a line between two
        flagged, found = np.mean(inside >= threshold), np.mean(outside >= threshold)
        assert np.interp(flagged, one.flagged, one.found) == pytest.approx(found, abs=1e-12)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="1 of 2 scores of outside images are not finite"):
        separation("set", np.zeros(3), np.array([0, np.inf]), auroc=0.5)


def test_an_infinite_score_is_left_out_of_the_drawings_and_named():
    experiment, evaluation = make()
    entropy, default, _ = SCORES
    evaluation.ood.inside[entropy][3] = np.inf
    evaluation.ood.outside["far_set"][default][:2] = np.inf, -np.inf
    found = gather_evidence(experiment, evaluation)
    assert [one.outside_set for one in found.separations[default]] == ["blur_4"]
    assert not found.severity
    assert found.most_uncertain is not None
    assert found.most_uncertain.uncertainty[0] == np.inf
    assert found.embedding_map is not None
    assert found.embedding_map.uncertainty is None
    assert found.not_drawn == [
        f"{default} against far_set is not drawn: 2 of {NUM_TEST + 25} scores are infinite.",
        f"{entropy} by severity of blur is not drawn: 1 of 30 scores are infinite.",
        f"The map is not shaded by {entropy}: 1 of {NUM_TEST} scores are infinite.",
    ]


@pytest.mark.parametrize("cut", [np.s_[:, :1], np.s_[:1]])
def test_one_dimension_or_one_image_has_no_map(cut):
    experiment, evaluation = make(has_ood=False)
    test = evaluation.test._replace(embedding=evaluation.test.embedding[cut])
    found = gather_evidence(experiment, evaluation._replace(test=test))
    assert found.embedding_map is None
    assert found.neighbors


def test_embedding_map_is_pca_of_the_directions():
    rng = np.random.default_rng(1)
    embedding = rng.normal(size=(50, 7)) * np.array([9.0, 5, 2, 1, 1, 1, 1]) + 1
    directions = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    pca = PCA(2, svd_solver="full").fit(directions)
    expected = pca.transform(directions)
    loadings = np.asarray(pca.components_)
    for axis in range(2):  # the oracle's signs are its own
        expected[:, axis] *= np.sign(loadings[axis, np.abs(loadings[axis]).argmax()])
    got = embedding_map(embedding)
    assert got.shape == (50, 2)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    # Neither radius nor order of the images matters, up to float64 rounding.
    radius = np.exp(rng.uniform(-600, 600, size=(50, 1)))
    np.testing.assert_allclose(embedding_map(embedding * radius), got, atol=1e-12)
    np.testing.assert_allclose(embedding_map(embedding[::-1]), got[::-1], atol=1e-12)
    # Mirrored features mirror the map: the rule of signs looks at the loadings alone.
    np.testing.assert_allclose(embedding_map(-embedding), -got, atol=1e-12)
    np.testing.assert_array_equal(embedding_map(np.zeros((3, 4))), np.zeros((3, 2)))


@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 1), (0, 3)])
def test_embedding_map_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"must be \[N, D\]"):
        embedding_map(np.ones(shape))
