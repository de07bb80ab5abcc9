"""Conversion of published PyTorch checkpoints; the only package that imports torch."""
