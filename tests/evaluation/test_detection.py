"""The detection of a tiny run: every score again from its features, every set streamed once."""

import dataclasses
import functools
import importlib
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import mannwhitneyu
from sklearn.covariance import EmpiricalCovariance
from sklearn.metrics import roc_auc_score

from jevb_jax.evaluation import detection, evaluate, outside_sets, score_table, scoring
from jevb_jax.evaluation.accuracy import wrong_predictions
from jevb_jax.evaluation.detection import OODEvaluation
from jevb_jax.evaluation.evaluate import Evaluation
from jevb_jax.evaluation.features import Features
from jevb_jax.evaluation.neighbor_detectors import fit_knn
from jevb_jax.evaluation.outside_sets import OutsideSet
from jevb_jax.evaluation.score_table import ScoreEntry, ScoreSettings, TrainingData
from jevb_jax.evaluation.scoring import Scorers
from jevb_jax.images import arrays, augmentations, batches, corruptions, pixels
from jevb_jax.images.shapes import shapes
from jevb_jax.images.source import ArraySource
from jevb_jax.networks.heads import DirectionalPrediction, Posterior
from jevb_jax.paper.objective import View
from jevb_jax.paper.scores import UncertaintyTerms, uncertainty_terms
from jevb_jax.report import tables
from jevb_jax.training.experiment import Experiment, build_experiment


def make_config(method: str = "jevb") -> Any:
    config: Any = importlib.import_module("configs.smoke").get_config()
    config.method = method
    config.data.num_train_examples = 150
    config.data.num_test_examples = 70
    config.augmentation.jitter_probability = 0.0  # takes long to compile
    config.augmentation.grayscale_probability = 0.0
    config.train.batch_size = 32
    config.train.health_every_steps = 0
    config.evaluation.batch_size = 64  # divides none of the splits
    config.evaluation.knn_k = (5,)
    config.evaluation.l2_grid = (1e-2,)
    config.evaluation.labels_per_class = 0
    config.evaluation.compare_untrained = False
    config.ood.corruptions = ("contrast",)
    config.ood.severities = (2, 5)
    config.ood.num_corrupted_images = 40
    config.ood.num_bootstrap = 5
    config.ood.max_fit_images = 120
    config.ood.knn_k = (5,)
    return config


@functools.cache
def tiny(method: str = "jevb") -> Experiment:
    return build_experiment(make_config(method))


@functools.cache
def variables(method: str = "jevb") -> Any:
    """Initial ones moved a little: at the start all posterior scales are equal."""
    initial = tiny(method).initial_state().evaluation_variables
    leaves, tree = jax.tree.flatten(initial["params"])
    rng = np.random.default_rng(0)
    moved = [x + 0.1 * jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves]
    return {**initial, "params": jax.tree.unflatten(tree, moved)}


@functools.cache
def extractors(method: str = "jevb") -> evaluate.Extractors:
    return evaluate.make_extractors(tiny(method))


fitted_scorers: dict[str, Scorers] = {}


@functools.cache
def evaluation(method: str = "jevb") -> tuple[dict[str, Any], Evaluation]:
    compiled = extractors(method)

    def make_and_keep(*arguments: Any) -> Scorers:
        fitted_scorers[method] = scoring.make_scorers(*arguments)
        return fitted_scorers[method]

    with (
        mock.patch.object(evaluate, "make_extractors", return_value=compiled),
        mock.patch.object(detection, "make_scorers", make_and_keep),
    ):
        return evaluate.evaluate(tiny(method), variables(method))


def found() -> OODEvaluation:
    result = evaluation()[1].ood
    assert result is not None
    return result


def outside_features() -> Any:
    """The first 40 test images at the worst contrast, extracted apart from the stream."""
    test = tiny().dataset.test
    assert test is not None
    images = batches.load_resident(test)[:40]
    corrupted = corruptions.corrupt(images, "contrast", severity=5, seed=0)
    extract = extractors().plain
    return extract(variables(), ArraySource(corrupted))


