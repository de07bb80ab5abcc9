"""Generates the same prompts and seeds under several policies, for `bench.quality --policies`."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from tqdm import tqdm

from bench import image_plans
from bench.flop_counter import Counter, countable, total
from bench.policy_cases import Case
from bench.scenes import detector, score
from bench.scenes.prompts import Prompt
from toprovar_jax.output import Timings
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.programs import COMPILED_IN_HASTE
from toprovar_jax.pruning.plan import Plan
from toprovar_jax.similarity import mean_squared_error, structural_similarity

_TIMED_CALLS = 7


@dataclasses.dataclass(frozen=True)
class Run:
    """What a case made of the prompts.

    Attributes:
      case: what ran.
      right: whether a picture shows what its prompt asks for.
      similarity: SSIM to the reference's picture.
      squared_error: against the reference's picture.
      plans: what every picture followed, as [prompts][seeds].
      loop_ms: milliseconds of the scales of one picture alone.
      total_ms: the same from prompt to pixels.
    """

    case: Case
    right: Bool[np.ndarray, "prompts seeds"]
    similarity: Float[np.ndarray, "prompts seeds"]
    squared_error: Float[np.ndarray, "prompts seeds"]
    plans: tuple[tuple[Plan, ...], ...]
    loop_ms: float
    total_ms: float


def run_cases(
    pipeline: InfinityPipeline,
    cases: Sequence[Case],
    asked: Sequence[Prompt],
    *,
    num_seeds: int,
    seed: int,
    batch_size: int,
    **settings: Any,
) -> list[Run]:
    """Generates and measures every case's pictures.

    The pictures' programs are compiled in haste; those that are timed are the ones that the pipeline always runs.

    Args:
      pipeline: the model.
      cases: what to run; the first is the reference.
      asked: the prompts.
      num_seeds: pictures of every prompt.
      seed: of the first picture; the next ones count up.
      batch_size: pictures generated at once; each follows the plan that its policy chooses for it alone.
      **settings: the pipeline's, as `guidance_scale`.
    """
    repeated = [*asked] * num_seeds
    texts, seeds = [prompt.text for prompt in repeated], [seed + index for index in range(len(repeated))]
    drawing = InfinityPipeline(
        pipeline.config, pipeline.params, dtype=pipeline.dtype, tokenizer=pipeline.tokenizer
    )
    drawing.programs.compiler_options = COMPILED_IN_HASTE
    reference: np.ndarray | None = None
    runs = []
    for case in (progress := tqdm(cases, unit="case")):
        progress.set_description(case.name)
        pictures, plans = image_plans.draw(drawing, texts, seeds, case.policy, batch_size, **settings)
        reference = pictures if reference is None else reference
        timings = _time(pipeline, case, asked[0], seed, settings)
        similarity, error = _compare(pictures, reference, batch_size)
        by_prompt = {
            "right": _judge(pictures, repeated, batch_size),
            "similarity": similarity,
            "squared_error": error,
        }
        runs.append(
            Run(
                case=case,
                **{name: values.reshape(num_seeds, len(asked)).T for name, values in by_prompt.items()},
                plans=tuple(tuple(plans[index :: len(asked)]) for index in range(len(asked))),
                loop_ms=1e3 * statistics.median(sum(timing.scales) for timing in timings),
                total_ms=1e3 * statistics.median(timing.total for timing in timings),
            )
        )
    return runs


def count_flops(
    pipeline: InfinityPipeline, runs: Sequence[Run], guidance_scale: float | None
) -> list[Float[np.ndarray, "prompts seeds"]]:
    """XLA's count of every picture's scales, its policy's own programs included; one array per run."""
    guided = (pipeline.config.defaults.guidance_scale if guidance_scale is None else guidance_scale) != 1
    counter = Counter(pipeline.config, pipeline.dtype, runs[0].plans[0][0].schedule, guided)
    counts = []
    with countable():
        for run in runs:
            counted = {
                plan: total(counter.count(run.case.policy, plan).values())
                for plan in {plan for plans in run.plans for plan in plans}
            }
            flops = {plan: count.xla_flops + count.policy_flops for plan, count in counted.items()}
            counts.append(np.array([[flops[plan] for plan in plans] for plans in run.plans]))
    return counts


def _judge(
    pictures: UInt8[np.ndarray, "pictures height width 3"], asked: Sequence[Prompt], batch_size: int
) -> Bool[np.ndarray, "pictures"]:
    """Whether each shows what is asked for."""
    right = []
    for start in range(0, len(pictures), batch_size):
        part = slice(start, start + batch_size)
        found = detector.detect(detector.load_weights(), pictures[part].astype(np.float32) / 127.5 - 1)
        right += [score.judge(prompt.scene, seen) for prompt, seen in zip(asked[part], found, strict=True)]
    return np.array(right)


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


def _time(
    pipeline: InfinityPipeline, case: Case, prompt: Prompt, seed: int, settings: dict[str, Any]
) -> list[Timings]:
    """Timings of one picture at a time, everything compiled."""
    calls = (
        pipeline(prompt.text, seed=seed, policy=case.policy, output_type="np", **settings)
        for _ in range(1 + _TIMED_CALLS)
    )
    return [output.timings for output in calls][1:]
