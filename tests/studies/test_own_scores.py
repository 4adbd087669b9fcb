"""The study of JEVB's own scores: what its rows are made of."""

import numpy as np

from studies import own_scores


def test_two_sided_scores_are_distances_to_the_training_median():
    scores = {"train": np.array([1.0, 2.0, 9.0]), "test": np.array([2.0, 0.0, 5.0])}
    np.testing.assert_array_equal(own_scores.two_sided(scores)["test"], [0.0, 2.0, 3.0])


def test_a_group_is_the_plain_mean_of_its_sets():
    scores = {
        "test": np.array([0.0, 1.0]),
        "a": np.array([2.0, 3.0]),  # all above: 1
        "b": np.array([-1.0, 0.5]),  # one of four pairs: 1/4
        "c": np.array([0.0, 1.0]),  # ties: 1/2
    }
    groups = {"a": "far", "b": "far", "c": "near"}
    assert own_scores.group_means(scores, groups) == {"far": 0.625, "near": 0.5}
