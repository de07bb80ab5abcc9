"""The loop's shapes for everything that can be asked for, without computing any of it."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax import scale_loop
from toprovar_jax.batch_programs import decode_pixels
from toprovar_jax.config import VAE_STRIDE_8, VAE_STRIDE_16, InfinityConfig, VAEConfig
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.infinity import Infinity, KeyValue, append_and_attend
from toprovar_jax.models.skeleton import abstract_parameters
from toprovar_jax.schedule import ASPECT_RATIOS, PIXEL_BUDGETS, rope_grid, scale_schedule

PUBLISHED = json.loads((Path(__file__).parent / "golden" / "scale_schedules.json").read_text())["schedules"]
SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


@pytest.mark.parametrize("patchify", [False, True])
@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
def test_every_budget_ends_in_the_published_picture_size(ratio, patchify):
    config = InfinityConfig(
        depth=1, embed_dim=16, num_heads=2, mlp_dim=16, code_dim=4, patchify=patchify, text_channels=128
    )
    levels = (1,) * len(VAE_STRIDE_8 if patchify else VAE_STRIDE_16)
    vae = VAEConfig(4, base_channels=4, channel_multipliers=levels, num_residual_blocks=1, num_groups=2)
    params = abstract_parameters(Infinity, config, "float32")
    vae_params = abstract_parameters(BSQVAE, vae, "float32")
    for pixels in PIXEL_BUDGETS:
        schedule = scale_schedule(ratio, pixels)
        loop = scale_loop.LoopConfig(config, "float32", schedule, rope_grid(ratio), guided=True)
        features = jax.ShapeDtypeStruct((2, 8, 128), jnp.float32)
        lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
        context = jax.eval_shape(
            functools.partial(scale_loop.encode_context, loop=loop), params, features, lengths
        )
        state = jax.eval_shape(functools.partial(scale_loop.initial_state, loop, 2))
        assert state.cache[0].key.shape[1] % 8 == 0
        draws = jax.ShapeDtypeStruct((2, schedule[-1].size, config.token_bits, 2), jnp.float32)
        settings = scale_loop.SamplingSettings(SCALAR, SCALAR, jax.ShapeDtypeStruct((), jnp.int32), SCALAR)
        step = functools.partial(scale_loop.scale_step, loop=loop, scale=len(schedule) - 1, record="logits")
        after, output = jax.eval_shape(step, params, state, context, draws, settings)
        assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
        assert output.logits_raw.shape == (4, schedule[-1].size, 2 * config.token_bits)
        image = jax.eval_shape(
            functools.partial(decode_pixels, config=vae, dtype="float32"), vae_params, after.code_map
        )
        assert list(image.shape) == [2, *PUBLISHED[str(ratio)][pixels]["pixel"], 3]


def test_guidance_inside_the_layers_happens_at_its_block_only():
    """At guidance 1 the halves stay apart; otherwise both go on with the mixture."""
    config = InfinityConfig(depth=3, embed_dim=16, num_heads=2, mlp_dim=16, code_dim=4, text_channels=128)
    abstract = abstract_parameters(Infinity, config, "float32")
    params = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), abstract)
    schedule = scale_schedule(1.0, "0.06M")[:1]
    loop = scale_loop.LoopConfig(config, "float32", schedule, rope_grid(1.0), guided=True, guidance_layer=-2)
    features = jax.random.normal(jax.random.key(1), (1, 8, 128))

    @jax.jit
    def activations(guidance_scale):
        context = scale_loop.encode_context(params, features, jnp.array([8]), loop=loop)
        settings = scale_loop.SamplingSettings(guidance_scale, 1.0, 1, 0.0)
        draws = jnp.ones((1, 1, config.token_bits, 2))
        state = scale_loop.initial_state(loop, 1)
        step = functools.partial(scale_loop.scale_step, loop=loop, scale=0, record="activations")
        return step(params, state, context, draws, settings)[1].activations

    apart = [float(jnp.abs(x[0] - x[1]).max()) for x in activations(1.0).values()]
    mixed = {name: float(jnp.abs(x[0] - x[1]).max()) for name, x in activations(3.0).items()}
    assert min(apart) > 1e-3
    assert mixed["block0_out"] > 1e-3
    assert mixed["block1_out"] == 0.0


def test_tokens_that_the_cache_has_no_room_for_are_attended_to_all_the_same():
    keys = iter(jax.random.split(jax.random.key(0), 5))
    roomy = KeyValue(*(jax.random.normal(next(keys), (2, 24, 2, 4)) for _ in range(2)))
    query, key, value = (jax.random.normal(next(keys), (2, 13, 2, 4)) for _ in range(3))
    expected, after = append_and_attend(roomy, 10, return_entropy=True)(query, key, value)
    assert (np.asarray(after.cache.key[:, 10:23]) == key).all()

    full = jax.tree.map(lambda x: x[:, :16], roomy)
    output, after = append_and_attend(full, 10, return_entropy=True)(query, key, value)
    np.testing.assert_array_equal(output, expected)
    assert after.entropy.shape == (2, 13)
    assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), after.cache, full))
    empty, roomy_enough = (jax.tree.map(lambda x, end=end: x[:, :end], roomy) for end in (0, 16))
    alone, _ = append_and_attend(empty, 0)(query, key, value)
    np.testing.assert_array_equal(alone, append_and_attend(roomy_enough, 0)(query, key, value)[0])
    with pytest.raises(AssertionError, match="no room in the cache"):
        append_and_attend(full, 17)(query, key, value)


def test_padding_is_attended_to_by_none_and_the_next_scale_takes_its_place():
    keys = iter(jax.random.split(jax.random.key(0), 5))
    cache = KeyValue(*(jax.random.normal(next(keys), (2, 24, 2, 4)) for _ in range(2)))
    new = [jax.random.normal(next(keys), (2, 5, 2, 4)) for _ in range(3)]
    padded = [jnp.pad(x, ((0, 0), (0, 3), (0, 0), (0, 0)), constant_values=7.0) for x in new]
    expected, after = append_and_attend(cache, 10)(*new)
    for capacity in (24, 16, 10):  # room for all, for all but the padding, for none
        full = jax.tree.map(lambda x, end=capacity: x[:, :end], cache)
        output, found = append_and_attend(full, 10, padding=3)(*padded)
        np.testing.assert_allclose(output[:, :5], expected, atol=1e-6)
        valid = min(15, capacity)
        np.testing.assert_array_equal(found.cache.key[:, :valid], after.cache.key[:, :valid])
