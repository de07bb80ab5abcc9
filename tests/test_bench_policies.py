"""Policies compared on the same prompts and seeds: with a tiny model, and with numbers known by hand."""

import dataclasses
import json
import types

import numpy as np
import pytest
from PIL import Image

from bench import policy_cases, quality
from bench.policies import Run, count_flops, run_cases, timed
from bench.policy_cases import Case, all_cases
from bench.policy_rows import draw_frontier, format_rows, make_rows
from bench.scenes import prompts, tokenizer, training
from toprovar_jax.errors import InputError
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.skeleton import random_parameters
from toprovar_jax.models.t5 import T5Encoder
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.pruning.fastvar import FastVAR
from toprovar_jax.pruning.flops import PlanCost
from toprovar_jax.pruning.plan import Plan
from toprovar_jax.pruning.policy import Dense
from toprovar_jax.pruning.profile import Profile
from toprovar_jax.schedule import scale_schedule
from toprovar_jax.text import Tokenizer

CONFIG = training.load_config(training.EMBEDDED_CONFIG.with_name("tiny.json")).model
ASKED = prompts.load_prompts("tuning")[::48]  # one of every other task
PROFILE = Profile(layer_scores=(0.5, 1.0), tau=0.4, crossing="above", prunable_scales=3, usual_scales=2)
SCHEDULE = scale_schedule(pixels="0.06M")


@pytest.fixture(scope="module")
def pipeline():
    models = {"transformer": Infinity, "vae": BSQVAE, "text_encoder": T5Encoder}
    params = {name: random_parameters(model, getattr(CONFIG, name), "float32") for name, model in models.items()}
    words = Tokenizer(tokenizer.build_tokenizer().to_str())
    return InfinityPipeline(CONFIG, params, dtype="float32", tokenizer=words)


def test_every_case_makes_the_same_pictures_of_the_same_prompts_and_seeds(pipeline):
    cases = [Case("dense", Dense()), Case("fastvar", FastVAR())]
    reported = []
    dense, fastvar = run_cases(pipeline, cases, ASKED, num_seeds=2, seed=5, batch_size=1, report=reported.append)
    steps = [f"{step} {case.name}" for case in cases for step in ("compiled", "drew")]
    assert reported == ["counted operations", *steps]
    for run in (dense, fastvar):
        for values in (run.right, run.similarity, run.squared_error, run.flops, run.plans):
            assert np.shape(values)[:2] == (3, 2)
        assert run.loop_ms is None
    assert (dense.similarity == 1).all()
    assert (dense.squared_error == 0).all()
    assert (fastvar.similarity < 1).all()
    assert {plan for plans in fastvar.plans for plan in plans} == {*FastVAR().plans(SCHEDULE, 2)}

    # Prompt 2 under its second seed, on its own.
    own = [
        np.asarray(pipeline(ASKED[2].text, seed=5 + 3 + 2, policy=case.policy, output_type="np").images) / 255
        for case in cases
    ]
    assert fastvar.squared_error[2, 1] == pytest.approx(np.square(own[1] - own[0]).mean(), rel=0.02)

    for run in (dense, fastvar):
        cost = PlanCost(CONFIG.transformer, run.plans[0][0]).loop().total
        assert (run.flops == run.flops[0, 0]).all()
        assert run.flops[0, 0] == pytest.approx(cost, rel=0.2)  # so small a model spends much beside its products
    ((unguided,),) = (counted.values() for counted in count_flops(pipeline, [cases[0]], 1.0).values())
    assert unguided == pytest.approx(dense.flops[0, 0] / 2, rel=0.1)

    again = timed(pipeline, fastvar, ASKED[0], seed=5, num_calls=3)
    assert 0 < again.loop_ms < again.total_ms
    assert again.right is fastvar.right


def made_up_run(name, right, similarity, plan, flops, against=(), loop_ms=1.0):
    return Run(
        case=Case(name, Dense() if name == "dense" else FastVAR(), against),
        right=np.array(right, bool),
        similarity=np.array(similarity, np.float32),
        squared_error=(1 - np.array(similarity, np.float32)) / 10,
        plans=((plan, plan),) * len(right),
        flops=np.full((len(right), 2), flops),
        loop_ms=loop_ms,
        total_ms=loop_ms,
    )


