"""The tokenizer against outputs of the published modules (golden files), and its quantiser's own laws."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from toprovar_jax.config import VAE_STRIDE_8, VAE_STRIDE_16, VAEConfig
from toprovar_jax.models import bsq_vae
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.schedule import Grid

GOLDEN = Path(__file__).parent / "golden"
IO = np.load(GOLDEN / "vae_tiny_io.npz")
TINY = VAEConfig(code_dim=16, base_channels=32, channel_multipliers=(1, 2, 2), num_residual_blocks=1)
SCHEDULE = tuple(Grid(side, side) for side in (1, 2, 4, 6, 8))
PATCHIFY_SCHEDULE = tuple(Grid(2 * side, 2 * side) for side in (1, 2, 4, 6))


def _nhwc(array):
    """[B,C,1,H,W] or [B,C,H,W] -> [B,H,W,C]."""
    return jnp.asarray(array.reshape(*array.shape[:2], *array.shape[-2:]).transpose(0, 2, 3, 1))


def _golden_bits(prefix):
    return [jnp.asarray(IO[f"{prefix}.bits{scale}.bits"][:, 0]) for scale in range(len(SCHEDULE))]


def _assert_close(actual, expected):
    """Within 1e-4, absolute or relative where above 1."""
    np.testing.assert_array_less(np.abs(actual - expected), 1e-4 * np.maximum(1, np.abs(expected)))


def _official_name(path):
    *parts, leaf = map(str, path)
    name = ".".join(parts)
    for ours, official in [
        ("middle.0", "mid.block_1"),
        ("middle.1", "mid.block_2"),
        ("blocks", "block"),
        ("shortcut", "nin_shortcut"),
        ("sample", "sample.conv"),
    ]:
        name = name.replace(ours, official)
    kind = "norm" if "norm" in parts[-1] else "conv"
    return f"sd/{name}.{kind}.{'bias' if leaf == 'bias' else 'weight'}"


def _tiny_vae(dtype):
    """The published tiny weights in a model of `dtype`."""
    official = np.load(GOLDEN / "vae_tiny_state.npz")
    graphdef, skeleton = nnx.split(nnx.eval_shape(lambda: BSQVAE(TINY, dtype=dtype, rngs=nnx.Rngs(0))))
    unused = {name for name in official.files if not name.endswith("lfq.mask")}

    def fill(path, leaf):
        name = _official_name(path)
        unused.remove(name)
        value = official[name]
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
        assert value.shape == leaf.shape
        return leaf.replace(jnp.asarray(value, leaf.dtype))

    params = nnx.map_state(fill, skeleton)
    assert not unused
    return nnx.merge(graphdef, params)


_encode = nnx.jit(lambda vae, image: vae.encode(image))
_decode = nnx.jit(lambda vae, code_map: vae.decode(code_map))


@pytest.fixture(scope="module")
def vae():
    return _tiny_vae(jnp.float32)


def test_group_norm_keeps_its_precision_far_from_zero():
    rng = np.random.default_rng(0)
    means = np.repeat(np.linspace(-30, 30, 8), 4)  # of each group, thirty times its deviation
    x = rng.normal(means, 1, (2, 16, 16, 32)).astype(np.float32)
    norm = bsq_vae.GroupNorm(32, VAEConfig(code_dim=4, num_groups=8))
    groups = x.astype(np.float64).reshape(2, 256, 8, 4)
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    expected = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)
    _assert_close(norm(jnp.asarray(x)), expected)


def test_enlarging_convolution_is_that_of_the_enlarged_map():
    conv = bsq_vae.EnlargingConv(4, jnp.float32, nnx.Rngs(0))
    conv.bias[...] = jnp.arange(4.0)
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
    expected = jax.lax.conv_general_dilated(
        x.repeat(2, axis=1).repeat(2, axis=2),
        conv.kernel[...],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    _assert_close(conv(x), expected + conv.bias[...])


def test_decoder_equals_the_published_one(vae):
    image, out = nnx.jit(lambda model, codes: model.decoder(codes))(vae, _nhwc(IO["dec.summed"]))
    _assert_close(image, _nhwc(IO["dec.raw_before_clamp"]))
    for ours, official in [
        ("conv_in", "conv_in"),
        ("middle", "mid.block_2"),
        ("up/2/blocks", "up.2"),
        ("up/2/upsample", "up.2.upsample"),
    ]:
        _assert_close(out[ours], _nhwc(IO[f"dec.act.{official}"]))
    assert sum(key.startswith("dec.act.") for key in IO) == 4


def test_decoded_bits_equal_the_published_image_in_float_and_in_uint8(vae):
    code_map = bsq_vae.sum_codes(_golden_bits("dec"), SCHEDULE)
    np.testing.assert_allclose(code_map, _nhwc(IO["dec.summed"]), atol=1e-6)
    image = _decode(vae, code_map)
    expected = _nhwc(IO["dec.image"])
    _assert_close(image, expected)
    levels, expected_levels = (np.asarray((x + 1) / 2 * 255).astype(np.uint8) for x in (image, expected))
    difference = np.abs(levels.astype(int) - expected_levels)
    assert (difference == 0).mean() >= 0.999
    assert difference.max() <= 1
    # The clamp matters on this image.
    assert np.abs(IO["dec.raw_before_clamp"]).max() > 1
    assert np.abs(image).max() == 1


def test_encoder_quantiser_and_reconstruction_equal_the_published_ones(vae):
    latent = _encode(vae, _nhwc(IO["enc.image"]))
    _assert_close(latent, _nhwc(IO["enc.h"]))
    scales = bsq_vae.multi_scale_quantize(latent, SCHEDULE)
    for bits, expected in zip(scales.bits, _golden_bits("enc"), strict=True):
        np.testing.assert_array_equal(bits, expected)
    _assert_close(scales.code_map, _nhwc(IO["enc.z"]))
    for scale, features in enumerate(scales.next_features):
        _assert_close(features, _nhwc(IO[f"enc.var_input{scale}"]))
    assert len(scales.next_features) == len(SCHEDULE) - 1
    _assert_close(_decode(vae, scales.code_map), _nhwc(IO["enc.recon"]))
    np.testing.assert_allclose(bsq_vae.sum_codes(scales.bits, SCHEDULE), scales.code_map, atol=1e-6)


@functools.partial(jax.jit, static_argnums=1, static_argnames=("strength", "num_noisy_scales", "patchify"))
def _self_correction(latent, schedule, seed, **settings):
    return bsq_vae.self_correction_inputs(latent, schedule, jax.random.key(seed), **settings)


@pytest.mark.parametrize(
    ("latent", "schedule", "prefix", "patchify"),
    [("enc.h", SCHEDULE, "bsc.noflip", False), ("bsc.patchify.h", PATCHIFY_SCHEDULE, "bsc.patchify", True)],
)
def test_self_correction_without_flips_equals_the_published_one(latent, schedule, prefix, patchify):
    inputs, labels = _self_correction(
        _nhwc(IO[latent]), schedule, 0, strength=0.0, num_noisy_scales=len(schedule), patchify=patchify
    )
    flat = [x.reshape(1, -1, x.shape[-1]) for x in inputs]
    _assert_close(jnp.concatenate(flat, axis=1), IO[f"{prefix}.x_BLC_wo_prefix"])
    for scale, bits in enumerate(labels):
        np.testing.assert_array_equal(bits.reshape(1, -1, bits.shape[-1]), IO[f"{prefix}.gt{scale}.bits"])
    assert len(labels) == sum(key.startswith(f"{prefix}.gt") for key in IO)


def test_self_correction_flips_reach_the_inputs_and_the_next_labels_but_not_their_own():
    latent = jax.random.normal(jax.random.key(1), (4, 4, 4, 16))

    def draw(seed, num_noisy_scales):
        return _self_correction(
            latent, SCHEDULE[:3], seed, strength=0.3, num_noisy_scales=num_noisy_scales, patchify=False
        )

    clean, noisy, again = draw(0, 0), draw(0, 2), draw(0, 2)
    # Scales 0 and 1 flip: label 0 is as quantised, later labels correct what the flips changed.
    np.testing.assert_array_equal(noisy.labels[0], clean.labels[0])
    assert any((a != b).any() for a, b in zip(noisy.labels[1:], clean.labels[1:], strict=True))
    assert (noisy.inputs[1] != clean.inputs[1]).any()
    for first, second in zip(jax.tree.leaves(noisy), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(first, second)
    assert any((a != b).any() for a, b in zip(draw(1, 2).inputs, noisy.inputs, strict=True))


def test_the_share_of_flips_is_uniform_up_to_the_strength():
    latent = jax.random.normal(jax.random.key(1), (1, 16, 16, 32))
    grid = (Grid(16, 16), Grid(16, 16))

    def share(key):
        inputs, labels = bsq_vae.self_correction_inputs(
            latent, grid, key, strength=0.3, num_noisy_scales=1, patchify=False
        )
        return (bsq_vae.quantize(inputs[0]) != labels[0]).mean()

    shares = jax.jit(jax.vmap(share))(jax.random.split(jax.random.key(0), 200))
    # 8192 bits estimate a probability within 0.02 (four standard deviations); 200 draws their mean within 0.03.
    assert 0.28 < shares.max() < 0.32
    assert shares.min() < 0.02
    assert abs(shares.mean() - 0.15) < 0.03


def test_quantised_values():
    latent = jnp.array([0.0, -1e-30, 1e-30, 5.0])
    bits = bsq_vae.quantize(latent)
    np.testing.assert_array_equal(bits, [0, 0, 1, 1])
    np.testing.assert_array_equal(bsq_vae.bits_to_codes(bits), [-0.5, -0.5, 0.5, 0.5])


def test_stopping_early_sums_the_scales_there_are():
    bits = _golden_bits("dec")
    partial = bsq_vae.sum_codes(bits[:1], SCHEDULE)
    assert partial.shape == (1, 8, 8, 16)
    expected = jnp.broadcast_to(bsq_vae.bits_to_codes(bits[0]), partial.shape)
    np.testing.assert_allclose(partial, expected, rtol=1e-6)


def test_latent_off_the_last_grid_is_refused():
    with pytest.raises(
        ValueError, match="the latent has 4x6 cells but the schedule ends at 8x8: resize the image"
    ):
        bsq_vae.multi_scale_quantize(jnp.zeros((1, 4, 6, 16)), SCHEDULE)


def test_bfloat16_model_stays_near_float32_and_follows_the_policy(vae):
    half = _tiny_vae(jnp.bfloat16)
    for path, leaf in nnx.to_flat_state(nnx.state(half)):
        is_norm = any("norm" in str(part) for part in path)
        assert leaf.dtype == (jnp.float32 if is_norm else jnp.bfloat16), path
    image = _decode(half, _nhwc(IO["dec.summed"]))
    assert image.dtype == jnp.float32
    # The weights are exact in bfloat16; activations round at 8 bits through about twenty convolutions.
    difference = np.abs(image - _decode(vae, _nhwc(IO["dec.summed"])))
    assert 0 < difference.mean() < 0.01
    assert difference.max() < 0.1
    latent = _encode(half, _nhwc(IO["enc.image"]))
    assert latent.dtype == jnp.float32
    assert np.abs(latent - _nhwc(IO["enc.h"])).max() < 0.05 * np.abs(IO["enc.h"]).max()


def _count(module):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module)))


@pytest.mark.parametrize(
    ("config", "encoder", "decoder", "total"),
    [
        (VAEConfig(code_dim=32, channel_multipliers=VAE_STRIDE_16), 45.0, 65.1, 110.1),
        (VAEConfig(code_dim=14, channel_multipliers=VAE_STRIDE_8), 33.1, 48.5, 81.6),
    ],
)
def test_released_sizes_have_the_published_parameter_counts(config, encoder, decoder, total):
    skeleton = nnx.eval_shape(lambda: BSQVAE(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    millions = [round(_count(module) / 1e6, 1) for module in (skeleton.encoder, skeleton.decoder, skeleton)]
    assert millions == [encoder, decoder, total]
    code_map = jax.ShapeDtypeStruct((1, 4, 6, config.code_dim), jnp.float32)
    image = nnx.eval_shape(_decode, skeleton, code_map)
    assert image.shape == (1, 4 * config.stride, 6 * config.stride, 3)
    latent = nnx.eval_shape(_encode, skeleton, image)
    assert latent.shape == code_map.shape


def test_channels_off_a_multiple_of_32_are_normed_in_24_groups():
    config = VAEConfig(code_dim=4, base_channels=48, channel_multipliers=(1,), num_residual_blocks=1)
    skeleton = nnx.eval_shape(lambda: BSQVAE(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    assert skeleton.encoder.norm_out.num_groups == 24


def test_models_are_built_and_called_in_tree_mode():
    with nnx.set_graph_mode(False):
        graphdef, params = nnx.split(nnx.eval_shape(lambda: BSQVAE(TINY, dtype=jnp.float32, rngs=nnx.Rngs(0))))
        image = jax.eval_shape(
            lambda params, codes: nnx.merge(graphdef, params).decode(codes),
            params,
            jax.ShapeDtypeStruct((1, 2, 2, 16), jnp.float32),
        )
    assert image.shape == (1, 8, 8, 3)
