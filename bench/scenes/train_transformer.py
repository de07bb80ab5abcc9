"""Training of the transformer: bits of every scale, given the caption and coarser scales with mistakes."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from bench.scenes import render, train_text
from bench.scenes.dataset import SceneBatch
from bench.scenes.train_detector import cast_like
from bench.scenes.train_vae import schedule_of
from bench.scenes.training import Loss, TrainingConfig, fresh_parameters
from toprovar_jax.models.bsq_vae import BSQVAE, SelfCorrection, self_correction_inputs
from toprovar_jax.models.infinity import Attend, Infinity, KeyValue
from toprovar_jax.models.skeleton import Parameters, abstract_parameters, bind
from toprovar_jax.schedule import ScaleSchedule, rope_grid

_KEY_ALIGNMENT = 8  # cuDNN's attention wants lengths that are multiples of this
_SMALL_PREFIX = 128  # scales that end below this many tokens share one masked product


class TransformerConstants(NamedTuple):
    """What the transformer's loss reads besides its own parameters."""

    atlas: render.Atlas
    vae: Parameters
    text_encoder: Parameters


def initial_parameters(config: TrainingConfig) -> Parameters:
    """Fresh parameters.

    Gates start open, residual branches small, and what is added to the tokens or read as text at comparable size.
    """
    transformer: Parameters = fresh_parameters(
        abstract_parameters(Infinity, config.model.transformer, "float32"), seed=0
    )
    branch = (2 * config.model.transformer.depth) ** -0.5
    for block in transformer["blocks"].values():
        block["modulation"][:2] += 0.5
        block["self_attention"]["output"]["kernel"] *= branch
        block["cross_attention"]["output"]["kernel"] *= branch
        block["mlp"]["down"]["kernel"] *= branch
    transformer["head"]["kernel"] *= 0.3
    transformer["word_embedding"]["kernel"] *= 3
    transformer["text_pool"]["query"] *= 5
    transformer["level_embedding"] *= 5
    transformer["unconditional_features"] *= 50
    return transformer


def make_loss(config: TrainingConfig, num_scales: int) -> Callable[[TransformerConstants], Loss]:
    """Binary cross entropy of the bits of the first `num_scales` scales.

    A token counts 1/side of its scale: the coarse scales decide the composition and have few tokens.
    """
    schedule = schedule_of(config)
    trained = schedule[:num_scales]
    weights = np.concatenate([np.full(grid.size, 1 / grid.height, np.float32) for grid in trained])
    weights /= weights.sum()

    def with_constants(constants: TransformerConstants) -> Loss:
        def loss(
            parameters: Parameters, scenes: SceneBatch, key: Key[Array, ""]
        ) -> tuple[Array, dict[str, Array]]:
            flip_key, drop_key = jax.random.split(key)
            pairs = teaching_pairs(config, constants, scenes, flip_key)
            features, mask = train_text.encode(config, constants.text_encoder, scenes.tokens)
            logits = caption_logits(config, parameters, features, mask, pairs, trained, drop_key)
            labels = _flatten_scales(pairs.labels[:num_scales]).astype(jnp.float32)
            per_token = jax.nn.softplus(logits * (1 - 2 * labels)).mean((0, 2))
            right = ((logits > 0) == (labels > 0)).mean((0, 2))
            ends = np.cumsum([grid.size for grid in trained])
            accuracy = jnp.stack(
                [right[end - grid.size : end].mean() for grid, end in zip(trained, ends, strict=True)]
            )
            return (per_token * weights).sum(), {"bit_accuracy": accuracy}

        return loss

    return with_constants


def teaching_pairs(
    config: TrainingConfig, constants: TransformerConstants, scenes: SceneBatch, key: Key[Array, ""]
) -> SelfCorrection:
    """Renders and encodes the scenes: the codes that scales see, with mistakes, and the bits they must give."""
    vae = bind(BSQVAE, config.model.vae, config.dtype, constants.vae)
    schedule = schedule_of(config)
    return self_correction_inputs(
        vae.encode(render.render(constants.atlas, scenes)),
        schedule,
        key,
        strength=config.flip_strength,
        num_noisy_scales=len(schedule) - 1,
        patchify=False,
    )


