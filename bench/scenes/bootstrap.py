"""Intervals of means over prompts, and of their differences between runs on the same prompts and seeds."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def resampled_means(
    values: Float[np.ndarray, "prompts columns"], tasks: Sequence[str], resamples: int = 2000
) -> Float[np.ndarray, "one_and_resamples columns"]:
    """Means over tasks of the means over each task's prompts: of all prompts, then of bootstrap resamples.

    Prompts are drawn with replacement within their task, all columns together: the difference of two columns is
    paired. Several seeds of one prompt depend on each other and belong averaged into one row.

    Args:
      values: what was measured of every prompt, one column per quantity.
      tasks: the task of every prompt; tasks weigh the same.
      resamples: how many.
    """
    generator = np.random.default_rng(0)
    means = []
    for task in dict.fromkeys(tasks):
        rows = np.array([name == task for name in tasks]).nonzero()[0]
        drawn = generator.choice(rows, (resamples, len(rows)))
        means.append(np.concatenate([values[rows].mean(0)[None], values[drawn].mean(1)]))
    return np.mean(means, axis=0)


def estimate(means: Float[np.ndarray, "one_and_resamples"]) -> Estimate:
    """Mean and interval from a column of `resampled_means`, or from what was computed of such columns."""
    low, high = np.percentile(means[1:], (2.5, 97.5))
    return Estimate(float(means[0]), float(low), float(high))
