"""Draws what policies keep against what they cost, with Pillow alone."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT = 560, 400  # of a panel's frame
_LEFT, _TOP, _BOTTOM, _GAP = 64, 40, 48, 24
_LEGEND_ROW = 20
_DETAIL = 2  # everything is drawn this much larger and reduced, for smooth lines
_MARKER = 8
_INK, _GRID, _LINE = "#222222", "#dddddd", "#999999"
_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")


class Point(NamedTuple):
    """One case.

    Attributes:
      name: as the legend shows it.
      family: cases of one family share a colour.
      x: cost.
      y: what is kept.
      low: lower end of its interval.
      high: upper end.
    """

    name: str
    family: str
    x: float
    y: float
    low: float
    high: float


class Panel(NamedTuple):
    """One diagram.

    Attributes:
      title: what y is.
      x_label: what x is.
      points: in the same order in every panel.
    """

    title: str
    x_label: str
    points: Sequence[Point]


def frontier(points: Sequence[Point]) -> list[Point]:
    """Points that no other one beats in cost and quality at once, from cheap to dear."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, two to nine of them, from `low` or below to `high` or above."""
    span = max(high - low, 1e-3 * max(abs(high), 1))
    magnitude = 10 ** math.floor(math.log10(span / 5))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if span / (factor * magnitude) <= 7)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [step * index for index in range(first, last + 1)]


def draw(panels: Sequence[Panel]) -> Image.Image:
    """The panels side by side, points numbered as in the legend below; a line joins those on the frontier."""
    names = [point.name for point in panels[0].points]
    families = list(dict.fromkeys(point.family for point in panels[0].points))
    columns = 2 * len(panels)
    legend_rows = math.ceil(len(names) / columns)
    panel_width = _LEFT + _WIDTH + _GAP
    size = (panel_width * len(panels), _TOP + _HEIGHT + _BOTTOM + _LEGEND_ROW * legend_rows + _GAP)
    image = Image.new("RGB", (size[0] * _DETAIL, size[1] * _DETAIL), "white")
    pen = _Pen(image)
    colors = [_COLORS[families.index(point.family) % len(_COLORS)] for point in panels[0].points]
    for index, panel in enumerate(panels):
        _draw_panel(pen, panel, index * panel_width + _LEFT, colors)
    for index, (name, color) in enumerate(zip(names, colors, strict=True)):
        column, row = divmod(index, legend_rows)
        x = _LEFT + column * panel_width / 2
        y = _TOP + _HEIGHT + _BOTTOM + (row + 0.5) * _LEGEND_ROW
        pen.marker(x, y, index, color)
        pen.text(x + 16, y, name, anchor="lm")
    return image.reduce(_DETAIL)


class _Pen:
    """Draws in the final picture's coordinates."""

    def __init__(self, image: Image.Image):
        self._draw = ImageDraw.Draw(image)
        self._font = ImageFont.load_default(12 * _DETAIL)
        self._bold = ImageFont.load_default(15 * _DETAIL)

    def line(self, *corners: tuple[float, float], color: str = _INK, width: float = 1) -> None:
        points = [(x * _DETAIL, y * _DETAIL) for x, y in corners]
        self._draw.line(points, fill=color, width=round(width * _DETAIL))

    def text(self, x: float, y: float, text: str, anchor: str, color: str = _INK, title: bool = False) -> None:
        font = self._bold if title else self._font
        self._draw.text((x * _DETAIL, y * _DETAIL), text, fill=color, font=font, anchor=anchor)

    def marker(self, x: float, y: float, number: int, color: str) -> None:
        box = [(value * _DETAIL) for value in (x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER)]
        self._draw.ellipse(box, fill=color)
        self.text(x, y, str(number), "mm", "white")


def _draw_panel(pen: _Pen, panel: Panel, left: float, colors: Sequence[str]) -> None:
    points = panel.points
    x_ticks = ticks(0, max(point.x for point in points))
    y_ticks = ticks(min(point.low for point in points), max(point.high for point in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * _WIDTH, _TOP + (1 - up) * _HEIGHT

    for x in x_ticks:
        pen.line(place(x, y_ticks[0]), place(x, y_ticks[-1]), color=_GRID)
        pen.text(place(x, 0)[0], _TOP + _HEIGHT + 6, f"{x:g}", "mt")
    for y in y_ticks:
        pen.line(place(x_ticks[0], y), place(x_ticks[-1], y), color=_GRID)
        pen.text(left - 6, place(0, y)[1], f"{y:g}", "rm")
    pen.text(left, _TOP - 12, panel.title, "ls", title=True)
    pen.text(left + _WIDTH, _TOP + _HEIGHT + 24, panel.x_label, "rt")
    for first, second in itertools.pairwise(frontier(points)):
        pen.line(place(first.x, first.y), place(second.x, second.y), color=_LINE, width=2)
    for point, color in zip(points, colors, strict=True):
        pen.line(place(point.x, point.low), place(point.x, point.high), color=color, width=2)
    for number, (point, color) in enumerate(zip(points, colors, strict=True)):
        pen.marker(*place(point.x, point.y), number, color)
