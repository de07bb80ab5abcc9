"""What a policy is: it names the plans that a run may follow, looks at scales that have run, and chooses.

All plans are known beforehand, so that every step that a run may need is compiled before it starts. What a policy
computes on the device is a pure function of its own; what it decides, it decides on the host.
"""

import abc
import dataclasses

import numpy as np
from jaxtyping import Array, Float, PyTree

from toprovar_jax.errors import InputError
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.pruning.plan import Plan, ScaleStep
from toprovar_jax.schedule import ScaleSchedule

Report = PyTree[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Policy(abc.ABC):
    """Chooses plans. A frozen dataclass of hashable fields, since programs are compiled for it."""

    @abc.abstractmethod
    def plans(self, schedule: ScaleSchedule, depth: int) -> tuple[Plan, ...]:
        """Every plan that a run may follow or change to; it starts with the first.

        Args:
          schedule: token grids of the run.
          depth: layers of the transformer.

        Raises:
          InputError: the policy cannot apply to such a run; the message says what to use instead.
        """

    def entropy_layers(self, plan: Plan, scale: int) -> tuple[int, ...]:
        """Layers, ascending, whose attention entropy a scale has to report for `observe` or `scores`.

        The same for all plans that agree up to and including the scale.
        """
        del plan, scale
        return ()

    def observes(self, plan: Plan, scale: int) -> bool:
        """Whether to call `observe` and `choose` once a scale has run."""
        del plan, scale
        return False

    def observe(
        self,
        code_map: Float[Array, "batch height width code_dim"],
        entropy: Float[Array, "layers rows tokens"] | None,
        vae: BSQVAE,
        *,
        schedule: ScaleSchedule,
        code_grids: ScaleSchedule,
        scale: int,
    ) -> PyTree[Array]:
        """What to know about a scale that has run; a pure function, compiled on its own.

        Args:
          code_map: sum of the codes up to and including the scale.
          entropy: of `entropy_layers`; None where there are none.
          vae: the tokenizer.
          schedule: token grids of the run (static).
          code_grids: the same on the tokenizer's side (static).
          scale: index of the scale (static).
        """
        raise NotImplementedError(f"{type(self).__name__} observes nothing")

    def choose(self, plan: Plan, scale: int, reports: dict[int, Report]) -> Plan:
        """How to go on after a scale: one of `plans`, equal to `plan` up to and including that scale.

        A batch follows one plan, so the choice has to suit its most demanding image.

        Args:
          plan: the plan so far.
          scale: index of the scale that has run.
          reports: by scale, what `observe` found, on the host.
        """
        del scale, reports
        return plan

    def score_scales(self, plan: Plan, scale: int) -> tuple[int, ...]:
        """Earlier scales whose entropies `scores` needs to choose tokens for a scale."""
        del plan, scale
        return ()

    def scores(
        self,
        entropies: dict[int, Float[Array, "layers rows _tokens"]],
        *,
        plan: Plan,
        step: ScaleStep,
        batch: int,
    ) -> Float[Array, "runs batch tokens"]:
        """For steps whose plan selects by scores: one score per token and scored run; the lowest are kept.

        A pure function, compiled on its own.

        Args:
          entropies: by scale, what `entropy_layers` had reported of `score_scales`.
          plan: the plan (static).
          step: what it says of the scale to choose for (static).
          batch: number of images (static).
        """
        raise NotImplementedError(f"{type(self).__name__} scores no tokens")


@dataclasses.dataclass(frozen=True)
class Dense(Policy):
    """Runs everything."""

    def plans(self, schedule: ScaleSchedule, depth: int) -> tuple[Plan, ...]:
        return (Plan.dense(schedule, depth),)


@dataclasses.dataclass(frozen=True)
class Fixed(Policy):
    """One plan for every image.

    Attributes:
      plan: what to run; it applies to its own schedule and depth.
    """

    plan: Plan

    def plans(self, schedule: ScaleSchedule, depth: int) -> tuple[Plan, ...]:
        if self.plan.depth != depth:
            raise InputError(
                f"the plan is for a transformer of {self.plan.depth} layers, but this one has {depth}: make a "
                "plan for this model, or choose a policy by name"
            )
        if self.plan.schedule != schedule:
            raise InputError(
                f"the plan is for the scales {_grids(self.plan.schedule)}, but this run has {_grids(schedule)}: "
                "choose the aspect ratio and pixel budget that it was made for, or a policy by name"
            )
        if self.plan.selection == "scores" and any(
            self.plan.step(scale).scored_runs for scale in self.plan.executed_scales
        ):
            raise InputError(
                "the plan selects tokens by scores, which a plan alone does not compute: use policy 'toprovar', "
                "or a plan with selection 'entropy' or 'variance'"
            )
        return (self.plan,)


def _grids(schedule: ScaleSchedule) -> str:
    return " ".join(f"{grid.height}x{grid.width}" for grid in schedule)


def require_scales(policy: str, schedule: ScaleSchedule, minimum: int) -> None:
    """Raises InputError where a rule that counts from the last scale would count past the first."""
    if len(schedule) < minimum:
        raise InputError(
            f"policy {policy!r} needs {minimum} scales or more, but this run has {len(schedule)}: use policy "
            "'dense'"
        )
