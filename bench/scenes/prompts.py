"""The prompts that pictures are scored on, and the disjoint ones on which settings are chosen.

Both are fixed files, written by

    python -m bench.scenes.prompts

from combinations that are never trained on (`world.split`). As in GenEval, objects have a colour only in the two
colour tasks. The evaluation file also holds prompts with held-out colour-object pairs; they are scored apart.
"""

import dataclasses
import json
import pathlib
import random
from collections.abc import Sequence
from typing import Any, Literal

from bench.scenes import captions, world
from bench.scenes.world import Placement, Scene, SceneObject, Task
from toprovar_jax import command_line

PromptFile = Literal["evaluation", "tuning"]
_FOLDER = pathlib.Path(__file__).parent / "prompts"
_PER_TASK: dict[PromptFile, int] = {"evaluation": 64, "tuning": 24}
_COLOR_TASKS = ("colors", "color_attribution")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A caption and the scene it asks for; `held_out` marks a colour-object pair that training never shows."""

    text: str
    scene: Scene
    held_out: bool = False

    def placements(self) -> tuple[Placement, ...]:
        """Where the objects stand in the picture that serves as ground truth."""
        return world.layout(random.Random(self.text), self.scene)


def load_prompts(name: str) -> tuple[Prompt, ...]:
    """The prompts of a committed file, "evaluation" or "tuning", in its order."""
    lines = prompt_path(name).read_text().splitlines()
    return tuple(_from_json(json.loads(line)) for line in lines)


def prompt_path(name: str) -> pathlib.Path:
    """Where a prompt file is."""
    return _FOLDER / f"{name}.jsonl"


def generate_prompts(name: PromptFile) -> tuple[Prompt, ...]:
    """The prompts that the committed file must hold."""
    generator = random.Random(f"prompts/{name}")
    prompts = [prompt for task in world.TASKS for prompt in _task_prompts(generator, task, name)]
    if name == "evaluation":
        prompts += _held_out_prompts(generator)
    return tuple(prompts)


def _task_prompts(generator: random.Random, task: Task, name: PromptFile) -> Sequence[Prompt]:
    prompts: dict[str, Prompt] = {}
    while len(prompts) < _PER_TASK[name]:
        scene = world.random_scene(generator, task, colored=float(task in _COLOR_TASKS))
        scene = dataclasses.replace(
            scene, objects=tuple(dataclasses.replace(item, size=None) for item in scene.objects)
        )
        if world.split(scene) != name:
            continue
        # One kind of object without its background would be a caption of training.
        one_kind = len(scene.objects) == 1
        text = captions.caption(generator, scene, name_background=one_kind or generator.random() < 0.5)
        prompts.setdefault(text, Prompt(text, scene))
    return list(prompts.values())


def _held_out_prompts(generator: random.Random) -> Sequence[Prompt]:
    pairs = sorted(world.HELD_OUT_PAIRS)
    prompts: dict[str, Prompt] = {}
    while len(prompts) < _PER_TASK["evaluation"]:
        color, noun = pairs[len(prompts) % len(pairs)]
        background = generator.choice(world.BACKGROUNDS)
        if (color, background) == ("black", "night sky"):
            continue
        scene = Scene("colors", (SceneObject(noun, color),), background)
        text = captions.caption(generator, scene, name_background=True)
        prompts.setdefault(text, Prompt(text, scene, held_out=True))
    return list(prompts.values())


def _to_json(prompt: Prompt) -> dict[str, object]:
    scene = prompt.scene
    return {
        "prompt": prompt.text,
        "task": scene.task,
        "objects": [{"noun": item.noun, "color": item.color} for item in scene.objects],
        "count": scene.count,
        "relation": scene.relation,
        "background": scene.background,
        "held_out": prompt.held_out,
    }


def _from_json(data: dict[str, Any]) -> Prompt:
    objects = tuple(SceneObject(item["noun"], item["color"]) for item in data["objects"])
    scene = Scene(data["task"], objects, data["background"], data["count"], data["relation"])
    return Prompt(data["prompt"], scene, data["held_out"])


def write_prompts(name: PromptFile) -> None:
    """Writes a prompt file."""
    path = prompt_path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(_to_json(prompt)) + "\n" for prompt in generate_prompts(name)))


def main() -> None:
    """Writes both files."""
    for name in _PER_TASK:
        write_prompts(name)
        print(f"wrote {prompt_path(name)}")


if __name__ == "__main__":
    command_line.run(main)
