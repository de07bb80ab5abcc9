"""Pictures on the host: preparing one for the tokenizer, and back."""

from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from toprovar_jax.errors import InputError


def to_image(image: Any) -> Image.Image:
    """An RGB image of a PIL image or of uint8 pixels [height, width, 3].

    Raises:
      InputError: it is neither, or has no pixels.
    """
    pixels = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image
    dtype = getattr(pixels, "dtype", None)
    shape = tuple(getattr(pixels, "shape", ()))
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        got = f"{dtype} {list(shape)}" if dtype is not None else repr(image)
        raise InputError(f"the image must be a PIL image or a uint8 array [height, width, 3], got {got}")
    return Image.fromarray(np.asarray(pixels))


def fit_image(image: Image.Image, height: int, width: int) -> Float[np.ndarray, "height width 3"]:
    """Covers the box with the RGB image (Lanczos), crops the centre, and maps values to [-1, 1].

    Source: docs/spec/infinity.md, section 6.5.
    """
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    resized = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    cropped = resized.crop((left, top, left + width, top + height))
    return np.asarray(cropped, dtype=np.float32) / 255 * 2 - 1


def to_images(pixels: UInt8[np.ndarray, "batch height width 3"]) -> list[Image.Image]:
    """PIL images of a batch of RGB pixels."""
    return [Image.fromarray(image) for image in pixels]
