"""Runs of layers on some tokens: which are kept, and what fills in for the others."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from toprovar_jax import scale_loop
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.skeleton import random_parameters
from toprovar_jax.pruning.plan import Plan, ScalePlan, Span
from toprovar_jax.schedule import Grid

SCHEDULE = (Grid(1, 1), Grid(2, 2), Grid(3, 4), Grid(4, 4))


@pytest.fixture(scope="module")
def deep():
    """A model of five layers, to have runs of layers."""
    config = dataclasses.replace(tiny.CONFIG.transformer, depth=5, num_chunks=5)
    return config, random_parameters(Infinity, config, "float32")


def shared_plan(selection, kept):
    """The last two scales keep layer 0 dense, run layers 1 to 3 on some tokens, and skip layer 4."""
    dense = [ScalePlan.dense(grid, 5) for grid in SCHEDULE[:2]]
    pruned = [ScalePlan((grid.size, kept, kept, kept, 0)) for grid in SCHEDULE[2:]]
    return Plan(SCHEDULE, 5, (*dense, *pruned), selection, restore_scale=1)


def random_scores():
    return {scale: jax.random.uniform(jax.random.key(scale), (2, SCHEDULE[scale].size)) for scale in (2, 3)}


def final_step(config, params, plan, scores=None, guidance_layer=0):
    """Output of the last scale after a loop whose bits are all 1."""
    loop = scale_loop.LoopConfig(
        config, "float32", plan.schedule, Grid(8, 8), guided=True, guidance_layer=guidance_layer, plan=plan
    )
    features = np.stack([tiny.features(4, seed=image) for image in range(2)])
    settings = scale_loop.SamplingSettings(3.0, 1.0, 1, 0.0)

    @functools.partial(jax.jit, static_argnames="scale")
    def step(state, context, draws, *, scale):
        bits = jnp.ones((2, *plan.schedule[scale], config.code_dim), jnp.uint8)
        given = None
        if loop.executed_plan.selection == "scores" and loop.step(scale).scored_runs:
            given = jnp.stack([scores[scale]] * len(loop.step(scale).scored_runs))
        return scale_loop.scale_step(
            params, state, context, draws, settings, bits, given, loop=loop, scale=scale, record="activations"
        )

    @jax.jit
    def start():
        context = scale_loop.encode_context(params, jnp.asarray(features), jnp.array([4, 4]), loop=loop)
        draws = scale_loop.draw_all_scales(scale_loop.image_keys(jnp.arange(2, dtype=jnp.uint32)), loop)
        return scale_loop.initial_state(loop, 2), context, draws

    state, context, draws = start()
    for scale in plan.executed_scales:
        state = scale_loop.prepare(state, loop.step(scale))
        state, output = step(state, context, draws[scale], scale=scale)
    return jax.device_get(output)


def test_one_choice_for_a_run_of_layers_is_the_same_choice_in_each_of_them(deep):
    """Cutting the run into single layers changes neither the kept set nor what is restored."""
    config, params = deep
    scores = random_scores()
    plan = shared_plan("scores", kept=7)
    # The level embedding before every chunk, but of 0 after the first, only cuts the runs.
    cut_config = dataclasses.replace(config, level_embedding_per_chunk=True)
    no_levels = {**params, "level_embedding": jnp.zeros_like(params["level_embedding"])}
    whole = final_step(config, no_levels, plan, scores)
    cut = final_step(cut_config, no_levels, plan, scores)
    assert list(whole.kept) == [Span(1, 4)]
    assert list(cut.kept) == [Span(1, 2), Span(2, 3), Span(3, 4)]
    for kept in cut.kept.values():
        np.testing.assert_array_equal(kept, whole.kept[Span(1, 4)])
    np.testing.assert_allclose(cut.activations["block3_out"], whole.activations["block3_out"], atol=1e-5)
    np.testing.assert_allclose(cut.logits_raw, whole.logits_raw, atol=1e-5)


def test_kept_tokens_are_those_of_lowest_score_in_both_halves(deep):
    config, params = deep
    scores = {
        scale: jnp.tile(jnp.arange(SCHEDULE[scale].size, dtype=jnp.float32)[::-1], (2, 1)) for scale in (2, 3)
    }
    (kept,) = final_step(config, params, shared_plan("scores", kept=12), scores).kept.values()
    assert kept.shape == (4, 1, 12)
    # Four regions of four tokens grant each its floor; the rest goes to the lowest scores, which come last.
    assert all(set(range(8, 16)) <= set(row) for row in kept[:, 0])
    np.testing.assert_array_equal(kept, np.broadcast_to(kept[:1], kept.shape))


def test_entropy_of_the_layer_before_chooses_the_same_tokens_in_both_halves(deep):
    config, params = deep
    output = final_step(config, params, shared_plan("entropy", kept=7))
    (kept,) = output.kept.values()
    np.testing.assert_array_equal(kept[:2], kept[2:])
    assert (kept[0] != kept[1]).any()


def test_guidance_inside_the_layers_acts_on_all_tokens(deep):
    """It mixes the halves after its block, in the middle of what would be one run."""
    config, params = deep
    scores = random_scores()
    output = final_step(config, params, shared_plan("scores", kept=7), scores, guidance_layer=-3)
    assert list(output.kept) == [Span(1, 3), Span(3, 4)]
    conditional, unconditional = np.split(output.activations["block2_out"], 2)
    np.testing.assert_array_equal(conditional, unconditional)
    conditional, unconditional = np.split(output.activations["block3_out"], 2)
    assert np.abs(conditional - unconditional).max() > 1e-4
