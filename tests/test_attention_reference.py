"""The entry point and the chunked reference, judged in float64 by the judge that bench.attention_checks uses."""

import functools
import math
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.attention_checks import errors, float64_attention, inputs, require
from pallas_kernels import AttentionResult, flash_attention_entropy
from pallas_kernels.attention import api, cudnn, reference


def random(*shape: int, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


@pytest.mark.parametrize("scale", [0.09, 1.0, 10.0, 30.0, 100.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_agrees_with_float64_over_the_range_of_entropies(dtype, scale):
    arrays = inputs(0, 2, 96, 4, 32, 2600, dtype)
    result = jax.jit(functools.partial(flash_attention_entropy, scale=scale, kv_length=2500))(*arrays)
    error = errors(result, arrays, scale, 2500, np.arange(96), head=3)
    require(error, f"{dtype} at scale {scale}")
    assert result.output.dtype == dtype
    assert result.entropy.dtype == result.logsumexp.dtype == jnp.float32
    if dtype == jnp.float32:
        assert error["output_relative"] < 2e-6


@pytest.mark.parametrize(
    ("q_tokens", "kv_length", "capacity", "heads", "kv_heads", "head_dim"),
    [
        (1, 1, 1, 1, 1, 8),
        (5, 37, 40, 4, 2, 16),
        (7, 1024, 1024, 2, 1, 8),
        (3, 1025, 3000, 2, 2, 8),
        (2, 2048, 2048, 3, 3, 5),
    ],
)
def test_any_shape_agrees_with_float64_and_with_plain_softmax_attention(
    q_tokens, kv_length, capacity, heads, kv_heads, head_dim
):
    query, key, value = (
        random(2, q_tokens, heads, head_dim),
        *(random(2, capacity, kv_heads, head_dim) * factor for factor in (1, 2)),
    )
    arrays = (query, key, value)
    result = jax.jit(functools.partial(flash_attention_entropy, kv_length=kv_length))(*arrays)
    error = errors(result, arrays, head_dim**-0.5, kv_length, np.arange(q_tokens), heads - 1)
    require(error, "shape")
    assert error["output_relative"] < 1e-6
    plain = jax.nn.dot_product_attention(query, key[:, :kv_length], value[:, :kv_length])
    np.testing.assert_allclose(result.output, plain, atol=1e-5)


@pytest.mark.parametrize(("kv_length", "more_length"), [(1, 1), (41, 64), (1025, 37), (30, None)])
def test_two_pairs_of_keys_and_values_are_one_longer_pair(kv_length, more_length):
    query, key, value = inputs(8, 2, 24, 2, 16, kv_length + 80, jnp.float32)
    # What lies past the valid lengths must not matter.
    pairs = [
        (jnp.pad(x[:, :kv_length], ((0, 0), (0, 5), (0, 0), (0, 0)), constant_values=jnp.nan), x[:, kv_length:])
        for x in (key, value)
    ]
    (cached, new), (cached_value, new_value) = pairs
    attend = functools.partial(flash_attention_entropy, kv_length=kv_length, more_length=more_length)
    result = jax.jit(attend)(query, cached, cached_value, new, new_value)
    total = kv_length + (more_length or 80)
    require(errors(result, (query, key, value), 0.25, total, np.arange(24), 1), "two pairs")
    one_pair = jax.jit(functools.partial(flash_attention_entropy, kv_length=total))(query, key, value)
    jax.tree.map(np.testing.assert_array_equal, result, one_pair)


def test_every_short_key_count():
    query, key, value = inputs(1, 1, 4, 2, 8, 300, jnp.float32)
    for kv_length in (*range(1, 10), 63, 64, 65, 300):
        result = jax.jit(functools.partial(flash_attention_entropy, kv_length=kv_length))(query, key, value)
        require(errors(result, (query, key, value), 8**-0.5, kv_length, np.arange(4), 1), f"{kv_length} keys")


def test_entropy_is_exact_at_both_ends():
    query, value = random(1, 3, 2, 8), random(1, 5000, 2, 8)
    uniform = jax.jit(flash_attention_entropy)(query, jnp.ones_like(value), value)
    np.testing.assert_allclose(uniform.entropy, math.log(5000), rtol=1e-6)
    one_hot = jnp.zeros_like(value).at[:, 4321].set(query[:, 0])
    sharp = flash_attention_entropy(query[:, :1], one_hot, value, scale=1000.0)
    assert float(jnp.abs(sharp.entropy).max()) == 0.0
    np.testing.assert_allclose(sharp.output[:, 0], value[:, 4321], rtol=1e-6)


def rising(tokens: int):
    """One query and keys whose logits rise from tile to tile, so that the maximum moves all the time."""
    key = jnp.linspace(0.0, 4.0, tokens)[None, :, None, None] * jnp.ones((1, 1, 1, 16)) / 16
    return jnp.ones((1, 1, 1, 16)), key, random(1, tokens, 1, 16)


def published_entropy(logits: np.ndarray, tile: int) -> float:
    """Algorithm 2 of arXiv 2602.22948 as printed: E is rescaled by c, without the term c ln c l."""
    maximum, total, weighted = -1e30, 0.0, 0.0
    for start in range(0, len(logits), tile):
        block = logits[start : start + tile]
        new = max(maximum, block.max())
        c, shifted = math.exp(maximum - new), block - new
        total = c * total + np.exp(shifted).sum()
        weighted = c * weighted + (np.exp(shifted) * shifted).sum()
        maximum = new
    return math.log(total) - weighted / total


def test_the_term_that_the_published_algorithm_drops_is_kept(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 16)
    arrays = rising(128)
    result = flash_attention_entropy(*arrays, scale=1.0)
    query, key, value = (np.asarray(x[0, :, 0], np.float64) for x in arrays)
    _, entropy, _ = float64_attention(query, key, value, 1.0)
    np.testing.assert_allclose(result.entropy[0, 0], entropy, atol=1e-5)
    assert abs(published_entropy((query @ key.T)[0], 16) - entropy[0]) > 0.1


def test_keys_past_the_valid_length_do_not_matter():
    query, key, value = inputs(2, 1, 6, 2, 16, 48, jnp.float32)
    spoiled = [x.at[:, 41:].set(jnp.nan) for x in (key, value)]
    clean = flash_attention_entropy(query, key, value, kv_length=41)
    other = flash_attention_entropy(query, *spoiled, kv_length=41)
    jax.tree.map(np.testing.assert_array_equal, clean, other)


def test_without_entropy_the_rest_is_the_same():
    arrays = inputs(3, 1, 6, 2, 16, 48)
    whole = flash_attention_entropy(*arrays)
    bare = flash_attention_entropy(*arrays, return_entropy=False)
    assert bare.entropy is None
    np.testing.assert_array_equal(bare.output, whole.output)
    np.testing.assert_array_equal(bare.logsumexp, whole.logsumexp)


def test_memory_grows_linearly_with_the_keys():
    def temporary_bytes(tokens: int) -> int:
        query, key = (jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32) for n in (64, tokens))
        compiled = jax.jit(flash_attention_entropy).lower(query, key, key).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    matrix = 4 * 64 * 65536
    assert temporary_bytes(65536) < matrix / 4
    assert temporary_bytes(65536) < 2 * temporary_bytes(8192)


def test_vmap_is_a_loop_over_calls():
    arrays = [jnp.stack([x, 2 * x]) for x in inputs(4, 1, 5, 2, 16, 24, jnp.float32)]
    mapped = jax.vmap(flash_attention_entropy)(*arrays)
    for index in range(2):
        alone = flash_attention_entropy(*(x[index] for x in arrays))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            alone,
            AttentionResult(*(x[index] for x in mapped)),
        )


SHARDED = """
import jax, numpy as np
from bench.attention_checks import inputs
from pallas_kernels import AttentionResult, flash_attention_entropy
P = jax.sharding.PartitionSpec
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("batch", "heads"))
tokens, rows = P("batch", None, "heads"), P("batch", "heads")
arrays = inputs(5, 2, 6, 4, 16, 40)
sharded = jax.shard_map(flash_attention_entropy, mesh=mesh, in_specs=(tokens,) * 3,
                        out_specs=AttentionResult(tokens, rows, rows))
jax.tree.map(np.testing.assert_array_equal, jax.jit(sharded)(*arrays), jax.jit(flash_attention_entropy)(*arrays))
"""


def test_shards_over_batch_and_heads():
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("return_entropy", [True, False])
def test_gradients_are_refused(argument, return_entropy):
    arrays = inputs(6, 1, 4, 1, 8, 8, jnp.float32)

    def loss(*arrays):
        return flash_attention_entropy(*arrays, return_entropy=return_entropy).output.sum()

    with pytest.raises(
        TypeError, match=r"forward only and has no gradient: wrap its inputs in jax\.lax\.stop_grad"
    ):
        jax.grad(loss, argument)(*arrays)
    stopped = jax.grad(lambda *x: loss(*map(jax.lax.stop_gradient, x)) + x[0].sum())(*arrays)
    np.testing.assert_array_equal(stopped, 1.0)


def call(
    query=(2, 4, 4, 16), key=(2, 8, 4, 16), value=None, dtype=jnp.bfloat16, key_dtype=None, more=(), **options
):
    arrays = [
        jnp.ones(query, dtype),
        jnp.ones(key, key_dtype or dtype),
        jnp.ones(value or key, key_dtype or dtype),
        *(jnp.ones(shape, dtype) for shape in more),
    ]
    return flash_attention_entropy(*arrays, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"key": (2, 8, 4, 32)}, ValueError, "query has head_dim 16 but key has head_dim 32"),
        ({"key": (1, 8, 4, 16)}, ValueError, "query has batch 2 but key has batch 1"),
        ({"key": (2, 8, 3, 16)}, ValueError, "4 query heads cannot share 3 key heads: use a divisor of 4"),
        ({"value": (2, 8, 4, 8)}, ValueError, "key and value must have one shape"),
        ({"query": (4, 4, 16)}, ValueError, r"query must be \[batch, tokens, heads, head_dim\], got shape"),
        ({"key": (2, 0, 4, 16)}, ValueError, "key is empty"),
        ({"dtype": jnp.int32}, TypeError, "query must be float32, bfloat16 or float16, got int32: cast it first"),
        ({"key_dtype": jnp.float32}, TypeError, "query is bfloat16 but key is float32: cast them to one dtype"),
        ({"kv_length": 9}, ValueError, "kv_length 9 must lie between 1 and the capacity 8"),
        ({"kv_length": 0}, ValueError, "kv_length 0 must lie between 1 and the capacity 8"),
        ({"kv_length": 4.0}, TypeError, "kv_length must be a Python int, got float"),
        ({"kv_length": True}, TypeError, "kv_length must be a Python int, got bool"),
        ({"more": [(2, 5, 4, 16)]}, ValueError, "more_key and more_value go together, and more_length with them"),
        ({"more_length": 3}, ValueError, "more_key and more_value go together, and more_length with them: give"),
        ({"more": [(2, 5, 4, 16)] * 2, "more_length": 6}, ValueError,
         "more_length 6 must lie between 1 and the capacity 5 of more_key and more_value"),
        ({"more": [(2, 5, 4, 16)] * 2, "more_length": 5.0}, TypeError, "more_length must be a Python int, got"),
        ({"more": [(2, 5, 4, 16), (2, 6, 4, 16)]}, ValueError, "more_key and more_value must have one shape"),
        ({"more": [(2, 5, 4, 8)] * 2}, ValueError, "query has head_dim 16 but more_key has head_dim 8"),
        ({"more": [(2, 5, 2, 16)] * 2}, ValueError, "key has 4 heads but more_key has 2"),
        ({"scale": -1.0}, ValueError, "scale must be finite and not negative, got -1.0"),
        ({"scale": math.nan}, ValueError, "scale must be finite and not negative, got nan"),
        ({"implementation": "triton"}, ValueError, "unknown implementation 'triton': choose one of 'mosaic_gpu'"),
        ({"implementation": "mosaic_gpu"}, ValueError, r"cannot run this call: it needs a Hopper GPU \(H100"),
        ({"implementation": "mosaic_gpu"}, ValueError, "is cpu; implementation=None takes one that can"),
        ({"implementation": "cudnn"}, ValueError, "it needs an NVIDIA GPU from Ampere on, and the device is cpu"),
        ({"implementation": "mosaic_gpu", "dtype": jnp.float32}, ValueError, "float16 only, not float32"),
        ({"implementation": "cudnn", "dtype": jnp.float32}, ValueError, "float16 only, not float32"),
    ],
)  # fmt: skip
def test_bad_input_gives_one_clear_error(arguments, error, message):
    with pytest.raises(error, match=message):
        call(**arguments)


