"""Sprite pack: from the npm package to one PNG grid, and its recolouring.

The sprites are Fluent 3D emoji, npm package `@lobehub/fluent-emoji-3d` 1.1.0 (MIT, Microsoft and LobeHub). They
are needed to train and to render, not to run the shipped model, and are not part of the repository:

    python -m bench.scenes.sprites

downloads the package through `npm pack` and writes `bench/scenes/sprites.png`.
"""

import pathlib
import subprocess
import tarfile
import tempfile

import numpy as np
from PIL import Image

from bench.scenes import world
from toprovar_jax import command_line
from toprovar_jax.errors import InputError

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
PACK_PATH = pathlib.Path(__file__).parent / "sprites.png"
SPRITE_PIXELS = 160
_COLUMNS = 8

# Colours of a tinted sprite at its mean brightness, sRGB.
COLOR_VALUES: dict[str, tuple[int, int, int]] = {
    "red": (222, 45, 50),
    "orange": (245, 140, 30),
    "yellow": (250, 208, 45),
    "green": (55, 170, 75),
    "blue": (50, 110, 230),
    "purple": (140, 75, 205),
    "pink": (248, 130, 185),
    "brown": (135, 85, 50),
    "black": (52, 52, 60),
    "white": (240, 240, 242),
}


def build_pack(package_folder: pathlib.Path, destination: pathlib.Path = PACK_PATH) -> None:
    """Writes the sprites of `world.NOUNS`, in that order, as one PNG grid of SPRITE_PIXELS cells.

    Args:
      package_folder: the unpacked npm package.
      destination: file to write.
    """
    rows = -(-len(world.NOUNS) // _COLUMNS)
    sheet = Image.new("RGBA", (_COLUMNS * SPRITE_PIXELS, rows * SPRITE_PIXELS))
    for index, noun in enumerate(world.NOUNS):
        with Image.open(package_folder / "assets" / f"{world.SPRITE_FILES[noun]}.webp") as image:
            # Resized with premultiplied alpha, or transparent pixels would bleed into the edges.
            sprite = image.convert("RGBa").resize((SPRITE_PIXELS, SPRITE_PIXELS), Image.Resampling.LANCZOS)
        sheet.paste(sprite.convert("RGBA"), _cell(index))
    sheet.save(destination, optimize=True)


def load_pack(path: pathlib.Path = PACK_PATH) -> np.ndarray:
    """Sprites of `world.NOUNS` as float32 RGBA in [0, 1], [noun, SPRITE_PIXELS, SPRITE_PIXELS, 4].

    Raises:
      InputError: there is no pack; the message names the command that builds it.
    """
    if not path.exists():
        raise InputError(f"no sprite pack at {path}: build it with `python -m bench.scenes.sprites`")
    with Image.open(path) as sheet:
        cells = [
            np.asarray(sheet.convert("RGBA").crop((left, top, left + SPRITE_PIXELS, top + SPRITE_PIXELS)))
            for left, top in map(_cell, range(len(world.NOUNS)))
        ]
    return np.stack(cells).astype(np.float32) / 255


def tint(sprite: np.ndarray, color: str) -> np.ndarray:
    """Recolours the dominant hue of a sprite (its light greys where it has none) and keeps the shading.

    Args:
      sprite: RGBA in [0, 1], [height, width, 4].
      color: a key of `COLOR_VALUES`.
    """
    rgb, alpha = sprite[..., :3], sprite[..., 3]
    mask = _tinted_part(rgb, alpha)
    luminance = rgb @ np.array([0.3, 0.59, 0.11], np.float32)
    weight = mask * alpha
    shade = np.clip(luminance / ((luminance * weight).sum() / (weight.sum() + 1e-6)), 0.35, 1.75)[..., None]
    target = np.array(COLOR_VALUES[color], np.float32) / 255
    painted = np.where(shade <= 1, target * shade, target + (1 - target) * (shade - 1) * 0.75)
    mixed = rgb * (1 - mask[..., None]) + np.clip(painted, 0, 1) * mask[..., None]
    return np.concatenate([mixed, alpha[..., None]], -1).astype(np.float32)


def _tinted_part(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """How far each pixel takes part in a recolouring, in [0, 1]."""
    hue, saturation, value = _hue_saturation_value(rgb)
    weight = alpha * saturation * value * (saturation > 0.25)
    if weight.sum() <= 0.12 * alpha.sum():
        return np.clip((value - 0.3) / 0.15, 0, 1) * np.clip((0.35 - saturation) / 0.1, 0, 1)
    histogram = np.histogram(hue, 36, (0, 1), weights=weight)[0]
    smooth = sum(
        factor * np.roll(histogram, shift) for shift, factor in zip(range(-2, 3), (0.5, 1, 1, 1, 0.5), strict=True)
    )
    dominant = (np.argmax(smooth) + 0.5) / 36
    distance = np.abs((hue - dominant + 0.5) % 1 - 0.5)
    return np.clip((0.13 - distance) / 0.04, 0, 1) * np.clip((saturation - 0.12) / 0.15, 0, 1)


def _hue_saturation_value(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    high, low = rgb.max(-1), rgb.min(-1)
    spread = high - low + 1e-6
    red, green, blue = np.moveaxis(rgb, -1, 0)
    by_green = np.where(high == green, (blue - red) / spread + 2, (red - green) / spread + 4)
    hue = np.where(high == red, ((green - blue) / spread) % 6, by_green) / 6
    return hue, spread / (high + 1e-6), high


def _cell(index: int) -> tuple[int, int]:
    return index % _COLUMNS * SPRITE_PIXELS, index // _COLUMNS * SPRITE_PIXELS


def main() -> None:
    """Downloads the package and writes the pack."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True, capture_output=True)
        (archive,) = pathlib.Path(folder).glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        build_pack(pathlib.Path(folder) / "package")
    print(f"wrote {PACK_PATH} ({len(world.NOUNS)} sprites)")


if __name__ == "__main__":
    command_line.run(main)
