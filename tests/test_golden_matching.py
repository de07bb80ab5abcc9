"""The judge of the golden tests lets nothing wrong pass."""

import numpy as np
import pytest

from tests.reference import golden

FLOATS = {"logits": np.array([0.5, 100.0], np.float32)}
BITS = {"bits": np.array([0, 1, 1], np.uint8)}
PIXELS = {"image_uint8_bgr": np.full(1000, 7, np.uint8)}


def changed(arrays, index, difference):
    return {name: value + difference * (np.arange(value.size) == index) for name, value in arrays.items()}


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (FLOATS, changed(FLOATS, 0, 0.9e-4)),
        (FLOATS, changed(FLOATS, 1, 0.9e-2)),
        (BITS, BITS | {"more": np.zeros(3)}),
        (PIXELS, changed(PIXELS, 3, 1)),
    ],
)
def test_near_enough_passes(expected, actual):
    golden.assert_matches(expected, actual)


@pytest.mark.parametrize(
    ("expected", "actual", "message"),
    [
        ({}, FLOATS, "proves nothing"),
        (FLOATS, BITS, "nobody computes logits"),
        (FLOATS, {"logits": np.zeros((2, 1))}, r"logits: \(2, 1\) instead of \(2,\)"),
        (FLOATS, changed(FLOATS, 0, 1.1e-4), "logits: error 1.1"),
        (FLOATS, changed(FLOATS, 1, 1.1e-2), "logits: error 1.1"),
        (FLOATS, changed(FLOATS, 0, np.nan), "not finite"),
        (BITS, changed(BITS, 1, 1), "bits: 1 of 3 differ"),
        (PIXELS, changed(PIXELS, 3, 2), "image_uint8_bgr: off by 2"),
        (PIXELS, {"image_uint8_bgr": PIXELS["image_uint8_bgr"] + (np.arange(1000) < 2)}, "0.2000% of the values"),
    ],
)
def test_anything_else_fails(expected, actual, message):
    with pytest.raises(AssertionError, match=message):
        golden.assert_matches(expected, actual)
