"""The float8 policy: how weights and inputs are rounded, what it leaves alone, and how near the results stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from toprovar_jax import checkpoint
from toprovar_jax.manifest import CheckpointError
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.linear import Float8Linear, quantize, quantize_in_place
from toprovar_jax.models.skeleton import abstract_parameters, random_parameters
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.text import Tokenizer

DTYPE = "float8_e4m3fn"
LARGE_PRODUCTS = ("self_attention/query_key_value", "self_attention/output", "mlp/up", "mlp/down")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("deviation", [1e-4, 0.02, 3.0, 5e3])
def test_a_kernel_is_rounded_to_three_bits_after_the_point_whatever_its_size(deviation):
    kernel = deviation * normal(64, 48)
    rounded, scale = quantize(kernel)
    assert (rounded.dtype, rounded.shape, scale.dtype) == (jnp.float8_e4m3fn, (48, 64), jnp.float32)
    assert np.log2(float(scale)) == round(np.log2(float(scale)))  # exact in every float format
    assert 224 <= float(jnp.max(jnp.abs(rounded.astype(jnp.float32)))) <= 448
    restored = np.asarray(rounded.astype(jnp.float32) * scale).T
    # Half of the last bit, and half of the smallest number's distance from zero.
    bound = np.abs(kernel) * 2.0**-4 + float(scale) * 2.0**-10
    assert (np.abs(restored - kernel) <= bound).all()
    assert (restored != kernel).mean() > 0.9


def test_a_kernel_of_zeros_stays_one():
    rounded, scale = quantize(jnp.zeros((16, 16)))
    assert not rounded.astype(jnp.float32).any()
    assert float(scale) == 1


def layer_of(kernel, bias=None):
    layer = Float8Linear(*kernel.shape, use_bias=bias is not None, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.kernel_scale[...] = quantize(kernel)
    if bias is not None:
        layer.bias[...] = bias
    return layer


def test_numbers_of_few_bits_are_multiplied_exactly():
    random = np.random.default_rng(0)
    x = random.integers(-8, 9, (2, 5, 32)).astype(np.float32) / 8
    kernel = random.integers(-8, 9, (32, 16)).astype(np.float32)
    bias = random.integers(-8, 9, 16).astype(np.float32)
    output = layer_of(jnp.asarray(kernel), jnp.asarray(bias, jnp.bfloat16))(jnp.asarray(x))
    assert output.dtype == jnp.bfloat16
    expected = (x @ kernel).astype(jnp.bfloat16) + bias.astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(output, np.float32), expected.astype(np.float32))


def test_other_numbers_are_multiplied_to_within_their_rounding():
    x, kernel = normal(64, 256), normal(256, 128, seed=1) / 16
    output, exact = np.asarray(layer_of(kernel)(x), np.float32), np.asarray(x @ kernel)
    # Both operands are off by 2.6 % (root mean square), independently of each other.
    assert np.linalg.norm(output - exact) / np.linalg.norm(exact) == pytest.approx(0.037, abs=0.003)


def test_what_is_too_large_for_float8_becomes_its_largest_number():
    kernel = jnp.eye(16)
    x = jnp.asarray([[448.0, 449.0, 1e6, jnp.inf, -1e6, -jnp.inf, *[1.0] * 10]])
    output = layer_of(kernel)(x).astype(jnp.float32)
    np.testing.assert_array_equal(output[0, :7], [448, 448, 448, 448, -448, -448, 1])


def test_only_the_large_products_of_the_blocks_become_float8():
    config = tiny.CONFIG.transformer
    bfloat16 = checkpoint.flatten(abstract_parameters(Infinity, config, "bfloat16"))
    float8 = checkpoint.flatten(abstract_parameters(Infinity, config, DTYPE))
    expected = dict(bfloat16)
    for layer in range(config.depth):
        for name in LARGE_PRODUCTS:
            path = f"blocks/{layer}/{name}/kernel"
            expected[path] = jax.ShapeDtypeStruct(bfloat16[path].shape[::-1], jnp.float8_e4m3fn)
            expected[f"{path}_scale"] = jax.ShapeDtypeStruct((), jnp.float32)
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in float8.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in expected.items()
    }
    for name, (model, settings) in tiny.MODELS.items():
        if name != "transformer":
            other = abstract_parameters(model, settings, DTYPE)
            assert other == abstract_parameters(model, settings, "bfloat16"), name


def assert_rounded(actual, model, config, bfloat16):
    target = abstract_parameters(model, config, DTYPE)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), actual) == jax.tree.map(lambda x: (x.shape, x.dtype), target)
    quantize_in_place(bfloat16, target)
    jax.tree.map(np.testing.assert_array_equal, actual, bfloat16)


def test_kernels_take_the_place_of_those_that_they_are_made_of():
    config = tiny.CONFIG.transformer
    parameters = random_parameters(Infinity, config, "bfloat16")
    up = parameters["blocks"][1]["mlp"]["up"]
    kernel, bias = up["kernel"], up["bias"]
    quantize_in_place(parameters, abstract_parameters(Infinity, config, DTYPE))
    assert parameters["blocks"][1]["mlp"]["up"] is up
    assert up["bias"] is bias
    np.testing.assert_array_equal(up["kernel"], quantize(kernel)[0])
    np.testing.assert_array_equal(up["kernel_scale"], quantize(kernel)[1])


def test_random_parameters_are_those_of_bfloat16_rounded():
    config = tiny.CONFIG.transformer
    actual = random_parameters(Infinity, config, DTYPE, seed=3)
    assert_rounded(actual, Infinity, config, random_parameters(Infinity, config, "bfloat16", seed=3))


def test_a_checkpoint_is_rounded_when_it_is_loaded_and_never_stored_so(tmp_path):
    checkpoint.save(tmp_path / "tiny", tiny.CONFIG, tiny.parameters(), dtype="float32")
    for component, (model, config) in tiny.MODELS.items():
        in_bfloat16 = checkpoint.load_parameters(tmp_path / "tiny", component, "bfloat16")
        loaded = checkpoint.load_parameters(tmp_path / "tiny", component, jnp.float8_e4m3fn)
        assert_rounded(loaded, model, config, in_bfloat16)
    message = f"{DTYPE} is not stored: store bfloat16, and load that with dtype {DTYPE}"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path / "other", tiny.CONFIG, tiny.parameters(), dtype=DTYPE)
    assert not (tmp_path / "other").exists()
    pipe = InfinityPipeline.from_pretrained(tmp_path / "tiny", DTYPE)
    assert pipe.dtype == DTYPE
    assert pipe.params["transformer"]["blocks"][0]["mlp"]["up"]["kernel"].dtype == jnp.float8_e4m3fn


@pytest.fixture(scope="module")
def pipe():
    params = {name: random_parameters(*model, DTYPE) for name, model in tiny.MODELS.items()}
    return InfinityPipeline(tiny.CONFIG, params, dtype=DTYPE, tokenizer=Tokenizer(tiny.tokenizer_json()))


def test_the_same_seed_gives_the_same_picture_also_pruned(pipe):
    settings = {"policy": "fastvar", "scale_schedule": tiny.SIX_SCALES, "output_type": "np"}
    first, second = (pipe("a cat", seed=seed, **settings).images for seed in (1, 1))
    np.testing.assert_array_equal(first, second)
    assert (pipe("a cat", seed=2, **settings).images != first).any()


def test_logits_stay_close_to_those_of_float32(pipe):
    settings = {"scale_schedule": tiny.SCHEDULE, "output_type": "np", "trace": True}
    reference = tiny.pipeline()("a cat", **settings)
    low = pipe("a cat", forced_bits=reference.bits, **settings)
    for a, exact in zip(low.trace.scales, reference.trace.scales, strict=True):
        difference = np.linalg.norm(a.logits_raw - exact.logits_raw) / np.linalg.norm(exact.logits_raw)
        assert 0.015 < difference < 0.05  # bfloat16 alone differs by 0.005 to 0.008
