"""Generates the same prompts and seeds under several policies, for `bench.quality --policies`."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from bench import image_plans
from bench.flop_counter import Counter, countable, total
from bench.policy_cases import Case
from bench.scenes import detector, score
from bench.scenes.prompts import Prompt
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.programs import COMPILED_IN_HASTE
from toprovar_jax.pruning.plan import Plan
from toprovar_jax.schedule import scale_schedule
from toprovar_jax.similarity import mean_squared_error, structural_similarity


@dataclasses.dataclass(frozen=True)
class Run:
    """What a case made of the prompts.

    Attributes:
      case: what ran.
      right: whether a picture shows what its prompt asks for.
      similarity: SSIM to the reference's picture.
      squared_error: against the reference's picture.
      plans: what every picture followed, as [prompts][seeds].
      flops: XLA's count of every picture's scales, the policy's own programs included.
      loop_ms: milliseconds of the scales of one picture alone; None until timed.
      total_ms: the same from prompt to pixels.
    """

    case: Case
    right: Bool[np.ndarray, "prompts seeds"]
    similarity: Float[np.ndarray, "prompts seeds"]
    squared_error: Float[np.ndarray, "prompts seeds"]
    plans: tuple[tuple[Plan, ...], ...]
    flops: Float[np.ndarray, "prompts seeds"]
    loop_ms: float | None = None
    total_ms: float | None = None


def run_cases(
    pipeline: InfinityPipeline,
    cases: Sequence[Case],
    asked: Sequence[Prompt],
    *,
    num_seeds: int,
    seed: int,
    batch_size: int,
    report: Callable[[str], object],
    **settings: Any,
) -> Iterator[Run]:
    """Generates and measures every case's pictures, one case after the other.

    Programs of all cases are compiled together, and in haste.

    Args:
      pipeline: the model.
      cases: what to run; the first is the reference.
      asked: the prompts.
      num_seeds: pictures of every prompt.
      seed: of the first picture; the next ones count up.
      batch_size: pictures generated at once; each follows the plan that its policy chooses for it alone.
      report: called with a line when a part of the work is done.
      **settings: the pipeline's, as `guidance_scale`.
    """
    counted = count_flops(pipeline, cases, settings.get("guidance_scale"))
    report("counted operations")
    repeated = [*asked] * num_seeds
    texts, seeds = [prompt.text for prompt in repeated], [seed + index for index in range(len(repeated))]
    drawing = InfinityPipeline(
        pipeline.config, pipeline.params, dtype=pipeline.dtype, tokenizer=pipeline.tokenizer
    )
    drawing.programs.compiler_options = COMPILED_IN_HASTE
    reference: np.ndarray | None = None

    def draw(case: Case, every: int) -> tuple[UInt8[np.ndarray, "pictures height width 3"], list[Plan]]:
        return image_plans.draw(drawing, texts[::every], seeds[::every], case.policy, batch_size, **settings)

    with ThreadPoolExecutor(len(cases)) as pool:
        # A batch of each first, of all kinds of prompts, so that what it compiles is what all others need.
        first = [pool.submit(draw, case, -(-len(texts) // batch_size)) for case in cases]
        for case in cases:
            first.pop(0).result()
            report(f"compiled {case.name}")
            pictures, plans = draw(case, 1)
            report(f"drew {case.name}")
            reference = pictures if reference is None else reference
            similarity, error = _compare(pictures, reference, batch_size)
            right, flops = _judge(pictures, repeated), np.array([counted[case][plan] for plan in plans])
            right, similarity, error, flops = (
                values.reshape(num_seeds, len(asked)).T for values in (right, similarity, error, flops)
            )
            yield Run(
                case=case,
                right=right,
                similarity=similarity,
                squared_error=error,
                plans=tuple(tuple(plans[index :: len(asked)]) for index in range(len(asked))),
                flops=flops,
            )


def count_flops(
    pipeline: InfinityPipeline, cases: Sequence[Case], guidance_scale: float | None
) -> Mapping[Case, Mapping[Plan, float]]:
    """XLA's count of the scales of one picture, the policy's own programs included, by case and by plan."""
    defaults = pipeline.config.defaults
    guided = (defaults.guidance_scale if guidance_scale is None else guidance_scale) != 1
    schedule = scale_schedule(pixels=defaults.pixels)
    counter = Counter(pipeline.config, pipeline.dtype, schedule, guided)

    def counted(case: Case, plan: Plan) -> float:
        count = total(counter.count(case.policy, plan).values())
        return count.xla_flops + count.policy_flops

    with countable():
        return {
            case: {
                plan: counted(case, plan)
                for plan in case.policy.plans(schedule, pipeline.config.transformer.depth)
            }
            for case in cases
        }


def timed(
    pipeline: InfinityPipeline, run: Run, prompt: Prompt, *, seed: int, num_calls: int, **settings: Any
) -> Run:
    """The run with the median times of one picture at a time, of the programs that the pipeline always runs.

    Args:
      pipeline: the model.
      run: of the case that is timed.
      prompt: what is drawn.
      seed: of the picture.
      num_calls: calls that are timed, after one that compiles.
      **settings: the pipeline's, as `guidance_scale`.
    """
    timings = [
        pipeline(prompt.text, seed=seed, policy=run.case.policy, output_type="np", **settings).timings
        for _ in range(1 + num_calls)
    ][1:]
    return dataclasses.replace(
        run,
        loop_ms=1e3 * statistics.median(sum(timing.scales) for timing in timings),
        total_ms=1e3 * statistics.median(timing.total for timing in timings),
    )


def _judge(
    pictures: UInt8[np.ndarray, "pictures height width 3"], asked: Sequence[Prompt]
) -> Bool[np.ndarray, "pictures"]:
    """Whether each shows what is asked for."""
    found = detector.detect(detector.load_weights(), pictures)
    return np.array([score.judge(prompt.scene, seen) for prompt, seen in zip(asked, found, strict=True)])


def _compare(
    pictures: UInt8[np.ndarray, "pictures height width 3"],
    reference: UInt8[np.ndarray, "pictures height width 3"],
    batch_size: int,
) -> tuple[Float[np.ndarray, "pictures"], Float[np.ndarray, "pictures"]]:
    """Similarity and squared error of pairs."""
    parts = [slice(start, start + batch_size) for start in range(0, len(pictures), batch_size)]
    similarity = [np.asarray(structural_similarity(pictures[part], reference[part])) for part in parts]
    error = [np.asarray(mean_squared_error(pictures[part], reference[part])) for part in parts]
    return np.concatenate(similarity), np.concatenate(error)
