"""Structural similarity against its definition, and the cases known by hand."""

import numpy as np
import pytest

from toprovar_jax.similarity import mean_squared_error, structural_similarity


def pictures(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def by_definition(first, second):
    """One picture, window by window, in float64."""
    x, y = first / 255, second / 255
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights = np.outer(line, line) / line.sum() ** 2
    values = []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            for channel in range(3):
                a, b = (z[row : row + 11, column : column + 11, channel] for z in (x, y))
                mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                spread = (weights * ((a - mean_a) ** 2 + (b - mean_b) ** 2)).sum()
                covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
                values.append(
                    (2 * mean_a * mean_b + 1e-4)
                    / (mean_a**2 + mean_b**2 + 1e-4)
                    * (2 * covariance + 9e-4)
                    / (spread + 9e-4)
                )
    return np.mean(values)


def test_similarity_is_that_of_the_definition():
    first = pictures(3, 14, 12)
    second = np.clip(
        first + np.random.default_rng(1).normal(0, [[[[5]]], [[[40]]], [[[90]]]], first.shape), 0, 255
    )
    second = second.astype(np.uint8)
    similarity = np.asarray(structural_similarity(first, second))
    expected = [by_definition(*pair) for pair in zip(first, second, strict=True)]
    np.testing.assert_allclose(similarity, expected, atol=1e-5)
    assert similarity[0] > similarity[1] > similarity[2]


def test_equal_pictures_are_1_and_inverted_ones_negative():
    first = pictures(2, 16, 16)
    np.testing.assert_array_equal(structural_similarity(first, first), 1)
    assert (np.asarray(structural_similarity(first, 255 - first)) < -0.8).all()


def test_flat_pictures_differ_by_luminance_alone():
    black, white = (np.full((1, 11, 11, 3), level, np.uint8) for level in (0, 255))
    np.testing.assert_allclose(structural_similarity(black, white), 1e-4 / (1 + 1e-4), rtol=1e-5)


def test_squared_error():
    first = np.zeros((2, 4, 4, 3), np.uint8)
    second = first.copy()
    second[1, :2] = 51
    np.testing.assert_allclose(mean_squared_error(first, second), [0, 0.02], rtol=1e-6)


def test_pictures_smaller_than_a_window_are_refused():
    with pytest.raises(ValueError, match="needs 11x11 pixels at least, got \\(10, 64\\)"):
        structural_similarity(pictures(1, 10, 64), pictures(1, 10, 64))
