"""Training of the tokenizer: reconstruction through the bits, straight through where they have no gradient."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from bench.scenes import detector, render
from bench.scenes.dataset import SceneBatch
from bench.scenes.train_detector import cast_like
from bench.scenes.training import Loss, TrainingConfig
from toprovar_jax.models.bsq_vae import BSQVAE, bits_to_codes, multi_scale_quantize
from toprovar_jax.models.skeleton import Parameters, abstract_parameters, bind
from toprovar_jax.resize import resize_bilinear
from toprovar_jax.schedule import ScaleSchedule, scale_schedule

_DROPPED_SHARE = 0.1  # images that go without their last scales
_MAX_DROPPED = 3
_COMMITMENT = 0.25


class VAEConstants(NamedTuple):
    """What the tokenizer's loss reads besides its own parameters."""

    atlas: render.Atlas
    detector: Parameters


def schedule_of(config: TrainingConfig) -> ScaleSchedule:
    """Grids of the model's square images."""
    return scale_schedule(1.0, config.model.defaults.pixels)


def make_loss(config: TrainingConfig) -> Callable[[VAEConstants], Loss]:
    """L1, L2, gradient and detector-feature loss of the reconstruction, and commitment to the code map."""
    schedule = schedule_of(config)

    def with_constants(constants: VAEConstants) -> Loss:
        features = _feature_network(constants.detector, config)

        def loss(
            parameters: Parameters, scenes: SceneBatch, key: Key[Array, ""]
        ) -> tuple[Array, dict[str, Array]]:
            images = jax.lax.stop_gradient(render.render(constants.atlas, scenes))
            cast = cast_like(parameters, abstract_parameters(BSQVAE, config.model.vae, config.dtype))
            vae = bind(BSQVAE, config.model.vae, config.dtype, cast)
            latent = vae.encode(images)
            code_map, decoded = jax.lax.stop_gradient(_quantize_dropping(latent, schedule, key))
            # The unclamped decoder: a clamp would stop the gradient of the pixels that are too bright.
            reconstruction, _ = vae.decoder(latent + jax.lax.stop_gradient(decoded - latent))
            reconstruction = reconstruction.astype(jnp.float32)
            feature_pairs = zip(features(images), features(reconstruction), strict=True)
            numbers: dict[str, Array] = {
                "absolute": jnp.abs(images - reconstruction).mean(),
                "squared": jnp.square(images - reconstruction).mean(),
                "edges": _edge_difference(images, reconstruction),
                "features": jnp.stack([jnp.abs(a - b).mean() for a, b in feature_pairs]).sum(),
                "commitment": jnp.square(latent - code_map).mean(),
            }
            total = (
                numbers["absolute"]
                + numbers["squared"]
                + numbers["edges"]
                + config.feature_weight * numbers["features"]
                + _COMMITMENT * numbers["commitment"]
            )
            return total, numbers | {"psnr": 10 * jnp.log10(4 / numbers["squared"])}

        return loss

    return with_constants


def _quantize_dropping(
    latent: Float[Array, "batch height width bits"], schedule: ScaleSchedule, key: Key[Array, ""]
) -> tuple[Array, Array]:
    """The code map, and the one to decode, in which some images lack their last scales.

    Coarse scales then decode to something by themselves, and the transformer's late mistakes cost less.
    """
    quantized = multi_scale_quantize(latent, schedule)
    share_key, count_key = jax.random.split(key)
    batch = latent.shape[0]
    most = min(_MAX_DROPPED, len(schedule) - 1)
    dropped = jax.random.randint(count_key, (batch, 1, 1, 1), 1, most + 1)
    dropped = jnp.where(jax.random.bernoulli(share_key, _DROPPED_SHARE, dropped.shape), dropped, 0)
    decoded = quantized.code_map
    for back in range(1, most + 1):
        codes = resize_bilinear(bits_to_codes(quantized.bits[-back]), schedule[-1])
        decoded = decoded - jnp.where(dropped >= back, codes, 0)
    return quantized.code_map, decoded


def _feature_network(parameters: Parameters, config: TrainingConfig) -> Callable[[Array], tuple[Array, ...]]:
    cast = cast_like(parameters, abstract_parameters(detector.Detector, detector.CONFIG, config.dtype))
    network = bind(detector.Detector, detector.CONFIG, config.dtype, cast)
    return lambda images: tuple(x.astype(jnp.float32) for x in network.features(images.astype(config.dtype)))


def _edge_difference(first: Array, second: Array) -> Array:
    difference = first - second
    return jnp.abs(jnp.diff(difference, axis=1)).mean() + jnp.abs(jnp.diff(difference, axis=2)).mean()
