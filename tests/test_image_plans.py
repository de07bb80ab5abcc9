"""Pictures in batches, each under the plan that it would follow alone."""

import dataclasses

import numpy as np

from bench.image_plans import draw
from tests import tiny
from toprovar_jax.pruning.fastvar import FastVAR
from toprovar_jax.pruning.profile import Profile
from toprovar_jax.pruning.skipvar import SkipVAR
from toprovar_jax.pruning.toprovar import ToProVAR

PROMPTS = ["a red cat", "a blue dog", "a cat left of a dog", "a dog", "a red dog and a blue cat"]
SEEDS = [7, 1, 4, 9, 3]
SETTINGS = {"scale_schedule": tiny.SIX_SCALES}


@dataclasses.dataclass(frozen=True)
class ByEdges(SkipVAR):
    """Pictures that change much keep all scales."""

    border: float = 0.0

    def decide(self, features):
        return (0, 1) if (features[:, 0] > self.border).any() else (2, 0)


def alone(policy):
    outputs = [
        tiny.pipeline()(prompt, seed=seed, policy=policy, output_type="np", **SETTINGS)
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    return [output.images[0] for output in outputs], [output.plan for output in outputs]


def check(policy, num_plans):
    pictures, plans = draw(tiny.pipeline(), PROMPTS, SEEDS, policy, 2, **SETTINGS)
    expected, followed = alone(policy)
    assert plans == followed
    assert len(set(plans)) == num_plans
    for one, other in zip(pictures, expected, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_every_picture_follows_its_own_decision():
    borders = []

    @dataclasses.dataclass(frozen=True)
    class Noted(SkipVAR):
        def decide(self, features):
            borders.extend(features[:, 0])
            return 0, 0

    alone(Noted())
    check(ByEdges(border=float(np.median(borders))), 2)


def test_every_picture_starts_pruning_where_it_would_alone():
    profile = Profile((0.0, 1.0), tau=0.5, crossing="above", prunable_scales=3, usual_scales=3, alpha_max=2.0)
    _, plans = alone(ToProVAR(profile))
    check(ToProVAR(profile), len(set(plans)))


def test_policies_of_one_plan_are_drawn_once():
    check(FastVAR(), 1)
