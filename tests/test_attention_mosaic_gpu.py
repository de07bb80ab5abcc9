"""The Hopper kernel as far as a CPU can prove it: interpreted against float64, and lowered for an H200."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from bench.attention_checks import errors, float64_attention, inputs, require
from pallas_kernels import AttentionResult, flash_attention_entropy
from pallas_kernels.attention import mosaic_gpu
from pallas_kernels.attention.mosaic_gpu import BlockSizes, block_sizes
from pallas_kernels.attention.tiles import deal
from toprovar_jax.schedule import ASPECT_RATIOS, scale_schedule

# jax 0.10's interpreter refuses tiles that run past the end of an array, which a GPU fills with zeros.
CLIPS_TILES = hasattr(plgpu, "InterpretGPUParams")
if CLIPS_TILES:
    InterpretGPUParams = plgpu.InterpretGPUParams
else:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams


def interpreted(arrays, *, scale, kv_length, blocks, more_length=0, return_entropy=True):
    result = mosaic_gpu.attention(
        *arrays,
        scale=scale,
        kv_length=kv_length,
        more_length=more_length,
        return_entropy=return_entropy,
        blocks=BlockSizes(*blocks),
        interpret=InterpretGPUParams(),
    )
    return AttentionResult(*result)


CASES = [  # q_tokens, capacity, kv_length, heads, kv_heads, scale, blocks
    (64, 64, 64, 1, 1, 0.09, (1, 64, 2)),
    (128, 256, 130, 1, 1, 30.0, (1, 64, 2)),
    (128, 320, 320, 1, 1, 100.0, (2, 64, 2)),
    (128, 384, 257, 2, 1, 10.0, (2, 128, 2)),
    (192, 192, 129, 1, 1, 1.0, (3, 64, 2)),
]
RAGGED = [
    (1, 8, 1, 1, 1, 1.0, (1, 64, 2)),
    (72, 200, 197, 1, 1, 30.0, (2, 64, 2)),
    (5, 30, 29, 1, 1, 10.0, (1, 64, 2)),
]


@pytest.mark.parametrize("case", CASES + RAGGED * CLIPS_TILES, ids=str)
def test_interpreted_kernel_agrees_with_float64(case):
    q_tokens, capacity, kv_length, heads, kv_heads, scale, blocks = case
    query, key, value = inputs(q_tokens, 1, q_tokens, heads, 16, capacity)
    arrays = (query, key[:, :, :kv_heads], value[:, :, :kv_heads])
    result = interpreted(arrays, scale=scale, kv_length=kv_length, blocks=blocks)
    require(errors(result, arrays, scale, kv_length, np.arange(q_tokens), heads - 1), str(case))


@pytest.mark.parametrize(
    ("capacity", "kv_length", "more_length"),
    [(128, 70, 104), (64, 50, 20)],
    ids=["both end in the first tile", "one ends in the first tile and one in the last"],
)
def test_interpreted_kernel_reads_two_pairs_of_keys_and_values(capacity, kv_length, more_length):
    query, key, value = inputs(0, 1, 64, 1, 16, 2 * capacity)
    pairs = [(x[:, :capacity], x[:, capacity:]) for x in (key, value)]
    (cached, new), (cached_value, new_value) = pairs
    result = interpreted(
        (query, cached, cached_value, new, new_value),
        scale=10.0,
        kv_length=kv_length,
        more_length=more_length,
        blocks=(1, 64, 2),
    )
    joined = [jnp.concatenate([x[:, :kv_length], y[:, :more_length]], axis=1) for x, y in pairs]
    require(errors(result, (query, *joined), 10.0, kv_length + more_length, np.arange(64), 0), "two pairs")


@pytest.mark.parametrize("block_kv", [64, 128, 192])
def test_every_token_of_two_pairs_lies_in_one_tile(block_kv):
    lengths = (1, 7, 8, 41, 57, 63, 64, 127, 128, 185, 191, 192, 193, 6425)
    for kv_length, more_length in itertools.product(lengths, (0, *lengths)):
        tiles = deal(kv_length, more_length, block_kv)
        rows = {
            step: [(run.pair, (step - run.start) * block_kv + row) for row in range(block_kv)]
            for run in tiles.runs
            for step in range(run.start, run.stop)
        }
        if tiles.tail:
            rows[tiles.steps - 1] = rows[tiles.steps - 1][: tiles.tail]
        if ends := tiles.ends:
            assert ends.valid <= ends.more_row <= block_kv
            assert ends.more_row % 8 == ends.token % block_kv == ends.more_token % block_kv == 0
            assert 0 not in rows
            rows[0] = [(0, ends.token + row) for row in range(ends.valid)]
            rows[0] += [(1, ends.more_token + row) for row in range(ends.more_valid - ends.more_row)]
        assert sorted(rows) == list(range(tiles.steps))
        expected = [(0, token) for token in range(kv_length)] + [(1, token) for token in range(more_length)]
        assert sorted(itertools.chain(*rows.values())) == expected
        whole_groups = kv_length + -kv_length % 8 if more_length else kv_length
        assert tiles.steps == math.ceil((whole_groups + more_length) / block_kv)


def test_interpreted_kernel_without_entropy():
    arrays = inputs(0, 1, 64, 1, 16, 128, jnp.float16)
    whole = interpreted(arrays, scale=3.0, kv_length=100, blocks=(1, 64, 2))
    bare = interpreted(arrays, scale=3.0, kv_length=100, blocks=(1, 64, 2), return_entropy=False)
    assert bare.entropy is None
    np.testing.assert_array_equal(bare.output, whole.output)
    np.testing.assert_array_equal(bare.logsumexp, whole.logsumexp)


def test_the_maximum_may_move_at_every_tile():
    key = jnp.broadcast_to(jnp.linspace(0, 4, 320, dtype=jnp.bfloat16)[None, :, None, None] / 16, (1, 320, 1, 16))
    arrays = (jnp.ones((1, 64, 1, 16), jnp.bfloat16), key, key)
    result = interpreted(arrays, scale=2.0, kv_length=320, blocks=(1, 64, 2))
    query, keys = (np.asarray(x[0, :, 0].astype(jnp.float32), np.float64) for x in arrays[:2])
    _, entropy, _ = float64_attention(query, keys, keys, 2.0)
    np.testing.assert_allclose(result.entropy[0, 0], entropy, atol=1e-5)


def abstract_h200(mesh=((), ())):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    axis_types = (jax.sharding.AxisType.Auto,) * len(mesh[0])
    return jax.sharding.AbstractMesh(*mesh, axis_types=axis_types, abstract_device=device)


def lowered(function, *shapes, dtype=jnp.bfloat16, mesh=((), ())) -> str:
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    with jax.sharding.use_abstract_mesh(abstract_h200(mesh)):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def holds_the_kernel(text: str) -> bool:
    return "mosaic_gpu" in text and "flash_attention_entropy" in text


def scales(aspect_ratio: float, pixels: str = "1M") -> list[tuple[int, int]]:
    """(q_tokens, kv_length) of every scale."""
    sizes = [grid.size for grid in scale_schedule(aspect_ratio, pixels)]
    return [(size, sum(sizes[: index + 1])) for index, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("heads", "head_dim", "pixels", "aspect_ratio"),
    # Wide grids have as many tokens as the tall ones, and the scales of smaller pictures are the first of these.
    [(16, 128, "1M", ratio) for ratio in ASPECT_RATIOS if ratio >= 1]
    + [(28, 128, "1M", 1.0), (5, 64, "0.25M", 1.0)],
)
def test_every_scale_of_the_models_lowers_to_the_kernel(heads, head_dim, pixels, aspect_ratio):
    capacity = scales(aspect_ratio, pixels)[-1][1]
    capacity += -capacity % 8
    for q_tokens, kv_length in scales(aspect_ratio, pixels):
        call = functools.partial(flash_attention_entropy, scale=1.0, kv_length=kv_length)
        text = lowered(call, (2, q_tokens, heads, head_dim), *[(2, capacity, heads, head_dim)] * 2)
        assert holds_the_kernel(text), (q_tokens, kv_length)
        assert "stablehlo.dot_general" not in text
        padded = "stablehlo.pad" in text
        assert padded == (q_tokens % 8 != 0), "only a ragged query is copied, never the cache"


@pytest.mark.parametrize("heads", [16, 28])
def test_the_last_scale_reads_the_cache_and_its_own_tokens_where_they_are(heads):
    (_, kv_length), (q_tokens, _) = scales(1.0)[-2:]
    call = functools.partial(flash_attention_entropy, scale=1.0, kv_length=kv_length, more_length=q_tokens)
    new, cache = (2, q_tokens, heads, 128), (2, kv_length + -kv_length % 8, heads, 128)
    text = lowered(call, new, cache, cache, new, new)
    assert holds_the_kernel(text)
    assert not any(f"stablehlo.{name}" in text for name in ("pad", "concatenate", "slice", "dynamic_update_slice"))


@pytest.mark.parametrize("head_dim", [48, 64, 80, 96, 112, 160, 192, 256])
@pytest.mark.parametrize("q_tokens", [200, 20000])
def test_other_head_sizes_lower_to_the_kernel(head_dim, q_tokens):
    shapes = (1, q_tokens, 4, head_dim), (1, 333, 2, head_dim), (1, 333, 2, head_dim)
    assert holds_the_kernel(lowered(flash_attention_entropy, *shapes, dtype=jnp.float16))


def test_the_text_tells_the_kernel_from_the_reference():
    shapes = [(2, 64, 2, 64)] * 3
    assert holds_the_kernel(
        lowered(functools.partial(flash_attention_entropy, implementation="mosaic_gpu"), *shapes)
    )
    assert not holds_the_kernel(
        lowered(functools.partial(flash_attention_entropy, implementation="reference"), *shapes)
    )


@pytest.mark.parametrize(("shape", "dtype"), [((1, 64, 2, 104), jnp.bfloat16), ((1, 64, 2, 128), jnp.float32)])
def test_what_the_kernel_cannot_take_goes_to_the_reference_unless_named(shape, dtype):
    assert not holds_the_kernel(lowered(flash_attention_entropy, shape, shape, shape, dtype=dtype))
    named = functools.partial(flash_attention_entropy, implementation="mosaic_gpu")
    with pytest.raises(
        ValueError, match=r"'mosaic_gpu' cannot run this call: it (needs a head_dim|multiplies bfl)"
    ):
        lowered(named, shape, shape, shape, dtype=dtype)


@pytest.mark.parametrize("kind", ["NVIDIA B200", "NVIDIA A100-SXM4-80GB", "AMD Instinct MI300X", "cpu"])
def test_other_devices_are_refused_by_name(kind):
    device = jax.sharding.AbstractDevice(device_kind=kind, platform="gpu", num_cores=132)
    arrays = [jnp.ones((1, 8, 1, 64), jnp.bfloat16)] * 3
    with (
        jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)),
        pytest.raises(ValueError, match=rf"needs a Hopper GPU \(H100, H200, GH200\), and the device is {kind};"),
    ):
        jax.eval_shape(functools.partial(flash_attention_entropy, implementation="mosaic_gpu"), *arrays)


@pytest.mark.parametrize("in_axes", [(0, 0, 0), (0, None, None)])
def test_vmap_lowers_to_the_kernel(in_axes):
    mapped = jax.vmap(functools.partial(flash_attention_entropy, kv_length=57), in_axes)
    shapes = [
        (3, *shape) if axis == 0 else shape for axis, shape in zip(in_axes, [(2, 64, 4, 128)] * 3, strict=True)
    ]
    assert holds_the_kernel(lowered(mapped, *shapes))


def test_shards_over_batch_and_heads_lower_to_the_kernel():
    tokens, rows = jax.P("batch", None, "heads"), jax.P("batch", "heads")
    sharded = jax.shard_map(
        functools.partial(flash_attention_entropy, kv_length=57),
        mesh=abstract_h200(((2, 2), ("batch", "heads"))),
        in_specs=(tokens,) * 3,
        out_specs=AttentionResult(tokens, rows, rows),
    )
    text = lowered(sharded, *[(2, 64, 4, 128)] * 3, mesh=((2, 2), ("batch", "heads")))
    assert holds_the_kernel(text)
    assert "tensor<1x64x2x128xbf16>" in text


def test_gradients_are_refused_on_the_kernel_too():
    def loss(*arrays):
        return flash_attention_entropy(*arrays, implementation="mosaic_gpu").output.astype(jnp.float32).sum()

    with pytest.raises(TypeError, match="forward only and has no gradient"):
        lowered(jax.grad(loss), *[(1, 64, 1, 128)] * 3)


def test_block_sizes_fill_one_wave_where_they_can():
    def waves(batch, q_tokens, heads, blocks):
        return batch * heads * math.ceil(q_tokens / (64 * blocks.compute_warpgroups)) / 132

    chosen = {
        (q_tokens, heads): block_sizes(2, q_tokens, heads, 128, kv_length)
        for heads in (16, 28)
        for q_tokens, kv_length in scales(1.0)
    }
    assert chosen[4096, 16] == chosen[4096, 28] == BlockSizes(2, 192, 2)
    assert chosen[576, 16] == BlockSizes(3, 64, 2)
    assert chosen[64, 16] == BlockSizes(1, 64, 2)
    for (q_tokens, heads), blocks in chosen.items():
        if blocks.compute_warpgroups != 2:
            assert waves(2, q_tokens, heads, blocks) <= 1
