"""Entropy maps and pruned tokens of a traced picture, laid out on its pixels."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from toprovar_jax.pruning.plan import Plan
from toprovar_jax.schedule import Grid
from toprovar_jax.visualization.canvas import NOTE, SOFT, Canvas, heat, text_width
from toprovar_jax.visualization.measurements import PictureTrace

_MARGIN, _GAP = 16, 12
_MAP_SIDE, _MAPS_PER_ROW = 192, 6  # tiles of entropy maps
_SMALL_SIDE, _SMALL_GAP, _LAYER_NAMES = 64, 4, 88  # tiles of the sheet by layers
_PICTURE_SIDES, _PICTURES_PER_ROW = (256, 512), 5  # tiles of pruned tokens, as large as the picture within limits
_LABEL_ROW, _NOTE_ROW = 26, 22
_BAR_WIDTH, _BAR_HEIGHT = 240, 14
_GREY, _VEIL = 200, 0.78  # what pruned tokens fade to, and how far


class _Tile(NamedTuple):
    picture: Image.Image
    label: str
    note: str


def entropy_by_scale(trace: PictureTrace) -> Image.Image:
    """The picture, and for every scale its mean entropy map."""
    maps = {scale: trace.mean_relative_entropy(scale) for scale in trace.mapped_scales}
    span = _common_range(list(maps.values()))
    tiles = [_Tile(trace.picture, "picture", "")]
    for scale, values in maps.items():
        grid = trace.plan.schedule[scale]
        keys = trace.num_keys(scale)[trace.full_layers(scale)]
        note = (
            f"{_size(grid)}, ln N = {math.log(keys.max()):.2f}" if keys.size else f"{_size(grid)}, no full layer"
        )
        tiles.append(_Tile(_heat_map(values, span), f"scale {scale}", note))
    full = all(trace.full_layers(scale).all() for scale in maps)
    layers = "layers" if full else "layers that ran on all tokens"
    caption = f"attention entropy, mean over {layers}, as a share of ln N (N keys seen)"
    size = _tile_size(trace.picture, _MAP_SIDE)
    canvas, bottom = _tiled(tiles, size, _MAPS_PER_ROW, (text_width(caption, NOTE), 2 * _NOTE_ROW))
    _color_bar(canvas, _MARGIN, bottom, span, caption)
    return canvas.finish()


def entropy_by_layer(trace: PictureTrace) -> Image.Image:
    """A sheet of entropy maps, layers down and scales across."""
    maps = {scale: trace.relative_entropy(scale) for scale in trace.mapped_scales}
    span = _common_range(list(maps.values()))
    width, height = _tile_size(trace.picture, _SMALL_SIDE)
    left, top = _MARGIN + _LAYER_NAMES, _MARGIN + 2 * _LABEL_ROW
    right = left + len(maps) * (width + _SMALL_GAP)
    bottom = top + trace.plan.depth * (height + _SMALL_GAP)
    caption = "attention entropy, as a share of ln N (N keys seen)"
    if any(np.isnan(values).any() for values in maps.values()):
        caption += "; grey: did not run"
    canvas = Canvas(
        max(right, _MARGIN + text_width(caption, NOTE)) + _MARGIN, bottom + _MARGIN + 2 * _NOTE_ROW + _MARGIN
    )
    canvas.text(left, _MARGIN + _LABEL_ROW / 2, "scale", "lm")
    for row in range(trace.plan.depth):
        y = top + row * (height + _SMALL_GAP)
        canvas.text(left - _GAP, y + height / 2, f"layer {row}", "rm", NOTE)
        for column, values in enumerate(maps.values()):
            x = left + column * (width + _SMALL_GAP)
            canvas.picture(_heat_map(values[row], span), x, y, (width, height))
    for column, scale in enumerate(maps):
        middle = left + column * (width + _SMALL_GAP) + width / 2
        canvas.text(middle, _MARGIN + 1.5 * _LABEL_ROW, str(scale), "mm", NOTE)
    _color_bar(canvas, _MARGIN, bottom + _MARGIN, span, caption)
    return canvas.finish()


def pruned_tokens(trace: PictureTrace) -> Image.Image:
    """The picture, and for every pruned scale the picture with the tokens greyed that did not run."""
    tiles = [_Tile(trace.picture, "picture", "")]
    for scale, share in trace.pruned.items():
        note = f"{_size(trace.plan.schedule[scale])}, {_pruned_note(trace.plan, scale, float(share.mean()))}"
        tiles.append(_Tile(grey_over(trace.picture, share), f"scale {scale}", note))
    captions = ["grey: tokens that did not run"]
    if not trace.pruned:
        captions = ["no token was pruned"]
    elif any(((share > 0) & (share < 1)).any() for share in trace.pruned.values()):
        captions[0] += ", fainter where some of the pruned layers ran them"
    if trace.plan.selection == "variance" and trace.plan.restore_scale is not None:
        captions.append("shown: the choice of self-attention in the conditional row")
    low, high = _PICTURE_SIDES
    side = math.sqrt(trace.picture.width * trace.picture.height)
    size = _tile_size(trace.picture, min(max(side, low), high))
    footer = max(text_width(caption, NOTE) for caption in captions), _NOTE_ROW * len(captions)
    canvas, bottom = _tiled(tiles, size, _PICTURES_PER_ROW, footer)
    for row, caption in enumerate(captions):
        canvas.text(_MARGIN, bottom + (row + 0.5) * _NOTE_ROW, caption, "lm", NOTE)
    return canvas.finish()


def grey_over(picture: Image.Image, share: Float[np.ndarray, "height width"]) -> Image.Image:
    """A picture with the cells of a token grid faded to grey, each as far as its share from 0 to 1 says."""
    pixels = np.asarray(picture, dtype=np.float32)
    rows, columns = (
        (np.arange(pixel) + 0.5) * cells // pixel
        for pixel, cells in zip(pixels.shape[:2], share.shape, strict=True)
    )
    amount = share[rows.astype(int)][:, columns.astype(int), None]
    grey = pixels.mean(axis=-1, keepdims=True) * (1 - _VEIL) + _GREY * _VEIL
    return Image.fromarray(np.rint(pixels * (1 - amount) + grey * amount).astype(np.uint8))


def _tiled(
    tiles: Sequence[_Tile], size: tuple[int, int], per_row: int, footer: tuple[float, float]
) -> tuple[Canvas, float]:
    """Tiles in rows, each with its label and note below, and room for a footer; also where that begins."""
    width, height = size
    column_width = max(width, *(math.ceil(text_width(tile.note, NOTE)) + _GAP for tile in tiles))
    num_rows = math.ceil(len(tiles) / per_row)
    per_row = math.ceil(len(tiles) / num_rows)  # as even as can be
    row_height = height + _LABEL_ROW + _NOTE_ROW + _GAP
    bottom = _MARGIN + num_rows * row_height
    content = max(per_row * (column_width + _GAP) - _GAP, footer[0])
    canvas = Canvas(2 * _MARGIN + content, bottom + footer[1] + _MARGIN)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, per_row)
        x, y = _MARGIN + column * (column_width + _GAP), _MARGIN + row * row_height
        canvas.picture(tile.picture, x, y, size)
        canvas.text(x, y + height + _LABEL_ROW / 2, tile.label, "lm")
        canvas.text(x, y + height + _LABEL_ROW + _NOTE_ROW / 2, tile.note, "lm", NOTE, SOFT)
    return canvas, bottom


def _tile_size(picture: Image.Image, side: float) -> tuple[int, int]:
    """Width and height of a tile of the picture's shape, as large as a square of this side."""
    factor = side / math.sqrt(picture.width * picture.height)
    return round(picture.width * factor), round(picture.height * factor)


