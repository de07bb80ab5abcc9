"""Queries and keys normalised and rotated, keys and values appended to a cache, in one kernel."""

from pallas_kernels.rotary.api import RotatedQueries, can_rotate_and_append, rotate_and_append

__all__ = ["RotatedQueries", "can_rotate_and_append", "rotate_and_append"]
