"""What a traced run shows of one of its pictures, in numbers.

Source: docs/spec/toprovar.md, sections 1 and 3 to 5.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from toprovar_jax.errors import InputError
from toprovar_jax.output import PipelineOutput
from toprovar_jax.pruning import entropy as measures
from toprovar_jax.pruning.plan import Plan
from toprovar_jax.pruning.policy import Policy, Report
from toprovar_jax.pruning.toprovar import ToProVAR

# The paper classifies layers at its scale 6, counted from 1.
_REPRESENTATIVE_SCALE = 5


@dataclasses.dataclass(frozen=True)
class LayerScores:
    """R of every layer (Eq. 4).

    Attributes:
      scale: whose entropy maps were measured.
      beta: puts the median layer at 1/2.
      measured: from this picture.
      calibrated: those that the policy went by; None where it needs none.
    """

    scale: int
    beta: float
    measured: Float[np.ndarray, "layers"]
    calibrated: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class PictureTrace:
    """One picture of a traced run.

    Attributes:
      picture: the result.
      plan: what ran.
      policy: what chose the plan.
      entropy: by scale that ran, attention entropy in nats on the scale's grid, mean over heads and guidance
        halves; NaN where a token did not run in both.
      pruned: by pruned scale, the share of the pruned layers in which a token did not run. Where every sub-layer
        chooses for itself, the choice of self-attention in the conditional row.
      reports: by scale, what the policy observed.
      index: of the picture in its batch, and in the reports.
    """

    picture: Image.Image
    plan: Plan
    policy: Policy
    entropy: dict[int, Float[np.ndarray, "layers _height _width"]]
    pruned: dict[int, Float[np.ndarray, "_height _width"]]
    reports: dict[int, Report]
    index: int

    @property
    def mapped_scales(self) -> tuple[int, ...]:
        """The scales that ran on more than one token, whose entropies make a map."""
        return tuple(scale for scale in self.entropy if self.plan.schedule[scale].size > 1)

    def full_layers(self, scale: int) -> Bool[np.ndarray, "layers"]:
        """Which layers ran on all tokens of a scale."""
        return np.array(self.plan.scales[scale].kept_tokens) == self.plan.schedule[scale].size

    def num_keys(self, scale: int) -> np.ndarray:
        """Per layer, how many keys a token of a scale sees, N: kept tokens up to and including the scale."""
        ran = [self.plan.scales[earlier].kept_tokens for earlier in self.plan.executed_scales if earlier <= scale]
        return np.sum(ran, axis=0)

    def relative_entropy(self, scale: int) -> Float[np.ndarray, "layers height width"]:
        """Entropy of a mapped scale as a share of its upper bound ln N; NaN as in `entropy`."""
        # A layer that was skipped since scale 0 has one key at most, and nothing to be divided.
        bound = np.log(np.maximum(self.num_keys(scale), 2))
        return self.entropy[scale] / bound[:, None, None]

    def mean_relative_entropy(self, scale: int) -> Float[np.ndarray, "height width"]:
        """The mean over the layers that ran on all tokens; NaN where none did."""
        full = self.full_layers(scale)
        grid = self.plan.schedule[scale]
        return self.relative_entropy(scale)[full].mean(axis=0) if full.any() else np.full(grid, np.nan)

    def focused_share(self, scale: int) -> float | None:
        """rho (Eq. 3) of the mean over the layers that ran on all tokens; None where none did."""
        full = self.full_layers(scale)
        if not full.any():
            return None
        return float(measures.focused_share(jnp.asarray(self.entropy[scale][full].mean(axis=0).reshape(-1))))

    @property
    def threshold(self) -> float | None:
        """tau; None where the policy does not go by it."""
        return self.policy.profile.tau if isinstance(self.policy, ToProVAR) and self.policy.looks else None

    @property
    def start(self) -> int | None:
        """D: the first scale that the policy looked at whose rho has reached tau; None where there is none."""
        if not isinstance(self.policy, ToProVAR):
            return None
        crossed = (scale for scale, shares in self.reports.items() if self.policy.crosses(shares)[self.index])
        return next(crossed, None)

    @property
    def layer_scores(self) -> LayerScores:
        """R of every layer at the paper's scale, or the last one before it that has all tokens in all layers."""
        scale = max(s for s in self.entropy if s <= _REPRESENTATIVE_SCALE and self.full_layers(s).all())
        ratios = np.asarray(measures.singular_ratio(jnp.asarray(self.entropy[scale])))
        median = float(np.median(ratios))
        # Ratios of rounding errors can all be 1; infinite ones have score 0 whatever beta is.
        beta = math.log(2) / max(median - 1, 1e-3)
        return LayerScores(
            scale=scale,
            beta=beta,
            measured=np.asarray(measures.layer_score(jnp.asarray(ratios), beta)),
            calibrated=self.policy.profile.layer_scores if isinstance(self.policy, ToProVAR) else None,
        )


def picture_trace(output: PipelineOutput, policy: Policy, index: int) -> PictureTrace:
    """What a run shows of one of its pictures.

    Args:
      output: of a call with trace=True and PIL pictures.
      policy: that of the call.
      index: which picture.

    Raises:
      InputError: the call was not traced, or its pictures are no PIL images.
    """
    if output.trace is None or not isinstance(output.images, list):
        raise InputError("nothing to show: call the pipeline with trace=True and output_type='pil'")
    plan, batch = output.plan, len(output.images)
    scales = dict(zip(plan.executed_scales, output.trace.scales, strict=True))
    entropy = {
        scale: np.asarray(measures.image_entropy(jnp.asarray(traced.entropy), batch))[:, index]
        for scale, traced in scales.items()
    }
    return PictureTrace(
        picture=output.images[index],
        plan=plan,
        policy=policy,
        entropy={scale: maps.reshape(-1, *plan.schedule[scale]) for scale, maps in entropy.items()},
        pruned=_pruned_shares(output, index),
        reports={scale: traced.report for scale, traced in scales.items() if traced.report is not None},
        index=index,
    )


def _pruned_shares(output: PipelineOutput, index: int) -> dict[int, np.ndarray]:
    """See `PictureTrace.pruned`; a scale that is dropped prunes every token."""
    assert output.trace is not None
    plan = output.plan
    traces = dict(zip(plan.executed_scales, output.trace.scales, strict=True))
    shares = {}
    for scale, (grid, entry) in enumerate(zip(plan.schedule, plan.scales, strict=True)):
        kept_layers = np.zeros(grid.size)
        num_pruned = 1
        if entry.runs:
            num_pruned = sum(count < grid.size for count in entry.kept_tokens)
            for span, kept in traces[scale].kept.items():
                kept_layers[kept[index, 0]] += span.stop - span.start
        if num_pruned:
            shares[scale] = (1 - kept_layers / num_pruned).reshape(grid)
    return shares
