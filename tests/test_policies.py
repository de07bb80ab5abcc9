"""Policies: the plans they make for everything that can be asked for, and their decisions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import SIX_SCALES
from toprovar_jax import InputError, scale_loop
from toprovar_jax.config import ARCHITECTURES, InfinityConfig
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.skeleton import abstract_parameters
from toprovar_jax.pruning.fastvar import FastVAR
from toprovar_jax.pruning.plan import Plan, ScalePlan
from toprovar_jax.pruning.policy import Dense, Policy
from toprovar_jax.pruning.skipvar import DecisionModel, SkipVAR, published_model
from toprovar_jax.schedule import ASPECT_RATIOS, PIXEL_BUDGETS, Grid, rope_grid, scale_schedule


def test_fastvar_is_the_published_rule_where_it_was_published():
    (plan,) = FastVAR().plans(scale_schedule(), ARCHITECTURES["infinity_2b"].depth)
    assert plan.restore_scale == 8
    assert plan.selection == "variance"
    assert plan.executed_scales == tuple(range(11))
    for scale, (tokens, kept) in {9: (1024, 615), 10: (1600, 800)}.items():
        assert plan.scales[scale].kept_tokens == (tokens,) * 3 + (kept,) * 25 + (tokens,) * 4
    assert all(plan.scales[scale] == ScalePlan.dense(plan.schedule[scale], 32) for scale in range(9))


@pytest.mark.parametrize(("depth", "layers"), [(1, ()), (2, (1,)), (12, range(1, 10)), (40, range(4, 35))])
def test_fastvars_layers_are_in_proportion_to_the_depth(depth, layers):
    (plan,) = FastVAR().plans(scale_schedule(), depth)
    pruned = [layer for layer, kept in enumerate(plan.scales[9].kept_tokens) if kept < 1024]
    assert pruned == list(layers)
    assert (plan.restore_scale is None) == (not pruned)


def test_skipvar_is_the_published_rule_where_it_was_published():
    policy = SkipVAR()
    plans = policy.plans(scale_schedule(), 4)
    assert len(set(plans)) == 7
    guided = [[entry.guided for entry in plan.scales if entry.runs] for plan in plans]
    assert guided == [
        [True] * 13,
        *[[True] * (13 - uncond) + [False] * uncond for uncond in (1, 2, 3)],
        *[[True] * (13 - skip) for skip in (1, 2, 3)],
    ]
    assert [scale for scale in range(13) if policy.observes(plans[0], scale)] == [8, 9]
    assert policy.model == published_model("0.84")


def test_a_batch_does_what_its_most_demanding_image_needs():
    """The published model on features of one image each, and of both together."""
    policy = SkipVAR()
    wants = {}
    for x in np.linspace(0, 0.5, 51):
        for y in np.linspace(0.2, 0.9, 36):
            features = np.asarray([[x, y]])
            wants[policy.decide(features)] = features

    def together(*decisions):
        return policy.decide(np.concatenate([wants[decision] for decision in decisions]))

    assert together((3, 0), (1, 0)) == (1, 0)
    assert together((3, 0), (0, 3)) == (0, 3)
    assert together((0, 1), (0, 2), (1, 0)) == (0, 1)


@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
def test_every_budget_can_be_planned_and_traced(ratio):
    """With and without patchify; the steps traced are those that restore, and run without guidance."""
    for index, pixels in enumerate(PIXEL_BUDGETS):
        schedule = scale_schedule(ratio, pixels)
        config = InfinityConfig(
            depth=2, embed_dim=16, num_heads=2, mlp_dim=16, code_dim=4, patchify=index % 2 == 1, text_channels=128
        )
        (fastvar,) = FastVAR().plans(schedule, config.depth)
        (_, *_, conditional), num_scales = SkipVAR().plans(schedule, config.depth)[:4], len(schedule)
        assert fastvar.executed_scales == tuple(range(num_scales - 2))
        trace_step(config, fastvar, num_scales - 3, rope_grid(ratio))
    trace_step(config, conditional, num_scales - 3, rope_grid(ratio))


@functools.cache
def context_shapes(config):
    params = abstract_parameters(Infinity, config, "float32")
    loop = scale_loop.LoopConfig(config, "float32", SIX_SCALES, Grid(8, 8), guided=False)
    encode = functools.partial(scale_loop.encode_context, loop=loop)
    features, lengths = jax.ShapeDtypeStruct((1, 8, 128), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return params, jax.eval_shape(encode, params, features, lengths)


def trace_step(config, plan, scale, final_grid):
    batch = 2
    loop = scale_loop.LoopConfig(config, "float32", plan.schedule, final_grid, guided=True, plan=plan)
    step = loop.step(scale)
    rows = 2 * batch if step.guided else batch
    shape = jax.ShapeDtypeStruct
    params, context = context_shapes(config)
    context = jax.tree.map(lambda x: shape((rows, *x.shape[1:]), x.dtype), context)
    state = jax.eval_shape(functools.partial(scale_loop.initial_state, loop, batch, scale))
    draws = shape((batch, plan.schedule[scale].size, config.token_bits, 2), jnp.float32)
    scalar, whole = shape((), jnp.float32), shape((), jnp.int32)
    settings = scale_loop.SamplingSettings(scalar, scalar, whole, scalar)
    run = functools.partial(scale_loop.scale_step, loop=loop, scale=scale, record="logits")
    after, output = jax.eval_shape(run, params, state, context, draws, settings)
    assert output.logits_raw.shape == (rows, plan.schedule[scale].size, 2 * config.token_bits)
    assert set(after.saved) == {*step.restored, *step.saved}
    assert {x.shape[0] for x in jax.tree.leaves((after.cache, after.saved))} == {rows}
    assert output.kept.keys() == {run.span for run in step.scored_runs}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "not a decision model: KeyError"),
        ({"skip": {"coef": [[1]]}, "uncond": {}}, "not a decision model: TypeError"),
        (
            {
                "skip": {"classes": [0], "mean": [1], "scale": [1], "coef": [[1, 2]], "intercept": [0]},
                "uncond": {},
            },
            "a decision model needs a mean and a scale per feature",
        ),
    ],
)
def test_coefficients_that_do_not_fit_are_refused(data, message):
    with pytest.raises(InputError, match=message):
        DecisionModel.from_json(data)
    with pytest.raises(InputError, match=r"no SkipVAR model was published for '0\.5': choose one of"):
        published_model("0.5")


def test_a_policy_without_opinion_looks_at_nothing():
    plan = Plan.dense(SIX_SCALES, 2)
    assert not Dense().observes(plan, 3)
    assert Dense().choose(plan, 3, {}) == plan
    assert Dense().entropy_layers(plan, 3) == Dense().score_scales(plan, 3) == ()
    with pytest.raises(TypeError, match="abstract"):
        Policy()
