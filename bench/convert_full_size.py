"""Converts a synthetic checkpoint of full size and watches its memory: python -m bench.convert_full_size

Writes float32 files of a release's size in the published layout (2B: 9.3 GB; about 30 GB of disk while it runs),
runs `python -m convert` on them, samples the converter's anonymous memory from outside, then loads the checkpoint
with all digests verified and compares every value with the files.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from absl import flags
from torch import nn

from bench import report
from bench.synthetic_checkpoint import randomize
from convert import conversion
from convert.readers import read_weights
from convert.reference import bsq_vae, infinity
from toprovar_jax import checkpoint, command_line
from toprovar_jax.checkpoint import Component
from toprovar_jax.config import ARCHITECTURES, VAE_STRIDE_8, VAE_STRIDE_16, VAEConfig
from toprovar_jax.errors import InputError
from toprovar_jax.manifest import load_manifest

MEMORY_LIMIT = 8 * 10**9
SAMPLE_SECONDS = 0.02


def write_official(module: type[nn.Module], config: Any, path: Path, wrap: str | None, seed: int) -> None:
    """Writes a file of random weights; they live in memory maps until they are saved."""
    with torch.device("meta"):
        shapes = {name: (x.shape, x.dtype) for name, x in module(config).state_dict().items()}
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        tensors = {
            name: torch.from_file(f"{scratch}/{i}", shared=True, size=shape.numel(), dtype=dtype).view(shape)
            for i, (name, (shape, dtype)) in enumerate(shapes.items())
        }
        randomize(tensors, seed)
        torch.save(tensors if wrap is None else {wrap: tensors}, path)


def anonymous_memory(process_id: int) -> int:
    """Bytes of a process that no file backs; 0 once it has ended."""
    try:
        for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def watch(command: list[str]) -> tuple[int, float]:
    """Runs a command; returns its peak of anonymous memory in bytes and its seconds.

    Raises:
      InputError: the command fails.
    """
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_memory(process.pid))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode != 0:
        raise InputError(f"the conversion failed with exit code {process.returncode}")
    return peak, time.perf_counter() - started


def count_differences(out: Path, component: Component, source: Path, config: conversion.ModelConfig) -> int:
    """Loads a component, digests verified, and counts values that are not those of the file, rounded."""
    expected = checkpoint.flatten(conversion.map_parameters(read_weights(source), component, config))
    loaded = checkpoint.flatten(checkpoint.load_parameters(out, component))
    return sum(int(np.sum(np.asarray(leaf) != expected[path].astype(leaf.dtype))) for path, leaf in loaded.items())


def main() -> None:
    """Writes, converts, verifies; prints and stores the numbers; fails where memory passes the limit."""
    jax.config.update("jax_platforms", "cpu")
    values = flags.FLAGS
    architecture = ARCHITECTURES[values.model]
    levels = VAE_STRIDE_8 if architecture.patchify else VAE_STRIDE_16
    vae_config = VAEConfig(code_dim=architecture.code_dim, channel_multipliers=levels)
    if values.work_dir is not None:
        Path(values.work_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=values.work_dir) as folder:
        transformer, vae, out = (Path(folder) / name for name in ("transformer.pth", "vae.pth", "checkpoint"))
        write_official(infinity.Infinity, architecture, transformer, None, seed=0)
        write_official(bsq_vae.BSQVAE, vae_config, vae, "vae", seed=1)
        command = ["-m", "convert", "--transformer", str(transformer), "--vae", str(vae), "--out", str(out)]
        peak, seconds = watch([sys.executable, *command, "--dtype", values.dtype])
        manifest = load_manifest(out)
        different = count_differences(out, "transformer", transformer, manifest.config.transformer)
        different += count_differences(out, "vae", vae, manifest.config.vae)
        results = {
            "model": values.model,
            "dtype": values.dtype,
            "input_bytes": transformer.stat().st_size + vae.stat().st_size,
            "output_bytes": sum(record.size for record in manifest.files),
            "peak_anonymous_bytes": peak,
            "conversion_seconds": round(seconds, 1),
            "different_values": different,
        }
    for name, value in results.items():
        print(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
    print(f"wrote {report.write(f'convert_full_size_{values.model}_{values.dtype}', results, Path(values.out))}")
    if peak > MEMORY_LIMIT or different:
        raise InputError("the conversion took too much memory or changed values: see the numbers above")


if __name__ == "__main__":
    flags.DEFINE_enum("model", "infinity_2b", list(ARCHITECTURES), "Architecture.")
    flags.DEFINE_enum("dtype", "float32", checkpoint.STORED_DTYPES, "Precision to store.")
    flags.DEFINE_string("work_dir", None, "Folder for the files, removed at the end; the system's by default.")
    flags.DEFINE_string("out", str(report.RESULTS), "Folder for the JSON.")
    command_line.run(main)
