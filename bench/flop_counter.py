"""Counts the operations of the pipeline's own programs: by XLA, and by formula.

Programs are lowered for the CPU from shapes alone, with layers unrolled. XLA counts a loop's body once and kernels
of our own not at all, so attention is the reference, in one chunk. Products are those of the published model: the
text is not folded into cross attention's projections, and small scales are not padded (in a whole loop of 2B at 1M
pixels that adds 15 tokens to 10521).
"""

import contextlib
from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np

from pallas_kernels.attention import reference
from toprovar_jax.batch import Batch
from toprovar_jax.batch_programs import BatchPrograms, Recipes, batch_programs, program_parameters
from toprovar_jax.config import CheckpointConfig
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.skeleton import abstract_parameters
from toprovar_jax.pruning import execution, token_choice
from toprovar_jax.pruning.flops import PlanCost
from toprovar_jax.pruning.plan import Plan
from toprovar_jax.pruning.policy import Policy
from toprovar_jax.request import ScaleSettings
from toprovar_jax.scale_loop import LoopConfig
from toprovar_jax.schedule import ScaleSchedule, rope_grid
from toprovar_jax.text import text_bucket
from toprovar_jax.text_batch import TextBatch

BATCH = 1
TEXT_TOKENS = text_bucket(20)  # a prompt of 20 tokens, padded as the pipeline does


@contextlib.contextmanager
def countable() -> Iterator[None]:
    """Programs lowered inside are for the CPU, without a loop over keys, folded text and padded tokens."""
    jax.clear_caches()  # attention may have been traced with its loop
    with (
        jax.default_device(jax.devices("cpu")[0]),
        mock.patch.object(reference, "CHUNK", 1 << 62),
        mock.patch.object(Infinity, "fold_text", lambda _, context: context),
        mock.patch.object(execution, "TOKEN_ALIGNMENT", 1),
        mock.patch.object(token_choice, "TOKEN_ALIGNMENT", 1),
    ):
        yield
    jax.clear_caches()


def counted_flops(program: jax.stages.Lowered | jax.stages.Compiled) -> float:
    """XLA's count of a program."""
    analysis = program.cost_analysis()
    assert analysis is not None
    return float(analysis["flops"])


class ScaleCount(NamedTuple):
    """The cost of one scale, or of a sum of scales.

    Attributes:
      xla_flops: FLOPs of the step by XLA, which counts everything.
      formula_flops: FLOPs of the step's matrix products.
      policy_flops: FLOPs by XLA of what the policy computes besides, to choose tokens and to look at the scale.
      floor_seconds: lower bound of the time on an H200.
    """

    xla_flops: float
    formula_flops: float
    policy_flops: float
    floor_seconds: float


def total(counts: Iterable[ScaleCount]) -> ScaleCount:
    """The sum of several scales."""
    return ScaleCount(*(sum(values) for values in zip(*counts, strict=True)))


class Counter:
    """Counts the scales of one kind of run by XLA and by formula, inside `countable`.

    Programs are those that the pipeline compiles; one that several plans share is lowered once.

    Args:
      config: the models.
      dtype: of the run.
      schedule: its token grids.
      guided: whether it has unconditional rows.
    """

    def __init__(self, config: CheckpointConfig, dtype: str, schedule: ScaleSchedule, guided: bool = True):
        self._config = config
        self._params = {
            "transformer": abstract_parameters(Infinity, config.transformer, dtype),
            "vae": abstract_parameters(BSQVAE, config.vae, dtype),
        }
        self._loop = LoopConfig(config.transformer, dtype, schedule, rope_grid(), guided)
        self._xla_flops: dict[Hashable, float] = {}

    def count(self, policy: Policy, plan: Plan) -> dict[int, ScaleCount]:
        """Every scale that runs where a policy follows one of its plans, by its index."""
        (programs, recipes), loop = self.programs(policy), self._loop
        cost = PlanCost(loop.transformer, plan, loop.guided, BATCH, TEXT_TOKENS, loop.dtype)

        def counted(name: Hashable, known_as: Hashable) -> float:
            if known_as not in self._xla_flops:
                self._xla_flops[known_as] = counted_flops(recipes[name]().lower())
            return self._xla_flops[known_as]

        return {
            scale: ScaleCount(
                # A step is named after the length of its caches too, on which its operations do not depend.
                xla_flops=counted(names.run, (names.step, names.entropy_layers)),
                formula_flops=cost.scale(scale).total,
                policy_flops=sum(
                    counted(name, name) for name in (names.scores, names.observe) if name is not None
                ),
                floor_seconds=cost.floor_seconds(scale),
            )
            for scale, names in programs.scales[plan].items()
        }

    def programs(self, policy: Policy) -> tuple[BatchPrograms, Recipes]:
        """What the pipeline compiles for a batch under a policy, from shapes alone: nothing is allocated."""
        loop, scales = self._loop, len(self._loop.schedule)
        features = np.zeros((BATCH, TEXT_TOKENS, loop.transformer.text_channels), np.float32)
        batch = Batch(
            loop=loop,
            policy=policy,
            text=TextBatch(features, np.full(BATCH, TEXT_TOKENS, np.int32)),
            negative=None,
            settings=ScaleSettings((4.0,) * scales, (0.5,) * scales, (0,) * scales, (0.0,) * scales),
            seeds=np.zeros(BATCH, np.uint32),
            forced_bits=(None,) * scales,
            draws=(None,) * scales,
            trace=False,
            decode=False,
        )
        return batch_programs(self._config, program_parameters(self._params), loop.dtype, batch)
