"""How fast images are made: python -m bench.speed --model infinity_2b --policy dense

Every policy is timed in a new process that finds its programs in the compilation cache. Where the cache lacks
them, a process before it fills it, and its start is kept as the cold one. The total of a call is timed in other
calls than its stages; all are medians after warm-up, from prompts in text to pixels on the host.
"""

import dataclasses
import json
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
from bench.speed_run import INPUT_ERROR_CODE, Case
from toprovar_jax import command_line
from toprovar_jax.errors import InputError
from toprovar_jax.pruning.policies import POLICIES

POLICY_NAMES = (*POLICIES, "toprovar")


def result_name(case: Case) -> str:
    """Name of the JSON file of a case, without its ending."""
    parts = ["speed", Path(case.model).name, Path(case.policy).stem]
    if case.dtype != "bfloat16":
        parts.append(case.dtype)
    if case.pixels != "1M":
        parts.append(case.pixels)
    if case.batch != 1:
        parts.append(f"batch{case.batch}")
    return "_".join(parts)


def time_case(case: Case, out: Path) -> dict[str, Any]:
    """Times a case and writes its JSON; a cold start on the way to it gets a file of its own.

    Args:
      case: what to time; when and where it starts is set here.
      out: folder for the JSON.

    Raises:
      InputError: the case is impossible; its process has said why.
    """
    name = result_name(case)
    cold_file = out / f"{name}_cold.json"
    result = _run_in_process(dataclasses.replace(case, if_cold=False))
    if result["cold"]:
        report.write(cold_file.stem, result, out)
        result = _run_in_process(dataclasses.replace(case, if_cold=True))
    if cold_file.exists():
        cold = json.loads(cold_file.read_text(encoding="utf-8"))
        result["cold_start"] = {key: cold[key] for key in ("date", "commit", "start_s")}
    path = report.write(name, result, out)
    print(f"{stage_table(result)}\nwrote {path}", flush=True)
    return result


def _run_in_process(case: Case) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        case = dataclasses.replace(case, out=str(Path(folder) / "result.json"), started=time.time())
        command = [sys.executable, "-m", "bench.speed_run", json.dumps(dataclasses.asdict(case))]
        code = subprocess.run(command, check=False).returncode
        if code == INPUT_ERROR_CODE:
            raise InputError(f"{case.policy} was not timed: see the line above")
        if not Path(case.out).exists():
            raise RuntimeError(f"timing {case.policy} ended with exit code {code}")
        if code != 0:
            print("warning: the profile failed, its process has said why", file=sys.stderr)
        result: dict[str, Any] = json.loads(Path(case.out).read_text(encoding="utf-8"))
    return result


def stage_table(result: dict[str, Any]) -> str:
    """A line for every stage of a case, and what is known of the whole."""
    profile = result.get("profile", {})
    kinds = list(dict.fromkeys(kind for stage in profile.values() for kind in stage["kinds"]))
    lines = [
        f"{result['model']}, {result['policy']}, {result['dtype']}, {result['pixels']}, batch {result['batch']}",
        f"{'stage':<14}{'ms':>9}{'least':>9}{'most':>9}{'floor':>9}{'times':>7}{'host':>8}"
        + (f"{'kernels':>9}{'in ms':>9}" + "".join(f"{kind:>20}" for kind in kinds) if profile else ""),
    ]
    for stage in result["stages"]:
        times, host = stage["ms"], stage["host_ms"]["median"]
        line = f"{stage['stage']:<14}{_times(times, stage['floor_ms'])}{host:>8.3f}"
        if found := profile.get(stage["stage"]):
            line += f"{found['kernels']:>9}{found['kernel_ms']:>9.3f}"
            line += "".join(f"{found['kinds'].get(kind, [0.0])[0]:>20.3f}" for kind in kinds)
        lines.append(line)
    loop_floor = sum(stage["floor_ms"] for stage in result["stages"] if stage["stage"].startswith("scale"))
    lines.append(f"{'loop':<14}{_times(result['loop_ms'], loop_floor)}")
    lines.append(f"{'policy':<14}{_times(result['policy_ms'], 0)}")
    lines.append(f"{'total':<14}{_times(result['total_ms'], result['floor_ms'])}")
    starts = {"this start": result["start_s"], **{"cold start": result.get("cold_start", {}).get("start_s")}}
    for name, seconds in starts.items():
        if seconds is not None:
            lines.append(f"{name}, s: " + ", ".join(f"{stage} {time:.1f}" for stage, time in seconds.items()))
    lines.append(f"device memory, GB: {_gigabytes(result)}; {result['images_per_second']:.2f} images/s")
    return "\n".join(lines)