def _heat_map(values: Float[np.ndarray, "height width"], span: tuple[float, float]) -> Image.Image:
    return Image.fromarray(heat((values - span[0]) / (span[1] - span[0])))


def _common_range(maps: Sequence[Float[np.ndarray, "..."]]) -> tuple[float, float]:
    """From 0 to 1 or narrower, in steps of 0.05, what all maps need."""
    values = np.concatenate([x.ravel() for x in maps] or [np.zeros(1)])
    values = values[~np.isnan(values)]
    low = math.floor(values.min(initial=1) * 20) / 20
    return low, max(math.ceil(values.max(initial=0) * 20) / 20, low + 0.05)


def _color_bar(canvas: Canvas, x: float, y: float, span: tuple[float, float], caption: str) -> None:
    """The bar between its ends' values, and below it what they are."""
    low, high = (f"{value:.2f}" for value in span)
    middle, start = y + _NOTE_ROW / 2, x + text_width(low, NOTE) + 8
    canvas.text(x, middle, low, "lm", NOTE)
    gradient = Image.fromarray(heat(np.linspace(0, 1, _BAR_WIDTH)[None]))
    canvas.picture(gradient, start, middle - _BAR_HEIGHT / 2, (_BAR_WIDTH, _BAR_HEIGHT))
    canvas.text(start + _BAR_WIDTH + 8, middle, high, "lm", NOTE)
    canvas.text(x, middle + _NOTE_ROW, caption, "lm", NOTE)


def _pruned_note(plan: Plan, scale: int, share: float) -> str:
    entry = plan.scales[scale]
    if not entry.runs:
        return "not run"
    layers = sum(kept < plan.schedule[scale].size for kept in entry.kept_tokens)
    return f"{share:.0%} in {layers} of {plan.depth} layers"


def _size(grid: Grid) -> str:
    return f"{grid.height}x{grid.width}"
