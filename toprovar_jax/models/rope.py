"""Two-dimensional rotary position embedding (docs/spec/infinity.md, section 4.4).

A token at grid index (y, x) is rotated by head_dim/2 angles: the first half are y times the frequencies, the
second half x times the same frequencies. Pairs are adjacent channels.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from toprovar_jax.schedule import Grid

MAX_EDGE = 128  # rows and columns of the base grid that mode 1 resizes


def axis_indices(length: int, final_length: int) -> np.ndarray:
    """Mode 2: indices on the final grid of the `length` cells along one axis, int [length].

    The product is float32 and rounds half to even, as published: a float64 product moves some cells.
    """
    return np.round(np.arange(length, dtype=np.float32) * np.float32(final_length / length)).astype(np.int64)


def _axis_tables(
    length: int, final_length: int, resized_length: int, head_dim: int, mode: int
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin along one axis, float32 [length, head_dim/4]."""
    half = head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = (1.0 / (np.float32(10000.0) ** exponents)).astype(np.float32)
    if mode == 1:
        angles = np.arange(MAX_EDGE, dtype=np.float32)[:, None] * frequencies
        position = np.linspace(0.0, resized_length - 1, length) if length > 1 else np.zeros(1)
        lower = np.floor(position).astype(np.int64)
        upper = np.minimum(lower + 1, resized_length - 1)
        weight = (position - lower)[:, None]

        def resize(table: np.ndarray) -> np.ndarray:
            return ((1 - weight) * table[lower] + weight * table[upper]).astype(np.float32)

        return resize(np.cos(angles)), resize(np.sin(angles))
    indices = axis_indices(length, final_length) if mode == 2 else np.arange(length)
    angles = indices.astype(np.float32)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)


def rotation(
    grid: Grid, final_grid: Grid, head_dim: int, mode: int
) -> tuple[Float[Array, "tokens pairs"], Float[Array, "tokens pairs"]]:
    """cos and sin of every token of a scale, row-major, with head_dim/2 pairs.

    Args:
      grid: the scale's token grid.
      final_grid: last grid of the ratio's 1M schedule, which positions refer to.
      head_dim: channels of a head, divisible by 4.
      mode: 0 uses grid indices as they are; 1 resizes the cos and sin tables themselves (pairs are then not
        unit length); 2 rounds to indices of the final grid.
    """
    longer = max(final_grid)
    axes = []
    for axis in (0, 1):
        resized_length = int(MAX_EDGE / longer * final_grid[axis])
        axes.append(_axis_tables(grid[axis], final_grid[axis], resized_length, head_dim, mode))

    def over_grid(rows: np.ndarray, columns: np.ndarray) -> Float[Array, "tokens pairs"]:
        shape = (*grid, head_dim // 4)
        # Broadcast inside the program: the compiled step holds two small tables instead of one per token.
        table = jnp.concatenate(
            [
                jnp.broadcast_to(jnp.asarray(rows)[:, None], shape),
                jnp.broadcast_to(jnp.asarray(columns)[None], shape),
            ],
            axis=-1,
        )
        return table.reshape(grid.size, head_dim // 2)

    (cos_rows, sin_rows), (cos_columns, sin_columns) = axes
    return over_grid(cos_rows, cos_columns), over_grid(sin_rows, sin_columns)


def rotate(
    x: Float[Array, "batch tokens heads head_dim"],
    cos: Float[Array, "*batch tokens pairs"],
    sin: Float[Array, "*batch tokens pairs"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """Rotates adjacent channel pairs (u, v) to (u cos - v sin, u sin + v cos).

    Args:
      x: queries or keys.
      cos: one row per token, for all of the batch or for each entry apart.
      sin: the same.
    """
    # Pairs are swapped and tables repeated, so that XLA for GPUs reads and writes x in order.
    swapped = jnp.flip(x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2), axis=-1).reshape(x.shape)
    cos = jnp.repeat(cos, 2, axis=-1)[..., None, :]
    sin = jnp.stack([-sin, sin], axis=-1).reshape(cos.shape)
    return x * cos + swapped * sin
