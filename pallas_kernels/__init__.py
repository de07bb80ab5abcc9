"""Kernels that stand alone: they depend on jax and know nothing of Infinity."""

from pallas_kernels.attention import AttentionResult, flash_attention_entropy

__all__ = ["AttentionResult", "flash_attention_entropy"]
