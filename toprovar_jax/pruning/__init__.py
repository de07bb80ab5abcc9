"""Pruning: plans say what runs, policies choose plans."""
