"""Runs commands of the project as a user would, without paying for the imports each time.

A helper process imports the converter once and forks for each command: the fork runs the module as `python -m`
does, with its own arguments, output and exit code, and can be killed without harm. No wait is without an end: a
command that takes too long says where it stands and fails.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

# A command takes a few seconds; the helper process adds the time of its imports to the first one.
COMMAND_SECONDS = 120
HELPER_SECONDS = 180


@dataclasses.dataclass
class Outcome:
    """What a command did; a negative code is the signal that ended it."""

    code: int
    stdout: str
    stderr: str
    seconds: float


class Commands:
    """The helper process."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def run(
        self,
        *argv: object,
        signal_after: float | None = None,
        signal_once: Path | None = None,
        signal_number: int = signal.SIGKILL,
    ) -> Outcome:
        """Runs a module with arguments; sends it a signal after some seconds or once a path exists."""
        request = {
            "argv": [str(part) for part in argv],
            "after": signal_after,
            "once": None if signal_once is None else str(signal_once),
            "signal": int(signal_number),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], HELPER_SECONDS)
        assert ready, f"no answer of the helper process for {HELPER_SECONDS} seconds"
        answer = self._process.stdout.readline()
        assert answer, "the helper process has ended"
        return Outcome(**json.loads(answer))


@contextlib.contextmanager
def start() -> Iterator[Commands]:
    """Starts the helper process."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.with_torch.commands"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield Commands(process)
            process.stdin.close()
            process.wait(timeout=60)
        finally:
            process.kill()  # where an error left it running; without effect otherwise


def _run_forked(
    argv: list[str], after: float | None, once: str | None, signal_number: int, folder: Path
) -> Outcome:
    paths = [folder / "stdout", folder / "stderr"]
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for descriptor, path in zip((1, 2), paths, strict=True):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            # This watch is no Python thread: no lock can keep it from ending the process.
            faulthandler.dump_traceback_later(COMMAND_SECONDS, exit=True)
            sys.argv = argv
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as exit_request:
            code = exit_request.code if isinstance(exit_request.code, int) else int(exit_request.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if once is not None:
        after = 0.0
        while not os.path.exists(once):
            assert time.monotonic() - started < COMMAND_SECONDS, f"the command never made {once}"
            time.sleep(1e-3)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal_number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - started
    return Outcome(code, *(path.read_text() if path.exists() else "" for path in paths), seconds)


def _serve() -> None:
    import convert.check
    import convert.conversion  # noqa: F401

    # A shell starts what runs in its background deaf to interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            request = json.loads(line)
            outcome = _run_forked(
                request["argv"], request["after"], request["once"], request["signal"], Path(folder)
            )
            print(json.dumps(dataclasses.asdict(outcome)), flush=True)


if __name__ == "__main__":
    _serve()
