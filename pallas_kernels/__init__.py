"""Kernels that stand alone: they depend on jax and know nothing of Infinity."""

from pallas_kernels.attention import AttentionResult, flash_attention_entropy
from pallas_kernels.rotary import RotatedQueries, can_rotate_and_append, rotate_and_append

__all__ = [
    "AttentionResult",
    "RotatedQueries",
    "can_rotate_and_append",
    "flash_attention_entropy",
    "rotate_and_append",
]
