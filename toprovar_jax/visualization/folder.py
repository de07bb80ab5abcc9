"""Writes everything there is to see of a traced picture into one folder."""

import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from PIL import Image

from toprovar_jax import atomic_folder
from toprovar_jax.visualization import maps, plots
from toprovar_jax.visualization.measurements import PictureTrace

FIGURES: dict[str, Callable[[PictureTrace], Image.Image]] = {
    "entropy_by_scale.png": maps.entropy_by_scale,
    "entropy_by_layer.png": maps.entropy_by_layer,
    "pruned_tokens.png": maps.pruned_tokens,
    "focused_shares.png": plots.focused_shares,
    "layer_scores.png": plots.layer_scores,
}
PLAN_TABLE, PLAN_JSON = "plan.txt", "plan.json"


def write_trace(trace: PictureTrace, folder: str | PathLike[str]) -> Path:
    """Writes the figures and the plan, as a table and as JSON; an earlier trace is replaced in one step.

    Args:
      trace: the picture.
      folder: to write, with its parents where missing.

    Raises:
      InputError: the folder cannot be written, or holds something other than an earlier trace.
    """
    target = Path(folder)
    with atomic_folder.write_folder(target, marker=PLAN_TABLE, overwrite=True) as partial:
        for name, draw in FIGURES.items():
            draw(trace).save(partial / name, optimize=True)
        (partial / PLAN_TABLE).write_text(trace.plan.table() + "\n", encoding="utf-8")
        (partial / PLAN_JSON).write_text(json.dumps(trace.plan.to_json(), indent=1) + "\n", encoding="utf-8")
    return target
