"""The training world: which scenes exist, where their objects stand, and which are never trained on.

A scene shows up to `MAX_OBJECTS` sprites on a background. Coordinates run over [-1, 1] in both directions, x to
the right and y down; a radius is half a sprite's side. Everything here is plain Python, so that worker processes
can sample scenes without starting JAX.
"""

import dataclasses
import math
import random
import zlib
from collections.abc import Sequence
from typing import Literal, get_args

MAX_OBJECTS = 4

# The ten colours of GenEval.
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

# Object -> file of the sprite package. Sprites that look alike are left out.
_TINTABLE_FILES = {
    "apple": "1f34e", "backpack": "1f392", "balloon": "1f388", "bell": "1f514", "book": "1f4d5", "bucket": "1faa3",
    "car": "1f697", "cat": "1f431", "chair": "1fa91", "crown": "1f451", "dog": "1f436", "dress": "1f457",
    "elephant": "1f418", "flower": "1f337", "gift": "1f381", "heart": "2764-fe0f", "house": "1f3e0",
    "key": "1f511", "mushroom": "1f344", "rabbit": "1f430", "shirt": "1f455", "star": "2b50",
    "teapot": "1fad6", "tree": "1f333", "turtle": "1f422", "umbrella": "2602-fe0f",
}  # fmt: skip
_NATURAL_FILES = {
    "airplane": "2708-fe0f", "banana": "1f34c", "basketball": "1f3c0", "bee": "1f41d", "bicycle": "1f6b2",
    "cactus": "1f335", "cake": "1f382", "carrot": "1f955", "clock": "23f0", "doughnut": "1f369", "duck": "1f986",
    "fish": "1f420", "guitar": "1f3b8", "hamburger": "1f354", "owl": "1f989", "panda": "1f43c", "penguin": "1f427",
    "pineapple": "1f34d", "pizza": "1f355", "robot": "1f916", "rocket": "1f680", "strawberry": "1f353",
    "train": "1f682", "watermelon": "1f349",
}  # fmt: skip
SPRITE_FILES: dict[str, str] = _TINTABLE_FILES | _NATURAL_FILES
NOUNS: tuple[str, ...] = tuple(SPRITE_FILES)
TINTABLE: tuple[str, ...] = tuple(_TINTABLE_FILES)

# Colours that the untinted sprite already shows: such a pair cannot be held out, "an apple" would give it away.
_NATURAL_COLORS = {
    "apple": "red", "backpack": "red pink", "balloon": "red", "bell": "orange yellow", "book": "red pink",
    "bucket": "blue", "car": "red", "cat": "orange yellow", "chair": "brown", "crown": "yellow orange",
    "dog": "orange brown", "dress": "blue", "elephant": "white", "flower": "pink purple", "gift": "yellow red",
    "heart": "red pink", "house": "orange brown red", "key": "yellow orange", "mushroom": "red", "rabbit": "white",
    "shirt": "green", "star": "yellow orange", "teapot": "red pink", "tree": "green", "turtle": "green",
    "umbrella": "purple blue",
}  # fmt: skip
# Pairs that the documentation shows.
_SHOWN_PAIRS = {("red", "apple"), ("blue", "car"), ("yellow", "star")}

PALE_COLORS = {
    "gray": (205, 207, 212), "cream": (250, 240, 215), "light blue": (190, 220, 245),
    "light green": (200, 232, 200), "lavender": (220, 208, 240), "peach": (250, 215, 195),
}  # fmt: skip
BACKGROUNDS: tuple[str, ...] = (
    *(f"{color} background" for color in PALE_COLORS),
    *(f"{color} checkered floor" for color in PALE_COLORS),
    "green meadow",
    "sandy beach",
    "night sky",
    "wooden table",
)

Task = Literal["single_object", "two_objects", "counting", "colors", "position", "color_attribution"]
TASKS: tuple[Task, ...] = get_args(Task)
# Tasks that bind two objects are the hard ones and get the most samples.
_TASK_WEIGHTS = (0.08, 0.21, 0.18, 0.09, 0.24, 0.20)
# Probability that an object of the task has a colour; evaluation prompts follow GenEval instead, see `prompts`.
_COLORED = {
    "single_object": 0.0, "two_objects": 0.15, "counting": 0.4, "colors": 1.0, "position": 0.35,
    "color_attribution": 1.0,
}  # fmt: skip

Relation = Literal["left of", "right of", "above", "below"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)
Size = Literal["small", "large"]
Split = Literal["train", "evaluation", "tuning"]


@dataclasses.dataclass(frozen=True, order=True)
class SceneObject:
    """One kind of object. `color` None is the sprite's own, `size` None an ordinary one."""

    noun: str
    color: str | None = None
    size: Size | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture shows, without where exactly.

    Attributes:
      task: the GenEval task that the scene belongs to.
      objects: one kind of object, or two.
      count: copies of the only object; 1 where there are two kinds.
      relation: the first object is `relation` the second; only for the position task.
      background: one of `BACKGROUNDS`.
    """

    task: Task
    objects: tuple[SceneObject, ...]
    background: str
    count: int = 1
    relation: Relation | None = None


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one sprite stands; the angle is in radians."""

    x: float
    y: float
    radius: float
    angle: float


def _choose_held_out(count: int) -> frozenset[tuple[str, str]]:
    pairs = [
        (color, noun)
        for noun in TINTABLE
        for color in COLORS
        if color not in _NATURAL_COLORS[noun].split() and (color, noun) not in _SHOWN_PAIRS
    ]
    random.Random(7).shuffle(pairs)
    chosen: list[tuple[str, str]] = []
    for color, noun in pairs:
        if (
            len(chosen) < count
            and all(noun != other for _, other in chosen)
            and [c for c, _ in chosen].count(color) < 2
        ):
            chosen.append((color, noun))
    return frozenset(chosen)


