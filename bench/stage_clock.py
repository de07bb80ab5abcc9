"""When each program of an image was handed to the device and when its result was there.

The pipeline is not slowed down to find out: a second thread waits for every result in turn while the pipeline goes
on handing out work.
"""

import contextlib
import queue
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import jax

from toprovar_jax.programs import Programs
from toprovar_jax.pruning.plan import ScaleStep

# What goes before the first program.
REQUEST = "request"
# Keys of the pipeline's programs start with these.
_STAGES = {"text": "text encoder", "decode": "decoder", "drop_unconditional_rows": "drop rows"}


class Stage(NamedTuple):
    """One program of an image.

    Attributes:
      name: what it does.
      milliseconds: from the end of the program before to its own end; a call's time is the sum of its stages.
      host_ms: of the host to hand it out, part of it while the device was busy with earlier programs.
    """

    name: str
    milliseconds: float
    host_ms: float


class _Event(NamedTuple):
    name: str
    handed_out: float
    host_seconds: float
    ended: float


class StageNamer:
    """Names the programs of one image in their order: steps by their scale, others by what they do.

    What a policy does between two steps has the scale of the step before in its name.
    """

    def __init__(self) -> None:
        self._scale: int | None = None

    def __call__(self, key: Hashable) -> str:
        """Name of the program under a key."""
        parts = key if isinstance(key, tuple) else (key,)
        kind = str(parts[0])
        if kind == "decode":
            self._scale = None
        for part in parts:
            if kind == "scale" and isinstance(part, ScaleStep):
                self._scale = part.scale
                return f"scale {part.scale}"
        name = _STAGES.get(kind, kind)
        return name if self._scale is None else f"{name} {self._scale}"


class _FirstEndedError(Exception):
    """Ends a call after its first program."""


def time_stages(programs: Programs, call: Callable[[], object]) -> list[Stage]:
    """Calls twice and times the programs.

    What goes before the first program (the request is checked, prompts are made tokens and brought to the device)
    is a stage of its own; what follows the last one (its result's way to the host and whatever the host does with
    it) counts as that program's. The first program is timed in a call that ends with it: in a whole call the host
    holds the interpreter to hand out the second, so that the end of the first is noticed late.

    Args:
      programs: those that the call runs.
      call: makes an image.

    Raises:
      RuntimeError: the call ran none of the programs.
    """
    events: list[_Event] = []
    with _watched(programs, events.append):
        started = time.perf_counter()
        call()
        ended = time.perf_counter()
    if not events:
        raise RuntimeError("no program was run: the pipeline runs programs that are not its own")
    ends = [min(event.ended, ended) for event in events[:-1]] + [ended]  # the second thread may be late
    first = events[0].handed_out
    if len(ends) > 1:
        ends[0] = min(ends[0], first + _seconds_of_first(programs, call))
    begins = [first, *ends[:-1]]
    request = 1e3 * (first - started)
    return [Stage(REQUEST, request, request)] + [
        Stage(event.name, 1e3 * (end - begin), 1e3 * event.host_seconds)
        for event, begin, end in zip(events, begins, ends, strict=True)
    ]


def _seconds_of_first(programs: Programs, call: Callable[[], object]) -> float:
    run, seconds = programs.run, 0.0

    def run_and_end(key: Hashable, *arguments: Any) -> Any:
        nonlocal seconds
        begun = time.perf_counter()
        jax.block_until_ready(run(key, *arguments))
        seconds = time.perf_counter() - begun
        raise _FirstEndedError

    with mock.patch.object(programs, "run", run_and_end), contextlib.suppress(_FirstEndedError):
        call()
    return seconds


@contextlib.contextmanager
def _watched(programs: Programs, record: Callable[[_Event], object]) -> Iterator[None]:
    handed_out: queue.SimpleQueue[tuple[str, float, float, Any] | None] = queue.SimpleQueue()
    name, run = StageNamer(), programs.run

    def timed_run(key: Hashable, *arguments: Any) -> Any:
        before = time.perf_counter()
        result = run(key, *arguments)
        # All results of a program are there at once. Its first ones may be the state, which the next takes over.
        handed_out.put((name(key), before, time.perf_counter() - before, jax.tree.leaves(result)[-1]))
        return result

    def wait() -> None:
        while (item := handed_out.get()) is not None:
            stage, before, host_seconds, leaf = item
            jax.block_until_ready(leaf)
            record(_Event(stage, before, host_seconds, time.perf_counter()))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # or the waiting thread learns of an end up to 5 ms late
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting = thread.submit(wait)
        try:
            with mock.patch.object(programs, "run", timed_run):
                yield
        finally:
            handed_out.put(None)
            waiting.result()
            sys.setswitchinterval(interval)
