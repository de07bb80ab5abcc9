"""The entry point of the kernel between a projection to queries, keys and values and attention over a cache."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.device import current_device, is_hopper


class RotatedQueries(NamedTuple):
    """What one call of `rotate_and_append` returns; a pytree.

    Attributes:
      query: [rows, tokens, heads, head_dim], normalised, scaled and rotated.
      key_cache: with the new keys, normalised and rotated, from `length` on.
      value_cache: with the new values from `length` on.
    """

    query: jax.Array
    key_cache: jax.Array
    value_cache: jax.Array


def can_rotate_and_append(query_key_value: jax.Array) -> bool:
    """Whether `rotate_and_append` runs on arrays like this one on the device that it is traced for."""
    return _reason_against(query_key_value) is None


def rotate_and_append(
    query_key_value: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    query_bias: jax.Array,
    value_bias: jax.Array,
    query_log_scale: jax.Array,
    max_log_scale: float,
    length: int,
) -> RotatedQueries:
    """Makes queries, keys and values of a projection ready for attention, in one pass over it.

    Queries and keys are divided by their length over a head's channels, queries multiplied with
    exp(min(query_log_scale, max_log_scale)), and adjacent channels (u, v) of both rotated to
    (u cos - v sin, u sin + v cos). A donated cache is written in place. Up to 63 places of it after the new tokens
    hold finite numbers without meaning afterwards. Forward only.

    Args:
      query_key_value: [rows, tokens, 3, heads, head_dim], bfloat16 or float16, before biases; head_dim a multiple
        of 32 up to 128.
      key_cache: [rows, capacity, heads, head_dim], the same dtype.
      value_cache: like `key_cache`.
      cos: [rows or 1, tokens, head_dim / 2], float32.
      sin: like `cos`.
      query_bias: [heads * head_dim]; keys have none.
      value_bias: [heads * head_dim].
      query_log_scale: [heads].
      max_log_scale: upper bound of `query_log_scale`.
      length: tokens that the caches hold; what does not fit behind them is not appended.

    Raises:
      ValueError: the device, dtype or head_dim is none that the kernel supports; see `can_rotate_and_append`.
    """
    if reason := _reason_against(query_key_value):
        raise ValueError(f"rotate_and_append cannot run this call: {reason}")
    return _run(
        query_key_value,
        key_cache,
        value_cache,
        cos,
        sin,
        query_bias,
        value_bias,
        query_log_scale,
        max_log_scale=max_log_scale,
        length=length,
    )


# Jitted, so that a model of many layers lowers each kernel once.
@functools.partial(jax.jit, static_argnames=("max_log_scale", "length"))
def _run(*arrays: jax.Array, max_log_scale: float, length: int) -> RotatedQueries:
    # Pallas' GPU dialects take half a second to import: only where they are used.
    from pallas_kernels.rotary import mosaic_gpu

    return RotatedQueries(*mosaic_gpu.rotate_and_append(*arrays, max_log_scale=max_log_scale, length=length))


def _reason_against(query_key_value: jax.Array) -> str | None:
    head_dim, device = query_key_value.shape[-1], current_device()
    if query_key_value.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it rotates bfloat16 and float16 only, not {query_key_value.dtype}"
    if head_dim % 32 or head_dim > 128:
        return f"it needs a head_dim that is a multiple of 32 up to 128, not {head_dim}"
    if not is_hopper(device):
        return f"it needs a Hopper GPU (H100, H200, GH200), and the device is {device.device_kind}"
    return None
