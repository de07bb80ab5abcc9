"""FastVAR: late scales run on the tokens that differ most from the mean; the very last ones do not run.

Source: docs/spec/fastvar_skipvar.md, section A.
"""

import dataclasses

from toprovar_jax.pruning.plan import Plan, ScalePlan
from toprovar_jax.pruning.policy import Policy, require_scales
from toprovar_jax.schedule import ScaleSchedule

# The published range, layers 3 to 27 of 32, as shares of the depth.
_FIRST_LAYER, _STOP_LAYER = 3 / 32, 28 / 32


@dataclasses.dataclass(frozen=True)
class FastVAR(Policy):
    """The published rule, counted from the last scale so that it applies to every schedule.

    Of S scales, S-5 runs in full and leaves its updates, S-4 and S-3 run on some tokens, S-2 and S-1 do not run.

    Attributes:
      prune_ratios: share of tokens that does not run at S-4 and S-3.
      layers: first and last layer that prunes; None takes the published range, 3 to 27 of 32, in proportion to the
        depth, and layer 1 at the earliest. Layers past the last one of a model are ignored.
    """

    prune_ratios: tuple[float, float] = (0.4, 0.5)
    layers: tuple[int, int] | None = None

    def plans(self, schedule: ScaleSchedule, depth: int) -> tuple[Plan, ...]:
        require_scales("fastvar", schedule, 6)
        first = len(schedule) - 4
        pruned_layers = self._pruned_layers(depth)
        scales = [ScalePlan.dense(grid, depth) for grid in schedule[:first]]
        for grid, ratio in zip(schedule[first:-2], self.prune_ratios, strict=True):
            kept = grid.size - int(grid.size * ratio)
            counts = (kept if layer in pruned_layers else grid.size for layer in range(depth))
            scales.append(ScalePlan(tuple(counts)))
        prunes = any(min(entry.kept_tokens) < grid.size for grid, entry in zip(schedule, scales, strict=False))
        scales += [ScalePlan.dropped()] * 2
        return (Plan(schedule, depth, tuple(scales), "variance", restore_scale=first - 1 if prunes else None),)

    def _pruned_layers(self, depth: int) -> range:
        if self.layers is None:
            return range(max(1, round(_FIRST_LAYER * depth)), round(_STOP_LAYER * depth))
        first, last = self.layers
        return range(first, min(last + 1, depth))
