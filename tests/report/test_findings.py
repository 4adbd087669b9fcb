"""The sentences at the top of a report, on made-up results."""

import itertools
from typing import Any

import pytest

from jevb_jax.report import findings as module
from jevb_jax.report.findings import findings
from jevb_jax.training import alarms as alarms_module
from jevb_jax.training.alarms import AlarmPeriod, alarm_history


def rows(features: str = "representation", **values: float) -> list[dict[str, Any]]:
    return [
        {"features": features, "name": name, "value": value, "protocol": "p"}
        for name, value in values.items()
    ]


def told(
    trained: list[dict[str, Any]],
    untrained: list[dict[str, Any]] | None = None,
    *,
    num_images: int = 100,
    alarms: tuple[AlarmPeriod, ...] | None = (),
    **others: Any,
) -> list[str]:
    results = {"step": 1, "split": "test", "trained": trained, **others}
    if untrained is not None:
        results["untrained"] = untrained
    return findings(results, num_images=num_images, alarms=alarms)


def accuracies(linear: float, knn: float) -> list[dict[str, Any]]:
    decoys = rows("embedding", linear_accuracy=0.0, knn_20_accuracy=0.0)
    few = rows(linear_10_labels_per_class_accuracy=0.0)
    later = rows(knn_200_accuracy=0.0, knn_10_uniform_accuracy=0.0)
    return [*decoys, *few, *rows(knn_20_accuracy=knn, linear_accuracy=linear), *later]


@pytest.mark.parametrize(
    ("after", "before", "beginning"),
    [
        ((0.9, 0.8), (0.5, 0.5), "It learned. "),
        ((0.5, 0.5), (0.5, 0.45), "It did not learn: the difference from the untrained encoder"),
        ((0.5, 0.3), (0.9, 0.3), "It did not learn: the encoder was better before training. "),
        ((0.9, 0.5), (0.5, 0.5), "It learned by one measure alone; the other is within chance of"),
        ((0.9, 0.2), (0.5, 0.5), "It learned by one measure alone; the other is lower than before"),
    ],
)
def test_learned_or_not(after, before, beginning):
    first, last = told(accuracies(*after), accuracies(*before))
    assert first.startswith(beginning)
    assert first.endswith(
        f" Accuracy of the representation: a linear probe {after[0]:.3f}, before training "
        f"{before[0]:.3f}; k-NN {after[1]:.3f}, before training {before[1]:.3f}."
    )
    assert last == "No health alarm was raised."


def test_what_counts_as_chance_shrinks_with_the_number_of_images():
    # Two standard errors of the difference: 2 sqrt(0.5 (1 - 0.5) 2 / N), a bit less off 0.5.
    for num_images, margin in ((100, 0.1414), (10_000, 0.01414)):
        for share, beginning in ((0.9, "It did not learn"), (1.1, "It learned. ")):
            after = rows(linear_accuracy=0.5 + share * margin)
            first, _ = told(after, rows(linear_accuracy=0.5), num_images=num_images)
            assert first.startswith(beginning)
    first, _ = told(rows(linear_accuracy=0.5), rows(linear_accuracy=0.5), num_images=12_345)
    assert "what chance gives with 12,345 images" in first


def test_accuracies_at_the_ends_and_without_a_twin():
    assert told(accuracies(1.0, 1.0), accuracies(1.0, 1.0))[0].startswith("It did not learn: the d")
    assert told(accuracies(1.0, 1.0), accuracies(0.0, 0.0))[0].startswith("It learned. ")
    for untrained in (None, [], rows("jevb/kl", auroc_far=0.5)):
        first, _ = told(accuracies(0.9, 0.8), untrained)
        assert first == (
            "Whether it learned is not known: the encoder before training was not evaluated "
            "(evaluation.compare_untrained). Accuracy of the representation: a linear probe 0.900; "
            "k-NN 0.800."
        )


def test_without_labels_the_reason_is_told():
    reason = dict.fromkeys(("knn_accuracy", "linear_accuracy"), "the images have no labels")
    assert told([], left_out=reason) == [
        "Not evaluated: knn_accuracy, linear_accuracy: the images have no labels.",
        "No health alarm was raised.",
    ]
    assert told([], left_out={}) == ["No health alarm was raised."]
    assert told([], alarms=None) == []


def detection(chosen: str | None = None) -> dict[str, Any]:
    return {"default_score": "jevb/mixture", "chosen_score": chosen, "choice": "c"}


