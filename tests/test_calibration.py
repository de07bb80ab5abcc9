"""Calibration: tables by hand, the search on made-up similarities, and the whole way on a tiny random model."""

import dataclasses
import functools

import numpy as np
import pytest

from tests import tiny
from toprovar_jax.calibration import candidates, layer_tables
from toprovar_jax.calibration.observation import Observation, deal
from toprovar_jax.calibration.search import Search, Target, calibrate, start_scales
from toprovar_jax.calibration.trials import Trials
from toprovar_jax.config import CheckpointConfig
from toprovar_jax.errors import InputError
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.skeleton import random_parameters
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.pruning.flops import PlanCost
from toprovar_jax.pruning.toprovar import ToProVAR
from toprovar_jax.schedule import Grid
from toprovar_jax.text import Tokenizer

PROMPTS = ["a red cat", "a blue dog", "a cat left of a dog", "a dog", "a red dog and a blue cat", "a cat"]
DEPTH = 4
CONFIG: CheckpointConfig = dataclasses.replace(
    tiny.CONFIG, transformer=dataclasses.replace(tiny.CONFIG.transformer, depth=DEPTH, num_chunks=1)
)


@functools.cache
def pipeline():
    params = tiny.parameters() | {"transformer": random_parameters(Infinity, CONFIG.transformer, "float32")}
    return InfinityPipeline(CONFIG, params, dtype="float32", tokenizer=Tokenizer(tiny.tokenizer_json()))


def test_targets():
    assert Target.from_text("speedup=3.4") == Target(speedup=3.4)
    assert Target.from_text("ssim=0.85") == Target(similarity=0.85)
    assert str(Target(speedup=3.4)) == "speedup=3.4"
    assert str(Target(similarity=0.85)) == "ssim=0.85"
    for text in ("speedup=1", "speedup=nan", "ssim=1", "ssim", "psnr=30", ""):
        with pytest.raises(InputError, match=r"^unknown target .*: choose speedup=N above 1, or ssim=N between"):
            Target.from_text(text)


def test_prompts_are_dealt_long_ones_first():
    requests = deal([str(10**i) for i in range(8)], 6, 3, seed=1)
    assert [len(request.prompts) for request in requests] == [3, 3]
    assert len({prompt for request in requests for prompt in request.prompts}) == 6
    longest = sorted((len(prompt) for request in requests for prompt in request.prompts), reverse=True)[:2]
    assert [len(request.prompts[0]) for request in requests] == longest
    assert sorted(seed for request in requests for seed in request.seeds) == list(range(6, 12))
    assert requests == deal([str(10**i) for i in range(8)], 6, 3, seed=1)
    assert requests != deal([str(10**i) for i in range(8)], 6, 3, seed=2)
    few = deal(["a", "b"], 5, 4, seed=0)
    assert sorted(prompt for request in few for prompt in request.prompts) == ["a"] * 4 + ["b"] * 4


def test_tables_by_singular_ratio_keep_what_is_ambiguous_or_undefined():
    ratios = np.array([[2.0, 9.0, 4.0, np.inf, 5.0]] * 3 + [[2.0, 9.0, 8.0, np.inf, 5.0]] * 3)
    two = layer_tables.by_singular_ratio("ratio", ratios, 2)
    assert two.detail == (True, False, False, False, True)  # layer 2 changes sides: 4 or 8 around the border 5.5
    assert two.name == "2 by ratio"
    assert np.exp(-two.beta * (5.5 - 1)) == pytest.approx(0.5)
    four = layer_tables.by_singular_ratio("ratio", ratios, 4)
    assert four.detail == (True, True, True, False, True)
    assert four.beta is None
    assert four.scores == (1.0, 1.0, 1.0, 0.0, 1.0)


def test_candidate_tables_differ_and_prune_something():
    ratios = np.random.default_rng(0).uniform(2, 9, (1, 9)).repeat(4, axis=0)
    tables = layer_tables.candidates(ratios)
    assert tables[0].detail == (True,) * 9
    assert tables[1].detail == (False, *(True,) * 7, False)
    assert [sum(table.detail) for table in tables[2:]] == [4, 6]
    undefined = np.full((4, 9), np.inf)
    assert len(layer_tables.candidates(undefined)) == 2
    assert layer_tables.middle_layers(32).detail == tuple(4 <= layer < 28 for layer in range(32))


def test_candidates_of_every_stage_are_possible_profiles():
    tables = layer_tables.candidates(np.random.default_rng(0).uniform(2, 9, (4, DEPTH)))
    schedule = tuple(Grid(side, side) for side in (1, 2, 4, 6, 8, 12, 16))
    for num_scales in range(2, 8):
        last = candidates.of_last_scales(DEPTH, num_scales, guided=True)
        for best in [*last, *candidates.of_tables(None, tables, num_scales)]:
            others = [*candidates.of_tables(best, tables, num_scales), *candidates.of_the_rest(best, num_scales)]
            for candidate in [best, *others]:
                assert 0 < candidate.prunable_scales < num_scales
                assert candidate.dropped_scales <= candidate.prunable_scales
                ToProVAR(candidate.profile(1.0)).plans(schedule[-num_scales:], DEPTH)
    assert all(candidate.conditional_scales == 0 for candidate in candidates.of_last_scales(9, 10, guided=False))


def test_starts_follow_from_the_shares():
    shares = np.array([[0.9, 0.1, 0.6, 0.2], [0.9, 0.6, 0.1, 0.9], [0.9, 0.2, 0.3, 0.9]], np.float32)
    assert start_scales(shares, 2, "above", 0.5) == [3, 2, 4]
    assert start_scales(shares, 2, "below", 0.15) == [2, 3, 4]
    assert start_scales(shares, 1, "above", 0.5) == [1, 1, 1]