def test_rows_are_means_with_paired_differences():
    tasks = ["counting", "counting", "colors"]
    everything, half = Plan.dense(SCHEDULE, 2), FastVAR().plans(SCHEDULE, 2)[0]
    runs = [
        made_up_run("dense", [[1, 1], [1, 0], [1, 1]], [[1, 1]] * 3, everything, 100.0),
        made_up_run("other", [[1, 1], [0, 0], [1, 1]], [[0.8, 0.9]] * 3, half, 40.0, loop_ms=0.5),
        made_up_run(
            "last",
            [[1, 1], [0, 0], [1, 0]],
            [[0.7, 0.8]] * 3,
            half,
            25.0,
            against=("other", "absent"),
            loop_ms=None,
        ),
    ]
    dense, other, last = make_rows(runs, tasks)
    assert dense.tasks == {"counting": 0.75, "colors": 1}
    assert dense.score.mean == 0.875
    assert (dense.similarity.mean, dense.similarity.low, dense.peak_signal_to_noise.mean) == (1, 1, 100)
    assert dense.changes == {}
    assert other.score.mean == 0.75
    assert other.peak_signal_to_noise.mean == pytest.approx(-10 * np.log10(0.015), rel=1e-5)
    assert (other.flops, other.flops_share) == (40, 0.4)
    assert other.changes["dense"].score.mean == -0.125
    assert other.changes["dense"].similarity.mean == pytest.approx(-0.15)
    # Of the two counting prompts one is worse by half, so that resamples lose none, half or all of it.
    assert (other.changes["dense"].score.low, other.changes["dense"].score.high) == (-0.25, 0)
    assert list(last.changes) == ["dense", "other"]
    assert last.changes["other"].score.mean == pytest.approx(-0.25)
    assert last.plans == [(1.0, half.table().splitlines())]

    lines = format_rows([dense, other, last]).splitlines()
    assert lines[2].split() == [
        "other",
        "75.0",
        "50.0",
        "to",
        "100.0",
        "0.850",
        "18.2",
        "0.00",
        "2.50x",
        "0.5",
        "2.00x",
    ]
    assert lines[3].split()[-3:] == ["4.00x", "-", "-"]
    assert lines[4:] == [
        "other less dense, at 0.40 of its operations: score -12.5 (-25.0 to +0.0), SSIM -0.150 (-0.150 to -0.150)",
        "last less dense, at 0.25 of its operations: score -37.5 (-50.0 to -25.0), SSIM -0.250 (-0.250 to -0.250)",
        "last less other, at 0.62 of its operations: score -25.0 (-25.0 to -25.0), SSIM -0.100 (-0.100 to -0.100)",
    ]
    assert draw_frontier([dense, other, last]).width > 1000


def test_toprovar_needs_a_profile():
    without, full = all_cases(None), all_cases(PROFILE)
    assert [case.name for case in without] == ["dense", "fastvar", "skipvar"]
    assert full[: len(without)] == without
    assert len({case.policy for case in full}) == len({case.name for case in full}) == len(full)
    for index, case in enumerate(full):
        assert {*case.against} <= {earlier.name for earlier in full[:index]}
        assert case.policy.plans(SCHEDULE, 2)


def test_more_profiles_are_compared_by_name(tmp_path):
    PROFILE.save(tmp_path)
    more = quality.more_profiles([f"gentle={tmp_path}"])
    assert more == {"gentle": PROFILE}
    (gentle,) = (case for case in all_cases(PROFILE, more=more) if case.name == "toprovar gentle")
    assert gentle.against == ("fastvar", "skipvar", "toprovar")
    for argument in ("gentle", "gentle=", f"gentle={tmp_path / 'nowhere'}"):
        with pytest.raises(InputError, match=r"^no profile at 'gentle.*': pass name=FOLDER, with a folder that"):
            quality.more_profiles([argument])


def test_cases_are_chosen_by_name():
    known = all_cases(PROFILE)
    assert [case.name for case in policy_cases.choose(["toprovar"], known)] == ["dense", "toprovar"]
    assert policy_cases.choose(["all"], known) == [*known]
    with pytest.raises(
        InputError, match=r"unknown policy 'topovar': choose from all, dense, fastvar, skipvar, toprovar, [^;]+$"
    ):
        policy_cases.choose(["topovar"], known)
    with pytest.raises(
        InputError, match="dense, fastvar, skipvar; those of ToProVAR need a profile, so calibrate the"
    ):
        policy_cases.choose(["toprovar"], all_cases(None))


def test_the_command_compares_policies(pipeline, tmp_path, monkeypatch, capsys):
    values = {
        "checkpoint": tmp_path,
        "prompts": "tuning",
        "policies": ["fastvar"],
        "profiles": [],
        "num_seeds": 1,
        "guidance_scale": None,
        "temperature": None,
        "dtype": "float32",
        "batch_size": 1,
        "num_timed_calls": 1,
        "seed": 5,
        "output": str(tmp_path / "results" / "compared"),
    }
    held_out = dataclasses.replace(ASKED[0], held_out=True)
    monkeypatch.setattr(quality.flags, "FLAGS", types.SimpleNamespace(**values))
    monkeypatch.setattr(quality, "load_prompts", lambda _: (*ASKED[:2], held_out))
    monkeypatch.setattr(InfinityPipeline, "from_pretrained", lambda *_: pipeline)
    monkeypatch.setattr(quality.command_line, "use_compilation_cache", lambda: None)
    records = []
    write = quality.report.write
    monkeypatch.setattr(
        quality.report, "write", lambda *args: records.append(json.loads(write(*args).read_text()))
    )
    quality.main()
    printed = capsys.readouterr().out.splitlines()
    table = ["policy", "dense", "fastvar", "fastvar"]
    drawn, judged = ["after"] * 2, ["after"]
    dense_rows, both = [*drawn, *judged, *table[:2]], [*judged, *table]
    expected = ["after", *dense_rows, *drawn, *both * 3, "wrote"]
    assert [line.split()[0] for line in printed] == expected
    assert [line.split(" s ", 1)[1] for line in printed[:4]] == [
        "counted operations",
        "compiled dense",
        "drew dense",
        "judged dense:",
    ]
    # What is known is written at once: the pictures of each, then the times of each.
    known = [[row["loop_ms"] is not None for row in record["policies"]] for record in records]
    assert known == [[False], [False, False], [True, False], [True, True]]
    record = records[-1]
    dense, fastvar = record["policies"]
    assert (record["seed"], record["guidance_scale"]) == (5, 3.0)
    assert list(dense["tasks"]) == [prompt.scene.task for prompt in ASKED[:2]]
    assert fastvar["flops"] < dense["flops"]
    assert fastvar["changes"]["dense"]["similarity"]["mean"] < 0
    with Image.open(tmp_path / "results" / "compared.png") as frontier:
        assert frontier.width > 1000
