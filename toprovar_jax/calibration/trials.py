"""Trials: the same pictures drawn again under candidate settings, and what that saves."""

import dataclasses
from collections.abc import Collection, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float

from toprovar_jax.calibration.candidates import Candidate
from toprovar_jax.calibration.observation import Observation, Request, observe
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.pruning.flops import PlanCost
from toprovar_jax.pruning.plan import Plan
from toprovar_jax.pruning.profile import Profile
from toprovar_jax.pruning.toprovar import ToProVAR
from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.similarity import structural_similarity

_LARGEST_ALPHA = 16.0
_ALPHA_STEPS = 16
# A candidate that saves more than this times as much before it has pruned a token is not what the target asks for.
_LARGEST_EXCESS = 1.25


@dataclasses.dataclass(frozen=True)
class _FromOneScale(ToProVAR):
    """Pruning from a given scale on. Its cache has room for a full run, so that trials share their full scales."""

    def plans(self, schedule: ScaleSchedule, depth: int) -> tuple[Plan, ...]:
        plans = super().plans(schedule, depth)
        return tuple(dict.fromkeys([*plans, Plan.dense(schedule, depth)]))


class Trials:
    """Draws pictures in full once, and then under candidate settings.

    Args:
      pipe: the checkpoint, with a tokenizer.
      requests: the pictures.
    """

    def __init__(self, pipe: InfinityPipeline, requests: Sequence[Request]):
        assert pipe.tokenizer is not None
        self._pipe = pipe
        self._requests = requests
        self._text_tokens = max(pipe.tokenizer.encode(request.prompts).tokens.shape[1] for request in requests)
        self._similarities: dict[Hashable, list[np.ndarray]] = {}
        self._costs: dict[Plan, int] = {}
        self.observed: Observation = observe(pipe, requests)

    @property
    def num_batches(self) -> int:
        """Batches that the pictures are drawn in."""
        return len(self._requests)

    @property
    def num_scales(self) -> int:
        """Scales of a full run."""
        return len(self.observed.schedule)

    @property
    def depth(self) -> int:
        """Layers of the transformer."""
        return self._pipe.config.transformer.depth

    def _cost(self, plan: Plan) -> int:
        if plan not in self._costs:
            config, guided = self._pipe.config.transformer, self.observed.guided
            cost = PlanCost(config, plan, guided=guided, text_tokens=self._text_tokens)
            self._costs[plan] = cost.loop().total
        return self._costs[plan]

    def speedup(self, profile: Profile, starts: Collection[int]) -> float:
        """Operations saved by pictures that start at these scales; the number of scales stands for never."""
        policy = ToProVAR(profile)
        costs = {start: self._cost(policy.plan_from(start, self.observed.schedule)) for start in set(starts)}
        return self._cost(Plan.dense(self.observed.schedule, self.depth)) / float(
            np.mean([costs[start] for start in starts])
        )

    def runs(self, profile: Profile, start: int) -> Hashable:
        """What settings come to from a start scale on: equal for those that run alike."""
        plan = ToProVAR(profile).plan_from(start, self.observed.schedule)
        spans = {run.span for scale in plan.executed_scales for run in plan.step(scale).scored_runs}
        # Where all layers share one choice of tokens, it makes no difference whether theirs or all maps are asked.
        alike = profile.source == "layer_before" or spans <= {(0, self.depth)}
        return plan, None if alike else profile.source

    def similarities(
        self, settings: Sequence[tuple[Profile, int]], num_batches: int
    ) -> list[Float[np.ndarray, "pictures"]]:
        """`similarity` of several profiles and starts; programs of those that run differently compile at once."""
        keys = [self.runs(*setting) for setting in settings]
        different = dict(zip(keys, settings, strict=True))
        if not different:
            return []
        with ThreadPoolExecutor(len(different)) as pool:
            drawn = pool.map(
                lambda setting: self.similarity(setting[0], setting[1], num_batches), different.values()
            )
            found = dict(zip(different, drawn, strict=True))
        return [found[key] for key in keys]

    def similarity(self, profile: Profile, start: int, num_batches: int) -> Float[np.ndarray, "pictures"]:
        """SSIM to the full pictures, of those of the first batches, when all start at one scale.

        Args:
          profile: the settings; its threshold is not asked.
          start: the scale; the number of scales for never.
          num_batches: how many.
        """
        key = self.runs(profile, start)
        known = self._similarities.setdefault(key, [])
        known += [self._batch_similarity(profile, start, index) for index in range(len(known), num_batches)]
        return np.concatenate(known[:num_batches])

    def _batch_similarity(self, profile: Profile, start: int, index: int) -> Float[np.ndarray, "pictures"]:
        request, schedule = self._requests[index], self.observed.schedule
        policy = _FromOneScale(dataclasses.replace(profile, usual_scales=len(schedule) - start), use_scale=False)
        size = len(request.seeds)
        if policy.plan_from(start, schedule) == Plan.dense(schedule, self.depth):
            return np.ones(size)
        output = self._pipe(request.prompts, seed=request.seeds, output_type="np", policy=policy)
        full = self.observed.pictures[index * size : (index + 1) * size]
        return np.asarray(structural_similarity(np.asarray(output.images), full))

    def solve(self, candidate: Candidate, speedup: float, starts: Collection[int]) -> Profile | None:
        """The smallest alpha_max that reaches a speed-up; None where none does, or where none stays near it."""
        low, high = 0.0, _LARGEST_ALPHA
        if self.speedup(candidate.profile(high), starts) < speedup:
            return None
        if self.speedup(candidate.profile(low), starts) > _LARGEST_EXCESS * speedup:
            return None
        for _ in range(_ALPHA_STEPS):
            middle = (low + high) / 2
            if self.speedup(candidate.profile(middle), starts) < speedup:
                low = middle
            else:
                high = middle
        return candidate.profile(high)
