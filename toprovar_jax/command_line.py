"""How every command of the project starts and fails: one clear line on standard error, exit code 2."""

import gc
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import flags

from toprovar_jax.errors import InputError

# Objects that are made before garbage is looked for: tracing makes millions, and hardly one needs the search.
_COLLECT_AFTER = 50_000


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def run(
    main: Callable[[], None], argv: Sequence[str] | None = None, flag_values: flags.FlagValues = flags.FLAGS
) -> None:
    """Parses flags, runs `main` and exits.

    Bad flags and `InputError` end in one line without a traceback and exit code 2; anything else is a defect and
    keeps its traceback. `--help` prints the flags of the command.

    Args:
      main: the command, reading its own flags.
      argv: program name and arguments; those of the process where None.
      flag_values: where the command's flags are defined.
    """
    arguments = list(sys.argv if argv is None else argv)
    if any(argument in ("--help", "-help", "-h") for argument in arguments[1:]):
        print(sys.modules["__main__"].__doc__ or "")
        print(flag_values.module_help("__main__"))
        sys.exit(0)
    try:
        unused = flag_values(arguments)
        if len(unused) > 1:
            raise InputError(f"unexpected argument {unused[1]!r}: every input is given by a flag; see --help")
    except flags.Error as error:
        _fail(f"{' '.join(str(error).split())}; see --help")
    except InputError as error:
        _fail(str(error))
    warnings.showwarning = _show_warning
    collect_garbage_seldom()
    try:
        main()
    except InputError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted", code=130)


def read_prompts(file: str) -> list[str]:
    """Prompts of a text file, one per line; empty lines are left out.

    Raises:
      InputError: the file cannot be read or holds none.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the prompts of {file} as UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{file} holds no prompt: write one per line")
    return prompts


def collect_garbage_seldom() -> None:
    """Spares a start a tenth of its work: searches, mostly through modules that stay to the end anyway."""
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER)


def use_compilation_cache() -> None:
    """Keeps compiled programs in a folder of the user's, so that only the first run of a model compiles."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(root) / "toprovar_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _fail(message: str, code: int = 2) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
