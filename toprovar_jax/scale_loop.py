"""The generation loop: one pure step per scale, explicit state in, explicit state out.

`sample` is the whole loop and can be jitted as it stands; the pipeline compiles `encode_context` and one
`scale_step` per scale instead and donates the state, so that the cache is updated in place.
Source: docs/spec/infinity.md, section 5.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8, UInt32

from toprovar_jax import sampling
from toprovar_jax.config import InfinityConfig
from toprovar_jax.models import rope
from toprovar_jax.models.bsq_vae import bits_to_codes
from toprovar_jax.models.infinity import Cache, Infinity, KeyValue, TextContext, append_and_attend
from toprovar_jax.models.skeleton import Parameters, bind
from toprovar_jax.resize import pixel_shuffle, pixel_unshuffle, resize_bilinear
from toprovar_jax.schedule import Grid, ScaleSchedule, tokenizer_schedule

CACHE_ALIGNMENT = 8  # GPU copy engines want lengths that are multiples of 8

# What a step reports besides the bits: nothing, the logits, or also every block's output.
Record = Literal["bits", "logits", "activations"]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Everything about a run that is compiled in.

    Attributes:
      transformer: the model.
      dtype: "float32" or "bfloat16".
      schedule: token grids, smallest first.
      rope_grid: grid that positions refer to.
      guided: whether every image has an unconditional row as well.
      guidance_layer: 0 guides the logits; a negative value m guides inside the network, after block depth + m.
    """

    transformer: InfinityConfig
    dtype: str
    schedule: ScaleSchedule
    rope_grid: Grid
    guided: bool
    guidance_layer: int = 0

    @property
    def code_grids(self) -> ScaleSchedule:
        """Grids on the tokenizer's side."""
        return tokenizer_schedule(self.schedule, self.transformer.patchify)

    @property
    def cache_capacity(self) -> int:
        """Tokens that a cache buffer can hold."""
        tokens = sum(grid.size for grid in self.schedule)
        return -(-tokens // CACHE_ALIGNMENT) * CACHE_ALIGNMENT

    def cache_length(self, scale: int) -> int:
        """Tokens in the cache before a scale runs."""
        return sum(grid.size for grid in self.schedule[:scale])


class LoopState(NamedTuple):
    """What one scale hands to the next.

    Attributes:
      cache: keys (normalised and rotated) and values of every layer, at full capacity.
      code_map: sum of the codes so far, resized to the last tokenizer grid.
    """

    cache: Cache
    code_map: Float[Array, "batch height width code_dim"]


class SamplingSettings(NamedTuple):
    """Settings of one scale, as traced scalars: no value of theirs needs another compilation."""

    guidance_scale: sampling.FloatScalar
    temperature: sampling.FloatScalar
    top_k: sampling.IntScalar
    top_p: sampling.FloatScalar


class ScaleOutput(NamedTuple):
    """What one scale produced.

    Attributes:
      bits: what the model chose, on the tokenizer grid.
      logits_raw: before temperature and guidance, conditional rows first; only rows whose logits are used.
      activations: `block0_in` and `block{i}_out` by name.
    """

    bits: UInt8[Array, "batch height width code_dim"]
    logits_raw: Float[Array, "rows tokens two_bits"] | None
    activations: dict[str, Array] | None


def image_keys(seeds: UInt32[Array | np.ndarray, "batch"]) -> Key[Array, "batch"]:
    """One random key per seed."""
    return jax.vmap(jax.random.key)(seeds)


def encode_context(
    params: Parameters,
    features: Float[Array, "batch text_tokens channels"],
    lengths: Int[Array, "batch"],
    negative_features: Float[Array, "batch text_tokens channels"] | None = None,
    negative_lengths: Int[Array, "batch"] | None = None,
    *,
    loop: LoopConfig,
) -> TextContext:
    """Projects the text of a batch; under guidance the unconditional rows follow the conditional ones.

    Args:
      params: the transformer's parameters.
      features: text features, zero-padded to a common length.
      lengths: how many rows of each are real.
      negative_features: features that replace the learned unconditional ones, padded to the same length.
      negative_lengths: their lengths; without negative features every unconditional row has its prompt's length.
      loop: the run.
    """
    model: Infinity = bind(Infinity, loop.transformer, loop.dtype, params)
    if loop.guided:
        if negative_features is None or negative_lengths is None:
            unconditional = model.unconditional_text(features.shape[1])
            negative_features = jnp.broadcast_to(unconditional, features.shape)
            negative_lengths = lengths
        features = jnp.concatenate([features, negative_features])
        lengths = jnp.concatenate([lengths, negative_lengths])
    return model.encode_text(features, lengths)


def initial_state(loop: LoopConfig, batch: int) -> LoopState:
    """An empty cache and an all-zero code map."""
    config = loop.transformer
    rows = batch * (2 if loop.guided else 1)
    shape = (rows, loop.cache_capacity, config.num_heads, config.head_dim)
    height, width = loop.code_grids[-1]
    return LoopState(
        cache=tuple(
            KeyValue(jnp.zeros(shape, loop.dtype), jnp.zeros(shape, loop.dtype)) for _ in range(config.depth)
        ),
        code_map=jnp.zeros((batch, height, width, config.code_dim), jnp.float32),
    )


def _scale_input(
    model: Infinity, context: TextContext, code_map: Array, loop: LoopConfig, scale: int
) -> Float[Array, "rows tokens channels"]:
    if scale == 0:
        return model.start_tokens(context)
    latent = resize_bilinear(code_map, loop.code_grids[scale])
    if loop.transformer.patchify:
        latent = pixel_unshuffle(latent)
    x = model.embed_codes(latent.reshape(latent.shape[0], -1, latent.shape[-1]))
    return jnp.concatenate([x, x]) if loop.guided else x


def _choose_bits(
    logits_raw: Float[Array, "rows tokens two_bits"],
    draws: Float[Array, "batch tokens bits 2"],
    settings: SamplingSettings,
    loop: LoopConfig,
    scale: int,
) -> UInt8[Array, "batch height width code_dim"]:
    logits = logits_raw / settings.temperature
    if loop.guided and loop.guidance_layer == 0:
        conditional, unconditional = jnp.split(logits, 2)
        logits = sampling.guide(conditional, unconditional, settings.guidance_scale)
    logits = logits.reshape(draws.shape)
    probabilities = sampling.filter_probabilities(logits, settings.top_k, settings.top_p)
    bits = sampling.sample_classes(probabilities, draws)
    bits = bits.reshape(bits.shape[0], *loop.schedule[scale], -1)
    return pixel_shuffle(bits) if loop.transformer.patchify else bits


def scale_step(
    params: Parameters,
    state: LoopState,
    context: TextContext,
    keys: Key[Array, "batch"],
    settings: SamplingSettings,
    forced_bits: UInt8[Array, "batch height width code_dim"] | None = None,
    draws: Float[Array, "batch tokens bits 2"] | None = None,
    *,
    loop: LoopConfig,
    scale: int,
    record: Record = "bits",
) -> tuple[LoopState, ScaleOutput]:
    """Runs one scale.

    Args:
      params: the transformer's parameters.
      state: from the scale before.
      context: the text.
      keys: one random key per image; draws depend on it, the scale, the token and the bit alone.
      settings: guidance and sampling of this scale.
      forced_bits: bits to go on with instead of the chosen ones.
      draws: Exp(1) draws to use instead of the keys'.
      loop: the run (static).
      scale: index of the scale (static).
      record: what to report besides the bits (static).
    """
    config = loop.transformer
    model: Infinity = bind(Infinity, config, loop.dtype, params)
    grid = loop.schedule[scale]
    if draws is None:
        draws = jax.vmap(
            lambda key: sampling.exponential_draws(jax.random.fold_in(key, scale), grid.size, config.token_bits)
        )(keys)

    def guide_inside(layer: int, x: Array) -> Array:
        if not loop.guided or layer != config.depth + loop.guidance_layer:
            return x
        guidance_scale = jnp.asarray(settings.guidance_scale)
        conditional, unconditional = jnp.split(x, 2)
        mixed = sampling.guide(conditional, unconditional, guidance_scale)
        return jnp.where(guidance_scale == 1, x, jnp.concatenate([mixed, mixed]))

    x = _scale_input(model, context, state.code_map, loop, scale)
    x, cache, activations = model.forward(
        x,
        context,
        model.level_embedding[scale],
        rope.rotation(grid, loop.rope_grid, config.head_dim, config.rope_mode),
        lambda layer: append_and_attend(state.cache[layer], loop.cache_length(scale)),
        guide_inside,
    )
    if loop.guided and loop.guidance_layer != 0:
        x = jnp.split(x, 2)[0]
    logits_raw = model.logits(x, context)
    bits = _choose_bits(logits_raw, draws, settings, loop, scale)
    codes = bits_to_codes(bits if forced_bits is None else forced_bits)
    code_map = state.code_map + resize_bilinear(codes, loop.code_grids[-1])
    output = ScaleOutput(
        bits=bits,
        logits_raw=None if record == "bits" else logits_raw,
        activations=activations if record == "activations" else None,
    )
    return LoopState(cache, code_map), output


def sample(
    params: Parameters,
    features: Float[Array, "batch text_tokens channels"],
    lengths: Int[Array, "batch"],
    keys: Key[Array, "batch"],
    settings: tuple[SamplingSettings, ...],
    *,
    loop: LoopConfig,
) -> tuple[Float[Array, "batch height width code_dim"], tuple[UInt8[Array, "batch _height _width code_dim"], ...]]:
    """Generates the code maps of a batch: every scale in turn, without leaving the program.

    Args:
      params: the transformer's parameters.
      features: text features, zero-padded to a common length.
      lengths: how many rows of each are real.
      keys: one random key per image.
      settings: one per scale.
      loop: the run (static).

    Returns:
      The final code map for the tokenizer's decoder, and the bits of every scale.
    """
    context = encode_context(params, features, lengths, loop=loop)
    state = initial_state(loop, features.shape[0])
    bits = []
    for scale, scale_settings in enumerate(settings):
        state, output = scale_step(params, state, context, keys, scale_settings, loop=loop, scale=scale)
        bits.append(output.bits)
    return state.code_map, tuple(bits)