@pytest.mark.slow
def test_every_score_is_there_and_of_every_image():
    terms = ("negative_log_likelihood", "directional", "radial", "negative_elbo")
    terms += ("importance_weighted", "kl", "posterior_entropy", "cross_view")
    expected = {f"jevb/{name}" for name in terms}
    expected |= {"jevb/typicality_mahalanobis", "jevb/typicality_knn", "jevb/scale_mahalanobis"}
    expected |= {"jevb/mixture", "jevb/residual_mahalanobis", "jevb/mixture_and_residual"}
    scores = ("knn_5", "mahalanobis", "ssd_1", "residual", "norm")
    expected |= {f"{f}/{score}" for f in ("representation", "embedding") for score in scores}
    expected |= {"representation/ssd_published", "representation/mahalanobis_plus_plus"}
    probe = {
        "max_softmax",
        "max_logit",
        "energy",
        "class_mahalanobis",
        "mahalanobis_plus_plus",
        "relative_mahalanobis",
        "vim",
    }
    expected |= {f"probe/{name}" for name in probe}
    assert set(found().inside) | set(found().left_out) == expected
    assert found().with_labels == {f"probe/{name}" for name in probe}
    assert all(values.shape == (70,) for values in found().inside.values())
    assert set(found().outside) == {"contrast_2", "contrast_5"}
    assert all(v.shape == (40,) for scores in found().outside.values() for v in scores.values())
    assert all(np.isfinite(v).all() for v in found().inside.values())


@pytest.mark.slow
def test_scores_are_those_of_features_extracted_apart():
    outside = outside_features()
    streamed = found().outside["contrast_5"]
    np.testing.assert_allclose(
        streamed["embedding/norm"], -np.linalg.norm(outside.embedding, axis=1), rtol=1e-4
    )
    # Fitted to 120 of the training images, in float64.
    rows = np.sort(np.random.default_rng(0).permutation(150)[:120])
    train = evaluation()[1].train.embedding[rows].astype(np.float64)
    oracle = EmpiricalCovariance().fit(train)
    expected = oracle.mahalanobis(outside.embedding.astype(np.float64))
    np.testing.assert_allclose(streamed["embedding/mahalanobis"], expected, rtol=1e-2)


@pytest.mark.slow
def test_held_out_images_are_no_stranger_than_others():
    """No score may tell the test images from more images of the same kind."""
    more = shapes(300, seed=7, image_size=16)
    inside, train = found().inside, evaluation()[1].train
    held_out = scoring.score_images(
        extractors().with_terms, variables(), more, fitted_scorers["jevb"]
    )
    assert set(held_out) >= set(inside)
    level = 0.05 / len(inside)  # 5% for all scores together
    # This tests whether the AUROC is 0.5.
    for name, scores in inside.items():
        assert mannwhitneyu(scores, held_out[name]).pvalue > level, name
    # What the test is for: an image that a score is fitted to looks less strange.
    fitted = train.representation[detection.fit_rows(150, 120)]
    score = jax.jit(fit_knn(fitted, k=1).__call__)
    of_fitted, of_test = score(fitted), score(evaluation()[1].test.representation)
    assert mannwhitneyu(of_fitted, of_test).pvalue < level


@pytest.mark.slow
def test_no_score_is_fitted_to_an_image_that_it_scores():
    dataset: Any = tiny().dataset
    parts = [
        {image.tobytes() for image in batches.load_resident(part)}
        for part in (dataset.train, dataset.validation, dataset.test)
    ]
    assert [len(part) for part in parts] == [150, len(dataset.validation), 70]
    assert not parts[0] & (parts[1] | parts[2])
    asked = []

    def extract(_: Any, source: Any) -> Any:
        asked.append(batches.load_resident(source))
        return evaluation()[1].train

    detection.features_to_fit(tiny(), None, extract, evaluation()[1].train)  # pyright: ignore[reportArgumentType]
    (fitted,) = asked
    assert {image.tobytes() for image in fitted} <= parts[0]


