"""Fitting SkipVAR's decisions: labels and coefficients by hand, and pictures of a tiny model."""

import numpy as np
import pytest

from bench.fit_skipvar import Samples, collect, fit, fit_logistic, fit_target, labels, share, spread
from bench.scenes import world
from bench.scenes.prompts import load_prompts
from tests import tiny
from toprovar_jax.calibration.search import Target
from toprovar_jax.checkpoint import EMBEDDED
from toprovar_jax.errors import InputError
from toprovar_jax.manifest import DECISIONS_NAME
from toprovar_jax.pruning.policies import resolve_policy
from toprovar_jax.pruning.policy import Dense
from toprovar_jax.pruning.skipvar import SkipVAR, decisions_text, load_decisions

COSTS = np.array([10, 9, 8, 7, 5, 3, 1.0])


def made_up_samples():
    """Pictures of a large first feature lose much."""
    rng = np.random.default_rng(0)
    features = rng.uniform(0, 1, (60, 2))
    lost = features[:, :1] * np.array([0.1, 0.2, 0.4])
    return Samples(features, skip=1 - lost, uncond=1 - lost / 3)


def test_labels_are_the_most_that_keeps_the_similarity():
    similarities = np.array([[0.9, 0.8, 0.7], [0.95, 0.6, 0.9], [0.5, 0.5, 0.5]])
    assert labels(similarities, 0.8).tolist() == [2, 3, 0]
    assert labels(similarities, 0.95).tolist() == [0, 1, 0]


def test_a_logistic_model_finds_the_border():
    features = np.linspace(0, 1, 40)[:, None] * np.array([1.0, 0.0])
    model = fit_logistic(features, (features[:, 0] > 0.35) * 2)
    assert model.classes == (0, 2)
    assert model.predict(np.array([[0.1, 0.0], [0.28, 0.0], [0.42, 0.0], [0.9, 0.0]])).tolist() == [0, 0, 2, 2]
    # At the minimum the classes' mean probabilities are their shares.
    rng = np.random.default_rng(1)
    noisy, classes = rng.normal(size=(90, 2)), rng.integers(0, 3, 90)
    found = fit_logistic(noisy, classes)
    logits = (noisy - found.mean) / found.scale @ np.array(found.coef).T + found.intercept
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities.mean(axis=0), np.bincount(classes) / 90, atol=1e-6)
    only = fit_logistic(features, np.full(40, 3))
    assert only.predict(features).tolist() == [3] * 40


def test_decisions_save_the_target_at_the_highest_similarity():
    samples = made_up_samples()
    model, similarity = fit_target(samples, COSTS, Target(speedup=2.0))
    assert share(model, samples, COSTS) <= 0.5
    assert share(fit(samples, similarity + 1e-3), samples, COSTS) > 0.5
    assert fit_target(samples, COSTS, Target(similarity=0.9)) == (fit(samples, 0.9), 0.9)
    with pytest.raises(InputError, match=r"^no decisions reach a speed-up of 20.00: choose a lower target$"):
        fit_target(samples, COSTS, Target(speedup=20.0))


def test_a_few_prompts_are_of_all_tasks():
    prompts = load_prompts("tuning")
    assert {prompt.scene.task for prompt in spread(prompts, 12)} == {*world.TASKS}
    assert len({*spread(prompts, 100)}) == 100
    assert spread(prompts, 1000) == [*prompts]


def test_samples_are_what_the_policies_draw():
    samples, costs = collect(tiny.pipeline(), ["a cat", "a dog", "a red dog", "a blue cat", "a cat"], 3, 2)
    assert samples.features.shape == (4, 2)
    assert samples.skip.shape == samples.uncond.shape == (4, 3)
    assert (np.diff(costs) < 0)[[0, 1, 2, 4, 5]].all()
    assert (samples.skip < 1).all()
    with pytest.raises(InputError, match=r"^1 prompts are no whole batch of 2: choose a smaller batch_size$"):
        collect(tiny.pipeline(), ["a cat"], 0, 2)


def test_fitted_decisions_are_found_beside_the_checkpoint(tmp_path):
    assert resolve_policy("skipvar", tmp_path) == SkipVAR()
    model = fit(made_up_samples(), 0.9)
    content = {name: {**vars(getattr(model, name))} for name in ("skip", "uncond")}
    text = decisions_text({**content, "fitted": {"speedup": 3.5}})
    (tmp_path / DECISIONS_NAME).write_text(text)
    assert resolve_policy("skipvar", tmp_path) == SkipVAR(model)
    assert resolve_policy("dense", tmp_path) == Dense()
    (tmp_path / DECISIONS_NAME).write_text("{}")
    with pytest.raises(InputError, match=r"cannot read .*skipvar_decisions.json: not a decision model: .*fit it"):
        resolve_policy("skipvar", tmp_path)


def test_any_damage_to_fitted_decisions_is_noticed(tmp_path):
    model = fit(made_up_samples(), 0.9)
    text = decisions_text({name: {**vars(getattr(model, name))} for name in ("skip", "uncond")})
    damaged = [
        text[:position] + chr(ord(text[position]) ^ 1) + text[position + 1 :] for position in range(len(text))
    ]
    for content in (*damaged, text[:-1], text[: len(text) // 2], text + "\n"):
        (tmp_path / DECISIONS_NAME).write_text(content)
        with pytest.raises(
            InputError, match=r"^cannot read .*skipvar_decisions.json: .*; fit it again with `python"
        ):
            load_decisions(tmp_path)
    (tmp_path / DECISIONS_NAME).write_text(text.replace("0", "1", 1))
    with pytest.raises(InputError, match="it was altered after it was written"):
        load_decisions(tmp_path)
    (tmp_path / DECISIONS_NAME).write_text(text)
    assert load_decisions(tmp_path) == model


def test_the_decisions_in_the_package_are_as_they_were_fitted():
    assert load_decisions(EMBEDDED) is not None
