"""The Infinity transformer, read from top to bottom in data-flow order.

Text features become a context that all scales share (`Infinity.encode_text`); the tokens of one scale run through
the blocks, attending to themselves and to the cached keys and values of earlier scales (`Infinity.run_block`); the
head turns them into two logits per bit (`Infinity.logits`). Which tokens run through which blocks is decided in
`pruning/execution.py`; the loop over scales is in `scale_loop.py`.

Source: docs/spec/infinity.md, sections 3 and 4. Precision: `precision.py`. Shapes: rows = images, doubled under
guidance (conditional rows first); tokens = tokens of the scales at hand; bits = bits that one token predicts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PyTree

from pallas_kernels import flash_attention_entropy
from toprovar_jax.config import InfinityConfig
from toprovar_jax.models import rope
from toprovar_jax.models.linear import linear
from toprovar_jax.models.text_attention import CrossAttention, FoldedText, KeyValue, TextPool, split_heads
from toprovar_jax.precision import activation_dtype
from toprovar_jax.schedule import Grid, ScaleSchedule

NORM_EPSILON = 1e-6
MAX_LOG_SCALE = 4.605170185988092  # ln 100: upper bound of the learned attention scale


Cache = tuple[KeyValue, ...]  # one entry per layer
# cos and sin of the tokens at hand, the same in every row or each row's own.
Rotation = tuple[Float[Array, "*_rows _tokens pairs"], Float[Array, "*_rows _tokens pairs"]]

T = TypeVar("T")
# Queries, keys and values of the new tokens -> attention output, and whatever the caller wants back of the layer.
Attend = Callable[[Array, Array, Array], tuple[Array, T]]


class TextContext(NamedTuple):
    """What every scale needs of the text; computed once per image.

    Attributes:
      pooled: one vector per row.
      modulation: per layer, the six vectors (gate, gate, scale, scale, shift, shift) of attention and MLP.
      head_modulation: scale and shift of the head.
      cross_attention: per layer, what cross attention needs of the text: its keys and values, or the projections
        that they are folded into.
      mask: which text positions are real.
    """

    pooled: Float[Array, "rows embed_dim"]
    modulation: tuple[Float[Array, "rows 6 embed_dim"], ...]
    head_modulation: Float[Array, "rows 2 embed_dim"]
    cross_attention: tuple[KeyValue | FoldedText, ...]
    mask: Bool[Array, "rows text_tokens"]


def layer_norm(x: Float[Array, "*batch channels"]) -> Float[Array, "*batch channels"]:
    """LayerNorm without parameters, in float32."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + NORM_EPSILON)


def modulate(
    x: Float[Array, "rows tokens channels"],
    scale: Float[Array, "rows channels"],
    shift: Float[Array, "rows channels"],
) -> Float[Array, "rows tokens channels"]:
    """LayerNorm whose scale and shift come from the text."""
    return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


def one_by_one(result: T, operand: Array) -> tuple[T, Array]:
    """The same, but products that take this operand wait for the result.

    XLA for GPUs copies the weights of products that share an operand side by side, at every call, to make one
    product of them. Where few rows are multiplied, reading the weights is all that they cost: that triples it.
    """
    held: tuple[T, Array] = jax.lax.optimization_barrier((result, operand))
    return held


