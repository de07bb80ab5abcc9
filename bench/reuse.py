"""That compiled programs are few and reused, and what pruning brings: python -m bench.reuse

Draws one prompt of every length under each policy, which compiles everything, then many different prompts one by
one, and counts what XLA compiles meanwhile. Prints that, the timings, and how much of the saved operations the
loop gets faster by; writes JSON.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from bench import report
from bench.scenes.prompts import load_prompts
from bench.speed_run import Misses
from toprovar_jax import command_line
from toprovar_jax.checkpoint import EMBEDDED
from toprovar_jax.errors import InputError
from toprovar_jax.output import PipelineOutput
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.programs import COMPILED_IN_HASTE
from toprovar_jax.pruning.flops import PlanCost
from toprovar_jax.pruning.plan import Plan

_LEAST_SHARE = 0.6  # of the saved operations, on a CPU
_COMPILES = "/jax/core/compile/backend_compile_duration"


def measure(
    pipeline: InfinityPipeline, policies: Sequence[str], prompts: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    """Draws prompts one by one after one of every length; what was compiled, and how long the loop took.

    Policies take turns, so that whatever else the machine does slows all of them alike.

    Raises:
      InputError: something was compiled after the first ones.
    """
    assert pipeline.tokenizer is not None

    def draw(index: int, policy: str) -> PipelineOutput:
        return pipeline(prompts[index], seed=seed + index, policy=policy, output_type="np")

    lengths = [pipeline.tokenizer.encode([prompt]).tokens.shape[1] for prompt in prompts]
    different = sorted(set(lengths))
    first: dict[str, list[PipelineOutput]] = {}
    for policy in policies:
        first[policy] = [draw(lengths.index(length), policy) for length in different]
        seconds = sum(output.timings.compile for output in first[policy])
        print(f"{policy}: {len(pipeline.programs)} programs are compiled, {seconds:.1f} s", flush=True)
    programs, compiled = len(pipeline.programs), list[float]()

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILES:
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    drawn: dict[str, list[PipelineOutput]] = {policy: [] for policy in policies}
    for index in range(len(prompts)):
        for policy in policies:
            drawn[policy].append(draw(index, policy))
    jax.monitoring.unregister_event_duration_listener(listen)
    late = [output for outputs in drawn.values() for output in outputs if output.timings.compile]
    if compiled or late or len(pipeline.programs) != programs:
        raise InputError(f"{len(compiled)} programs were compiled for prompts that needed none")
    return {
        policy: {
            "prompts": len(prompts),
            "text_lengths": different,
            "compile_seconds_of_first": [output.timings.compile for output in first[policy]],
            "compiled_afterwards": len(compiled),
            **_summary(pipeline, outputs),
        }
        for policy, outputs in drawn.items()
    }


def _summary(pipeline: InfinityPipeline, outputs: Sequence[PipelineOutput]) -> dict[str, Any]:
    transformer = pipeline.config.transformer
    guided = pipeline.config.defaults.guidance_scale != 1
    costs = [PlanCost(transformer, output.plan, guided=guided).loop().total for output in outputs]
    dense = PlanCost(transformer, Plan.dense(outputs[0].plan.schedule, transformer.depth), guided=guided)
    scales = np.array([output.timings.scales for output in outputs])
    return {
        "times_fewer_operations": dense.loop().total / statistics.fmean(costs),
        "loop_ms": 1e3 * float(np.median(scales.sum(axis=1))),
        "scale_ms": (1e3 * np.median(scales, axis=0)).tolist(),
        "text_ms": 1e3 * statistics.median(output.timings.text for output in outputs),
        "decode_ms": 1e3 * statistics.median(output.timings.decode for output in outputs),
    }


def main() -> None:
    """Measures, prints and writes."""
    values = flags.FLAGS
    command_line.use_compilation_cache()
    misses = Misses()
    pipeline = InfinityPipeline.from_pretrained(values.checkpoint)
    if values.compile_in_haste:
        pipeline.programs.compiler_options = COMPILED_IN_HASTE
    prompts = [prompt.text for prompt in load_prompts("evaluation")][:: values.stride][: values.num_prompts]
    results = measure(pipeline, ("dense", values.policy), prompts, values.seed)
    for policy, found in results.items():
        print(
            f"{policy}: {len(prompts)} prompts, {found['compiled_afterwards']} programs compiled for them; "
            f"loop {found['loop_ms']:.1f} ms, text {found['text_ms']:.1f} ms, decoder {found['decode_ms']:.1f} ms"
        )
    pruned = results[values.policy]
    faster = results["dense"]["loop_ms"] / pruned["loop_ms"]
    part = faster / pruned["times_fewer_operations"]
    print(
        f"{pruned['times_fewer_operations']:.2f}x fewer operations, loop {faster:.2f}x faster: {part:.2f} of it "
        f"(on a CPU {_LEAST_SHARE} are expected)"
    )
    record = {
        "checkpoint": pipeline.checkpoint_digest,
        "dtype": pipeline.dtype,
        "seed": values.seed,
        "compiler_options": pipeline.programs.compiler_options,
    }
    path = report.write(
        Path(values.output).name,
        {
            **record,
            "programs": len(pipeline.programs),
            "not_in_compilation_cache": misses.count,
            "policies": results,
            "loop_faster": faster,
            "share_of_saved_operations": part,
        },
        Path(values.output).parent,
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", str(EMBEDDED), "Folder of the model.")
    flags.DEFINE_string("policy", "toprovar", "What to compare with dense.")
    flags.DEFINE_boolean("compile_in_haste", False, "Without the search for fast products: the loops are slower.")
    flags.DEFINE_integer("num_prompts", 100, "Different prompts.", lower_bound=1)
    flags.DEFINE_integer("stride", 4, "Takes every so many-th evaluation prompt.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the first picture.")
    flags.DEFINE_string("output", "bench/results/reuse", "Path of the JSON, without suffix.")
    command_line.run(main)
