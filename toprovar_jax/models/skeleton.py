"""Modules as data: the structure of a model apart from its parameters.

Parameters are plain nested dictionaries of arrays everywhere outside the modules; a module exists only inside a
pure function, for as long as that function is traced.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, PyTree

from toprovar_jax.models.linear import quantize_in_place
from toprovar_jax.precision import FLOAT8, activation_dtype

Parameters = PyTree  # nested dictionaries, list items keyed by integers, leaves jax arrays


class _OneKey(nnx.Rngs):
    """The same key for every parameter: shapes need no more, and tracing billions of parameters takes a second."""

    def params(self) -> Array:
        return jax.random.key(0)


@functools.lru_cache(maxsize=32)
def _split_skeleton(model: Callable[..., nnx.Module], config: Any, dtype: str) -> tuple[nnx.GraphDef, Any]:
    abstract = nnx.eval_shape(lambda: model(config, dtype=jnp.dtype(dtype), rngs=_OneKey(0)))
    graphdef, state = nnx.split(abstract)
    return graphdef, nnx.to_pure_dict(state)


def abstract_parameters(model: Callable[..., nnx.Module], config: Any, dtype: DTypeLike) -> Parameters:
    """Shapes and dtypes of a model's parameters, allocating nothing.

    Args:
      model: a class built as `model(config, dtype=..., rngs=...)`.
      config: its frozen configuration.
      dtype: a precision policy (`precision.py`).

    Returns:
      Nested dictionaries with `jax.ShapeDtypeStruct` leaves.
    """
    return _split_skeleton(model, config, jnp.dtype(dtype).name)[1]


def bind(model: Callable[..., nnx.Module], config: Any, dtype: DTypeLike, parameters: Parameters) -> Any:
    """The module with these parameters, for use inside a pure function."""
    return nnx.merge(_split_skeleton(model, config, jnp.dtype(dtype).name)[0], parameters)


def random_parameters(
    model: Callable[..., nnx.Module], config: Any, dtype: DTypeLike, seed: int = 0
) -> Parameters:
    """Random parameters in seconds for models of any size, for tests and benchmarks.

    Kernels have variance 1 / fan-in, norms are neutral, biases zero. Training starts from the modules' own
    initialisers instead; those compile or run one operation after the other for minutes at billions of parameters.
    Those of float8 are the ones of bfloat16, rounded.
    """
    if jnp.dtype(dtype) == FLOAT8:
        parameters = random_parameters(model, config, activation_dtype(dtype), seed)
        quantize_in_place(parameters, abstract_parameters(model, config, dtype))
        return parameters
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract_parameters(model, config, dtype))
    root = jax.random.key(seed)

    def initialize(index: int, name: str, leaf: jax.ShapeDtypeStruct) -> Array:
        if name == "scale":
            return jnp.ones(leaf.shape, leaf.dtype)
        if name == "log_scale":
            return jnp.full(leaf.shape, jnp.log(4.0), leaf.dtype)
        if name.endswith("bias"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        deviation = math.prod(leaf.shape[:-1]) ** -0.5 if name == "kernel" else 0.02
        return _scaled_normal(jax.random.fold_in(root, index), jnp.float32(deviation), leaf.shape, leaf.dtype)

    return jax.tree.unflatten(
        structure, [initialize(index, path[-1].key, leaf) for index, (path, leaf) in enumerate(leaves)]
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _scaled_normal(key: Array, deviation: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return (jax.random.normal(key, shape) * deviation).astype(dtype)
