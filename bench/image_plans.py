"""Draws many pictures in batches, each under the plan that its policy chooses for it alone.

A batch follows the plan of its most demanding picture. So batches follow one plan from end to end, at first the
one that the policy starts with; pictures for which it would have changed to another one on the way are drawn again
under that, with their like. Only plans that some picture follows are compiled.
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
    seen: list[dict[int, Report]] = [{} for _ in prompts]
    waiting: dict[Followed, list[int]] = {Followed(policy): [*range(len(prompts))]}
    while waiting:
        followed, indices = waiting.popitem()
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            rows = [batch[row % len(batch)] for row in range(batch_size)]
            watched = dataclasses.replace(followed, reports={})
            output = pipeline(
                [prompts[row] for row in rows],
                seed=[seeds[row] for row in rows],
                policy=watched,
                output_type="np",
                **settings,
            )
            for index, (row, picture) in enumerate(
                zip(batch, np.asarray(output.images)[: len(batch)], strict=True)
            ):
                seen[row] |= {scale: _of_image(report, index) for scale, report in watched.reports.items()}
                changed = followed.changed(output.plan, seen[row])
                if changed is None:
                    pictures[row], plans[row] = picture, output.plan
                else:
                    waiting.setdefault(changed, []).append(row)
    everything = range(len(prompts))
    return np.stack([pictures[index] for index in everything]), [plans[index] for index in everything]


def _of_image(report: Report, image: int) -> Report:
    return jax.tree.map(lambda values: values[image : image + 1], report)


@dataclasses.dataclass(frozen=True)
class Followed(Policy):
    """One of a policy's plans from end to end, whatever there is to see.

    All plans of a policy share the programs of the scales that they run alike.

    Attributes:
      policy: whose plan it is.
      plan: what runs; None for the plan that the policy starts with.
      decided: the scale after which the policy chose the plan: it looks at later ones only.
      reports: by scale, what there was to see in one batch.
    """

    policy: Policy
    plan: Plan | None = None
    decided: int = -1
    reports: dict[int, Report] = dataclasses.field(default_factory=dict, compare=False)

    def plans(self, schedule: ScaleSchedule, depth: int) -> tuple[Plan, ...]:
        first = self.policy.plans(schedule, depth)[0] if self.plan is None else self.plan
        # Room for a full run in the cache, on whose size programs depend.
        return tuple(dict.fromkeys([first, Plan.dense(schedule, depth)]))

    def entropy_layers(self, plan: Plan, scale: int) -> tuple[int, ...]:
        first = self.plans(plan.schedule, plan.depth)[0]
        alike = plan.scales[: scale + 1] == first.scales[: scale + 1]
        return self.policy.entropy_layers(first, scale) if alike else ()

    def observes(self, plan: Plan, scale: int) -> bool:
        first = self.plans(plan.schedule, plan.depth)[0]
        return plan == first and scale > self.decided and self.policy.observes(plan, scale)

    def observe(self, *arguments: Any, **static: Any) -> PyTree[Array]:
        return self.policy.observe(*arguments, **static)

    def choose(self, plan: Plan, scale: int, reports: dict[int, Report]) -> Plan:
        self.reports[scale] = reports[scale]
        return plan

    def changed(self, plan: Plan, reports: dict[int, Report]) -> "Followed | None":
        """What an image would have changed to on the way; None where it would have stayed.

        Args:
          plan: what was followed.
          reports: by scale, what was seen of the image.
        """
        for scale in sorted(reports):
            if scale > self.decided:
                known = {earlier: report for earlier, report in reports.items() if earlier <= scale}
                if (chosen := self.policy.choose(plan, scale, known)) != plan:
                    return Followed(self.policy, chosen, scale)
        return None

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
