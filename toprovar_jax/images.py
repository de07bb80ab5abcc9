"""Pictures on the host: preparing one for the tokenizer, and back."""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image


def fit_image(image: Image.Image, height: int, width: int) -> Float[np.ndarray, "height width 3"]:
    """Covers the box with the image (Lanczos), crops the centre, and maps values to [-1, 1].

    Source: docs/spec/infinity.md, section 6.5.
    """
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    resized = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    cropped = resized.crop((left, top, left + width, top + height))
    return np.asarray(cropped, dtype=np.float32) / 255 * 2 - 1


def to_images(pixels: UInt8[np.ndarray, "batch height width 3"]) -> list[Image.Image]:
    """PIL images of a batch of RGB pixels."""
    return [Image.fromarray(image) for image in pixels]
