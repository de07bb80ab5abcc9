"""The pipeline, through its public arguments, reproduces what the official generation stored."""

import dataclasses

import numpy as np
import pytest

from tests.reference import golden
from tests.reference.parameters import infinity_parameters, vae_parameters
from toprovar_jax.config import CheckpointConfig
from toprovar_jax.pipeline import InfinityPipeline


def pipeline_for(run):
    vae, vae_params = golden.VAE_CONFIG, {}
    if run.config.code_dim == vae.code_dim:
        vae_params = vae_parameters(vae, "float32", golden.vae_golden().state)
    else:
        # No tokenizer is stored for this run: its code maps are compared, not images.
        vae = dataclasses.replace(vae, code_dim=run.config.code_dim)
    params = {"transformer": infinity_parameters(run.config, "float32", run.state), "vae": vae_params}
    return InfinityPipeline(CheckpointConfig(run.config, vae), params, dtype="float32")


def shape_draws(run):
    """The stored rows [batch * tokens * bits, 2] as [batch, tokens, bits, 2]."""
    if run.draws is None:
        return None
    shapes = [(run.batch, grid.size, run.config.token_bits, 2) for grid in run.schedule]
    return [draws.reshape(shape) for draws, shape in zip(run.draws, shapes, strict=True)]


def to_official(code_map):
    """[batch, height, width, channels] -> [batch, channels, 1, height, width]."""
    return np.asarray(code_map).transpose(0, 3, 1, 2)[:, :, None]


@pytest.mark.parametrize(
    ("name", "output_type", "compared"),
    [
        ("infinity_tiny_cfg4_greedy", "np", 5 * 3),  # logits and bits of 5 scales, 4 code maps, the image
        ("infinity_tiny_b2_sampled", "latent", 4 * 3),  # logits and bits of 4 scales, 3 code maps, the last one
        ("infinity_tiny_nonsquare", "latent", 4 * 3),
        ("infinity_tiny_patchify", "latent", 4 * 3),
        ("infinity_tiny_negprompt", "latent", 4 * 2),
        ("infinity_tiny_insertion_m2", "latent", 4 * 2),
    ],
)
def test_traced_run(name, output_type, compared):
    run = golden.load_run(name)
    out = pipeline_for(run)(
        text_features=run.text_features,
        negative_text_features=run.negative_text_features,
        guidance_scale=run.guidance_scale,
        temperature=run.temperature,
        top_k=run.top_k,
        top_p=run.top_p,
        guidance_layer=run.guidance_layer,
        sampling_draws=shape_draws(run),
        scale_schedule=run.schedule,
        rope_grid=run.rope_grid,
        output_type=output_type,
        trace=True,
    )
    results = {}
    for index, (scale, bits) in enumerate(zip(out.trace.scales, out.bits, strict=True)):
        np.testing.assert_array_equal(bits, scale.bits)
        results[f"s{index}.logits_raw"] = scale.logits_raw
        results[f"s{index}.bits"] = scale.bits[:, None]
        results[f"s{index}.summed_codes_after"] = to_official(scale.code_map)
    if output_type == "np":
        results["image_uint8_bgr"] = out.images[..., ::-1]
    else:
        results["final_summed_codes"] = to_official(out.images)[:, :, 0]
    expected = {key: value for key, value in run.expected.items() if key in results}
    assert len(expected) == compared
    golden.assert_matches(expected, results)


def test_forced_bits_go_on_and_the_trace_keeps_the_models_own_choice():
    run = golden.load_run("infinity_tiny_b2_sampled")
    forced = [1 - bits for bits in run.stored_bits()[:2]]
    out = pipeline_for(run)(
        text_features=run.text_features,
        guidance_scale=run.guidance_scale[:2],
        temperature=run.temperature[:2],
        top_k=run.top_k,
        top_p=run.top_p,
        sampling_draws=shape_draws(run)[:2],
        forced_bits=forced,
        scale_schedule=run.schedule[:2],
        output_type="latent",
        trace=True,
    )
    # The first scale sees text alone, so its own choice is the stored one; its opposite went on.
    chosen = run.expected["s0.bits"][:, 0]
    np.testing.assert_array_equal(out.trace.scales[0].bits, chosen)
    np.testing.assert_array_equal(out.bits[0], forced[0][:, 0])
    code_map = out.trace.scales[0].code_map
    np.testing.assert_allclose(code_map, np.broadcast_to(0.25 - 0.5 * chosen, code_map.shape), rtol=1e-6)
    # The second scale's code is added as it is: 0.25 in every channel, of the forced sign.
    np.testing.assert_allclose(out.images - code_map, 0.5 * forced[1][:, 0] - 0.25, rtol=1e-6)
