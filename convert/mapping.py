"""Tensors of a file -> arrays by our paths, or one error that names everything that does not fit."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import torch

from convert import names
from convert.names import Names, Unused
from convert.readers import Weights
from toprovar_jax.checkpoint import Columns
from toprovar_jax.errors import InputError

REMEDY = "download it again, or pass the file of a supported model"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def take(weights: Weights, kind: str, expected: Names, unused: Unused) -> dict[str, np.ndarray | Columns]:
    """Matches a file's tensors one to one with those that a model needs.

    Args:
      weights: the file.
      kind: what the model is, for the error's text.
      expected: the tensors needed, by official name.
      unused: the tensors that may be there and are not needed.

    Returns:
      By our path, arrays in our layout that are views of the file's memory map, whatever floating type it has;
      where several tensors make one parameter, its columns.

    Raises:
      InputError: lists all missing, unexpected and mis-shaped tensors, or all with values that cannot be used.
    """
    given = _used(weights, unused)
    misfits = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "of wrong shape": [
            f"{name} {_text(given[name].shape)} instead of {_text(entry.shape)}"
            for name, entry in expected.items()
            if name in given and tuple(given[name].shape) != entry.shape
        ],
        "of wrong type": [f"{name} {x.dtype}" for name, x in given.items() if x.dtype not in _FLOATS],
    }
    _refuse(f"{weights.path} does not fit as a {kind}", misfits, REMEDY)
    check_values(weights, unused)
    parts: dict[str, list[np.ndarray]] = {}
    for name, entry in expected.items():
        parts.setdefault(entry.path, []).append(_to_numpy(entry.layout.to_ours(given[name])))
    return {path: arrays[0] if len(arrays) == 1 else Columns(arrays) for path, arrays in parts.items()}


def check_values(weights: Weights, unused: Unused) -> None:
    """Reads every value once.

    Raises:
      InputError: lists all tensors with values that no model can have.
    """
    values = {
        "not finite": [
            name for name, x in _used(weights, unused).items() if x.dtype in _FLOATS and not x.isfinite().all()
        ],
        "not zero": [
            name for name, x in weights.tensors.items() if names.is_ignored(name, unused.zero) and bool(x.any())
        ],
    }
    _refuse(f"{weights.path} has impossible values", values, "these weights cannot be used, download them again")


def _used(weights: Weights, unused: Unused) -> dict[str, torch.Tensor]:
    patterns = unused.ignored + unused.zero
    return {name: x.detach() for name, x in weights.tensors.items() if not names.is_ignored(name, patterns)}


def with_alias(weights: Weights, alias: str, name: str) -> Weights:
    """Removes the second name of a shared tensor, or gives it its first name where the file has only the second.

    Raises:
      InputError: the file has both and they differ.
    """
    tensors = dict(weights.tensors)
    second = tensors.pop(alias, None)
    if second is not None and not torch.equal(tensors.setdefault(name, second), second):
        raise InputError(f"{weights.path} has different tensors under {name} and {alias}: download it again")
    return dataclasses.replace(weights, tensors=tensors)


def _refuse(what: str, lists: Mapping[str, list[str]], remedy: str) -> None:
    if found := [f"{len(names)} {state}: {', '.join(sorted(names))}" for state, names in lists.items() if names]:
        raise InputError(f"{what} ({'; '.join(found)}): {remedy}")


def _text(shape: torch.Size | tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _to_numpy(x: torch.Tensor) -> np.ndarray:
    if x.dtype == torch.bfloat16:  # numpy has no such type of its own
        return x.view(torch.uint16).numpy().view(jnp.bfloat16)
    return x.numpy()
