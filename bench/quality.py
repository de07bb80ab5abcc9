"""How good the pictures of a checkpoint are: GenEval's six tasks over the scenes' prompts.

    python -m bench.quality --checkpoint FOLDER

Prints the share of right pictures per task with 95 % bootstrap intervals, beside what the detector scores on
ground truth; writes everything as JSON, and sixteen pictures spread evenly over the prompts as a sheet.
"""

import dataclasses
import json
import pathlib

import jax
from absl import flags

from bench.scenes import score
from bench.scenes.assess import assess, draw_sheet, sheet_order
from bench.scenes.prompts import load_prompts
from toprovar_jax import command_line
from toprovar_jax.pipeline import InfinityPipeline

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the model.", required=True)
_PROMPTS = flags.DEFINE_enum(
    "prompts", "evaluation", ["evaluation", "tuning"], "Which prompts; settings are chosen on the tuning ones."
)
_GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "Default: the checkpoint's.")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "Default: the checkpoint's.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Default: the checkpoint's.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Pictures generated at once.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the first picture; the next ones count up.")
_OUTPUT = flags.DEFINE_string("output", "bench/results/quality", "Path of the JSON and the PNG, without suffix.")


def main() -> None:
    """Generates, scores, prints and writes."""
    asked, truth = load_prompts(_PROMPTS.value), score.load_accuracy()
    pipeline = InfinityPipeline.from_pretrained(_CHECKPOINT.value, _DTYPE.value)
    settings = {"guidance_scale": _GUIDANCE_SCALE.value, "temperature": _TEMPERATURE.value}
    pictures, right, table = assess(pipeline, asked, seed=_SEED.value, batch_size=_BATCH_SIZE.value, **settings)
    print(score.format_table(table, truth))

    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    defaults = pipeline.config.defaults
    record = {
        "checkpoint": pipeline.checkpoint_digest,
        "prompts": _PROMPTS.value,
        "seed": _SEED.value,
        "dtype": pipeline.dtype,
        "device": jax.devices()[0].device_kind,
        **{name: getattr(defaults, name) if value is None else value for name, value in settings.items()},
        "scores": {name: dataclasses.asdict(value) for name, value in table.items()},
        "detector_on_ground_truth": {name: dataclasses.asdict(value) for name, value in truth.items()},
        "right": right,
    }
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    shown = sheet_order(asked)
    labels = [f"{asked[index].text} (seed {_SEED.value + index})" for index in shown]
    draw_sheet(pictures[shown], labels).save(output.with_suffix(".png"))
    print(f"wrote {output}.json and {output}.png")


if __name__ == "__main__":
    command_line.run(main)