def caption_logits(
    config: TrainingConfig,
    parameters: Parameters,
    features: Float[Array, "batch text_tokens channels"],
    mask: Bool[Array, "batch text_tokens"],
    pairs: SelfCorrection,
    schedule: ScaleSchedule,
    drop_key: Key[Array, ""],
) -> Float[Array, "batch tokens bits"]:
    """How much more likely 1 is than 0, as a difference of logits, for every bit; some captions are dropped."""
    model = config.model
    cast = cast_like(parameters, abstract_parameters(Infinity, model.transformer, config.dtype))
    transformer = bind(Infinity, model.transformer, config.dtype, cast)
    dropped = jax.random.bernoulli(drop_key, config.caption_dropout, (features.shape[0], 1, 1))
    features = jnp.where(dropped, transformer.unconditional_text(features.shape[1]), features)

    def forward(transformer_parameters: Parameters, codes: Array, features: Array) -> Array:
        network = bind(Infinity, model.transformer, config.dtype, transformer_parameters)
        return network.teacher_forced_logits(
            codes,
            network.encode_text(features, mask.sum(1)),
            schedule=schedule,
            rope_grid=rope_grid(),
            attend=differentiable_attention(schedule),
        )

    # Products are kept for the backward pass; the cheap steps between them are done again.
    forward = jax.checkpoint(forward, policy=_keep_products)
    codes = _flatten_scales(pairs.inputs[: len(schedule) - 1])
    logits = forward(cast, codes, features)
    logits = logits.reshape(*logits.shape[:2], -1, 2)
    return logits[..., 1] - logits[..., 0]


def differentiable_attention(schedule: ScaleSchedule) -> Attend:
    """Block-causal attention over the scales for training.

    The first scales share one small masked product; every later one attends from its queries to the keys of all
    scales up to itself. On a GPU that is cuDNN's attention, which wants aligned key lengths and masks the excess.
    """
    ends = np.cumsum([grid.size for grid in schedule])
    first = int(np.searchsorted(ends, _SMALL_PREFIX))
    level = np.repeat(np.arange(first), [grid.size for grid in schedule[:first]])
    mask = jnp.asarray(level[:, None] >= level)[None, None]
    on_gpu = jax.default_backend() == "gpu"

    def attend(query: Array, key: Array, value: Array) -> tuple[Array, KeyValue]:
        start = ends[first - 1] if first else 0
        outputs = []
        if first:
            outputs.append(
                jax.nn.dot_product_attention(
                    query[:, :start], key[:, :start], value[:, :start], mask=mask, scale=1.0, implementation="xla"
                )
            )
        padding = ((0, 0), (0, -key.shape[1] % _KEY_ALIGNMENT), (0, 0), (0, 0))
        padded_key, padded_value = jnp.pad(key, padding), jnp.pad(value, padding)
        for end in ends[first:]:
            capacity = end + -end % _KEY_ALIGNMENT
            outputs.append(
                jax.nn.dot_product_attention(
                    query[:, start:end],
                    padded_key[:, :capacity],
                    padded_value[:, :capacity],
                    scale=1.0,
                    query_seq_lengths=jnp.full(query.shape[0], end - start, jnp.int32),
                    key_value_seq_lengths=jnp.full(query.shape[0], end, jnp.int32),
                    implementation="cudnn" if on_gpu else "xla",
                )
            )
            start = end
        return jnp.concatenate(outputs, axis=1), KeyValue(key, value)

    return attend


def _keep_products(primitive: jax.extend.core.Primitive, *_: object, **__: object) -> bool:
    return "dot" in primitive.name


def _flatten_scales(maps: list[Array]) -> Array:
    """[batch, tokens, bits] of maps, scale after scale."""
    return jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in maps], axis=1)
