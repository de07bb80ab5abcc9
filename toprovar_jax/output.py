"""What a call of the pipeline returns."""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of one call; compilation is apart and 0.0 once everything is compiled.

    Attributes:
      compile: compiling programs that no earlier call needed.
      text: tokenizing, encoding and projecting the prompts.
      scales: one entry per scale.
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
    """

    logits_raw: Float[np.ndarray, "rows tokens two_bits"]
    bits: UInt8[np.ndarray, "batch height width code_dim"]
    code_map: Float[np.ndarray, "batch last_height last_width code_dim"]


@dataclasses.dataclass(frozen=True)
class Trace:
    """The scales of a traced run."""

    scales: tuple[ScaleTrace, ...]


@dataclasses.dataclass(frozen=True)
class PipelineOutput:
    """Result of a call.

    Attributes:
      images: PIL images, or uint8 RGB [batch, height, width, 3], or the code map [batch, height, width, code_dim].
      bits: per scale, the bits that make the image: the chosen ones, or the forced ones where given.
      timings: seconds by stage.
      trace: every scale's logits, bits and code map, where asked for.
    """

    images: list[Image.Image] | np.ndarray
    bits: tuple[UInt8[np.ndarray, "batch _height _width code_dim"], ...]
    timings: Timings
    trace: Trace | None