@pytest.mark.slow
def test_crops_are_scored_as_other_images():
    test = tiny().dataset.test
    assert test is not None
    crops = corruptions.center_crops(batches.load_resident(test)[:40], seed=0)
    extract = extractors().plain
    again = extract(variables(), ArraySource(crops)).embedding
    norm = -np.linalg.norm(again, axis=1)
    np.testing.assert_allclose(found().cropped["embedding/norm"], norm, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.nightly
def test_terms_are_of_the_image_and_its_augmented_views():
    experiment = tiny()
    test = experiment.dataset.test
    assert test is not None
    images = batches.load_resident(test)[:3]
    view: Any = experiment.view_augmentations[0]
    # One draw for all images.
    keys = jnp.stack([jax.random.fold_in(jax.random.key(0), 0)] * 3)
    views = [
        jnp.stack(
            [pixels.center_view(x, size=view.size, mean=view.mean, std=view.std) for x in images]
        ),
        augmentations.augment(jax.vmap(jax.random.fold_in, (0, None))(keys, 1), images, view),
    ]
    outputs: Any = [experiment.model.apply(variables(), v, train=False) for v in views]
    stacked = View(
        *(
            jnp.stack([getattr(o, name) for o in outputs])
            for name in ("embedding", "posterior_mean", "posterior_scale")
        )
    )
    settings = experiment.jevb_settings
    radial_scale: Any = experiment.model.apply(variables(), method=experiment.model.radial_scale)
    expected = uncertainty_terms(
        jax.vmap(jax.random.fold_in, (0, None))(keys, 0),
        stacked,
        settings.likelihood_at(radial_scale),
        num_samples=2,
        prior_scale=settings.prior_scale,
    )
    terms: Any = evaluation()[1].test.terms
    for name, value in expected._asdict().items():
        np.testing.assert_allclose(getattr(terms, name)[:3], value, rtol=2e-3, err_msg=name)


@pytest.mark.slow
def test_metrics_compare_the_corrupted_images_with_themselves():
    (row,) = [
        r for r in found().results if (r.score, r.outside) == ("embedding/knn_5", "contrast_5")
    ]
    inside = found().inside["embedding/knn_5"][:40]
    outside = found().outside["contrast_5"]["embedding/knn_5"]
    expected = roc_auc_score(np.repeat([0, 1], 40), np.concatenate([inside, outside]))
    assert row.metrics.auroc == pytest.approx(expected, abs=1e-12)
    assert row.low is not None
    assert row.high is not None
    assert row.low.auroc <= row.metrics.auroc <= row.high.auroc
    assert "test (40)" in row.protocol
    assert "with contrast, severity 5 of 5 (40)" in row.protocol


@pytest.mark.slow
def test_results_json_and_csv_hold_every_number():
    results, _ = evaluation()
    rows = {(r["score"], r["outside"]): r for r in results["ood"]["rows"]}
    assert len(rows) == len(found().inside) * 2
    assert set(results["ood"]["sets"]) == {"contrast_2", "contrast_5"}
    assert results["ood"]["default_score"] == "jevb/mixture_and_residual"
    assert results["ood"]["chosen_score"] is None
    text = tables.results_csv(results)
    header, *lines = text.splitlines()
    assert header.startswith("encoder,features_or_score,measure,set,value,low,high")
    assert len(lines) == len(results["trained"]) + 5 * len(rows)
    value = rows["jevb/kl", "contrast_2"]["aupr_in"]
    assert any(f"trained,jevb/kl,aupr_in,contrast_2,{value!r}," in line for line in lines)
    (mean,) = [
        r["value"] for r in results["trained"]
        if (r["features"], r["name"]) == ("jevb/kl", "auroc_corrupted")
    ]  # fmt: skip
    both = [rows["jevb/kl", f"contrast_{s}"]["auroc"] for s in (2, 5)]
    assert mean == pytest.approx(np.mean(both), abs=1e-12)


@pytest.mark.slow
def test_uncertainty_is_checked_against_errors_and_severity():
    results, evaluated = evaluation()
    names = {r["name"] for r in results["trained"] if r["features"] == "jevb/kl"}
    assert {
        "error_auroc_5_nn", "error_auroc_linear", "area_under_risk_coverage_linear",
        "severity_correlation_contrast", "share_increased_contrast", "auroc_corrupted",
    } <= names  # fmt: skip
    errors = wrong_predictions(
        tiny().settings.evaluation, evaluated.train, evaluated.test, evaluated.probe
    )
    accuracy = {
        r["name"]: r["value"] for r in results["trained"] if r["features"] == "representation"
    }
    assert 1 - errors["5_nn"].mean() == pytest.approx(accuracy["knn_5_accuracy"])
    assert 1 - errors["linear"].mean() == pytest.approx(accuracy["linear_accuracy"])
    (value,) = [
        r["value"] for r in results["trained"]
        if (r["features"], r["name"]) == ("jevb/kl", "error_auroc_linear")
    ]  # fmt: skip
    assert value == pytest.approx(roc_auc_score(errors["linear"], found().inside["jevb/kl"]))
    # URL: R@1 within the test images, and its errors.
    unit = evaluated.test.representation.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    labels: Any = evaluated.test.labels
    nearest = np.argmax(unit @ unit.T - 3 * np.eye(70), axis=1)
    is_right = labels[nearest] == labels
    assert accuracy["r_at_1"] == pytest.approx(is_right.mean())
    of_kl = {r["name"]: r for r in results["trained"] if r["features"] == "jevb/kl"}
    assert of_kl["r_auroc"]["value"] == pytest.approx(
        roc_auc_score(~is_right, found().inside["jevb/kl"])
    )
    crops = found().cropped["jevb/kl"]
    assert of_kl["cropped_has_bigger_uncertainty"]["value"] == pytest.approx(
        np.mean(crops > found().inside["jevb/kl"][:40])
    )
    assert "first 40 images of test" in of_kl["cropped_has_bigger_uncertainty"]["protocol"]
    shares = {r["name"]: r["value"] for r in results["trained"] if "log_scale" in r["name"]}
    log_scale = np.log(np.asarray(evaluated.test.prediction.posterior_scale, np.float64))
    between_images = log_scale.mean(axis=1).var() / log_scale.var()
    assert shares["log_scale_image_share"] == pytest.approx(between_images, rel=1e-6)
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.slow
def test_tables_show_scores_with_and_without_labels():
    results, _ = evaluation()
    table = tables.detection_table(results)
    first = [str(cell) for cell in table.columns[0].cells]
    assert "jevb/mixture_and_residual *" in first
    assert first.index("jevb/kl") < first.index("probe/energy")
    assert len(first) == len(found().inside)
    names = [str(cell) for cell in tables.classification_table(results).columns[0].cells]
    assert set(names) == {"representation", "embedding"}


@pytest.mark.slow
def test_choice_sees_validation_images_only(tmp_path):
    # The chosen set is uniform noise; the score chosen must be the best on validation, without labels.
    noise = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "noise.npz", images=noise)
    config = make_config()
    config.ood.corruptions = ("contrast",)
    config.ood.severities = (5,)
    config.ood.choice = (
        {"name": "noise", "group": "far", "protocol": "noise", "source": "arrays",
         "paths": (str(tmp_path / "noise.npz"),)},
    )  # fmt: skip
    experiment = build_experiment(config)
    extractors = evaluate.make_extractors(experiment)
    chosen = evaluate.evaluate_variables(experiment, variables(), extractors).ood
    assert chosen is not None
    assert chosen.chosen_score is not None
    assert chosen.chosen_score not in chosen.with_labels
    assert "on validation" in chosen.choice_protocol
    assert "against noise" in chosen.choice_protocol
    assert "noise" not in chosen.outside


