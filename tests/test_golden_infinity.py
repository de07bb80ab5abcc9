"""The JAX transformer reproduces every stored array of the official one (tests/golden/infinity_tiny_*.npz)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import golden
from tests.reference.jax_run import run_jax
from tests.reference.parameters import infinity_parameters, vae_parameters
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.skeleton import bind


@functools.cache
def results_of(name):
    return run_jax(golden.load_run(name))


@jax.jit
def decode(params, code_map):
    return bind(BSQVAE, golden.VAE_CONFIG, "float32", params).decode(code_map)


def image_results(code_map):
    params = vae_parameters(golden.VAE_CONFIG, "float32", golden.vae_golden().state)
    image = decode(params, code_map.transpose(0, 2, 3, 1))
    pixels = np.asarray((image + 1) / 2 * 255).astype(np.uint8)
    return {"image_float": np.asarray(image).transpose(0, 3, 1, 2), "image_uint8_bgr": pixels[..., ::-1]}


@pytest.mark.parametrize("name", golden.FLOAT32_RUNS)
def test_every_stored_array_of_a_run(name):
    run = golden.load_run(name)
    results = dict(results_of(name))
    if "image_float" in run.expected:
        results |= image_results(results["final_summed_codes"])
    golden.assert_matches(run.expected, results)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("infinity_tiny_cfg4_bf16cross", "float32", golden.BFLOAT16_TOLERANCE),
        ("infinity_tiny_cfg4_amp_emulated", "float32", golden.BFLOAT16_TOLERANCE),
        # Both sides round, at different places.
        ("infinity_tiny_cfg4_amp_emulated", "bfloat16", 2 * golden.BFLOAT16_TOLERANCE),
    ],
)
def test_every_stored_array_of_a_run_with_bfloat16_inside(name, dtype, tolerance):
    run = golden.load_run(name)
    results = run_jax(run, dtype, forced_bits=run.stored_bits())
    golden.assert_matches_bfloat16(run, results, tolerance)


def test_teacher_forcing_equals_the_stored_logits_and_the_cached_path():
    run = golden.load_run("infinity_tiny_cfg1_greedy")
    arrays = golden.load("infinity_tiny_teacher_forcing")
    features, latents = arrays.pop("in.text_features"), arrays.pop("in.x_BLC_wo_prefix")

    @jax.jit
    def teacher_forcing(params, features, latents):
        model: Infinity = bind(Infinity, run.config, "float32", params)
        context = model.encode_text(features, jnp.array([features.shape[1]]))
        return model.teacher_forced_logits(latents, context, schedule=run.schedule, rope_grid=run.rope_grid)

    params = infinity_parameters(run.config, "float32", run.state)
    logits = np.asarray(teacher_forcing(params, features[None], latents))
    golden.assert_matches(arrays, {"logits": logits})
    results = results_of(run.name)
    cached = np.concatenate([results[f"s{i}.logits_raw"] for i in range(len(run.schedule))], axis=1)
    assert golden.relative_error(logits, cached) <= 1e-5
