"""What plans cost, counted by XLA and by formula: python -m bench.flops --model infinity_2b

No weights are needed and nothing runs: `flop_counter.py` says how.
"""

import time
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from bench import report
from bench.flop_counter import BATCH, TEXT_TOKENS, Counter, ScaleCount, countable, total
from bench.full_size import full_size_config
from toprovar_jax import command_line
from toprovar_jax.config import ARCHITECTURES
from toprovar_jax.errors import InputError
from toprovar_jax.pruning.fastvar import FastVAR
from toprovar_jax.pruning.plan import Plan
from toprovar_jax.pruning.policy import Dense, Policy
from toprovar_jax.pruning.profile import Profile
from toprovar_jax.pruning.skipvar import SkipVAR
from toprovar_jax.pruning.toprovar import ToProVAR
from toprovar_jax.schedule import scale_schedule

TOLERANCE = 0.03  # relative difference of the two counts of a whole loop


class Example(NamedTuple):
    """A policy, and which of its plans to count."""

    policy: Policy
    plan: int = 0


def examples(depth: int) -> dict[str, Example]:
    """Policies that need no calibration."""
    return {
        "dense": Example(Dense()),
        "fastvar": Example(FastVAR()),
        "skipvar, the last 3 scales without guidance": Example(SkipVAR(), plan=3),
        "skipvar, the last 3 scales dropped": Example(SkipVAR(), plan=6),
        "toprovar, half of the tokens": _toprovar(depth, last_scales=4, pruned=0.5),
        "toprovar, an eighth of the tokens": _toprovar(depth, last_scales=4, pruned=0.875),
        "toprovar, early, the last scale dropped": _toprovar(
            depth, last_scales=6, pruned=0.75, dropped_scales=1, conditional_scales=1, source="layer_before"
        ),
    }


def _toprovar(depth: int, last_scales: int, pruned: float, **settings: Any) -> Example:
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
    return Example(ToProVAR(profile))


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
    started, values = time.perf_counter(), flags.FLAGS
    config, schedule = full_size_config(values.model), scale_schedule(pixels=values.pixels)
    counter = Counter(config, "bfloat16", schedule)
    counts: dict[str, dict[int, ScaleCount]] = {}
    plans: dict[str, Plan] = {}
    with countable():
        for name, (policy, index) in examples(config.transformer.depth).items():
            plans[name] = policy.plans(schedule, config.transformer.depth)[index]
            counts[name] = counter.count(policy, plans[name])
            print(format_table(name, counts[name], counts["dense"]) + "\n", flush=True)
    totals = {name: total(by_scale.values()) for name, by_scale in counts.items()}
    path = report.write(
        f"flops_{values.model}",
        {
            "model": values.model,
            "pixels": values.pixels,
            "batch": BATCH,
            "text_tokens": TEXT_TOKENS,
            "tolerance": TOLERANCE,
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
        Path(values.out),
    )
    print(f"counted in {time.perf_counter() - started:.0f} s, wrote {path}")
    apart = max(abs(count.xla_flops / count.formula_flops - 1) for count in totals.values())
    if not apart <= TOLERANCE:
        raise InputError(
            f"XLA's count differs by {apart:.1%} from the formula, more than the tolerance {TOLERANCE:.0%}"
        )


if __name__ == "__main__":
    flags.DEFINE_enum("model", "infinity_2b", list(ARCHITECTURES), "Architecture.")
    flags.DEFINE_string("pixels", "1M", "Pixel budget.")
    flags.DEFINE_string("out", str(report.RESULTS), "Folder for the JSON.")
    command_line.run(main)
