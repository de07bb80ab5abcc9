"""Training of the text encoder: its features must tell every object's colour and place.

A text encoder that is trained through the transformer alone stays a bag of words: which colour belongs to which
object pays off only once the transformer listens. So it is trained first, as Infinity's is, and then frozen. A
small probe, thrown away afterwards, asks the features about one object at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key
from jaxtyping import DTypeLike as DType

from bench.scenes import world
from bench.scenes.dataset import SceneBatch
from bench.scenes.train_detector import cast_like
from bench.scenes.training import Loss, TrainingConfig, fresh_parameters
from toprovar_jax.config import T5Config
from toprovar_jax.models.skeleton import Parameters, abstract_parameters, bind
from toprovar_jax.models.t5 import T5Encoder, relative_position_buckets

_HEADS = 4
_SIDES = 4  # left of the other object, right of it, above it, below it
_NEIGHBOUR_BIAS = 4.0


class ObjectAnswers(NamedTuple):
    """What the probe says of every object, as logits.

    Attributes:
      color: of the sprite's own colour, then of `world.COLORS`.
      side: left, right, above, below the other object.
    """

    color: Float[Array, "batch objects colors"]
    side: Float[Array, "batch objects sides"]


class SceneProbe(nnx.Module):
    """One attention from objects, known by their nouns, to the features of a caption; two answers for each."""

    def __init__(self, config: T5Config, *, dtype: DType, rngs: nnx.Rngs) -> None:
        width = config.embed_dim

        def linear(out_channels: int) -> nnx.Linear:
            return nnx.Linear(width, out_channels, dtype=dtype, param_dtype=dtype, rngs=rngs)

        self.noun_embedding = nnx.Param(jnp.zeros((len(world.NOUNS), width), dtype))
        self.key, self.value, self.hidden = linear(width), linear(width), linear(width)
        self.color, self.side = linear(len(world.COLORS) + 1), linear(_SIDES)

    def __call__(
        self,
        nouns: Int[Array, "batch objects"],
        features: Float[Array, "batch tokens channels"],
        mask: Bool[Array, "batch tokens"],
    ) -> ObjectAnswers:
        query = self.noun_embedding[...][nouns]
        split = (*features.shape[:2], _HEADS, -1)
        attended = jax.nn.dot_product_attention(
            query.reshape(*query.shape[:2], _HEADS, -1),
            self.key(features).reshape(split),
            self.value(features).reshape(split),
            mask=mask[:, None, None],
        )
        hidden = nnx.gelu(self.hidden(attended.reshape(query.shape)))
        return ObjectAnswers(*(head(hidden).astype(jnp.float32) for head in (self.color, self.side)))


def skeletons(config: TrainingConfig, dtype: str) -> dict[str, Parameters]:
    """Shapes and dtypes of the parameters that this stage trains."""
    return {
        "text_encoder": abstract_parameters(T5Encoder, config.model.text_encoder, dtype),
        "probe": abstract_parameters(SceneProbe, config.model.text_encoder, dtype),
    }


def initial_parameters(config: TrainingConfig) -> Parameters:
    """Fresh parameters, under "text_encoder" and "probe".

    One head looks at the word before and one at the word after from the start: without a sense of order, content
    alone soon decides where every head looks, and order is never learned.
    """
    text_config = config.model.text_encoder
    assert text_config is not None  # a run trains one
    fresh: dict[str, Any] = fresh_parameters(skeletons(config, "float32"), seed=0)
    text_encoder = fresh["text_encoder"]
    text_encoder["token_embedding"] *= 50
    queries = slice(text_config.num_heads * text_config.head_dim)
    for block in text_encoder["blocks"].values():
        # T5 does not scale its logits.
        block["attention"]["query_key_value"]["kernel"][:, queries] *= text_config.head_dim**-0.5
        block["attention"]["output"]["kernel"] *= 0.5
        block["mlp"]["down"]["kernel"] *= 0.5
    (_, after), (before, _) = relative_position_buckets(2, text_config.num_buckets, text_config.max_distance)
    text_encoder["relative_attention_bias"][before, 0] = _NEIGHBOUR_BIAS
    text_encoder["relative_attention_bias"][after, 1] = _NEIGHBOUR_BIAS
    fresh["probe"]["noun_embedding"] *= 50
    return fresh


def make_loss(config: TrainingConfig) -> Callable[[tuple[()]], Loss]:
    """Cross entropy of the probe's answers; there are no constants."""

    def with_constants(constants: tuple[()]) -> Loss:
        del constants

        def loss(
            parameters: Parameters, scenes: SceneBatch, key: Key[Array, ""]
        ) -> tuple[Array, dict[str, Array]]:
            del key
            cast = cast_like(parameters, skeletons(config, config.dtype))
            features, mask = encode(config, cast["text_encoder"], scenes.tokens)
            probe = bind(SceneProbe, config.model.text_encoder, config.dtype, cast["probe"])
            return answer_loss(probe(jnp.asarray(scenes.noun, jnp.int32), features, mask), scenes)

        return loss

    return with_constants


def encode(
    config: TrainingConfig, parameters: Parameters, tokens: Int[Array | np.ndarray, "batch tokens"]
) -> tuple[Float[Array, "batch tokens channels"], Bool[Array, "batch tokens"]]:
    """Features of captions in the run's dtype, and which of them are real."""
    tokens = jnp.asarray(tokens, jnp.int32)
    mask = tokens != 0
    text_encoder = bind(T5Encoder, config.model.text_encoder, config.dtype, parameters)
    return text_encoder(tokens, mask), mask


def answer_loss(answers: ObjectAnswers, scenes: SceneBatch) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross entropy of the answers about the objects of the scenes; of sides, where there are two kinds."""
    present = jnp.asarray(scenes.present)
    color = jnp.asarray(scenes.color, jnp.int32) + 1
    pairs = present * present[:, 1:2] * (scenes.noun[:, :1] != scenes.noun[:, 1:2])
    difference = scenes.placement[:, :2, :2] - scenes.placement[:, 1::-1, :2]
    x, y = difference[..., 0], difference[..., 1]
    side = jnp.where(jnp.abs(x) > jnp.abs(y), x > 0, 2 + (y > 0)).astype(jnp.int32)
    side = jnp.pad(side, ((0, 0), (0, present.shape[1] - 2)))
    losses = [
        _weighted(_cross_entropy(answers.color, color), present),
        _weighted(_cross_entropy(answers.side, side), pairs),
    ]
    numbers = {
        "color_accuracy": _weighted(answers.color.argmax(-1) == color, present),
        "side_accuracy": _weighted(answers.side.argmax(-1) == side, pairs),
    }
    return losses[0] + losses[1], numbers


def _cross_entropy(logits: Array, target: Array) -> Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None], axis=-1)[..., 0]


def _weighted(values: Array, weight: Array) -> Array:
    return (values * weight).sum() / jnp.maximum(weight.sum(), 1)
