"""The diagram of quality against cost."""

import numpy as np
import pytest

from bench.frontier import Panel, Point, draw, frontier, ticks


def point(x, y, name="case", family="family"):
    return Point(name, family, x, y, y - 0.1, y + 0.1)


def test_the_frontier_holds_what_no_other_case_beats():
    cheap, better, best = point(10, 0.5), point(20, 0.7), point(50, 0.9)
    beaten = [point(20, 0.6), point(30, 0.7), point(100, 0.8)]
    assert frontier([*beaten, best, cheap, better]) == [cheap, better, best]
    assert frontier([best]) == [best]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0.61, 0.79, None), (3, 3, None)],
)
def test_ticks_are_few_round_numbers_around_all_values(low, high, expected):
    found = ticks(low, high)
    assert found[0] <= low + 1e-9
    assert found[-1] >= high - 1e-9
    assert 2 <= len(found) <= 9
    if expected is not None:
        assert found == pytest.approx(expected)


def test_points_lie_where_their_values_are():
    points = [point(100, 1.0, "dense", "Dense"), point(50, 0.0, "half", "Half")]
    image = np.asarray(draw([Panel("kept", "cost", points)]))[:440]  # without the legend

    def centre(color):
        rows, columns = np.nonzero((image == color).all(axis=-1))
        return (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2

    (dense_x, dense_y), (half_x, half_y) = centre((31, 119, 180)), centre((214, 39, 40))
    assert dense_x - half_x == pytest.approx(560 / 2, abs=2)  # the axis is 560 wide and goes from 0 to 100
    # It is 400 high and goes from -0.2 to 1.2; the interval of each point lies around it.
    assert half_y - dense_y == pytest.approx(400 / 1.4, abs=2)


def test_every_panel_has_room():
    points = [point(x, 0.5, f"case {x}", f"family {x}") for x in range(9)]
    one, two = (draw([Panel("kept", "cost", points)] * count) for count in (1, 2))
    assert two.width == 2 * one.width
    assert two.height < one.height  # the legend has more columns
