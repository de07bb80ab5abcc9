"""ToProVAR's plans by hand-made rules, and how it chooses among them while images are drawn."""

import dataclasses

import numpy as np
import pytest

from tests import tiny
from toprovar_jax import checkpoint
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.pruning.plan import Plan, ScalePlan
from toprovar_jax.pruning.profile import Profile, ProfileError
from toprovar_jax.pruning.toprovar import ToProVAR
from toprovar_jax.schedule import ASPECT_RATIOS, PIXEL_BUDGETS, Grid, scale_schedule

SCHEDULE = (Grid(1, 1), Grid(4, 4), Grid(8, 8), Grid(16, 16))
PROFILE = Profile(
    layer_scores=(0.0, 1.0, 1.0, 0.5),
    tau=0.5,
    crossing="above",
    prunable_scales=2,
    usual_scales=1,
    alpha_max=1.6,
)


def policy(**changes):
    switches = {name: changes.pop(name) for name in list(changes) if name.startswith("use_")}
    return ToProVAR(dataclasses.replace(PROFILE, **changes), **switches)


def kept(plan, scale):
    return plan.scales[scale].kept_tokens


def test_counts_are_what_eq_6_expects_in_the_next_bucket():
    plans = policy().plans(SCHEDULE, 4)
    # phi is 3/4 and 1, so a detail layer's ranks reach 1.2 and 1.6: 0.5 x 1 / 1.2 and 0.5 x 1 / 1.6 stay.
    assert kept(plans[0], 2) == (64, 32, 32, 48)  # 26.7 of 64 and 44.8 of 64 are expected
    assert kept(plans[0], 3) == (256, 96, 96, 160)  # 80.2 and 153.6 of 256
    assert kept(plans[0], 1) == (16,) * 4


def test_one_plan_for_every_start_and_a_dense_one():
    plans = policy().plans(SCHEDULE, 4)
    assert [plan.restore_scale for plan in plans] == [1, 2, None]
    assert plans[1].scales == (*Plan.dense(SCHEDULE, 4).scales[:3], plans[0].scales[3])
    assert plans[2] == Plan.dense(SCHEDULE, 4)
    assert policy(use_scale=False).plans(SCHEDULE, 4) == (plans[1],)
    assert policy(use_scale=False, usual_scales=0).plans(SCHEDULE, 4) == (plans[2],)
    assert policy(prunable_scales=0, usual_scales=0).plans(SCHEDULE, 4) == (plans[2],)
    assert policy(layer_scores=(0.0,) * 4).plans(SCHEDULE, 4) == (plans[2],)


def test_the_first_scale_always_runs_in_full():
    everything = policy(prunable_scales=9, usual_scales=9, alpha_max=3.0)
    assert [plan.restore_scale for plan in everything.plans(SCHEDULE, 4)] == [0, 1, 2, None]
    assert everything.plans(SCHEDULE[:1], 4) == (Plan.dense(SCHEDULE[:1], 4),)


def test_ablations_are_those_of_the_paper():
    dropped, full = ScalePlan.dropped(), ScalePlan.dense(SCHEDULE[2], 4)
    scale_only = policy(use_layers=False, use_tokens=False).plans(SCHEDULE, 4)
    assert scale_only[0].scales[2:] == (dropped, dropped)
    assert scale_only[1].scales[2:] == (full, dropped)
    assert kept(policy(use_tokens=False).plans(SCHEDULE, 4)[0], 2) == (64, 0, 0, 0)
    assert kept(policy(use_layers=False).plans(SCHEDULE, 4)[0], 2) == (32, 32, 32, 32)
    assert kept(policy(use_layers=False, source="layer_before").plans(SCHEDULE, 4)[0], 2) == (64, 32, 32, 32)


