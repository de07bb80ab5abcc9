"""Resizing of maps in [batch, height, width, channels] layout, in the three ways the tokenizer and FastVAR need.

Both resizers are separable, so each is two products with small constant matrices, computed in float64 when the
function is traced; only where averaging enlarges, it reads cells instead. The result is float32.
Source: docs/spec/infinity.md, sections 5 (items 6, 8 and 9) and 6.5.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped


def resize_bilinear(
    x: Float[Array, "batch height width channels"], grid: tuple[int, int]
) -> Float[Array, "batch new_height new_width channels"]:
    """Bilinear interpolation with half-pixel centres and clamped edges, without antialiasing in either direction.

    Args:
      x: the map.
      grid: rows and columns of the result. `x` itself (as float32) is returned where they are its own.
    """
    return _resize(x, grid, _bilinear_weights)


def resize_area(
    x: Float[Array, "batch height width channels"], grid: tuple[int, int]
) -> Float[Array, "batch new_height new_width channels"]:
    """Adaptive average pooling: every new cell is the mean of the old cells that it touches.

    Where the grid grows, neighbouring new cells touch the same old ones.

    Args:
      x: the map.
      grid: rows and columns of the result. `x` itself (as float32) is returned where they are its own.
    """
    height, width = x.shape[1:3]
    if (height, width) != grid and height <= grid[0] and width <= grid[1]:
        return _enlarge_area(x, grid)
    return _resize(x, grid, _area_weights)


def pixel_shuffle(
    x: Shaped[Array, "batch height width four_channels"],
) -> Shaped[Array, "batch two_height two_width channels"]:
    """Spreads every cell over 2x2: `out[:, 2y+i, 2x+j, c] = x[:, y, x, 4c+2i+j]`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, channels // 4, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, channels // 4)


def pixel_unshuffle(
    x: Shaped[Array, "batch two_height two_width channels"],
) -> Shaped[Array, "batch height width four_channels"]:
    """Gathers 2x2 cells into one; the inverse of `pixel_shuffle`."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // 2, width // 2, 4 * channels)


def _resize(x: Array, grid: tuple[int, int], weights: Callable[[int, int], np.ndarray]) -> Array:
    x = x.astype(jnp.float32)
    if x.shape[1:3] == tuple(grid):
        return x
    rows = weights(x.shape[1], grid[0]).astype(np.float32)
    columns = weights(x.shape[2], grid[1]).astype(np.float32)
    highest = jax.lax.Precision.HIGHEST
    x = jnp.einsum("ph,bhwc->bpwc", rows, x, precision=highest)
    return jnp.einsum("qw,bpwc->bpqc", columns, x, precision=highest)


def _enlarge_area(x: Array, grid: tuple[int, int]) -> Array:
    # A new cell touches one or two old ones along each axis, so it is the mean of four, some of them the same.
    # XLA for GPUs reads these where the result is used; a product would write it out, and twice in other layouts.
    batch, height, width, channels = x.shape
    rows, columns = _touched(height, grid[0]), _touched(width, grid[1])
    cells = x.reshape(batch, height * width, channels)
    corners = [(row[:, None] * width + column).ravel() for row in rows for column in columns]
    taken = [cells.at[:, corner].get(mode="promise_in_bounds").astype(jnp.float32) for corner in corners]
    return ((taken[0] + taken[1] + taken[2] + taken[3]) / 4).reshape(batch, *grid, channels)


def _touched(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last old cell that every new one touches."""
    new = np.arange(new_size)
    return new * size // new_size, -(-(new + 1) * size // new_size) - 1


def _bilinear_weights(size: int, new_size: int) -> np.ndarray:
    """Matrix [new_size, size] whose rows hold the two weights of linear interpolation."""
    position = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(size)))


def _area_weights(size: int, new_size: int) -> np.ndarray:
    """Matrix [new_size, size]; row i averages cells floor(i*size/new_size) to ceil((i+1)*size/new_size) - 1."""
    new, old = np.arange(new_size)[:, None], np.arange(size)
    # A cell is touched where the two intervals overlap; integers keep the comparison exact.
    touched = (old * new_size < (new + 1) * size) & ((old + 1) * new_size > new * size)
    return touched / touched.sum(axis=1, keepdims=True)