# 5 % of the colour-object pairs; no training of any model ever renders or names them.
HELD_OUT_PAIRS = _choose_held_out(len(TINTABLE) * len(COLORS) // 20)


def random_scene(generator: random.Random, task: Task | None = None, colored: float | None = None) -> Scene:
    """Draws a scene without held-out pairs; the split is not looked at.

    Args:
      generator: source of randomness.
      task: drawn by the training weights if None.
      colored: probability that an object has a colour; None takes the task's own.
    """
    if task is None:
        task = generator.choices(TASKS, _TASK_WEIGHTS)[0]
    background = generator.choice(BACKGROUNDS)
    probability = _COLORED[task] if colored is None else colored
    first = _random_object(generator, probability, background)
    if task == "counting":
        return Scene(task, (first,), background, count=generator.randint(2, MAX_OBJECTS))
    if task in ("single_object", "colors"):
        return Scene(task, (_with_size(generator, first, 0.15),), background)
    second = _random_object(generator, probability, background)
    while second.noun == first.noun:
        second = _random_object(generator, probability, background)
    objects = tuple(_with_size(generator, item, 0.05) for item in (first, second))
    relation = generator.choice(RELATIONS) if task == "position" else None
    return Scene(task, objects, background, relation=relation)


def split(scene: Scene) -> Split:
    """Which split a scene belongs to: 1 of 16 combinations is scored, 1 of 16 serves tuning, the rest training.

    A pair of objects counts without order, relation, size and background: otherwise "b right of a" would show what
    "a left of b" holds back. One kind of object counts with its number and its background.
    """
    kinds = sorted((item.noun, item.color or "") for item in scene.objects)
    key = repr((kinds, scene.count, scene.background if len(kinds) == 1 else None))
    return {0: "evaluation", 1: "tuning"}.get(zlib.crc32(key.encode()) % 16, "train")  # type: ignore[return-value]


def training_scene(generator: random.Random) -> Scene:
    """Draws a scene of the training split."""
    while True:
        scene = random_scene(generator)
        if split(scene) == "train":
            return scene


def layout(generator: random.Random, scene: Scene) -> tuple[Placement, ...]:
    """Draws a placement for every sprite of the scene: the objects in order, or the copies of the only one.

    Two objects without a relation stand in reading order, the first left of the second or above it.
    """
    if len(scene.objects) == 2:
        relation: Relation = generator.choice(("left of", "above")) if scene.relation is None else scene.relation
        centers = _pair_centers(generator, relation)
        radii = [_radius(generator, item.size, (0.24, 0.30), (0.38, 0.45), (0.46, 0.50)) for item in scene.objects]
    elif scene.count == 1:
        radii = [_radius(generator, scene.objects[0].size, (0.26, 0.34), (0.46, 0.58), (0.68, 0.76))]
        reach = min(0.25, 1 - radii[0])
        centers = [(generator.uniform(-reach, reach), generator.uniform(-reach, reach))]
    else:
        centers = _group_centers(generator, scene.count)
        largest = {2: 0.42, 3: 0.35, 4: 0.35}[scene.count]
        radii = [largest * generator.uniform(0.88, 1.0) for _ in centers]
    return tuple(
        Placement(x, y, radius, generator.uniform(-0.2, 0.2))
        for (x, y), radius in zip(centers, radii, strict=True)
    )


def _random_object(generator: random.Random, colored: float, background: str) -> SceneObject:
    while True:
        if generator.random() >= colored:
            return SceneObject(generator.choice(NOUNS))
        color, noun = generator.choice(COLORS), generator.choice(TINTABLE)
        # Black cannot be seen at night.
        if (color, noun) not in HELD_OUT_PAIRS and (color, background) != ("black", "night sky"):
            return SceneObject(noun, color)


def _with_size(generator: random.Random, item: SceneObject, probability: float) -> SceneObject:
    if generator.random() < probability:
        return dataclasses.replace(item, size=generator.choice(get_args(Size)))
    return item


def _radius(generator: random.Random, size: Size | None, *ranges: tuple[float, float]) -> float:
    return generator.uniform(*ranges[{"small": 0, None: 1, "large": 2}[size]])


def _pair_centers(generator: random.Random, relation: Relation) -> list[tuple[float, float]]:
    along, across = generator.uniform(0.46, 0.53), generator.uniform(-0.07, 0.07)
    first = {
        "left of": (-along, across),
        "right of": (along, across),
        "above": (across, -along),
        "below": (across, along),
    }[relation]
    return [first, (-first[0], -first[1])]


def _group_centers(generator: random.Random, count: int) -> list[tuple[float, float]]:
    """Two in a line, three in a triangle, four in a square; turned as a whole and jittered one by one."""
    radius = {2: 0.49, 3: 0.56, 4: 0.72}[count]
    start = {2: generator.choice((0.0, 0.5)), 3: generator.choice((-0.5, 0.5)), 4: 0.25}[count] * math.pi
    start += generator.uniform(-0.12, 0.12)
    points = []
    for index in range(count):
        angle = start + 2 * math.pi * index / count
        jitter_x, jitter_y = generator.uniform(-0.04, 0.04), generator.uniform(-0.04, 0.04)
        points.append((radius * math.cos(angle) + jitter_x, radius * math.sin(angle) + jitter_y))
    return points


def rendered_objects(scene: Scene) -> Sequence[SceneObject]:
    """The objects of the scene one by one, copies repeated: what `layout` places, in its order."""
    return scene.objects * scene.count