@pytest.mark.slow
def test_outside_sets_from_files_gray_ones_and_excluded_classes(tmp_path):
    gray = np.random.default_rng(0).integers(0, 256, (12, 20, 20, 1), np.uint8)
    labels = np.arange(12) % 3
    np.savez(tmp_path / "gray.npz", images=gray, labels=labels)
    outside = outside_sets.load_outside_set(
        name="gray", group="far", protocol="", source="arrays",
        paths=(str(tmp_path / "gray.npz"),), exclude_labels=(1,),
    )  # fmt: skip
    assert len(outside.source) == 8
    assert "gray.npz" in outside.protocol
    extract = extractors().plain
    found = extract(variables(), outside.source)
    again = extract(variables(), ArraySource(gray[labels != 1].repeat(3, axis=-1)))
    np.testing.assert_allclose(found.embedding, again.embedding, rtol=1e-5)
    four = ArraySource(np.zeros((2, 8, 8, 4), np.uint8))
    with pytest.raises(ValueError, match="has 4 channels, but the network was trained on 3"):
        extract(variables(), four)


def without_labels(table: dict[str, ScoreEntry]) -> dict[str, ScoreEntry]:
    return {name: entry for name, entry in table.items() if not entry.needs_labels}


# By what a score is made of, the only features of an image that it may read.
READ: dict[str, set[str]] = {
    "representation": {"representation"},
    "embedding": {"embedding"},
    "posterior": {"embedding", "prediction"},
    "terms": {"terms"},
    "cross_view": {"terms"},
    "concentration": {"prediction"},
}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "num_views"), [("jevb", 2), ("jevb", 1), ("vi_simsiam", 2)])
def test_an_entry_says_what_its_score_needs(method, num_views):
    random = np.random.default_rng(0)
    rows = jnp.asarray(random.normal(size=(6, 60)), jnp.float32)
    mean = jnp.asarray(random.normal(size=(60, 4)), jnp.float32)
    cross_view = rows[5] if num_views > 1 else None
    is_jevb = method == "jevb"
    whole = Features(
        random.normal(size=(60, 5)).astype(np.float32),
        random.normal(size=(60, 4)).astype(np.float32),
        Posterior(mean, jnp.exp(mean / 4)) if is_jevb else DirectionalPrediction(mean, rows[0]),
        UncertaintyTerms(*rows[:5], cross_view_log_likelihood=cross_view) if is_jevb else None,
        np.arange(60) % 2,
    )
    settings = ScoreSettings(knn_k=(5, 3), ssd_clusters=(1,), residual_share=0.5, mixture_df=5.0)
    table = score_table.score_table(method, settings, num_views=num_views)
    assert ("jevb/cross_view" in table) == (is_jevb and num_views > 1)
    assert ("vi_simsiam/concentration" in table) == (not is_jevb)
    assert {name for name, entry in table.items() if entry.needs_labels} == {
        name for name in table if name.startswith("probe/")
    }
    for name, entry in without_labels(table).items():
        hidden = {field: None for field in whole._fields if field not in READ[entry.made_of]}
        features = whole._replace(**hidden)
        train = TrainingData(features) if entry.is_fitted else None
        scores = entry.make(train)(features)
        assert scores.shape == (60,), name
        assert np.all(np.isfinite(scores)), name
        if entry.is_fitted:
            with pytest.raises(AttributeError):
                entry.make(None)
        assert entry.needs_views == (features.terms is not None and is_jevb), name


