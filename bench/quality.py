"""How good the pictures of a checkpoint are: GenEval's six tasks over the scenes' prompts.

    python -m bench.quality
    python -m bench.quality --policies all --num_seeds 4

The first prints the share of right pictures per task with 95 % bootstrap intervals, beside what the detector
scores on ground truth; it writes everything as JSON, and sixteen pictures spread evenly over the prompts. The
second compares policies on the same prompts and seeds: score, likeness to the dense pictures, operations and, at
last, time; after every policy it writes JSON and the frontier of quality and cost anew. Prompts with held-out
pairs are left out there.
"""

import dataclasses
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from absl import flags
from PIL import Image

from bench import policies, policy_cases, policy_rows, report
from bench.scenes import score
from bench.scenes.assess import assess, draw_sheet, sheet_order
from bench.scenes.prompts import Prompt, load_prompts
from toprovar_jax import command_line
from toprovar_jax.checkpoint import DTYPES, EMBEDDED
from toprovar_jax.errors import InputError
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.pruning.profile import Profile, load_profile
from toprovar_jax.pruning.skipvar import SkipVAR, load_decisions


def main() -> None:
    """Generates, scores, prints and writes."""
    values = flags.FLAGS
    command_line.use_compilation_cache()
    pipeline = InfinityPipeline.from_pretrained(values.checkpoint, values.dtype)
    settings = {"guidance_scale": values.guidance_scale, "temperature": values.temperature}
    asked = load_prompts(values.prompts)
    output = pathlib.Path(values.output or f"bench/results/{'policies' if values.policies else 'quality'}")
    defaults = pipeline.config.defaults
    record = {
        "checkpoint": pipeline.checkpoint_digest,
        "prompts": values.prompts,
        "seed": values.seed,
        "batch_size": values.batch_size,
        "dtype": pipeline.dtype,
        **{name: getattr(defaults, name) if value is None else value for name, value in settings.items()},
    }
    measure = _compare_policies if values.policies else _measure_model
    for numbers, picture in measure(pipeline, asked, settings):
        report.write(output.name, record | numbers, output.parent)
        picture.save(output.with_name(f"{output.name}.png"))
    print(f"wrote {output}.json and {output}.png")


def _measure_model(
    pipeline: InfinityPipeline, asked: tuple[Prompt, ...], settings: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    """The six tasks, and the sheet."""
    values = flags.FLAGS
    truth = score.load_accuracy()
    pictures, right, table = assess(pipeline, asked, seed=values.seed, batch_size=values.batch_size, **settings)
    print(score.format_table(table, truth))
    shown = sheet_order(asked)
    labels = [f"{asked[index].text} (seed {values.seed + index})" for index in shown]
    numbers = {
        "scores": {name: dataclasses.asdict(value) for name, value in table.items()},
        "detector_on_ground_truth": {name: dataclasses.asdict(value) for name, value in truth.items()},
        "right": right,
    }
    yield numbers, draw_sheet(pictures[shown], labels)


def _compare_policies(
    pipeline: InfinityPipeline, asked: tuple[Prompt, ...], settings: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    """A row per policy, and the frontier: after every policy's pictures, and again after its times."""
    started, values = time.perf_counter(), flags.FLAGS
    decisions = load_decisions(values.checkpoint)
    all_cases = policy_cases.all_cases(
        load_profile(values.checkpoint),
        None if decisions is None else SkipVAR(decisions),
        more_profiles(values.profiles),
    )
    cases = policy_cases.choose(values.policies, all_cases)
    asked = tuple(prompt for prompt in asked if not prompt.held_out)
    tasks = [prompt.scene.task for prompt in asked]
    runs: list[policies.Run] = []

    def report_line(what: str) -> None:
        print(f"after {time.perf_counter() - started:.0f} s {what}", flush=True)

    def known(what: str) -> tuple[dict[str, Any], Image.Image]:
        rows = policy_rows.make_rows(runs, tasks)
        report_line(f"{what}:")
        print(policy_rows.format_rows(rows), flush=True)
        numbers = {"num_seeds": values.num_seeds, "policies": [dataclasses.asdict(row) for row in rows]}
        return numbers, policy_rows.draw_frontier(rows)

    drawn = policies.run_cases(
        pipeline,
        cases,
        asked,
        num_seeds=values.num_seeds,
        seed=values.seed,
        batch_size=values.batch_size,
        report=report_line,
        **settings,
    )
    for run in drawn:
        runs.append(run)
        yield known(f"judged {run.case.name}")
    for index, run in enumerate(runs if values.num_timed_calls else ()):
        runs[index] = policies.timed(
            pipeline, run, asked[0], seed=values.seed, num_calls=values.num_timed_calls, **settings
        )
        yield known(f"timed {run.case.name}")


def more_profiles(arguments: list[str]) -> dict[str, Profile]:
    """Profiles by name, from "name=folder"."""
    profiles = {}
    for argument in arguments:
        name, _, folder = argument.partition("=")
        if not folder or (profile := load_profile(folder)) is None:
            raise InputError(
                f"no profile at {argument!r}: pass name=FOLDER, with a folder that calibration wrote to"
            )
        profiles[name] = profile
    return profiles


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", str(EMBEDDED), "Folder of the model.")
    flags.DEFINE_enum(
        "prompts", "evaluation", ["evaluation", "tuning"], "Which prompts; settings are chosen on the tuning ones."
    )
    flags.DEFINE_list("policies", [], "Policies to compare, or all; the dense one always comes along.")
    flags.DEFINE_list("profiles", [], "More profiles to compare, as name=FOLDER, each as policy 'toprovar name'.")
    flags.DEFINE_integer("num_seeds", 1, "Pictures of every prompt under every policy.", lower_bound=1)
    flags.DEFINE_float("guidance_scale", None, "Default: the checkpoint's.")
    flags.DEFINE_float("temperature", None, "Default: the checkpoint's.")
    flags.DEFINE_enum("dtype", None, DTYPES, "Default: the checkpoint's.")
    flags.DEFINE_integer(
        "batch_size", 32, "Pictures generated at once; with --policies, each still follows its own plan."
    )
    flags.DEFINE_integer(
        "num_timed_calls",
        7,
        "With --policies: calls of which the median time is taken, at last; 0 leaves times out.",
        lower_bound=0,
    )
    flags.DEFINE_integer("seed", 0, "Seed of the first picture; the next ones count up.")
    flags.DEFINE_string(
        "output",
        None,
        "Path of the JSON and the PNG, without suffix. Default: bench/results/quality, with --policies "
        "bench/results/policies.",
    )
    command_line.run(main)
