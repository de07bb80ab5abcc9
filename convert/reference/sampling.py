"""From logits to bits, codes and the next scale's input (docs/spec/infinity.md, section 5)."""

import math

from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional


def filtered_probabilities(
    logits: Float[Tensor, "*shape classes"], top_k: int, top_p: float
) -> Float[Tensor, "*shape classes"]:
    """Softmax of the logits that pass top-k and then top-p; 0 switches a filter off.

    Args:
      logits: unnormalised log-probabilities.
      top_k: values below the k-th largest are dropped; ties with it stay.
      top_p: classes are dropped from the smallest up while their sum is at most 1 - top_p; the largest stays.
    """
    if top_k > 0:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)
    return logits.softmax(dim=-1)


def draw(
    probabilities: Float[Tensor, "*shape classes"], exponential_draws: Float[Tensor, "*shape classes"]
) -> Int[Tensor, "*shape"]:
    """One class per row: the largest ratio of its probability to its own Exp(1) draw."""
    return (probabilities / exponential_draws).argmax(dim=-1)


def bits_to_codes(bits: Shaped[Tensor, "batch height width bits"]) -> Float[Tensor, "batch bits height width"]:
    """Bits as +-1/sqrt(bits) on the tokenizer grid, so that every code has length 1."""
    signs = 2 * bits.float() - 1
    return functional.normalize(signs / math.sqrt(bits.shape[-1]), dim=-1).permute(0, 3, 1, 2)


def resize(
    x: Float[Tensor, "batch channels height width"], grid: tuple[int, int]
) -> Float[Tensor, "batch channels new_height new_width"]:
    """Trilinear resize with one frame: half-pixel centres, edge clamp, no antialiasing even when shrinking."""
    return functional.interpolate(x[:, :, None], size=(1, *grid), mode="trilinear", align_corners=False)[:, :, 0]


def area_resize(
    x: Float[Tensor, "batch channels height width"], grid: tuple[int, int]
) -> Float[Tensor, "batch channels new_height new_width"]:
    """Every new cell is the mean of the cells that it touches."""
    return functional.interpolate(x, size=grid, mode="area")
