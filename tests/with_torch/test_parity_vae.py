"""The JAX tokenizer against the PyTorch reference on random small configurations and grids."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import strategies as st

from convert.reference import bsq_vae as reference
from tests.reference import golden
from tests.reference.parameters import vae_parameters
from toprovar_jax.config import VAEConfig
from toprovar_jax.models import bsq_vae
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.skeleton import bind
from toprovar_jax.schedule import Grid

# Plain values: checking a configuration draws random numbers, which hypothesis allows outside strategies alone.
SETTINGS = st.fixed_dictionaries(
    {
        "code_dim": st.integers(1, 6),
        "base_channels": st.sampled_from([32, 48]),  # 48 is no multiple of 32 and is normed in 24 groups
        "channel_multipliers": st.sampled_from([(1,), (1, 2), (2, 1), (1, 2, 2), (1, 1, 1, 2)]),
        "num_residual_blocks": st.integers(1, 2),
    }
)


def random_reference(config, random):
    vae = reference.BSQVAE(config)
    for parameter in vae.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        value = random.standard_normal(parameter.shape) * fan_in**-0.5
        parameter.data = torch.from_numpy(value.astype(np.float32))
    return vae


def channels_last(x):
    return jnp.asarray(x.movedim(1, -1).numpy())


def assert_close(ours, expected):
    assert golden.relative_error(ours, expected.movedim(1, -1).numpy()) <= golden.TOLERANCE


@hypothesis.settings(max_examples=5, derandomize=True, deadline=None, database=None)
@hypothesis.given(SETTINGS, st.integers(2, 4), st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_encoder_quantiser_and_decoder_equal_the_reference(settings, height, width, seed):
    config, grid = VAEConfig(**settings), Grid(height, width)
    random = np.random.default_rng(seed)
    vae = random_reference(config, random)
    params = vae_parameters(config, "float32", {name: x.numpy() for name, x in vae.state_dict().items()})
    pixels = (2, 3, grid.height * config.stride, grid.width * config.stride)
    image = torch.from_numpy(random.uniform(-1, 1, pixels).astype(np.float32))

    def run(method, x):
        model = functools.partial(bind, BSQVAE, config, "float32")
        return jax.jit(lambda params, x: getattr(model(params), method)(x))(params, x)

    features = vae.encode(image)
    assert_close(run("encode", channels_last(image)), features)
    schedule = (Grid(1, 1), Grid(1, 2), grid)
    expected = reference.quantize(features, schedule)
    scales = jax.jit(bsq_vae.multi_scale_quantize, static_argnums=1)(channels_last(features), schedule)
    for ours, bits in zip(scales.bits, expected.bits, strict=True):
        np.testing.assert_array_equal(ours, bits.numpy())
    for ours, feature in zip(scales.next_features, expected.next_features, strict=True):
        assert_close(ours, feature)
    assert_close(scales.code_map, expected.code_map)
    assert_close(run("decode", channels_last(expected.code_map)), vae.decode(expected.code_map))
