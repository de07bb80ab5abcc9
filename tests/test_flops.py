"""The cost of plans: cases known by hand, and the measured machine's floors."""

import dataclasses

import pytest

from toprovar_jax.config import ARCHITECTURES, InfinityConfig
from toprovar_jax.pruning.flops import PlanCost, Roofs, Work, layer_work, text_work
from toprovar_jax.pruning.plan import Plan, ScalePlan
from toprovar_jax.schedule import Grid, scale_schedule

TINY = InfinityConfig(depth=2, embed_dim=8, num_heads=2, mlp_dim=16, code_dim=3, text_channels=128)
SCHEDULE = (Grid(1, 1), Grid(2, 2), Grid(2, 3))
DENSE = Plan.dense(SCHEDULE, TINY.depth)


def test_a_layer_by_hand():
    work = layer_work(TINY, tokens=3, keys=5, text_tokens=2)
    assert work == Work(
        projections=2 * 3 * (8 * 24 + 8 * 8),
        text_projections=2 * 3 * (8 * 8 + 8 * 8),
        self_attention=2 * 2 * 2 * 3 * 5 * 4,  # two products, two heads, [3, 4] x [4, 5] and [3, 5] x [5, 4]
        cross_attention=2 * 2 * 2 * 3 * 2 * 4,
        mlp=2 * 3 * (8 * 16 + 16 * 8),
    )
    assert (work.attention, work.total) == (480 + 192, 2304 + 480 + 192 + 1536)


def test_the_text_by_hand():
    pool = 2 * 4 * 128 * 16 + 2 * 2 * 4 * 8 + 2 * 8 * 8
    projection = 2 * 4 * 128 * 8 + 2 * 4 * 8 * 8
    key_values = 2 * (2 * 4 * 8 * 16)
    assert text_work(TINY, 4) == Work(text=pool + projection + key_values, modulation=2 * 8 * 48 + 2 * 8 * 16)
    assert PlanCost(TINY, DENSE, batch=3, text_tokens=4).text() == text_work(TINY, 4) * 6
    assert PlanCost(TINY, DENSE, guided=False, text_tokens=4).text() == text_work(TINY, 4)


def test_a_dense_scale_is_its_layers_embedding_and_head():
    cost = PlanCost(TINY, DENSE, text_tokens=2, batch=3)
    layer = layer_work(TINY, tokens=6, keys=11, text_tokens=2) * 6
    assert cost.layers(2) == (layer, layer)
    # One embedding serves both rows of an image; every row has logits.
    assert cost.scale(2) == layer + layer + Work(embedding=3 * 2 * 6 * 3 * 8, head=6 * 2 * 6 * 8 * 6)
    assert cost.scale(0).embedding == 0
    assert cost.loop() == cost.scale(0) + cost.scale(1) + cost.scale(2)


def test_a_pruned_scale_counts_what_runs():
    scales = (*DENSE.scales[:1], ScalePlan((4, 2)), ScalePlan((6, 0), guided=False))
    cost = PlanCost(TINY, Plan(SCHEDULE, 2, scales, restore_scale=0), text_tokens=2)
    assert cost.layers(1) == (layer_work(TINY, 4, 5, 2) * 2, layer_work(TINY, 2, 3, 2) * 2)
    # The last scale is conditional: one row; its second layer is skipped.
    assert cost.layers(2) == (layer_work(TINY, 6, 11, 2), Work())


def test_a_dropped_scale_costs_nothing():
    cost = PlanCost(TINY, dataclasses.replace(DENSE, scales=(*DENSE.scales[:2], ScalePlan.dropped())))
    assert (cost.layers(2), cost.scale(2), cost.weight_bytes(2), cost.floor_seconds(2)) == ((), Work(), 0, 0)


def test_the_floor_is_computing_or_reading():
    cost = PlanCost(TINY, DENSE, text_tokens=2)
    work = cost.scale(1)
    slow = Roofs(products=10, float8_products=20, attention=5, bandwidth=1e9)
    assert cost.floor_seconds(1, slow) == (work.total - work.attention) / 10 + work.attention / 5
    weights = 2 * (6 * 64 + 2 * 8 * 16) * 2 + (3 * 8 + 8 * 6) * 4
    assert cost.weight_bytes(1) == weights
    assert cost.floor_seconds(1, Roofs(1e15, 1e15, 1e15, 2.0)) == weights / 2
    in_float32 = dataclasses.replace(cost, dtype="float32")
    assert in_float32.weight_bytes(0) == 2 * (6 * 64 + 2 * 8 * 16) * 4 + 8 * 6 * 4
    in_float8 = dataclasses.replace(cost, dtype="float8_e4m3fn")
    assert in_float8.weight_bytes(1) == weights - 2 * (4 * 64 + 2 * 8 * 16)
    halved = work.projections + work.mlp
    assert in_float8.floor_seconds(1, slow) == cost.floor_seconds(1, slow) - halved / 20


@pytest.mark.parametrize(
    ("model", "tera_flops", "attention", "milliseconds"),
    [("infinity_2b", 115.1, 36.0, 163.3), ("infinity_8b", 381.5, 78.8, 526.8)],
)
def test_the_releases_at_full_size(model, tera_flops, attention, milliseconds):
    config, schedule = ARCHITECTURES[model], scale_schedule()
    cost = PlanCost(config, Plan.dense(schedule, config.depth))
    assert cost.loop().total / 1e12 == pytest.approx(tera_flops, abs=0.05)
    assert cost.loop().attention / 1e12 == pytest.approx(attention, abs=0.05)
    floors = [1e3 * cost.floor_seconds(scale) for scale in range(len(schedule))]
    assert sum(floors) == pytest.approx(milliseconds, abs=0.05)
    # The first scales only wait for the weights.
    assert len(set(floors[1:5])) == 1
