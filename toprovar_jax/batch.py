"""One batch of images to generate: everything that a run needs, checked."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import numpy as np
from jaxtyping import Array, Float, UInt8, UInt32

from toprovar_jax.pruning.policy import Policy
from toprovar_jax.request import ScaleSettings
from toprovar_jax.scale_loop import LoopConfig, SamplingSettings
from toprovar_jax.text_batch import TextBatch


@dataclasses.dataclass(frozen=True)
class Batch:
    """Everything that one run needs, checked.

    Attributes:
      loop: grids and guidance.
      policy: chooses what runs.
      text: features of every image.
      negative: features that replace the unconditional ones, padded to the same length.
      settings: guidance and sampling per scale.
      seeds: one per image.
      forced_bits: per scale, bits to go on with, or None.
      draws: per scale, Exp(1) draws to use in place of the seeds', or None.
      trace: whether to record what is computed.
      decode: whether to make pixels.
    """

    loop: LoopConfig
    policy: Policy
    text: TextBatch
    negative: TextBatch | None
    settings: ScaleSettings
    seeds: UInt32[Array | np.ndarray, "batch"]
    forced_bits: tuple[UInt8[np.ndarray, "batch _height _width code_dim"] | None, ...]
    draws: tuple[Float[np.ndarray, "batch _tokens bits 2"] | None, ...]
    trace: bool
    decode: bool

    @property
    def size(self) -> int:
        """Number of images."""
        return len(self.seeds)

    @property
    def kind(self) -> Hashable:
        """What decides which programs run: batches of one kind differ in values only."""
        forced = tuple(bits is not None for bits in self.forced_bits)
        shape = (self.size, self.text.text_tokens, self.negative is None)
        return self.loop, self.policy, shape, forced, self.trace, self.decode

    @property
    def context_arguments(self) -> tuple[Any, ...]:
        """Arguments of `encode_context` after the parameters."""
        arguments: tuple[Any, ...] = (self.text.features, self.text.lengths)
        if self.negative is not None:
            arguments += (self.negative.features, self.negative.lengths)
        return arguments

    @property
    def sampling_settings(self) -> tuple[SamplingSettings, ...]:
        """Settings of every scale, as `scale_step` takes them."""
        values = zip(
            self.settings.guidance_scale,
            self.settings.temperature,
            self.settings.top_k,
            self.settings.top_p,
            strict=True,
        )
        dtypes = (np.float32, np.float32, np.int32, np.float32)
        return tuple(
            SamplingSettings(*(np.asarray(value, dtype) for value, dtype in zip(scale, dtypes, strict=True)))
            for scale in values
        )
