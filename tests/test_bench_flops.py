"""The counter on cases known by hand, and XLA's count of real steps against the formula."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from bench.flop_counter import Counter, countable, counted_flops
from bench.flops import TOLERANCE, examples
from bench.full_size import full_size_config
from pallas_kernels import flash_attention_entropy
from toprovar_jax.pruning.plan import Plan, ScalePlan
from toprovar_jax.pruning.policy import Dense, Fixed
from toprovar_jax.pruning.skipvar import SkipVAR
from toprovar_jax.schedule import scale_schedule

SCHEDULE = scale_schedule()[:7]


def sliced_counter(model, dtype="bfloat16"):
    """Counts four blocks of a release on its first seven scales."""
    config = full_size_config(model)
    transformer = dataclasses.replace(config.transformer, depth=4, num_chunks=1)
    return Counter(dataclasses.replace(config, transformer=transformer), dtype, SCHEDULE)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product_by_hand():
    lowered = jax.jit(jnp.matmul).lower(floats(4, 5), floats(5, 6))
    assert counted_flops(lowered) == counted_flops(lowered.compile()) == 2 * 4 * 5 * 6


def test_attention_by_hand():
    def lower():
        attend = jax.jit(lambda q, k, v: flash_attention_entropy(q, k, v, kv_length=5000).output)
        return attend.lower(floats(2, 300, 3, 64), floats(2, 6000, 3, 64), floats(2, 6000, 3, 64))

    products = 2 * 2 * (2 * 3 * 300 * 5000 * 64)
    with_loop = counted_flops(lower())
    with countable():
        assert counted_flops(lower()) == pytest.approx(products, rel=0.05)
    # What the counter is for: the body of a loop over keys is counted once.
    assert counted_flops(lower()) == with_loop < 0.6 * products


@pytest.mark.parametrize("scale", [0, 5])
def test_the_compiled_program_counts_as_the_lowered_one(scale):
    dense = Plan.dense(SCHEDULE, 4)
    with countable():
        programs, recipes = sliced_counter("infinity_2b", "float32").programs(Fixed(dense))
        lowered = recipes[programs.scales[dense][scale].run]().lower()
        compiled = counted_flops(lowered.compile())
    assert compiled == pytest.approx(counted_flops(lowered), rel=0.01)


@pytest.mark.parametrize("model", ["infinity_2b", "infinity_8b"])
def test_the_formula_is_what_xla_counts(model):
    counter = sliced_counter(model)
    with countable():
        for name, (policy, index) in examples(depth=4).items():
            plan = policy.plans(SCHEDULE, 4)[index]
            counts = counter.count(policy, plan)
            assert tuple(counts) == plan.executed_scales
            for scale, count in counts.items():
                assert count.xla_flops == pytest.approx(count.formula_flops, rel=0.01), (name, scale)
                # Choosing tokens costs next to nothing; SkipVAR decodes two small pictures.
                if not isinstance(policy, SkipVAR):
                    assert count.policy_flops < 0.01 * count.xla_flops


def test_what_is_left_out_is_not_counted():
    scales = list(Plan.dense(SCHEDULE, 4).scales)
    scales[5] = ScalePlan((144, 0, 40, 144))
    scales[6] = ScalePlan((256, 24, 24, 24), guided=False)
    plan = Plan(SCHEDULE, 4, tuple(scales), "entropy", restore_scale=3)
    counter = sliced_counter("infinity_2b")
    with countable():
        everything = counter.count(Dense(), Plan.dense(SCHEDULE, 4))
        rest = counter.count(Fixed(plan), plan)
    assert [everything[scale] == rest[scale] for scale in (0, 1, 2, 4)] == [True] * 4
    assert everything[3].xla_flops == pytest.approx(rest[3].xla_flops, rel=1e-3)  # saves what later scales restore
    # By hand: of 4 layers with 144 tokens each, two run in full, one not at all and one on 40 tokens.
    assert rest[5].xla_flops / everything[5].xla_flops == pytest.approx((2 * 144 + 40) / (4 * 144), rel=0.02)
    # The conditional rows are half of the batch.
    assert rest[6].xla_flops / everything[6].xla_flops == pytest.approx((256 + 3 * 24) / (4 * 256) / 2, rel=0.05)


def test_the_command_prints_and_writes_every_policy(tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench.flops",
        "--model=infinity_layer12",
        "--pixels=0.06M",
        f"--out={tmp_path}",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    written = json.loads((tmp_path / "flops_infinity_layer12.json").read_text())
    policies = written["policies"]
    assert list(policies) == list(examples(depth=12))
    assert run.stdout.count("XLA TFLOP") == run.stdout.count("\ntotal ") == len(policies)
    assert policies["dense"]["of_dense"] == 1
    for name, found in policies.items():
        total, scales = found["total"], found["scales"].values()
        assert total["xla_flops"] == pytest.approx(sum(scale["xla_flops"] for scale in scales))
        assert total["xla_flops"] == pytest.approx(total["formula_flops"], rel=TOLERANCE)
        assert found["of_dense"] < 1 or name == "dense"
