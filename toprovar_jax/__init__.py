"""Infinity text-to-image generation in JAX, made fast by entropy-guided pruning."""

from toprovar_jax.config import CheckpointConfig, InfinityConfig, T5Config, VAEConfig
from toprovar_jax.errors import InputError
from toprovar_jax.manifest import CheckpointError
from toprovar_jax.output import PipelineOutput, ScaleTrace, Timings, Trace
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.pruning.fastvar import FastVAR
from toprovar_jax.pruning.plan import Plan, ScalePlan
from toprovar_jax.pruning.policy import Dense, Policy
from toprovar_jax.pruning.skipvar import SkipVAR

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "Dense",
    "FastVAR",
    "InfinityConfig",
    "InfinityPipeline",
    "InputError",
    "PipelineOutput",
    "Plan",
    "Policy",
    "ScalePlan",
    "ScaleTrace",
    "SkipVAR",
    "T5Config",
    "Timings",
    "Trace",
    "VAEConfig",
]
