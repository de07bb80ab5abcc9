"""The converter where PyTorch is not installed."""

import subprocess
import sys

# An entry of None makes the import fail as that of a missing package does.
PROGRAM = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["convert", "--transformer", "a.pth", "--vae", "b.pth", "--out", "c"]
runpy.run_module("convert", run_name="__main__", alter_sys=True)
"""


def test_a_missing_torch_is_named_with_its_remedy():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: conversion needs PyTorch: pip install 'toprovar-jax[convert]'\n"
