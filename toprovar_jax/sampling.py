"""From logits to bits: guidance, temperature, filtering, random draws (docs/spec/infinity.md, section 5).

All settings may be traced values, so that one compiled step serves every setting.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8

from toprovar_jax.schedule import ScaleSchedule

FloatScalar = float | Float[Array, ""] | Float[np.ndarray, ""]
IntScalar = int | Int[Array, ""] | Int[np.ndarray, ""]


def guide(
    conditional: Float[Array, "*shape"], unconditional: Float[Array, "*shape"], guidance_scale: FloatScalar
) -> Float[Array, "*shape"]:
    """Classifier-free guidance: scale x conditional + (1 - scale) x unconditional."""
    scale = jnp.asarray(guidance_scale)
    return scale * conditional + (1 - scale) * unconditional


def filter_probabilities(
    logits: Float[Array, "*batch classes"], top_k: IntScalar, top_p: FloatScalar
) -> Float[Array, "*batch classes"]:
    """Probabilities after top-k and then top-p filtering over the last axis.

    Args:
      logits: unnormalised log-probabilities.
      top_k: keep values at least as large as the k-th largest (ties stay); 0 is off.
      top_p: drop the smallest values while their cumulative probability is at most 1 - top_p; the largest
        always stays; 0 is off.
    """
    classes = logits.shape[-1]
    index = jnp.arange(classes)
    # Ranks from pairwise comparisons: for the two classes of a bit this is far cheaper than a sort.
    own, other = logits[..., :, None], logits[..., None, :]
    num_larger = jnp.sum(other > own, axis=-1)
    kept = (num_larger < top_k) | (top_k <= 0)
    logits = jnp.where(kept, logits, -jnp.inf)

    probabilities = jax.nn.softmax(logits, axis=-1)
    own, other = logits[..., :, None], logits[..., None, :]
    not_after = (other < own) | ((other == own) & (index[None, :] <= index[:, None]))
    cumulative = jnp.sum(jnp.where(not_after, probabilities[..., None, :], 0.0), axis=-1)
    is_last = jnp.sum(not_after, axis=-1) == classes
    kept = (cumulative > 1 - top_p) | is_last | (top_p <= 0)
    return jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)


def exponential_draws(
    key: Key[Array, ""], schedule: ScaleSchedule, bits: int
) -> tuple[Float[Array, "_tokens bits 2"], ...]:
    """Exp(1) draws of one image for every scale; each depends only on the key, its scale, its token and its bit.

    One generator serves all scales: its code takes long to compile, and each scale's step would have its own.
    """
    sizes = [grid.size for grid in schedule]
    scales = jnp.asarray(np.repeat(np.arange(len(sizes)), sizes))
    tokens = jnp.asarray(np.concatenate([np.arange(size) for size in sizes]))

    def draw(scale: Int[Array, ""], token: Int[Array, ""]) -> Float[Array, "bits 2"]:
        token_key = jax.random.fold_in(jax.random.fold_in(key, scale), token)
        return jax.random.exponential(token_key, (bits, 2))

    return tuple(jnp.split(jax.vmap(draw)(scales, tokens), np.cumsum(sizes)[:-1]))


def sample_classes(
    probabilities: Float[Array, "*batch classes"], draws: Float[Array, "*batch classes"]
) -> UInt8[Array, "*batch"]:
    """Draws one class each: argmax of probability / Exp(1) draw, the first one on ties."""
    # A draw may be 0, once in millions: a class without probability must not win by 0 / 0 then.
    scores = jnp.where(probabilities > 0, probabilities / draws, 0.0)
    return jnp.argmax(scores, axis=-1).astype(jnp.uint8)
