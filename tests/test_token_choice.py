"""Which tokens are chosen, and that each finds its way out and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.pruning.token_choice import TokenChoice


def stream(rows=3, tokens=21, channels=4):
    return jax.random.normal(jax.random.key(0), (rows, tokens, channels))


def furthest_by_sorting(x, count):
    distance = ((x - x.mean(axis=1, keepdims=True)) ** 2).sum(axis=-1)
    return np.argsort(-distance, axis=1, kind="stable")[:, :count]


@pytest.mark.parametrize("count", [1, 8, 13, 20, 21])
def test_the_furthest_come_first(count):
    x = stream()
    choice = TokenChoice.furthest_from_mean(x, count)
    np.testing.assert_array_equal(choice.kept, furthest_by_sorting(np.asarray(x), count))


def test_tokens_as_far_as_each_other_go_by_index():
    x = jnp.array([3.0, -3.0, 1.0, -1.0, -3.0, 3.0]).reshape(1, 6, 1)
    choice = TokenChoice.furthest_from_mean(x, 5)
    np.testing.assert_array_equal(choice.kept, [[0, 1, 4, 5, 2]])


def test_no_token_is_read_from_elsewhere_where_distances_are_no_numbers():
    choice = TokenChoice.furthest_from_mean(stream().at[1, 3].set(jnp.nan), 13)
    assert ((choice.indices >= 0) & (choice.indices < 21)).all()
    np.testing.assert_array_equal(choice.kept[0], furthest_by_sorting(np.asarray(stream()), 13)[0])


@pytest.mark.parametrize("count", [1, 8, 13, 21])
def test_both_ways_of_choosing_take_out_and_put_back(count):
    x = stream()
    kept = np.stack([np.random.default_rng(row).permutation(21)[:count] for row in range(3)])
    for choice in (TokenChoice.from_indices(jnp.asarray(kept), 21), TokenChoice.furthest_from_mean(x, count)):
        taken = choice.take(x)
        assert taken.shape == (3, count + choice.padding, 4)
        assert (count + choice.padding) % 8 == 0
        expected = np.full(x.shape, -1.0, np.float32)
        for row, indices in enumerate(np.asarray(choice.kept)):
            np.testing.assert_array_equal(taken[row, :count], x[row, indices])
            np.testing.assert_array_equal(choice.take_shared(x[0])[row, :count], x[0, indices])
            expected[row, indices] = x[row, indices]
        np.testing.assert_array_equal(choice.put_back(taken, -1.0), expected)
        np.testing.assert_array_equal(choice.put_back(taken, jnp.full_like(x, -1.0)), expected)
        np.testing.assert_array_equal(choice.put_back(taken[..., 0], -1.0), expected[..., 0])
    np.testing.assert_array_equal(TokenChoice.from_indices(jnp.asarray(kept), 21).kept, kept)
