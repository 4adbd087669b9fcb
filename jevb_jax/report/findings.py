"""What the results of a run say, in sentences: learned or not, which score to use, health."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jevb_jax.evaluation.accuracy import left_out_lines
from jevb_jax.training.alarms import AlarmPeriod

# What an alarm means for a reader who does not know its name.
_MEANINGS = {
    "collapse": "the embeddings have collapsed: they use few directions, or one point",
    "posterior_is_prior": (
        "the posterior is the prior, whatever the image, so its uncertainty says nothing"
    ),
    "scale_at_floor": "posterior scales lie at their floor, which sets them instead of the images",
    "radius_drift": "the radius of the embeddings, or its likelihood, has left its range",
    "concentration": "the predicted distributions are all uniform or all points",
    "no_information": (
        "the likelihood of a view given the other is worse than the uniform density, which the "
        "default settings of jevb can bring about"
    ),
}
# Differences of this many standard errors are not left to chance.
_STANDARD_ERRORS = 2.0
# An AUROC of 0.5 is chance. Up to this value a score is called useless.
_USELESS_AUROC = 0.55
# If no set is found better than this, the score is not advised.
_WEAK_AUROC = 0.6
# Smaller differences of an AUROC are not mentioned.
_SMALL_AUROC = 0.02


class _Comparison(NamedTuple):
    """An accuracy after and before training.

    Attributes:
      text: the two numbers, in words.
      verdict: 1 for higher than before by more than chance, -1 for lower, 0 for neither; None if the
        accuracy before training is not known.
    """

    text: str
    verdict: int | None


def findings(
    results: Mapping[str, Any], *, num_images: int, alarms: Sequence[AlarmPeriod] | None
) -> list[str]:
    """Says in words what happened in a run, the most important first.

    Args:
      results: the content of `results.json`.
      num_images: number of images of the reported split.
      alarms: alarms that were raised in training; None if there were no health checks.

    Returns:
      Sentences; none if nothing was measured.
    """
    told = [*_learning(results, num_images), *_detection(results)]
    if alarms is None:
        return [*told, *([_NOT_CHECKED] if told else [])]
    health = _health(alarms)
    is_collapsed = any(one.name == "collapse" and one.is_standing for one in alarms)
    return [*health, *told] if is_collapsed else [*told, *health]


_NOT_CHECKED = "The health of the training was not checked (train.health_every_steps)."


def _learning(results: Mapping[str, Any], num_images: int) -> list[str]:
    found = [
        comparison
        for prefix, name in (("linear", "a linear probe"), ("knn", "k-NN"))
        if (comparison := _comparison(results, prefix, name, num_images)) is not None
    ]
    if not found:
        return left_out_lines(results["left_out"]) if results.get("left_out") else []
    numbers = f"Accuracy of the representation: {'; '.join(one.text for one in found)}."
    verdicts = {one.verdict for one in found}
    if None in verdicts:
        return [
            "Whether it learned is not known: the encoder before training was not evaluated "
            f"(evaluation.compare_untrained). {numbers}"
        ]
    if verdicts == {1}:
        return [f"It learned. {numbers}"]
    if 1 in verdicts:
        others = "is lower than" if -1 in verdicts else "is within chance of what it was"
        return [f"It learned by one measure alone; the other {others} before training. {numbers}"]
    if -1 in verdicts:
        return [f"It did not learn: the encoder was better before training. {numbers}"]
    return [
        f"It did not learn: the difference from the untrained encoder is within what chance gives "
        f"with {num_images:,} images. {numbers}"
    ]


def _comparison(
    results: Mapping[str, Any], prefix: str, name: str, num_images: int
) -> _Comparison | None:
    """The first accuracy of a kind, those with few labels left out."""

    def first(encoder: str) -> Mapping[str, Any] | None:
        rows = (
            row
            for row in results.get(encoder, ())
            if row["features"] == "representation"
            and row["name"].startswith(f"{prefix}_")
            and row["name"].endswith("_accuracy")
            and "labels_per_class" not in row["name"]
        )
        return next(rows, None)

    after, before = first("trained"), first("untrained")
    if after is None:
        return None
    value = after["value"]
    if before is None or before["name"] != after["name"]:
        return _Comparison(f"{name} {value:.3f}", None)
    old = before["value"]
    margin = _STANDARD_ERRORS * math.sqrt((value * (1 - value) + old * (1 - old)) / num_images)
    verdict = 0 if abs(value - old) <= margin else int(math.copysign(1, value - old))
    return _Comparison(f"{name} {value:.3f}, before training {old:.3f}", verdict)


def _detection(results: Mapping[str, Any]) -> list[str]:
    if "ood" not in results:
        return []
    found = results["ood"]
    wanted = (
        {found["chosen_score"]: "chosen on other outside sets"} if found["chosen_score"] else {}
    )
    wanted.setdefault(found["default_score"], "the default score")
    measured = [name for name in wanted if _aurocs(results, "trained", name)]
    # A score that was wanted and is missing must not go unsaid; the next one takes its place.
    missing = list(wanted)[: list(wanted).index(measured[0])] if measured else list(wanted)
    without = found.get("left_out", {})
    left_out = [
        f"{name}, {wanted[name]}, was left out: {without[name]}"
        + ("" if without[name].endswith((".", "?")) else ".")
        for name in missing
        if name in without
    ]
    return [*left_out, *(_advice(results, name, wanted[name]) for name in measured[:1])]


def _advice(results: Mapping[str, Any], score: str, why: str) -> str:
    """Whether to use a score, from its AUROCs."""
    after, before = (_aurocs(results, encoder, score) for encoder in ("trained", "untrained"))
    values = ", ".join(f"{group} {value:.3f}" for group, value in after.items())
    told = (
        f"To find images unlike those of the training, use {score}, {why}. "
        f"Its AUROC: {values} (0.5 is chance)."
    )
    useless = [group for group, value in after.items() if value <= _USELESS_AUROC]
    if len(useless) == len(after):
        told = (
            f"No score is advised: {score}, {why}, does not find images unlike those of the "
            f"training. Its AUROC: {values} (0.5 is chance)."
        )
    elif max(after.values()) <= _WEAK_AUROC:
        told = (
            f"No score is advised: {score}, {why}, hardly finds images unlike those of the training. "
            f"Its AUROC: {values} (0.5 is chance)."
        )
    elif useless:
        told += f" It is of no use against: {', '.join(useless)}."
    lower = [
        f"{group} {before[group]:.3f}"
        for group in after
        if before.get(group, 0) > after[group] + _SMALL_AUROC
    ]
    if lower:
        told += f" With the encoder before training it had more: {', '.join(lower)}."
    told += (
        " Do not pick the best score of the table: it was measured on the same images. Outside images "
        "of your own can choose one (ood.choice)."
    )
    return told


def _aurocs(results: Mapping[str, Any], encoder: str, score: str) -> dict[str, float]:
    return {
        row["name"].removeprefix("auroc_").replace("_", " "): row["value"]
        for row in results.get(encoder, ())
        if row["features"] == score and row["name"].startswith("auroc_")
    }


def _health(alarms: Sequence[AlarmPeriod]) -> list[str]:
    if not alarms:
        return ["No health alarm was raised."]
    standing = list(dict.fromkeys(one.name for one in alarms if one.is_standing))
    cleared = list(dict.fromkeys(one.name for one in alarms if one.name not in standing))
    told = []
    if standing:
        meanings = "; ".join(_meaning(name) for name in standing)
        told.append(f"Not healthy at the end: {meanings}.")
    if cleared:
        meanings = "; ".join(_meaning(name) for name in cleared)
        told.append(f"Not healthy for a time, and cleared later: {meanings}.")
    return told


def _meaning(name: str) -> str:
    """What an alarm means; its name for one of another version, which has no meaning here."""
    return _MEANINGS.get(name, f'the alarm "{name}"')
