"""The speed benchmark, end to end on a tiny model and piece by piece."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import kernel_profile, report, speed, speed_run, stage_clock
from bench.floors import decoder_work, stage_floors
from bench.full_size import aggressive_profile, full_size_config, load_pipeline, word_tokenizer
from bench.kernel_profile import Kernel
from tests import tiny
from toprovar_jax import checkpoint
from toprovar_jax.batch_programs import decode_pixels
from toprovar_jax.config import ARCHITECTURES, T5Config
from toprovar_jax.errors import InputError
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.skeleton import abstract_parameters
from toprovar_jax.models.t5 import T5Encoder
from toprovar_jax.output import PipelineOutput, Timings
from toprovar_jax.programs import Programs, Recipe
from toprovar_jax.pruning.flops import PlanCost
from toprovar_jax.pruning.plan import Plan
from toprovar_jax.pruning.toprovar import ToProVAR
from toprovar_jax.schedule import Grid, scale_schedule


def full_stages(scales):
    return ["request", "text encoder", "start", *(f"scale {scale}" for scale in range(scales)), "decoder"]


SCALES = 7  # of the pixel budget 0.06M
STAGES = full_stages(SCALES)
CASE = speed_run.Case(
    model="tiny",
    policy="dense",
    dtype="bfloat16",
    pixels="0.06M",
    batch=2,
    runs=2,
    warmups=1,
    cache_dir="",
    profile=True,
)


@pytest.fixture(scope="module")
def measured():
    return speed_run.measure(tiny.pipeline(), CASE)


def test_all_stages_of_a_call_are_timed_and_add_up_to_it(measured):
    assert [stage["stage"] for stage in measured["stages"]] == STAGES
    for stage in measured["stages"]:
        assert 0 <= stage["ms"]["min"] <= stage["ms"]["median"] <= stage["ms"]["max"]
        assert stage["host_ms"]["min"] > 0
    floors = [stage["floor_ms"] for stage in measured["stages"]]
    assert floors[0] == 0 < min(floors[1:])
    assert measured["floor_ms"] == pytest.approx(sum(floors))
    whole = sum(stage["ms"]["median"] for stage in measured["stages"])
    assert 0 < measured["loop_ms"]["median"] < whole
    assert measured["images_per_second"] == pytest.approx(2e3 / measured["total_ms"]["median"])


def test_a_stage_lasts_from_the_end_of_the_one_before_and_the_host_may_run_ahead():
    programs = Programs()
    slow = Recipe(lambda x: jax.lax.fori_loop(0, 200, lambda _, y: jnp.sin(y @ y), x), (jnp.ones((100, 100)),), {})
    programs.compile({("slow",): lambda: slow})

    seconds = []

    def call():
        begun = time.perf_counter()
        result = jnp.ones((100, 100))
        for _ in range(3):
            result = programs.run(("slow",), result)
        jax.block_until_ready(result)
        time.sleep(0.05)
        seconds.append(time.perf_counter() - begun)

    stages = stage_clock.time_stages(programs, call)
    assert len(seconds) == 1  # the call that times the first program goes no further
    assert [stage.name for stage in stages] == ["request", "slow", "slow", "slow"]
    assert stages[3].milliseconds > 50  # what comes after the last program is its own
    assert sum(stage.milliseconds for stage in stages) == pytest.approx(1e3 * seconds[0], rel=0.2)
    # Afterwards the programs run as before.
    assert "run" not in vars(programs)


def test_stages_are_named_by_what_they_do_and_their_scale():
    plan = Plan.dense((Grid(1, 1), Grid(2, 2), Grid(3, 3)), 1)
    name = stage_clock.StageNamer()
    keys = [("text", (1, 8)), ("start",), ("scale", "shape", plan.step(0)), ("observe",), ("scale", plan.step(2))]
    names = [name(key) for key in [*keys, ("decode", 1)]]
    assert names == ["text encoder", "start", "scale 0", "observe 0", "scale 2", "decoder"]


def test_a_call_without_programs_is_no_measurement():
    with pytest.raises(RuntimeError, match="no program was run"):
        stage_clock.time_stages(Programs(), lambda: None)


def test_a_profile_gives_every_stage_its_kernels():
    pipe = tiny.pipeline()
    profile = kernel_profile.profile(pipe.programs, lambda: speed_run.generate(pipe, CASE))
    assert list(profile) == STAGES[1:]
    for stage in STAGES[3:]:
        found = profile[stage]
        assert found["kernels"] == sum(count for _, count in found["kinds"].values()) > 0
        assert found["kernel_ms"] == pytest.approx(sum(time for time, _ in found["names"].values()))


def test_kernels_belong_to_the_stage_that_they_start_in():
    second = 1e9
    marks = [Kernel("later", 2 * second, 1), Kernel("first", second, 1)]
    kernels = [Kernel("a", 1.5 * second, 1), Kernel("b", 2 * second - 1e5, 1), Kernel("before", 0.5 * second, 1)]
    assigned = kernel_profile.assign(marks, kernels)
    assert {stage: [kernel.name for kernel in found] for stage, found in assigned.items()} == {
        "first": ["a"],
        "later": ["b"],  # its clock is a little behind
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopB_NNT", "matrix product"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("flash_attention_entropy", "attention"),
        ("triton_softmax_79", "norm and reduction"),
        ("loop_dynamic_update_slice_fusion_7", "copy"),
        ("MemcpyD2D", "copy"),
        ("loop_add_fusion_1", "elementwise"),
        ("loop_convert_fusion_1", "elementwise"),
    ],
)
def test_the_kind_of_a_kernel_is_told_by_its_name(name, kind):
    assert kernel_profile.kind(name) == kind


def test_flat_images_and_constant_bits_are_refused():
    timings = Timings(0, 0, (), 0)
    noise = np.random.default_rng(0).integers(0, 255, (1, 8, 8, 3), np.uint8)
    bits = np.asarray([[[[0, 1]]]], np.uint8)
    plan = Plan.dense((Grid(1, 1),), 1)
    speed_run.require_sane(PipelineOutput(noise, (bits,), plan, timings, None))
    for images, scale_bits in [(np.zeros_like(noise), bits), (noise, np.zeros_like(bits))]:
        with pytest.raises(InputError, match="the images are flat"):
            speed_run.require_sane(PipelineOutput(images, (scale_bits,), plan, timings, None))


def test_models_of_full_size_have_what_a_release_has():
    config = full_size_config("infinity_8b", T5Config())
    assert config.transformer.patchify
    assert config.vae.stride == 8
    assert full_size_config("infinity_2b").vae.stride == 16
    batch = word_tokenizer().encode([speed_run.PROMPT])
    assert batch.lengths.tolist() == [20]


def test_floors_of_the_release_are_those_of_its_shapes():
    config = full_size_config("infinity_2b", T5Config())
    models = {"transformer": Infinity, "vae": BSQVAE, "text_encoder": T5Encoder}
    params = {
        name: abstract_parameters(model, getattr(config, name), "bfloat16") for name, model in models.items()
    }
    plan = Plan.dense(scale_schedule(), config.transformer.depth)
    floors = stage_floors(config, params, plan, dtype="bfloat16", batch=1, text_tokens=20)
    assert list(floors) == full_stages(13)[1:]
    # Weights: 24 layers of flan-t5-xl.
    assert floors["text encoder"] == pytest.approx(24 * (4 * 2048**2 + 3 * 2048 * 5120) * 2 / 4.3e9)
    # Products: the decoder's, as XLA counts them, which leaves out those with padding.
    shape = jax.ShapeDtypeStruct((1, 32, 32, config.vae.code_dim), jnp.float32)
    decode = functools.partial(decode_pixels, config=config.vae, dtype="bfloat16")
    counted = jax.jit(decode).lower(params["vae"], shape).cost_analysis()["flops"]
    assert decoder_work(params["vae"]["decoder"], 32 * 32) == pytest.approx(counted, rel=0.01)
    assert floors["decoder"] == pytest.approx(1e3 * decoder_work(params["vae"]["decoder"], 64 * 64) / 790e12)
    float8 = stage_floors(config, params, plan, dtype="float8_e4m3fn", batch=1, text_tokens=20)
    assert float8["scale 0"] == pytest.approx(
        floors["scale 0"] * 16 / 28, rel=0.01
    )  # 12 of 14 squares of weights in half
    assert 0.7 < float8["scale 12"] / floors["scale 12"] < 0.8
    assert {stage for stage in floors if float8[stage] != floors[stage]} == {
        stage for stage in floors if stage.startswith("scale")
    }


@pytest.mark.parametrize(
    ("model", "reported", "speedup"), [("infinity_2b", 3.4, 5.68), ("infinity_8b", 2.7, 3.06)]
)
def test_the_aggressive_profile_leaves_room_to_save_what_the_paper_reports(model, reported, speedup):
    config, schedule = ARCHITECTURES[model], scale_schedule()

    def loop_floor(plan):
        cost = PlanCost(config, plan)
        return sum(cost.floor_seconds(scale) for scale in range(len(schedule)))

    plan = ToProVAR(aggressive_profile(model)).plans(schedule, config.depth)[0]
    dense = Plan.dense(schedule, config.depth)
    # Small scales take longer than their floor, and they are the larger part where much is pruned.
    ratio = loop_floor(dense) / loop_floor(plan)
    assert ratio == pytest.approx(speedup, rel=0.01)
    assert ratio > reported


def test_an_unknown_model_is_named():
    with pytest.raises(
        InputError, match=r"unknown model 'nothing': pass a checkpoint's folder or one of .*infinity_2b"
    ):
        load_pipeline("nothing", "bfloat16")


def test_results_of_different_cases_have_different_names():
    plan = dataclasses.replace(CASE, pixels="1M", batch=1, policy="some/plan.json")
    cases = [CASE, plan, dataclasses.replace(plan, dtype="float8_e4m3fn")]
    names = ["speed_tiny_dense_0.06M_batch2", "speed_tiny_plan", "speed_tiny_plan_float8_e4m3fn"]
    assert [speed.result_name(case) for case in cases] == names


def test_the_command_times_a_checkpoint_from_a_cold_and_from_a_warm_start(tmp_path):
    folder = tmp_path / "tiny"
    checkpoint.save(folder, tiny.CONFIG, tiny.parameters(), dtype="float32", tokenizer=tiny.tokenizer_json())
    command = [sys.executable, "-m", "bench.speed", "--policy=dense", f"--model={folder}", "--pixels=0.06M"]
    command += [
        "--dtype=float8_e4m3fn",
        "--runs=1",
        "--warmups=1",
        f"--cache_dir={tmp_path / 'cache'}",
        f"--out={tmp_path}",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr
    cold = json.loads((tmp_path / "speed_tiny_dense_float8_e4m3fn_0.06M_cold.json").read_text())
    warm = json.loads((tmp_path / "speed_tiny_dense_float8_e4m3fn_0.06M.json").read_text())
    assert cold["cold"]
    assert cold["compiled_programs"] >= SCALES
    assert not warm["cold"]
    assert warm["compiled_programs"] == 0
    assert warm["dtype"] == "float8_e4m3fn"
    # Rounded to float8 it takes less memory than the checkpoint's parameters in any other precision.
    bfloat16 = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny.parameters("bfloat16")))
    assert warm["parameter_bytes"] < bfloat16
    assert warm["cold_start"]["start_s"] == cold["start_s"]
    assert [stage["stage"] for stage in warm["stages"]] == STAGES
    assert warm["command"].startswith("python -m bench.speed --policy=dense")
    printed = done.stdout.splitlines()
    assert any(line.startswith(f"scale {SCALES - 1} ") for line in printed)


def test_policies_are_compared_line_by_line():
    result = {
        "policy": "some/plan.json",
        "total_ms": {"median": 30.0},
        "floor_ms": 20.0,
        "loop_ms": {"median": 21.0},
        "policy_ms": {"median": 1.0},
        "stages": [{"stage": "decoder", "ms": {"median": 7.0}}],
        "images_per_second": 33.333,
        "peak_device_bytes": 12_340_000_000,
    }
    _, line = speed.comparison_table([result]).splitlines()
    assert line.split() == ["plan", "30.0", "20.0", "1.50", "21.0", "1.0", "7.0", "33.33", "12.34"]


def test_the_command_passes_on_what_is_wrong_with_a_case(tmp_path):
    command = [sys.executable, "-m", "bench.speed", "--model=nothing", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("error: unknown model 'nothing'")
    assert done.stderr.splitlines()[-1] == "error: dense was not timed: see the line above"


def test_results_name_their_commit_also_where_git_or_the_history_is_missing(monkeypatch):
    monkeypatch.delenv("SOURCE_COMMIT", raising=False)
    monkeypatch.setenv("PATH", "")
    assert report.provenance()["commit"] == "unknown"
    monkeypatch.setenv("SOURCE_COMMIT", "5652dc1")
    assert report.provenance()["commit"] == "5652dc1"


def test_results_do_not_tell_where_a_machine_keeps_its_files(monkeypatch):
    arguments = ["bench", "--out", "/home/me/results", "--profiles=a=/mnt/p,b=rel/q", "--num=1/2"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert report.provenance()["command"].endswith(" --out results --profiles=a=p,b=rel/q --num=1/2")