@pytest.mark.slow
def test_what_two_scores_share_is_fitted_once():
    random = np.random.default_rng(0)
    mean = jnp.asarray(random.normal(size=(60, 4)), jnp.float32)
    features = Features(None, mean + 1, Posterior(mean, jnp.exp(mean / 4)), None, None)
    settings = ScoreSettings(knn_k=(), ssd_clusters=(), residual_share=0.5, mixture_df=5.0)
    table = score_table.score_table("jevb", settings, num_views=1)
    train = TrainingData(features)
    both: Any = table["jevb/mixture_and_residual"].make(train)
    assert both.mixture is table["jevb/mixture"].make(train)
    assert both.residual is table["jevb/residual_mahalanobis"].make(train)
    assert not any(name.endswith("_knn") for name in table)


@pytest.mark.slow
def test_degenerate_features_leave_a_score_out_by_name():
    train = evaluation()[1].train
    constant = train._replace(embedding=np.ones_like(train.embedding), terms=None)
    settings = ScoreSettings(knn_k=(5,), ssd_clusters=(1,), residual_share=0.5, mixture_df=5.0)
    table = score_table.score_table("simsiam", settings, num_views=1)
    scorers = scoring.make_scorers(without_labels(table), TrainingData(constant))
    assert "do not vary" in scorers.left_out["embedding/mahalanobis"]
    assert "representation/mahalanobis" in scorers.scores