class MLP(nnx.Module):
    """Linear, tanh-approximated GELU, linear."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        self.up = linear(in_features, hidden_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.down = linear(hidden_features, out_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "rows tokens channels"]) -> Float[Array, "rows tokens out_channels"]:
        # Rows and tokens as one axis: else XLA for GPUs writes float8 activations out in bfloat16 first.
        hidden = jax.nn.gelu(self.up(x.reshape(-1, x.shape[-1])), approximate=True)
        return self.down(hidden).reshape(*x.shape[:-1], -1)


class SelfAttention(nnx.Module):
    """Attention over this scale and all earlier ones, with normalised queries and keys (section 4.3)."""

    def __init__(self, config: InfinityConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, heads = config.embed_dim, config.num_heads
        self.query_key_value = linear(width, 3 * width, use_bias=False, dtype=dtype, rngs=rngs)
        activation = activation_dtype(dtype)
        self.query_bias = nnx.Param(jnp.zeros(width, activation))
        self.value_bias = nnx.Param(jnp.zeros(width, activation))
        self.log_scale = nnx.Param(jnp.full(heads, jnp.log(4.0), activation))
        self.output = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "rows tokens channels"], rotation: Rotation, attend: Attend[T]
    ) -> tuple[Float[Array, "rows tokens channels"], T]:
        heads, dtype = self.log_scale.shape[0], self.query_bias.dtype
        # Queries and keys go through as one array of twice the heads; keys have neither bias nor scale.
        bias = jnp.concatenate([self.query_bias[...], jnp.zeros_like(self.query_bias[...])])
        query_key, value = jnp.split(self.query_key_value(x), [bias.size], axis=-1)
        query_key = split_heads(query_key + bias, 2 * heads)
        value = split_heads(value + self.value_bias[...], heads)
        # The scale is learned per head, so attention itself runs with scale 1.
        scale = jnp.exp(jnp.minimum(self.log_scale[...], MAX_LOG_SCALE).astype(jnp.float32))
        query_key = _normalize(query_key) * jnp.concatenate([scale, jnp.ones_like(scale)])[:, None]
        query, key = jnp.split(rope.rotate(query_key, *rotation).astype(dtype), 2, axis=-2)
        output, result = attend(query, key, value)
        return self.output(output.reshape(x.shape)), result


def _normalize(x: Float[Array, "rows tokens heads head_dim"]) -> Float[Array, "rows tokens heads head_dim"]:
    x = x.astype(jnp.float32)
    # Held, or XLA for GPUs writes the quotient out in float32 for the rotation to read.
    length = jax.lax.optimization_barrier(jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True)))
    return x / jnp.maximum(length, 1e-12)


class Block(nnx.Module):
    """Self attention, cross attention, MLP; the residual stream is float32 (section 4.2)."""

    def __init__(self, config: InfinityConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, activation = config.embed_dim, activation_dtype(dtype)
        self.modulation = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (6, width), activation))
        self.self_attention = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.cross_norm = nnx.LayerNorm(
            width,
            epsilon=NORM_EPSILON,
            dtype=jnp.float32,
            param_dtype=activation,
            use_fast_variance=False,
            rngs=rngs,
        )
        self.cross_attention = CrossAttention(config, dtype=activation, rngs=rngs)
        self.mlp = MLP(width, config.mlp_dim, width, dtype=dtype, rngs=rngs)

    def attention_update(
        self,
        x: Float[Array, "rows tokens channels"],
        modulation: Float[Array, "rows 6 channels"],
        rotation: Rotation,
        attend: Attend[T],
    ) -> tuple[Float[Array, "rows tokens channels"], T]:
        """What self attention adds to the residual stream of the tokens at hand."""
        gate, scale, shift = (modulation[:, i] for i in (0, 2, 4))
        update, result = self.self_attention(modulate(x, scale, shift), rotation, attend)
        return gate[:, None] * update, result

    def cross_update(
        self,
        x: Float[Array, "rows tokens channels"],
        text: KeyValue | FoldedText,
        text_mask: Bool[Array, "rows text_tokens"],
    ) -> Float[Array, "rows tokens channels"]:
        """What cross attention adds."""
        return self.cross_attention(self.cross_norm(x), text, text_mask)

    def mlp_update(
        self, x: Float[Array, "rows tokens channels"], modulation: Float[Array, "rows 6 channels"]
    ) -> Float[Array, "rows tokens channels"]:
        """What the MLP adds."""
        gate, scale, shift = (modulation[:, i] for i in (1, 3, 5))
        return gate[:, None] * self.mlp(modulate(x, scale, shift))

    def __call__(
        self,
        x: Float[Array, "rows tokens channels"],
        modulation: Float[Array, "rows 6 channels"],
        text: KeyValue | FoldedText,
        text_mask: Bool[Array, "rows text_tokens"],
        rotation: Rotation,
        attend: Attend[T],
    ) -> tuple[Float[Array, "rows tokens channels"], T]:
        update, result = self.attention_update(x, modulation, rotation, attend)
        x = x + update
        x = x + self.cross_update(x, text, text_mask)
        x = x + self.mlp_update(x, modulation)
        return x, result


class Attended(NamedTuple):
    """What a layer's attention leaves besides its output.

    Attributes:
      cache: the layer's cache, with the new tokens if it has room for them.
      entropy: mean over heads of every token's attention entropy, in nats; None where it was not asked for.
    """

    cache: KeyValue
    entropy: Float[Array, "rows tokens"] | None


def append_and_attend(
    cache: KeyValue, length: int, padding: int = 0, return_entropy: bool = False
) -> Attend[Attended]:
    """Attention of one scale's tokens to a cache that already holds `length` of them, and to themselves.

    Where the cache has room for them, they are added to it: the buffers keep their capacity, so a donated cache is
    updated in place, and only the valid prefix is attended to. Else it stays as it is, for no scale will follow.

    Args:
      cache: keys and values of earlier scales.
      length: how many tokens they are.
      padding: how many of the new tokens, at their end, only fill up; nothing attends to them.
      return_entropy: whether to report the attention's entropy.
    """
    return Partial(_AppendAndAttend(length, padding, return_entropy), cache)


@dataclasses.dataclass(frozen=True)
class _AppendAndAttend:
    length: int
    padding: int
    return_entropy: bool

    def __call__(self, cache: KeyValue, query: Array, key: Array, value: Array) -> tuple[Array, Attended]:
        room, new_tokens = cache.key.shape[1] - self.length, query.shape[1] - self.padding
        assert room >= 0, "the scale before had no room in the cache"
        attend = functools.partial(flash_attention_entropy, query, scale=1.0, return_entropy=self.return_entropy)
        if new_tokens <= room:
            cache = KeyValue(self._append(cache.key, key[:, :room]), self._append(cache.value, value[:, :room]))
        entropy: Array | None
        if self.length + new_tokens == 1:
            # The first scale's token sees itself alone: a softmax of one logit is 1.
            output, entropy = value, jnp.zeros((query.shape[0], 1, query.shape[1]), jnp.float32)
        elif new_tokens <= room:
            output, entropy, _ = attend(*cache, kv_length=self.length + new_tokens)
        elif self.length:
            output, entropy, _ = attend(*cache, key, value, kv_length=self.length, more_length=new_tokens)
        else:
            output, entropy, _ = attend(key, value, kv_length=new_tokens)
        return output, Attended(cache, None if entropy is None else jnp.mean(entropy, axis=1))

    def _append(self, held: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(held, new, self.length, axis=1)


def attend_scale_by_scale(schedule: ScaleSchedule) -> Attend[None]:
    """Teacher forcing: all scales at once, each attending to itself and to earlier ones.

    Every scale's queries against their prefix of keys is the block-causal mask, without the work it would mask.
    """

    def attend(query: Array, key: Array, value: Array) -> tuple[Array, None]:
        outputs, start = [], 0
        for grid in schedule:
            end = start + grid.size
            outputs.append(
                flash_attention_entropy(
                    query[:, start:end], key[:, :end], value[:, :end], scale=1.0, return_entropy=False
                ).output
            )
            start = end
        return jnp.concatenate(outputs, axis=1), None

    return attend


@functools.partial(jax.jit, static_argnums=0)
def _run_block(
    block: nnx.GraphDef,
    params: PyTree,
    x: Array,
    modulation: Array,
    text: KeyValue | FoldedText,
    text_mask: Array,
    rotation: Rotation,
    attend: Partial,
) -> tuple[Array, Any]:
    """A block as a function, traced once for all layers of a scale that run alike."""
    return nnx.merge(block, params)(x, modulation, text, text_mask, rotation, attend)


class Infinity(nnx.Module):
    """The transformer of one checkpoint.

    Args:
      config: shapes and switches.
      dtype: float32, bfloat16 or float8_e4m3fn; in bfloat16 the blocks' parameters and all large products are
        bfloat16, in float8_e4m3fn self attention's projections and the MLP are float8 besides.
      rngs: source of the random initial parameters.
    """

    def __init__(self, config: InfinityConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, text, activation = config.embed_dim, config.text_channels, activation_dtype(dtype)
        normal = nnx.initializers.normal(0.02)
        self.config = config
        self.unconditional_features = nnx.Param(normal(rngs.params(), (config.text_max_length, text), jnp.float32))
        self.text_norm = nnx.RMSNorm(text, epsilon=NORM_EPSILON, dtype=jnp.float32, rngs=rngs)
        self.text_pool = TextPool(config, dtype=activation, rngs=rngs)
        self.text_projection = MLP(text, width, width, dtype=activation, param_dtype=jnp.float32, rngs=rngs)
        self.shared_modulation = linear(width, 6 * width, dtype=jnp.float32, rngs=rngs)
        self.start_position = nnx.Param(normal(rngs.params(), (width,), jnp.float32))
        self.word_embedding = linear(config.token_bits, width, dtype=jnp.float32, rngs=rngs)
        self.level_embedding = nnx.Param(normal(rngs.params(), (config.max_scales, width), jnp.float32))
        self.blocks = nnx.List([Block(config, dtype=dtype, rngs=rngs) for _ in range(config.depth)])
        self.head_modulation = linear(width, 2 * width, dtype=jnp.float32, rngs=rngs)
        self.head = linear(width, 2 * config.token_bits, dtype=jnp.float32, rngs=rngs)

    def unconditional_text(self, text_tokens: int) -> Float[Array, "text_tokens channels"]:
        """The learned features that stand for "no prompt", padded or cut to `text_tokens` rows."""
        features = self.unconditional_features[:text_tokens]
        return jnp.pad(features, ((0, text_tokens - features.shape[0]), (0, 0)))

    def encode_text(
        self, features: Float[Array, "rows text_tokens channels"], lengths: Int[Array, "rows"]
    ) -> TextContext:
        """Projects text features, of which the first `lengths` of each row are real (sections 3.2 to 3.4)."""
        mask = jnp.arange(features.shape[1]) < lengths[:, None]
        features = self.text_norm(features)
        pooled = self.text_pool(features, mask)
        projected = self.text_projection(features)
        rows, width = pooled.shape
        activated = jax.nn.silu(pooled)
        shared, activated = one_by_one(self.shared_modulation(activated).reshape(rows, 6, width), activated)
        cross_attention = []
        for block in self.blocks:
            key_value, projected = one_by_one(block.cross_attention.text_key_value(projected), projected)
            cross_attention.append(key_value)
        return TextContext(
            pooled=pooled,
            modulation=tuple(shared + block.modulation[...].astype(jnp.float32) for block in self.blocks),
            head_modulation=self.head_modulation(activated).reshape(rows, 2, width),
            cross_attention=tuple(cross_attention),
            mask=mask,
        )

    def fold_text(self, context: TextContext) -> TextContext:
        """The same context in the form that costs the scales least, for generation in bfloat16.

        Where that is smaller, a product with [embed_dim, num_heads * text_tokens] takes the place of one with
        [embed_dim, embed_dim]. It rounds elsewhere than the published code, whose order float32 keeps.
        """
        small = self.config.num_heads * context.mask.shape[1] < self.config.embed_dim
        if not small or self.blocks[0].modulation.dtype == jnp.float32:
            return context
        folded = []
        for block, text in zip(self.blocks, context.cross_attention, strict=True):
            assert isinstance(text, KeyValue)
            folded.append(block.cross_attention.fold(text, context.mask))
        return context._replace(cross_attention=tuple(folded))

    def start_tokens(self, context: TextContext) -> Float[Array, "rows 1 channels"]:
        """Input of the first scale: the pooled text."""
        return context.pooled[:, None] + self.start_position[...]

    def embed_codes(self, codes: Float[Array, "rows tokens bits"]) -> Float[Array, "rows tokens channels"]:
        """Input of a later scale: the codes so far, resized to its grid."""
        return self.word_embedding(codes)

    def run_block(
        self,
        layer: int,
        x: Float[Array, "rows tokens channels"],
        context: TextContext,
        rotation: Rotation,
        attend: Attend[T],
    ) -> tuple[Float[Array, "rows tokens channels"], T]:
        """Runs one block on the tokens given.

        Args:
          layer: index of the block.
          x: residual stream.
          context: the text.
          rotation: cos and sin of the tokens.
          attend: how the tokens attend, as `Partial` of the arrays that it holds.

        Returns:
          The residual stream after the block, and what `attend` leaves besides its output.
        """
        modulation, text = context.modulation[layer], context.cross_attention[layer]
        block, params = nnx.split(self.blocks[layer])
        result: tuple[Array, T] = _run_block(block, params, x, modulation, text, context.mask, rotation, attend)
        return result

    def logits(
        self, x: Float[Array, "rows tokens channels"], context: TextContext
    ) -> Float[Array, "rows tokens two_bits"]:
        """Two logits per bit, float32: channels 2k and 2k+1 are bit k being 0 and 1 (section 4.7)."""
        rows = x.shape[0]
        scale, shift = context.head_modulation[:rows, 0], context.head_modulation[:rows, 1]
        return self.head(modulate(x, scale, shift))

    def teacher_forced_logits(
        self,
        codes: Float[Array, "rows later_tokens bits"],
        context: TextContext,
        *,
        schedule: ScaleSchedule,
        rope_grid: Grid,
        attend: Attend[Any] | None = None,
    ) -> Float[Array, "rows tokens two_bits"]:
        """Logits of all scales in one pass, given every later scale's input codes (training; section 4.3).

        Args:
          codes: for scales 1 and on, the codes so far resized to the scale's grid, concatenated over tokens.
          context: the text.
          schedule: token grids.
          rope_grid: grid that positions refer to.
          attend: block-causal attention over the scales; `attend_scale_by_scale` by default, which is forward
            only, so training passes a differentiable one.
        """
        config = self.config
        x = jnp.concatenate([self.start_tokens(context), self.embed_codes(codes)], axis=1)
        levels = jnp.concatenate(
            [
                jnp.broadcast_to(self.level_embedding[i], (grid.size, x.shape[-1]))
                for i, grid in enumerate(schedule)
            ]
        )
        rotations = [rope.rotation(grid, rope_grid, config.head_dim, config.rope_mode) for grid in schedule]
        cos, sin = (jnp.concatenate(tables) for tables in zip(*rotations, strict=True))
        attend = Partial(attend or attend_scale_by_scale(schedule))
        for layer in range(config.depth):
            if layer in config.level_layers:
                x = x + levels
            x, _ = self.run_block(layer, x, context, (cos, sin), attend)
        return self.logits(x, context)
