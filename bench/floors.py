"""The time that no implementation of the published products can beat, for every stage of an image.

A stage takes at least as long as its products at the device's best rate, or as its weights take to be read once.
Norms, activations and traffic of activations count as nothing. Products are counted as published: a short text
that is folded into cross attention's projections saves up to an eighth of them.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.tree_util import DictKey

from toprovar_jax.config import CheckpointConfig
from toprovar_jax.models.skeleton import Parameters
from toprovar_jax.pruning.flops import H200, PlanCost, Roofs
from toprovar_jax.pruning.plan import Plan
from toprovar_jax.schedule import tokenizer_schedule

# Parameters of the transformer that are read once per image, before the first scale.
_CONTEXT = ("text_pool", "text_projection", "shared_modulation", "head_modulation")


def stage_floors(
    config: CheckpointConfig,
    params: dict[str, Parameters],
    plan: Plan,
    *,
    dtype: str,
    batch: int,
    text_tokens: int,
    roofs: Roofs = H200,
) -> dict[str, float]:
    """Milliseconds by stage, under guidance where the plan has it; stages that do next to nothing are left out.

    Args:
      config: the models.
      params: their parameters, or shapes of them.
      plan: what the transformer runs.
      dtype: precision policy of the models.
      batch: images.
      text_tokens: tokens of every prompt, padding not counted.
      roofs: of the device.
    """
    cost = PlanCost(config.transformer, plan, batch=batch, text_tokens=text_tokens, dtype=dtype)
    context = [
        leaf
        for path, leaf in _kernels(params["transformer"])
        if path[0] in _CONTEXT or path[-3:-1] == ("cross_attention", "key_value")
    ]
    encoder = [leaf for _, leaf in _kernels(params.get("text_encoder", {}))]
    encoder_flops = 2 * batch * text_tokens * sum(math.prod(leaf.shape) for leaf in encoder)
    grid = tokenizer_schedule(plan.schedule, config.transformer.patchify)[-1]
    decoder_flops = batch * decoder_work(params["vae"]["decoder"], grid.size)
    seconds = {
        "text encoder": max(encoder_flops / roofs.products, _num_bytes(encoder) / roofs.bandwidth),
        "start": max(cost.text().total / roofs.products, _num_bytes(context) / roofs.bandwidth),
        **{f"scale {scale}": cost.floor_seconds(scale, roofs) for scale in range(len(plan.scales))},
        "decoder": decoder_flops / roofs.products,
    }
    return {stage: 1e3 * value for stage, value in seconds.items() if value > 0}


def decoder_work(decoder: Parameters, cells: int) -> int:
    """Floating-point operations of the decoder's convolutions for a code map of so many cells."""
    coarsest = max(decoder["up"])
    total = 0
    for path, leaf in _kernels(decoder):
        products = math.prod(leaf.shape)
        if path[-2] == "upsample":
            # Four pixels of an enlarged map from 2x2 cells each.
            products = products // 9 * 4 * 4
        level = path[1] if path[0] == "up" else 0 if path[0] == "conv_out" else coarsest
        total += 2 * products * cells * 4 ** (coarsest - level)
    return total


def _kernels(params: Parameters) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = tuple(key.key for key in path if isinstance(key, DictKey))
        if keys[-1] == "kernel":
            yield keys, leaf


def _num_bytes(leaves: list[Any]) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
