"""From published-format files to a picture, as a user does it: convert, install, generate."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toprovar_jax.checkpoint import EMBEDDED
from toprovar_jax.manifest import load_manifest

ROOT = Path(__file__).parents[2]
PROMPT = "a small red cat, left of a dog"


def run(*command, cwd=ROOT, **environment):
    result = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Converted from official-format files with a T5 text encoder and a real tokenizer."""
    folder = tmp_path_factory.mktemp("files")
    run(sys.executable, "-m", "bench.synthetic_checkpoint", "--out", folder / "official")
    run(
        *(sys.executable, "-m", "convert", "--out", folder / "checkpoint"),
        *("--transformer", folder / "official" / "transformer.pth", "--vae", folder / "official" / "vae.pth"),
        *("--text_encoder", folder / "official" / "text_encoder"),
    )
    return folder / "checkpoint"


def generate(python, checkpoint, folder, cache, cwd=ROOT):
    arguments = ("--prompt", PROMPT, "--pixels", "0.06M", "--output_dir", folder)
    run(
        python,
        "-m",
        "toprovar_jax.generate",
        "--checkpoint",
        checkpoint,
        *arguments,
        cwd=cwd,
        XDG_CACHE_HOME=cache,
    )
    return np.asarray(Image.open(folder / "image_0000_seed_0.png"))


def test_a_converted_checkpoint_generates_the_same_pixels_twice(checkpoint, cache, tmp_path):
    first, second = (generate(sys.executable, checkpoint, tmp_path / out, cache) for out in "ab")
    assert first.shape == (256, 256, 3)
    assert first.std() > 1
    np.testing.assert_array_equal(first, second)


def test_the_wheel_generates_in_a_clean_environment_without_torch(checkpoint, cache, tmp_path):
    # Built from what git tracks: folders of earlier builds must not leak into the wheel.
    run("git", "clone", "--quiet", "--shared", ROOT, tmp_path / "source")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, tmp_path / "source")
    (wheel,) = tmp_path.glob("toprovar_jax-*.whl")
    venv.create(tmp_path / "environment", with_pip=True)
    python = tmp_path / "environment" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    listing = (
        "import importlib.util as u, toprovar_jax, pallas_kernels, convert; "
        "print([name for name in ('torch', 'tests', 'bench') if u.find_spec(name)], toprovar_jax.__file__)"
    )
    outside = tmp_path / "outside"
    outside.mkdir()
    found, file = run(python, "-c", listing, cwd=outside).rsplit(maxsplit=1)
    assert found == "[]"
    assert Path(file).is_relative_to(tmp_path / "environment")
    embedded = "import toprovar_jax; print(toprovar_jax.InfinityPipeline.from_pretrained().checkpoint_digest)"
    assert run(python, "-c", embedded, cwd=outside).strip() == load_manifest(EMBEDDED).digest
    image = generate(python, checkpoint, tmp_path / "images", cache, cwd=outside)
    assert image.shape == (256, 256, 3)
    assert image.std() > 1