class MadeUp(Trials):
    """Trials whose similarity is a formula: one table is best, saving costs, and some pictures suffer."""

    def __init__(self, best_table, suffers=None):
        rng = np.random.default_rng(0)
        self._pipe = pipeline()
        self._requests = deal(PROMPTS, 8, 2, seed=0)
        self._text_tokens = 8
        self._costs = {}
        self.drawn = []
        self._best_table = best_table
        self._suffers = np.zeros(8, bool) if suffers is None else suffers
        shares = rng.uniform(0.3, 0.5, (8, 6)).astype(np.float32)
        shares[:, 1] += 0.2 * self._suffers
        self.observed = Observation(
            schedule=tuple(Grid(side, side) for side in (1, 4, 8, 12, 16, 20)),
            guided=True,
            pictures=np.zeros((8, 32, 32, 3), np.uint8),
            focused_shares=shares,
            singular_ratios=np.array([[9.0, 2.0, 3.0, 8.0]] * 8),
        )

    def similarity(self, profile, start, num_batches):
        self.drawn.append((self.runs(profile, start), num_batches))
        lost = 0.02 * profile.alpha_max + 0.1 * profile.dropped_scales + 0.05 * profile.conditional_scales
        lost += 0.05 * (profile.layer_scores != self._best_table)
        suffering = 0.3 * self._suffers[: 2 * num_batches] * (start < 4)
        return np.ones(2 * num_batches) - lost - suffering


def searched(trials, target):
    lines = []
    search = Search(trials, lines.append)
    result = search.reach(target)
    assert len(lines) == len(search.tried) > 5
    stages = [drawn for drawn in getattr(trials, "drawn", ()) if drawn[1] < trials.num_batches]
    assert len(stages) == len(set(stages))  # nothing is tried twice
    return result, search


def test_the_search_finds_the_best_settings_at_a_speedup():
    trials = MadeUp(best_table=(0.0, 1.0, 1.0, 0.0))
    result, _ = searched(trials, Target(speedup=1.6))
    assert result.candidate.table.scores == (0.0, 1.0, 1.0, 0.0)
    assert result.profile.dropped_scales == 0
    assert 1.6 <= result.speedup < 1.75
    plans = ToProVAR(result.profile).plans(trials.observed.schedule, DEPTH)
    cost = [PlanCost(CONFIG.transformer, plan, text_tokens=8).loop().total for plan in plans]
    assert cost[-1] / cost[0] == pytest.approx(result.speedup)
    # Waiting does not pay off here, so that no picture of the trials waits.
    first = 6 - result.candidate.prunable_scales
    assert set(start_scales(trials.observed.focused_shares, first, "above", result.profile.tau)) == {first}
    assert result.profile.crossing == "above"
    assert result.profile.usual_scales == result.profile.prunable_scales


def test_the_search_finds_the_largest_speedup_at_a_similarity():
    result, search = searched(MadeUp(best_table=(0.0, 1.0, 1.0, 0.0)), Target(similarity=0.893))
    assert result.similarity >= 0.893
    better = [tried for tried in search.tried if tried["ssim"] >= 0.893]
    assert result.speedup >= 0.9 * max(tried["speedup"] for tried in better)


def test_a_target_out_of_reach_is_refused():
    with pytest.raises(InputError, match=r"^no settings reach a speed-up of 900.00: choose a lower target$"):
        searched(MadeUp((1.0,) * 4), Target(speedup=900.0))
    trials = MadeUp((1.0,) * 4)
    trials.similarity = lambda _, __, num_batches: np.full(2 * num_batches, 0.5)
    with pytest.raises(InputError, match=r"^no settings keep ssim=0.9: choose a lower target$"):
        searched(trials, Target(similarity=0.9))


def test_pictures_that_suffer_start_later_where_the_shares_tell_them():
    suffers = np.arange(8) % 2 == 0
    result, _ = searched(MadeUp((0.0, 1.0, 1.0, 0.0), suffers), Target(speedup=1.3))
    starts = start_scales(
        MadeUp((), suffers).observed.focused_shares,
        6 - result.candidate.prunable_scales,
        result.profile.crossing,
        result.profile.tau,
    )
    assert result.profile.crossing == "below"
    assert min(np.array(starts)[suffers]) > max(np.array(starts)[~suffers])


def test_a_random_model_is_calibrated(monkeypatch):
    # Programs of every trial are compiled: a few trials of the last two scales are enough here.
    monkeypatch.setattr(candidates, "_PRUNABLE_SCALES", 2)
    for stage, count in (("of_last_scales", 3), ("of_tables", 1), ("of_the_rest", 1)):
        tried = getattr(candidates, stage)
        monkeypatch.setattr(candidates, stage, lambda *args, tried=tried, count=count: tried(*args)[-count:])
    lines = []
    profile = calibrate(
        pipeline(), PROMPTS, Target(speedup=1.5), num_pictures=4, batch_size=2, seed=3, report=lines.append
    )
    assert profile.calibration["pictures"] == 4
    assert profile.calibration["speedup"] >= 1.5
    assert 0 < profile.calibration["ssim"] <= 1
    assert len(lines) == len(profile.calibration["tried"])
    output = pipeline()(PROMPTS[:1], policy=ToProVAR(profile), output_type="np")
    assert output.plan in ToProVAR(profile).plans(output.plan.schedule, DEPTH)
    with pytest.raises(InputError, match="calibration draws prompts: convert the checkpoint again with"):
        calibrate(InfinityPipeline(CONFIG, pipeline().params, dtype="float32"), PROMPTS, Target(speedup=2.0))
