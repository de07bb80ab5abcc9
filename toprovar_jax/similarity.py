"""How far pictures are apart: structural similarity and squared error."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

_RADIUS = 5
_DEVIATION = 1.5
_LUMINANCE_CONSTANT = 0.01**2
_CONTRAST_CONSTANT = 0.03**2


@jax.jit
def structural_similarity(
    first: UInt8[Array | np.ndarray, "batch height width channels"],
    second: UInt8[Array | np.ndarray, "batch height width channels"],
) -> Float[Array, "batch"]:
    """SSIM of pairs of pictures: 1 for equal ones, about 0 for unrelated ones.

    Windows of 11x11 pixels, Gaussian with deviation 1.5, inside the picture; the mean over windows and channels.
    Source: Wang et al., Image quality assessment: from error visibility to structural similarity, 2004.

    Args:
      first: pictures of 11x11 pixels at least.
      second: what each is compared with.
    """
    if min(first.shape[1:3]) <= 2 * _RADIUS:
        raise ValueError(f"structural similarity needs 11x11 pixels at least, got {first.shape[1:3]}")
    x, y = (jnp.asarray(pictures, jnp.float32) / 255 for pictures in (first, second))
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x * mean_x, _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _LUMINANCE_CONSTANT) / (mean_x**2 + mean_y**2 + _LUMINANCE_CONSTANT)
    contrast = (2 * covariance + _CONTRAST_CONSTANT) / (variance_x + variance_y + _CONTRAST_CONSTANT)
    return jnp.mean(luminance * contrast, axis=(1, 2, 3))


def _blur(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch _height _width channels"]:
    """Gaussian mean of every window that lies inside."""
    weights = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _DEVIATION) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (1, 2):
        windows = x.shape[axis] - 2 * _RADIUS
        # Shifted sums are exact on every device; a convolution may round its inputs.
        shifted = (jax.lax.slice_in_dim(x, start, start + windows, axis=axis) for start in range(len(weights)))
        x = sum((weight * part for weight, part in zip(weights, shifted, strict=True)), jnp.float32(0))
    return x


@jax.jit
def mean_squared_error(
    first: UInt8[Array | np.ndarray, "batch height width channels"],
    second: UInt8[Array | np.ndarray, "batch height width channels"],
) -> Float[Array, "batch"]:
    """Mean over pixels and channels of the squared difference, for channels from 0 to 1."""
    difference = (jnp.asarray(first, jnp.float32) - jnp.asarray(second, jnp.float32)) / 255
    return jnp.mean(jnp.square(difference), axis=(1, 2, 3))
