"""Modules as data: the structure of a model apart from its parameters.

Parameters are plain nested dictionaries of arrays everywhere outside the modules; a module exists only inside a
pure function, for as long as that function is traced.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike, PyTree

Parameters = PyTree  # nested dictionaries, list items keyed by integers, leaves jax arrays


@functools.lru_cache(maxsize=32)
def _split_skeleton(model: Callable[..., nnx.Module], config: Any, dtype: str) -> tuple[nnx.GraphDef, Any]:
    abstract = nnx.eval_shape(lambda: model(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    return graphdef, nnx.to_pure_dict(state)


def abstract_parameters(model: Callable[..., nnx.Module], config: Any, dtype: DTypeLike) -> Parameters:
    """Shapes and dtypes of a model's parameters, allocating nothing.

    Args:
      model: a class built as `model(config, dtype=..., rngs=...)`.
      config: its frozen configuration.
      dtype: float32 or bfloat16.

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
    """Freshly initialised parameters, made on the device by one compiled program."""

    @jax.jit
    def initialize() -> Parameters:
        return nnx.to_pure_dict(nnx.state(model(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed))))

    return initialize()
