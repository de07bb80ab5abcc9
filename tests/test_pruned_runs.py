"""Whole runs under every policy, and every way a policy can be wrong."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from tests import tiny
from tests.tiny import SIX_SCALES
from toprovar_jax import InputError
from toprovar_jax.config import CheckpointConfig
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.skeleton import random_parameters
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.pruning.fastvar import FastVAR
from toprovar_jax.pruning.plan import Plan, ScalePlan
from toprovar_jax.pruning.policies import POLICIES, resolve_policy
from toprovar_jax.pruning.policy import Dense, Fixed
from toprovar_jax.pruning.skipvar import SkipVAR


@functools.cache
def pipeline(patchify, dtype):
    if not patchify:
        return InfinityPipeline(tiny.CONFIG, tiny.parameters(dtype), dtype=dtype)
    transformer = dataclasses.replace(tiny.CONFIG.transformer, patchify=True)
    config = CheckpointConfig(transformer, tiny.CONFIG.vae, defaults=tiny.CONFIG.defaults)
    params = {
        "transformer": random_parameters(Infinity, transformer, dtype),
        "vae": random_parameters(BSQVAE, config.vae, dtype),
    }
    return InfinityPipeline(config, params, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class UnconditionalLast(SkipVAR):
    """SkipVAR that always ends with two scales without guidance."""

    def decide(self, features):
        assert features.shape[1] == 2
        return 0, 2


RUNS = {"fastvar": FastVAR(), "unconditional": UnconditionalLast()}


def generate(policy, *, batch=1, patchify=False, dtype="float32", **settings):
    features = [tiny.features(3 + image, seed=image) for image in range(batch)]
    arguments = {"guidance_scale": 3.0, "scale_schedule": SIX_SCALES, "output_type": "np"} | settings
    return pipeline(patchify, dtype)(text_features=features, policy=policy, **arguments)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    "settings",
    [
        {"batch": 1},
        {"batch": 2, "patchify": True},
        {"batch": 3, "guidance_scale": 1.0},
        {"batch": 4, "dtype": "bfloat16", "guidance_layer": -1},
    ],
    ids=str,
)
def test_a_run_and_its_output(name, settings):
    out = generate(RUNS[name], trace=True, **settings)
    factor = 2 if settings.get("patchify") else 1
    assert out.images.shape == (settings["batch"], 8 * factor, 8 * factor, 3)
    assert out.plan in RUNS[name].plans(SIX_SCALES, 2)
    ran = out.plan.executed_scales
    assert len(out.bits) == len(out.trace.scales) == len(ran)
    assert [scale for scale, seconds in enumerate(out.timings.scales) if seconds > 0] == list(ran)
    guided = settings.get("guidance_scale") != 1.0
    for scale, trace in zip(ran, out.trace.scales, strict=True):
        entry = out.plan.scales[scale]
        rows = settings["batch"] * (2 if guided and entry.guided else 1)
        assert trace.entropy.shape == (2, rows, SIX_SCALES[scale].size)
        finite = np.isfinite(trace.entropy).sum(axis=(1, 2))
        assert finite.tolist() == [rows * kept for kept in entry.kept_tokens]
        for (layer, _), kept in trace.kept.items():
            assert kept.shape == (rows, 3, entry.kept_tokens[layer])
            attended = np.isfinite(trace.entropy[layer])
            assert [set(np.flatnonzero(row)) for row in attended] == [set(row) for row in kept[:, 0]]
    assert any(trace.kept for trace in out.trace.scales) == (name == "fastvar")
    repeated = generate(RUNS[name], trace=True, **settings)
    np.testing.assert_array_equal(repeated.images, out.images)
    assert repeated.timings.compile == 0.0


def test_the_decoder_is_handed_out_before_the_last_scale_that_runs_has_ended(monkeypatch):
    events = []
    pipe = pipeline(False, "float32")
    run = pipe.programs.run
    monkeypatch.setattr(
        pipe.programs, "run", lambda key, *arguments: (events.append(key[0]), run(key, *arguments))[1]
    )
    generate("fastvar", output_type="np", callback_on_scale_end=lambda scale, _: events.append(scale))
    last = len(SIX_SCALES) - 3  # FastVAR drops two
    assert events.index("decode") < events.index(last)


def test_an_image_does_not_depend_on_its_batch_where_the_plan_does_not():
    together = generate(FastVAR(), batch=3, seed=[4, 5, 6])
    alone = generate(FastVAR(), batch=1, seed=4)
    for scale, bits in enumerate(alone.bits):
        np.testing.assert_array_equal(together.bits[scale][:1], bits)


def test_dropped_scales_leave_the_picture_of_the_scales_before():
    plan = Plan.dense(SIX_SCALES, 2)
    short = dataclasses.replace(plan, scales=(*plan.scales[:-2], ScalePlan.dropped(), ScalePlan.dropped()))
    dense = generate("dense", output_type="latent", trace=True)
    dropped = generate(short, output_type="latent", trace=True)
    for one, other in zip(dropped.bits, dense.bits[:-2], strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(dropped.images, dense.trace.scales[3].code_map, atol=1e-6)
    middle = dataclasses.replace(plan, scales=(*plan.scales[:2], ScalePlan.dropped(), *plan.scales[3:]))
    skipped = generate(middle, trace=True)
    assert [trace.bits.shape[1:3] for trace in skipped.trace.scales] == [*SIX_SCALES[:2], *SIX_SCALES[3:]]


def test_a_scale_without_guidance_equals_one_at_guidance_one():
    """Up to the scale the rows are the same; there the unconditional ones are not used."""
    settings = [3.0] * 4 + [1.0] * 2
    dense = generate("dense", trace=True, guidance_scale=settings)
    plan = Plan.dense(SIX_SCALES, 2)
    scales = [dataclasses.replace(entry, guided=scale < 4) for scale, entry in enumerate(plan.scales)]
    out = generate(dataclasses.replace(plan, scales=tuple(scales)), trace=True, guidance_scale=3.0)
    assert len(out.trace.scales[3].logits_raw) == 2
    for one, other in zip(out.trace.scales[4:], dense.trace.scales[4:], strict=True):
        np.testing.assert_allclose(one.logits_raw, other.logits_raw, atol=1e-5)
        np.testing.assert_array_equal(one.bits, other.bits)


def test_every_program_of_a_policy_is_compiled_before_the_first_scale_runs():
    """A hundred prompts, under decisions of every kind, compile nothing any more."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )

    @dataclasses.dataclass(frozen=True)
    class AnyDecision(SkipVAR):
        """SkipVAR whose decisions follow the first feature's digits."""

        def decide(self, features):
            return [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (3, 0)][int(1e6 * features[0, 0]) % 7]

    try:
        generate(AnyDecision())
        assert compiled
        compiled.clear()
        plans = set()
        for seed in range(100):
            out = pipeline(False, "float32")(
                text_features=[tiny.features(1 + seed % 8, seed)],
                policy=AnyDecision(),
                guidance_scale=3.0,
                scale_schedule=SIX_SCALES,
                output_type="np",
                seed=seed,
            )
            assert out.timings.compile == 0.0
            plans.add(out.plan)
        assert len(plans) == 7
        assert compiled == []
    finally:
        jax.monitoring.clear_event_listeners()


