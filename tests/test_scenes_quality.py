"""From a training run's weights to a checkpoint, its pictures and their scores, with a tiny untrained model."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from bench.scenes import (
    assess,
    prompts,
    score,
    sheet,
    stages,
    train_text,
    train_transformer,
    training,
    tune,
    weights,
    world,
)
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.skeleton import abstract_parameters
from toprovar_jax.pipeline import InfinityPipeline

TINY = training.EMBEDDED_CONFIG.with_name("tiny.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    """The checkpoint of an untrained run."""
    folder = tmp_path_factory.mktemp("run")
    config = training.load_config(TINY)
    weights.save_parameters(folder / "transformer.safetensors", train_transformer.initial_parameters(config))
    text = train_text.initial_parameters(config)["text_encoder"]
    weights.save_parameters(folder / "text_encoder.safetensors", text)
    vae = training.fresh_parameters(abstract_parameters(BSQVAE, config.model.vae, "float32"), seed=0)
    weights.save_parameters(folder / "vae.safetensors", vae)
    stages.export_checkpoint(config, folder, folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def pipeline(checkpoint) -> InfinityPipeline:
    return InfinityPipeline.from_pretrained(checkpoint, "float32")


def test_a_run_continues_from_a_checkpoint(checkpoint, pipeline, tmp_path):
    stages.import_checkpoint(checkpoint, tmp_path)
    stages.export_checkpoint(training.load_config(TINY), tmp_path, tmp_path / "again")
    again = InfinityPipeline.from_pretrained(tmp_path / "again", "float32")
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), again.params, pipeline.params))
    stage = stages.define_stage("transformer", training.load_config(TINY), tmp_path, None)
    assert "blocks" in stages.load_constants("transformer", tmp_path, stage).text_encoder


def test_every_prompt_gets_its_own_picture_whatever_the_batches(pipeline):
    asked = prompts.load_prompts("tuning")[:3]
    (first, _), (second, _) = assess.generate(pipeline, asked, seed=7, batch_size=2)
    assert first.shape == (2, 64, 64, 3)
    assert second.shape == (1, 64, 64, 3)
    ((others, _),) = assess.generate(pipeline, asked[1:], seed=8, batch_size=2)
    assert (np.abs(others.astype(int) - np.stack([first[1], second[0]])) <= 1).all()
    assert (others[0] != others[1]).any()


def test_the_command_prints_the_table_and_writes_json_and_sheet(checkpoint, tmp_path):
    output = tmp_path / "tables" / "quality"
    command = [sys.executable, "-m", "bench.quality", f"--checkpoint={checkpoint}", f"--output={output}"]
    settings = ["--prompts=tuning", "--dtype=float32", "--batch_size=48", "--temperature=1.5"]
    run = subprocess.run([*command, *settings], capture_output=True, text=True, check=True)
    names = [line.split("  ")[0] for line in run.stdout.splitlines()[1:8]]
    assert names == [*(task.replace("_", " ") for task in world.TASKS), "overall"]
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["prompts"] == "tuning"
    assert (record["guidance_scale"], record["temperature"]) == (3.0, 1.5)
    assert len(record["right"]) == record["scores"]["overall"]["count"] == 144
    with Image.open(output.with_suffix(".png")) as sheet:
        assert sheet.size == (4 * 64, 4 * (64 + 48))


def test_the_sheet_shows_pictures_in_rows_of_four_with_labels():
    pictures = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (10, 20, 30, 40, 50)])
    sheet = np.asarray(assess.draw_sheet(pictures, ["a label of several words"] * 5))
    assert sheet.shape == (2 * (64 + 48), 4 * 64, 3)
    assert sheet[10, 3 * 64 + 10].tolist() == [40, 40, 40]
    assert sheet[64 + 48 + 10, 10].tolist() == [50, 50, 50]
    assert (sheet[64:112, :64] < 128).any()


def test_the_sheet_is_spread_over_the_prompts():
    asked = prompts.load_prompts("evaluation")
    order = assess.sheet_order(asked)
    assert len(set(order)) == 16
    assert {asked[index].scene.task for index in order} == {prompt.scene.task for prompt in asked}


def test_settings_are_compared_on_the_same_prompts_and_seeds(pipeline):
    asked = prompts.load_prompts("tuning")[:2]
    trials = list(tune.scan(pipeline, asked, [3.0], [0.5, 0.7], batch_size=2))
    assert [(trial.guidance_scale, trial.temperature) for trial in trials] == [(3.0, 0.5), (3.0, 0.7)]
    settings = {"guidance_scale": 3.0, "temperature": 0.7}
    assert trials[1].scores == assess.assess(pipeline, asked, seed=0, batch_size=2, **settings)[2]


def test_the_best_settings_are_the_first_of_the_highest_score():
    trials = [
        tune.Trial(
            guidance, 0.5, {"colors": score.Score(0.3, 0, 1, 9), "overall": score.Score(mean, 0.25, 0.75, 9)}
        )
        for guidance, mean in ((1.0, 0.4), (2.0, 0.5), (3.0, 0.5))
    ]
    assert tune.best(trials) is trials[1]
    assert str(trials[1]) == "guidance 2, temperature 0.5: 50.0 (25.0 to 75.0)  colors 30.0  overall 50.0"


def test_the_readme_sheet_shows_sixteen_prompts_with_the_first_seeds(pipeline):
    made = np.asarray(sheet.make_sheet(pipeline))
    assert made.shape == (4 * (64 + 48), 4 * 64, 3)
    evaluation = prompts.load_prompts("evaluation")
    last = evaluation[assess.sheet_order(evaluation)[15]].text
    alone = pipeline(last, seed=15, output_type="np").images[0]
    np.testing.assert_array_equal(made[-64 - 48 : -48, -64:], alone)


def test_a_word_outside_the_world_still_gives_a_picture_and_says_what_there_is(pipeline):
    with pytest.warns(UserWarning, match=r"the model does not know 'dragon'; it knows apple, .* wooden table$"):
        (image,) = pipeline("a red dragon").images
    assert image.size == (64, 64)
