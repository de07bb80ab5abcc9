"""How every command of the project starts and fails: one clear line on standard error, exit code 2."""

import sys
import warnings
from collections.abc import Callable, Sequence

from absl import flags

from toprovar_jax.errors import InputError


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def run(main: Callable[[], None], argv: Sequence[str] | None = None) -> None:
    """Parses flags, runs `main` and exits.

    Bad flags and `InputError` end in one line without a traceback and exit code 2; anything else is a defect and
    keeps its traceback. `--help` prints the flags of the command.

    Args:
      main: the command, reading its own flags.
      argv: program name and arguments; those of the process where None.
    """
    arguments = list(sys.argv if argv is None else argv)
    if any(argument in ("--help", "-help", "-h") for argument in arguments[1:]):
        print(sys.modules["__main__"].__doc__ or "")
        print(flags.FLAGS.module_help("__main__"))
        sys.exit(0)
    try:
        unused = flags.FLAGS(arguments)
        if len(unused) > 1:
            raise InputError(f"unexpected argument {unused[1]!r}: every input is given by a flag; see --help")
    except flags.Error as error:
        _fail(f"{' '.join(str(error).split())}; see --help")
    except InputError as error:
        _fail(str(error))
    warnings.showwarning = _show_warning
    try:
        main()
    except InputError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted", code=130)


def _fail(message: str, code: int = 2) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
