"""Checkpoint folders: one layout, one writer and one reader, whatever the size of the models.

    DIR/manifest.json      configuration, dtype, origin, size and SHA-256 of every other file, digest of itself
    DIR/transformer/       orbax checkpoint of the Infinity transformer
    DIR/vae/               orbax checkpoint of the BSQ-VAE
    DIR/text_encoder/      orbax checkpoint of the T5 encoder (optional)
    DIR/tokenizer.json     its tokenizer in the format of the `tokenizers` package (optional)

Orbax loads files with flipped bytes without noticing; the manifest is what makes a checkpoint trustworthy, so
nothing loads without it. A folder is written under another name and moved into place when it is complete.
"""

import importlib.metadata
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jaxtyping import DTypeLike
from orbax.checkpoint import type_handlers

from toprovar_jax import atomic_folder
from toprovar_jax.config import CheckpointConfig
from toprovar_jax.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    FileRecord,
    Manifest,
    list_files,
    load_manifest,
    verify,
)
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.linear import quantize_in_place
from toprovar_jax.models.skeleton import Parameters, abstract_parameters
from toprovar_jax.models.t5 import T5Encoder
from toprovar_jax.precision import FLOAT8, activation_dtype

Component = Literal["transformer", "vae", "text_encoder"]
COMPONENTS: tuple[Component, ...] = ("transformer", "vae", "text_encoder")
STORED_DTYPES = ("float32", "bfloat16")
DTYPES = (*STORED_DTYPES, FLOAT8.name)  # what can be loaded

TOKENIZER_NAME = "tokenizer.json"
EMBEDDED = Path(__file__).parent / "embedded"  # the small trained model that comes with the package

_FINISHED_NAME = "commit_success.txt"
_WRITE_BATCH_BYTES = 256 * 2**20
_DATA_FILE_BYTES = 8 * 2**20  # a file holds this and up to one more array: repositories want small files
_READ_CONCURRENT_GB = 2


class Columns:
    """A parameter whose columns lie in several arrays, which are put side by side when it is written.

    Args:
      arrays: of one shape but for the last axis; where their floating types differ, they become float64.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        first, *others = self.arrays = tuple(arrays)
        self.shape = (*first.shape[:-1], sum(array.shape[-1] for array in arrays))
        self.dtype = first.dtype if all(array.dtype == first.dtype for array in others) else np.dtype(np.float64)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """NumPy's protocol: a new array in memory."""
        return np.concatenate(self.arrays, axis=-1, dtype=self.dtype if dtype is None else dtype)


def skeleton(config: CheckpointConfig, component: Component, dtype: DTypeLike) -> Parameters:
    """Shapes and dtypes of a component's parameters: nested dictionaries with `jax.ShapeDtypeStruct` leaves.

    Raises:
      CheckpointError: the checkpoint has no such component or the dtype is not one of `DTYPES`.
    """
    name = dtype_name(dtype)
    if component == "transformer":
        return abstract_parameters(Infinity, config.transformer, name)
    if component == "vae":
        return abstract_parameters(BSQVAE, config.vae, name)
    if config.text_encoder is None:
        raise CheckpointError(
            "this checkpoint holds no text encoder: convert again with --text_encoder, or pass text features"
        )
    return abstract_parameters(T5Encoder, config.text_encoder, name)


def flatten(parameters: Parameters) -> dict[str, Any]:
    """Leaves by their path, as in "blocks/0/mlp/up/kernel"; `unflatten` is the inverse."""
    return {"/".join(map(str, path)): leaf for path, leaf in traverse_util.flatten_dict(parameters).items()}


def unflatten(leaves: Mapping[str, Any]) -> Parameters:
    """Nested dictionaries from leaves by path; parts made of digits become the integer keys of lists."""
    return traverse_util.unflatten_dict(
        {tuple(int(part) if part.isdigit() else part for part in path.split("/")): x for path, x in leaves.items()}
    )


