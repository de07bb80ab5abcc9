"""The model that comes with the package: complete, small, and what a first command uses."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bench.scenes import captions, detector, score
from bench.scenes.world import Scene, SceneObject
from toprovar_jax.checkpoint import EMBEDDED, load_tokenizer
from toprovar_jax.manifest import load_manifest, verify
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.text import Tokenizer


def test_it_is_complete_and_small():
    manifest = load_manifest(EMBEDDED)
    verify(EMBEDDED, manifest.files)
    assert manifest.dtype == "bfloat16"
    assert sum(file.size for file in manifest.files) <= 40e6


def test_it_knows_the_words_of_the_world_and_says_so_at_others():
    knows = load_manifest(EMBEDDED).config.knows
    assert knows == captions.summary()
    tokenizer = Tokenizer(load_tokenizer(EMBEDDED), knows)
    tokenizer.encode([" ".join(captions.vocabulary()[:20])])
    with pytest.warns(UserWarning, match=r"the model does not know 'dragon'; it knows apple, .* wooden table$"):
        tokenizer.encode(["a red dragon"])


def test_a_pipeline_without_a_path_loads_it():
    assert InfinityPipeline.from_pretrained().checkpoint_digest == load_manifest(EMBEDDED).digest


def test_the_command_without_a_checkpoint_draws_what_it_is_asked_for(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS")  # as a user runs it: optimised
    command = [sys.executable, "-m", "toprovar_jax.generate", "--prompt", "three yellow stars in a night sky"]
    run = subprocess.run(
        [*command, "--output_dir", tmp_path], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr
    picture = np.asarray(Image.open(tmp_path / "image_0000_seed_0.png"))
    assert picture.shape == (256, 256, 3)
    (found,) = detector.detect(detector.load_weights(), picture[None])
    assert score.judge(Scene("counting", (SceneObject("star", "yellow"),), "night sky", count=3), found)