@pytest.mark.parametrize(
    ("kind", "capability", "return_entropy", "chosen"),
    [
        ("NVIDIA H200", "9.0", True, "mosaic_gpu"),
        ("NVIDIA H200", "9.0", False, "mosaic_gpu"),
        ("NVIDIA A100-SXM4-80GB", "8.0", True, "reference"),
        ("NVIDIA A100-SXM4-80GB", "8.0", False, "cudnn"),
        ("NVIDIA B200", "10.0", False, "cudnn"),
        ("NVIDIA T4", "7.5", False, "reference"),
        ("AMD Instinct MI300X", "gfx942", False, "reference"),
        ("TPU v5 lite", "", False, "reference"),
    ],
)
def test_the_automatic_choice(monkeypatch, kind, capability, return_entropy, chosen):
    device = types.SimpleNamespace(device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(api, "_device", lambda: device)
    assert api._chosen(None, jnp.ones((1, 8, 1, 128), jnp.bfloat16), return_entropy) == chosen


def test_a_traced_kv_length_is_refused():
    with pytest.raises(TypeError, match="it decides what is compiled, so pass it as a static argument of jit"):
        jax.jit(lambda length: call(kv_length=length))(3)


def test_numpy_integers_count_as_integers():
    assert call(kv_length=np.int64(8)).output.shape == (2, 4, 4, 16)


def test_the_identity_is_exact_where_the_average_key_is():
    query, key, value = inputs(7, 1, 32, 2, 16, 200, jnp.float32)
    truth = flash_attention_entropy(query, key, value, scale=10.0)
    average_key = flash_attention_entropy(query, key, key, scale=10.0).output
    entropy = cudnn.entropy_by_identity(query, average_key, truth.logsumexp, 10.0)
    np.testing.assert_allclose(entropy, truth.entropy, atol=2e-5)
    rounded = cudnn.entropy_by_identity(query, average_key.astype(jnp.bfloat16), truth.logsumexp, 10.0)
    assert 1e-4 < float(jnp.abs(rounded - truth.entropy).max()) < 0.1
