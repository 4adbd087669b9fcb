"""What of a run's evaluation goes onto its HTML page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jevb_jax import data
from jevb_jax.evaluation import classification, uncertainty
from jevb_jax.evaluation.ood_protocol import CORRUPTED, OODEvaluation
from jevb_jax.evaluation.protocol import (
    FEATURE_NAMES,
    Evaluation,
    evaluated_split,
    wrong_predictions,
)
from jevb_jax.experiment import Experiment
from jevb_jax.networks import Posterior
from jevb_jax.report import page as html_report

_NUM_GALLERY = 16
_NUM_QUERIES = 4
_NUM_NEIGHBOURS = 8
_NUM_MAPPED = 2000
_MOST_DRAWN_SETS = 6
# Drawn beside the score fixed before: the one that tells where a likelihood alone goes wrong.
_PATHOLOGY = "jevb/negative_elbo"
# What "uncertain" means where nothing is to be detected: other methods have their default score alone.
_UNCERTAINTY_SCORES = {"jevb": "jevb/posterior_entropy"}


def _evaluated_source(experiment: Experiment) -> data.ImageSource:
    return evaluated_split(experiment.config["evaluation"], experiment.dataset)[1]


def _headline(results: Mapping[str, Any]) -> list[html_report.Number]:
    wanted = [
        row
        for row in results["trained"]
        if row["features"] == "representation" and row["name"].endswith("_accuracy")
    ][:3]
    if "ood" in results:
        default = results["ood"]["default_score"]
        wanted += [
            row
            for row in results["trained"]
            if row["features"] == default and row["name"].startswith("auroc_")
        ]
    return [
        html_report.Number(
            f"{row['name'].replace('_', ' ')}, {row['features']}",
            f"{row['value']:.3f}",
            row["protocol"],
        )
        for row in wanted
    ]


def _rows(results: Mapping[str, Any]) -> list[html_report.ResultRow]:
    before = {(row["features"], row["name"]): row["value"] for row in results.get("untrained", [])}
    return [
        html_report.ResultRow(
            row["name"],
            row["features"],
            row["value"],
            row["protocol"],
            before.get((row["features"], row["name"])),
        )
        for row in results["trained"]
        if row["features"] in FEATURE_NAMES  # scores have sections of their own
    ]


def _drawn_sets(found: OODEvaluation, score: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Sets for histograms: those from elsewhere, then corruptions at their worst severity."""
    corrupted = {result.outside for result in found.results if result.group == CORRUPTED}
    worst = max(config["ood"]["severities"], default=0)
    names = [name for name in found.outside if name not in corrupted]
    names += [name for name in found.outside if name in corrupted and name.endswith(f"_{worst}")]
    return {name: found.outside[name][score] for name in names[:_MOST_DRAWN_SETS]}


def _detection(found: OODEvaluation, config: Mapping[str, Any]) -> html_report.OodPart:
    rows = [
        html_report.OodRow(
            score=result.score,
            outside_set=result.outside,
            group=result.group,
            auroc=result.metrics.auroc,
            auroc_interval=(
                None
                if result.low is None or result.high is None
                else (result.low.auroc, result.high.auroc)
            ),
            aupr_out=result.metrics.aupr_out,
            aupr_in=result.metrics.aupr_in,
            fpr95_out=result.metrics.fpr95_outside_positive,
            fpr95_in=result.metrics.fpr95_inside_positive,
        )
        for result in found.results
    ]
    drawn = dict.fromkeys(
        name for name in (found.default_score, found.chosen_score, _PATHOLOGY) if name
    )
    samples = [
        html_report.ScoreSample(name, found.inside[name], _drawn_sets(found, name, config))
        for name in drawn
        if name in found.inside
    ]
    sentences = [
        f"Protocol: {config['ood']['name']}.",
        f"Default score of the method: {found.default_score}.",
    ]
    if found.chosen_score:
        sentences.append(f"Chosen: {found.chosen_score}, {found.choice_protocol}.")
    sentences += [f"Left out: {name}, {reason}." for name, reason in found.left_out.items()]
    return html_report.OodPart(rows, samples, " ".join(sentences))


def _uncertainty(
    experiment: Experiment, evaluation: Evaluation, score: str
) -> html_report.UncertaintyPart:
    found = evaluation.ood
    if found is None:
        raise ValueError("nothing was scored")
    scores = found.inside[score]
    numbers = [
        html_report.Number(row["name"].replace("_", " "), f"{row['value']:.3f}", row["protocol"])
        for row in evaluation.results
        if row["features"] == score and not row["name"].startswith("auroc_")
    ]
    curves = []
    for classifier, is_error in wrong_predictions(
        experiment.config["evaluation"], evaluation.train, evaluation.test, evaluation.probe
    ).items():
        curve = uncertainty.risk_coverage_curve(scores, is_error)
        curves.append(html_report.RiskCoverage(classifier, curve.coverage, curve.risk))
    severities = experiment.config["ood"]["severities"]
    severity = []
    for corruption in experiment.config["ood"]["corruptions"]:
        corrupted = [found.outside[f"{corruption}_{level}"][score] for level in severities]
        values = np.stack([scores[: len(corrupted[0])], *corrupted])
        lower, upper = np.quantile(values, (0.25, 0.75), axis=1)
        severity.append(
            html_report.SeverityCurve(
                corruption, np.array([0, *severities]), values.mean(axis=1), lower, upper
            )
        )
    return html_report.UncertaintyPart(score, numbers, curves, severity)


