"""Plans: what they cost, how they print, and every contradiction refused in one line."""

import dataclasses
import json

import pytest

from toprovar_jax.pruning.plan import LayerRun, Plan, PlanError, ScalePlan, Span, bucket, buckets
from toprovar_jax.schedule import ASPECT_RATIOS, PIXEL_BUDGETS, Grid, scale_schedule

SCHEDULE = (Grid(1, 1), Grid(2, 2), Grid(4, 4), Grid(6, 6), Grid(8, 8))
DEPTH = 5


def plan_of(**changes):
    """Scale 3 keeps 20 of 36 tokens in layers 1 to 3, scale 4 is conditional only and skips layer 2."""
    scales = [ScalePlan.dense(grid, DEPTH) for grid in SCHEDULE]
    scales[3] = ScalePlan((36, 20, 20, 20, 36))
    scales[4] = ScalePlan((64, 64, 0, 64, 64), guided=False)
    return dataclasses.replace(Plan(SCHEDULE, DEPTH, tuple(scales), restore_scale=2), **changes)


def test_a_dense_plan_caches_every_token_that_another_scale_sees():
    for ratio in ASPECT_RATIOS:
        for pixels in PIXEL_BUDGETS:
            schedule = scale_schedule(ratio, pixels)
            plan = Plan.dense(schedule, 3)
            tokens = sum(grid.size for grid in schedule[:-1])
            assert plan.cache_capacities == (tokens + -tokens % 8,) * 3
            steps = [plan.step(scale) for scale in range(len(schedule))]
            assert [step.cache_lengths[0] for step in steps] == [
                sum(grid.size for grid in schedule[:scale]) for scale in range(len(schedule))
            ]
            assert {(len(step.runs), step.selection, step.restored, step.saved) for step in steps} == {
                (1, None, (), ())
            }


def test_only_kept_tokens_are_cached():
    plan = plan_of()
    assert plan.step(4).cache_lengths == (57, 41, 41, 41, 57)
    assert plan.cache_capacities == (64, 48, 48, 48, 64)
    dropped = plan_of(scales=(*plan.scales[:3], ScalePlan.dropped(), plan.scales[4]))
    assert dropped.step(4).cache_lengths == (21,) * 5


def test_runs_of_layers_share_their_tokens_and_what_they_need_is_saved_once():
    plan = plan_of()
    assert plan.step(3).runs == (
        LayerRun(Span(0, 1), 36, False),
        LayerRun(Span(1, 4), 20, True),
        LayerRun(Span(4, 5), 36, False),
    )
    spans = (Span(1, 4), Span(2, 3))
    assert [plan.step(scale).saved for scale in range(4)] == [(), (), spans, ()]
    assert [plan.step(scale).restored for scale in range(5)] == [(), (), (), spans, (Span(2, 3),)]
    assert [plan.step(scale).restore_grid for scale in (2, 3)] == [None, Grid(4, 4)]
    assert [len(plan.step(scale).scored_runs) for scale in range(5)] == [0, 0, 0, 1, 0]
    assert [plan.step(scale).selection for scale in (3, 4)] == ["scores", None]


def test_no_run_of_layers_goes_across_a_break():
    spans = [run.span for run in plan_of().step(3, breaks=(2,)).runs]
    assert spans == [(0, 1), (1, 2), (2, 4), (4, 5)]
    assert plan_of().step(2, breaks=(2,)).saved == ((1, 2), (2, 3), (2, 4))


def test_selection_before_every_sublayer_makes_every_pruned_layer_a_run():
    plan = plan_of(selection="variance")
    assert [run.span for run in plan.step(3).runs] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert plan.step(2).saved == ((1, 2), (2, 3), (3, 4))


def test_plans_that_differ_elsewhere_share_a_step():
    plan, dense = plan_of(), Plan.dense(SCHEDULE, DEPTH)
    assert plan != dense
    assert [plan.step(scale) == dense.step(scale) for scale in range(5)] == [True, True, False, False, False]
    shorter = plan_of(scales=(*plan.scales[:4], ScalePlan.dropped()))
    assert shorter.step(3) != plan.step(3)  # nothing has to be carried on
    assert len({plan, dense, plan_of()}) == 2


@pytest.mark.parametrize("plan", [plan_of(), Plan.dense(SCHEDULE, 2)])
def test_json_round_trip(plan):
    assert Plan.from_text(json.dumps(plan.to_json())) == plan