def test_last_scales_are_dropped_or_lose_the_unconditional_rows_once_pruning_has_started():
    plans = policy(dropped_scales=1, conditional_scales=1).plans(SCHEDULE, 4)
    assert plans[0].scales[2:] == (ScalePlan((64, 32, 32, 48), guided=False), ScalePlan.dropped())
    assert plans[1].scales[2:] == (ScalePlan.dense(SCHEDULE[2], 4), ScalePlan.dropped())
    assert plans[1].restore_scale is None
    assert plans[2] == Plan.dense(SCHEDULE, 4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"alpha_min": 0.2, "alpha_max": 0.2}, 56),  # 51.2
        ({"alpha_min": 0.0, "alpha_max": 0.0}, 64),
        ({"alpha_min": 1.0, "alpha_max": 1.0}, 0),
        ({"normalization": "mean", "alpha_max": 0.5}, 40),  # 1 - 0.5 x 3/4
        ({"normalization": "sum", "alpha_max": 1.0}, 64),  # 63.25: the gate that does nothing
    ],
)
def test_counts_follow_the_normalization(changes, expected):
    assert kept(policy(**changes).plan_from(2, SCHEDULE), 2)[1] == expected


def test_counts_do_not_grow_by_a_rounding_error():
    """0.9 of 80 tokens are 72.00000000000001 by floating point."""
    schedule = (Grid(1, 1), Grid(8, 10))
    assert kept(policy(alpha_min=0.1, alpha_max=0.1).plans(schedule, 4)[0], 1)[1] == 72


def test_plans_fit_every_schedule_and_save_work():
    profile = dataclasses.replace(PROFILE, prunable_scales=5, usual_scales=4)
    for ratio in ASPECT_RATIOS:
        for pixels in PIXEL_BUDGETS:
            schedule = scale_schedule(ratio, pixels)
            plans = ToProVAR(profile).plans(schedule, 4)
            work = [sum(sum(entry.kept_tokens) for entry in plan.scales) for plan in plans]
            assert len(plans) >= 5
            assert work == sorted(work)
            assert work[0] < 0.75 * work[-1]


def test_a_profile_of_another_depth_is_refused():
    with pytest.raises(ProfileError, match=r"^the profile is for a transformer of 4 layers, but this one has 2: "):
        policy().plans(SCHEDULE, 2)


def chosen(policy, *shares):
    """The plan after scales that reported these shares, from the first scale that is asked."""
    plan = policy.plans(SCHEDULE, 4)[0]
    reports = {}
    for scale in range(len(SCHEDULE)):
        if policy.observes(plan, scale):
            reports[scale] = np.asarray(shares[len(reports)], np.float32)
            plan = policy.choose(plan, scale, reports)
    assert len(reports) == len(shares)
    return plan


def test_pruning_starts_after_the_scale_that_crosses():
    early, late, dense = policy().plans(SCHEDULE, 4)
    assert chosen(policy(), [0.5]) == early
    assert chosen(policy(), [0.4], [0.6]) == late
    assert chosen(policy(), [0.4], [0.4]) == dense
    assert chosen(policy(crossing="below"), [0.6], [0.5]) == late
    assert chosen(policy(tau=0.7), [np.float32(0.7)]) == early


@pytest.mark.parametrize(("tau", "crossing"), [(0.0, "above"), (1.0, "below")])
def test_a_threshold_that_every_share_crosses_asks_no_image(tau, crossing):
    """The start is then known beforehand, and the device need not wait for the host to choose."""
    decided = policy(tau=tau, crossing=crossing)
    (plan,) = decided.plans(SCHEDULE, 4)
    assert plan == policy().plans(SCHEDULE, 4)[0]
    assert not any(decided.observes(plan, scale) for scale in range(len(SCHEDULE)))
    assert [len(decided.entropy_layers(plan, scale)) for scale in range(len(SCHEDULE))] == [0, 4, 0, 0]


def test_a_batch_waits_for_its_last_image():
    early, late, dense = policy().plans(SCHEDULE, 4)
    assert chosen(policy(), [0.6, 0.6]) == early
    assert chosen(policy(), [0.6, 0.4], [0.4, 0.6]) == late
    assert chosen(policy(), [0.6, 0.4], [0.6, 0.4]) == dense


