"""Scenes as arrays: what the renderer, the detector and the text encoder read."""

import concurrent.futures
import functools
import multiprocessing
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from bench.scenes import captions, tokenizer, world
from bench.scenes.world import Placement, Scene, SceneObject

MAX_TOKENS = 24  # the longest caption and its end token fit
_SCENES_PER_JOB = 4096

# Every sprite that can be drawn: the untinted ones, then every tint.
SPRITES: tuple[tuple[str, str | None], ...] = (
    *((noun, None) for noun in world.NOUNS),
    *((noun, color) for noun in world.TINTABLE for color in world.COLORS),
)
_SPRITE_INDEX = {sprite: index for index, sprite in enumerate(SPRITES)}


class SceneBatch(NamedTuple):
    """Scenes side by side; leaves are numpy or jax arrays with the batch axis first.

    Attributes:
      sprite: int16 [batch, MAX_OBJECTS], index into `SPRITES`.
      noun: int16 [batch, MAX_OBJECTS], index into `world.NOUNS`.
      color: int16 [batch, MAX_OBJECTS], index into `world.COLORS`, -1 for the sprite's own colour.
      placement: float32 [batch, MAX_OBJECTS, 4]: x, y, radius, angle.
      present: float32 [batch, MAX_OBJECTS], 1 where there is an object.
      background: int16 [batch], index into `world.BACKGROUNDS`.
      tokens: int16 [batch, MAX_TOKENS], the caption's tokens, 0 after its end.
    """

    sprite: np.ndarray
    noun: np.ndarray
    color: np.ndarray
    placement: np.ndarray
    present: np.ndarray
    background: np.ndarray
    tokens: np.ndarray


def pack(scenes: Sequence[tuple[Scene, Sequence[Placement], str]]) -> SceneBatch:
    """Arrays of scenes, given each with its placements and its caption.

    Raises:
      ValueError: a caption is longer than MAX_TOKENS.
    """
    count, slots = len(scenes), world.MAX_OBJECTS
    batch = SceneBatch(
        sprite=np.zeros((count, slots), np.int16),
        noun=np.zeros((count, slots), np.int16),
        color=np.full((count, slots), -1, np.int16),
        # Empty slots are drawn transparent, so their radius must not be zero.
        placement=np.tile(np.array([0, 0, 1, 0], np.float32), (count, slots, 1)),
        present=np.zeros((count, slots), np.float32),
        background=np.array([world.BACKGROUNDS.index(scene.background) for scene, _, _ in scenes], np.int16),
        tokens=encode_captions([caption for _, _, caption in scenes]),
    )
    for row, (scene, placements, _) in enumerate(scenes):
        for slot, (item, place) in enumerate(zip(world.rendered_objects(scene), placements, strict=True)):
            batch.sprite[row, slot] = _SPRITE_INDEX[item.noun, item.color]
            batch.noun[row, slot] = world.NOUNS.index(item.noun)
            batch.color[row, slot] = _color_index(item)
            batch.placement[row, slot] = (place.x, place.y, place.radius, place.angle)
            batch.present[row, slot] = 1
    return batch


def encode_captions(texts: Sequence[str]) -> np.ndarray:
    """Token ids, int16 [len(texts), MAX_TOKENS], zero after the end token.

    Raises:
      ValueError: a text is longer than MAX_TOKENS.
    """
    tokens = np.zeros((len(texts), MAX_TOKENS), np.int16)
    for row, encoding in enumerate(_tokenizer().encode_batch(list(texts))):
        if len(encoding.ids) > MAX_TOKENS:
            raise ValueError(f"{texts[row]!r} has {len(encoding.ids)} tokens, more than {MAX_TOKENS}")
        tokens[row, : len(encoding.ids)] = encoding.ids
    return tokens


def training_scenes(count: int, seed: int, processes: int) -> SceneBatch:
    """Random scenes of the training split with their captions.

    Args:
      count: number of scenes.
      seed: decides the scenes, whatever the number of processes.
      processes: worker processes; 1 samples in this one.
    """
    jobs = [(seed, start, min(_SCENES_PER_JOB, count - start)) for start in range(0, count, _SCENES_PER_JOB)]
    if processes == 1:
        parts = [_sample(job) for job in jobs]
    else:
        # JAX has threads that a fork would not survive.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, context) as executor:
            parts = list(executor.map(_sample, jobs))
    return SceneBatch(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _sample(job: tuple[int, int, int]) -> SceneBatch:
    seed, start, count = job
    generator = random.Random(f"{seed}/{start}")
    scenes = []
    for _ in range(count):
        scene = world.training_scene(generator)
        text = captions.caption(generator, scene)
        scene = captions.in_order_of_naming(scene, text)
        scenes.append((scene, world.layout(generator, scene), text))
    return pack(scenes)


@functools.cache
def _tokenizer() -> tokenizers.Tokenizer:
    return tokenizer.build_tokenizer()


def _color_index(item: SceneObject) -> int:
    return -1 if item.color is None else world.COLORS.index(item.color)
