"""The compositor and the sprite pack, with a pack of plain discs instead of the sprites."""

import jax
import numpy as np
import pytest
from PIL import Image

from bench.scenes import dataset, render, sprites, world
from bench.scenes.world import Placement, Scene, SceneObject
from toprovar_jax.errors import InputError

SIZE = 64


def disc(color: tuple[float, float, float], side: int = 24) -> np.ndarray:
    grid = (np.arange(side) + 0.5) * 2 / side - 1
    inside = (grid[:, None] ** 2 + grid**2 < 0.8).astype(np.float32)
    return np.concatenate([np.broadcast_to(np.array(color, np.float32), (side, side, 3)), inside[..., None]], -1)


@pytest.fixture(scope="module")
def atlas() -> render.Atlas:
    return render.build_atlas(np.stack([disc((0.9, 0.2, 0.2))] * len(world.NOUNS)), SIZE)


def draw(atlas: render.Atlas, *objects: tuple[SceneObject, Placement], background: str = "gray background"):
    task = "two_objects" if len(objects) > 1 else "single_object"
    scene = Scene(task, tuple(item for item, _ in objects), background)
    return render.render(atlas, dataset.pack([(scene, [place for _, place in objects], "")]))[0]


def changed(atlas: render.Atlas, image: jax.Array) -> np.ndarray:
    """Pixels that the object itself covers: its green channel is far from the background's."""
    empty = draw(atlas)
    return np.abs(np.asarray(image - empty))[..., 1] > 0.9


def test_an_object_stands_where_it_is_placed(atlas):
    image = draw(atlas, (SceneObject("dog"), Placement(0.5, -0.25, 0.3, 0.0)))
    rows, columns = np.nonzero(changed(atlas, image))
    center = (np.array([columns.mean(), rows.mean()]) + 0.5) * 2 / SIZE - 1
    np.testing.assert_allclose(center, (0.5, -0.25), atol=0.03)


def test_area_follows_the_radius(atlas):
    areas = [
        changed(atlas, draw(atlas, (SceneObject("dog"), Placement(0, 0, radius, 0.3)))).sum()
        for radius in (0.3, 0.6)
    ]
    assert areas[1] / areas[0] == pytest.approx(4, rel=0.1)


def test_rotation_turns_clockwise_on_screen():
    arrow = np.zeros((24, 24, 4), np.float32)
    arrow[:8, 8:16] = (0.9, 0.2, 0.2, 1.0)  # a mark at the top
    marked = render.build_atlas(np.stack([arrow] * len(world.NOUNS)), SIZE)
    image = draw(marked, (SceneObject("dog"), Placement(0, 0, 0.6, np.pi / 2)))
    _, columns = np.nonzero(changed(marked, image))
    assert columns.mean() > SIZE * 0.6


def test_a_later_object_covers_an_earlier_one(atlas):
    place = Placement(0, 0, 0.5, 0.0)
    image = draw(atlas, (SceneObject("dog"), place), (SceneObject("car", "blue"), place))
    red, _, blue = np.asarray(image)[SIZE // 2, SIZE // 2]
    assert blue > red


def test_shadow_darkens_the_background_below_the_object(atlas):
    image = draw(atlas, (SceneObject("dog"), Placement(0, 0, 0.4, 0.0)))
    below = np.asarray(image)[int(SIZE * 0.71), SIZE // 2]
    assert (below < np.asarray(draw(atlas))[int(SIZE * 0.71), SIZE // 2] - 0.05).all()


def test_every_background_is_drawn_and_different(atlas):
    pictures = np.asarray(atlas.backgrounds)
    assert len({picture.tobytes() for picture in pictures}) == len(world.BACKGROUNDS)


def test_an_unknown_background_is_refused():
    with pytest.raises(ValueError, match="no such background: a cellar"):
        render._background("a cellar", 8)


@pytest.mark.parametrize("sprite", [disc((0.9, 0.2, 0.2)), disc((0.8, 0.8, 0.8))], ids=["red", "grey"])
@pytest.mark.parametrize("color", world.COLORS)
def test_tint_gives_the_colour_and_keeps_the_outline(sprite, color):
    tinted = sprites.tint(sprite, color)
    np.testing.assert_array_equal(tinted[..., 3], sprite[..., 3])
    value = np.array(sprites.COLOR_VALUES[color], np.float32) / 255
    np.testing.assert_allclose(tinted[12, 12, :3], value, atol=0.02)


def test_tint_keeps_what_has_another_colour():
    sprite = disc((0.9, 0.2, 0.2))
    sprite[:4, 10:14] = (0.2, 0.8, 0.3, 1.0)  # a green leaf
    tinted = sprites.tint(sprite, "blue")
    np.testing.assert_allclose(tinted[1, 11, :3], (0.2, 0.8, 0.3), atol=0.02)


def test_pack_is_built_and_read_back(tmp_path):
    (tmp_path / "assets").mkdir()
    for index, noun in enumerate(world.NOUNS):
        pixels = (disc((index / 50, 0.5, 0.5), 32) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "assets" / f"{world.SPRITE_FILES[noun]}.webp", lossless=True)
    sprites.build_pack(tmp_path, tmp_path / "pack.png")
    pack = sprites.load_pack(tmp_path / "pack.png")
    assert pack.shape == (len(world.NOUNS), sprites.SPRITE_PIXELS, sprites.SPRITE_PIXELS, 4)
    middle = pack[:, sprites.SPRITE_PIXELS // 2, sprites.SPRITE_PIXELS // 2]
    np.testing.assert_allclose(middle[:, 0], np.arange(50) / 50, atol=0.01)
    np.testing.assert_allclose(middle[:, 3], 1, atol=0.01)


def test_a_missing_pack_names_the_command_that_builds_it(tmp_path):
    with pytest.raises(InputError, match=r"build it with `python -m bench\.scenes\.sprites`"):
        sprites.load_pack(tmp_path / "none.png")
