"""Times one case in a process of its own; `python -m bench.speed` starts it and keeps what it writes.

python -m bench.speed_run '{"model": ..., ...}'    the fields of `Case`, as JSON
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench import kernel_profile, report
from bench.floors import stage_floors
from bench.full_size import aggressive_profile, load_pipeline
from bench.stage_clock import time_stages
from toprovar_jax import command_line
from toprovar_jax.config import ARCHITECTURES
from toprovar_jax.errors import InputError
from toprovar_jax.output import PipelineOutput
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.pruning.policy import Policy
from toprovar_jax.pruning.toprovar import ToProVAR

# 19 words: 20 tokens with the end of the sequence.
PROMPT = "a small red fox and a large blue owl read an old map under a tall oak at dawn"

INPUT_ERROR_CODE = 2
_MISS = "/jax/compilation_cache/cache_misses"


@dataclasses.dataclass(frozen=True)
class Case:
    """What to time.

    Attributes:
      model: an architecture, for random weights, or a checkpoint's folder.
      policy: what the pipeline takes as its policy.
      dtype: precision policy.
      pixels: pixel budget.
      batch: images at once, each with a prompt of its own.
      runs: timed calls, for the total and again for the stages.
      warmups: calls before them.
      cache_dir: folder of JAX's compilation cache.
      profile: whether to break one image down into kernels.
      if_cold: whether to time also where programs had to be compiled; else the result is about the start alone.
      out: file for the result.
      started: Unix time at which the process was started.
    """

    model: str
    policy: str
    dtype: str
    pixels: str
    batch: int
    runs: int
    warmups: int
    cache_dir: str
    profile: bool
    if_cold: bool = True
    out: str = ""
    started: float = 0.0


class Misses:
    """Counts programs that the compilation cache did not have."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_listener(self._hear)

    def _hear(self, event: str, **_: object) -> None:
        self.count += event == _MISS


def generate(pipe: InfinityPipeline, case: Case) -> PipelineOutput:
    """One call of the pipeline, prompts to uint8 pixels on the host."""
    policy: str | Policy = case.policy
    if case.policy == "toprovar" and case.model in ARCHITECTURES:
        policy = ToProVAR(aggressive_profile(case.model))
    return pipe([PROMPT] * case.batch, policy=policy, pixels=case.pixels, output_type="np")


def require_sane(output: PipelineOutput) -> None:
    """Raises InputError where not-a-numbers got into an image: they make its last bits 0, and pixels flat."""
    bits = np.mean(output.bits[-1])
    deviations = np.asarray(output.images).std(axis=(1, 2, 3))
    if not (0 < bits < 1 and (deviations > 0).all()):
        raise InputError(
            f"the images are flat: mean of the last bits {bits}, deviations of the pixels {deviations.tolist()}"
        )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(pipe: InfinityPipeline, case: Case) -> dict[str, Any]:
    """Times a pipeline whose programs are compiled.

    Returns:
      "total_ms"; "loop_ms" and, within it, "policy_ms" of the programs that only decide; "stages" in order, each
      with "ms", "host_ms" and "floor_ms"; "floor_ms" of the whole; "images_per_second"; "peak_device_bytes".
      Calls timed by stage are others than those timed as a whole.
    """
    plan = generate(pipe, case).plan
    for _ in range(case.warmups - 1):
        generate(pipe, case)
    totals = []
    for _ in range(case.runs):
        begun = time.perf_counter()
        generate(pipe, case)
        totals.append(1e3 * (time.perf_counter() - begun))
    runs = [time_stages(pipe.programs, lambda: generate(pipe, case)) for _ in range(case.runs)]
    text_tokens = len(PROMPT.split()) + 1
    floors = stage_floors(
        pipe.config, pipe.params, plan, dtype=pipe.dtype, batch=case.batch, text_tokens=text_tokens
    )
    stages = [
        {
            "stage": timed[0].name,
            "floor_ms": floors.get(timed[0].name, 0.0),
            "ms": spread([stage.milliseconds for stage in timed]),
            "host_ms": spread([stage.host_ms for stage in timed]),
        }
        for timed in zip(*runs, strict=True)
    ]
    loops = [run[[stage.name for stage in run].index("scale 0") : -1] for run in runs]
    return {
        "total_ms": spread(totals),
        "images_per_second": 1e3 * case.batch / statistics.median(totals),
        "loop_ms": spread([sum(stage.milliseconds for stage in loop) for loop in loops]),
        "policy_ms": spread(
            [sum(stage.milliseconds for stage in loop if not stage.name.startswith("scale")) for loop in loops]
        ),
        "floor_ms": sum(floors.values()),
        "stages": stages,
        "peak_device_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def run(case: Case) -> dict[str, Any]:
    """Loads, makes a first image and, where that was not a cold start or cold ones count too, times more."""
    jax.config.update("jax_compilation_cache_dir", case.cache_dir)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    misses = Misses()
    imported = time.time()
    pipe = load_pipeline(case.model, case.dtype)
    jax.block_until_ready(pipe.params)
    loaded = time.time()
    before = misses.count
    first = generate(pipe, case)
    require_sane(first)
    cold = misses.count > before
    result: dict[str, Any] = {
        **{name: value for name, value in report.provenance().items() if name in ("device", "versions")},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **{name: getattr(case, name) for name in ("model", "policy", "dtype", "pixels", "batch")},
        "cold": cold,
        "start_s": {
            "imports": imported - case.started,
            "weights": loaded - imported,
            "compile": first.timings.compile,
            "first_image": time.time() - case.started,
        },
        "compiled_programs": misses.count - before,
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.params)),
    }
    if cold and not case.if_cold:
        return result
    result |= measure(pipe, case)
    if case.profile:
        _write(case, result)  # should the profiler fail
        result["profile"] = kernel_profile.profile(pipe.programs, lambda: generate(pipe, case))
    return result


def _write(case: Case, result: dict[str, Any]) -> None:
    Path(case.out).write_text(json.dumps(result), encoding="utf-8")


def main() -> None:
    """Runs the case that the only argument describes and writes its result."""
    case = Case(**json.loads(sys.argv[1]))
    command_line.collect_garbage_seldom()  # as the commands do that users run
    try:
        result = run(case)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(INPUT_ERROR_CODE)
    _write(case, result)


if __name__ == "__main__":
    main()
