"""Compositor: scenes to images, on whatever device the arrays are.

A background, then for every object a soft shadow and a turned, scaled sprite, each looked up bilinearly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageFilter

from bench.scenes import dataset, sprites, world
from bench.scenes.dataset import SceneBatch

IMAGE_SIZE = 256
_MARGIN = 2  # transparent pixels around every sprite, so that lookups beside it find nothing
_SHADOW_PIXELS = 32
_SHADOW_OFFSET = (0.08, 0.16)  # in radii, right and down
_SHADOW_STRENGTH = 0.35


class Atlas(NamedTuple):
    """Everything that pictures are made of.

    Attributes:
      sprites: premultiplied RGBA of `dataset.SPRITES`, with a transparent margin.
      shadows: blurred outlines of `world.NOUNS`, with a transparent margin.
      backgrounds: RGB of `world.BACKGROUNDS`; their size is that of the images.
    """

    sprites: UInt8[Array, "sprites side side 4"]
    shadows: UInt8[Array, "nouns shadow_side shadow_side"]
    backgrounds: UInt8[Array, "backgrounds height width 3"]


def build_atlas(pack: np.ndarray, image_size: int = IMAGE_SIZE) -> Atlas:
    """Tints the sprites and paints shadows and backgrounds.

    Args:
      pack: sprites of `world.NOUNS`, float RGBA in [0, 1], as `sprites.load_pack` returns them.
      image_size: side of the images in pixels.
    """
    untinted = dict(zip(world.NOUNS, pack, strict=True))
    images = [
        untinted[noun] if color is None else sprites.tint(untinted[noun], color) for noun, color in dataset.SPRITES
    ]
    premultiplied = [np.concatenate([image[..., :3] * image[..., 3:], image[..., 3:]], -1) for image in images]
    margin = ((_MARGIN, _MARGIN), (_MARGIN, _MARGIN))
    return Atlas(
        sprites=jnp.asarray(np.stack([np.pad(_to_bytes(image), (*margin, (0, 0))) for image in premultiplied])),
        shadows=jnp.asarray(np.stack([np.pad(_shadow(image[..., 3]), margin) for image in pack])),
        backgrounds=jnp.asarray(
            np.stack([_to_bytes(_background(name, image_size)) for name in world.BACKGROUNDS])
        ),
    )


def render(atlas: Atlas, scenes: SceneBatch) -> Float[Array, "batch height width 3"]:
    """RGB images with values in [-1, 1]; meant to be called inside jit."""
    return jax.vmap(_render_one, in_axes=(None, 0))(atlas, scenes)


def to_bytes(images: Float[Array, "*batch height width 3"]) -> np.ndarray:
    """8-bit images of images with values in [-1, 1]."""
    return _to_bytes((np.asarray(images) + 1) / 2)


def _render_one(atlas: Atlas, scene: SceneBatch) -> Array:
    height, width = atlas.backgrounds.shape[1:3]
    rows = jnp.asarray((np.arange(height, dtype=np.float32) + 0.5) * 2 / height - 1)[:, None]
    columns = jnp.asarray((np.arange(width, dtype=np.float32) + 0.5) * 2 / width - 1)[None]
    image = atlas.backgrounds[scene.background].astype(jnp.float32) / 255
    for slot in range(world.MAX_OBJECTS):
        x, y, radius, angle = scene.placement[slot]
        cos, sin = jnp.cos(angle) / radius, jnp.sin(angle) / radius
        present = scene.present[slot]

        down, right = rows - y, columns - x
        shadow_right, shadow_down = right - _SHADOW_OFFSET[0] * radius, down - _SHADOW_OFFSET[1] * radius
        shadow = _lookup(
            atlas.shadows,
            scene.noun[slot],
            cos * shadow_right + sin * shadow_down,
            cos * shadow_down - sin * shadow_right,
        )
        image = image * (1 - _SHADOW_STRENGTH * present * shadow[..., None])
        sprite = _lookup(atlas.sprites, scene.sprite[slot], cos * right + sin * down, cos * down - sin * right)
        image = image * (1 - present * sprite[..., 3:]) + present * sprite[..., :3]
    return image * 2 - 1


def _lookup(table: Array, index: Array, x: Array, y: Array) -> Array:
    """Bilinear samples in [0, 1] of one entry of a table, at x and y in [-1, 1] across it without its margin."""
    side = table.shape[1]

    def to_pixels(position: Array) -> Array:
        pixels = (position + 1) / 2 * (side - 2 * _MARGIN) - 0.5 + _MARGIN
        return jnp.clip(pixels, 0, side - 1.001)

    column, row = to_pixels(x), to_pixels(y)
    left, top = jnp.floor(column).astype(jnp.int32), jnp.floor(row).astype(jnp.int32)
    along, down = column - left, row - top
    if table.ndim == 4:
        along, down = along[..., None], down[..., None]

    def texel(row_offset: int, column_offset: int) -> Array:
        return table[index, top + row_offset, left + column_offset].astype(jnp.float32) / 255

    upper = texel(0, 0) * (1 - along) + texel(0, 1) * along
    lower = texel(1, 0) * (1 - along) + texel(1, 1) * along
    return upper * (1 - down) + lower * down


def _shadow(alpha: np.ndarray) -> np.ndarray:
    blurred = Image.fromarray(_to_bytes(alpha)).filter(ImageFilter.GaussianBlur(alpha.shape[0] / 20))
    return np.asarray(blurred.resize((_SHADOW_PIXELS, _SHADOW_PIXELS), Image.Resampling.BOX))


def _background(name: str, size: int) -> np.ndarray:
    """RGB in [0, 1]. Smooth or regular on purpose: noise would cost the tokenizer bits that the objects need."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    x, y = np.meshgrid(grid, grid)
    down = (y[..., None] + 1) / 2
    color = name.removesuffix(" background").removesuffix(" checkered floor")
    image: np.ndarray
    if color in world.PALE_COLORS:
        image = np.broadcast_to(np.array(world.PALE_COLORS[color], np.float32), (size, size, 3))
        if name.endswith("floor"):
            odd = (np.floor(x * 4) + np.floor(y * 4)) % 2
            image = image * (1 - 0.13 * odd[..., None])
    elif name == "green meadow":
        grass = _edge(y - 0.1 - 0.07 * np.sin(2.5 * x + 1), 60)
        image = _mix(_rgb(150, 205, 250) + 30 * down, _rgb(105, 185, 80) - 35 * down, grass)
    elif name == "sandy beach":
        water = _mix(_rgb(165, 215, 250), _rgb(60, 150, 200), _edge(y + 0.25, 80))
        image = _mix(water, _rgb(238, 214, 160), _edge(y - 0.15, 60))
    elif name == "night sky":
        image = _rgb(18, 22, 60) + _rgb(20, 20, 60) * down
        stars = np.random.default_rng(3).uniform((-1, -1, 0.008, 60), (1, 1, 0.016, 150), (40, 4))
        for star_x, star_y, radius, brightness in stars:
            distance = ((x - star_x) ** 2 + (y - star_y) ** 2) / radius**2
            image = image + brightness * np.exp(-distance)[..., None]
    elif name == "wooden table":
        planks = np.abs((x * 2) % 1 - 0.5) > 0.48
        image = _rgb(186, 134, 84) + 9 * np.sin(9 * y + 1.3 * np.sin(3 * x))[..., None] - 40 * planks[..., None]
    else:
        raise ValueError(f"no such background: {name}")
    return image.astype(np.float32) / 255


def _rgb(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def _edge(distance: np.ndarray, sharpness: float) -> np.ndarray:
    return 1 / (1 + np.exp(-sharpness * distance))[..., None]


def _mix(outside: np.ndarray, inside: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return outside * (1 - weight) + inside * weight


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)
