"""The benchmark of whole processes: cold and warm apart, and no number for a command that fails."""

import json
import os
import subprocess
import sys

import pytest

from bench import startup
from tests import tiny
from toprovar_jax import checkpoint
from toprovar_jax.errors import InputError


def test_cold_and_warm_starts_are_told_apart(tmp_path):
    folder = tmp_path / "tiny"
    checkpoint.save(folder, tiny.CONFIG, tiny.parameters(), dtype="float32", tokenizer=tiny.tokenizer_json())
    command = [sys.executable, "-m", "bench.startup", f"--checkpoint={folder}", "--runs=1"]
    command.append(f"--output={tmp_path / 'found'}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    warm = found["warm"]["seconds"]
    assert 0 < warm["min"] == warm["median"] == warm["max"] < found["cold"]["seconds"]
    assert 0 < found["warm"]["core_seconds"]["median"] < found["cold"]["core_seconds"]
    assert found["command"].startswith("python -m bench.startup --checkpoint=tiny")
    assert found["device"].startswith("cpu")
    assert done.stdout.startswith("dense: cold ")


def test_a_command_that_fails_gives_no_number(tmp_path, capfd):
    with pytest.raises(InputError, match="see the line above"):
        startup.measure(str(tmp_path / "nothing"), "dense", runs=1)
    assert "no checkpoint folder" in capfd.readouterr().err


def test_runs_that_draw_different_pictures_are_no_measurement(tmp_path, monkeypatch):
    def draw(command, **_):
        folder = tmp_path.joinpath(command[-1])
        folder.mkdir(parents=True)
        (folder / "image.png").write_bytes(os.urandom(8))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", draw)
    with pytest.raises(RuntimeError, match="run 1 drew another picture"):
        startup.measure("checkpoint", "dense", runs=1)
