"""How the text is attended to: pooled once per image, and by every token of the image in every block.

Source: docs/spec/infinity.md, sections 3.4 and 4.6. Precision: `precision.py`. Shapes: rows = images, doubled
under guidance (conditional rows first).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float

from toprovar_jax.config import InfinityConfig
from toprovar_jax.models.linear import linear
from toprovar_jax.precision import matmul_precision


class KeyValue(NamedTuple):
    """Keys and values of one layer."""

    key: Float[Array, "rows length heads head_dim"]
    value: Float[Array, "rows length heads head_dim"]


class FoldedText(NamedTuple):
    """Cross attention to one text with its keys and values multiplied into the projections of queries and outputs.

    Attributes:
      to_logits: from normed tokens to logits per head and text position, before 1/sqrt(head_dim).
      logit_bias: added after it, float32; minus infinity where the text is padded.
      to_output: from weights per head and text position to the residual stream, without bias.
    """

    to_logits: Float[Array, "rows heads_text channels"]
    logit_bias: Float[Array, "rows heads text_tokens"]
    to_output: Float[Array, "rows heads_text channels"]


def split_heads(
    x: Float[Array, "rows tokens channels"], num_heads: int
) -> Float[Array, "rows tokens heads head_dim"]:
    """Views channels as heads, head-major."""
    return x.reshape(*x.shape[:-1], num_heads, x.shape[-1] // num_heads)


def text_attention(
    query: Float[Array, "rows tokens heads head_dim"],
    key_value: KeyValue,
    mask: Bool[Array, "rows text_tokens"],
) -> Float[Array, "rows tokens channels"]:
    """Attention to the text with the usual 1/sqrt(head_dim); padding of shorter prompts is masked out."""
    precision = matmul_precision(query.dtype)
    logits = jnp.einsum(
        "rqhd,rkhd->rhqk", query, key_value.key, precision=precision, preferred_element_type=jnp.float32
    )
    logits = jnp.where(mask[:, None, None, :], logits * query.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    output = jnp.einsum("rhqk,rkhd->rqhd", weights, key_value.value, precision=precision)
    return output.reshape(*output.shape[:2], -1)


class TextPool(nnx.Module):
    """Attentive pooling: one learned query looks at the text (section 3.4)."""

    def __init__(self, config: InfinityConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, heads = config.embed_dim, config.num_pool_heads
        self.query = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (heads, width // heads), jnp.float32))
        self.key_value = linear(
            config.text_channels, 2 * width, use_bias=False, dtype=dtype, param_dtype=jnp.float32, rngs=rngs
        )
        self.value_bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.output = linear(width, width, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)

    def __call__(
        self, features: Float[Array, "rows text_tokens channels"], mask: Bool[Array, "rows text_tokens"]
    ) -> Float[Array, "rows embed_dim"]:
        heads = self.query.shape[0]
        key, value = jnp.split(self.key_value(features), 2, axis=-1)
        value = value + self.value_bias[...].astype(value.dtype)
        query = jnp.broadcast_to(self.query[...].astype(key.dtype), (features.shape[0], 1, *self.query.shape))
        pooled = text_attention(query, KeyValue(split_heads(key, heads), split_heads(value, heads)), mask)
        return self.output(pooled)[:, 0].astype(jnp.float32)


class CrossAttention(nnx.Module):
    """Attention to the projected text; its keys and values do not change between scales (section 4.6)."""

    def __init__(self, config: InfinityConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        width = config.embed_dim
        self.query = linear(width, width, dtype=dtype, rngs=rngs)
        self.key_value = linear(width, 2 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.value_bias = nnx.Param(jnp.zeros(width, dtype))
        self.output = linear(width, width, dtype=dtype, rngs=rngs)

    def text_key_value(self, text: Float[Array, "rows text_tokens channels"]) -> KeyValue:
        """Keys and values of the text."""
        key, value = jnp.split(self.key_value(text), 2, axis=-1)
        value = value + self.value_bias[...]
        return KeyValue(split_heads(key, self.num_heads), split_heads(value, self.num_heads))

    def fold(self, text: KeyValue, mask: Bool[Array, "rows text_tokens"]) -> FoldedText:
        """Multiplies the text's keys into the projection of queries, and its values into that of outputs."""
        rows, text_tokens, heads, head_dim = text.key.shape
        query_kernel = self.query.kernel[...].reshape(-1, heads, head_dim)
        query_bias = self.query.bias[...].reshape(heads, head_dim)  # type: ignore[index]
        output_kernel = self.output.kernel[...].reshape(heads, head_dim, -1)
        product = functools.partial(jnp.einsum, precision=matmul_precision(text.key.dtype))
        bias = product("rkhd,hd->rhk", text.key, query_bias, preferred_element_type=jnp.float32)
        shape = (rows, heads * text_tokens, -1)
        return FoldedText(
            to_logits=product("rkhd,chd->rhkc", text.key, query_kernel).reshape(shape),
            logit_bias=jnp.where(mask[:, None], bias * head_dim**-0.5, -jnp.inf),
            to_output=product("rkhd,hdc->rhkc", text.value, output_kernel).reshape(shape),
        )

    def __call__(
        self,
        x: Float[Array, "rows tokens channels"],
        text: KeyValue | FoldedText,
        mask: Bool[Array, "rows text_tokens"],
    ) -> Float[Array, "rows tokens channels"]:
        if isinstance(text, KeyValue):
            return self.output(text_attention(split_heads(self.query(x), self.num_heads), text, mask))
        dtype = text.to_logits.dtype
        product = functools.partial(jnp.einsum, precision=matmul_precision(dtype))
        logits = product("rqc,rnc->rqn", x.astype(dtype), text.to_logits, preferred_element_type=jnp.float32)
        # Else XLA for GPUs writes the bias out for every token, to add it inside the product.
        logits = split_heads(jax.lax.optimization_barrier(logits), self.num_heads)
        head_dim = x.shape[-1] // self.num_heads
        weights = jax.nn.softmax(logits * head_dim**-0.5 + text.logit_bias[:, None], axis=-1)
        weights = weights.astype(dtype).reshape(*x.shape[:2], -1)
        return product("rqn,rnc->rqc", weights, text.to_output) + self.output.bias[...]  # type: ignore[index]
