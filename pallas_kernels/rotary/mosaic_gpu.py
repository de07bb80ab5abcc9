"""Normalises and rotates queries and keys, and appends keys and values to a cache: one kernel for Hopper GPUs.

A block of threads takes 64 tokens of several heads. Each of its warpgroups works on a head of its own, from the
copy of its tile into shared memory (TMA) to the copy of the result out of it; they share tables of cos and sin.
Channels that are rotated together lie side by side. The threads of a warpgroup cannot exchange them, the tensor
cores can: a product with a signed permutation is exact.
"""

import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_TOKENS = 64  # of a tile: the height of one wgmma
_WARPGROUPS = 4
_MULTIPROCESSORS = 132  # H100 SXM, H200, GH200
_EPSILON = 1e-12


class _Scratch(NamedTuple):
    """Shared memory of a block, with its barriers."""

    tile: Any  # [warpgroups, 64, head_dim]: a head's input, then the rotated queries
    appended: Any  # [warpgroups, 64, head_dim]: what goes into a cache
    bias: Any  # [warpgroups, head_dim]
    cos: Any  # [64, head_dim]
    sin: Any  # [64, head_dim]
    exchange: Any  # [head_dim, head_dim]
    tile_ready: Any
    bias_ready: Any
    tables_ready: Any