def test_which_score_to_use():
    trained = [
        *rows("jevb/mixture", auroc_near=0.6, auroc_far=0.875, error_auroc_linear=0.1),
        *rows("probe/vim", auroc_near=0.99, auroc_far=0.99),
    ]
    (sentence, _) = told(trained, ood=detection())
    assert sentence.startswith(
        "To find images unlike those of the training, use jevb/mixture, the default score. "
        "Its AUROC: near 0.600, far 0.875 (0.5 is chance). Do not pick"
    )
    assert "vim" not in sentence
    before = rows("jevb/mixture", auroc_near=0.7, auroc_far=0.8)
    (sentence, _) = told(trained, before, ood=detection())
    assert " With the encoder before training it had more: near 0.700. " in sentence
    (sentence, _) = told(trained, before, ood=detection("probe/vim"))
    assert (
        "use probe/vim, chosen on other outside sets. Its AUROC: near 0.990, far 0.990 ("
        in sentence
    )


@pytest.mark.parametrize("score", ["vi_simsiam/concentration", "embedding/mahalanobis"])
def test_scores_of_other_methods_and_scores_that_find_nothing(score):
    ood = detection() | {"default_score": score}
    (sentence, _) = told(rows(score, auroc_near=0.55, auroc_far=0.9), ood=ood)
    assert f"use {score}, the default score. " in sentence
    assert " It is of no use against: near. " in sentence
    (sentence, _) = told(rows(score, auroc_near=0.5, auroc_far=0.2), ood=ood)
    assert sentence.startswith(f"No score is advised: {score}, the default score, does not find")
    (sentence, _) = told(rows(score, auroc_near=0.58, auroc_far=0.6), ood=ood)
    assert sentence.startswith(f"No score is advised: {score}, the default score, hardly finds")
    assert told(rows("another", auroc_near=0.9), ood=ood) == ["No health alarm was raised."]


def test_a_score_that_was_left_out_is_named_and_the_default_one_takes_its_place():
    ood = detection("a/chosen") | {"left_out": {"a/chosen": "3 of 9 scores are NaN. Why?"}}
    first, second, _ = told(rows("jevb/mixture", auroc_far=0.9), ood=ood)
    assert (
        first == "a/chosen, chosen on other outside sets, was left out: 3 of 9 scores are NaN. Why?"
    )
    assert "use jevb/mixture, the default score. " in second
    ood = detection() | {"left_out": {"jevb/mixture": "the features do not vary"}}
    first, _ = told(rows("another", auroc_far=0.9), ood=ood)
    assert first == "jevb/mixture, the default score, was left out: the features do not vary."
    both = ood | {"chosen_score": "a/chosen", "left_out": {"a/chosen": "r", "jevb/mixture": "s"}}
    assert len(told([], ood=both)) == 3


def collapsed(*effective_rank: float) -> list[AlarmPeriod]:
    records = [
        {"step": 100 * step, "health/embedding_std": 0.9, "health/effective_rank": rank}
        for step, rank in enumerate(effective_rank, start=1)
    ]
    return alarm_history(records, embedding_dim=128)


def test_a_collapse_comes_first_and_one_that_was_cleared_last():
    learned = (accuracies(0.9, 0.9), accuracies(0.5, 0.5))
    first, second = told(*learned, alarms=tuple(collapsed(50, 1.1)))
    assert first == (
        "Not healthy at the end: the embeddings have collapsed: they use few directions, or one "
        "point."
    )
    assert second.startswith("It learned")
    first, second = told(*learned, alarms=tuple(collapsed(1.1, 50)))
    assert first.startswith("It learned")
    assert second == (
        "Not healthy for a time, and cleared later: the embeddings have collapsed: they use few "
        "directions, or one point."
    )
    # Cleared and raised again.
    first, *_ = told(*learned, alarms=tuple(collapsed(1.1, 50, 1.1)))
    assert first.startswith("Not healthy at the end: the embeddings have collapsed")
    *_, last = told(*learned, alarms=None)
    assert last == "The health of the training was not checked (train.health_every_steps)."


def test_every_alarm_has_words_and_several_are_one_sentence():
    assert set(module._MEANINGS) == set(alarms_module._ALARMS)
    for names in itertools.combinations(module._MEANINGS, 2):
        raised = tuple(
            AlarmPeriod(9, name, "m Not cleared by the last health check.") for name in names
        )
        (sentence,) = told([], alarms=raised)
        for name in names:
            assert module._MEANINGS[name] in sentence
