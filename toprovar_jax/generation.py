"""Runs one batch: compiles what is new, then text context, scales and decoder, each timed."""

import collections
import itertools
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from toprovar_jax.batch import Batch
from toprovar_jax.batch_programs import BatchPrograms, Entropies, batch_programs, program_parameters
from toprovar_jax.config import CheckpointConfig
from toprovar_jax.models.skeleton import Parameters
from toprovar_jax.output import PipelineOutput, ScaleTrace, Timings, Trace
from toprovar_jax.programs import Programs
from toprovar_jax.pruning.policy import Report
from toprovar_jax.request import ScaleSettings
from toprovar_jax.scale_loop import LoopState, SamplingSettings, ScaleOutput, prepare

# Scales that are handed out before the host waits for an earlier one: the device never waits for the host.
_SCALES_AHEAD = 2


class Generator:
    """Runs batches of one checkpoint; those of several threads compile at once and run in turn.

    Args:
      config: the checkpoint's models.
      params: parameters by model: "transformer" and "vae".
      dtype: "float32", "bfloat16" or "float8_e4m3fn".
      programs: where compiled programs are kept.
    """

    def __init__(self, config: CheckpointConfig, params: dict[str, Parameters], dtype: str, programs: Programs):
        self._config = config
        self._params = program_parameters(params)
        self._dtype = dtype
        self._programs = programs
        self._ready: dict[Hashable, BatchPrograms] = {}
        self._settings: tuple[ScaleSettings | None, tuple[SamplingSettings, ...]] = (None, ())
        # The device's memory is for one batch. A callback may generate in the midst of a run.
        self._turn = threading.RLock()

    def __call__(self, batch: Batch, on_scale_end: Callable[[int, int], object] | None) -> PipelineOutput:
        """Generates a batch; images are uint8 RGB, or code maps where the batch is not decoded.

        Args:
          batch: what to generate.
          on_scale_end: called with (scale index, number of scales).
        """
        programs, compile_seconds = self._compile(batch)
        with self._turn:
            return self._run(batch, programs, compile_seconds, on_scale_end)

    def _run(
        self,
        batch: Batch,
        programs: BatchPrograms,
        compile_seconds: float,
        on_scale_end: Callable[[int, int], object] | None,
    ) -> PipelineOutput:
        run = self._programs.run

        started = time.perf_counter()
        context, state, draws = run(programs.start, self._params["text"], batch.seeds, *batch.context_arguments)

        settings = self._settings_on_device(batch)
        scales = _ScaleLoop(self._programs, self._params, programs, batch, settings, context, draws, state)
        num_scales = len(batch.loop.schedule)
        ended: list[float] = []  # the text, then every scale

        def finish(scale: int | None, result: Any) -> None:
            if result is None:
                ended.append(ended[-1])
            else:
                jax.block_until_ready(result)
                ended.append(time.perf_counter())
            if scale is not None and on_scale_end is not None:
                on_scale_end(scale, num_scales)

        running: collections.deque[tuple[int | None, Any]] = collections.deque([(None, draws)])
        chosen = []
        for scale in range(num_scales):
            chosen.append(scales.run(scale))
            running.append((scale, chosen[-1]))
            # Dropped scales are no work: to wait for one before them would leave the device idle.
            while sum(result is not None for _, result in running) > _SCALES_AHEAD:
                finish(*running.popleft())
        code_map = scales.end()
        pixels = run(programs.decode, self._params["vae"], code_map) if batch.decode else code_map
        while running:
            finish(*running.popleft())
        # Fetched while the decoder runs.
        bits = tuple(
            np.asarray(one) if forced is None else forced
            for one, forced in zip(chosen, batch.forced_bits, strict=True)
            if one is not None
        )
        images = np.asarray(pixels)
        decode_seconds = time.perf_counter() - ended[-1]
        seconds = tuple(end - begin for begin, end in itertools.pairwise(ended))
        return PipelineOutput(
            images=images,
            bits=bits,
            plan=scales.plan,
            timings=Timings(compile_seconds, ended[0] - started, seconds, decode_seconds),
            trace=Trace(tuple(scales.traces)) if batch.trace else None,
        )

    def _compile(self, batch: Batch) -> tuple[BatchPrograms, float]:
        """The programs of a batch's kind, and the seconds that compiling took."""
        if (known := self._ready.get(batch.kind)) is not None:
            return known, 0.0
        programs, recipes = batch_programs(self._config, self._params, self._dtype, batch)
        seconds = self._programs.compile(recipes)
        self._ready[batch.kind] = programs
        return programs, seconds

    def _settings_on_device(self, batch: Batch) -> tuple[SamplingSettings, ...]:
        """Those of the last batch are kept: to hand a number to a program costs the host as much as a kernel."""
        if self._settings[0] != batch.settings:
            self._settings = batch.settings, jax.device_put(batch.sampling_settings)
        return self._settings[1]


