"""Files with weights -> named tensors that stay on disk until they are used.

Nothing in a file is ever executed, and no file is changed: pickles are read by PyTorch's restricted reader, and
tensors are views of private memory maps. Source of the layouts: docs/spec/infinity.md, section 1.3.
"""

import contextlib
import dataclasses
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from toprovar_jax.errors import InputError

# In the order of preference that the published loader has.
INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_NAMES = ("model.safetensors", "pytorch_model.bin")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Named tensors and where they come from.

    Attributes:
      path: the file or folder that was asked for.
      files: every file that was read.
      tensors: flat names of the file, without any wrapping layout.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, torch.Tensor]


def read_weights(path: Path) -> Weights:
    """Opens a `.pth` or `.safetensors` file, or a folder with one such file or with shards and an index.

    The layouts {"vae": ...} of tokenizer files and {"trainer": {"gpt_fsdp": ...}} of fine-tuning are unwrapped.

    Raises:
      InputError: the file is missing, unreadable, incomplete, or holds code or no tensors.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise InputError(f"no such file or folder: {path}")
    return Weights(path, (path,), _read_file(path))


def _read_folder(folder: Path) -> Weights:
    for name in INDEX_NAMES:
        if (folder / name).is_file():
            return _read_shards(folder, folder / name)
    for name in SINGLE_NAMES:
        if (folder / name).is_file():
            return Weights(folder, (folder / name,), _read_file(folder / name))
    raise InputError(
        f"{folder} holds none of {', '.join(INDEX_NAMES + SINGLE_NAMES)}: pass the folder with the weights"
    )


def _read_shards(folder: Path, index: Path) -> Weights:
    try:
        owners: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(owners.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is not a readable index of shards: download it again") from error
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise InputError(f"{index} names files outside its folder: {', '.join(outside)}")
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise InputError(f"{folder} lacks shards that its index names, download {', '.join(missing)}")
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        tensors |= _read_file(folder / shard)
    if absent := sorted(owners.keys() - tensors.keys()):
        raise InputError(f"the shards in {folder} lack tensors that the index names: {', '.join(absent)}")
    return Weights(folder, (index, *(folder / shard for shard in shards)), tensors)


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    return _only_tensors(path, _unwrap(content))


def _read_safetensors(path: Path) -> Any:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is not a complete safetensors file: download it again") from error


def _read_pickle(path: Path) -> Any:
    with _pickle_errors(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on the pickle's dialect, which the errors below cover
        # Files written before PyTorch 1.6 are no zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


@contextlib.contextmanager
def _pickle_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path} contains code ({named[1]}), which is never run: save plain tensors, best as .safetensors"
            ) from error
        raise InputError(f"{path} is not a file of plain PyTorch weights: download it again") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise InputError(f"{path} is not a complete PyTorch file: download it again") from error


def _unwrap(content: Any) -> Any:
    if isinstance(content, dict):
        if isinstance(content.get("trainer"), dict) and "gpt_fsdp" in content["trainer"]:
            return content["trainer"]["gpt_fsdp"]
        if isinstance(content.get("vae"), dict):
            return content["vae"]
    return content


def _only_tensors(path: Path, content: Any) -> dict[str, torch.Tensor]:
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds no named tensors: pass a file of weights")
    if others := [str(name) for name, value in content.items() if not _is_plain_tensor(value)]:
        raise InputError(f"{path} holds entries that are no plain tensors: {', '.join(others)}")
    return dict(content)


def _is_plain_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta
