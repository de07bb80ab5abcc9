"""The precision that matrix products ask for."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests import tiny
from toprovar_jax import scale_loop
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.skeleton import abstract_parameters
from toprovar_jax.models.t5 import T5Encoder
from toprovar_jax.pipeline import reconstruct_pixels
from toprovar_jax.precision import matmul_precision
from toprovar_jax.schedule import Grid
from toprovar_jax.text import encode_text

SCHEDULE = tuple(Grid(*sides) for sides in tiny.SCHEDULE)
Shape = jax.ShapeDtypeStruct


def test_float32_asks_for_the_highest_precision_and_bfloat16_for_the_default():
    assert matmul_precision(jnp.float32) is jax.lax.Precision.HIGHEST
    assert matmul_precision(jnp.bfloat16) is None


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="no matrix product takes float16 operands: choose float32 or bfloat16"):
        matmul_precision(jnp.float16)


def transformer(dtype):
    config = tiny.CONFIG.transformer
    params = abstract_parameters(Infinity, config, dtype)
    loop = scale_loop.LoopConfig(config, dtype, SCHEDULE, Grid(64, 64), guided=True)
    features = Shape((1, 8, config.text_channels), jnp.float32)
    keys = jax.eval_shape(scale_loop.image_keys, Shape((1,), jnp.uint32))
    settings = (scale_loop.SamplingSettings(3.0, 0.7, 900, 0.97),) * len(SCHEDULE)
    function = functools.partial(scale_loop.sample, loop=loop)
    return function, (params, features, Shape((1,), jnp.int32), keys, settings)


def tokenizer(dtype):
    """The encoder, the quantiser and the decoder."""
    config = tiny.CONFIG.vae
    function = functools.partial(reconstruct_pixels, config=config, dtype=dtype, schedule=SCHEDULE)
    return function, (abstract_parameters(BSQVAE, config, dtype), Shape((1, 8, 6, 3), jnp.float32))


def text_encoder(dtype):
    config = tiny.CONFIG.text_encoder
    function = functools.partial(encode_text, config=config, dtype=dtype)
    params = abstract_parameters(T5Encoder, config, dtype)
    return function, (params, Shape((1, 8), jnp.int32), Shape((1,), jnp.int32))


@pytest.mark.parametrize("model", [transformer, tokenizer, text_encoder])
def test_no_product_of_a_float32_model_is_left_to_the_default(model):
    """A GPU would round its operands to 10 bits."""

    def products(dtype):
        function, arguments = model(dtype)
        text = jax.jit(function).lower(*arguments).as_text()
        return [line for line in text.splitlines() if "stablehlo.dot" in line or "stablehlo.convolution" in line]

    assert len(products("float32")) > 5
    assert [line for line in products("float32") if line.count("HIGHEST") != 2] == []
    assert [line for line in products("bfloat16") if line.count("HIGHEST") != 2] != []
