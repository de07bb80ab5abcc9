"""Infinity text-to-image generation in JAX, made fast by entropy-guided pruning."""