def test_table():
    plan = plan_of(scales=(*plan_of().scales[:4], ScalePlan.dropped()))
    assert plan.table().splitlines() == [
        "scale  grid  tokens    rows  layers: kept tokens",
        "    0   1x1       1  guided  0-4: all",
        "    1   2x2       4  guided  0-4: all",
        "    2   4x4      16  guided  0-4: all",
        "    3   6x6      36  guided  0: all, 1-3: 20 (56%), 4: all",
        "    4   8x8      64       -  dropped",
        "tokens chosen by scores; the others restored from scale 2",
    ]
    assert "conditional  0-1: all, 2: skipped, 3-4: all" in plan_of().table()


def test_buckets_are_few_and_cover_every_count():
    assert buckets(Grid(64, 64)) == (512, 1024, 1536, 2048, 2560, 3072, 3584, 4096)
    assert buckets(Grid(1, 1)) == (1,)
    for grid in {grid for ratio in ASPECT_RATIOS for grid in scale_schedule(ratio)}:
        counts = buckets(grid)
        assert counts[-1] == grid.size
        assert len(counts) <= 8
        assert all(count % 8 == 0 for count in counts[:-1])
        for count in range(0, grid.size + 1, 7):
            chosen = bucket(grid, count)
            assert chosen in counts
            assert count <= chosen
            assert all(smaller < count for smaller in counts if smaller < chosen)
    assert bucket(Grid(2, 2), 9.0) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": plan_of().scales[:4]}, "the plan has 4 scales for a schedule of 5"),
        (
            {"depth": 6},
            "scale 0 of the plan counts tokens for 5 layers, but the model has 6: give one count per layer",
        ),
        (
            {"scales": (ScalePlan((2,) * 5), *plan_of().scales[1:])},
            "scale 0 of the plan must keep from 0 to 1 tokens in every layer, got 2 to 2",
        ),
        (
            {"scales": (ScalePlan.dropped(), *plan_of().scales[1:])},
            "a plan must run scale 0, which holds the text's token",
        ),
        (
            {"scales": (*plan_of().scales[:4], ScalePlan((), guided=True))},
            "scale 4 of the plan is dropped, so it cannot be guided",
        ),
        (
            {"scales": (ScalePlan((1,) * 5, guided=False), *plan_of().scales[1:])},
            "a plan cannot guide again after a conditional-only scale: the unconditional cache has a gap there",
        ),
        (
            {"restore_scale": None},
            "the plan prunes scale 3, so restore_scale must name an earlier scale, got None",
        ),
        ({"restore_scale": 3}, "the plan prunes scale 3, so restore_scale must name an earlier scale, got 3"),
        (
            {"scales": (*plan_of().scales[:2], ScalePlan.dropped(), *plan_of().scales[3:])},
            "the plan's restore_scale 2 is dropped: name one that runs",
        ),
        (
            {"scales": Plan.dense(SCHEDULE, DEPTH).scales},
            "a plan that prunes no tokens needs no restore_scale: leave it out",
        ),
        (
            {"selection": "entropy", "scales": (*plan_of().scales[:4], ScalePlan((0,) * 5))},
            "layer 0 has no layer before it whose entropy could choose its tokens: keep it dense",
        ),
    ],
)
def test_contradictions_are_refused_in_one_line(changes, message):
    with pytest.raises(PlanError, match=message) as error:
        plan_of(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("depth"), "not a plan: KeyError"),
        (lambda data: data.update(extra=1), r"not a plan: unknown entries \['extra'\]"),
        (
            lambda data: data.update(selection="luck"),
            "unknown selection 'luck' in the plan: choose one of variance, entropy, scores",
        ),
        (lambda data: data.update(depth=2.5), "2.5 is no whole number"),
        (lambda data: data["scales"][0].pop("guided"), "a scale is 'dropped' or has kept_tokens and guided"),
        (lambda data: data.update(schedule=[[1]]), "not a plan: TypeError"),
        (lambda data: data.update(scales=None), "not a plan: TypeError"),
    ],
)
def test_files_that_are_no_plans_are_refused_in_one_line(change, message):
    data = plan_of().to_json()
    change(data)
    with pytest.raises(PlanError, match=message) as error:
        Plan.from_text(json.dumps(data))
    assert "\n" not in str(error.value)
    with pytest.raises(PlanError, match="not a plan, and no JSON: "):
        Plan.from_text("{")
