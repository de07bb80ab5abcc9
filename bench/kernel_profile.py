"""Where the device's time goes: the kernels of every program of an image, by kind.

JAX's profiler gives each kernel's time (CUPTI's on an NVIDIA GPU). XLA launches kernels one by one while it
profiles, so their times are right and the gaps between them mean nothing: compare with times taken without it.
"""

import re
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax

from bench.stage_clock import StageNamer
from toprovar_jax.programs import Programs

_MARK = "stage: "
_PAUSE = 0.003  # seconds between programs, far more than the clocks of host and device may differ

# The first pattern that a kernel's name contains tells its kind.
_KINDS = (
    ("attention", r"flash_attention|mosaic|fmha|flash_fprop"),
    ("convolution", r"conv(?!ert)|fprop|implicit"),
    ("matrix product", r"gemm|nvjet|cutlass|cublas|splitk|xmma|dot"),
    ("norm and reduction", r"softmax|reduce|norm"),
    ("copy", r"memcpy|memset|copy|transpose|concatenate|slice|pad|gather|scatter|broadcast"),
)


class Kernel(NamedTuple):
    """One execution of a kernel; times in nanoseconds."""

    name: str
    start: float
    duration: float


def kind(name: str) -> str:
    """What a kernel does, by its name."""
    lower = name.lower()
    return next((kind for kind, pattern in _KINDS if re.search(pattern, lower)), "elementwise")


def profile(programs: Programs, call: Callable[[], object]) -> dict[str, dict[str, Any]]:
    """Calls once under the profiler.

    Args:
      programs: those that the call runs.
      call: makes an image.

    Returns:
      By stage: "kernels" and "kernel_ms" in all, "kinds" with [milliseconds, count] each, and "names" with the
      same for every name, numbers at its end left out, longest first. No kernels where the profiler saw none.
    """
    name, run = StageNamer(), programs.run

    def marked_run(key: Hashable, *arguments: Any) -> Any:
        time.sleep(_PAUSE)
        with jax.profiler.TraceAnnotation(_MARK + name(key)):
            return jax.block_until_ready(run(key, *arguments))

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.object(programs, "run", marked_run):
            jax.profiler.start_trace(folder, profiler_options=options)
            try:
                call()
            finally:
                jax.profiler.stop_trace()
        (file,) = Path(folder).rglob("*.xplane.pb")
        marks, kernels = _read(jax.profiler.ProfileData.from_file(str(file)))
    return {stage: _summary(found) for stage, found in assign(marks, kernels).items()}


def assign(marks: list[Kernel], kernels: list[Kernel]) -> dict[str, list[Kernel]]:
    """Gives every kernel to the stage during which it started; clocks may differ by a third of the pause."""
    marks = sorted(marks, key=lambda mark: mark.start)
    stages: dict[str, list[Kernel]] = {mark.name: [] for mark in marks}
    tolerance = _PAUSE * 1e9 / 3
    for kernel in kernels:
        begun = [mark.name for mark in marks if mark.start - tolerance <= kernel.start]
        if begun:
            stages[begun[-1]].append(kernel)
    return stages


def _read(data: Any) -> tuple[list[Kernel], list[Kernel]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the compiled reader's own types
        marks, on_device, on_host = [], [], []
        for line, is_device, event in _events(data):
            kernel = Kernel(event.name, event.start_ns, event.duration_ns)
            if event.name.startswith(_MARK):
                marks.append(kernel._replace(name=event.name.removeprefix(_MARK)))
            elif is_device and line.startswith("Stream"):
                on_device.append(kernel)
            elif not is_device and "hlo_op" in dict(event.stats):
                on_host.append(kernel)
    return marks, on_device or on_host


def _events(data: Any) -> Iterator[tuple[str, bool, Any]]:
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                yield line.name, plane.name.startswith("/device:"), event


def _summary(kernels: list[Kernel]) -> dict[str, Any]:
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for kernel in kernels:
        plain = re.sub(r"[._]\d+$", "", kernel.name)
        for totals in (kinds[kind(kernel.name)], names[plain]):
            totals[0] += kernel.duration / 1e6
            totals[1] += 1
    return {
        "kernels": len(kernels),
        "kernel_ms": sum(kernel.duration for kernel in kernels) / 1e6,
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1][0])),
        "names": dict(sorted(names.items(), key=lambda item: -item[1][0])),
    }
