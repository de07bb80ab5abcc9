"""Aspect ratio and pixel budget -> the token grid of every scale.

Source: docs/spec/infinity.md, section 2. Ratios are height / width. Eight tall ratios are tabulated; the wide ones
are the same grids with height and width swapped.
"""

from typing import NamedTuple

from toprovar_jax.errors import InputError


class Grid(NamedTuple):
    """Rows and columns of a token grid."""

    height: int
    width: int

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.height * self.width


ScaleSchedule = tuple[Grid, ...]

# Scales that each pixel budget runs: a prefix of the thirteen.
PIXEL_BUDGETS: dict[str, int] = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}

# fmt: off
_TALL_GRIDS: dict[float, tuple[tuple[int, int], ...]] = {
    1.0: ((1, 1), (2, 2), (4, 4), (6, 6), (8, 8), (12, 12), (16, 16), (20, 20), (24, 24), (32, 32), (40, 40),
          (48, 48), (64, 64)),
    1.25: ((1, 1), (2, 2), (3, 3), (5, 4), (10, 8), (15, 12), (20, 16), (25, 20), (30, 24), (35, 28), (45, 36),
           (55, 44), (70, 56)),
    1.333: ((1, 1), (2, 2), (4, 3), (8, 6), (12, 9), (16, 12), (20, 15), (24, 18), (28, 21), (36, 27), (48, 36),
            (60, 45), (72, 54)),
    1.5: ((1, 1), (2, 2), (3, 2), (6, 4), (9, 6), (15, 10), (21, 14), (27, 18), (33, 22), (39, 26), (48, 32),
          (63, 42), (78, 52)),
    1.75: ((1, 1), (2, 2), (3, 3), (7, 4), (11, 6), (14, 8), (21, 12), (28, 16), (35, 20), (42, 24), (56, 32),
           (70, 40), (84, 48)),
    2.0: ((1, 1), (2, 2), (4, 2), (6, 3), (10, 5), (16, 8), (22, 11), (30, 15), (38, 19), (46, 23), (60, 30),
          (74, 37), (90, 45)),
    2.5: ((1, 1), (2, 2), (5, 2), (10, 4), (15, 6), (20, 8), (25, 10), (30, 12), (40, 16), (50, 20), (65, 26),
          (80, 32), (100, 40)),
    3.0: ((1, 1), (2, 2), (6, 2), (9, 3), (15, 5), (21, 7), (27, 9), (36, 12), (45, 15), (54, 18), (72, 24),
          (90, 30), (111, 37)),
}
# fmt: on


def _all_grids() -> dict[float, ScaleSchedule]:
    table: dict[float, ScaleSchedule] = {}
    for ratio, grids in _TALL_GRIDS.items():
        table[ratio] = tuple(Grid(height, width) for height, width in grids)
        # The published table keys the wide ratios by their inverse cut (not rounded) to three digits.
        table[int(1000 / ratio) / 1000] = tuple(Grid(width, height) for height, width in grids)
    return table


_GRIDS = _all_grids()

# In the published order, which decides ties of `nearest_aspect_ratio`.
ASPECT_RATIOS: tuple[float, ...] = tuple(_GRIDS)


def nearest_aspect_ratio(height_over_width: float) -> float:
    """The template whose ratio is nearest by difference; the first in the published order on a tie.

    Raises:
      InputError: the ratio is not a positive number.
    """
    if not 0 < height_over_width < float("inf"):
        raise InputError(f"aspect_ratio is height / width and must be positive, got {height_over_width}")
    return min(ASPECT_RATIOS, key=lambda template: abs(template - height_over_width))


def scale_schedule(aspect_ratio: float = 1.0, pixels: str = "1M") -> ScaleSchedule:
    """Transformer grids of every scale, smallest first.

    Args:
      aspect_ratio: height / width; the nearest template is used.
      pixels: pixel budget, a key of `PIXEL_BUDGETS`.

    Raises:
      InputError: the pixel budget is unknown or the ratio is not a positive number.
    """
    if pixels not in PIXEL_BUDGETS:
        raise InputError(f"unknown pixel budget {pixels!r}: choose one of {', '.join(PIXEL_BUDGETS)}")
    return _GRIDS[nearest_aspect_ratio(aspect_ratio)][: PIXEL_BUDGETS[pixels]]


def rope_grid(aspect_ratio: float = 1.0) -> Grid:
    """Grid that positions refer to: the last one of the ratio's 1M schedule, whatever the budget (section 4.4)."""
    return scale_schedule(aspect_ratio, "1M")[-1]


def tokenizer_schedule(schedule: ScaleSchedule, patchify: bool) -> ScaleSchedule:
    """Grids on the tokenizer's side: doubled where one token covers 2x2 codes, else unchanged."""
    factor = 2 if patchify else 1
    return tuple(Grid(grid.height * factor, grid.width * factor) for grid in schedule)
