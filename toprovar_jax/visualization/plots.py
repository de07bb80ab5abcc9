"""Diagrams of a traced picture: focused shares over scales, scores over layers."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from toprovar_jax.visualization.canvas import INK, NOTE, RULE, SOFT, Canvas, text_width
from toprovar_jax.visualization.measurements import PictureTrace

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 640, 320, 72, 44, 16, 64  # frame, and room around it
_NAME_RISE = 12  # of the axis' name above the figure's lower edge
_LEGEND_GAP = 28
_BLUE, _RED, _PALE, _SHADE = "#266f84", "#c0392b", "#b9c7cc", "#efefef"


def focused_shares(trace: PictureTrace) -> Image.Image:
    """rho over scales, with the threshold and the start scale where the policy has them."""
    shares = {scale: share for scale in trace.mapped_scales if (share := trace.focused_share(scale)) is not None}
    tau, start = trace.threshold, trace.start
    values = [*shares.values(), *([] if tau is None else [tau])]
    low = max(0, math.floor(10 * min(values, default=0) - 0.2) / 10)
    high = min(1, math.ceil(10 * max(values, default=1) + 0.2) / 10)
    ticks = np.arange(round(low * 10), round(high * 10) + 1) / 10
    plot = _Plot(len(trace.plan.schedule), low, high)
    if trace.pruned:
        plot.shade(sorted(trace.pruned))
    plot.axes(ticks, "{:.1f}", "scale")
    canvas = plot.canvas
    if tau is not None:
        canvas.dashes(plot.left, plot.right, plot.y(tau), _RED)
    if start is not None:
        canvas.line([(plot.x(start), plot.top), (plot.x(start), plot.bottom)], _RED, 2)
    for first, second in zip(list(shares)[:-1], list(shares)[1:], strict=True):
        canvas.line([(plot.x(scale), plot.y(shares[scale])) for scale in (first, second)], _BLUE, 3)
    for scale, share in shares.items():
        canvas.dot(plot.x(scale), plot.y(share), _BLUE, hollow=not trace.full_layers(scale).all())
    legend = [("dot", _BLUE, "rho, share of focused tokens")]
    if tau is not None:
        legend.append(("dashes", _RED, f"tau = {tau:.3g}"))
    if start is not None:
        legend.append(("line", _RED, f"D = {start}"))
    if trace.pruned:
        legend.append(("box", _SHADE, "pruned"))
    plot.legend(legend)
    if not all(trace.full_layers(scale).all() for scale in shares):
        plot.note("hollow: only the layers that ran on all tokens")
    return canvas.finish()


def layer_scores(trace: PictureTrace) -> Image.Image:
    """R of every layer as bars, those of the policy as marks."""
    scores, plan = trace.layer_scores, trace.plan
    thinned = {
        layer
        for scale in plan.executed_scales
        for layer, kept in enumerate(plan.scales[scale].kept_tokens)
        if kept < plan.schedule[scale].size
    }
    plot = _Plot(plan.depth, 0, 1)
    plot.axes(np.array([0, 0.25, 0.5, 0.75, 1]), "{:.2f}", "layer")
    half = 0.36 * plot.column
    for layer, score in enumerate(scores.measured):
        x, color = plot.x(layer), _BLUE if layer in thinned else _PALE
        plot.canvas.box(x - half, min(plot.y(float(score)), plot.bottom - 1), x + half, plot.bottom, color)
        if scores.calibrated is not None:
            y = plot.y(scores.calibrated[layer])
            plot.canvas.line([(x - 1.2 * half, y), (x + 1.2 * half, y)], _RED, 3)
    legend = [("box", _PALE, "layer runs in full")] if len(thinned) < plan.depth else []
    if thinned:
        legend.append(("box", _BLUE, "layer is pruned"))
    if scores.calibrated is not None:
        legend.append(("line", _RED, "R as calibrated"))
    plot.legend(legend)
    plot.note(f"bars: R of this picture at scale {scores.scale}, beta = {scores.beta:.3g}")
    return plot.canvas.finish()


class _Plot:
    """A diagram over a whole number of columns, scales or layers."""

    def __init__(self, columns: int, low: float, high: float):
        self.column = max(_WIDTH / columns, 14)
        self.left, self.top = _LEFT, _TOP
        self.right, self.bottom = _LEFT + self.column * columns, _TOP + _HEIGHT
        self._columns, self._low, self._high = columns, low, high
        self.canvas = Canvas(self.right + _RIGHT, self.bottom + _BOTTOM)

    def x(self, column: int) -> float:
        return self.left + (column + 0.5) * self.column

    def y(self, value: float) -> float:
        return self.bottom - (value - self._low) / (self._high - self._low) * _HEIGHT

    def shade(self, columns: Sequence[int]) -> None:
        for column in columns:
            x = self.x(column)
            self.canvas.box(x - self.column / 2, self.top, x + self.column / 2, self.bottom, _SHADE)

    def axes(self, ticks: Float[np.ndarray, "ticks"], pattern: str, name: str) -> None:
        for value in ticks:
            self.canvas.line([(self.left, self.y(value)), (self.right, self.y(value))], RULE)
            self.canvas.text(self.left - 8, self.y(value), pattern.format(value), "rm", NOTE)
        self.canvas.line([(self.left, self.bottom), (self.right, self.bottom)], INK, 1.5)
        step = math.ceil(24 / self.column)
        for column in range(0, self._columns, step):
            self.canvas.text(self.x(column), self.bottom + 8, str(column), "mt", NOTE)
        self.canvas.text(self.left, self.bottom + _BOTTOM - _NAME_RISE, name, "ls", NOTE)

    def legend(self, entries: Sequence[tuple[str, str, str]]) -> None:
        """Entries of (mark, colour, text) above the diagram."""
        x, y = float(self.left), self.top / 2
        for mark, color, text in entries:
            if mark == "box":
                self.canvas.box(x, y - 8, x + 24, y + 8, color)
            elif mark == "dashes":
                self.canvas.dashes(x, x + 24, y, color)
            else:
                self.canvas.line([(x, y), (x + 24, y)], color, 3)
            if mark == "dot":
                self.canvas.dot(x + 12, y, color)
            self.canvas.text(x + 32, y, text, "lm", NOTE)
            x += 32 + text_width(text, NOTE) + _LEGEND_GAP

    def note(self, text: str) -> None:
        self.canvas.text(self.right, self.bottom + _BOTTOM - _NAME_RISE, text, "rs", NOTE, SOFT)
