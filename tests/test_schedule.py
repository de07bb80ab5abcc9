"""The schedule table against the published one, and the choice of a template."""

import json
from pathlib import Path

import pytest

from toprovar_jax import schedule

PUBLISHED = json.loads((Path(__file__).parent / "golden" / "scale_schedules.json").read_text())


def test_every_ratio_and_budget_equals_the_published_table():
    assert list(schedule.ASPECT_RATIOS) == PUBLISHED["h_div_w_templates_in_order"]
    compared = 0
    for ratio, budgets in PUBLISHED["schedules"].items():
        for pixels, entry in budgets.items():
            expected = [(height, width) for _, height, width in entry["scales"]]
            assert list(schedule.scale_schedule(float(ratio), pixels)) == expected
            assert sum(grid.size for grid in schedule.scale_schedule(float(ratio), pixels)) == entry["tokens"]
            compared += 1
    assert compared == 15 * 4


@pytest.mark.parametrize(
    ("requested", "template"),
    [(1.0, 1.0), (9 / 16, 0.571), (16 / 9, 1.75), (100.0, 3.0), (0.01, 0.333), (1.125, 1.0)],
)
def test_nearest_template_is_by_difference_and_first_on_ties(requested, template):
    assert schedule.nearest_aspect_ratio(requested) == template


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="must be positive"):
        schedule.nearest_aspect_ratio(ratio)


def test_unknown_budget_names_the_choices():
    with pytest.raises(ValueError, match=r"unknown pixel budget '2M': choose one of 0.06M, 0.25M, 0.60M, 1M"):
        schedule.scale_schedule(1.0, "2M")


def test_rope_grid_is_always_the_1m_grid():
    assert schedule.rope_grid(0.75) == (54, 72)


def test_patchify_doubles_the_tokenizer_grid():
    assert schedule.tokenizer_schedule(schedule.scale_schedule(1.0, "0.06M"), True)[-1] == (32, 32)
    assert schedule.tokenizer_schedule(schedule.scale_schedule(1.0, "0.06M"), False)[-1] == (16, 16)
