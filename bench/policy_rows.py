"""What was measured of several policies as numbers with intervals, a table and a diagram."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from bench.frontier import Panel, Point, draw
from bench.policies import Run
from bench.scenes.bootstrap import Estimate, estimate, resampled_means

_LEAST_ERROR = 1e-10  # equal pictures count as 100 dB


@dataclasses.dataclass(frozen=True)
class Change:
    """One case less another, paired.

    Attributes:
      score: difference of the scores.
      similarity: difference of the mean SSIM.
      flops: operations over those of the other. At 1 or less, a case with no lower score and higher SSIM beats the
        other at equal operations, since more of them would not have made it worse.
    """

    score: Estimate
    similarity: Estimate
    flops: float


@dataclasses.dataclass(frozen=True)
class Row:
    """A case in numbers.

    Attributes:
      name: of the case.
      kind: of its policy.
      tasks: share of right pictures by task.
      score: the mean over tasks.
      similarity: mean SSIM to the reference's pictures.
      peak_signal_to_noise: dB, of the mean squared error over all pictures; 100 where they are equal.
      flops: of one picture's scales, counted by XLA, mean over pictures.
      flops_share: the same relative to the reference.
      loop_ms: milliseconds of the scales of one picture alone; None where not timed.
      total_ms: the same from prompt to pixels.
      changes: by the case it is compared with.
      plans: what ran, each with its share of the pictures.
    """

    name: str
    kind: str
    tasks: dict[str, float]
    score: Estimate
    similarity: Estimate
    peak_signal_to_noise: Estimate
    flops: float
    flops_share: float
    loop_ms: float | None
    total_ms: float | None
    changes: dict[str, Change]
    plans: list[tuple[float, list[str]]]


def make_rows(runs: Sequence[Run], tasks: Sequence[str]) -> list[Row]:
    """The numbers of every run; all intervals come from the same resamples of the prompts.

    Args:
      runs: the reference first.
      tasks: of every prompt.
    """
    measured = [
        values.mean(axis=1, dtype=np.float64)
        for run in runs
        for values in (run.right, run.similarity, run.squared_error, run.flops)
    ]
    columns = iter(resampled_means(np.stack(measured, axis=1), tasks).T)
    names = [run.case.name for run in runs]
    means = dict(zip(names, zip(columns, columns, columns, columns, strict=True), strict=True))
    rows = []
    for run in runs:
        score, similarity, error, cost = means[run.case.name]
        others = [name for name in (names[0], *run.case.against) if name in names and name != run.case.name]
        right = run.right.mean(axis=1)
        plans = Counter(plan for followed in run.plans for plan in followed)
        rows.append(
            Row(
                name=run.case.name,
                kind=type(run.case.policy).__name__,
                tasks={task: float(right[np.array(tasks) == task].mean()) for task in dict.fromkeys(tasks)},
                score=estimate(score),
                similarity=estimate(similarity),
                peak_signal_to_noise=estimate(-10 * np.log10(np.maximum(error, _LEAST_ERROR))),
                flops=float(cost[0]),
                flops_share=float(cost[0] / means[names[0]][3][0]),
                loop_ms=run.loop_ms,
                total_ms=run.total_ms,
                changes={
                    other: Change(
                        estimate(score - means[other][0]),
                        estimate(similarity - means[other][1]),
                        float(cost[0] / means[other][3][0]),
                    )
                    for other in others
                },
                plans=[(count / run.right.size, plan.table().splitlines()) for plan, count in plans.most_common()],
            )
        )
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """A line per case, then one per comparison."""
    width = max(len(row.name) for row in rows)
    lines = [
        f"{'policy':<{width}}  {'score':>6}  {'95 % interval':<14}  {'SSIM':>6}  {'PSNR':>6}  {'GFLOP':>9}"
        f"  {'less':>6}  {'loop ms':>8}  {'faster':>6}"
    ]
    for row in rows:
        lines.append(
            f"{row.name:<{width}}  {100 * row.score.mean:>6.1f}  {_interval(row.score, 100, '.1f'):<14}"
            f"  {row.similarity.mean:>6.3f}  {row.peak_signal_to_noise.mean:>6.1f}  {row.flops / 1e9:>9.2f}"
            f"  {1 / row.flops_share:>5.2f}x  {_times(row, rows[0])}"
        )
    lines += [
        f"{row.name} less {other}, at {change.flops:.2f} of its operations: "
        f"score {100 * change.score.mean:+.1f} ({_interval(change.score, 100, '+.1f')}), "
        f"SSIM {change.similarity.mean:+.3f} ({_interval(change.similarity, 1, '+.3f')})"
        for row in rows
        for other, change in row.changes.items()
    ]
    return "\n".join(lines)


def _times(row: Row, reference: Row) -> str:
    if row.loop_ms is None or reference.loop_ms is None:
        return f"{'-':>8}  {'-':>6}"
    return f"{row.loop_ms:>8.1f}  {reference.loop_ms / row.loop_ms:>5.2f}x"


def draw_frontier(rows: Sequence[Row]) -> Image.Image:
    """Score and similarity against operations."""

    def panel(title: str, factor: float, values: Sequence[Estimate]) -> Panel:
        points = [
            Point(
                row.name,
                row.kind,
                100 * row.flops_share,
                *(factor * end for end in (value.mean, value.low, value.high)),
            )
            for row, value in zip(rows, values, strict=True)
        ]
        return Panel(title, f"FLOPs, % of {rows[0].name}", points)

    return draw(
        [
            panel("score, %", 100, [row.score for row in rows]),
            panel(f"SSIM to the pictures of {rows[0].name}", 1, [row.similarity for row in rows]),
        ]
    )


def _interval(value: Estimate, factor: float, form: str) -> str:
    return f"{factor * value.low:{form}} to {factor * value.high:{form}}"
