"""Two-dimensional rotary positions of the transformer (docs/spec/infinity.md, section 4.4)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

BASE = 10000.0
# Side of the square of positions that the tables of mode 1 are cut from: 2048 pixels at 16 per token.
BASE_SIDE = 128


def grid_positions(mode: int, grid: tuple[int, int], rope_grid: tuple[int, int]) -> Int[Tensor, "tokens 2"]:
    """Table row (y, x) of every cell of a grid, row by row, for the modes that look tables up.

    Args:
      mode: 0 takes the cell's own index; 2 spreads the cells over the final grid and rounds half to even.
      grid: rows and columns of the scale.
      rope_grid: rows and columns of the final grid.
    """
    sides = []
    for cells, final_cells in zip(grid, rope_grid, strict=True):
        index = torch.arange(cells)
        sides.append(torch.round(index * (final_cells / cells)).long() if mode == 2 else index)
    return torch.cartesian_prod(*sides).view(-1, 2)


def _angles(positions: Float[Tensor, "tokens 2"], head_dim: int) -> Float[Tensor, "tokens half"]:
    half = head_dim // 2
    frequencies = BASE ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
    # All angles of y come before all angles of x.
    return (positions[:, :, None] * frequencies).flatten(1)


def rotation(
    mode: int, grid: tuple[int, int], rope_grid: tuple[int, int], head_dim: int
) -> tuple[Float[Tensor, "tokens half"], Float[Tensor, "tokens half"]]:
    """Cosines and sines for every token of a scale.

    Args:
      mode: 0 cell indices, 1 tables resized from a square of positions, 2 indices rounded to the final grid.
      grid: rows and columns of the scale.
      rope_grid: rows and columns of the final grid of the aspect ratio.
      head_dim: channels of an attention head, divisible by 4.
    """
    if mode != 1:
        angles = _angles(grid_positions(mode, grid, rope_grid).float(), head_dim)
        return angles.cos(), angles.sin()
    rows, columns = (int(BASE_SIDE / max(rope_grid) * side) for side in rope_grid)
    angles = _angles(torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float(), head_dim)
    # The tables themselves are interpolated, so that the pairs are no longer of unit length.
    tables = torch.stack([angles.cos(), angles.sin()]).view(2, rows, columns, -1).permute(0, 3, 1, 2)
    resized = functional.interpolate(tables, size=grid, mode="bilinear", align_corners=True)
    cosine, sine = resized.flatten(2).transpose(1, 2)
    return cosine, sine


def rotate(
    x: Float[Tensor, "batch heads tokens head_dim"],
    cosine: Float[Tensor, "tokens half"],
    sine: Float[Tensor, "tokens half"],
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Turns every pair of adjacent channels (2m, 2m+1) by the token's angle m."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)
