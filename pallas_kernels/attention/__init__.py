"""Attention kernels."""

from pallas_kernels.attention.api import AttentionResult, flash_attention_entropy

__all__ = ["AttentionResult", "flash_attention_entropy"]
