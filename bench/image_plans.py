"""Draws many pictures in batches, each under the plan that its policy chooses for it alone.

A batch follows the plan of its most demanding picture. So the first pass finds what every picture would have
followed by itself, and those that would have saved more are drawn again, with their like.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.pruning.plan import Plan, ScaleStep
from toprovar_jax.pruning.policy import Policy, Report
from toprovar_jax.schedule import ScaleSchedule


def draw(
    pipeline: InfinityPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    policy: Policy,
    batch_size: int,
    **settings: Any,
) -> tuple[UInt8[np.ndarray, "pictures height width 3"], list[Plan]]:
    """Pictures, and the plan of each.

    Args:
      pipeline: the model.
      prompts: one per picture.
      seeds: one per picture.
      policy: chooses the plans.
      batch_size: pictures drawn at once; the last batch repeats its own, so that one shape is compiled.
      **settings: the pipeline's, as `guidance_scale`.
    """
    pictures: dict[int, np.ndarray] = {}
    plans: dict[int, Plan] = {}

    def draw_some(indices: Sequence[int], followed: Policy) -> None:
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            rows = [batch[row % len(batch)] for row in range(batch_size)]
            watched = _Watched(followed)
            output = pipeline(
                [prompts[row] for row in rows],
                seed=[seeds[row] for row in rows],
                policy=watched,
                output_type="np",
                **settings,
            )
            chosen = watched.chosen or [output.plan] * batch_size
            plans.update(zip(rows, chosen, strict=True))
            for row, plan, picture in zip(rows, chosen, np.asarray(output.images), strict=True):
                if plan == output.plan:
                    pictures[row] = picture

    draw_some(range(len(prompts)), policy)
    waiting = [index for index in range(len(prompts)) if index not in pictures]
    for plan in dict.fromkeys(plans[index] for index in waiting):
        draw_some([index for index in waiting if plans[index] == plan], _Followed(policy, plan))
    everything = range(len(prompts))
    return np.stack([pictures[index] for index in everything]), [plans[index] for index in everything]


@dataclasses.dataclass(frozen=True)
class _Wrapped(Policy):
    """Prunes as another policy does."""

    policy: Policy

    def plans(self, schedule: ScaleSchedule, depth: int) -> tuple[Plan, ...]:
        return self.policy.plans(schedule, depth)

    def entropy_layers(self, plan: Plan, scale: int) -> tuple[int, ...]:
        return self.policy.entropy_layers(plan, scale)

    def score_scales(self, plan: Plan, scale: int) -> tuple[int, ...]:
        return self.policy.score_scales(plan, scale)

    def scores(
        self,
        entropies: dict[int, Float[Array, "layers rows _tokens"]],
        *,
        plan: Plan,
        step: ScaleStep,
        batch: int,
    ) -> Float[Array, "runs batch tokens"]:
        return self.policy.scores(entropies, plan=plan, step=step, batch=batch)


@dataclasses.dataclass(frozen=True)
class _Followed(_Wrapped):
    """One of a policy's plans, whatever there is to see."""

    plan: Plan

    def plans(self, schedule: ScaleSchedule, depth: int) -> tuple[Plan, ...]:
        del schedule, depth
        return (self.plan,)


@dataclasses.dataclass(frozen=True)
class _Watched(_Wrapped):
    """A policy, and what it would have chosen for every picture of one batch."""

    chosen: list[Plan] = dataclasses.field(default_factory=list, compare=False)

    def plans(self, schedule: ScaleSchedule, depth: int) -> tuple[Plan, ...]:
        # Room for a full run in the cache, so that policies share the programs of the scales that they run alike.
        return tuple(dict.fromkeys([*self.policy.plans(schedule, depth), Plan.dense(schedule, depth)]))

    def observes(self, plan: Plan, scale: int) -> bool:
        return self.policy.observes(plan, scale)

    def observe(self, *arguments: Any, **static: Any) -> PyTree[Array]:
        return self.policy.observe(*arguments, **static)

    def choose(self, plan: Plan, scale: int, reports: dict[int, Report]) -> Plan:
        if not self.chosen:
            self.chosen.extend([plan] * len(jax.tree.leaves(reports)[0]))
        for image, own in enumerate(self.chosen):
            if self.policy.observes(own, scale):
                seen = {
                    earlier: jax.tree.map(lambda values, image=image: values[image : image + 1], report)
                    for earlier, report in reports.items()
                }
                self.chosen[image] = self.policy.choose(own, scale, seen)
        return self.policy.choose(plan, scale, reports)
