"""Pictures drawn in full, and what their attention entropies say: all that calibration knows before it tries."""

import dataclasses
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from toprovar_jax.output import PipelineOutput
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.pruning import entropy as measures
from toprovar_jax.schedule import ScaleSchedule

# The paper classifies layers at its scale 6, counted from 1.
REPRESENTATIVE_SCALE = 5


class Request(NamedTuple):
    """Pictures drawn at once."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Observation:
    """What full runs show, picture by picture.

    Attributes:
      schedule: token grids.
      guided: whether the runs have unconditional rows.
      pictures: RGB.
      focused_shares: rho of every scale (Eq. 3).
      singular_ratios: sigma_1 / sigma_2 of every layer's map at the representative scale (Eq. 4).
    """

    schedule: ScaleSchedule
    guided: bool
    pictures: UInt8[np.ndarray, "pictures height width 3"]
    focused_shares: Float[np.ndarray, "pictures scales"]
    singular_ratios: Float[np.ndarray, "pictures layers"]


def deal(prompts: Sequence[str], num_pictures: int, batch_size: int, seed: int) -> list[Request]:
    """Draws prompts without return while there are any, and deals them to batches.

    Long prompts come first, one to a batch: a batch is padded to its longest, and all shall be padded alike.

    Args:
      prompts: to choose from.
      num_pictures: how many to draw; rounded up to whole batches.
      batch_size: pictures of a batch.
      seed: of the choice, and of the pictures.
    """
    num_batches = -(-num_pictures // batch_size)
    shuffled = random.Random(seed).sample(prompts, len(prompts))
    chosen = [shuffled[i % len(shuffled)] for i in range(num_batches * batch_size)]
    chosen.sort(key=len, reverse=True)
    first_seed = seed * num_pictures
    return [
        Request(
            tuple(chosen[batch::num_batches]),
            tuple(first_seed + batch + num_batches * i for i in range(batch_size)),
        )
        for batch in range(num_batches)
    ]


def observe(pipe: InfinityPipeline, requests: Iterable[Request]) -> Observation:
    """Draws pictures in full with the checkpoint's own settings."""
    outputs = [_draw(pipe, request) for request in requests]
    maps = [_maps(output) for output in outputs]
    representative = min(REPRESENTATIVE_SCALE, len(maps[0]) - 1)
    grid = outputs[0].plan.schedule[representative]
    layers = [scales[representative].reshape(*scales[representative].shape[:2], *grid) for scales in maps]
    return Observation(
        schedule=outputs[0].plan.schedule,
        guided=pipe.config.defaults.guidance_scale != 1,
        pictures=np.concatenate([np.asarray(output.images) for output in outputs]),
        focused_shares=np.concatenate([np.stack([_share(scale) for scale in scales], axis=1) for scales in maps]),
        singular_ratios=np.concatenate([np.asarray(measures.singular_ratio(x)).T for x in layers]),
    )


def _draw(pipe: InfinityPipeline, request: Request) -> PipelineOutput:
    return pipe(request.prompts, seed=request.seeds, output_type="np", trace=True)


def _maps(output: PipelineOutput) -> list[jnp.ndarray]:
    """Per scale, [layers, pictures, tokens]."""
    assert output.trace is not None
    return [
        measures.image_entropy(jnp.asarray(scale.entropy), len(output.images)) for scale in output.trace.scales
    ]


def _share(maps: jnp.ndarray) -> np.ndarray:
    return np.asarray(measures.focused_share(jnp.mean(maps, axis=0)))