def test_plans_share_the_programs_of_scales_they_agree_on():
    pipe = InfinityPipeline(tiny.CONFIG, tiny.parameters(), dtype="float32")

    def run(plan):
        before = len(pipe.programs)
        pipe(text_features=[tiny.features(3)], policy=plan, scale_schedule=SIX_SCALES[:4], output_type="latent")
        return len(pipe.programs) - before

    dense = Plan.dense(SIX_SCALES[:4], 2)
    assert run(dense) == 1 + 4
    assert run("dense") == 0
    # Fewer guided scales: the cache is as long, so only the last scale and the cut are new.
    assert (
        run(
            dataclasses.replace(
                dense, scales=(*dense.scales[:3], dataclasses.replace(dense.scales[3], guided=False))
            )
        )
        == 2
    )


def test_policies_by_name_object_plan_and_file(tmp_path):
    assert {name: type(resolve_policy(name)).__name__.lower() for name in POLICIES} == {
        name: name for name in POLICIES
    }
    assert resolve_policy(FastVAR((0.1, 0.2))) == FastVAR((0.1, 0.2))
    (plan,) = FastVAR().plans(SIX_SCALES, 2)
    assert resolve_policy(plan) == Fixed(plan)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json()))
    assert resolve_policy(str(path)) == Fixed(plan)
    np.testing.assert_array_equal(generate(str(path)).images, generate("fastvar").images)
    with pytest.raises(InputError, match="unknown policy None: choose one of dense, fastvar"):
        resolve_policy(None)
    path.write_text("{}")
    with pytest.raises(InputError, match=r"plan\.json: not a plan: KeyError\('scales'\)"):
        resolve_policy(str(path))


@pytest.mark.parametrize(
    ("policy", "schedule", "message"),
    [
        ("sparse", SIX_SCALES, "unknown policy 'sparse': choose one of dense, fastvar, skipvar"),
        ("nowhere.json", SIX_SCALES, "cannot read the plan nowhere.json: .*No such file"),
        (
            "fastvar",
            SIX_SCALES[:5],
            "policy 'fastvar' needs 6 scales or more, but this run has 5: use policy 'dense'",
        ),
        (
            "skipvar",
            SIX_SCALES[:4],
            "policy 'skipvar' needs 5 scales or more, but this run has 4: use policy 'dense'",
        ),
        (
            Plan.dense(SIX_SCALES, 3),
            SIX_SCALES,
            "the plan is for a transformer of 3 layers, but this one has 2: make a plan for",
        ),
        (
            Plan.dense(SIX_SCALES, 2),
            SIX_SCALES[:2],
            "the plan is for the scales 1x1 1x2 2x2 2x3 3x4 4x4, but this run has 1x1 1x2: choose",
        ),
        (
            dataclasses.replace(
                Plan.dense(SIX_SCALES[:2], 2),
                scales=(ScalePlan((1, 1)), ScalePlan((2, 1))),
                restore_scale=0,
            ),
            SIX_SCALES[:2],
            "the plan selects tokens by scores, which a plan alone does not compute: use policy 'toprovar'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_policies_that_cannot_apply_say_why_and_what_to_use(policy, schedule, message):
    with pytest.raises(InputError, match=message) as error:
        generate(policy, scale_schedule=schedule)
    assert "\n" not in str(error.value)


def test_dense_is_the_plan_that_runs_everything():
    plan = Plan.dense(SIX_SCALES, 2)
    assert Dense().plans(SIX_SCALES, 2) == (plan,)
    out = generate("dense")
    assert out.plan == plan
    np.testing.assert_array_equal(out.images, generate(plan).images)