def check_target(directory: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Finds out before any work whether `save` may write to this folder.

    Raises:
      InputError: it exists and must not be replaced, or it cannot be written.
    """
    atomic_folder.check_target(Path(directory), marker=MANIFEST_NAME, overwrite=overwrite)


def save(
    directory: str | os.PathLike[str],
    config: CheckpointConfig,
    parameters: Mapping[Component, Parameters],
    *,
    dtype: DTypeLike,
    tokenizer: str | None = None,
    sources: Sequence[FileRecord] = (),
    overwrite: bool = False,
) -> Manifest:
    """Writes a checkpoint folder: complete, or nothing at all.

    Leaves are read one batch after the other, so that memory-mapped arrays of any total size can be saved.

    Args:
      directory: the folder to make; missing parents are made.
      config: configurations of the components in `parameters`.
      parameters: per component, numpy or jax arrays or `Columns` in the structure and shapes of `skeleton`.
      dtype: precision policy to store, one of `STORED_DTYPES`; leaves are cast to the skeleton's dtypes.
      tokenizer: text of the text encoder's tokenizer.json.
      sources: files that the parameters come from, for the record.
      overwrite: replace an existing checkpoint in one step; by default an existing folder is refused.

    Returns:
      The manifest written.

    Raises:
      InputError: the folder exists or cannot be written, the parameters do not fit the configuration, or the dtype
        is not one to store.
    """
    target, stored = Path(directory), dtype_name(dtype)
    if stored not in STORED_DTYPES:
        raise CheckpointError(f"{stored} is not stored: store bfloat16, and load that with dtype {stored}")
    check_target(target, overwrite=overwrite)
    expected: tuple[Component, ...] = COMPONENTS if config.text_encoder is not None else COMPONENTS[:2]
    if set(parameters) != set(expected):
        raise CheckpointError(f"parameters of {', '.join(expected)} are needed, got {', '.join(parameters)}")
    skeletons = {component: skeleton(config, component, stored) for component in expected}
    for component in expected:
        _check_fit(component, parameters[component], skeletons[component])
    _check_space(target, skeletons)
    with atomic_folder.write_folder(target, marker=MANIFEST_NAME, overwrite=overwrite) as folder:
        for component in expected:
            _write_component(folder / component, parameters[component], skeletons[component])
        if tokenizer is not None:
            (folder / TOKENIZER_NAME).write_text(tokenizer, encoding="utf-8")
        manifest = Manifest(
            config=config,
            dtype=stored,
            files=tuple(FileRecord.of(folder / name, name) for name in list_files(folder)),
            sources=tuple(sources),
            writer=f"toprovar-jax {importlib.metadata.version('toprovar-jax')}",
        )
        (folder / MANIFEST_NAME).write_text(manifest.to_text(), encoding="utf-8")
    return manifest


def load_parameters(
    directory: str | os.PathLike[str], component: Component, dtype: DTypeLike | None = None
) -> Parameters:
    """Loads one component onto the default device, after verifying the digests of its files.

    Args:
      directory: a checkpoint folder.
      component: which model.
      dtype: precision policy to load in, one of `DTYPES`; None is the stored one.

    Returns:
      Nested dictionaries of jax arrays with the structure, shapes and dtypes of `skeleton`.

    Raises:
      CheckpointError: the checkpoint is damaged, lacks the component, or was written for other shapes.
    """
    folder = Path(directory)
    manifest = load_manifest(folder)
    name = manifest.dtype if dtype is None else dtype_name(dtype)
    stored = skeleton(manifest.config, component, activation_dtype(name))
    verify(folder, [record for record in manifest.files if record.name.startswith(f"{component}/")])
    parameters = _read_component(folder / component, stored)
    quantize_in_place(parameters, skeleton(manifest.config, component, name))
    return parameters


def load_tokenizer(directory: str | os.PathLike[str]) -> str | None:
    """Verified text of the checkpoint's tokenizer.json, or None where it has none.

    Raises:
      CheckpointError: the checkpoint is damaged.
    """
    folder = Path(directory)
    records = [record for record in load_manifest(folder).files if record.name == TOKENIZER_NAME]
    if not records:
        return None
    verify(folder, records)
    return (folder / TOKENIZER_NAME).read_text(encoding="utf-8")


def dtype_name(dtype: DTypeLike) -> str:
    """Name of a precision policy.

    Raises:
      CheckpointError: it is not one of `DTYPES`.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        *others, last = DTYPES
        raise CheckpointError(f"unknown dtype {name}: choose {', '.join(others)} or {last}")
    return name


def _shapes(parameters: Parameters) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in flatten(parameters).items()}


