"""ToProVAR's measures against NumPy, loops and cases known by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.pruning import entropy as measures
from toprovar_jax.schedule import ASPECT_RATIOS, Grid, scale_schedule


def random(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 5.0, shape).astype(np.float32)


def test_image_entropy_is_the_mean_of_the_guidance_halves():
    entropy = random(4, 6, 5)  # four layers, three images under guidance
    expected = [[(layer[i] + layer[3 + i]) / 2 for i in range(3)] for layer in entropy]
    np.testing.assert_allclose(measures.image_entropy(jnp.asarray(entropy), 3), expected, rtol=1e-6)
    np.testing.assert_allclose(measures.image_entropy(jnp.asarray(entropy[0]), 3), expected[0], rtol=1e-6)
    np.testing.assert_array_equal(measures.image_entropy(jnp.asarray(entropy), 6), entropy)


def test_focused_share_counts_tokens_below_the_mean():
    entropy = jnp.array([[1.0, 1.0, 1.0, 5.0], [1.0, 5.0, 5.0, 5.0], [2.0, 2.0, 2.0, 2.0]])
    np.testing.assert_array_equal(jax.jit(measures.focused_share)(entropy), [0.75, 0.25, 0.0])
    many = random(3, 2, 400)
    expected = (many < many.mean(axis=-1, keepdims=True)).mean(axis=-1)
    np.testing.assert_allclose(measures.focused_share(jnp.asarray(many)), expected, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 7.3])
def test_focused_share_of_a_constant_map_is_zero_whatever_its_mean_rounds_to(value):
    for tokens in (1, 3, 49, 1000):
        assert measures.focused_share(jnp.full((tokens,), value)) == 0


@pytest.mark.parametrize("grid", [(12, 12), (9, 6), (2, 5)])
def test_singular_ratio_equals_numpys(grid):
    maps = random(2, 3, *grid)
    singular = np.linalg.svd(maps.astype(np.float64), compute_uv=False)
    ratio = jax.jit(measures.singular_ratio)(jnp.asarray(maps))
    np.testing.assert_allclose(ratio, singular[..., 0] / singular[..., 1], rtol=1e-4)


def test_an_undefined_ratio_keeps_the_layer_dense():
    rank_one = np.outer(random(6, seed=1), random(5, seed=2))
    constant = np.full((6, 5), 0.7, np.float32)
    for maps in (rank_one, constant, np.zeros((6, 5))):
        ratio = measures.singular_ratio(jnp.asarray(maps, jnp.float32))
        assert np.isinf(ratio)
        for beta in (0.0, 0.3):
            assert measures.layer_score(ratio, beta) == 0
    assert np.isinf(measures.singular_ratio(jnp.ones((1, 5))))


def test_layer_score_falls_from_one():
    ratio = jnp.array([1.0, 2.0, 11.0, jnp.inf])
    np.testing.assert_allclose(measures.layer_score(ratio, 0.5), [1, np.exp(-0.5), np.exp(-5), 0], rtol=1e-6)


def test_relative_entropies_have_mean_one():
    entropy = jnp.array([[3.0, 1.0, 4.0, 2.0], [0.5, 0.5, 0.5, 0.5]])
    expected = [[1.2, 0.4, 1.6, 0.8], [1, 1, 1, 1]]
    np.testing.assert_allclose(jax.jit(measures.relative_entropy)(entropy), expected, rtol=1e-6)


def test_a_single_key_makes_no_token_a_candidate():
    np.testing.assert_array_equal(measures.relative_entropy(jnp.zeros((2, 1))), 0)


def test_what_is_known_of_relative_entropies_beforehand_holds_for_every_map():
    entropy = random(30)
    by_sum, by_mean = entropy / entropy.sum(), entropy / entropy.mean()
    by_rank = np.argsort(np.argsort(entropy)) / 29
    np.testing.assert_allclose(measures.expected_relative_entropy(30, "sum"), [by_sum.mean()], rtol=1e-6)
    np.testing.assert_allclose(measures.expected_relative_entropy(30, "mean"), [by_mean.mean()], rtol=1e-6)
    np.testing.assert_allclose(measures.expected_relative_entropy(30, "rank"), np.sort(by_rank))
    np.testing.assert_array_equal(measures.expected_relative_entropy(1, "rank"), [0])


def test_tendency_and_keep_probability_follow_the_equations():
    relative = np.array([0.0, 0.5, 1.0, 2.0])
    q = measures.tendency(relative, 0.26, 5, 13)
    np.testing.assert_allclose(q, [0, 0.06, 0.12, 0.24])
    keep = measures.keep_probability(q, 0.1, 5.1)
    np.testing.assert_allclose(keep, [0.9, 0.6, 0.3, 0.0], atol=1e-12)


def test_the_printed_normalization_prunes_next_to_nothing():
    """The trap of Eq. 5: relative entropies of about 1 / tokens leave every probability at 1 - alpha_min."""
    q = measures.tendency(measures.expected_relative_entropy(1024, "sum"), 1.0, 9, 10)
    np.testing.assert_allclose(measures.keep_probability(q, 0.0, 0.9), 1, atol=1e-3)


def test_resize_map_keeps_its_own_grid_and_goes_to_another():
    entropy = jnp.asarray(random(2, 12))
    np.testing.assert_array_equal(measures.resize_map(entropy, Grid(4, 3), Grid(4, 3)), entropy)
    rows = jnp.repeat(jnp.array([[0.0, 1.0]]), 2, axis=1)  # a 2 x 2 grid, one value per row
    resized = measures.resize_map(rows, Grid(2, 2), Grid(4, 1))
    np.testing.assert_allclose(resized, [[0, 0.25, 0.75, 1]], atol=1e-6)


def kept_by_loops(scores, grid, count):
    """The rule of `lowest_tokens` in plain Python."""
    region, floors = measures.regions(grid, count)
    order = sorted(range(grid.size), key=lambda t: (scores[t], t))
    kept = set()
    for index, floor in enumerate(floors):
        kept.update([t for t in order if region[t] == index][:floor])
    kept.update([t for t in order if t not in kept][: count - len(kept)])
    return sorted(kept)


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 2), Grid(4, 3), Grid(1, 7), Grid(12, 12), Grid(15, 5)])
def test_lowest_tokens_follows_its_rule(grid):
    random_scores = np.random.default_rng(grid.size)
    for count in sorted({1, -(-grid.size // 3), -(-grid.size // 2), grid.size}):
        choose = jax.jit(functools.partial(measures.lowest_tokens, grid=grid, count=count))
        # Few distinct values, so that many are equal; a corner where everything is high.
        scores = random_scores.integers(0, 4, (2, grid.size)).astype(np.float32)
        scores[1].reshape(grid)[: grid.height // 2, : grid.width // 2] += 10
        chosen = np.asarray(choose(scores))
        for row in range(2):
            np.testing.assert_array_equal(chosen[row], kept_by_loops(scores[row], grid, count))


@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
def test_floors_fit_and_reach_every_token(ratio):
    for grid in scale_schedule(ratio, "1M"):
        for count in {1, grid.size // 8, grid.size // 3, grid.size} - {0}:
            region, floors = measures.regions(grid, count)
            assert floors.sum() <= count
            assert (floors >= 1).all()
            assert (floors <= np.bincount(region)).all()
            assert len(region) == grid.size
            if count >= 32 and min(grid) >= 4:
                assert len(floors) == 16


def test_no_region_loses_all_its_tokens():
    grid = Grid(16, 16)
    scores = np.zeros(grid, np.float32)
    scores[:4, :4] = 9.0
    kept = np.zeros(grid.size, bool)
    kept[np.asarray(measures.lowest_tokens(jnp.asarray(scores.reshape(1, -1)), grid, 64))[0]] = True
    assert kept.reshape(grid)[:4, :4].sum() == 1  # a quarter of 64 / 16
    assert kept.sum() == 64
