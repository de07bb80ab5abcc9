"""Tensors of a file -> arrays by our paths, or one error that names everything that does not fit."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import torch

from convert import names
from convert.names import Names
from convert.readers import Weights
from toprovar_jax.errors import InputError

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def take(
    weights: Weights, expected: Names, *, ignored: tuple[str, ...] = (), zero: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Matches a file's tensors one to one with those that a model needs.

    Args:
      weights: the file.
      expected: the tensors needed, by official name.
      ignored: patterns of names that may be there and are not used.
      zero: patterns of names that may be there and must hold zeros.

    Returns:
      By our path, arrays in our layout that are views of the file's memory map, whatever floating type it has.

    Raises:
      InputError: lists all missing, unexpected and mis-shaped tensors, or all with values that cannot be used.
    """
    given = {name: x.detach() for name, x in weights.tensors.items() if not names.is_ignored(name, ignored)}
    zeros = {name: given.pop(name) for name in list(given) if names.is_ignored(name, zero)}
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
    _refuse(weights, misfits, "download it again, or pass the file of a supported model")
    values = {
        "not finite": [name for name, x in given.items() if not bool(torch.isfinite(x).all())],
        "not zero": [name for name, x in zeros.items() if bool(x.any())],
    }
    _refuse(weights, values, "these weights cannot be used, download them again")
    return {entry.path: _to_numpy(entry.layout.to_ours(given[name])) for name, entry in expected.items()}


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


def _refuse(weights: Weights, lists: Mapping[str, list[str]], remedy: str) -> None:
    if found := [f"{len(names)} {what}: {', '.join(sorted(names))}" for what, names in lists.items() if names]:
        raise InputError(f"{weights.path} does not fit ({'; '.join(found)}): {remedy}")


def _text(shape: torch.Size | tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _to_numpy(x: torch.Tensor) -> np.ndarray:
    if x.dtype == torch.bfloat16:  # numpy has no such type of its own
        return x.view(torch.uint16).numpy().view(jnp.bfloat16)
    return x.numpy()
