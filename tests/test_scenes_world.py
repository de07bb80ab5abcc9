"""The training world: hold-outs that do not leak, captions that are true, layouts that show what they should."""

import collections
import dataclasses
import random
import re

import numpy as np
import pytest

from bench.scenes import captions, dataset, prompts, score, tokenizer, world
from bench.scenes.detector import Detection
from bench.scenes.world import Scene, SceneObject

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@pytest.fixture(scope="module")
def training_scenes() -> list[Scene]:
    generator = random.Random(0)
    return [world.training_scene(generator) for _ in range(10_000)]


def combination(scene: Scene) -> tuple:
    kinds = frozenset((item.noun, item.color) for item in scene.objects)
    return kinds, scene.count, scene.background if len(scene.objects) == 1 else None


def test_five_percent_of_the_pairs_are_held_out_and_no_sprite_shows_one_untinted():
    assert len(world.HELD_OUT_PAIRS) == round(0.05 * len(world.TINTABLE) * len(world.COLORS))
    assert len({noun for _, noun in world.HELD_OUT_PAIRS}) == len(world.HELD_OUT_PAIRS)
    for color, noun in world.HELD_OUT_PAIRS:
        assert noun in world.TINTABLE
        assert color not in world._NATURAL_COLORS[noun].split()


def test_training_never_shows_a_held_out_pair(training_scenes):
    shown = {(item.color, item.noun) for scene in training_scenes for item in scene.objects}
    assert not shown & world.HELD_OUT_PAIRS
    # The sample is large enough to show nearly every pair that may be shown.
    assert len([pair for pair in shown if pair[0]]) > 0.95 * 0.95 * len(world.TINTABLE) * len(world.COLORS)


@pytest.mark.parametrize("name", ["evaluation", "tuning"])
def test_training_never_shows_what_a_prompt_asks_for(training_scenes, name):
    trained = {combination(scene) for scene in training_scenes}
    for prompt in prompts.load_prompts(name):
        assert combination(prompt.scene) not in trained


def test_a_mirrored_pair_is_in_the_same_split():
    generator = random.Random(1)
    for _ in range(300):
        scene = world.random_scene(generator, "position")
        mirrored = dataclasses.replace(
            scene,
            objects=scene.objects[::-1],
            relation=OPPOSITE[scene.relation],
            background=generator.choice(world.BACKGROUNDS),
        )
        plain = dataclasses.replace(
            scene, task="two_objects", relation=None,
            objects=tuple(dataclasses.replace(item, size=None) for item in scene.objects),
        )  # fmt: skip
        assert world.split(scene) == world.split(mirrored) == world.split(plain)


def test_splits_have_their_shares():
    generator = random.Random(2)
    counts = collections.Counter(world.split(world.random_scene(generator)) for _ in range(8000))
    assert counts["evaluation"] / 8000 == pytest.approx(1 / 16, abs=0.02)
    assert counts["tuning"] / 8000 == pytest.approx(1 / 16, abs=0.02)


def test_prompt_files_are_what_the_seeded_command_writes():
    for name in ("evaluation", "tuning"):
        assert prompts.load_prompts(name) == prompts.generate_prompts(name)


def test_prompts_cover_the_tasks_and_are_disjoint():
    evaluation, tuning = prompts.load_prompts("evaluation"), prompts.load_prompts("tuning")
    assert len(evaluation) >= 300
    assert {prompt.scene.task for prompt in evaluation} == set(world.TASKS)
    assert {prompt.scene.task for prompt in tuning} == set(world.TASKS)
    assert not {combination(p.scene) for p in evaluation} & {combination(p.scene) for p in tuning}
    assert not any(prompt.held_out for prompt in tuning)
    for prompt in evaluation:
        pairs = {(item.color, item.noun) for item in prompt.scene.objects}
        assert prompt.held_out == bool(pairs & world.HELD_OUT_PAIRS)


def test_a_prompt_for_one_kind_of_object_names_its_background():
    # Without it the prompt would be a caption of training.
    for prompt in prompts.load_prompts("evaluation"):
        if len(prompt.scene.objects) == 1:
            phrases = captions.background_phrases(prompt.scene.background)
            assert any(prompt.text.endswith(phrase) for phrase in phrases)


def test_captions_are_true_and_grammatical(training_scenes):
    generator = random.Random(3)
    vocabulary = set(captions.vocabulary())
    numbers = {2: "two", 3: "three", 4: "four"}
    for scene in training_scenes[:3000]:
        text = captions.caption(generator, scene)
        assert set(text.split()) <= vocabulary
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)
        for item in scene.objects:
            noun = captions.plural(item.noun) if scene.count > 1 else item.noun
            name = " ".join(word for word in (item.color, noun) if word)
            assert re.search(rf"\b{name}\b", text), (scene, text)
        if scene.count > 1:
            assert numbers[scene.count] in text
        if scene.relation is not None:
            first, second = (item.noun for item in scene.objects)
            words = text.split()
            assert words.index(first) < words.index(second)
            assert any(phrase in text for phrase in captions._RELATION_PHRASES[scene.relation])


