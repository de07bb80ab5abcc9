"""Attention by cuDNN; its entropy by an identity, from a second call with the keys in the values' place."""

import jax
import jax.numpy as jnp


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float, kv_length: int, return_entropy: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Softmax attention over the first `kv_length` keys.

    Args:
      query: [batch, q_tokens, heads, head_dim], bfloat16 or float16; head_dim a multiple of 8 up to 128.
      key: [batch, capacity, kv_heads, head_dim]; kv_heads divides heads.
      value: [batch, capacity, kv_heads, head_dim].
      scale: factor of the logits.
      kv_length: number of valid keys, 1 to capacity.
      return_entropy: without it the entropy is None and the second call is not made.

    Returns:
      output [batch, q_tokens, heads, head_dim] in the query's dtype; entropy and logsumexp, float32
      [batch, heads, q_tokens], in nats.
    """
    key, value = key[:, :kv_length], value[:, :kv_length]

    def attend(value: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.nn.dot_product_attention(
            query, key, value, scale=scale, implementation="cudnn", return_residual=True
        )

    output, logsumexp = attend(value)
    logsumexp = logsumexp.astype(jnp.float32).transpose(0, 2, 1)
    if not return_entropy:
        return output, None, logsumexp
    return output, entropy_by_identity(query, attend(key)[0], logsumexp, scale), logsumexp


def entropy_by_identity(query: jax.Array, average_key: jax.Array, logsumexp: jax.Array, scale: float) -> jax.Array:
    """H = logsumexp - sum_j a_j x_j, where sum_j a_j x_j = scale query · (sum_j a_j key_j).

    The two terms nearly cancel where attention is sharp, so what `average_key` lost to its dtype is multiplied by
    the size of the logits.

    Args:
      query: [batch, q_tokens, heads, head_dim].
      average_key: sum_j a_j key_j, the shape of the query.
      logsumexp: [batch, heads, q_tokens], float32.
      scale: factor of the logits.

    Returns:
      entropy [batch, heads, q_tokens], float32, in nats.
    """
    mean_logit = scale * jnp.sum(query.astype(jnp.float32) * average_key.astype(jnp.float32), axis=-1)
    return jnp.maximum(logsumexp - mean_logit.transpose(0, 2, 1), 0.0)
