"""The manifest of a checkpoint folder: what it holds, and how to notice every change of a byte."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toprovar_jax import atomic_folder
from toprovar_jax.config import CheckpointConfig, ConfigError
from toprovar_jax.errors import InputError

MANIFEST_NAME = "manifest.json"
# These lie beside the manifest and carry digests of their own: they are made after the checkpoint, and made again.
PROFILE_NAME = "toprovar_profile.json"
DECISIONS_NAME = "skipvar_decisions.json"
FORMAT_VERSION = 1


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged or cannot be written; the message is one line and names the fix."""


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Identity of a file: its name (inside a checkpoint the path relative to the folder), bytes and SHA-256."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path, name: str | None = None) -> "FileRecord":
        """Reads a file once; its record is under `name`, by default the file's own name."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(name or path.name, os.fstat(file.fileno()).st_size, digest)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder says about itself.

    Attributes:
      config: configurations of the models and the generation defaults.
      dtype: precision policy that the parameters are stored in, "float32" or "bfloat16".
      files: every other file of the folder.
      sources: files that the checkpoint was converted from; empty where it was trained here.
      writer: name and version of the program that wrote it.
    """

    config: CheckpointConfig
    dtype: str
    files: tuple[FileRecord, ...]
    sources: tuple[FileRecord, ...]
    writer: str

    @property
    def digest(self) -> str:
        """SHA-256 over the manifest's content, file digests included: it identifies the whole checkpoint."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def to_text(self) -> str:
        """The file's one and only text; `from_text` is the inverse."""
        return json.dumps({**self._content(), "digest": self.digest}, indent=1, sort_keys=True) + "\n"

    def _content(self) -> dict[str, Any]:
        return {"format": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_text(cls, text: str) -> "Manifest":
        """Rebuilds a manifest.

        Raises:
          CheckpointError: the text was written by another format version.
          ValueError: the text is not what `to_text` wrote.
        """
        content = json.loads(text)
        try:
            if (version := content["format"]) != FORMAT_VERSION:
                raise CheckpointError(
                    f"the checkpoint has format {version} but this version reads {FORMAT_VERSION}: convert again"
                )
            manifest = cls(
                config=CheckpointConfig.from_json(content["config"]),
                dtype=content["dtype"],
                files=tuple(FileRecord(**record) for record in content["files"]),
                sources=tuple(FileRecord(**record) for record in content["sources"]),
                writer=content["writer"],
            )
        except (ConfigError, KeyError, TypeError) as error:
            raise ValueError(f"not a manifest: {error}") from error
        # The text is compared, not the digest alone: bytes that JSON ignores are bytes of the checkpoint too.
        if manifest.to_text() != text:
            raise ValueError("the text does not match its digest")
        return manifest


def list_files(folder: Path) -> list[str]:
    """Relative names of all files below a folder, sorted; not the manifest, nor what is measured of it later.

    That is a profile, whole or partial, and SkipVAR's decisions.
    """
    paths = (path for path in folder.rglob("*") if not path.is_dir())
    names = (path.relative_to(folder).as_posix() for path in paths)
    others = (name for name in names if name not in (MANIFEST_NAME, DECISIONS_NAME))
    return sorted(name for name in others if not name.startswith(PROFILE_NAME))


def load_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Reads and verifies a checkpoint's manifest, and that exactly its files are there in their sizes.

    Raises:
      CheckpointError: there is no checkpoint, or it is unfinished, damaged, incomplete or of another version.
    """
    folder = Path(directory)
    if folder.resolve().name.endswith(atomic_folder.PARTIAL_SUFFIX):
        raise CheckpointError(f"{folder} is an unfinished checkpoint: run the conversion again")
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder at {folder}: make one with `python -m convert`")
    if not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"{folder} is no checkpoint, it has no {MANIFEST_NAME}: make one with `python -m convert`"
        )
    try:
        manifest = Manifest.from_text((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise damaged(folder, f"{MANIFEST_NAME} is not as it was written") from error
    recorded = {record.name: record.size for record in manifest.files}
    present = set(list_files(folder))
    if missing := sorted(recorded.keys() - present):
        raise damaged(folder, f"missing {', '.join(missing)}")
    if extra := sorted(present - recorded.keys()):
        raise CheckpointError(f"checkpoint {folder} holds files that are no part of it: remove {', '.join(extra)}")
    for name, size in recorded.items():
        if (actual := (folder / name).stat().st_size) != size:
            raise damaged(folder, f"{name} has {actual} bytes instead of {size}")
    return manifest


def verify(folder: Path, records: Sequence[FileRecord]) -> None:
    """Compares files with their records.

    Raises:
      CheckpointError: files have other bytes or cannot be read.
    """
    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        found = pool.map(lambda record: FileRecord.of(folder / record.name, record.name), records)
        try:
            changed = [record.name for record, actual in zip(records, found, strict=True) if record != actual]
        except OSError as error:
            raise CheckpointError(f"cannot read {error.filename}: {error.strerror}; copy it again") from error
    if changed:
        raise damaged(folder, f"{', '.join(changed)}: not the recorded SHA-256")


def damaged(folder: Path, what: str) -> CheckpointError:
    """The error for a checkpoint that is not as it was written."""
    return CheckpointError(f"checkpoint {folder} is damaged ({what}): convert or copy it again")
