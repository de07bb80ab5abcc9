"""Scores pictures of the world's prompts as GenEval does, from what the detector finds in them.

The detector's own accuracy, on pictures rendered from the same prompts, stands beside every score. It is measured
by

    python -m bench.scenes.score

which needs the sprite pack, and kept beside the detector's weights.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence

import jax
import numpy as np

from bench.scenes import dataset, detector, prompts, render, sprites, world
from bench.scenes.detector import Detection
from bench.scenes.prompts import Prompt
from bench.scenes.world import Relation, Scene
from toprovar_jax import command_line
from toprovar_jax.errors import InputError
from toprovar_jax.models.skeleton import Parameters

ACCURACY_PATH = detector.WEIGHTS_PATH.with_name("detector_accuracy.json")
OVERALL, HELD_OUT = "overall", "held_out"
_POSITION_THRESHOLD = (
    0.1  # GenEval's: of the two boxes' sides together, how far an offset may go without a relation
)
_RENDER_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Score:
    """A share of right pictures with the ends of its 95 % bootstrap interval, and the number of pictures."""

    mean: float
    low: float
    high: float
    count: int


def judge(scene: Scene, found: Sequence[Detection]) -> bool:
    """Whether the detected objects are what the scene asks for.

    As in GenEval: of every noun the most confident detections count, as many as are asked for; they must have the
    colour that is asked for; only the counting task minds if there are more.
    """
    chosen = []
    for item in scene.objects:
        of_noun = sorted((d for d in found if d.noun == item.noun), key=lambda d: -d.confidence)
        if len(of_noun) < scene.count or (scene.task == "counting" and len(of_noun) > scene.count):
            return False
        if item.color is not None and any(d.color != item.color for d in of_noun[: scene.count]):
            return False
        chosen.append(of_noun[0])
    return scene.relation is None or scene.relation in relations(chosen[0], chosen[1])


def relations(first: Detection, second: Detection) -> set[Relation]:
    """Where the first object is relative to the second, by GenEval's rule: none, one, or one in each direction."""
    offset_x, offset_y = first.x - second.x, first.y - second.y
    # Boxes are squares of twice the radius, and both sides enter GenEval's threshold.
    slack = _POSITION_THRESHOLD * 2 * (first.radius + second.radius)
    distance = math.hypot(offset_x, offset_y)
    if distance == 0:
        return set()
    x = math.copysign(max(abs(offset_x) - slack, 0), offset_x) / distance
    y = math.copysign(max(abs(offset_y) - slack, 0), offset_y) / distance
    holds: dict[Relation, bool] = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


def score(
    asked: Sequence[Prompt], found: Sequence[Sequence[Detection]], resamples: int = 2000
) -> dict[str, Score]:
    """Share of right pictures per task, overall and over the held-out pairs.

    Args:
      asked: one prompt per picture.
      found: the detections in every picture.
      resamples: bootstrap resamples of the pictures of every task.

    Returns:
      Scores by task; "overall" is the mean over the tasks present, "held_out" covers the prompts marked so, which
      count for nothing else.
    """
    verdicts: dict[str, list[bool]] = {}
    for prompt, detections in zip(asked, found, strict=True):
        verdicts.setdefault(HELD_OUT if prompt.held_out else prompt.scene.task, []).append(
            judge(prompt.scene, detections)
        )
    generator = np.random.default_rng(0)
    means = {
        name: generator.choice(np.array(right, float), (resamples, len(right))).mean(1)
        for name, right in verdicts.items()
    }
    table = {name: _summary(verdicts[name], means[name]) for name in (*world.TASKS, HELD_OUT) if name in verdicts}
    tasks = [name for name in world.TASKS if name in verdicts]
    if tasks:
        mean = float(np.mean([table[name].mean for name in tasks]))
        low, high = np.percentile(np.mean([means[name] for name in tasks], 0), (2.5, 97.5))
        table[OVERALL] = Score(mean, float(low), float(high), sum(table[name].count for name in tasks))
    return table


