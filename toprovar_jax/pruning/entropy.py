"""What attention entropy says about scales, layers and tokens: ToProVAR's measures, as pure functions.

A map holds one entropy per token of a scale, in nats: low where attention is focused, high where it is diffuse.
Functions of maps can be jitted, grids and counts being static; what is known before a map is there is for NumPy.
Source: docs/spec/toprovar.md, sections 1 and 3 to 6.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from toprovar_jax.resize import resize_bilinear
from toprovar_jax.schedule import Grid

# How a map becomes the relative entropies of Eq. 5. "sum": they sum to 1, as printed, so that each is about
# 1 / tokens and Eq. 6 hardly moves. "mean": their mean is 1. "rank": 0 for the most focused token, 1 for the most
# diffuse one, evenly between.
Normalization = Literal["sum", "mean", "rank"]

# A second singular value below this share of the map's norm is rounding: the ratio is then undefined.
_SMALLEST_SINGULAR_SHARE = 1e-5

# The part of an even share of the kept tokens that no region of the image falls below, and the regions per side.
_REGION_FLOOR = 0.25
_REGIONS_PER_SIDE = (4, 2, 1)


def image_entropy(
    entropy: Float[Array, "*layers rows tokens"], batch: int
) -> Float[Array, "*layers batch tokens"]:
    """One entropy per token of an image: the mean of the two guidance halves, so that both keep the same tokens.

    Args:
      entropy: mean over heads, in nats; under guidance the conditional rows come first.
      batch: number of images, so that rows = batch, or 2 x batch under guidance.
    """
    *layers, rows, tokens = entropy.shape
    return jnp.mean(entropy.reshape(*layers, rows // batch, batch, tokens), axis=-3)


def focused_share(entropy: Float[Array, "*batch tokens"]) -> Float[Array, "*batch"]:
    """rho of Eq. 3: the share of tokens whose entropy lies below the map's mean; 0 for a constant map."""
    # Relative to one token, a constant map is exactly 0, and no rounding of its mean can split it.
    relative = entropy - entropy[..., :1]
    return jnp.mean(relative < jnp.mean(relative, axis=-1, keepdims=True), axis=-1, dtype=jnp.float32)


def singular_ratio(maps: Float[Array, "*batch height width"]) -> Float[Array, "*batch"]:
    """sigma_1 / sigma_2 of maps laid out on their grid; infinite where sigma_2 is 0 but for rounding.

    Args:
      maps: entropies.
    """
    norm = jnp.linalg.norm(maps, axis=(-2, -1))
    if min(maps.shape[-2:]) < 2:
        return jnp.full_like(norm, jnp.inf)
    singular = jnp.linalg.svd(maps, compute_uv=False)
    defined = singular[..., 1] > _SMALLEST_SINGULAR_SHARE * norm
    return jnp.where(defined, singular[..., 0] / jnp.where(defined, singular[..., 1], 1), jnp.inf)


def layer_score(ratio: Float[Array, "*batch"], beta: float) -> Float[Array, "*batch"]:
    """R of Eq. 4, exp(-beta (ratio - 1)): near 1 for detail layers, near 0 for global ones.

    An infinite ratio gives 0, which keeps the layer dense.
    """
    return jnp.where(jnp.isinf(ratio), 0, jnp.exp(-beta * (ratio - 1)))


def relative_entropy(entropy: Float[Array, "*batch tokens"]) -> Float[Array, "*batch tokens"]:
    """Entropies in relation to the mean of their map; 0, which means keep, where all of them are 0.

    Order and shares are those of Eq. 5, whose values are this over the number of tokens.
    """
    mean = jnp.mean(entropy, axis=-1, keepdims=True)
    return jnp.where(mean > 0, entropy / jnp.where(mean > 0, mean, 1), 0)


def expected_relative_entropy(tokens: int, normalization: Normalization) -> Float[np.ndarray, "_tokens"]:
    """The relative entropies of Eq. 5 as far as they are known before a map is.

    Exact for ranks, which are the same in every map. Of the other normalizations only the mean is known, which
    gives the exact mean of Eq. 6 where no probability is clipped.

    Args:
      tokens: of the map.
      normalization: see `Normalization`.

    Returns:
      Values [tokens], or [1] where only their mean is known.
    """
    if normalization == "rank":
        return np.arange(tokens) / max(tokens - 1, 1)
    return np.ones(1) / (tokens if normalization == "sum" else 1)


def tendency(
    relative: Float[np.ndarray, "tokens"], score: float, scale: int, num_scales: int
) -> Float[np.ndarray, "tokens"]:
    """q of Eq. 5: how much a token lends itself to pruning.

    Args:
      relative: entropies, relative to their map.
      score: R of the layer, see `layer_score`.
      scale: index of the scale, from 0.
      num_scales: scales of the run.
    """
    return (scale + 1) / num_scales * score * relative


def keep_probability(
    tendency: Float[np.ndarray, "tokens"], alpha_min: float, alpha_max: float
) -> Float[np.ndarray, "tokens"]:
    """P_keep of Eq. 6 for a scale from the start scale on; before it every token is kept."""
    return 1 - np.clip(alpha_min + (alpha_max - alpha_min) * tendency, 0, 1)


def resize_map(
    entropy: Float[Array, "batch tokens"], grid: Grid, new_grid: Grid
) -> Float[Array, "batch new_tokens"]:
    """The map of one scale on the grid of another, bilinear, so that neighbours differ and ties stay rare."""
    maps = entropy.reshape(-1, *grid, 1)
    return resize_bilinear(maps, new_grid).reshape(-1, new_grid.size)


def regions(grid: Grid, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The region of every token of a grid, and how many tokens each region keeps at least.

    The grid is cut into 4 x 4 regions, or fewer where `count` is small, and each keeps a quarter of its even share
    but at least one token, so that no part of an image is left to restoration alone.

    Args:
      grid: the scale.
      count: kept tokens of the whole scale, at least 1.

    Returns:
      Region indices [tokens], and floors [regions], which add up to `count` at most.
    """
    per_side = next(side for side in _REGIONS_PER_SIDE if 2 * side**2 <= count or side == 1)
    rows, columns = (np.arange(side) * min(side, per_side) // side for side in grid)
    region = (rows[:, None] * min(grid.width, per_side) + columns).ravel()
    even_share = np.bincount(region) * count / grid.size
    return region, np.maximum(1, (_REGION_FLOOR * even_share).astype(int))


def lowest_tokens(scores: Float[Array, "batch tokens"], grid: Grid, count: int) -> Int[Array, "batch count"]:
    """The `count` tokens of lowest score, ascending by index, with a floor in every region of the image.

    First come the lowest of every region, as many as `regions` grants it, then the lowest of all others. Equal
    scores go by index.

    Args:
      scores: one per token, for instance the entropy.
      grid: the scale.
      count: how many to keep, 1 to all.
    """
    region, floors = regions(grid, count)
    starts = np.cumsum(np.bincount(region)) - np.bincount(region)

    def choose(scores: Array) -> Array:
        index = jnp.arange(grid.size)
        by_region, _, order = jax.lax.sort((jnp.asarray(region), scores, index), num_keys=3)
        granted = index - jnp.asarray(starts)[by_region] < jnp.asarray(floors)[by_region]
        below_floor = jnp.zeros(grid.size, bool).at[order].set(granted)
        _, _, order = jax.lax.sort((~below_floor, scores, index), num_keys=3)
        return jnp.sort(order[:count])

    return jax.vmap(choose)(scores)
