"""A white sheet to draw figures on, with Pillow alone; lengths are pixels of the finished figure."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

INK, SOFT, RULE = "#222222", "#6e6e6e", "#d4d4d4"
LABEL, NOTE = 20, 16  # font sizes
_DETAIL = 2  # everything is drawn this much larger and reduced, for smooth lines

# From dark to light at even steps of lightness, and so told apart in print and by the colour-blind too.
_HEAT = np.array([(16, 18, 58), (32, 62, 114), (38, 112, 132), (72, 158, 126), (158, 198, 108), (246, 230, 148)])
_MISSING = (190, 190, 190)  # where a map has no value; none of its colours is a grey


class Canvas:
    """A figure while it is drawn.

    Args:
      width: of the figure.
      height: of the figure.
    """

    def __init__(self, width: float, height: float):
        self._image = Image.new("RGB", (round(width) * _DETAIL, round(height) * _DETAIL), "white")
        self._draw = ImageDraw.Draw(self._image)

    def line(self, corners: Sequence[tuple[float, float]], color: str = INK, width: float = 1) -> None:
        """A line through all corners."""
        points = [(x * _DETAIL, y * _DETAIL) for x, y in corners]
        self._draw.line(points, fill=color, width=round(width * _DETAIL), joint="curve")

    def dashes(self, left: float, right: float, y: float, color: str) -> None:
        """A dashed line from left to right."""
        for x in np.arange(left, right, 12):
            self.line([(x, y), (min(x + 7, right), y)], color, 2)

    def box(self, left: float, top: float, right: float, bottom: float, fill: str) -> None:
        """A filled rectangle, right and bottom not included."""
        corners = [round(value * _DETAIL) for value in (left, top, right, bottom)]
        self._draw.rectangle((*corners[:2], corners[2] - 1, corners[3] - 1), fill=fill)

    def dot(self, x: float, y: float, color: str, hollow: bool = False) -> None:
        """A small disc, or a ring."""
        box = [value * _DETAIL for value in (x - 6, y - 6, x + 6, y + 6)]
        self._draw.ellipse(box, fill="white" if hollow else color, outline=color, width=2 * _DETAIL)

    def text(self, x: float, y: float, text: str, anchor: str, size: int = LABEL, color: str = INK) -> None:
        """One line of text; for anchors see Pillow's text anchors."""
        font = ImageFont.load_default(size * _DETAIL)
        self._draw.text((x * _DETAIL, y * _DETAIL), text, fill=color, font=font, anchor=anchor)

    def picture(self, picture: Image.Image, x: float, y: float, size: tuple[int, int]) -> None:
        """A picture at (width, height): enlarged by repeating its pixels, reduced by averaging them."""
        smaller = size[0] < picture.width
        fitted = picture.resize(size, Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST)
        detailed = fitted.resize((size[0] * _DETAIL, size[1] * _DETAIL), Image.Resampling.NEAREST)
        self._image.paste(detailed, (round(x) * _DETAIL, round(y) * _DETAIL))

    def finish(self) -> Image.Image:
        """The figure."""
        return self._image.reduce(_DETAIL)


def text_width(text: str, size: int) -> float:
    """Width of a line of text."""
    return ImageFont.load_default(size * _DETAIL).getlength(text) / _DETAIL


def heat(values: Float[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """Colours of values from 0 (dark) to 1 (light), beyond which they stay; grey for NaN."""
    place = np.clip(np.nan_to_num(values), 0, 1) * (len(_HEAT) - 1)
    channels = [np.interp(place, np.arange(len(_HEAT)), _HEAT[:, channel]) for channel in range(3)]
    colors = np.rint(np.stack(channels, axis=-1))
    return np.where(np.isnan(values)[..., None], _MISSING, colors).astype(np.uint8)