def test_the_summary_names_everything_in_one_line():
    words = set(re.findall(r"[a-z]+", captions.summary()))
    named = [*world.NOUNS, *world.COLORS, *world.RELATIONS, *world.PALE_COLORS, *world.BACKGROUNDS, "one", "four"]
    assert {word for phrase in named for word in phrase.split()} <= words
    # What it adds of its own.
    assert words - set(captions.vocabulary()) <= {"or", "their", "own", "colours", "kind", "kinds", "another"}
    assert "\n" not in captions.summary()


def test_captions_vary_in_phrasing():
    scene = Scene("position", (SceneObject("apple"), SceneObject("car")), "wooden table", relation="left of")
    generator = random.Random(4)
    assert len({captions.caption(generator, scene) for _ in range(200)}) > 20


@pytest.mark.parametrize(
    ("noun", "plural"),
    [("cactus", "cacti"), ("strawberry", "strawberries"), ("fish", "fish"), ("dress", "dresses"), ("dog", "dogs")],
)
def test_plurals(noun, plural):
    assert captions.plural(noun) == plural


def test_tokenizer_knows_every_caption_word_and_marks_others():
    encoder = tokenizer.build_tokenizer()
    ids = encoder.encode("A red APPLE, left of a zeppelin!").ids
    words = [encoder.id_to_token(index) for index in ids]
    assert words == ["a", "red", "apple", "left", "of", "a", "<unk>", "</s>"]
    assert encoder.token_to_id("<pad>") == 0
    assert encoder.token_to_id("</s>") == 1
    assert encoder.token_to_id("<unk>") == 2


def placed(scene: Scene, generator: random.Random) -> list[Detection]:
    objects = world.rendered_objects(scene)
    placements = world.layout(generator, scene)
    return [
        Detection(item.noun, item.color or "red", place.x, place.y, place.radius, 1.0)
        for item, place in zip(objects, placements, strict=True)
    ]


def test_layouts_satisfy_their_own_prompts(training_scenes):
    generator = random.Random(5)
    for scene in training_scenes[:3000]:
        assert score.judge(scene, placed(scene, generator))


def test_unrelated_objects_stand_in_the_order_in_which_they_are_named():
    scenes = [
        dataclasses.replace(scene, objects=objects)
        for scene in [Scene("two_objects", (SceneObject("carrot"), SceneObject("car", "red")), "sandy beach")]
        for objects in (scene.objects, scene.objects[::-1])
    ]
    generator = random.Random(8)
    named = captions.in_order_of_naming
    for scene in scenes:
        assert named(scene, "a red car and a carrot on the beach").objects[0].noun == "car"
        assert named(scene, "a carrot next to a red car").objects[0].noun == "carrot"
    assert {frozenset(score.relations(*placed(scenes[0], generator))) for _ in range(30)} == {
        frozenset({"left of"}),
        frozenset({"above"}),
    }


def test_objects_stay_in_the_picture_and_apart(training_scenes):
    generator = random.Random(6)
    for scene in training_scenes[:3000]:
        found = placed(scene, generator)
        for item in found:
            assert max(abs(item.x), abs(item.y)) + item.radius < 1.08
        for index, first in enumerate(found):
            for second in found[:index]:
                distance = np.hypot(first.x - second.x, first.y - second.y)
                assert distance > 0.9 * (first.radius + second.radius)


def test_arrays_hold_the_scene():
    scene = Scene("counting", (SceneObject("star", "yellow"),), "night sky", count=3)
    placements = world.layout(random.Random(0), scene)
    batch = dataset.pack([(scene, placements, "three yellow stars in a night sky")])
    assert batch.present.tolist() == [[1, 1, 1, 0]]
    assert [dataset.SPRITES[index] for index in batch.sprite[0, :3]] == [("star", "yellow")] * 3
    assert world.NOUNS[batch.noun[0, 0]] == "star"
    assert world.COLORS[batch.color[0, 2]] == "yellow"
    assert batch.color[0, 3] == -1
    assert world.BACKGROUNDS[batch.background[0]] == "night sky"
    np.testing.assert_allclose(batch.placement[0, 1], dataclasses.astuple(placements[1]), rtol=1e-6)
    assert np.count_nonzero(batch.tokens) == 8


def test_a_caption_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="has 31 tokens, more than 24"):
        dataset.encode_captions(["a " * 30])


def test_training_scenes_depend_on_the_seed_alone():
    first, again, other = (dataset.training_scenes(64, seed, processes=1) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first.placement, other.placement)