def test_a_share_counts_also_where_its_scale_has_nothing_to_prune():
    """At 8x8 this alpha expects to keep 56.8 of 64 tokens, and no bucket lies between: only 16x16 is pruned."""
    gentle = policy(alpha_max=0.3)
    late, dense = gentle.plans(SCHEDULE, 4)
    assert late.restore_scale == 2
    assert chosen(gentle, [0.6], [0.4]) == late
    assert chosen(gentle, [0.4], [0.4]) == dense


TINY = Profile(
    layer_scores=(0.0, 1.0), tau=0.45, crossing="above", prunable_scales=2, usual_scales=1, alpha_max=1.5
)
TINY_SCHEDULE = ((1, 1), (4, 4), (6, 4), (8, 6))


def draw(pipe, chosen_policy, seed=0, images=1, **options):
    return pipe(
        text_features=[tiny.features(5, seed=seed + i) for i in range(images)],
        scale_schedule=TINY_SCHEDULE,
        policy=chosen_policy,
        output_type="np",
        seed=seed,
        **options,
    )


def test_different_images_compile_nothing_new():
    pipe = InfinityPipeline(tiny.CONFIG, tiny.parameters(), dtype="float32")
    outputs = [draw(pipe, ToProVAR(TINY), seed=seed) for seed in range(100)]
    programs = len(pipe.programs)
    assert [output.timings.compile for output in outputs[1:]] == [0.0] * 99
    assert programs == len(pipe.programs)
    starts = {output.plan.restore_scale for output in outputs}
    assert len(starts) > 1, "every image started alike, so that this test proves little"


@pytest.mark.parametrize(
    ("source", "dtype", "images", "guidance"),
    [("all_layers", "bfloat16", 2, 3.0), ("layer_before", "float32", 4, 1.0)],
)
def test_runs_in_every_precision_with_and_without_guidance(source, dtype, images, guidance):
    pipe = InfinityPipeline(tiny.CONFIG, tiny.parameters(dtype), dtype=dtype)
    profile = dataclasses.replace(TINY, source=source, tau=0.01, conditional_scales=1)
    output = draw(pipe, ToProVAR(profile), images=images, guidance_scale=guidance, trace=True)
    assert output.images.shape[0] == images
    assert output.plan.restore_scale == 1
    for scale, trace in list(enumerate(output.trace.scales))[2:]:
        ((span, indices),) = trace.kept.items()
        assert span == (1, 2)
        assert indices.shape[-1] == kept(output.plan, scale)[1] < output.plan.schedule[scale].size
        assert (np.diff(indices) > 0).all()


def test_the_name_takes_the_profile_beside_the_checkpoint(tmp_path):
    folder = tmp_path / "model"
    digest = checkpoint.save(folder, tiny.CONFIG, tiny.parameters(), dtype="float32").digest
    pipe = InfinityPipeline.from_pretrained(folder)
    with pytest.raises(
        ProfileError,
        match=rf"^{folder} has no profile for policy 'toprovar': make one with `python -m toprovar_jax",
    ):
        draw(pipe, "toprovar")
    profile = dataclasses.replace(TINY, checkpoint=digest, tau=0.0)
    profile.save(folder)
    assert draw(pipe, "toprovar").plan == ToProVAR(profile).plans(tuple(Grid(*g) for g in TINY_SCHEDULE), 2)[0]
    stale = dataclasses.replace(profile, checkpoint="another")
    stale.save(folder)
    for named in ("toprovar", ToProVAR(stale)):
        with pytest.raises(ProfileError, match=r"^the profile belongs to another checkpoint: calibrate with"):
            draw(pipe, named)


def test_the_name_needs_a_folder():
    with pytest.raises(ProfileError, match=r"^policy 'toprovar' needs a checkpoint on disk with a profile: pass"):
        draw(tiny.pipeline(), "toprovar")
