"""Chooses guidance and temperature on the tuning prompts, which the evaluation shares no combination with.

    python -m bench.scenes.tune --guidance_scales 2,3,4 --temperatures 0.3,0.5,0.7

Scores every pair of settings on the same prompts and seeds, prints a line for each and the best pair, and writes
them as JSON. The chosen ones become the checkpoint's with its next export (`defaults` in the run's configuration).
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from absl import flags

from bench import report
from bench.scenes import score
from bench.scenes.assess import assess
from bench.scenes.prompts import Prompt, load_prompts
from bench.scenes.score import Score
from toprovar_jax import command_line
from toprovar_jax.checkpoint import EMBEDDED
from toprovar_jax.errors import InputError
from toprovar_jax.pipeline import InfinityPipeline


@dataclasses.dataclass(frozen=True)
class Trial:
    """Settings and the scores of their pictures."""

    guidance_scale: float
    temperature: float
    scores: dict[str, Score]

    @property
    def overall(self) -> Score:
        """Over all tasks."""
        return self.scores[score.OVERALL]

    def __str__(self) -> str:
        """One line: settings, overall score with its interval, scores by task."""
        overall = self.overall
        tasks = "  ".join(f"{name} {100 * value.mean:.1f}" for name, value in self.scores.items())
        return (
            f"guidance {self.guidance_scale:g}, temperature {self.temperature:g}: {100 * overall.mean:.1f} "
            f"({100 * overall.low:.1f} to {100 * overall.high:.1f})  {tasks}"
        )


def scan(
    pipeline: InfinityPipeline,
    asked: Sequence[Prompt],
    guidance_scales: Sequence[float],
    temperatures: Sequence[float],
    *,
    batch_size: int,
) -> Iterator[Trial]:
    """Scores every pair of settings on pictures of the same prompts and seeds."""
    for guidance_scale, temperature in itertools.product(guidance_scales, temperatures):
        settings = {"guidance_scale": guidance_scale, "temperature": temperature}
        _, _, scores = assess(pipeline, asked, seed=0, batch_size=batch_size, **settings)
        yield Trial(guidance_scale, temperature, scores)


def best(trials: Sequence[Trial]) -> Trial:
    """The highest overall score; the first of several."""
    return max(trials, key=lambda trial: trial.overall.mean)


def main() -> None:
    """Scans the grid of the flags."""
    values = flags.FLAGS
    guidance_scales = _numbers("guidance_scales", values.guidance_scales)
    temperatures = _numbers("temperatures", values.temperatures)
    pipeline = InfinityPipeline.from_pretrained(values.checkpoint)
    asked = load_prompts("tuning") * values.num_seeds
    trials = []
    for trial in scan(pipeline, asked, guidance_scales, temperatures, batch_size=values.batch_size):
        print(trial, flush=True)
        trials.append(trial)
    print(f"best: {best(trials)}")
    results = {"checkpoint": pipeline.checkpoint_digest, "trials": [dataclasses.asdict(trial) for trial in trials]}
    print(f"wrote {report.write('tuning', results)}")


def _numbers(name: str, values: Sequence[str]) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        raise InputError(f"--{name} must be numbers with commas between them, got {','.join(values)}") from None
    if not numbers:
        raise InputError(f"--{name} is empty: name a number")
    return numbers


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", str(EMBEDDED), "Folder of the model.")
    flags.DEFINE_list("guidance_scales", ["1", "2", "3", "4"], "Guidance to try.")
    flags.DEFINE_list("temperatures", ["0.3", "0.5", "0.7", "1"], "Temperatures to try.")
    flags.DEFINE_integer("num_seeds", 2, "Pictures of every prompt.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 32, "Pictures generated at once.", lower_bound=1)
    command_line.run(main)
