"""The generation loop: one pure step per scale, explicit state in, explicit state out.

`sample` is the whole loop and can be jitted as it stands; the pipeline compiles `encode_context` and one
`scale_step` per scale instead and donates the state, so that the cache is updated in place.
Source: docs/spec/infinity.md, section 5.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt8, UInt32

from toprovar_jax import sampling
from toprovar_jax.config import InfinityConfig
from toprovar_jax.models import rope
from toprovar_jax.models.bsq_vae import bits_to_codes
from toprovar_jax.models.infinity import Cache, Infinity, KeyValue, TextContext
from toprovar_jax.models.skeleton import Parameters, bind
from toprovar_jax.precision import activation_dtype
from toprovar_jax.pruning.execution import Updates, run_layers
from toprovar_jax.pruning.plan import Plan, ScaleStep, Span
from toprovar_jax.resize import pixel_shuffle, pixel_unshuffle, resize_bilinear
from toprovar_jax.schedule import Grid, ScaleSchedule, tokenizer_schedule

# What a step reports besides the bits: nothing, the logits and kept tokens, or also every block's output.
Record = Literal["bits", "logits", "activations"]


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Everything about a run that is compiled in.

    Attributes:
      transformer: the model.
      dtype: "float32", "bfloat16" or "float8_e4m3fn".
      schedule: token grids, smallest first.
      rope_grid: grid that positions refer to.
      guided: whether every image has an unconditional row as well.
      guidance_layer: 0 guides the logits; a negative value m guides inside the network, after block depth + m.
      plan: what runs; None runs everything.
      cache_capacities: per layer, tokens that a cache buffer can hold; None gives room for the plan, without the
        schedule's last scale. A run that may change its plan needs room for all of them.
    """

    transformer: InfinityConfig
    dtype: str
    schedule: ScaleSchedule
    rope_grid: Grid
    guided: bool
    guidance_layer: int = 0
    plan: Plan | None = None
    cache_capacities: tuple[int, ...] | None = None

    @property
    def code_grids(self) -> ScaleSchedule:
        """Grids on the tokenizer's side."""
        return tokenizer_schedule(self.schedule, self.transformer.patchify)

    @property
    def executed_plan(self) -> Plan:
        """The plan, also where it is to run everything."""
        return self.plan or Plan.dense(self.schedule, self.transformer.depth)

    def step(self, scale: int) -> ScaleStep:
        """What the compiled step of a scale depends on besides the grids, the model and the capacities."""
        breaks = set(self.transformer.level_layers)
        if self.guided and self.guidance_layer != 0:
            breaks.add(self.transformer.depth + self.guidance_layer + 1)
        step = self.executed_plan.step(scale, tuple(sorted(breaks)))
        return dataclasses.replace(step, guided=step.guided and self.guided)


class LoopState(NamedTuple):
    """What one scale hands to the next.

    Attributes:
      cache: keys (normalised and rotated) and values of every layer, at full capacity.
      code_map: sum of the codes so far, resized to the last tokenizer grid.
      saved: what layers added to the residual stream at an earlier scale, for those that a later one does not run.
    """

    cache: Cache
    code_map: Float[Array, "batch height width code_dim"]
    saved: Updates


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
      kept: by layers, indices of the tokens that ran where not all did; `LayersResult.kept`.
      entropy: by layer asked for, attention entropy in nats, mean over heads; NaN where a token did not run.
      activations: `block0_in` and `block{i}_out` by name.
    """

    bits: UInt8[Array, "batch height width code_dim"]
    logits_raw: Float[Array, "rows tokens two_bits"] | None
    kept: dict[Span, Int[Array, "rows choices kept"]] | None
    entropy: dict[int, Float[Array, "rows tokens"]]
    activations: dict[str, Array] | None


def image_keys(seeds: UInt32[Array | np.ndarray, "batch"]) -> Key[Array, "batch"]:
    """One random key per seed."""
    return jax.vmap(jax.random.key)(seeds)


def draw_all_scales(
    keys: Key[Array, "batch"], loop: LoopConfig
) -> tuple[Float[Array, "batch _tokens bits 2"], ...]:
    """What the keys draw for every scale of the schedule, also for those that a plan drops."""
    draw = functools.partial(sampling.exponential_draws, schedule=loop.schedule, bits=loop.transformer.token_bits)
    draws: tuple[Array, ...] = jax.vmap(draw)(keys)
    return draws


def context_parameters(params: Parameters) -> Parameters:
    """The transformer's parameters with None in place of those that `encode_context` does not read.

    To hand one to a program costs a GPU's host half a microsecond, and there are hundreds.
    """
    blocks = {
        layer: _without(block, "self_attention", "cross_norm", "mlp") for layer, block in params["blocks"].items()
    }
    return _without(params, "start_position", "word_embedding", "level_embedding", "head") | {"blocks": blocks}


def scale_parameters(params: Parameters) -> Parameters:
    """The transformer's parameters with None in place of those that `scale_step` does not read."""
    blocks = {
        layer: _without(block, "modulation")
        | {"cross_attention": _without(block["cross_attention"], "key_value", "value_bias")}
        for layer, block in params["blocks"].items()
    }
    text = ("unconditional_features", "text_norm", "text_pool", "text_projection")
    return _without(params, *text, "shared_modulation", "head_modulation") | {"blocks": blocks}