def _class_names(source: data.ImageSource) -> tuple[str, ...]:
    if source.labels is None:
        return ()
    return source.class_names or tuple(map(str, range(data.num_classes(source))))


def _neighbours(experiment: Experiment, evaluation: Evaluation) -> list[html_report.Neighbours]:
    """Training images nearest to the first few evaluated ones."""
    source, bank = _evaluated_source(experiment), experiment.dataset.train
    count = min(_NUM_NEIGHBOURS, len(bank))
    cosine, index = classification.nearest_neighbours(
        evaluation.train.representation,
        evaluation.test.representation[:_NUM_QUERIES],
        k=count,
    )
    names, labels, bank_labels = _class_names(bank), source.labels, bank.labels
    return [
        html_report.Neighbours(
            source[query],
            None if labels is None else names[labels[query]],
            data.gather(bank, np.asarray(index[query])),
            None
            if bank_labels is None
            else [names[bank_labels[i]] for i in np.asarray(index[query])],
            np.asarray(cosine[query]),
        )
        for query in range(len(index))
    ]


def _gallery(
    experiment: Experiment, evaluation: Evaluation, score: str | None
) -> html_report.GalleryPart:
    neighbours = _neighbours(experiment, evaluation)
    if score is None or evaluation.ood is None:
        return html_report.GalleryPart(neighbours=neighbours)
    source = _evaluated_source(experiment)
    values = evaluation.ood.inside[score]
    order = np.argsort(-values, kind="stable")
    names = _class_names(experiment.dataset.train)

    def captioned(rows: np.ndarray) -> html_report.CaptionedImages:
        labels = source.labels
        captions = [
            f"{values[row]:.3g}" if labels is None else f"{names[labels[row]]}, {values[row]:.3g}"
            for row in rows
        ]
        return html_report.CaptionedImages(data.gather(source, rows), captions)

    return html_report.GalleryPart(
        score, captioned(order[:_NUM_GALLERY]), captioned(order[::-1][:_NUM_GALLERY]), neighbours
    )


def _map(experiment: Experiment, evaluation: Evaluation, score: str | None) -> html_report.MapPart:
    labels = evaluation.test.labels
    found = evaluation.ood
    values = None if score is None or found is None else found.inside[score][:_NUM_MAPPED]
    return html_report.MapPart(
        html_report.embedding_map(evaluation.test.embedding[:_NUM_MAPPED]),
        None if labels is None else labels[:_NUM_MAPPED],
        _class_names(experiment.dataset.train),
        values,
        score or "",
    )


def _extended_at(results: Mapping[str, Any]) -> str:
    """Where a run that was to be shorter was extended, for its subtitle."""
    if "earlier_lengths" not in results:
        return ""
    steps = ", ".join(f"{length['until_step']:,}" for length in results["earlier_lengths"])
    return f", extended at step {steps}"


def write_run_report(
    path: Path,
    *,
    experiment: Experiment,
    evaluation: Evaluation,
    results: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    alarms: Sequence[html_report.Alarm] | None,
    environment: Mapping[str, Any],
) -> None:
    """Writes the page of a run, whole or not at all.

    Args:
      path: HTML file to write.
      experiment: data, networks and settings.
      evaluation: what was measured of the trained encoder.
      results: as `results.json` has them, with "step".
      records: lines of `metrics.jsonl`.
      alarms: that were raised in training; None where nothing watched.
      environment: as `environment.json` has it.
    """
    config = experiment.config
    found = evaluation.ood
    score = None
    if found is not None:
        wanted = _UNCERTAINTY_SCORES.get(config["method"], found.default_score)
        score = wanted if wanted in found.inside else None
    prediction = evaluation.test.prediction
    scale = None
    if isinstance(prediction, Posterior):
        scale = html_report.ScalePart(
            np.asarray(prediction.posterior_scale)[:_NUM_MAPPED], config["jevb"]["prior_scale"]
        )
    html_report.write_html_report(
        path,
        html_report.RunReport(
            title=f"{config['method']} on {experiment.dataset.train.name}",
            subtitle=f"step {results['step']:,}, {results['split']} split" + _extended_at(results),
            headline=_headline(results),
            alarms=alarms,
            results=_rows(results),
            ood=None if found is None else _detection(found, config),
            uncertainty=None if score is None else _uncertainty(experiment, evaluation, score),
            gallery=_gallery(experiment, evaluation, score),
            embedding_map=_map(experiment, evaluation, score),
            posterior_scale=scale,
            records=records,
            command=environment["command"],
            config=config,
            environment={name: value for name, value in environment.items() if name != "command"},
        ),
    )
