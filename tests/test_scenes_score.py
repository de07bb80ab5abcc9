"""The scorer: GenEval's rules, intervals, and a detector that fails when it should."""

import dataclasses

import jax
import numpy as np
import pytest

from bench.scenes import corrupt, detector, prompts, render, score, world
from bench.scenes.detector import Detection
from bench.scenes.prompts import Prompt
from bench.scenes.world import Scene, SceneObject
from toprovar_jax.errors import InputError

CAR = Detection("car", "blue", x=-0.5, y=0.0, radius=0.4, confidence=0.9)
DOG = Detection("dog", "brown", x=0.5, y=0.0, radius=0.4, confidence=0.8)


def moved(detection: Detection, **changes: float) -> Detection:
    return dataclasses.replace(detection, **changes)


def scene(task: str, *objects: SceneObject, **settings) -> Scene:
    return Scene(task, objects, "gray background", **settings)


@pytest.mark.parametrize(
    ("asked", "found", "right"),
    [
        (scene("single_object", SceneObject("car")), [CAR], True),
        (scene("single_object", SceneObject("car")), [CAR, DOG], True),
        (scene("single_object", SceneObject("car")), [DOG], False),
        (scene("single_object", SceneObject("car")), [], False),
        (scene("two_objects", SceneObject("car"), SceneObject("dog")), [DOG, CAR], True),
        (scene("two_objects", SceneObject("car"), SceneObject("dog")), [CAR, CAR], False),
        (scene("counting", SceneObject("car"), count=2), [CAR, CAR], True),
        (scene("counting", SceneObject("car"), count=2), [CAR], False),
        (scene("counting", SceneObject("car"), count=2), [CAR, CAR, CAR], False),
        (scene("counting", SceneObject("car"), count=2), [CAR, CAR, DOG], True),
        (scene("colors", SceneObject("car", "blue")), [CAR], True),
        (scene("colors", SceneObject("car", "red")), [CAR], False),
        # The most confident car decides, as in GenEval.
        (scene("colors", SceneObject("car", "red")), [moved(CAR, confidence=0.5), moved(CAR, color="red")], True),
        (
            scene("colors", SceneObject("car", "blue")),
            [moved(CAR, confidence=0.5), moved(CAR, color="red")],
            False,
        ),
        (scene("color_attribution", SceneObject("car", "blue"), SceneObject("dog", "brown")), [CAR, DOG], True),
        (scene("color_attribution", SceneObject("car", "brown"), SceneObject("dog", "blue")), [CAR, DOG], False),
        (scene("position", SceneObject("car"), SceneObject("dog"), relation="left of"), [CAR, DOG], True),
        (scene("position", SceneObject("dog"), SceneObject("car"), relation="left of"), [CAR, DOG], False),
        (scene("position", SceneObject("car"), SceneObject("dog"), relation="above"), [CAR, DOG], False),
    ],
)
def test_judge_follows_geneval(asked, found, right):
    assert score.judge(asked, found) is right


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-0.6, 0.0, {"left of"}),
        (0.6, 0.1, {"right of"}),
        (0.0, -0.6, {"above"}),
        (0.1, 0.6, {"below"}),
        # An offset of 10 % of both boxes' sides together (0.1 * 2 * 0.8) is no relation yet.
        (-0.16, 0.0, set()),
        (0.0, 0.0, set()),
        # Far enough in both directions, both hold.
        (-1.0, -1.0, {"left of", "above"}),
    ],
)
def test_relations_follow_genevals_rule(x, y, expected):
    second = moved(DOG, x=0.0, y=0.0)
    assert score.relations(moved(CAR, x=x, y=y), second) == expected


def test_score_is_the_mean_over_tasks_and_leaves_held_out_pairs_apart():
    single = Prompt("", scene("single_object", SceneObject("car")))
    colored = Prompt("", scene("colors", SceneObject("car", "blue")))
    held_out = Prompt("", scene("colors", SceneObject("car", "red")), held_out=True)
    table = score.score([single] * 3 + [colored, held_out], [[CAR], [], [DOG], [CAR], [CAR]])
    assert table["single_object"].mean == pytest.approx(1 / 3)
    assert table["colors"].mean == 1
    assert table["held_out"].mean == 0
    assert table["overall"].mean == pytest.approx(2 / 3)
    assert table["overall"].count == 4


