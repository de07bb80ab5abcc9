"""What every benchmark result carries besides its numbers, and how it is written."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy", "torch")


def provenance() -> dict[str, Any]:
    """Command, commit, date, device and versions of this process."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"-m {module.name}" if module is not None else Path(sys.argv[0]).name
    device = jax.devices()[0]
    return {
        "command": " ".join(["python", name, *map(_without_folder, sys.argv[1:])]),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"{device.device_kind} ({device.platform}, {os.cpu_count()} host cores)",
        "versions": {"python": platform.python_version(), **_versions()},
    }


def write(name: str, results: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes `folder/name.json` atomically, provenance first.

    Args:
      name: file name without its ending.
      results: the numbers.
      folder: where results are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**provenance(), **results}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def _without_folder(argument: str) -> str:
    """An argument with absolute paths cut to their last part: where a machine keeps its files is no result."""
    return re.sub(r"(?<![\w.])/(?:[^/\s=,]+/)*", "", argument)


def _commit() -> str:
    """The variable SOURCE_COMMIT, which tells a copy what it is a copy of; else the checked-out commit."""
    if told := os.environ.get("SOURCE_COMMIT"):
        return told
    git = shutil.which("git")
    if git is None:
        return "unknown"
    command = [git, "rev-parse", "HEAD"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
