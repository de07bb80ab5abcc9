"""Kernels that stand alone: they depend on jax and know nothing of Infinity."""