def test_tables_share_the_programs_of_what_they_have_in_common():
    def of_image(features: Features) -> Any:
        return jnp.sum(jnp.asarray(features.representation), axis=1)

    def of_views(features: Features) -> Any:
        return jnp.asarray(features.terms)

    def twice(features: Features) -> Any:
        return 2 * of_image(features)

    scores: dict[str, Any] = {
        "a": jax.tree_util.Partial(of_views),
        "b": jax.tree_util.Partial(of_image),
        "c": jax.tree_util.Partial(twice),
    }
    whole = Scorers(scores, frozenset("c"), {}, frozenset("a"))
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    terms: Any = np.array([7, 8, 9], np.float32)
    with_terms = Features(values, values, prediction=None, terms=terms, labels=None)
    plain = with_terms._replace(terms=None)

    def num_compiled(features: Features, names: str) -> int:
        scorers = whole._replace(scores={name: scores[name] for name in names})
        group: Any = scoring._score_group
        before = group._cache_size()
        found = scoring.score_features(features, scorers, batch_size=2)
        assert list(found) == list(names)
        expected = {"a": terms, "b": values.sum(1), "c": 2 * values.sum(1)}
        for name in names:
            np.testing.assert_array_equal(found[name], expected[name])
        return group._cache_size() - before

    assert num_compiled(with_terms, "abc") == 3
    assert num_compiled(with_terms, "ab") == 0
    assert num_compiled(plain, "b") == 0
    assert num_compiled(plain, "cb") == 0