def rotate_and_append(
    query_key_value: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    query_bias: jax.Array,
    value_bias: jax.Array,
    query_log_scale: jax.Array,
    *,
    max_log_scale: float,
    length: int,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `pallas_kernels.rotate_and_append`, without its checks.

    Args:
      query_key_value: [rows, tokens, 3, heads, head_dim].
      key_cache: [rows, capacity, heads, head_dim].
      value_cache: like `key_cache`.
      cos: [rows or 1, tokens, head_dim / 2].
      sin: like `cos`.
      query_bias: [heads * head_dim].
      value_bias: [heads * head_dim].
      query_log_scale: [heads].
      max_log_scale: upper bound of `query_log_scale`.
      length: tokens that the caches hold.
      interpret: interpreter parameters, for tests on a CPU.

    Returns:
      query [rows, tokens, heads, head_dim] and the caches.
    """
    rows, tokens, _, heads, head_dim = query_key_value.shape
    dtype = query_key_value.dtype
    cos, sin = (jnp.repeat(table, 2, axis=-1) for table in (cos, sin))
    bound = float(jnp.dtype(dtype).type(max_log_scale))  # as jax.numpy would compare
    tiles = pl.cdiv(tokens, _TOKENS)
    warpgroups = math.gcd(heads, _WARPGROUPS)
    # Several heads in turn, where there are blocks enough for all multiprocessors: tables are read less often.
    many = rows * tiles * 3 * heads >= 4 * _WARPGROUPS * _MULTIPROCESSORS
    block_heads = math.gcd(heads, 4 * warpgroups) if many else warpgroups

    def memory(*shape: int, dtype: Any = dtype) -> Any:
        swizzle = next(size for size in (128, 64, 32) if head_dim % (size // 2) == 0)
        tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM((*shape, head_dim), dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))

    scratch = _Scratch(
        tile=memory(warpgroups, _TOKENS),
        # Row by row: a copy out of the tensor cores' tiles must start at a multiple of 8 tokens.
        appended=plgpu.SMEM((warpgroups, _TOKENS, head_dim), dtype),
        bias=plgpu.SMEM((warpgroups, head_dim), dtype),
        cos=memory(_TOKENS, dtype=jnp.float32),
        sin=memory(_TOKENS, dtype=jnp.float32),
        exchange=memory(head_dim),
        tile_ready=plgpu.Barrier(num_barriers=warpgroups),
        bias_ready=plgpu.Barrier(num_barriers=warpgroups),
        tables_ready=plgpu.Barrier(num_arrivals=3),
    )

    def kernel(*refs: Any) -> None:
        projected, query_bias, value_bias, log_scale, cos_ref, sin_ref, exchange, keys, values, queries = refs[:10]
        memory = _Scratch(*refs[10:])
        registers: Any = _Registers() if interpret is None else _InterpretedRegisters()
        row, start = lax.axis_index("row"), lax.axis_index("tile") * _TOKENS
        warpgroup, first_head = lax.axis_index("warpgroup"), lax.axis_index("block") * block_heads
        tile, bias = memory.tile.at[warpgroup], memory.bias.at[warpgroup]
        here, there = pl.ds(start, _TOKENS), pl.ds(length + start, _TOKENS)

        @pl.when(first_head < 2 * heads)
        def _load_tables() -> None:
            @pl.when(warpgroup == 0)
            def _() -> None:
                place = (row if cos.shape[0] > 1 else 0, here)
                plgpu.copy_gmem_to_smem(cos_ref.at[place], memory.cos, memory.tables_ready)
                plgpu.copy_gmem_to_smem(sin_ref.at[place], memory.sin, memory.tables_ready)
                plgpu.copy_gmem_to_smem(exchange, memory.exchange, memory.tables_ready)

            plgpu.barrier_wait(memory.tables_ready)

        def load(bias_ref: Any = None, head: Any = None) -> jax.Array:
            x = registers.load(tile)
            if bias_ref is None:
                return x
            plgpu.copy_gmem_to_smem(bias_ref.at[head], bias, memory.bias_ready.at[warpgroup])
            plgpu.barrier_wait(memory.bias_ready.at[warpgroup])
            return x + lax.broadcast_in_dim(registers.load_row(bias), x.shape, (1,))

        def rotate(x: jax.Array, scale: Any) -> jax.Array:
            narrow = x.astype(dtype)
            x, exchanged = narrow.astype(jnp.float32), registers.multiply(narrow, memory.exchange)
            factor = scale * lax.rsqrt(jnp.maximum((x * x).sum(axis=1), _EPSILON**2))
            x = x * registers.load(memory.cos) + exchanged * registers.load(memory.sin)
            return x * lax.broadcast_in_dim(factor, x.shape, (0,))

        def append(x: jax.Array, destination: Any) -> None:
            registers.store(memory.appended.at[warpgroup], x.astype(dtype))
            copy_out(memory.appended.at[warpgroup], destination)

        def copy_out(source: Any, destination: Any) -> None:
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(source, destination)
            plgpu.wait_smem_to_gmem(0)

        @pl.loop(0, block_heads // warpgroups)
        def _(step: Any) -> None:
            index = first_head + step * warpgroups + warpgroup  # heads of queries, then of keys, then of values
            kind, head = lax.div(index, heads), lax.rem(index, heads)
            ready = memory.tile_ready.at[warpgroup]
            plgpu.copy_gmem_to_smem(projected.at[row, here, index], tile, ready)
            plgpu.barrier_wait(ready)

            @pl.when(kind == 0)
            def _query() -> None:
                scale = jnp.exp(jnp.minimum(log_scale[head].astype(jnp.float32), bound))
                tile[...] = rotate(load(query_bias, head), scale).astype(dtype)
                copy_out(tile, queries.at[row, here, head])

            @pl.when(kind == 1)
            def _key() -> None:
                append(rotate(load(), 1.0), keys.at[row, there, head])

            @pl.when(kind == 2)
            def _value() -> None:
                append(load(value_bias, head), values.at[row, there, head])

    def body(*refs: Any) -> None:
        pl.run_scoped(functools.partial(kernel, *refs), *scratch, collective_axes="warpgroup")

    # As references, so that the kernel writes into the caches themselves.
    keys, values = jax.new_ref(key_cache), jax.new_ref(value_cache)
    query = pl.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, tokens, heads, head_dim), dtype),
        mesh=plgpu.Mesh(
            grid=(rows, tiles, 3 * heads // block_heads),
            grid_names=("row", "tile", "block"),
            num_threads=warpgroups,
            thread_name="warpgroup",
        ),
        # jax 0.12 infers layouts by default, and finds none for this kernel.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
        interpret=False if interpret is None else interpret,
        name="rotate_and_append",
    )(
        query_key_value.reshape(rows, tokens, 3 * heads, head_dim),
        query_bias.reshape(heads, head_dim),
        value_bias.reshape(heads, head_dim),
        query_log_scale,
        cos,
        sin,
        jnp.asarray(_exchange(head_dim), dtype),
        keys,
        values,
    )
    return query, keys[...], values[...]


def _exchange(head_dim: int) -> np.ndarray:
    """The matrix that makes (-v, u, ...) of a row (u, v, ...)."""
    matrix = np.zeros((head_dim, head_dim), np.float32)
    even = np.arange(0, head_dim, 2)
    matrix[even + 1, even] = -1
    matrix[even, even + 1] = 1
    return matrix


class _Registers(NamedTuple):
    """What a warpgroup does with its registers, which hold tiles as the tensor cores want them."""

    def load(self, tile: Any) -> jax.Array:
        """A tile, in float32."""
        return _load(tile, plgpu.Layout.WGMMA)

    def load_row(self, row: Any) -> jax.Array:
        """A row, in float32, to be broadcast over a tile's rows."""
        return _load(row, plgpu.Layout.WGMMA.reduce(0), optimized=False)

    def store(self, rows: Any, x: jax.Array) -> None:
        """A tile into memory that holds it row by row: with bank conflicts."""
        if hasattr(plgpu, "store"):
            plgpu.store(rows, x, optimized=False)
        else:  # before jax 0.12
            rows[...] = x

    def multiply(self, x: jax.Array, matrix: Any) -> jax.Array:
        """Tile · matrix, in float32."""

        def run(result: Any) -> jax.Array:
            plgpu.wgmma(result, x, matrix)
            return result[...]

        return pl.run_scoped(run, plgpu.ACC((_TOKENS, matrix.shape[1]), jnp.float32))


class _InterpretedRegisters(NamedTuple):
    """The same for Pallas' interpreter, which knows neither layouts nor wgmma."""

    def load(self, tile: Any) -> jax.Array:
        """A tile, in float32."""
        return tile[...].astype(jnp.float32)

    def load_row(self, row: Any) -> jax.Array:
        """A row, in float32."""
        return self.load(row)

    def store(self, rows: Any, x: jax.Array) -> None:
        """A tile into memory."""
        rows[...] = x

    def multiply(self, x: jax.Array, matrix: Any) -> jax.Array:
        """Tile · matrix, in float32."""
        return jnp.dot(x.astype(jnp.float32), self.load(matrix), precision=lax.Precision.HIGHEST)


def _load(ref: Any, layout: Any, **options: Any) -> jax.Array:
    whole: tuple[Any, ...] = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # jax 0.10
    return plgpu.load(ref, *whole, layout=layout, **options).astype(jnp.float32)
