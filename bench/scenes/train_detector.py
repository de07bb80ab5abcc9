"""Training of the detector: focal loss on centres, cross entropy on nouns and colours near them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from bench.scenes import detector, render
from bench.scenes.dataset import SceneBatch
from bench.scenes.detector import DetectorOutput
from bench.scenes.training import Loss, TrainingConfig
from toprovar_jax.models.skeleton import Parameters, abstract_parameters, bind

_OWN_CELLS = 0.4  # cells whose centre heat exceeds this learn what the object is


def make_loss(config: TrainingConfig) -> Callable[[render.Atlas], Loss]:
    """The detector's loss; its constants are the atlas."""

    def with_constants(atlas: render.Atlas) -> Loss:
        def loss(
            parameters: Parameters, scenes: SceneBatch, key: Key[Array, ""]
        ) -> tuple[Array, dict[str, Array]]:
            images, true_colors = augment(render.render(atlas, scenes), key)
            cast = cast_like(parameters, abstract_parameters(detector.Detector, detector.CONFIG, config.dtype))
            network = bind(detector.Detector, detector.CONFIG, config.dtype, cast)
            output = jax.tree.map(lambda x: x.astype(jnp.float32), network(images.astype(config.dtype)))
            return detection_loss(output, scenes, true_colors)

        return loss

    return with_constants


def cast_like(parameters: Parameters, skeleton: Parameters) -> Any:
    """The parameters in the skeleton's dtypes; gradients come back in their own."""
    return jax.tree.map(lambda value, leaf: value.astype(leaf.dtype), parameters, skeleton)


def augment(
    images: Float[Array, "batch height width 3"], key: Key[Array, ""]
) -> tuple[Float[Array, "batch height width 3"], Float[Array, "batch"]]:
    """Blur, noise, brightness and, for a third, exchanged colour channels; and whether the colours are still true.

    The detector must tolerate imperfect pictures, and know an object in a colour that it was never trained on.
    """
    batch = images.shape[0]
    keys = jax.random.split(key, 6)

    def uniform(index: int, low: float, high: float) -> Array:
        return jax.random.uniform(keys[index], (batch, 1, 1, 1), minval=low, maxval=high)

    slightly = _blur(_blur(images))
    blurred = jnp.where(uniform(0, 0, 1) < 0.25, _blur(_blur(_blur(slightly))), slightly)
    images = jnp.where(uniform(1, 0, 1) < 0.5, blurred, images)
    exchanged = uniform(2, 0, 1) < 1 / 3
    order = jax.vmap(lambda k: jax.random.permutation(k, 3))(jax.random.split(keys[3], batch))
    permuted = jnp.take_along_axis(images, order[:, None, None], axis=-1)
    images = jnp.where(exchanged, permuted, images)
    brightness_key, noise_key = jax.random.split(keys[4])
    gain, shift, amount = jax.random.uniform(brightness_key, (3, batch, 1, 1, 1))
    images = jnp.clip(images * (0.9 + 0.2 * gain) + 0.16 * shift - 0.08, -1, 1)
    images = images + 0.12 * amount * jax.random.normal(noise_key, images.shape)
    return images, 1 - exchanged[:, 0, 0, 0].astype(jnp.float32)


def detection_loss(
    output: DetectorOutput, scenes: SceneBatch, true_colors: Float[Array, "batch"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Loss of the network's maps against the scenes.

    Args:
      output: maps, float32.
      scenes: the truth.
      true_colors: 1 where the picture shows the scene's colours, 0 where they were exchanged.
    """
    heat, owner = _targets(scenes, output.center.shape[1])
    probability = jax.nn.sigmoid(output.center)
    focal = jnp.where(
        heat > 0.999,
        -((1 - probability) ** 2) * jax.nn.log_sigmoid(output.center),
        -((1 - heat) ** 4) * probability**2 * jax.nn.log_sigmoid(-output.center),
    )
    center_loss = focal.sum() / jnp.maximum(scenes.present.sum(), 1)

    weight = jnp.where(heat > _OWN_CELLS, heat, 0)
    noun_loss = _weighted(_cross_entropy(output.noun, _of_owner(scenes.noun, owner)), weight)
    # Untinted sprites have no colour of their own.
    color = _of_owner(scenes.color, owner)
    color_weight = weight * (color >= 0) * true_colors[:, None, None]
    color_loss = _weighted(_cross_entropy(output.color, jnp.maximum(color, 0)), color_weight)
    radius_error = jnp.abs(output.log_radius - jnp.log(_of_owner(scenes.placement[..., 2], owner)))
    radius_loss = _weighted(radius_error, weight)
    numbers = {"center": center_loss, "noun": noun_loss, "color": color_loss, "radius": radius_loss}
    return center_loss + noun_loss + color_loss + radius_loss, numbers


def _targets(scenes: SceneBatch, cells: int) -> tuple[Array, Array]:
    """Heat of object centres [batch, cells, cells], 1 in a centre's cell, and the object that owns each cell."""
    x, y = ((scenes.placement[..., axis] + 1) / 2 * cells for axis in (0, 1))
    center = jnp.arange(cells) + 0.5
    spread = jnp.maximum(1.0, 0.08 * scenes.placement[..., 2] * cells)[..., None, None]
    distance = (center - x[..., None, None]) ** 2 + (center[:, None] - y[..., None, None]) ** 2
    present = scenes.present[..., None, None]
    heat = jnp.exp(-distance / (2 * spread**2)) * present
    column, row = (jnp.clip(jnp.floor(v), 0, cells - 1)[..., None, None] for v in (x, y))
    peak = (jnp.arange(cells) == column) & (jnp.arange(cells)[:, None] == row)
    return jnp.maximum(heat.max(1), (peak * present).max(1)), heat.argmax(1)


def _of_owner(values: Array | np.ndarray, owner: Array) -> Array:
    """Per cell, the value of the object that owns it."""
    batch = owner.shape[0]
    return jnp.take_along_axis(jnp.asarray(values), owner.reshape(batch, -1), axis=1).reshape(owner.shape)


def _cross_entropy(logits: Array, target: Array) -> Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), target[..., None].astype(jnp.int32), axis=-1)[..., 0]


def _weighted(values: Array, weight: Array) -> Array:
    return (values * weight).sum() / (weight.sum() + 1)


def _blur(images: Array) -> Array:
    neighbours = [jnp.roll(images, shift, axis) for axis in (1, 2) for shift in (-1, 1)]
    return (images + sum(neighbours)) / 5
