"""Scenes with one deliberate mistake, to show that the scorer sees it.

    python -m bench.scenes.corrupt

renders a few evaluation prompts, right and with every mistake that applies, into the sheet that the tests read.
"""

import dataclasses
import pathlib
import random
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from PIL import Image

from bench.scenes import dataset, prompts, render, sprites, world
from bench.scenes.prompts import Prompt
from bench.scenes.world import Placement, Scene, SceneObject
from toprovar_jax import command_line

Mistake = Literal["none", "wrong_color", "wrong_count", "swapped_positions", "missing_object"]
MISTAKES: tuple[Mistake, ...] = get_args(Mistake)
SHEET_PATH = pathlib.Path(__file__).parents[2] / "tests" / "golden" / "scenes.webp"
_PROMPTS_PER_TASK = 3


def applies(mistake: Mistake, scene: Scene) -> bool:
    """Whether the mistake makes a picture of this scene wrong."""
    return {
        "none": True,
        "wrong_color": any(item.color is not None for item in scene.objects),
        "wrong_count": scene.task == "counting",
        "swapped_positions": scene.task == "position",
        "missing_object": True,
    }[mistake]


def corrupt(mistake: Mistake, scene: Scene, placements: Sequence[Placement]) -> tuple[Scene, Sequence[Placement]]:
    """The scene and its placements with the mistake made; `applies` must hold."""
    if mistake == "wrong_color":
        return dataclasses.replace(scene, objects=tuple(map(_next_color, scene.objects))), placements
    if mistake == "wrong_count":
        # One too many where there is room, else one too few.
        count = scene.count + 1 if scene.count < world.MAX_OBJECTS else scene.count - 1
        other = dataclasses.replace(scene, count=count)
        return other, world.layout(random.Random(count), other)
    if mistake == "swapped_positions":
        return scene, placements[::-1]
    if mistake == "missing_object":
        # The first object goes; of several copies all but one stay, of a single one none.
        fewer = dataclasses.replace(scene, count=scene.count - 1) if len(scene.objects) == 1 else scene
        kept = scene.objects[1:] if len(scene.objects) == 2 else scene.objects
        return dataclasses.replace(fewer, objects=kept), placements[1:]
    return scene, placements


def _next_color(item: SceneObject) -> SceneObject:
    if item.color is None:
        return item
    return dataclasses.replace(item, color=world.COLORS[(world.COLORS.index(item.color) + 1) % len(world.COLORS)])


def sheet_prompts() -> tuple[Prompt, ...]:
    """The prompts of the sheet, from left to right: the first few of every task."""
    asked = prompts.load_prompts("evaluation")
    return tuple(
        prompt
        for task in world.TASKS
        for prompt in [p for p in asked if p.scene.task == task and not p.held_out][:_PROMPTS_PER_TASK]
    )


def load_sheet() -> dict[Mistake, np.ndarray]:
    """Pictures of `sheet_prompts` by mistake, [prompts, height, width, 3] in [-1, 1]; right where none applies."""
    with Image.open(SHEET_PATH) as image:
        pixels = np.asarray(image.convert("RGB")).astype(np.float32) / 127.5 - 1
    size = render.IMAGE_SIZE
    columns = pixels.shape[1] // size
    return {
        mistake: np.stack(
            [pixels[row * size : (row + 1) * size, c * size : (c + 1) * size] for c in range(columns)]
        )
        for row, mistake in enumerate(MISTAKES)
    }


def main() -> None:
    """Renders the sheet."""
    atlas = render.build_atlas(sprites.load_pack())
    rows = []
    for mistake in MISTAKES:
        scenes = []
        for prompt in sheet_prompts():
            made = mistake if applies(mistake, prompt.scene) else "none"
            scenes.append((*corrupt(made, prompt.scene, prompt.placements()), prompt.text))
        pictures = render.to_bytes(render.render(atlas, dataset.pack(scenes)))
        rows.append(np.concatenate(list(pictures), axis=1))
    Image.fromarray(np.concatenate(rows)).save(SHEET_PATH, quality=88, method=6)
    print(f"wrote {SHEET_PATH}")


if __name__ == "__main__":
    command_line.run(main)
