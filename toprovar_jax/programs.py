"""Compiled programs under explicit keys, and the time they took to compile."""

import functools
import os
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

# Options of XLA for programs that draw too few pictures to be worth a search for the fastest products.
COMPILED_IN_HASTE = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


class Recipe(NamedTuple):
    """How to compile a program.

    Attributes:
      function: a pure function.
      arguments: its positional arguments, or their shapes as `jax.ShapeDtypeStruct`s.
      static: its keyword arguments, compiled in.
      donate: positions of arguments whose buffers the result may take over.
    """

    function: Callable[..., Any]
    arguments: tuple[PyTree, ...]
    static: dict[str, Hashable]
    donate: tuple[int, ...] = ()

    def output_shapes(self) -> PyTree:
        """Shapes and dtypes of the result, without running anything."""
        return jax.eval_shape(functools.partial(self.function, **self.static), *self.arguments)

    def lower(self) -> jax.stages.Lowered:
        """The program as it is handed to XLA."""
        function = functools.partial(self.function, **self.static)
        return jax.jit(function, donate_argnums=self.donate).lower(*self.arguments)


class Programs:
    """Compiles each program once, several at a time, and runs it by its key.

    Attributes:
      compiler_options: XLA's, for the programs to come.
    """

    def __init__(self) -> None:
        self.compiler_options: dict[str, Any] = {}
        self._compiled: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    def compile(self, recipes: Mapping[Hashable, Callable[[], Recipe]]) -> float:
        """Compiles the programs whose keys are new.

        Args:
          recipes: how to compile each, by key; called for new keys only.

        Returns:
          Seconds that this took; 0.0 where every key was known.
        """
        missing = {key: recipe for key, recipe in recipes.items() if key not in self._compiled}
        if not missing:
            return 0.0
        started = time.perf_counter()
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            # Tracing holds the interpreter, so it stays on one thread; compiling does not.
            compiling = {
                key: pool.submit(recipe().lower().compile, self.compiler_options)
                for key, recipe in missing.items()
            }
            self._compiled |= {key: program.result() for key, program in compiling.items()}
        return time.perf_counter() - started

    def run(self, key: Hashable, *arguments: PyTree) -> Any:
        """Runs a program that was compiled before."""
        return self._compiled[key](*arguments)
