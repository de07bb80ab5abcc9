"""ToProVAR: attention entropy decides from which scale on, in which layers and for which tokens to save work.

Scale: pruning starts after the first scale whose share of focused tokens crosses a threshold, image by image; a
batch waits for its last one. Layer: scores from calibration. Token: the lowest entropies stay, as many as Eq. 6
expects, rounded up to a bucket.
Source: docs/spec/toprovar.md, sections 3 to 6.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.pruning import entropy as measures
from toprovar_jax.pruning.plan import Plan, ScalePlan, ScaleStep, Selection, bucket
from toprovar_jax.pruning.policy import Policy, Report
from toprovar_jax.pruning.profile import Profile
from toprovar_jax.schedule import ScaleSchedule


@dataclasses.dataclass(frozen=True)
class ToProVAR(Policy):
    """The policy; each of its three levels can be switched off, as in the paper's ablations.

    Attributes:
      profile: what calibration has found for the checkpoint.
      use_scale: whether the start depends on the image; otherwise `profile.usual_scales` fixes it. Where the
        profile's threshold is one that every share crosses, no image is looked at either.
      use_layers: whether layers differ; otherwise all count as detail layers.
      use_tokens: whether detail layers run on some tokens; otherwise they are skipped and, where all layers count
        as detail layers, whole scales are dropped.
    """

    profile: Profile
    use_scale: bool = True
    use_layers: bool = True
    use_tokens: bool = True

    def plans(self, schedule: ScaleSchedule, depth: int) -> tuple[Plan, ...]:
        """One plan for every scale that pruning may start at, the earliest first, and at last the dense one.

        A run follows the earliest until a scale shows that it has not crossed the threshold, then the next one. A
        plan saves updates at the scale before its start, which is all that the scales before tell them apart by.
        """
        self.profile.check_depth(depth)
        return _plans(self, schedule)

    @property
    def looks(self) -> bool:
        """Whether any image is looked at, to find where its pruning starts."""
        above = self.profile.crossing == "above"
        every_share_crosses = self.profile.tau <= 0 if above else self.profile.tau >= 1
        return self.use_scale and not every_share_crosses

    def _first_start(self, schedule: ScaleSchedule) -> int:
        scales = self.profile.prunable_scales if self.use_scale else self.profile.usual_scales
        return max(1, len(schedule) - scales)

    def observes(self, plan: Plan, scale: int) -> bool:
        return self.looks and self._undecided(plan, scale)

    def entropy_layers(self, plan: Plan, scale: int) -> tuple[int, ...]:
        needed = self.observes(plan, scale) or (self._scores_tokens() and self._may_leave_updates(plan, scale))
        return tuple(range(plan.depth)) if needed else ()

    def _may_leave_updates(self, plan: Plan, scale: int) -> bool:
        """Whether this plan, or another one that agrees with it up to a scale, chooses tokens by that scale."""
        return any(
            other.restore_scale == scale and other.scales[: scale + 1] == plan.scales[: scale + 1]
            for other in self.plans(plan.schedule, plan.depth)
        )

    def _undecided(self, plan: Plan, scale: int) -> bool:
        """Whether pruning may start right after a scale, which is up to then dense."""
        start = _start(plan)
        last = len(plan.schedule) - 1 if start is None else start
        return self._first_start(plan.schedule) - 1 <= scale < last

    def _scores_tokens(self) -> bool:
        return self.use_tokens and self.profile.source != "layer_before"

    def observe(
        self,
        code_map: Float[Array, "batch height width code_dim"],
        entropy: Float[Array, "layers rows tokens"] | None,
        vae: BSQVAE,
        *,
        schedule: ScaleSchedule,
        code_grids: ScaleSchedule,
        scale: int,
    ) -> Float[Array, "batch"]:
        """The share of focused tokens of every image (Eq. 3), from the mean over layers."""
        del vae, schedule, code_grids, scale
        assert entropy is not None
        return measures.focused_share(jnp.mean(measures.image_entropy(entropy, code_map.shape[0]), axis=0))

    def choose(self, plan: Plan, scale: int, reports: dict[int, Report]) -> Plan:
        start = _start(plan)
        if start is None or scale + 1 < start:
            return plan
        if self.crosses(np.stack(list(reports.values()))).any(axis=0).all():
            return plan
        plans = self.plans(plan.schedule, plan.depth)
        return plans[plans.index(plan) + 1]

    def crosses(self, shares: Float[np.ndarray, "*batch"]) -> Bool[np.ndarray, "*batch"]:
        """Whether focused shares let pruning start."""
        # float32 as the shares are, so that a share of exactly tau has reached it.
        tau = np.float32(self.profile.tau)
        return shares >= tau if self.profile.crossing == "above" else shares <= tau

    def score_scales(self, plan: Plan, scale: int) -> tuple[int, ...]:
        if plan.restore_scale is None or scale <= plan.restore_scale or not self._scores_tokens():
            return ()
        return (plan.restore_scale,)

    def scores(
        self,
        entropies: dict[int, Float[Array, "layers rows _tokens"]],
        *,
        plan: Plan,
        step: ScaleStep,
        batch: int,
    ) -> Float[Array, "runs batch tokens"]:
        """Relative entropies at the last dense scale, on the step's grid, averaged over layers.

        The layers of a run share one choice, so that their maps are averaged whatever the source.
        """
        ((source, entropy),) = entropies.items()
        grid = plan.schedule[step.scale]
        maps = measures.image_entropy(entropy, batch).reshape(-1, entropy.shape[-1])
        maps = measures.resize_map(maps, plan.schedule[source], grid)
        relative = measures.relative_entropy(maps).reshape(plan.depth, batch, grid.size)
        own = self.profile.source == "same_layers"
        spans = [run.span if own else (0, plan.depth) for run in step.scored_runs]
        return jnp.stack([jnp.mean(relative[start:stop], axis=0) for start, stop in spans])

    def plan_from(self, first: int, schedule: ScaleSchedule) -> Plan:
        """The plan that saves work from a scale on, or from the next one that has work to save."""
        dense = Plan.dense(schedule, len(self.profile.layer_scores))
        pruned = tuple(self._pruned_scale(schedule, scale) for scale in range(first, len(schedule)))
        scales = dense.scales[:first] + pruned
        pairs = enumerate(zip(scales, dense.scales, strict=True))
        thinned = [i for i, (entry, full) in pairs if entry.runs and entry.kept_tokens != full.kept_tokens]
        selection: Selection = "entropy" if self.profile.source == "layer_before" else "scores"
        return Plan(schedule, dense.depth, scales, selection, restore_scale=thinned[0] - 1 if thinned else None)

    def _layer_scores(self) -> tuple[float, ...]:
        """R of every layer as used; 0 keeps a layer dense."""
        scores = self.profile.layer_scores
        if self.use_layers:
            return scores
        dense = (0.0,) if self.profile.source == "layer_before" else ()
        return dense + (1.0,) * (len(scores) - len(dense))

    def _pruned_scale(self, schedule: ScaleSchedule, scale: int) -> ScalePlan:
        profile, scores, left = self.profile, self._layer_scores(), len(schedule) - scale
        if profile.token_scales is not None and left > profile.token_scales:
            scores = (0.0,) * len(scores)
        if left <= profile.dropped_scales or not (self.use_tokens or self.use_layers):
            return ScalePlan.dropped()
        kept = tuple(self._kept_tokens(schedule, scale, score) for score in scores)
        return ScalePlan(kept, guided=left > profile.dropped_scales + profile.conditional_scales)

    def _kept_tokens(self, schedule: ScaleSchedule, scale: int, score: float) -> int:
        """How many tokens a layer keeps: as many as Eq. 6 expects, in the next bucket."""
        profile, grid = self.profile, schedule[scale]
        if score == 0:
            return grid.size
        if not self.use_tokens:
            return 0
        relative = measures.expected_relative_entropy(grid.size, profile.normalization)
        tendency = measures.tendency(relative, score, scale, len(schedule))
        keep = measures.keep_probability(tendency, profile.alpha_min, profile.alpha_max)
        share = float(np.mean(keep))
        # Rounded, so that the error of a product does not reach for the next bucket.
        return bucket(grid, round(share * grid.size, 6)) if share > 0 else 0


# Asked for while an image is drawn, and the device waits for the choice.
@functools.lru_cache(maxsize=64)
def _plans(policy: ToProVAR, schedule: ScaleSchedule) -> tuple[Plan, ...]:
    first = policy._first_start(schedule)
    if not policy.looks:
        return (policy.plan_from(first, schedule),)
    plans = [policy.plan_from(start, schedule) for start in range(first, len(schedule))]
    return tuple(dict.fromkeys([*plans, Plan.dense(schedule, len(policy.profile.layer_scores))]))


@functools.lru_cache(maxsize=64)
def _start(plan: Plan) -> int | None:
    """The first scale that does not run in full; None where all do."""
    dense = Plan.dense(plan.schedule, plan.depth)
    pairs = zip(plan.scales, dense.scales, strict=True)
    return next((scale for scale, (entry, full) in enumerate(pairs) if entry != full), None)
