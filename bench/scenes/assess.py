"""Pictures of the scenes' prompts by a pipeline, their scores, and a sheet that shows them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from bench.scenes import detector, score
from bench.scenes.prompts import Prompt
from bench.scenes.score import Score
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.pruning.plan import Plan

_SHEET_PICTURES = 16
_SHEET_COLUMNS = 4
_LABEL_HEIGHT = 48  # three lines
_FONT_SIZE = 13


def generate(
    pipeline: InfinityPipeline, asked: Sequence[Prompt], *, seed: int, batch_size: int, **settings: Any
) -> Iterator[tuple[np.ndarray, Plan]]:
    """Pictures of the prompts, one for each, as uint8 batches [batch, height, width, 3], and what ran for them.

    Args:
      pipeline: the model.
      asked: picture i shows prompt i.
      seed: picture i uses seed + i.
      batch_size: pictures generated at once; the last batch repeats its prompts, so that one shape is compiled.
      **settings: the pipeline's, as `guidance_scale`.
    """
    for start in range(0, len(asked), batch_size):
        count = min(batch_size, len(asked) - start)
        rows = [start + index % count for index in range(batch_size)]
        output = pipeline(
            [asked[row].text for row in rows],
            seed=[seed + row for row in rows],
            output_type="np",
            **settings,
        )
        yield np.asarray(output.images)[:count], output.plan


def draw_sheet(pictures: np.ndarray, labels: Sequence[str]) -> Image.Image:
    """Pictures in rows of four, each above its label.

    Args:
      pictures: uint8 [pictures, height, width, 3].
      labels: one per picture.
    """
    height, width = pictures.shape[1:3]
    rows = -(-len(pictures) // _SHEET_COLUMNS)
    sheet = Image.new("RGB", (_SHEET_COLUMNS * width, rows * (height + _LABEL_HEIGHT)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left = index % _SHEET_COLUMNS * width
        top = index // _SHEET_COLUMNS * (height + _LABEL_HEIGHT)
        sheet.paste(Image.fromarray(picture), (left, top))
        pen.text((left + 3, top + height + 1), _wrap(label, font, width - 6), fill="black", font=font, spacing=1)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


def sheet_order(asked: Sequence[Prompt]) -> np.ndarray:
    """Which pictures the sheet shows: spread evenly over the file, whatever they look like."""
    return np.linspace(0, len(asked) - 1, min(_SHEET_PICTURES, len(asked))).astype(int)


def assess(
    pipeline: InfinityPipeline, asked: Sequence[Prompt], *, seed: int, batch_size: int, **settings: Any
) -> tuple[np.ndarray, list[bool], dict[str, Score]]:
    """The pictures of the prompts, which of them are right, and the scores; arguments as for `generate`."""
    batches = generate(pipeline, asked, seed=seed, batch_size=batch_size, **settings)
    progress = tqdm(batches, total=-(-len(asked) // batch_size), unit="batch")
    pictures = np.concatenate([batch for batch, _ in progress])
    found = detector.detect(detector.load_weights(), pictures)
    right = [score.judge(prompt.scene, detections) for prompt, detections in zip(asked, found, strict=True)]
    return pictures, right, score.score(asked, found)
