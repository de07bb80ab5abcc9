"""The text encoder: T5 with gated GELU (flan-t5-xl), encoder half only.

Pre-norm blocks without biases, relative position bias from one table shared by all blocks, attention logits that
are not scaled by the head size. The residual stream is float32 for every dtype, because T5's grows beyond what
half-precision sums resolve; the products that end in it are float32 too, and a GPU adds them to it as it makes
them. Reading the weights is all that a prompt's few tokens cost, so those that share an input lie side by side in
one kernel, which one product reads.
Source: docs/spec/infinity.md, section 3.1; Raffel et al., "Exploring the Limits of Transfer Learning with a
Unified Text-to-Text Transformer" (2020), section 2.1; Shazeer, "GLU Variants Improve Transformer" (2020).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from toprovar_jax.config import T5Config
from toprovar_jax.precision import activation_dtype, matmul_precision


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Row of the bias table for every pair of positions.

    Half of the buckets serve keys after the query. Of each half, one half again holds one distance each, the rest
    grow logarithmically up to `max_distance`; everything beyond shares the last bucket.

    Returns:
      int32 [query length, key length].
    """
    distance = np.arange(length) - np.arange(length)[:, None]
    per_side = num_buckets // 2
    num_exact = per_side // 2
    after_query = np.where(distance > 0, per_side, 0)
    distance = np.abs(distance)
    growth = np.log(np.maximum(distance, 1) / num_exact) / math.log(max_distance / num_exact)
    # The margin keeps distances exactly on a boundary (16, 32, ... for the defaults) from rounding below it.
    logarithmic = num_exact + np.floor(growth * (per_side - num_exact) + 1e-6).astype(np.int64)
    bucket = np.where(distance < num_exact, distance, np.minimum(logarithmic, per_side - 1))
    return (after_query + bucket).astype(np.int32)


_INITIALIZE = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")


def _linear(
    in_channels: int,
    out_channels: int,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    *,
    kernel_init: nnx.Initializer = _INITIALIZE,
    output_dtype: DTypeLike | None = None,
) -> nnx.Linear:
    return nnx.Linear(
        in_channels,
        out_channels,
        use_bias=False,
        dtype=dtype,
        param_dtype=dtype,
        precision=matmul_precision(dtype),
        kernel_init=kernel_init,
        preferred_element_type=output_dtype,
        rngs=rngs,
    )


def _norm(config: T5Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.embed_dim, epsilon=config.norm_epsilon, dtype=jnp.float32, rngs=rngs)


def _small_queries(head_dim: int) -> nnx.Initializer:
    """T5 initialises queries small where other transformers scale the logits."""

    def initialize(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Array:
        queries = shape[1] // 3
        return _INITIALIZE(key, shape, dtype).at[:, :queries].multiply(head_dim**-0.5)

    return initialize


class Attention(nnx.Module):
    """Self attention of T5: no scaling of the logits, an additive bias per head."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.head_dim = config.head_dim
        self.precision = matmul_precision(dtype)
        inner = config.num_heads * config.head_dim
        self.query_key_value = _linear(
            config.embed_dim, 3 * inner, dtype, rngs, kernel_init=_small_queries(config.head_dim)
        )
        self.output = _linear(inner, config.embed_dim, dtype, rngs, output_dtype=jnp.float32)

    def __call__(
        self,
        x: Float[Array, "batch tokens channels"],
        bias: Float32[Array, "heads tokens tokens"],
        mask: Bool[Array, "batch tokens"],
    ) -> Float32[Array, "batch tokens channels"]:
        """Attends from every position to the real ones."""
        packed = self.query_key_value(x).reshape(*x.shape[:2], 3, -1, self.head_dim)
        query, key, value = (packed[:, :, part] for part in range(3))
        logits = jnp.einsum(
            "bqhd,bkhd->bhqk", query, key, precision=self.precision, preferred_element_type=jnp.float32
        )
        logits = jnp.where(mask[:, None, None], logits + bias, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        attended = jnp.einsum("bhqk,bkhd->bqhd", weights, value, precision=self.precision)
        return self.output(attended.reshape(*x.shape[:2], -1))


class GatedMLP(nnx.Module):
    """down(gelu(gate(x)) * up(x)), GELU in its tanh approximation."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.gate_up = _linear(config.embed_dim, 2 * config.mlp_dim, dtype, rngs)
        self.down = _linear(config.mlp_dim, config.embed_dim, dtype, rngs, output_dtype=jnp.float32)

    def __call__(self, x: Float[Array, "batch tokens channels"]) -> Float32[Array, "batch tokens channels"]:
        """Applied to every position by itself."""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(nnx.gelu(gate, approximate=True) * up)


class Block(nnx.Module):
    """Attention and feed-forward layer, each on the normed residual stream."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, dtype, rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = GatedMLP(config, dtype, rngs)

    def __call__(
        self,
        x: Float32[Array, "batch tokens channels"],
        bias: Float32[Array, "heads tokens tokens"],
        mask: Bool[Array, "batch tokens"],
    ) -> Float32[Array, "batch tokens channels"]:
        """The residual stream after this block."""
        x = x + self.attention(self.attention_norm(x), bias, mask)
        return x + self.mlp(self.mlp_norm(x))


class T5Encoder(nnx.Module):
    """Tokens to text features.

    Args:
      config: shapes.
      dtype: float32 or bfloat16, of matrix products and of every parameter but the norms'; float8_e4m3fn is taken
        as bfloat16.
      rngs: initialises the parameters.
    """

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype = activation_dtype(dtype)
        normal = nnx.initializers.normal(1.0)
        self.token_embedding = nnx.Param(normal(rngs.params(), (config.vocab_size, config.embed_dim), dtype))
        self.relative_attention_bias = nnx.Param(
            normal(rngs.params(), (config.num_buckets, config.num_heads), dtype)
        )
        self.blocks = nnx.List([Block(config, dtype, rngs) for _ in range(config.num_layers)])
        self.final_norm = _norm(config, rngs)

    def __call__(
        self, tokens: Int[Array, "batch tokens"], mask: Bool[Array, "batch tokens"]
    ) -> Float32[Array, "batch tokens channels"]:
        """Features of every position.

        Args:
          tokens: vocabulary indices.
          mask: which positions are real; the others are attended to by none, and their own features mean nothing.
        """
        buckets = relative_position_buckets(tokens.shape[1], self.config.num_buckets, self.config.max_distance)
        bias = self.relative_attention_bias[...][buckets].astype(jnp.float32).transpose(2, 0, 1)
        x = self.token_embedding[...][tokens].astype(jnp.float32)
        for block in self.blocks:
            x = block(x, bias, mask)
        return self.final_norm(x)