class _ScaleLoop:
    """The scales of one batch while they run."""

    def __init__(
        self,
        compiled: Programs,
        params: dict[str, Parameters],
        programs: BatchPrograms,
        batch: Batch,
        settings: tuple[SamplingSettings, ...],
        context: Any,
        draws: tuple[jax.Array, ...],
        state: LoopState,
    ):
        self._compiled = compiled
        self._params = params
        self._programs = programs
        self._batch = batch
        self._settings = settings
        self._context = context
        self._draws = draws
        self._guided = batch.loop.guided
        self._entropies: dict[int, Entropies] = {}
        self._reports: dict[int, Report] = {}
        self.state = state
        self.plan = programs.first_plan
        self.traces: list[ScaleTrace] = []

    def run(self, scale: int) -> jax.Array | None:
        """Hands out a scale, and lets the policy look at it: the bits to come, None where the plan drops it."""
        batch, run = self._batch, self._compiled.run
        programs = self._programs.scales[self.plan].get(scale)
        if programs is None:
            return None
        self.state = prepare(self.state, programs.step)
        if programs.cut is not None and self._guided:
            cache, saved, self._context = run(programs.cut, self.state.cache, self.state.saved, self._context)
            self.state = self.state._replace(cache=cache, saved=saved)
        self._guided = programs.step.guided
        scores = None
        if programs.scores is not None:
            scores = run(
                programs.scores,
                {
                    earlier: {layer: self._entropies[earlier][layer] for layer in layers}
                    for earlier, layers in programs.score_layers.items()
                },
            )
        self.state, output = run(
            programs.run,
            self._params["scales"],
            self.state,
            self._context,
            self._draws[scale] if batch.draws[scale] is None else batch.draws[scale],
            self._settings[scale],
            batch.forced_bits[scale],
            scores,
        )
        self._entropies[scale] = output.entropy
        if programs.observe is not None:
            self._observe(
                scale, programs.observe, {layer: output.entropy[layer] for layer in programs.entropy_layers}
            )
        if batch.trace:
            self.traces.append(self._trace(scale, output))
        return output.bits

    def end(self) -> Float[jax.Array, "batch height width code_dim"]:
        """The code map; the rest of the state makes room for what follows."""
        code_map = self.state.code_map
        self.state = self.state._replace(cache=(), saved={})
        return code_map

    def _observe(self, scale: int, observe: Hashable, entropy: Entropies) -> None:
        report = self._compiled.run(observe, self._params["vae"], self.state.code_map, entropy)
        self._reports[scale] = jax.device_get(report)
        plan = self._batch.policy.choose(self.plan, scale, self._reports)
        assert plan.scales[: scale + 1] == self.plan.scales[: scale + 1], "the past cannot be planned anew"
        self.plan = plan

    def _trace(self, scale: int, output: ScaleOutput) -> ScaleTrace:
        batch = self._batch
        logits = np.asarray(output.logits_raw)
        if batch.settings.guidance_scale[scale] == 1:
            logits = logits[: batch.size]
        entropy, kept = jax.device_get((output.entropy, output.kept))
        return ScaleTrace(
            logits_raw=logits,
            bits=np.asarray(output.bits),
            code_map=np.asarray(self.state.code_map),
            entropy=np.stack([entropy[layer] for layer in sorted(entropy)]),
            kept=kept,
            report=self._reports.get(scale),
        )
