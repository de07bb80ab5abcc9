"""How long a picture takes from the command line: python -m bench.startup

Every picture is drawn on the CPU by a process of its own, timed from before its start to after its end. The first
finds an empty compilation cache (cold), the others what it left there (warm). Seconds are wall time, core seconds
the work of all cores.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from absl import flags

from bench import report
from bench.speed_run import INPUT_ERROR_CODE, spread
from toprovar_jax import command_line
from toprovar_jax.checkpoint import EMBEDDED
from toprovar_jax.errors import InputError
from toprovar_jax.manifest import load_manifest

_PROMPT = "three yellow stars in a night sky"


def measure(checkpoint: str, policy: str, runs: int) -> dict[str, Any]:
    """Draws one picture cold and several warm.

    Returns:
      "cold" with "seconds" and "core_seconds"; "warm" with the spread of both.

    Raises:
      InputError: the command refuses the checkpoint or the policy; it has said why.
      RuntimeError: the command failed, or did not draw the same picture every time.
    """
    with tempfile.TemporaryDirectory() as folder:
        cold, *warm = [_draw(checkpoint, policy, Path(folder), run) for run in range(runs + 1)]
    return {
        "cold": cold,
        "warm": {name: spread([seconds[name] for seconds in warm]) for name in cold},
    }


def _draw(checkpoint: str, policy: str, folder: Path, run: int) -> dict[str, float]:
    command = [sys.executable, "-m", "toprovar_jax.generate", "--checkpoint", checkpoint, "--prompt", _PROMPT]
    command += ["--policy", policy, "--output_dir", str(folder / str(run))]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    before, started = os.times(), time.perf_counter()
    code = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode
    seconds, after = time.perf_counter() - started, os.times()
    if code == INPUT_ERROR_CODE:
        raise InputError("nothing was timed: see the line above")
    if code != 0:
        raise RuntimeError(f"the command ended with exit code {code}")
    first, this = (next((folder / name).glob("*.png")).read_bytes() for name in ("0", str(run)))
    if first != this:
        raise RuntimeError(f"run {run} drew another picture than the first")
    core_seconds = sum(after[2:4]) - sum(before[2:4])  # of children, user and system
    return {"seconds": seconds, "core_seconds": core_seconds}


def main() -> None:
    """Measures, prints and writes."""
    # This process draws nothing, and says what device the others draw on.
    jax.config.update("jax_platforms", "cpu")
    values = flags.FLAGS
    load = os.getloadavg()[0]
    results = measure(values.checkpoint, values.policy, values.runs)
    cold, warm = results["cold"], results["warm"]
    print(
        f"{values.policy}: cold {cold['seconds']:.1f} s, warm {warm['seconds']['median']:.1f} s "
        f"({warm['seconds']['min']:.1f} to {warm['seconds']['max']:.1f}, {values.runs} runs)"
    )
    record = {
        "checkpoint": load_manifest(values.checkpoint).digest,
        "prompt": _PROMPT,
        "policy": values.policy,
        "runs": values.runs,
        "load_average_before": load,
    }
    output = Path(values.output)
    print(f"wrote {report.write(output.name, {**record, **results}, output.parent)}")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", str(EMBEDDED), "Folder of the model.")
    flags.DEFINE_string("policy", "dense", "What to prune.")
    flags.DEFINE_integer("runs", 5, "Warm processes.", lower_bound=1)
    flags.DEFINE_string("output", "bench/results/startup_cpu", "Path of the JSON, without suffix.")
    command_line.run(main)
