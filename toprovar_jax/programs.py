"""Compiled programs under explicit keys, and the time they took to compile."""

import functools
import os
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

# Options of XLA. cuBLAS adds biases and applies GELU where it multiplies; after XLA's own products that takes
# another pass over the result.
_COMPILED_FOR_SPEED: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False}
# For programs that draw too few pictures to be worth a search for the fastest products.
COMPILED_IN_HASTE = {**_COMPILED_FOR_SPEED, "xla_gpu_autotune_level": 0}
# YNNPACK's products are the faster ones on a CPU, but each is prepared where a program runs for the first time, on
# one core, which costs a process more than it saves in its first pictures.
_WITHOUT_YNNPACK: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": ""}


class Recipe(NamedTuple):
    """How to compile a program.

    Attributes:
      function: a pure function.
      arguments: its positional arguments, or their shapes as `jax.ShapeDtypeStruct`s.
      static: its keyword arguments, compiled in.
      donate: positions of arguments whose buffers the result may take over.
      convolves: whether it spends its time in convolutions, which are slow on a GPU unless XLA searches for fast
        ones: it is never compiled in haste.
      to_host: whether the result is for the host. A GPU then writes it into memory that the host reads as it is;
        to fetch it afterwards would take another 1 to 2 ms for an image.
    """

    function: Callable[..., Any]
    arguments: tuple[PyTree, ...]
    static: dict[str, Hashable]
    donate: tuple[int, ...] = ()
    convolves: bool = False
    to_host: bool = False

    def output_shapes(self) -> PyTree:
        """Shapes and dtypes of the result, without running anything."""
        return jax.eval_shape(functools.partial(self.function, **self.static), *self.arguments)

    def lower(self) -> jax.stages.Lowered:
        """The program as it is handed to XLA."""
        function = functools.partial(self.function, **self.static)
        options: dict[str, Any] = {"out_shardings": _host_memory(self.arguments)} if self.to_host else {}
        return jax.jit(function, donate_argnums=self.donate, **options).lower(*self.arguments)


def _host_memory(arguments: PyTree) -> jax.sharding.Sharding | None:
    """The host's memory beside the GPU that the arguments are on; None elsewhere."""
    for leaf in jax.tree.leaves(arguments):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.SingleDeviceSharding):
            device: Any = next(iter(sharding.device_set))
            return sharding.with_memory_kind("pinned_host") if device.platform == "gpu" else None
    return None


@functools.cache
def _cpu_options() -> dict[str, Any]:
    """Options for programs on a CPU; none where this version of XLA refuses them, and none elsewhere."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0).lower().compile(_WITHOUT_YNNPACK)
    except jax.errors.JaxRuntimeError:
        return {}
    return _WITHOUT_YNNPACK


class Programs:
    """Compiles each program once, several at a time, and runs it by its key; threads may share it.

    Attributes:
      compiler_options: XLA's, for the programs to come that do not convolve.
    """

    def __init__(self) -> None:
        self.compiler_options = dict(_COMPILED_FOR_SPEED)
        self._compiled: dict[Hashable, Future[Any]] = {}
        self._tracing = threading.Lock()
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count())

    def __len__(self) -> int:
        return len(self._compiled)

    def compile(self, recipes: Mapping[Hashable, Callable[[], Recipe]]) -> float:
        """Compiles the programs whose keys are new, and waits for those that another thread is compiling.

        Args:
          recipes: how to compile each, by key; called for new keys only.

        Returns:
          Seconds that this took; 0.0 where every program was there.
        """
        if all(self._has(key) for key in recipes):
            return 0.0
        started = time.perf_counter()
        # Tracing holds the interpreter, so one thread does it at a time; compiling does not.
        with self._tracing:
            for key, make_recipe in recipes.items():
                if key not in self._compiled:
                    recipe = make_recipe()
                    options = _COMPILED_FOR_SPEED if recipe.convolves else self.compiler_options
                    options = {**_cpu_options(), **options}
                    self._compiled[key] = self._pool.submit(recipe.lower().compile, options)
            programs = [self._compiled[key] for key in recipes]
        try:
            for program in programs:
                program.result()
        except BaseException:
            self._forget_failed()
            raise
        return time.perf_counter() - started

    def run(self, key: Hashable, *arguments: PyTree) -> Any:
        """Runs a program that was compiled before."""
        return self._compiled[key].result()(*arguments)

    def _has(self, key: Hashable) -> bool:
        program = self._compiled.get(key)
        return program is not None and program.done()

    def _forget_failed(self) -> None:
        """So that they may be compiled once more, for instance when there is more memory."""
        with self._tracing:
            for key, program in list(self._compiled.items()):
                if program.done() and program.exception() is not None:
                    del self._compiled[key]