def test_a_score_that_is_no_number_is_left_out_by_name(monkeypatch):
    numbers, row = np.arange(4.0), np.array([0, np.nan, 2, 3])
    scored = {"a/good": numbers, "a/inside": row, "a/outside": numbers, "a/crops": numbers}
    scorers = Scorers(dict.fromkeys(scored, lambda x: x), frozenset(), {})
    sets = [
        OutsideSet(name, "far", ArraySource(np.zeros((4, 8, 8, 3), np.uint8)), "")
        for name in ("first", "second")
    ]
    outside = iter(
        [scored | {"a/inside": numbers}, scored | {"a/inside": numbers, "a/outside": row}]
    )
    for name, value in (
        ("features_to_fit", None),
        ("make_scorers", scorers),
        ("score_features", scored),
        ("_sets", sets),
        ("_choose", (None, "")),
        ("_score_crops", scored | {"a/inside": numbers, "a/crops": row}),
    ):
        monkeypatch.setattr(detection, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(detection, "score_images", lambda *_: next(outside))
    settings = tiny().settings
    settings = dataclasses.replace(
        settings, ood=dataclasses.replace(settings.ood, default_score="a/good")
    )
    unused: Any = None
    found = detection.evaluate_ood(
        dataclasses.replace(tiny(), settings=settings), unused, extract=unused, train=unused,
        inside=unused, inside_source=unused, probe=None, split="test",
    )  # fmt: skip
    assert [(r.score, r.outside) for r in found.results] == [("a/good", s.name) for s in sets]
    assert set(found.inside) == {"a/good"}
    assert all(set(scores) == {"a/good"} for scores in found.outside.values())
    assert found.left_out["a/inside"].startswith("1 of 4 scores of inside images are NaN")
    assert set(found.cropped) == {"a/good"}
    assert found.left_out["a/crops"].startswith("1 of 4 scores of cropped images are NaN")
    assert found.left_out["a/outside"].startswith("1 of 4 scores of outside images are NaN")


def test_settings_of_scores_are_counts_and_shares():
    good: Any = {"knn_k": (5,), "ssd_clusters": (1,), "residual_share": 0.5, "mixture_df": 5.0}
    for change in (
        {"knn_k": (5.0,)}, {"knn_k": (0,)}, {"ssd_clusters": (True,)}, {"residual_share": 1.0},
        {"mixture_df": 0.0}, {"mixture_df": True}, {"mixture_df": None}, {"mixture_df": (5.0,)},
        {"knn_k": 5}, {"ssd_clusters": np.int64(1)}, {"knn_k": "5"},
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=f"ood.{next(iter(change))} must be"):
            ScoreSettings(**{**good, **change})
    found = ScoreSettings(**{**good, "knn_k": (np.int64(5),)})
    assert type(found.knn_k[0]) is int
    whole = ScoreSettings(**{**good, "residual_share": np.float32(0.99)})
    assert [whole.num_components(np.zeros((3, width))) for width in (2, 8, 200)] == [1, 7, 198]
    for most, error in ((-1, ValueError), (5.0, TypeError)):
        with pytest.raises(error, match="max_fit_images must be"):
            detection.fit_rows(10, most)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_more_neighbours_than_images_leave_a_score_out():
    train = evaluation()[1].train
    few = jax.tree.map(lambda x: x[:100], train._replace(terms=None, prediction=None))
    settings = ScoreSettings(
        knn_k=(5, 500), ssd_clusters=(1, 80), residual_share=0.5, mixture_df=5.0
    )
    table = score_table.score_table("simsiam", settings, num_views=1)
    scorers = scoring.make_scorers(without_labels(table), TrainingData(few))
    assert "k must be in [1, 100]" in scorers.left_out["embedding/knn_500"]
    assert "num_clusters must be in [1, 50]" in scorers.left_out["embedding/ssd_80"]
    assert "embedding/knn_5" in scorers.scores
    nothing = few._replace(**{k: getattr(few, k)[:0] for k in ("representation", "embedding")})
    empty = scoring.score_features(nothing, scorers, batch_size=64)
    assert {values.shape for values in empty.values()} == {(0,)}


def of_digits(**data: Any) -> Experiment:
    config = make_config()
    config.data.num_train_examples = 0
    config.data.source = "digits"
    config.data.image_size = 0
    config.data.num_test_examples = 0
    config.data.update(data)
    config.augmentation.mean, config.augmentation.std = (0.3,), (0.3,)
    config.augmentation.saturation = config.augmentation.hue = 0.0
    config.augmentation.grayscale_probability = 0.0
    config.ood.corruptions = ()
    return build_experiment(config)


def test_one_class_leaves_the_other_classes_outside():
    dataset: Any = of_digits(inlier_class=3).dataset
    assert dataset.train.labels is None
    digits = arrays.digits()
    of_three = int(np.sum(digits.labels == 3))
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == of_three
    assert np.all(dataset.outside.labels != 3)


def test_other_classes_are_detected_on_images_of_the_evaluated_split():
    dataset: Any = of_digits(inlier_classes=(1, 3, 4, 6, 9)).dataset
    tested = outside_sets.other_classes(dataset, "test")
    chosen_on = outside_sets.other_classes(dataset, "validation")
    assert tested is not None
    assert chosen_on is not None
    assert tested.protocol == "the test images of the other classes"
    assert chosen_on.protocol == "the validation images of the other classes"
    assert tested.source is dataset.outside
    assert set(chosen_on.source.labels) == {0, 2, 5, 7, 8}  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no validation image of the classes that are left out"):
        outside_sets.other_classes(dataset._replace(outside_validation=None), "validation")


def test_the_evaluation_detects_other_classes_in_its_own_split():
    experiment = of_digits(inlier_classes=(1, 3, 4, 6, 9))
    dataset: Any = experiment.dataset
    (found,) = detection._sets(experiment, dataset.validation, "validation")
    assert found.source is not dataset.outside
    images = batches.load_resident(found.source)
    tested = batches.load_resident(dataset.outside)
    assert not set(map(bytes, images)) & set(map(bytes, tested))


@pytest.mark.slow
@pytest.mark.nightly
def test_one_class_is_detected_without_labels():
    experiment = of_digits(inlier_class=3)
    initial = experiment.initial_state().evaluation_variables
    found = evaluate.evaluate_variables(experiment, initial, evaluate.make_extractors(experiment))
    assert found.ood is not None
    assert set(found.ood.outside) == {"other_classes"}
    assert found.probe is None
    shares = {f"log_scale_{name}_share" for name in ("feature", "image", "interaction")}
    measures = {"auroc_other_classes", "cropped_has_bigger_uncertainty"}
    assert {row["name"] for row in found.results} == measures | shares


@pytest.mark.slow
@pytest.mark.nightly
def test_adjacent_classes_are_outside_and_the_rest_is_classified():
    experiment = of_digits(inlier_classes=(1, 3, 4, 6, 9))
    initial = experiment.initial_state().evaluation_variables
    found = evaluate.evaluate_variables(experiment, initial, evaluate.make_extractors(experiment))
    assert found.ood is not None
    assert found.probe is not None
    assert found.probe.weights.shape[1] == 5
    dataset: Any = experiment.dataset
    assert len(dataset.outside) + len(dataset.test) == 359
    assert {v.shape for v in found.ood.outside["other_classes"].values()} == {
        (len(dataset.outside),)
    }
    values = {row["name"]: row["value"] for row in found.results}
    assert {"auroc_other_classes", "r_at_1", "r_auroc", "error_auroc_linear"} <= values.keys()
    assert values["linear_accuracy"] > 0.5  # of five classes


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [pytest.param("vi_simsiam", marks=pytest.mark.nightly), "simsiam"]
)
def test_other_methods_have_their_scores(method):
    results, evaluated = evaluation(method)
    assert evaluated.ood is not None
    assert evaluated.test.terms is None
    assert ("vi_simsiam/concentration" in evaluated.ood.inside) == (method == "vi_simsiam")
    assert not any(name.startswith("jevb/") for name in evaluated.ood.inside)
    default = {"vi_simsiam": "vi_simsiam/concentration", "simsiam": "embedding/mahalanobis"}
    assert results["ood"]["default_score"] == default[method]


def test_settings_are_checked_before_training():
    for key, value, message in (
        (
            "corruptions",
            ("fog",),
            "ood.corruptions must be a tuple of values, each one of contrast",
        ),
        (
            "severities",
            (0,),
            "ood.severities must be a tuple of values, each an integer from 1 to 5",
        ),
        ("num_views", 0, "ood.num_views must be an integer of at least 1"),
        ("residual_share", 1.0, "ood.residual_share must be a number in"),
    ):
        config = make_config()
        config.ood[key] = value
        with pytest.raises(ValueError, match=message):
            build_experiment(config)
    unknown = dataclasses.replace(
        tiny(),
        settings=dataclasses.replace(
            tiny().settings,
            ood=dataclasses.replace(tiny().settings.ood, default_score="no/such"),
        ),
    )
    with pytest.raises(ValueError, match=r"ood\.default_score must be one of"):
        evaluate.evaluate_variables(unknown, variables(), evaluate.make_extractors(tiny()))
