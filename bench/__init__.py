"""Benchmarks and the commands that make their numbers."""
