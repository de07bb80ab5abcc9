"""Bootstrap intervals: the right mean, the right width, and pairs that cancel what they share."""

import numpy as np
import pytest

from bench.scenes.bootstrap import Estimate, estimate, resampled_means


def test_tasks_weigh_the_same_whatever_their_prompts():
    values = np.array([[1.0], [1.0], [1.0], [0.0]])
    means = resampled_means(values, ["counting", "counting", "counting", "colors"])
    assert estimate(means[:, 0]) == Estimate(0.5, 0.5, 0.5)


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(3.0, 2.0, (400, 1))
    found = estimate(resampled_means(values, ["colors"] * 400, resamples=4000)[:, 0])
    assert found.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 400**0.5
    assert (found.mean - found.low, found.high - found.mean) == pytest.approx((half, half), rel=0.08)


def test_what_two_columns_share_cancels_in_their_difference():
    shared = np.random.default_rng(1).normal(0, 5.0, 300)
    small = np.random.default_rng(2).normal(0.1, 0.01, 300)
    means = resampled_means(np.stack([shared, shared + small], axis=1), ["a", "b", "c"] * 100)
    difference = estimate(means[:, 1] - means[:, 0])
    assert difference.mean == pytest.approx(small.mean())
    assert difference.high - difference.low < 0.004
    alone = estimate(means[:, 0])
    assert alone.high - alone.low > 0.5
