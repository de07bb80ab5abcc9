"""The kernel that rotates and appends, as far as a CPU can prove it: interpreted, and lowered for an H200."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import can_rotate_and_append, rotate_and_append
from pallas_kernels.rotary import mosaic_gpu
from toprovar_jax.models.infinity import MAX_LOG_SCALE, Projection

# jax 0.10's interpreter knows no references that a kernel writes to.
CAN_INTERPRET = hasattr(plgpu, "InterpretGPUParams")
H200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)


def on_h200():
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=H200))


def inputs(rows, tokens, heads, head_dim, capacity, table_rows, dtype=jnp.bfloat16):
    keys = iter(jax.random.split(jax.random.key(0), 7))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    angles = normal(table_rows, tokens, head_dim // 2)
    projection = Projection(
        normal(rows, tokens, 3, heads, head_dim).astype(dtype),
        normal(heads * head_dim).astype(dtype),
        normal(heads * head_dim).astype(dtype),
        (normal(heads) + 4.0).astype(dtype),  # some above the bound, some below
        (jnp.cos(angles), jnp.sin(angles)),
    )
    return projection, [normal(rows, capacity, heads, head_dim).astype(dtype) for _ in range(2)]


# rows, tokens, heads, head_dim, capacity, rows of tables, length
WHOLE_TILES = (2, 64, 4, 32, 130, 1, 3)
NO_ROOM_FOR_ALL = (1, 70, 1, 64, 74, 1, 7)
TABLES_OF_EVERY_ROW = (2, 40, 2, 64, 100, 2, 0)
CASES = [WHOLE_TILES, NO_ROOM_FOR_ALL, TABLES_OF_EVERY_ROW]


if CAN_INTERPRET:

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_interpreted_kernel_equals_the_portable_path(case):
        rows, tokens, heads, head_dim, capacity, table_rows, length = case
        projection, caches = inputs(rows, tokens, heads, head_dim, capacity, table_rows)
        query, *appended = mosaic_gpu.rotate_and_append(
            projection.query_key_value,
            *caches,
            *projection.rotation,
            projection.query_bias,
            projection.value_bias,
            projection.log_scale,
            max_log_scale=MAX_LOG_SCALE,
            length=length,
            interpret=plgpu.InterpretGPUParams(),
        )
        expected_query, *expected = projection._replace(
            rotation=tuple(table if table_rows > 1 else table[0] for table in projection.rotation)
        ).split()
        # Both round to bfloat16 once or twice; the query's largest values are 100.
        np.testing.assert_allclose(np.float32(query), np.float32(expected_query), rtol=0.02, atol=0.2)
        end = min(length + tokens, capacity)
        for cache, found, new in zip(caches, appended, expected, strict=True):
            np.testing.assert_array_equal(found[:, :length], cache[:, :length])
            new = np.float32(new[:, : end - length])
            np.testing.assert_allclose(np.float32(found[:, length:end]), new, rtol=0.01, atol=0.004)
            assert np.isfinite(np.float32(found)).all()


@pytest.mark.parametrize("case", [(2, 8, 16, 128, 6432, 1, 0), (2, 4096, 28, 128, 10528, 2, 6425)], ids=str)
def test_kernel_is_lowered_for_an_h200_and_writes_into_the_caches(case):
    rows, tokens, heads, head_dim, capacity, table_rows, length = case
    projection, caches = jax.eval_shape(lambda: inputs(rows, tokens, heads, head_dim, capacity, table_rows))

    def call(caches, projection):
        return rotate_and_append(
            projection.query_key_value,
            *caches,
            *projection.rotation,
            query_bias=projection.query_bias,
            value_bias=projection.value_bias,
            query_log_scale=projection.log_scale,
            max_log_scale=MAX_LOG_SCALE,
            length=length,
        )

    with on_h200():
        traced = jax.jit(call, donate_argnums=0).trace(caches, projection)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1
    assert text.count("output_operand_alias<output_tuple_indices = [1]") == 1
    assert text.count("output_operand_alias<output_tuple_indices = [2]") == 1
    assert "dynamic_update_slice" not in text


def test_what_the_kernel_does_not_support_is_told():
    projection, caches = inputs(1, 8, 2, 64, 16, 1)
    arguments = {
        "query_bias": projection.query_bias,
        "value_bias": projection.value_bias,
        "query_log_scale": projection.log_scale,
        "max_log_scale": MAX_LOG_SCALE,
        "length": 0,
    }
    assert not can_rotate_and_append(projection.query_key_value)
    with pytest.raises(ValueError, match=r"it needs a Hopper GPU .*, and the device is cpu"):
        rotate_and_append(projection.query_key_value, *caches, *projection.rotation, **arguments)
    with on_h200():
        assert can_rotate_and_append(projection.query_key_value)
        for array, reason in (
            (projection.query_key_value.astype(jnp.float32), "bfloat16 and float16 only, not float32"),
            (projection.query_key_value[..., :48], "a multiple of 32 up to 128, not 48"),
        ):
            assert not can_rotate_and_append(array)
            with pytest.raises(ValueError, match=reason):
                rotate_and_append(array, *caches, *projection.rotation, **arguments)