def _without(params: Parameters, *names: str) -> Parameters:
    return {key: jax.tree.map(lambda _: None, x) if key in names else x for key, x in params.items()}


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
    return model.fold_text(model.encode_text(features, lengths))


def initial_state(loop: LoopConfig, batch: int, scale: int = 0) -> LoopState:
    """A state of zeros: where a run starts, and the shapes that any scale's step takes."""
    config, step, dtype = loop.transformer, loop.step(scale), activation_dtype(loop.dtype)
    rows = batch * (2 if step.guided else 1)
    capacities = loop.cache_capacities or loop.executed_plan.cache_capacities
    heads = (config.num_heads, config.head_dim)
    height, width = loop.code_grids[-1]
    parts = 3 if step.by_sublayer else 1
    tokens = 0 if step.restore_grid is None else step.restore_grid.size
    return LoopState(
        cache=tuple(
            KeyValue(*(jnp.zeros((rows, capacity, *heads), dtype) for _ in range(2))) for capacity in capacities
        ),
        code_map=jnp.zeros((batch, height, width, config.code_dim), jnp.float32),
        saved={span: jnp.zeros((rows, parts, tokens, config.embed_dim), dtype) for span in step.restored},
    )


def prepare(state: LoopState, step: ScaleStep) -> LoopState:
    """The state as the next step takes it: without updates that no scale needs any more. Moves no data."""
    return state._replace(saved={span: state.saved[span] for span in step.restored})


def drop_unconditional_rows(
    cache: Cache, saved: Updates, context: TextContext, *, batch: int
) -> tuple[Cache, dict[Span, Array], TextContext]:
    """Goes on with the conditional rows alone, once a plan stops guiding."""
    kept: tuple[Cache, dict[Span, Array], TextContext] = jax.tree.map(lambda x: x[:batch], (cache, saved, context))
    return kept


def _scale_input(
    model: Infinity, context: TextContext, code_map: Array, loop: LoopConfig, step: ScaleStep
) -> Float[Array, "rows tokens channels"]:
    if step.scale == 0:
        return model.start_tokens(context)
    latent = resize_bilinear(code_map, loop.code_grids[step.scale])
    if loop.transformer.patchify:
        latent = pixel_unshuffle(latent)
    x = model.embed_codes(latent.reshape(latent.shape[0], -1, latent.shape[-1]))
    return jnp.concatenate([x, x]) if step.guided else x


def _choose_bits(
    logits_raw: Float[Array, "rows tokens two_bits"],
    draws: Float[Array, "batch tokens bits 2"],
    settings: SamplingSettings,
    loop: LoopConfig,
    step: ScaleStep,
) -> UInt8[Array, "batch height width code_dim"]:
    logits = logits_raw / settings.temperature
    if step.guided and loop.guidance_layer == 0:
        conditional, unconditional = jnp.split(logits, 2)
        logits = sampling.guide(conditional, unconditional, settings.guidance_scale)
    logits = logits.reshape(draws.shape)
    probabilities = sampling.filter_probabilities(logits, settings.top_k, settings.top_p)
    bits = sampling.sample_classes(probabilities, draws)
    bits = bits.reshape(bits.shape[0], *loop.schedule[step.scale], -1)
    return pixel_shuffle(bits) if loop.transformer.patchify else bits


