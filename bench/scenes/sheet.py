"""Draws the sheet that opens the README: sixteen evaluation prompts with the seeds 0 to 15, none of them chosen.

python -m bench.scenes.sheet
"""

import pathlib

import numpy as np
from absl import flags
from PIL import Image

from bench.scenes.assess import draw_sheet, sheet_order
from bench.scenes.prompts import load_prompts
from toprovar_jax import command_line
from toprovar_jax.checkpoint import EMBEDDED
from toprovar_jax.pipeline import InfinityPipeline

_QUALITY = 90


def make_sheet(pipeline: InfinityPipeline) -> Image.Image:
    """Generates the pictures of the sheet."""
    evaluation = load_prompts("evaluation")
    prompts = [evaluation[index].text for index in sheet_order(evaluation)]
    pictures = [
        np.asarray(pipeline(prompt, seed=seed, output_type="np").images[0]) for seed, prompt in enumerate(prompts)
    ]
    labels = [f"{prompt} (seed {seed})" for seed, prompt in enumerate(prompts)]
    return draw_sheet(np.stack(pictures), labels)


def main() -> None:
    """Writes the sheet."""
    output = pathlib.Path(flags.FLAGS.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    make_sheet(InfinityPipeline.from_pretrained(flags.FLAGS.checkpoint)).save(output, quality=_QUALITY)
    print(f"wrote {output}: {output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", str(EMBEDDED), "Folder of the model.")
    flags.DEFINE_string("output", "docs/samples.webp", "The picture file to write.")
    command_line.run(main)