def recall(asked: Sequence[Prompt], found: Sequence[Sequence[Detection]]) -> float:
    """Share of the prompts' objects that were found, by noun and, where one is asked for, colour."""
    wanted = hits = 0
    for prompt, detections in zip(asked, found, strict=True):
        for item in prompt.scene.objects:
            matching = [d for d in detections if d.noun == item.noun and item.color in (None, d.color)]
            wanted += prompt.scene.count
            hits += min(prompt.scene.count, len(matching))
    return hits / wanted


def _summary(right: Sequence[bool], means: np.ndarray) -> Score:
    low, high = np.percentile(means, (2.5, 97.5))
    return Score(float(np.mean(right)), float(low), float(high), len(right))


def render_prompts(asked: Sequence[Prompt], atlas: render.Atlas) -> np.ndarray:
    """The pictures that serve as ground truth, float32 [prompts, height, width, 3] in [-1, 1]."""
    batch = dataset.pack([(prompt.scene, prompt.placements(), prompt.text) for prompt in asked])
    draw = jax.jit(render.render)
    pictures = []
    for start in range(0, len(asked), _RENDER_BATCH):
        # One compiled shape: the last batch repeats its first rows.
        rows = np.resize(np.arange(start, min(start + _RENDER_BATCH, len(asked))), _RENDER_BATCH)
        pictures.append(np.asarray(draw(atlas, jax.tree.map(lambda x, rows=rows: x[rows], batch))))
    return np.concatenate(pictures)[: len(asked)]


def measure_detector(parameters: Parameters, atlas: render.Atlas) -> dict[str, Score]:
    """The detector's scores on ground truth of the evaluation prompts."""
    asked = prompts.load_prompts("evaluation")
    return score(asked, detector.detect(parameters, render_prompts(asked, atlas)))


def fingerprint() -> str:
    """Identifies the committed detector and evaluation prompts."""
    contents = detector.WEIGHTS_PATH.read_bytes() + prompts.prompt_path("evaluation").read_bytes()
    return hashlib.sha256(contents).hexdigest()


def write_accuracy(table: dict[str, Score]) -> None:
    """Keeps the detector's own scores beside its weights."""
    scores = {name: dataclasses.asdict(value) for name, value in table.items()}
    ACCURACY_PATH.write_text(json.dumps({"fingerprint": fingerprint(), "scores": scores}, indent=1) + "\n")


def load_accuracy() -> dict[str, Score]:
    """The detector's own scores on ground truth.

    Raises:
      InputError: they were measured with other weights or prompts than the committed ones.
    """
    data = json.loads(ACCURACY_PATH.read_text())
    if data["fingerprint"] != fingerprint():
        raise InputError(
            f"{ACCURACY_PATH} was measured with another detector or other prompts: "
            "measure again with `python -m bench.scenes.score`"
        )
    return {name: Score(**values) for name, values in data["scores"].items()}


def format_table(table: dict[str, Score], truth: dict[str, Score]) -> str:
    """The scores in percent with their intervals, beside the detector's own on ground truth."""
    lines = [f"{'task':<18} {'score':>6}  {'95 % interval':<15} {'detector':>8}  {'prompts':>7}"]
    for name in (*world.TASKS, OVERALL, HELD_OUT):
        if name in table:
            row = table[name]
            interval = f"{100 * row.low:.1f} to {100 * row.high:.1f}"
            own = f"{100 * truth[name].mean:.1f}"
            label = name.replace("_", " ")
            lines.append(f"{label:<18} {100 * row.mean:>6.1f}  {interval:<15} {own:>8}  {row.count:>7}")
    return "\n".join(lines)


def main() -> None:
    """Measures the committed detector and keeps the result."""
    table = measure_detector(detector.load_weights(), render.build_atlas(sprites.load_pack()))
    write_accuracy(table)
    print(format_table(table, table))


if __name__ == "__main__":
    command_line.run(main)