def scale_step(
    params: Parameters,
    state: LoopState,
    context: TextContext,
    draws: Float[Array, "batch tokens bits 2"],
    settings: SamplingSettings,
    forced_bits: UInt8[Array, "batch height width code_dim"] | None = None,
    scores: Float[Array, "runs batch tokens"] | None = None,
    *,
    loop: LoopConfig,
    scale: int,
    record: Record = "bits",
    entropy_layers: tuple[int, ...] = (),
) -> tuple[LoopState, ScaleOutput]:
    """Runs one scale.

    Of the loop's plan it depends on `loop.step(scale)` and the capacities alone: plans that agree on these compile
    to the same program.

    Args:
      params: the transformer's parameters.
      state: from the last scale that ran; see `prepare` and `drop_unconditional_rows`.
      context: the text.
      draws: Exp(1) draws of this scale, as from `draw_all_scales`.
      settings: guidance and sampling of this scale.
      forced_bits: bits to go on with instead of the chosen ones.
      scores: where the plan selects by scores, one per token for every run of layers that keeps some
        (`ScaleStep.scored_runs`): the lowest are kept.
      loop: the run (static).
      scale: index of a scale that runs (static).
      record: what to report besides the bits (static).
      entropy_layers: layers whose attention entropy to report (static).
    """
    config, step = loop.transformer, loop.step(scale)
    model: Infinity = bind(Infinity, config, loop.dtype, params)
    grid, batch = loop.schedule[scale], state.code_map.shape[0]

    def guide_inside(next_layer: int, x: Array) -> Array:
        if not step.guided or next_layer != config.depth + loop.guidance_layer + 1:
            return x
        guidance_scale = jnp.asarray(settings.guidance_scale)
        conditional, unconditional = jnp.split(x, 2)
        mixed = sampling.guide(conditional, unconditional, guidance_scale)
        return jnp.where(guidance_scale == 1, x, jnp.concatenate([mixed, mixed]))

    layers = run_layers(
        model,
        _scale_input(model, context, state.code_map, loop, step),
        context,
        model.level_embedding[scale],
        rope.rotation(grid, loop.rope_grid, config.head_dim, config.rope_mode),
        state.cache,
        state.saved,
        scores,
        step=step,
        grid=grid,
        batch=batch,
        entropy_layers=entropy_layers,
        after_run=guide_inside,
    )
    x = layers.x
    if step.guided and loop.guidance_layer != 0:
        x = jnp.split(x, 2)[0]
    logits_raw = model.logits(x, context)
    bits = _choose_bits(logits_raw, draws, settings, loop, step)
    codes = bits_to_codes(bits if forced_bits is None else forced_bits)
    code_map = state.code_map + resize_bilinear(codes, loop.code_grids[-1])
    output = ScaleOutput(
        bits=bits,
        logits_raw=None if record == "bits" else logits_raw,
        kept=None if record == "bits" else layers.kept,
        entropy=layers.entropy,
        activations=layers.activations if record == "activations" else None,
    )
    return LoopState(layers.cache, code_map, state.saved | layers.saved), output


def sample(
    params: Parameters,
    features: Float[Array, "batch text_tokens channels"],
    lengths: Int[Array, "batch"],
    keys: Key[Array, "batch"],
    settings: tuple[SamplingSettings, ...],
    *,
    loop: LoopConfig,
) -> tuple[Float[Array, "batch height width code_dim"], tuple[UInt8[Array, "batch _height _width code_dim"], ...]]:
    """Generates the code maps of a batch: every scale of the plan in turn, without leaving the program.

    The plan must not select by scores: those come from a policy, which looks at one scale before it runs the next.

    Args:
      params: the transformer's parameters.
      features: text features, zero-padded to a common length.
      lengths: how many rows of each are real.
      keys: one random key per image.
      settings: one per scale.
      loop: the run (static).

    Returns:
      The final code map for the tokenizer's decoder, and the bits of every scale that runs.
    """
    batch = features.shape[0]
    context = encode_context(params, features, lengths, loop=loop)
    state = initial_state(loop, batch)
    draws = draw_all_scales(keys, loop)
    bits = []
    guided = loop.guided
    for scale in loop.executed_plan.executed_scales:
        step = loop.step(scale)
        state = prepare(state, step)
        if guided and not step.guided:
            cache, saved, context = drop_unconditional_rows(state.cache, state.saved, context, batch=batch)
            state = state._replace(cache=cache, saved=saved)
        guided = step.guided
        state, output = scale_step(params, state, context, draws[scale], settings[scale], loop=loop, scale=scale)
        bits.append(output.bits)
    return state.code_map, tuple(bits)
