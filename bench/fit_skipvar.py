"""Fits SkipVAR's decisions to a checkpoint: python -m bench.fit_skipvar

Draws the tuning prompts in full, with the two features of every picture, and with each of SkipVAR's six ways to
save work. A picture's label is the strongest way that keeps its SSIM to the full picture; two logistic models
learn the labels from the features, as published. The SSIM to keep is searched for so that the decisions save the
target. Writes coefficients as JSON beside the checkpoint, where policy "skipvar" finds them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Float, Int

from bench.image_plans import Followed
from bench.scenes.prompts import Prompt, load_prompts
from toprovar_jax import command_line
from toprovar_jax.calibration.search import Target
from toprovar_jax.checkpoint import EMBEDDED
from toprovar_jax.errors import InputError
from toprovar_jax.manifest import DECISIONS_NAME
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.programs import COMPILED_IN_HASTE
from toprovar_jax.pruning.flops import PlanCost
from toprovar_jax.pruning.logistic import LogisticModel
from toprovar_jax.pruning.skipvar import DecisionModel, SkipVAR, decisions_text
from toprovar_jax.similarity import structural_similarity

_LEVELS = 3  # a decision changes up to so many scales
_PENALTY = 1.0  # of squared coefficients, scikit-learn's default
_BISECTIONS = 16
_NEWTON_STEPS, _SMALLEST_STEP = 50, 1e-8
_LARGEST_SEED = 10**6


@dataclasses.dataclass(frozen=True)
class Samples:
    """What is known of every picture; the columns of the last two are 1, 2 and 3 scales.

    Attributes:
      features: SkipVAR's.
      skip: SSIM with scales dropped.
      uncond: SSIM with scales that run without unconditional rows.
    """

    features: Float[np.ndarray, "pictures 2"]
    skip: Float[np.ndarray, "pictures 3"]
    uncond: Float[np.ndarray, "pictures 3"]


@dataclasses.dataclass(frozen=True)
class _Watching(SkipVAR):
    """Runs everything and keeps the features."""

    seen: list[np.ndarray] = dataclasses.field(default_factory=list, compare=False)

    def decide(self, features: Float[np.ndarray, "batch 2"]) -> tuple[int, int]:
        self.seen.append(features)
        return 0, 0


def collect(
    pipeline: InfinityPipeline, prompts: list[str], seed: int, batch_size: int
) -> tuple[Samples, Float[np.ndarray, "7"]]:
    """Samples of prompts, and the operations of every decision: nothing, uncond 1 to 3, skip 1 to 3.

    Args:
      pipeline: the model.
      prompts: one per picture; those beyond whole batches are left out.
      seed: of the first picture; the next ones count up.
      batch_size: pictures drawn at once.
    """
    batches = [
        (prompts[start : start + batch_size], [seed + start + row for row in range(batch_size)])
        for start in range(0, len(prompts) - batch_size + 1, batch_size)
    ]
    if not batches:
        raise InputError(f"{len(prompts)} prompts are no whole batch of {batch_size}: choose a smaller batch_size")
    watching = _Watching()
    outputs = [pipeline(texts, seed=seeds, policy=watching, output_type="np") for texts, seeds in batches]
    full, schedule = [output.images for output in outputs], outputs[0].plan.schedule
    transformer = pipeline.config.transformer
    plans = watching.plans(schedule, transformer.depth)
    similarities = []
    for plan in plans[1:]:
        policy = Followed(watching, plan, decided=len(schedule))
        drawn = [pipeline(texts, seed=seeds, policy=policy, output_type="np").images for texts, seeds in batches]
        pairs = zip(drawn, full, strict=True)
        similarities.append(np.concatenate([np.asarray(structural_similarity(*pair)) for pair in pairs]))
    columns = np.stack(similarities, axis=1)
    guided = pipeline.config.defaults.guidance_scale != 1
    costs = [PlanCost(transformer, plan, guided=guided).loop().total for plan in plans]
    samples = Samples(np.concatenate(watching.seen), skip=columns[:, _LEVELS:], uncond=columns[:, :_LEVELS])
    return samples, np.array(costs, np.float64)


def fit(samples: Samples, similarity: float) -> DecisionModel:
    """The decisions that keep a similarity as nearly as the features tell."""
    skip = labels(samples.skip, similarity)
    # Where nothing is dropped; all pictures if none is left to learn from.
    kept = skip == 0 if (skip == 0).any() else np.ones(len(skip), bool)
    uncond = labels(samples.uncond, similarity)
    return DecisionModel(fit_logistic(samples.features, skip), fit_logistic(samples.features[kept], uncond[kept]))


def labels(similarities: Float[np.ndarray, "pictures 3"], similarity: float) -> Int[np.ndarray, "pictures"]:
    """The most scales that may change, 0 where none may."""
    levels = np.arange(1, similarities.shape[1] + 1)
    return np.where(similarities >= similarity, levels, 0).max(axis=1)


def fit_logistic(
    features: Float[np.ndarray, "pictures features"], classes: Int[np.ndarray, "pictures"]
) -> LogisticModel:
    """Multinomial logistic regression of standardised features, squared coefficients penalised."""
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    names, target = np.unique(classes, return_inverse=True)
    solved = _minimize((features - mean) / scale, np.eye(len(names))[target])
    return LogisticModel(
        classes=tuple(names.tolist()),
        mean=tuple(mean.tolist()),
        scale=tuple(scale.tolist()),
        coef=tuple(tuple(row) for row in solved[:-1].T.tolist()),
        intercept=tuple(solved[-1].tolist()),
    )


def _minimize(
    z: Float[np.ndarray, "pictures features"], target: Float[np.ndarray, "pictures classes"]
) -> Float[np.ndarray, "features_and_intercept classes"]:
    """Newton's method; the loss is convex, and steps that do not lower it are halved."""
    x = np.pad(z, ((0, 0), (0, 1)), constant_values=1.0)
    width, num_classes = x.shape[1], target.shape[1]
    penalty = np.diag(np.repeat([_PENALTY] * (width - 1) + [0.0], num_classes))

    def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
        logits = x @ flat.reshape(width, num_classes)
        logits -= logits.max(axis=1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return float(0.5 * flat @ penalty @ flat - (target * logs).sum()), np.exp(logs)

    flat = np.zeros(width * num_classes)
    loss, probabilities = evaluate(flat)
    for _ in range(_NEWTON_STEPS):
        gradient = (x.T @ (probabilities - target)).ravel() + penalty @ flat
        curvature = probabilities[:, :, None] * (np.eye(num_classes) - probabilities[:, None, :])
        hessian = np.einsum("pi,pj,pkl->ikjl", x, x, curvature).reshape(penalty.shape) + penalty
        # Adding the same to all intercepts changes nothing: the hessian is singular there.
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        lower, better = evaluate(flat - step)
        while lower > loss and np.abs(step).max() > _SMALLEST_STEP:
            step /= 2
            lower, better = evaluate(flat - step)
        if np.abs(step).max() <= _SMALLEST_STEP:
            break
        flat, loss, probabilities = flat - step, lower, better
    return flat.reshape(width, num_classes)


def share(model: DecisionModel, samples: Samples, costs: Float[np.ndarray, "7"]) -> float:
    """Mean operations that the decisions leave, of all."""
    skip, uncond = model.skip.predict(samples.features), model.uncond.predict(samples.features)
    decision = np.where(skip > 0, _LEVELS + skip, uncond)
    return float(costs[decision].mean() / costs[0])


def fit_target(samples: Samples, costs: Float[np.ndarray, "7"], target: Target) -> tuple[DecisionModel, float]:
    """The decisions for a target, and the similarity that they were fitted for: the highest that saves enough.

    Raises:
      InputError: the target is out of reach.
    """
    if target.similarity is not None:
        return fit(samples, target.similarity), target.similarity
    assert target.speedup is not None
    low, high = 0.0, 1.0
    if share(fit(samples, low), samples, costs) > 1 / target.speedup:
        raise InputError(f"no decisions reach a speed-up of {target.speedup:.2f}: choose a lower target")
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if share(fit(samples, middle), samples, costs) > 1 / target.speedup:
            high = middle
        else:
            low = middle
    return fit(samples, low), low


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """So many prompts, or all where there are fewer, from all over the file: it goes task by task."""
    count = min(count, len(prompts))
    return [prompts[index * len(prompts) // count] for index in range(count)]


def main() -> None:
    """Draws, fits, prints and writes."""
    values = flags.FLAGS
    target = Target.from_text(values.target)
    command_line.use_compilation_cache()
    pipeline = InfinityPipeline.from_pretrained(values.checkpoint)
    pipeline.programs.compiler_options = COMPILED_IN_HASTE
    prompts = [prompt.text for prompt in spread(load_prompts("tuning"), values.num_images)]
    samples, costs = collect(pipeline, prompts, values.seed, values.batch_size)
    model, similarity = fit_target(samples, costs, target)
    saved = 1 / share(model, samples, costs)
    for way, columns in (("dropped", samples.skip), ("unguided", samples.uncond)):
        means = ", ".join(f"{mean:.4f}" for mean in columns.mean(axis=0))
        print(f"SSIM with the last 1, 2 and 3 scales {way}: {means}")
    print(f"decisions for SSIM {similarity:.4f} of every picture: {saved:.2f}x fewer operations")
    record: dict[str, Any] = {
        **dataclasses.asdict(model),
        "fitted": {
            "target": str(target),
            "similarity": similarity,
            "speedup": saved,
            "pictures": len(samples.features),
            "checkpoint": pipeline.checkpoint_digest,
        },
    }
    path = Path(values.checkpoint) / DECISIONS_NAME
    path.write_text(decisions_text(record), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", str(EMBEDDED), "Folder of the model.")
    flags.DEFINE_string("target", "speedup=3.4", "speedup=N or ssim=N, the least that every picture should keep.")
    flags.DEFINE_integer("num_images", 144, "Pictures to learn from.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 24, "Pictures drawn at once.", lower_bound=1)
    flags.DEFINE_integer("seed", 5000, "Seed of the first picture.", lower_bound=0, upper_bound=_LARGEST_SEED)
    command_line.run(main)
