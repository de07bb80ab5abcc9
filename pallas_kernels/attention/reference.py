"""Attention, its entropy and its logsumexp in plain jax.numpy, chunked over keys: every device, shape and dtype.

The recurrences are those of the kernel (pallas_kernels/README.md, "Recurrences") in natural logarithms.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# One chunk of logits is [batch, heads, q_tokens, CHUNK] in float32; calls with fewer keys take no loop.
CHUNK = 1024


class _Running(NamedTuple):
    """What a row knows after some of its keys; every sum runs over the keys seen.

    y are the products of query and keys, x = scale (y - max y) the logits below their maximum. Subtracting before
    scaling keeps x exactly 0 at the maximum: the other way round a compiler may fuse both into one rounding.
    """

    maximum: jax.Array  # max y           [batch, kv_heads, group, q_tokens]
    total: jax.Array  # sum exp(x)        [batch, kv_heads, group, q_tokens]
    weighted: jax.Array  # sum exp(x) x   [batch, kv_heads, group, q_tokens]
    output: jax.Array  # sum exp(x) value [batch, kv_heads, group, q_tokens, head_dim]


def _observe(query: jax.Array, key: jax.Array, value: jax.Array, scale: float) -> _Running:
    """The running state of one chunk of keys alone."""
    exact = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    dot = functools.partial(jnp.einsum, precision=exact, preferred_element_type=jnp.float32)
    products = dot("btkgd,bskd->bkgts", query, key)
    maximum = products.max(axis=-1)
    shifted = scale * (products - maximum[..., None])
    weights = jnp.exp(shifted)
    return _Running(
        maximum=maximum,
        total=weights.sum(axis=-1),
        weighted=(weights * shifted).sum(axis=-1),
        output=dot("bkgts,bskd->bkgtd", weights.astype(value.dtype), value),
    )


def _move(state: _Running, maximum: jax.Array, scale: float) -> _Running:
    """Restates the sums relative to another maximum; the second term of `weighted` is easily forgotten."""
    change = scale * (state.maximum - maximum)
    factor = jnp.exp(change)
    return _Running(
        maximum=maximum,
        total=factor * state.total,
        weighted=factor * (state.weighted + change * state.total),
        output=factor[..., None] * state.output,
    )


def _merge(left: _Running, right: _Running, scale: float) -> _Running:
    maximum = jnp.maximum(left.maximum, right.maximum)
    left, right = _move(left, maximum, scale), _move(right, maximum, scale)
    return _Running(
        maximum=maximum,
        total=left.total + right.total,
        weighted=left.weighted + right.weighted,
        output=left.output + right.output,
    )


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float, kv_length: int, return_entropy: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Softmax attention over the first `kv_length` keys; memory grows linearly with their number.

    float32 inputs are multiplied in full float32; bfloat16 and float16 inputs accumulate in float32 and round the
    weights to the value's dtype before the second product, as every flash attention does.

    Args:
      query: [batch, q_tokens, heads, head_dim], float32, bfloat16 or float16.
      key: [batch, capacity, kv_heads, head_dim]; kv_heads divides heads.
      value: [batch, capacity, kv_heads, head_dim].
      scale: factor of the logits.
      kv_length: number of valid keys, 1 to capacity.
      return_entropy: without it the entropy is None.

    Returns:
      output [batch, q_tokens, heads, head_dim] in the query's dtype; entropy and logsumexp, float32
      [batch, heads, q_tokens], in nats.
    """
    batch, q_tokens, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, q_tokens, kv_heads, heads // kv_heads, head_dim)

    def observe(start: int | jax.Array, size: int) -> _Running:
        keys, values = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=1) for x in (key, value))
        return _observe(grouped, keys, values, scale)

    state = observe(0, min(CHUNK, kv_length))
    full, tail = divmod(kv_length, CHUNK)
    if full > 1:
        state = jax.lax.fori_loop(1, full, lambda i, seen: _merge(seen, observe(i * CHUNK, CHUNK), scale), state)
    if full and tail:
        state = _merge(state, observe(full * CHUNK, tail), scale)

    output = state.output / state.total[..., None]
    output = output.transpose(0, 3, 1, 2, 4).reshape(query.shape).astype(query.dtype)
    log_total = jnp.log(state.total)
    # The true value is never negative, its rounding can be.
    entropy = jnp.maximum(log_total - state.weighted / state.total, 0.0)
    rows = (batch, heads, q_tokens)
    logsumexp = (scale * state.maximum + log_total).reshape(rows)
    return output, entropy.reshape(rows) if return_entropy else None, logsumexp