def test_intervals_are_those_of_the_binomial_and_reproducible():
    prompt = Prompt("", scene("single_object", SceneObject("car")))
    found = [[CAR], []] * 100
    first, again = (score.score([prompt] * 200, found)["single_object"] for _ in range(2))
    assert first == again
    # 1.96 standard errors of a fair coin tossed 200 times.
    assert first.high - first.low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(200), rel=0.1)
    assert first.low < first.mean < first.high


def test_recall_counts_copies():
    two_cars = Prompt("", scene("counting", SceneObject("car"), count=2))
    red_car = Prompt("", scene("colors", SceneObject("car", "red")))
    assert score.recall([two_cars, red_car], [[CAR], [CAR]]) == pytest.approx(1 / 3)


def test_table_shows_the_detectors_own_accuracy_beside_every_score():
    row = score.Score(0.5, 0.4, 0.6, 64)
    truth = score.Score(0.99, 0.98, 1.0, 64)
    text = score.format_table({"counting": row, "overall": row}, {"counting": truth, "overall": truth})
    for line in text.splitlines()[1:]:
        assert "50.0" in line
        assert "40.0 to 60.0" in line
        assert "99.0" in line


def perfect_detections(shown: Scene, placements) -> list[Detection]:
    return [
        Detection(item.noun, item.color or "red", place.x, place.y, place.radius, 1.0)
        for item, place in zip(world.rendered_objects(shown), placements, strict=True)
    ]


@pytest.mark.parametrize("mistake", corrupt.MISTAKES)
def test_a_mistake_makes_every_prompts_scene_wrong(mistake):
    asked = [prompt for prompt in prompts.load_prompts("evaluation") if corrupt.applies(mistake, prompt.scene)]
    assert len(asked) >= 64
    for prompt in asked:
        shown, placements = corrupt.corrupt(mistake, prompt.scene, prompt.placements())
        assert score.judge(prompt.scene, perfect_detections(shown, placements)) is (mistake == "none")


def test_ground_truth_is_rendered_prompt_by_prompt():
    discs = np.ones((len(world.NOUNS), 16, 16, 4), np.float32)
    discs[:, :, :, 0] = np.linspace(0, 1, len(world.NOUNS))[:, None, None]
    atlas = render.build_atlas(discs, 32)
    asked = prompts.load_prompts("tuning")[:33]
    together = score.render_prompts(asked, atlas)
    assert together.shape == (33, 32, 32, 3)
    for index in (0, 31, 32):
        np.testing.assert_allclose(
            together[index], score.render_prompts(asked[index : index + 1], atlas)[0], atol=1e-5
        )


@pytest.fixture(scope="module")
def verdicts() -> dict[str, list[bool]]:
    """Per mistake, the verdicts on the sheet's pictures to which it applies."""
    asked = corrupt.sheet_prompts()
    found = {
        mistake: detector.detect(detector.load_weights(), pictures)
        for mistake, pictures in corrupt.load_sheet().items()
    }
    return {
        mistake: [
            score.judge(prompt.scene, detections)
            for prompt, detections in zip(asked, found[mistake], strict=True)
            if corrupt.applies(mistake, prompt.scene)
        ]
        for mistake in found
    }


def test_the_detector_finds_everything_in_right_pictures(verdicts):
    assert len(verdicts["none"]) == 18
    assert np.mean(verdicts["none"]) >= 17 / 18


@pytest.mark.parametrize("mistake", ["wrong_color", "wrong_count", "swapped_positions", "missing_object"])
def test_every_mistake_lowers_the_score(verdicts, mistake):
    assert len(verdicts[mistake]) >= 3
    assert np.mean(verdicts[mistake]) <= 0.1


def test_the_detectors_own_accuracy_is_high_enough_for_scores_to_mean_something():
    accuracy = score.load_accuracy()
    assert accuracy["overall"].mean >= 0.95
    # It was not trained on the held-out pairs either.
    assert accuracy["held_out"].mean >= 0.85
    assert accuracy["overall"].count == len([p for p in prompts.load_prompts("evaluation") if not p.held_out])


def test_an_accuracy_of_another_detector_is_refused(tmp_path, monkeypatch):
    other = tmp_path / "accuracy.json"
    other.write_text(score.ACCURACY_PATH.read_text().replace(score.fingerprint(), "0" * 64))
    monkeypatch.setattr(score, "ACCURACY_PATH", other)
    with pytest.raises(InputError, match=r"measure again with `python -m bench\.scenes\.score`"):
        score.load_accuracy()


def test_the_detectors_weights_are_small():
    assert detector.WEIGHTS_PATH.stat().st_size <= 3_000_000
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(detector.load_weights()))
