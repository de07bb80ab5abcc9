"""English captions of scenes, in several phrasings, and the words that they use."""

import dataclasses
import random
import re
from collections.abc import Collection

from bench.scenes import world
from bench.scenes.world import Scene, SceneObject

_IRREGULAR_PLURALS = {"cactus": "cacti", "strawberry": "strawberries", "fish": "fish"}
_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
_RELATION_PHRASES = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_LEADS = ("", "", "", "a photo of ", "a picture of ", "an image of ")
_SIZE_WORDS = {"small": ("small", "tiny"), "large": ("large", "big")}
_PLACES = {
    "green meadow": ("in a green meadow", "on a green meadow", "in a meadow"),
    "sandy beach": ("on a sandy beach", "on the beach", "at the beach"),
    "night sky": ("in the night sky", "in a night sky", "at night"),
    "wooden table": ("on a wooden table", "on a table"),
}


def plural(noun: str) -> str:
    """The plural of one of the world's nouns."""
    if noun in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[noun]
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def with_article(phrase: str) -> str:
    """The phrase after "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def caption(generator: random.Random, scene: Scene, name_background: bool | None = None) -> str:
    """Draws a caption that is true of the scene.

    Args:
      generator: source of randomness.
      scene: what to describe.
      name_background: whether the background is named; drawn if None (it is in four of five captions).
    """
    if name_background is None:
        name_background = generator.random() < 0.8
    words = generator.choice(_LEADS) + _subject(generator, scene)
    return f"{words} {_place(generator, scene.background)}" if name_background else words


def in_order_of_naming(scene: Scene, text: str) -> Scene:
    """The scene with its objects in the order in which its caption names them."""
    if len(scene.objects) == 1:
        return scene
    words = text.split()
    return dataclasses.replace(
        scene, objects=tuple(sorted(scene.objects, key=lambda item: words.index(item.noun)))
    )


def background_phrases(background: str) -> tuple[str, ...]:
    """Every way in which captions name a background."""
    if background in _PLACES:
        return _PLACES[background]
    if background.endswith("floor"):
        return (f"on {with_article(background)}",)
    return (
        f"on {with_article(background)}",
        f"with {with_article(background)}",
        f"against {with_article(background)}",
    )


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted; the world's whole language."""
    phrases = [*_LEADS, *_NUMBERS.values(), *world.COLORS, *world.NOUNS, *map(plural, world.NOUNS)]
    phrases += [phrase for phrases in (_RELATION_PHRASES | _SIZE_WORDS).values() for phrase in phrases]
    phrases += [phrase for background in world.BACKGROUNDS for phrase in background_phrases(background)]
    phrases += ["a an and with next to group of"]
    return sorted({word for phrase in phrases for word in re.findall(r"[a-z]+", phrase)})


def summary() -> str:
    """What captions can ask for, in one line."""
    own_colors = [noun for noun in world.NOUNS if noun not in world.TINTABLE]
    places = [phrases[0] for phrases in _PLACES.values()]
    return "; ".join(
        (
            f"{_either(world.TINTABLE)} in {_either(world.COLORS)}",
            f"{_either(own_colors)} in their own colours",
            f"one to {_NUMBERS[world.MAX_OBJECTS]} of a kind or two kinds, {_either(_SIZE_WORDS)}, "
            f"{_either(world.RELATIONS)} one another",
            f"on a {_either(world.PALE_COLORS)} background or checkered floor, {_either(places)}",
        )
    )


def _either(words: Collection[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}"


def _subject(generator: random.Random, scene: Scene) -> str:
    names = [_name(generator, item, scene.count > 1) for item in scene.objects]
    if scene.count > 1:
        return f"{generator.choice(('', '', '', 'a group of '))}{_NUMBERS[scene.count]} {names[0]}"
    if len(names) == 1:
        return f"one {names[0]}" if generator.random() < 0.15 else with_article(names[0])
    if scene.relation is not None:
        relation = generator.choice(_RELATION_PHRASES[scene.relation])
        return f"{with_article(names[0])} {relation} {with_article(names[1])}"
    # Without a relation neither object comes first.
    generator.shuffle(names)
    joint = generator.choice(("and", "and", "and", "with", "next to"))
    return f"{with_article(names[0])} {joint} {with_article(names[1])}"


def _name(generator: random.Random, item: SceneObject, many: bool) -> str:
    words = [] if item.size is None else [generator.choice(_SIZE_WORDS[item.size])]
    words += [] if item.color is None else [item.color]
    return " ".join([*words, plural(item.noun) if many else item.noun])


def _place(generator: random.Random, background: str) -> str:
    return generator.choice(background_phrases(background))
