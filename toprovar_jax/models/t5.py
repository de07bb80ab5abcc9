"""The text encoder: T5 with gated GELU (flan-t5-xl), encoder half only.

Pre-norm blocks without biases, relative position bias from one table shared by all blocks, attention logits that
are not scaled by the head size. The residual stream is float32 for every dtype, because T5's grows beyond what
half-precision sums resolve.
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
from toprovar_jax.precision import matmul_precision


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


def _linear(
    in_channels: int, out_channels: int, dtype: DTypeLike, rngs: nnx.Rngs, scale: float = 1.0
) -> nnx.Linear:
    return nnx.Linear(
        in_channels,
        out_channels,
        use_bias=False,
        dtype=dtype,
        param_dtype=dtype,
        precision=matmul_precision(dtype),
        kernel_init=nnx.initializers.variance_scaling(scale, "fan_in", "normal"),
        rngs=rngs,
    )


def _project(x: Array, *projections: nnx.Linear) -> list[Array]:
    """Applies every projection to x, one after the other.

    Left to itself, XLA for GPUs copies the weights of products that share an operand side by side, at every call,
    to make one product of them. Reading the weights is all that a prompt's few tokens cost: the copy triples it.
    """
    outputs, x = [], x.astype(projections[0].kernel.dtype)
    for projection in projections:
        output, x = jax.lax.optimization_barrier((projection(x), x))
        outputs.append(output)
    return outputs


def _norm(config: T5Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.embed_dim, epsilon=config.norm_epsilon, dtype=jnp.float32, rngs=rngs)


class Attention(nnx.Module):
    """Self attention of T5: no scaling of the logits, an additive bias per head."""

    def __init__(self, config: T5Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.head_dim = config.head_dim
        self.precision = matmul_precision(dtype)
        inner = config.num_heads * config.head_dim
        # T5 initialises queries small where other transformers scale the logits.
        self.query = _linear(config.embed_dim, inner, dtype, rngs, scale=1 / config.head_dim)
        self.key = _linear(config.embed_dim, inner, dtype, rngs)
        self.value = _linear(config.embed_dim, inner, dtype, rngs)
        self.output = _linear(inner, config.embed_dim, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "batch tokens channels"],
        bias: Float32[Array, "heads tokens tokens"],
        mask: Bool[Array, "batch tokens"],
    ) -> Float[Array, "batch tokens channels"]:
        """Attends from every position to the real ones."""
        query, key, value = (
            projected.reshape(*x.shape[:2], -1, self.head_dim)
            for projected in _project(x, self.query, self.key, self.value)
        )
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
        self.gate = _linear(config.embed_dim, config.mlp_dim, dtype, rngs)
        self.up = _linear(config.embed_dim, config.mlp_dim, dtype, rngs)
        self.down = _linear(config.mlp_dim, config.embed_dim, dtype, rngs)

    def __call__(self, x: Float[Array, "batch tokens channels"]) -> Float[Array, "batch tokens channels"]:
        """Applied to every position by itself."""
        gate, up = _project(x, self.gate, self.up)
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
      dtype: float32 or bfloat16, of matrix products and of every parameter but the norms'.
      rngs: initialises the parameters.
    """

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
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
