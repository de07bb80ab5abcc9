"""What a call of the pipeline returns."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, PyTree, UInt8
from PIL import Image

from toprovar_jax.pruning.plan import Plan, Span


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of one call; compilation is apart and 0.0 once everything is compiled.

    Attributes:
      compile: compiling programs that no earlier call needed.
      text: tokenizing, encoding and projecting the prompts.
      scales: one entry per scale, 0.0 for those that the plan drops.
      decode: code map to pixels on the host; 0.0 for latent output.
    """

    compile: float
    text: float
    scales: tuple[float, ...]
    decode: float

    @property
    def total(self) -> float:
        """Everything but compilation."""
        return self.text + sum(self.scales) + self.decode


@dataclasses.dataclass(frozen=True)
class ScaleTrace:
    """What the model computed at one scale, on the host.

    Attributes:
      logits_raw: before temperature and guidance, conditional rows first; a scale that uses only the conditional
        rows has only those.
      bits: what the model chose on the tokenizer grid, also where forced bits replaced it downstream.
      code_map: sum of the codes up to and including this scale.
      entropy: attention entropy of every layer and token in nats, mean over heads, conditional rows first; NaN
        where a token did not run.
      kept: by layers, indices of the tokens that ran where not all did: one choice for all of the layers, or one
        for each of the three sub-layers.
      report: what the policy observed after this scale; None where it did not look.
    """

    logits_raw: Float[np.ndarray, "rows tokens two_bits"]
    bits: UInt8[np.ndarray, "batch height width code_dim"]
    code_map: Float[np.ndarray, "batch last_height last_width code_dim"]
    entropy: Float[np.ndarray, "layers entropy_rows tokens"]
    kept: dict[Span, Int[np.ndarray, "_rows _choices _kept"]]
    report: PyTree[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Trace:
    """A traced run: one entry per scale that ran (`Plan.executed_scales`)."""

    scales: tuple[ScaleTrace, ...]


@dataclasses.dataclass(frozen=True)
class PipelineOutput:
    """Result of a call.

    Attributes:
      images: PIL images, or uint8 RGB [batch, height, width, 3], or the code map [batch, height, width, code_dim].
      bits: per scale that ran, the bits that make the image: the chosen ones, or the forced ones where given.
      plan: what ran.
      timings: seconds by stage.
      trace: what was computed at every scale, where asked for.
    """

    images: list[Image.Image] | np.ndarray
    bits: tuple[UInt8[np.ndarray, "batch _height _width code_dim"], ...]
    plan: Plan
    timings: Timings
    trace: Trace | None
