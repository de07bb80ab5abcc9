"""The command: files it writes, what it prints, and one line with exit code 2 for every mistake."""

import gc
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from tests import tiny
from toprovar_jax import checkpoint, command_line, generate
from toprovar_jax.manifest import load_manifest
from toprovar_jax.pruning.fastvar import FastVAR
from toprovar_jax.schedule import scale_schedule
from toprovar_jax.visualization.folder import FIGURES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    checkpoint.save(path, tiny.CONFIG, tiny.parameters(), dtype="float32", tokenizer=tiny.tokenizer_json())
    return path


@pytest.fixture(autouse=True)
def _own_compilation_cache(tmp_path_factory, monkeypatch):
    """The command in this process keeps its programs in a folder of the test's; later tests keep none."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    folder = tmp_path_factory.mktemp("own_cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    yield
    assert jax.config.jax_compilation_cache_dir in (
        before["jax_compilation_cache_dir"],
        f"{folder}/toprovar_jax/xla",
    )
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def run_command(*arguments, cache):
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "toprovar_jax.generate", *(str(part) for part in arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def test_two_runs_write_identical_pixels_and_the_second_is_warm(folder, tmp_path):
    arguments = ("--checkpoint", folder, "--prompt", "a red cat", "--seed", 5, "--num_images", 2)
    runs = [run_command(*arguments, "--output_dir", tmp_path / out, cache=tmp_path / "cache") for out in "ab"]
    compile_seconds = []
    for run, out in zip(runs, "ab", strict=True):
        assert run.returncode == 0, run.stderr
        lines = run.stdout.splitlines()
        assert lines[:2] == [str(tmp_path / out / f"image_0000_seed_{seed}.png") for seed in (5, 6)]
        timings = re.fullmatch(
            r"cold: compile ([\d.]+) s \| warm: text .*, 7 scales .*, decode .*, total .*", lines[2]
        )
        assert timings
        compile_seconds.append(float(timings[1]))
        assert "7/7" in run.stderr
    assert compile_seconds[1] < compile_seconds[0]
    assert any((tmp_path / "cache" / "toprovar_jax" / "xla").iterdir())
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "image_0000_seed_5.png",
        "image_0000_seed_6.png",
    ]
    expected = tiny.pipeline()("a red cat", seed=5, num_images_per_prompt=2, output_type="np").images
    for i, seed in enumerate((5, 6)):
        images = [Image.open(tmp_path / out / f"image_0000_seed_{seed}.png") for out in "ab"]
        np.testing.assert_array_equal(np.asarray(images[0]), np.asarray(images[1]))
        np.testing.assert_array_equal(np.asarray(images[0]), expected[i])
        assert images[0].text == {
            "prompt": "a red cat",
            "seed": str(seed),
            "guidance_scale": "3.0",
            "temperature": "0.7",
            "pixels": "0.06M",
            "policy": "dense",
            "size": "32x32",
            "dtype": "float32",
            "checkpoint": load_manifest(folder).digest,
        }


def test_a_policy_and_the_plan_of_its_trace_write_the_same_picture(folder, tmp_path):
    pictures = []
    trace = tmp_path / "trace" / "image_0000_seed_0"
    for policy, *more in (("fastvar", "--save_trace", trace.parent), (trace / "plan.json",)):
        out = tmp_path / Path(policy).stem
        arguments = ("--checkpoint", folder, "--prompt", "a red cat", "--policy", policy, "--output_dir", out)
        run = run_command(*arguments, *more, cache=tmp_path / "cache")
        assert run.returncode == 0, run.stderr
        assert (str(trace) in run.stdout.splitlines()) == bool(more)
        assert ", 5 scales " in run.stdout
        assert "7/7" in run.stderr
        with Image.open(out / "image_0000_seed_0.png") as image:
            assert image.text["policy"] == str(policy)
            pictures.append(np.asarray(image))
    np.testing.assert_array_equal(*pictures)
    assert {path.name for path in trace.iterdir()} == {*FIGURES, "plan.txt", "plan.json"}
    (plan,) = FastVAR().plans(scale_schedule(pixels="0.06M"), tiny.CONFIG.transformer.depth)
    assert (trace / "plan.txt").read_text() == plan.table() + "\n"


@pytest.fixture
def run_here(capsys):
    """Runs the command in this process, where it must end with one line on standard error."""

    def run(*arguments):
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as stopped:
            command_line.run(generate.main, ["generate", *(str(part) for part in arguments)])
        flags.FLAGS.unparse_flags()
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return stopped.value.code, captured.err

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass what to draw with --prompt TEXT or --prompt_file FILE, one of the two"),
        (
            ["--prompt", "a", "--prompt_file", "b"],
            "pass what to draw with --prompt TEXT or --prompt_file FILE, one of",
        ),
        (["--prompt", " "], "the prompt is empty: say what to draw"),
        (["--prompt_file", "missing.txt"], "cannot read the prompts of missing.txt as UTF-8 text"),
        (["--prompt", "a", "--checkpoint", "nowhere"], "no checkpoint folder at nowhere: make one with"),
        (["--prompt", "a", "--colour", "red"], "Unknown command line flag 'colour'"),
        (["--prompt", "a", "--seed", "x"], "flag --seed=x"),
        (
            ["--prompt", "a", "--dtype", "float16"],
            "flag --dtype=float16: value should be one of <float32|bfloat16|float8_e4m3fn>",
        ),
        (
            ["--prompt", "a", "--policy", "sparse"],
            "unknown policy 'sparse': choose one of dense, fastvar, skipvar",
        ),
        (["--prompt", "a", "--policy", "missing.json"], "cannot read the plan missing.json: "),
        (["a cat"], "unexpected argument 'a cat': every input is given by a flag; see --help"),
    ],
)
def test_mistakes_end_in_one_line(run_here, arguments, message, tmp_path):
    code, error = run_here("--output_dir", tmp_path, *arguments)
    assert code == 2
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pixels", "9M"], "unknown pixel budget '9M': choose one of 0.06M, 0.25M, 0.60M, 1M"),
        (["--aspect_ratio", "20"], "no aspect ratio near 20 (height / width): choose one from 0.333 to 3.0"),
        (["--height", "64"], "height and width belong together: pass both, or aspect_ratio instead"),
        (["--num_images", "0"], "num_images_per_prompt must be a whole number of at least 1, got 0"),
        (["--prompt", "caf\udce9"], "the prompt is no valid text ('caf\\udce9'): pass it in UTF-8"),
    ],
)
def test_impossible_settings_write_nothing(folder, capsys, arguments, message, tmp_path):
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stopped:
        command_line.run(
            generate.main,
            [
                "generate",
                "--checkpoint",
                str(folder),
                "--prompt",
                "a",
                "--output_dir",
                str(tmp_path / "a" / "b"),
                *arguments,
            ],
        )
    flags.FLAGS.unparse_flags()
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pixels", "9M"], "unknown pixel budget '9M': choose one of 0.06M, 0.25M, 0.60M, 1M"),
        (["--height", "64"], "height and width belong together: pass both, or aspect_ratio instead"),
        (["--temperature", "0"], "temperature must be above 0, got 0.0: use top_k=1 for greedy sampling"),
        (["--seed", "-1"], "seeds must lie between 0 and 2**32 - 1, got -1"),
        (["--num_images", "0"], "num_images_per_prompt must be a whole number of at least 1, got 0"),
    ],
)
def test_impossible_settings_are_found_before_the_weights_are_loaded(
    folder, run_here, arguments, message, tmp_path
):
    unloadable = shutil.copytree(folder, tmp_path / "checkpoint")
    for weights in unloadable.rglob("ocdbt.process_0/d/*"):
        weights.write_bytes(bytes(weights.stat().st_size))
    common = ("--prompt", "a", "--checkpoint", unloadable, "--output_dir", tmp_path / "images")
    assert run_here(*common, *arguments) == (2, f"error: {message}\n")
    assert "not the recorded SHA-256" in run_here(*common)[1]


@pytest.mark.parametrize("flag", ["--output_dir", "--save_trace"])
def test_an_unwritable_folder_is_found_before_anything_is_loaded(run_here, flag, tmp_path):
    (tmp_path / "file").write_text("")
    code, error = run_here(
        "--prompt", "a", "--checkpoint", "nowhere", "--output_dir", tmp_path / "a", flag, tmp_path / "file" / "b"
    )
    assert code == 2
    assert "cannot write to the output folder" in error
    assert f"choose another {flag}" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_image_that_cannot_be_written_leaves_nothing_half_written(folder, tmp_path, tmp_path_factory):
    (tmp_path / "image_0000_seed_0.png").mkdir()
    run = run_command(
        "--prompt", "a", "--checkpoint", folder, "--output_dir", tmp_path, cache=tmp_path_factory.mktemp("cache")
    )
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == (
        f"error: cannot write {tmp_path}/image_0000_seed_0.png (Is a directory): make room for it or choose "
        "another --output_dir"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["image_0000_seed_0.png"]


def test_prompt_files_without_prompts_are_refused(run_here, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n  \n")
    code, error = run_here("--prompt_file", tmp_path / "prompts.txt", "--output_dir", tmp_path)
    assert code == 2
    assert "holds no prompt: write one per line" in error


def test_commands_seldom_search_for_garbage_and_never_in_modules():
    seen = []
    before = gc.get_threshold()
    gc.set_threshold(700)
    gc.unfreeze()
    try:
        command_line.run(lambda: seen.append((gc.get_freeze_count(), gc.get_threshold()[0])), ["command"])
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
    ((frozen, threshold),) = seen
    assert frozen > 100_000
    assert threshold > 10_000
