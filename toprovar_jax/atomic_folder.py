"""A folder that appears complete or not at all, and is replaced in one step."""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from toprovar_jax.errors import InputError

# Name of the folder beside the target in which the new content grows: ".NAME.partial".
PARTIAL_SUFFIX = ".partial"
_REPLACED_SUFFIX = ".replaced"
_REMOVAL_ATTEMPTS = 50
_REMOVAL_PAUSE_SECONDS = 0.1


def check_target(target: Path, *, marker: str, overwrite: bool) -> None:
    """Finds out before any work whether `write_folder` may write there.

    Args:
      target: the folder to write.
      marker: a file that tells that a folder was written by this program; only such a folder is ever replaced.
      overwrite: whether an existing folder may be replaced.

    Raises:
      InputError: the target exists and must not be replaced, or its surroundings cannot be written.
    """
    if target.name.endswith((PARTIAL_SUFFIX, _REPLACED_SUFFIX)):
        raise InputError(f"{target} has an ending kept for unfinished folders: choose another name")
    try:
        if target.exists():
            if not target.is_dir():
                raise InputError(f"{target} is a file, not a folder: choose another name")
            if any(target.iterdir()):
                if not (target / marker).is_file():
                    raise InputError(f"{target} holds other files and no {marker}: choose another folder")
                if not overwrite:
                    raise InputError(f"{target} exists already: choose another folder or pass --overwrite")
        parent = next(parent for parent in target.absolute().parents if parent.exists())
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}; choose another folder") from error
    if not parent.is_dir():
        raise InputError(f"cannot write {target}: {parent} is a file; choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {target}: no permission to write in {parent}; choose another folder")


@contextlib.contextmanager
def write_folder(target: Path, *, marker: str, overwrite: bool) -> Iterator[Path]:
    """Gives an empty folder to fill; on leaving without an error it becomes the target, complete and on disk.

    The content grows in a sibling of the target. Where the target exists, the two are exchanged by one system
    call or, on file systems without it, by two renames: a process killed between them leaves no target, and the
    next `write_folder` puts the old one back first. What an earlier killed process left is removed.

    Args:
      target: the folder to write; missing parents are made.
      marker: see `check_target`.
      overwrite: see `check_target`.

    Raises:
      InputError: see `check_target`; also where another process is writing the same target.
    """
    target = target.resolve()  # through a link, so that the folder is replaced and not the link
    partial = target.with_name(f".{target.name}{PARTIAL_SUFFIX}")
    replaced = target.with_name(f".{target.name}{_REPLACED_SUFFIX}")
    check_target(target, marker=marker, overwrite=overwrite)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {target}: {error.strerror}; choose another folder") from error
    with _locked(partial, target):
        try:
            _recover(target, replaced)
            check_target(target, marker=marker, overwrite=overwrite)
            _clear(partial)
            yield partial
            _sync_tree(partial)
            _move_into_place(partial, target, replaced)
            _sync(target.parent)
        finally:
            _recover(target, replaced)
            _remove(partial)


@contextlib.contextmanager
def _locked(partial: Path, target: Path) -> Iterator[None]:
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is writing {target}: wait until it has finished") from None
        # The former owner may have finished between our open and our lock: then this is its result by now.
        if not (partial.exists() and os.path.samestat(partial.stat(), os.fstat(descriptor))):
            raise InputError(f"another process has just written {target}: start again to replace it")
        yield
    finally:
        os.close(descriptor)


def _recover(target: Path, replaced: Path) -> None:
    """Completes or undoes a replacement by two renames that was cut short."""
    if not replaced.exists():
        return
    if target.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(target)


def _remove(folder: Path) -> None:
    """Removes the folder, if it is there; threads of an interrupted writer may still be adding files to it."""
    for _ in range(_REMOVAL_ATTEMPTS):
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(_REMOVAL_PAUSE_SECONDS)
    if folder.exists():
        shutil.rmtree(folder)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _move_into_place(partial: Path, target: Path, replaced: Path) -> None:
    if not target.exists():
        partial.rename(target)
    elif not _exchange(partial, target):
        target.rename(replaced)
        partial.rename(target)


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two folders in one step; False where the system cannot."""
    exchange_flag, current_folder = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(current_folder, os.fsencode(first), current_folder, os.fsencode(second), exchange_flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(second))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)
