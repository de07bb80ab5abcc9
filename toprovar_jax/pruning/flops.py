"""What a plan costs: floating-point operations by kind, weight bytes, and the time no implementation can beat.

Products of matrices are counted, two operations per multiply-add, for every row that runs: guidance doubles them.
Norms, softmax, entropy, the choice of tokens and what fills in for the others multiply no matrices and count as
nothing; XLA's own count, which has them, is half a percent higher (`python -m bench.flops` prints both).
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from toprovar_jax.config import InfinityConfig
from toprovar_jax.precision import FLOAT8, activation_dtype
from toprovar_jax.pruning.plan import Plan


class Roofs(NamedTuple):
    """What a device reaches at best.

    Attributes:
      products: FLOP/s of bfloat16 matrix products.
      float8_products: FLOP/s of float8 ones.
      attention: FLOP/s of an attention kernel.
      bandwidth: bytes/s read from device memory.
    """

    products: float
    float8_products: float
    attention: float
    bandwidth: float


# Measured on one NVIDIA H200: products of 8192 rows, attention of 4096 queries to 10521 keys, copies.
H200 = Roofs(products=790e12, float8_products=1650e12, attention=600e12, bandwidth=4.3e12)


@dataclasses.dataclass(frozen=True)
class Work:
    """Floating-point operations by kind; works add up.

    Attributes:
      projections: queries, keys, values and outputs of self attention.
      text_projections: queries and outputs of cross attention.
      self_attention: logits and weighted values over this scale and the cached ones.
      cross_attention: the same over the text.
      mlp: both layers.
      embedding: codes to tokens.
      head: tokens to logits.
      text: pooling and projecting the text, and its keys and values, once per image.
      modulation: the pooled text to scales, shifts and gates, once per image.
    """

    projections: int = 0
    text_projections: int = 0
    self_attention: int = 0
    cross_attention: int = 0
    mlp: int = 0
    embedding: int = 0
    head: int = 0
    text: int = 0
    modulation: int = 0

    def __add__(self, other: "Work") -> "Work":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Work(*(first + second for first, second in pairs))

    def __mul__(self, times: int) -> "Work":
        return Work(*(times * value for value in dataclasses.astuple(self)))

    @property
    def attention(self) -> int:
        """What an attention kernel does."""
        return self.self_attention + self.cross_attention

    @property
    def total(self) -> int:
        """All kinds."""
        return sum(dataclasses.astuple(self))


def layer_work(config: InfinityConfig, tokens: int, keys: int, text_tokens: int) -> Work:
    """One block on one row.

    Args:
      config: the transformer.
      tokens: tokens that run.
      keys: keys that they attend to, their own included.
      text_tokens: text positions.
    """
    width = config.embed_dim
    return Work(
        projections=2 * tokens * width * (3 * width + width),
        text_projections=2 * tokens * width * (width + width),
        self_attention=2 * tokens * width * (keys + keys),
        cross_attention=2 * tokens * width * (text_tokens + text_tokens),
        mlp=2 * tokens * width * (config.mlp_dim + config.mlp_dim),
    )


def text_work(config: InfinityConfig, text_tokens: int) -> Work:
    """What one row costs before the first scale."""
    width, channels = config.embed_dim, config.text_channels
    pool = text_tokens * channels * 2 * width + 2 * text_tokens * width + width * width
    projection = text_tokens * (channels * width + width * width)
    key_values = config.depth * text_tokens * width * 2 * width
    return Work(text=2 * (pool + projection + key_values), modulation=2 * width * (6 * width + 2 * width))


@dataclasses.dataclass(frozen=True)
class PlanCost:
    """The cost of a plan on a model.

    Attributes:
      config: the transformer.
      plan: what runs.
      guided: whether the run has unconditional rows at all.
      batch: images.
      text_tokens: text positions, padding included.
      dtype: precision policy of the model.
    """

    config: InfinityConfig
    plan: Plan
    guided: bool = True
    batch: int = 1
    text_tokens: int = 20
    dtype: str = "bfloat16"

    def rows(self, scale: int) -> int:
        """Rows of the batch that a scale runs."""
        return self.batch * (2 if self.guided and self.plan.scales[scale].guided else 1)

    def layers(self, scale: int) -> tuple[Work, ...]:
        """Every layer's work at a scale; nothing for a scale that is dropped."""
        if not self.plan.scales[scale].runs:
            return ()
        kept, cached = self.plan.scales[scale].kept_tokens, self.plan.step(scale).cache_lengths
        rows = self.rows(scale)
        return tuple(
            layer_work(self.config, tokens, length + tokens, self.text_tokens) * rows
            for tokens, length in zip(kept, cached, strict=True)
        )

    def scale(self, scale: int) -> Work:
        """All work of one scale."""
        if not self.plan.scales[scale].runs:
            return Work()
        config, tokens, rows = self.config, self.plan.schedule[scale].size, self.rows(scale)
        outside = Work(
            # The unconditional rows are copies of the embedded conditional ones.
            embedding=self.batch * 2 * tokens * config.token_bits * config.embed_dim if scale else 0,
            head=rows * 2 * tokens * config.embed_dim * 2 * config.token_bits,
        )
        return sum(self.layers(scale), outside)

    def loop(self) -> Work:
        """All scales."""
        return sum((self.scale(scale) for scale in range(len(self.plan.scales))), Work())

    def text(self) -> Work:
        """The work before the first scale."""
        return text_work(self.config, self.text_tokens) * (self.batch * (2 if self.guided else 1))

    def weight_bytes(self, scale: int) -> int:
        """Bytes of the weight matrices that a scale reads."""
        config, width = self.config, self.config.embed_dim
        running = sum(tokens > 0 for tokens in self.plan.scales[scale].kept_tokens)
        if not running:
            return 0
        # Self attention and MLP; cross attention.
        large, small = 4 * width * width + 2 * width * config.mlp_dim, 2 * width * width
        block = large * jnp.dtype(self.dtype).itemsize + small * activation_dtype(self.dtype).itemsize
        outside = width * config.token_bits * (3 if scale else 2)
        return running * block + outside * jnp.dtype(jnp.float32).itemsize

    def floor_seconds(self, scale: int, roofs: Roofs = H200) -> float:
        """A lower bound of a scale's time: its operations at the device's best, or its weights read once."""
        work = self.scale(scale)
        float8 = work.projections + work.mlp if jnp.dtype(self.dtype) == FLOAT8 else 0
        other = work.total - work.attention - float8
        computing = other / roofs.products + float8 / roofs.float8_products + work.attention / roofs.attention
        return max(computing, self.weight_bytes(scale) / roofs.bandwidth)
