"""Runs the JAX port on a case of `tests.reference.golden` and names its results as the golden files do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.reference.golden import Arrays, Run
from tests.reference.parameters import infinity_parameters
from toprovar_jax import sampling, scale_loop
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.skeleton import bind
from toprovar_jax.resize import resize_bilinear
from toprovar_jax.scale_loop import LoopConfig, SamplingSettings


def run_jax(run: Run, dtype: str = "float32", forced_bits: list[np.ndarray] | None = None) -> Arrays:
    """Every array of a run that a golden file may hold, under its key."""
    guided = any(scale != 1 for scale in run.guidance_scale)
    loop = LoopConfig(
        transformer=run.config,
        dtype=dtype,
        schedule=run.schedule,
        rope_grid=run.rope_grid,
        guided=guided,
        guidance_layer=run.guidance_layer or 0,
    )
    params = infinity_parameters(run.config, dtype, run.state)
    negative = run.negative_text_features
    tokens = max(len(features) for features in run.text_features + (negative or []))
    context, text = _text(
        params,
        *_pad(run.text_features, tokens),
        *(() if negative is None else _pad(negative, tokens)),
        loop=loop,
    )
    unconditional = (negative or run.text_features) if guided else []
    lengths = [len(features) for features in run.text_features + unconditional]
    results = _compact(text, lengths)

    state = scale_loop.initial_state(loop, run.batch)
    draws = run.draws
    if draws is None:
        draws = scale_loop.draw_all_scales(jax.random.split(jax.random.key(0), run.batch), loop)
    for scale, grid in enumerate(run.schedule):
        guidance = run.guidance_scale[scale]
        bits = (run.batch, *loop.code_grids[scale], run.config.code_dim)
        state, entries = _scale(
            params,
            state,
            context,
            draws[scale].reshape(run.batch, grid.size, run.config.token_bits, 2),
            SamplingSettings(guidance, run.temperature[scale], run.top_k, run.top_p),
            None if forced_bits is None else forced_bits[scale].reshape(bits),
            loop=loop,
            scale=scale,
            guides_logits=guidance != 1 and run.guidance_layer is None,
        )
        results |= {f"s{scale}.{name}": np.asarray(value) for name, value in entries.items()}
    results["final_summed_codes"] = results[f"s{len(run.schedule) - 1}.summed_codes_after"][:, :, 0]
    return results


def _pad(features: list[np.ndarray], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one length, zeros after each row's own, and the lengths."""
    rows = [np.pad(row, ((0, tokens - len(row)), (0, 0))) for row in features]
    return np.stack(rows), np.array([len(row) for row in features])


def _compact(text: dict[str, jax.Array], lengths: list[int]) -> Arrays:
    """Drops the padding of the text: the golden files concatenate the rows."""
    results = {f"text.{name}": np.asarray(value) for name, value in text.items()}
    for name in ("text.normed", "text.ca_kv"):
        parts = [row[:length] for row, length in zip(results[name], lengths, strict=True)]
        results[name] = np.concatenate(parts)
    return results


@functools.partial(jax.jit, static_argnames="loop")
def _text(params, features, lengths, negative_features=None, negative_lengths=None, *, loop):
    context = scale_loop.encode_context(params, features, lengths, negative_features, negative_lengths, loop=loop)
    model: Infinity = bind(Infinity, loop.transformer, loop.dtype, params)
    if loop.guided:
        if negative_features is None:
            own = model.unconditional_text(features.shape[1])
            negative_features = jnp.broadcast_to(own, features.shape)
        features = jnp.concatenate([features, negative_features])
    normed = model.text_norm(features)
    shared = model.shared_modulation(jax.nn.silu(context.pooled))
    return context, {
        "normed": normed,
        "cond_BD": context.pooled,
        "ca_kv": model.text_projection(normed),
        "ada_lin_out": shared.reshape(len(shared), 1, 6, -1),
    }


@functools.partial(jax.jit, static_argnames=("loop", "scale", "guides_logits"))
def _scale(params, state, context, draws, settings, forced_bits, *, loop, scale, guides_logits):
    state, output = scale_loop.scale_step(
        params, state, context, draws, settings, forced_bits, loop=loop, scale=scale, record="activations"
    )
    batch = len(draws)
    # The golden files keep unconditional rows of logits only where the scale is guided.
    logits_raw = output.logits_raw if guides_logits else output.logits_raw[:batch]
    logits = logits_raw / settings.temperature
    if guides_logits:
        logits = sampling.guide(*jnp.split(logits, 2), settings.guidance_scale)
    logits = logits.reshape(batch, -1, 2)
    entries = dict(output.activations) | {
        "logits_raw": logits_raw,
        "logits_final": logits,
        "probs": sampling.filter_probabilities(logits, settings.top_k, settings.top_p).reshape(-1, 2),
        "bits": output.bits[:, None],
        "codes": _channels_first(scale_loop.bits_to_codes(output.bits if forced_bits is None else forced_bits)),
        "summed_codes_after": _channels_first(state.code_map),
    }
    if scale + 1 < len(loop.schedule):
        entries["next_latent"] = _channels_first(resize_bilinear(state.code_map, loop.code_grids[scale + 1]))
    return state, entries


def _channels_first(x: jax.Array) -> jax.Array:
    """[batch, height, width, channels] -> [batch, channels, 1, height, width]."""
    return x.transpose(0, 3, 1, 2)[:, :, None]