def _times(times: dict[str, float], floor: float) -> str:
    ratio = f"{times['median'] / floor:>7.2f}" if floor else " " * 7
    return f"{times['median']:>9.3f}{times['min']:>9.3f}{times['max']:>9.3f}{floor:>9.3f}{ratio}"


def comparison_table(results: list[dict[str, Any]]) -> str:
    """A line for every policy."""
    lines = [
        f"{'policy':<16}{'total ms':>10}{'floor':>8}{'times':>7}{'loop ms':>10}{'of it, policy':>15}"
        f"{'decoder ms':>12}{'images/s':>10}{'peak GB':>9}"
    ]
    for result in results:
        decoder = sum(stage["ms"]["median"] for stage in result["stages"] if stage["stage"] == "decoder")
        lines.append(
            f"{Path(result['policy']).stem:<16}{result['total_ms']['median']:>10.1f}{result['floor_ms']:>8.1f}"
            f"{result['total_ms']['median'] / result['floor_ms']:>7.2f}"
            f"{result['loop_ms']['median']:>10.1f}{result['policy_ms']['median']:>15.1f}{decoder:>12.1f}"
            f"{result['images_per_second']:>10.2f}{_gigabytes(result):>9}"
        )
    return "\n".join(lines)


def _gigabytes(result: dict[str, Any]) -> str:
    peak = result["peak_device_bytes"]
    return "unknown" if peak is None else f"{peak / 1e9:.2f}"


def main() -> None:
    """Times what the flags say."""
    # The card is for the processes that are timed.
    jax.config.update("jax_platforms", "cpu")
    values = flags.FLAGS
    out = Path(values.out)
    cases = [
        Case(
            model=values.model,
            policy=policy,
            dtype=values.dtype,
            pixels=values.pixels,
            batch=values.batch,
            runs=values.runs,
            warmups=values.warmups,
            cache_dir=values.cache_dir,
            profile=values.profile,
        )
        for policy in (POLICY_NAMES if values.compare else [values.policy])
    ]
    results = [time_case(case, out) for case in cases]
    if values.compare:
        print(comparison_table(results))


if __name__ == "__main__":
    flags.DEFINE_string("model", "infinity_2b", "Architecture, for random weights, or a checkpoint's folder.")
    flags.DEFINE_string("policy", "dense", f"One of {', '.join(POLICY_NAMES)}, or a plan's JSON file.")
    flags.DEFINE_bool("compare", False, "Times all policies and prints a table of them.")
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float8_e4m3fn"], "Precision.")
    flags.DEFINE_string("pixels", "1M", "Pixel budget.")
    flags.DEFINE_integer("batch", 1, "Images at once.", lower_bound=1)
    flags.DEFINE_integer("runs", 10, "Timed calls.", lower_bound=1)
    flags.DEFINE_integer("warmups", 3, "Calls before them.", lower_bound=1)
    flags.DEFINE_bool("profile", False, "Also breaks an image down into the device's kernels.")
    flags.DEFINE_string(
        "cache_dir",
        str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toprovar_jax" / "xla"),
        "Compilation cache; an empty folder shows a cold start.",
    )
    flags.DEFINE_string("out", str(report.RESULTS), "Folder for the JSON.")
    command_line.run(main)
