"""Infinity text-to-image generation in JAX, made fast by entropy-guided pruning."""

from toprovar_jax.config import CheckpointConfig, InfinityConfig, T5Config, VAEConfig
from toprovar_jax.errors import InputError
from toprovar_jax.manifest import CheckpointError
from toprovar_jax.output import PipelineOutput, ScaleTrace, Timings, Trace
from toprovar_jax.pipeline import InfinityPipeline

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "InfinityConfig",
    "InfinityPipeline",
    "InputError",
    "PipelineOutput",
    "ScaleTrace",
    "T5Config",
    "Timings",
    "Trace",
    "VAEConfig",
]
