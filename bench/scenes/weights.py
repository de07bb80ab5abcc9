"""Parameter trees in safetensors files: the detector's, and those between the chunks of a training run."""

import pathlib

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import DTypeLike

from toprovar_jax.checkpoint import flatten, unflatten
from toprovar_jax.errors import InputError
from toprovar_jax.models.skeleton import Parameters

_FILE_BYTES = 12 * 2**20


def save_parameters(path: pathlib.Path, parameters: Parameters, dtype: DTypeLike | None = None) -> None:
    """Writes every array of the tree under its path joined with "/".

    Args:
      path: the first file; a tree too large for one continues in PATH-2, PATH-3, ...
      parameters: arrays by path.
      dtype: cast to this first; None keeps every array's own.
    """
    files: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, value in flatten(parameters).items():
        array = np.asarray(value if dtype is None else jnp.asarray(value, dtype))
        if size + array.nbytes > _FILE_BYTES and files[-1]:
            files.append({})
            size = 0
        files[-1][name] = array
        size += array.nbytes
    for stale in _files(path):
        stale.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, arrays in enumerate(files, start=1):
        safetensors.numpy.save_file(arrays, path if number == 1 else _continued(path, number))


def load_parameters(path: pathlib.Path, skeleton: Parameters) -> Parameters:
    """Reads a tree of the skeleton's structure, shapes and dtypes.

    Raises:
      InputError: there is no such file.
      ValueError: the files hold other names or shapes than the skeleton.
    """
    if not path.exists():
        raise InputError(f"no weights at {path}: run the stage that trains them first")
    loaded = {name: array for file in _files(path) for name, array in safetensors.numpy.load_file(file).items()}
    expected = flatten(skeleton)
    wrong = sorted(loaded.keys() ^ expected.keys())
    wrong += [name for name in loaded.keys() & expected.keys() if loaded[name].shape != expected[name].shape]
    if wrong:
        raise ValueError(f"{path} does not fit this configuration: {', '.join(wrong[:5])} ({len(wrong)} in all)")
    return unflatten({name: jnp.asarray(loaded[name], leaf.dtype) for name, leaf in expected.items()})


def _continued(path: pathlib.Path, number: int) -> pathlib.Path:
    return path.with_stem(f"{path.stem}-{number}")


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted([*path.parent.glob(path.name), *path.parent.glob(f"{path.stem}-*{path.suffix}")])
