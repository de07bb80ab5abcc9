"""Resizing against PyTorch's primitives (golden file) and against jax.image."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax import resize

GOLDEN = np.load(Path(__file__).parent / "golden" / "interp_primitives.npz")
GRIDS = [(12, 10), (9, 7), (3, 2), (4, 4), (6, 5), (1, 1)]


def _nhwc(array):
    """[B,C,1,H,W] or [B,C,H,W] -> [B,H,W,C]."""
    return jnp.asarray(array.reshape(*array.shape[:2], *array.shape[-2:]).transpose(0, 2, 3, 1))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("function", "name"), [(resize.resize_bilinear, "trilinear"), (resize.resize_area, "area")]
)
def test_equals_pytorch(function, name, grid):
    expected = _nhwc(GOLDEN[f"{name}.{grid[0]}x{grid[1]}"])
    np.testing.assert_allclose(function(_nhwc(GOLDEN["in"]), grid), expected, atol=1e-6)


def test_golden_file_holds_no_other_grid():
    assert {key for key in GOLDEN if "x" in key} == {
        f"{name}.{height}x{width}" for name in ("trilinear", "area") for height, width in GRIDS
    } | {"ps.pixel_shuffle2", "pu.pixel_unshuffle2_of_shuffled"}


def test_pixel_shuffle_and_its_inverse_equal_pytorch():
    shuffled = resize.pixel_shuffle(_nhwc(GOLDEN["ps.in"]))
    np.testing.assert_array_equal(shuffled, _nhwc(GOLDEN["ps.pixel_shuffle2"]))
    np.testing.assert_array_equal(
        resize.pixel_unshuffle(shuffled), _nhwc(GOLDEN["pu.pixel_unshuffle2_of_shuffled"])
    )


@pytest.mark.parametrize(
    ("size", "grid"), [((64, 64), (20, 20)), ((20, 20), (64, 64)), ((54, 72), (45, 60)), ((1, 1), (37, 111))]
)
def test_bilinear_equals_jax_image_without_antialiasing_on_grids_of_the_schedules(size, grid):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))
    expected = jax.image.resize(x, (2, *grid, 3), "linear", antialias=False)
    # jax.image computes the positions in float32, hence the tolerance.
    np.testing.assert_allclose(resize.resize_bilinear(x, grid), expected, atol=3e-5)


@pytest.mark.parametrize("function", [resize.resize_bilinear, resize.resize_area])
def test_own_grid_is_the_identity_and_the_result_is_float32(function):
    x = jax.random.normal(jax.random.key(0), (1, 7, 5, 2), jnp.bfloat16)
    same = function(x, (7, 5))
    assert same.dtype == jnp.float32
    np.testing.assert_array_equal(same, x.astype(jnp.float32))
    assert function(x, (3, 9)).dtype == jnp.float32


def test_area_averages_every_touched_cell_where_the_grid_grows():
    x = jnp.array([1.0, 3.0, 8.0]).reshape(1, 1, 3, 1)
    # Five new cells over three old ones: 0 | 0-1 | 1 | 1-2 | 2.
    np.testing.assert_allclose(resize.resize_area(x, (1, 5)).ravel(), [1.0, 2.0, 3.0, 5.5, 8.0])
