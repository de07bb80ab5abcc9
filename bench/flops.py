"""What plans cost, counted by XLA and by formula: python -m bench.flops --model infinity_2b

The pipeline's own scale steps are lowered for the CPU at full size, from shapes alone, with layers unrolled. XLA
counts a loop's body once and a custom kernel not at all, so attention is the reference, in one chunk.
"""

import contextlib
import time
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from absl import flags

from bench import report
from bench.full_size import full_size_config
from pallas_kernels.attention import reference
from toprovar_jax import command_line
from toprovar_jax.batch import Batch
from toprovar_jax.batch_programs import BatchPrograms, Recipes, batch_programs
from toprovar_jax.config import ARCHITECTURES, CheckpointConfig
from toprovar_jax.errors import InputError
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.skeleton import abstract_parameters
from toprovar_jax.pruning.fastvar import FastVAR
from toprovar_jax.pruning.flops import PlanCost
from toprovar_jax.pruning.plan import Plan
from toprovar_jax.pruning.policy import Dense, Policy
from toprovar_jax.pruning.profile import Profile
from toprovar_jax.pruning.toprovar import ToProVAR
from toprovar_jax.request import ScaleSettings
from toprovar_jax.scale_loop import LoopConfig
from toprovar_jax.schedule import ScaleSchedule, rope_grid, scale_schedule
from toprovar_jax.text_batch import TextBatch

TOLERANCE = 0.03  # relative difference of the two counts of a whole loop
BATCH = 1
TEXT_TOKENS = 20

_MODEL = flags.DEFINE_enum("model", "infinity_2b", list(ARCHITECTURES), "Architecture.")
_PIXELS = flags.DEFINE_string("pixels", "1M", "Pixel budget.")
_OUT = flags.DEFINE_string("out", str(report.RESULTS), "Folder for the JSON.")


@contextlib.contextmanager
def countable() -> Iterator[None]:
    """Programs lowered inside are for the CPU, and their attention has no loop over keys."""
    jax.clear_caches()  # attention may have been traced with its loop
    with jax.default_device(jax.devices("cpu")[0]), mock.patch.object(reference, "CHUNK", 1 << 62):
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
        return batch_programs(self._config, self._params, loop.dtype, batch)


def examples(depth: int) -> dict[str, Policy]:
    """Policies that need no calibration; what is counted of each is its first plan."""
    return {
        "dense": Dense(),
        "fastvar": FastVAR(),
        "toprovar, half of the tokens": _toprovar(depth, last_scales=4, pruned=0.5),
        "toprovar, an eighth of the tokens": _toprovar(depth, last_scales=4, pruned=0.875),
        "toprovar, early, without the last scale": _toprovar(
            depth, last_scales=6, pruned=0.75, dropped_scales=1, conditional_scales=1, source="layer_before"
        ),
    }


def _toprovar(depth: int, last_scales: int, pruned: float, **settings: Any) -> ToProVAR:
    """Prunes a share of the tokens of the last scales, in all layers but the outermost sixteenths."""
    dense_layers = max(1, depth // 16)
    profile = Profile(
        layer_scores=(0.0,) * dense_layers + (1.0,) * (depth - 2 * dense_layers) + (0.0,) * dense_layers,
        tau=0.4,
        crossing="above",
        prunable_scales=last_scales,
        usual_scales=last_scales,
        alpha_min=pruned,
        alpha_max=pruned,
        **settings,
    )
    return ToProVAR(profile)


def format_table(name: str, counts: dict[int, ScaleCount], dense: dict[int, ScaleCount]) -> str:
    """A line per scale, and one for the loop, each beside the same scale of the dense run."""
    lines = [
        name,
        f"{'':<10}{'XLA TFLOP':>10}{'formula':>10}{'apart':>9}{'of dense':>10}{'policy':>9}{'floor ms':>10}",
    ]
    rows = [(f"scale {scale}", count, dense[scale]) for scale, count in counts.items()]
    for label, count, full in [*rows, ("total", total(counts.values()), total(dense.values()))]:
        lines.append(
            f"{label:<10}{count.xla_flops / 1e12:>10.3f}{count.formula_flops / 1e12:>10.3f}"
            f"{count.xla_flops / count.formula_flops - 1:>9.2%}{count.xla_flops / full.xla_flops:>10.1%}"
            f"{count.policy_flops / 1e12:>9.3f}{1e3 * count.floor_seconds:>10.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Counts, prints a table per policy, writes JSON."""
    started = time.perf_counter()
    config, schedule = full_size_config(_MODEL.value), scale_schedule(pixels=_PIXELS.value)
    counter = Counter(config, "bfloat16", schedule)
    counts: dict[str, dict[int, ScaleCount]] = {}
    plans: dict[str, Plan] = {}
    with countable():
        for name, policy in examples(config.transformer.depth).items():
            plans[name] = policy.plans(schedule, config.transformer.depth)[0]
            counts[name] = counter.count(policy, plans[name])
            print(format_table(name, counts[name], counts["dense"]) + "\n", flush=True)
    totals = {name: total(by_scale.values()) for name, by_scale in counts.items()}
    seconds = time.perf_counter() - started
    path = report.write(
        f"flops_{_MODEL.value}",
        {
            "model": _MODEL.value,
            "pixels": _PIXELS.value,
            "batch": BATCH,
            "text_tokens": TEXT_TOKENS,
            "tolerance": TOLERANCE,
            "seconds": seconds,
            "policies": {
                name: {
                    "plan": plans[name].table().splitlines(),
                    "of_dense": totals[name].xla_flops / totals["dense"].xla_flops,
                    "total": totals[name]._asdict(),
                    "scales": {scale: count._asdict() for scale, count in by_scale.items()},
                }
                for name, by_scale in counts.items()
            },
        },
        Path(_OUT.value),
    )
    print(f"counted in {seconds:.0f} s, wrote {path}")
    apart = max(abs(count.xla_flops / count.formula_flops - 1) for count in totals.values())
    if not apart <= TOLERANCE:
        raise InputError(
            f"XLA's count differs by {apart:.1%} from the formula, more than the tolerance {TOLERANCE:.0%}"
        )


if __name__ == "__main__":
    command_line.run(main)
