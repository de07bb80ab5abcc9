"""Rotary positions of the JAX port against every stored array of the official ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import golden
from toprovar_jax.models import rope
from toprovar_jax.schedule import rope_grid, scale_schedule

STORED = golden.rope_golden()


@pytest.mark.parametrize("table", STORED.tables, ids=lambda table: f"mode{table.mode}-{table.aspect_ratio}")
def test_tables(table):
    grids, final = scale_schedule(table.aspect_ratio), rope_grid(table.aspect_ratio)
    tables = [rope.rotation(grid, final, STORED.head_dim, table.mode) for grid in grids]
    cosine, sine = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    # The published table is padded to whole blocks of 128 rows.
    computed = {"cos": cosine[table.rows], "sin": sine[table.rows], "padded_len": -(-len(cosine) // 128) * 128}
    golden.assert_matches(table.expected, computed)


def test_grid_indices_of_every_token():
    assert len(STORED.grid_indices) == 4
    for ratio, expected in STORED.grid_indices.items():
        computed = []
        for grid in scale_schedule(ratio):
            rows, columns = (rope.axis_indices(n, final) for n, final in zip(grid, rope_grid(ratio), strict=True))
            computed += [(y, x) for y in rows for x in columns]
        np.testing.assert_array_equal(computed, expected)


def test_rotation_of_queries_and_keys():
    tables = rope.rotation(scale_schedule(1.0)[STORED.scale], rope_grid(1.0), STORED.head_dim, 2)
    for given, expected in ((STORED.query, STORED.expected_query), (STORED.key, STORED.expected_key)):
        rotated = rope.rotate(jnp.asarray(given).swapaxes(1, 2), *tables).swapaxes(1, 2)
        assert golden.relative_error(rotated, expected) <= golden.TOLERANCE
