"""Runs one batch: compiles what is new, then text context, scales and decoder, each timed."""

import dataclasses
import functools
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8, UInt32

from toprovar_jax.config import CheckpointConfig, VAEConfig
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.skeleton import Parameters, bind
from toprovar_jax.output import PipelineOutput, ScaleTrace, Timings, Trace
from toprovar_jax.programs import Programs, Recipe
from toprovar_jax.request import ScaleSettings
from toprovar_jax.scale_loop import (
    LoopConfig,
    LoopState,
    SamplingSettings,
    ScaleOutput,
    encode_context,
    image_keys,
    initial_state,
    scale_step,
)
from toprovar_jax.text_batch import TextBatch


@dataclasses.dataclass(frozen=True)
class Batch:
    """Everything that one run needs, checked.

    Attributes:
      loop: grids and guidance.
      text: features of every image.
      negative: features that replace the unconditional ones, padded to the same length.
      settings: guidance and sampling per scale.
      seeds: one per image.
      forced_bits: per scale, bits to go on with, or None.
      draws: per scale, Exp(1) draws, or None.
      trace: whether to record logits and code maps.
      decode: whether to make pixels.
    """

    loop: LoopConfig
    text: TextBatch
    negative: TextBatch | None
    settings: ScaleSettings
    seeds: UInt32[np.ndarray, "batch"]
    forced_bits: tuple[UInt8[np.ndarray, "batch _height _width code_dim"] | None, ...]
    draws: tuple[Float[np.ndarray, "batch _tokens bits 2"] | None, ...]
    trace: bool
    decode: bool

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.seeds)

    @property
    def context_arguments(self) -> tuple[Any, ...]:
        """Arguments of `encode_context` after the parameters."""
        arguments: tuple[Any, ...] = (self.text.features, self.text.lengths)
        if self.negative is not None:
            arguments += (self.negative.features, self.negative.lengths)
        return arguments

    def scale_arguments(self, scale: int) -> tuple[Any, ...]:
        """Arguments of `scale_step` after the keys."""
        settings = SamplingSettings(
            np.asarray(self.settings.guidance_scale[scale], np.float32),
            np.asarray(self.settings.temperature[scale], np.float32),
            np.asarray(self.settings.top_k[scale], np.int32),
            np.asarray(self.settings.top_p[scale], np.float32),
        )
        return settings, self.forced_bits[scale], self.draws[scale]


def decode_pixels(
    params: Parameters, code_map: Float[Array, "batch height width code_dim"], *, config: VAEConfig, dtype: str
) -> UInt8[Array, "batch pixel_height pixel_width 3"]:
    """Code map to RGB; values are truncated to integers, as published (docs/spec/infinity.md, section 5)."""
    image = bind(BSQVAE, config, dtype, params).decode(code_map)
    return ((image + 1) / 2 * 255).astype(jnp.uint8)


class Generator:
    """Runs batches of one checkpoint.

    Args:
      config: the checkpoint's models.
      params: parameters by model: "transformer" and "vae".
      dtype: "float32" or "bfloat16".
      programs: where compiled programs are kept.
    """

    def __init__(self, config: CheckpointConfig, params: dict[str, Parameters], dtype: str, programs: Programs):
        self._config = config
        self._params = params
        self._dtype = dtype
        self._programs = programs

    def __call__(self, batch: Batch, on_scale_end: Callable[[int, int], object] | None) -> PipelineOutput:
        """Generates a batch; images are uint8 RGB, or code maps where the batch is not decoded.

        Args:
          batch: what to generate.
          on_scale_end: called with (scale index, number of scales).
        """
        recipes = self._recipes(batch)
        context_key, start_key, *later_keys = recipes
        scale_keys = later_keys[: len(batch.loop.schedule)]
        compile_seconds = self._programs.compile(recipes)
        run, params = self._programs.run, self._params["transformer"]

        started = time.perf_counter()
        context = run(context_key, params, *batch.context_arguments)
        state, keys = jax.block_until_ready(run(start_key, batch.seeds))
        text_seconds = time.perf_counter() - started

        seconds, bits, traces = [], [], []
        for scale, key in enumerate(scale_keys):
            started = time.perf_counter()
            state, output = run(key, params, state, context, keys, *batch.scale_arguments(scale))
            bits.append(np.asarray(output.bits))
            seconds.append(time.perf_counter() - started)
            if batch.trace:
                traces.append(_trace(batch, scale, output, np.asarray(state.code_map)))
            if on_scale_end is not None:
                on_scale_end(scale, len(scale_keys))

        started = time.perf_counter()
        result = run(later_keys[-1], self._params["vae"], state.code_map) if batch.decode else state.code_map
        images = np.asarray(result)
        decode_seconds = time.perf_counter() - started
        made_of = zip(batch.forced_bits, bits, strict=True)
        return PipelineOutput(
            images=images,
            bits=tuple(chosen if forced is None else forced for forced, chosen in made_of),
            timings=Timings(compile_seconds, text_seconds, tuple(seconds), decode_seconds),
            trace=Trace(tuple(traces)) if batch.trace else None,
        )

    def _recipes(self, batch: Batch) -> dict[Hashable, Callable[[], Recipe]]:
        """Every program of the batch by its key, in the order of use: context, start, scales, decoder."""
        loop, params = batch.loop, self._params["transformer"]
        shape = (loop, batch.size, batch.text.text_tokens)
        context = Recipe(encode_context, (params, *batch.context_arguments), {"loop": loop})
        start = Recipe(_start, (batch.seeds,), {"loop": loop})

        def scale_recipe(scale: int) -> Recipe:
            state, keys = start.output_shapes()
            return Recipe(
                scale_step,
                (params, state, context.output_shapes(), keys, *batch.scale_arguments(scale)),
                {"loop": loop, "scale": scale, "record": "logits" if batch.trace else "bits"},
                donate=(1,),
            )

        def decode_recipe() -> Recipe:
            state, _ = start.output_shapes()
            return Recipe(
                decode_pixels,
                (self._params["vae"], state.code_map),
                {"config": self._config.vae, "dtype": self._dtype},
            )

        recipes: dict[Hashable, Callable[[], Recipe]] = {
            ("context", shape, batch.negative is None): lambda: context,
            ("start", loop, batch.size): lambda: start,
        }
        for scale in range(len(loop.schedule)):
            given = (batch.forced_bits[scale] is None, batch.draws[scale] is None)
            recipes["scale", shape, scale, batch.trace, given] = functools.partial(scale_recipe, scale)
        if batch.decode:
            recipes["decode", loop.code_grids[-1], batch.size] = decode_recipe
        return recipes


def _start(seeds: UInt32[Array, "batch"], *, loop: LoopConfig) -> tuple[LoopState, Key[Array, "batch"]]:
    return initial_state(loop, seeds.shape[0]), image_keys(seeds)


def _trace(batch: Batch, scale: int, output: ScaleOutput, code_map: np.ndarray) -> ScaleTrace:
    logits = np.asarray(output.logits_raw)
    if batch.settings.guidance_scale[scale] == 1:
        logits = logits[: batch.size]
    return ScaleTrace(logits, np.asarray(output.bits), code_map)