def _check_fit(component: Component, parameters: Parameters, target: Parameters) -> None:
    wanted, given = _shapes(target), _shapes(parameters)
    if wanted != given:
        wrong = sorted(path for path in wanted.keys() | given.keys() if wanted.get(path) != given.get(path))
        raise CheckpointError(f"the {component} parameters do not fit the configuration: {', '.join(wrong)}")


def _check_space(target: Path, skeletons: Mapping[Component, Parameters]) -> None:
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(dict(skeletons)))
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"{target} needs up to {needed / 1e9:.1f} GB but only {free / 1e9:.1f} GB are free: make room"
        )


class _BatchedNumpyHandler(type_handlers.NumpyHandler):
    """Writes arrays one batch after the other, where orbax would copy them all first."""

    async def serialize(
        self,
        values: Sequence[np.ndarray | Columns],
        infos: Sequence[Any],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[ocp.future.Future]:
        args = args or [ocp.SaveArgs()] * len(values)
        start = size = 0
        for index, value in enumerate(values):
            size += value.nbytes
            if size >= _WRITE_BATCH_BYTES or index == len(values) - 1:
                batch = slice(start, index + 1)
                arrays = [np.asarray(value) for value in values[batch]]
                for commit in await super().serialize(arrays, infos[batch], args[batch]):
                    commit.result()
                start, size = index + 1, 0
        return []


def _handler() -> ocp.PyTreeCheckpointHandler:
    host_handler = _BatchedNumpyHandler()
    registry = type_handlers.create_type_handler_registry(
        (jax.Array, type_handlers.ArrayHandler()), (np.ndarray, host_handler), (Columns, host_handler)
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, restore_concurrent_gb=_READ_CONCURRENT_GB)


def _with_text_keys(tree: Parameters) -> Parameters:
    """The tree as orbax stores it: all keys are text."""
    return traverse_util.unflatten_dict({tuple(path.split("/")): leaf for path, leaf in flatten(tree).items()})


def _write_component(folder: Path, parameters: Parameters, target: Parameters) -> None:
    item = _with_text_keys(
        jax.tree.map(lambda leaf: leaf if isinstance(leaf, Columns) else np.asarray(leaf), parameters)
    )
    save_args = _with_text_keys(jax.tree.map(lambda leaf: ocp.SaveArgs(dtype=leaf.dtype), target))
    arguments = ocp.args.PyTreeSave(item, save_args=save_args, ocdbt_target_data_file_size=_DATA_FILE_BYTES)
    with ocp.Checkpointer(_handler()) as checkpointer:
        checkpointer.save(folder.absolute(), arguments)
    # Where orbax marks a finished folder by a file it names this machine's path; the manifest marks ours.
    (folder / _FINISHED_NAME).unlink(missing_ok=True)


def _read_component(folder: Path, target: Parameters) -> Parameters:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    restore_args = jax.tree.map(
        lambda leaf: ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=sharding, global_shape=leaf.shape), target
    )
    arguments = ocp.args.PyTreeRestore(_with_text_keys(target), restore_args=_with_text_keys(restore_args))
    with ocp.Checkpointer(_handler()) as checkpointer:
        stored = checkpointer.metadata(folder.absolute()).item_metadata.tree
        if _shapes(stored) != _shapes(target):
            raise CheckpointError(
                f"{folder} holds other parameters than this version of the program needs: convert again"
            )
        restored = checkpointer.restore(folder.absolute(), arguments)
    return unflatten(flatten(restored))
