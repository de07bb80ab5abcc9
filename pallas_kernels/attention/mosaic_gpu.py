"""Attention, its entropy and its logsumexp in one kernel for Hopper GPUs (Pallas Mosaic GPU).

A block of threads handles a tile of query rows of one head: its compute warpgroups own 64 rows each and its
memory warpgroup streams the tiles of keys and values through shared memory (TMA). While one compute warpgroup
works on its softmax, the tensor cores (wgmma) work for another: they take turns. pallas_kernels/README.md derives
the recurrences, argues the schedule and shows the measurements.

Synchronisation. Pallas' automatic barriers are off; every ordering that the kernel needs is one of these:
* A tile of query, key or value is read after a wait on the barrier that its TMA copy completes. Where step
  0 takes two copies, after a second wait, on `more_ready`.
* A slot of keys (values) is refilled after the memory warpgroup waited for `key_free` (`value_free`), on which
  every thread of every compute warpgroup arrives after it has waited for its own wgmma that reads the slot.
* The output tile takes the place of the query tile. `query_free` makes each warpgroup wait until all its threads
  have waited for their last wgmma that reads the query; no other warpgroup touches that tile.
* Output and rows are stored to global memory after `commit_smem`, which fences the writes of every thread for the
  copy engine and then joins the warpgroup.
* `turn[w]` orders the use of the tensor cores alone, and no memory access depends on it.
No memory is both read and written by the threads of a warpgroup other than under the rules above.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.tensor_cores import ROWS, InterpretedTensorCores, TensorCores
from pallas_kernels.attention.tiles import TOKEN_GROUP, Ends, Run, Tiles, deal

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)
# Stands for minus infinity: finite, so that weight * logit of a masked key is 0 and not NaN.
_MASKED = -1e30
# 64 Ki registers a multiprocessor, in multiples of 8 a thread; ptxas caps a thread at 255.
_REGISTERS = {2: (240, 24), 3: (160, 32)}
_MULTIPROCESSORS = 132  # H100 SXM, H200, GH200


class BlockSizes(NamedTuple):
    """What a shape class is compiled with.

    Attributes:
      compute_warpgroups: tiles of 64 query rows that share every tile of keys, with turns on the tensor cores.
      block_kv: keys of a tile.
      stages: tiles of keys and values in flight.
    """

    compute_warpgroups: int
    block_kv: int
    stages: int


def block_sizes(batch: int, q_tokens: int, heads: int, head_dim: int, kv_length: int) -> BlockSizes:
    """The measured choice for a shape class (pallas_kernels/README.md, "Block sizes")."""

    def one_wave(warpgroups: int) -> bool:
        return batch * heads * pl.cdiv(q_tokens, warpgroups * ROWS) <= _MULTIPROCESSORS

    if head_dim > 128:  # the output's registers and the tiles' shared memory leave no choice
        return BlockSizes(compute_warpgroups=1 if one_wave(1) else 2, block_kv=64, stages=2)
    if one_wave(1):
        return BlockSizes(compute_warpgroups=1, block_kv=64 if kv_length <= 512 else 128, stages=2)
    if one_wave(3) and not one_wave(2):
        return BlockSizes(compute_warpgroups=3, block_kv=64, stages=2)
    return BlockSizes(compute_warpgroups=2, block_kv=128 if kv_length <= 3072 else 192, stages=2)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    more_key: jax.Array | None = None,
    more_value: jax.Array | None = None,
    *,
    scale: float,
    kv_length: int,
    more_length: int = 0,
    return_entropy: bool,
    blocks: BlockSizes | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Softmax attention over the first `kv_length` keys, and the first `more_length` of a second pair of arrays.

    Tokens are copied in whole groups of 8: a count of query tokens that is no multiple of 8, or a capacity of keys
    that is none, costs a padded copy of the array; keep a cache at a multiple of 8.

    Args:
      query: [batch, q_tokens, heads, head_dim], bfloat16 or float16; head_dim a multiple of 16 up to 256.
      key: [batch, capacity, kv_heads, head_dim]; kv_heads divides heads.
      value: [batch, capacity, kv_heads, head_dim].
      more_key: [batch, more_capacity, kv_heads, head_dim], or None.
      more_value: [batch, more_capacity, kv_heads, head_dim], or None.
      scale: factor of the logits, not negative.
      kv_length: number of valid keys, 1 to capacity.
      more_length: number of valid keys of the second pair, 1 to more_capacity; 0 without it.
      return_entropy: without it the entropy is None and the kernel is compiled without its sums.
      blocks: overrides the measured choice.
      interpret: interpreter parameters, for tests on a CPU.

    Returns:
      output [batch, q_tokens, heads, head_dim] in the query's dtype; entropy and logsumexp, float32
      [batch, heads, q_tokens], in nats.
    """
    batch, q_tokens, heads, head_dim = query.shape
    blocks = blocks or block_sizes(batch, q_tokens, heads, head_dim, kv_length + more_length)
    tiles = deal(kv_length, more_length, blocks.block_kv)
    query, *keys_and_values = (_pad_tokens(x) for x in (query, key, value, more_key, more_value) if x is not None)
    output, logsumexp, *entropy = _call(
        query, keys_and_values, scale * _LOG2_E, tiles, return_entropy, blocks, interpret
    )
    rows = [x[:, :, :q_tokens] for x in (logsumexp, *entropy)]
    return output[:, :q_tokens], rows[1] if return_entropy else None, rows[0]


def _pad_tokens(x: jax.Array) -> jax.Array:
    missing = -x.shape[1] % TOKEN_GROUP
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


def _call(
    query: jax.Array,
    keys_and_values: list[jax.Array],
    scale: float,
    tiles: Tiles,
    return_entropy: bool,
    blocks: BlockSizes,
    interpret: Any,
) -> list[jax.Array]:
    batch, q_tokens, heads, head_dim = query.shape
    warpgroups, block_kv, stages = blocks
    stages = min(stages, tiles.steps)
    swizzle = next(size for size in (128, 64, 32) if head_dim % (size // 2) == 0)
    tiled = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))

    def tile(*shape: int) -> Any:
        return plgpu.SMEM((*shape, head_dim), query.dtype, transforms=tiled)

    scratch = _Scratch(
        query=tile(warpgroups, ROWS),
        key=tile(stages, block_kv),
        value=tile(stages, block_kv),
        rows=plgpu.SMEM((1 + return_entropy, warpgroups, ROWS), jnp.float32),
        query_ready=plgpu.Barrier(num_barriers=warpgroups),
        query_free=plgpu.Barrier(num_barriers=warpgroups),
        key_ready=plgpu.Barrier(num_barriers=stages),
        value_ready=plgpu.Barrier(num_barriers=stages),
        key_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        value_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=warpgroups),
        more_ready=plgpu.Barrier(num_barriers=2) if tiles.ends and tiles.ends.shared else None,
    )

    def kernel(query_ref: Any, *refs: Any) -> None:
        sources, (output_ref, *rest) = refs[: len(keys_and_values)], refs[len(keys_and_values) :]
        row_refs, memory = rest[: 1 + return_entropy], _Scratch(*rest[1 + return_entropy :])
        index, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        start = (lax.axis_index("tile") * warpgroups + warpgroup) * ROWS

        @pl.when(warpgroup < warpgroups)
        def _compute() -> None:
            if warpgroups > 1:
                plgpu.set_max_registers(_REGISTERS[warpgroups][0], action="increase")
            place = (index, pl.ds(start, ROWS), head)
            tile_ref = memory.query.at[warpgroup]
            plgpu.copy_gmem_to_smem(query_ref.at[place], tile_ref, memory.query_ready.at[warpgroup])
            plgpu.barrier_wait(memory.query_ready.at[warpgroup])
            output, *rows = _attend(memory, warpgroup, scale, tiles, return_entropy, blocks, interpret)
            _barrier_join(memory.query_free.at[warpgroup])
            tile_ref[...] = output.astype(query.dtype)
            for position, row in enumerate(rows):
                memory.rows.at[position, warpgroup][...] = row
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile_ref, output_ref.at[place])
            for position, row_ref in enumerate(row_refs):
                _store_rows(memory.rows.at[position, warpgroup], row_ref.at[index, head], start)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == warpgroups)
        def _stream() -> None:
            if warpgroups > 1:
                plgpu.set_max_registers(_REGISTERS[warpgroups][1], action="decrease")
            kv_head = lax.div(head, heads // keys_and_values[0].shape[2])
            pairs = [sources[i : i + 2] for i in range(0, len(sources), 2)]
            _stream_keys_and_values(memory, pairs, index, kv_head, tiles, blocks)

    row = jax.ShapeDtypeStruct((batch, heads, q_tokens), jnp.float32)
    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(query.shape, query.dtype), *[row] * (1 + return_entropy)],
        scratch_types=tuple(x for x in scratch if x is not None),
        # The tiles of one head run side by side, so that its keys and values are read from memory once.
        grid=(batch, heads, pl.cdiv(q_tokens, warpgroups * ROWS)),
        grid_names=("batch", "head", "tile"),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="flash_attention_entropy",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )(query, *keys_and_values)


class _Scratch(NamedTuple):
    """Shared memory of a block, with its barriers."""

    query: Any  # [warpgroups, 64, head_dim]; holds the output in the end
    key: Any  # [stages, block_kv, head_dim]
    value: Any  # [stages, block_kv, head_dim]
    rows: Any  # [logsumexp and entropy, warpgroups, 64]
    query_ready: Any
    query_free: Any
    key_ready: Any
    value_ready: Any
    key_free: Any
    value_free: Any
    turn: Any
    more_ready: Any = None  # keys and values of the second pair in the tile of step 0, where both have a part


class _Sums(NamedTuple):
    """Running sums of a warpgroup's rows over the keys seen; logits x are in base 2. See `_soften`."""

    maximum: jax.Array  # max x                                [64]
    total: jax.Array  # sum 2^(x - max)                        [64]
    weighted: jax.Array | None  # sum 2^(x - max) (x - max)    [64]


def _stream_keys_and_values(
    memory: _Scratch, pairs: list[Any], index: Any, kv_head: Any, tiles: Tiles, blocks: BlockSizes
) -> None:
    """The memory warpgroup: fills every slot as soon as its readers have left it."""
    block_kv = blocks.block_kv
    stages = min(blocks.stages, tiles.steps)

    def copy(ref: Any, token: Any, tile_ref: Any, ready: Any) -> None:
        tokens = pl.ds(token, tile_ref.shape[0])
        plgpu.copy_gmem_to_smem(ref.at[index, tokens, kv_head], tile_ref, ready)

    def fill(ends: Ends, first: Any) -> None:
        for which, slots, ready in ((0, memory.key, memory.key_ready), (1, memory.value, memory.value_ready)):
            tile, row = slots.at[0], ends.more_row
            copy(pairs[0][which], first + ends.token, tile.at[pl.ds(0, row)], ready.at[0])
            if ends.shared:
                rest = tile.at[pl.ds(row, block_kv - row)]
                copy(pairs[1][which], first + ends.more_token, rest, memory.more_ready.at[which])

    def stream(run: Run) -> None:
        key_ref, value_ref = pairs[run.pair]

        def token(step: Any) -> Any:
            return (step - run.start if run.start else step) * block_kv

        @pl.loop(min(run.start, stages), min(run.stop, stages))
        def _(step: Any) -> None:
            copy(key_ref, token(step), memory.key.at[step], memory.key_ready.at[step])
            copy(value_ref, token(step), memory.value.at[step], memory.value_ready.at[step])

        @pl.loop(max(run.start, stages), max(run.stop, stages))
        def _(step: Any) -> None:
            slot = lax.rem(step, stages)
            plgpu.barrier_wait(memory.key_free.at[slot])
            copy(key_ref, token(step), memory.key.at[slot], memory.key_ready.at[slot])
            plgpu.barrier_wait(memory.value_free.at[slot])
            copy(value_ref, token(step), memory.value.at[slot], memory.value_ready.at[slot])

    # Loops, although short: an index that Pallas knows may not run past the end of a short cache, a variable may.
    if tiles.ends:
        pl.loop(0, 1)(functools.partial(fill, tiles.ends))
    for run in tiles.runs:
        stream(run)

    # Observe the last phase of every barrier, so that none is left pending when the block ends.
    @pl.loop(0, stages)
    def _(slot: Any) -> None:
        plgpu.barrier_wait(memory.key_free.at[slot])
        plgpu.barrier_wait(memory.value_free.at[slot])


def _attend(
    memory: _Scratch,
    warpgroup: Any,
    scale: float,
    tiles: Tiles,
    return_entropy: bool,
    blocks: BlockSizes,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """A compute warpgroup: its 64 rows against all keys.

    A turn on the tensor cores is the product of one step's weights with its values and the logits of the next
    step, issued together so that the tensor cores do not idle between them.

    Returns:
      output [64, head_dim], logsumexp [64] and, if asked for, entropy [64], all float32.
    """
    warpgroups, block_kv, _ = blocks
    steps, ends = tiles.steps, tiles.ends
    stages, head_dim = memory.key.shape[0], memory.key.shape[2]
    query_ref = memory.query.at[warpgroup]
    cores: Any = (TensorCores if interpret is None else InterpretedTensorCores)(block_kv)

    def wait_turn() -> None:
        if warpgroups > 1:
            plgpu.barrier_wait(memory.turn.at[warpgroup])

    def pass_turn() -> None:
        if warpgroups > 1:
            plgpu.barrier_arrive(memory.turn.at[lax.rem(warpgroup + 1, warpgroups)])

    def soften(scores: jax.Array, output: jax.Array, sums: _Sums) -> tuple[jax.Array, jax.Array, _Sums]:
        weights, correction, sums = _soften(scores, scale, sums)
        output = output * _across(correction, output.shape)
        # Keeps the compiler from moving any of this into the turn that follows.
        return lax.optimization_barrier((weights.astype(memory.value.dtype), output, sums))

    def step(index: Any, carry: Any) -> Any:
        weights, output, sums = soften(*carry)
        here, there = lax.rem(index, stages), lax.rem(index + 1, stages)
        plgpu.barrier_wait(memory.value_ready.at[here])
        plgpu.barrier_wait(memory.key_ready.at[there])
        wait_turn()
        output, scores = cores.accumulate_and_score(
            output, weights, memory.value, here, query_ref, memory.key, there
        )
        pass_turn()
        plgpu.barrier_arrive(memory.value_free.at[here])
        plgpu.barrier_arrive(memory.key_free.at[there])
        return scores, output, sums

    # The first turn is warpgroup 0's; the last warpgroup owes it one and does not pass its own last turn on.
    pl.when(warpgroup == warpgroups - 1)(pass_turn)
    plgpu.barrier_wait(memory.key_ready.at[0])
    if ends and ends.shared:
        plgpu.barrier_wait(memory.more_ready.at[0])
    wait_turn()
    scores = cores.score(query_ref, memory.key, 0)
    pass_turn()
    plgpu.barrier_arrive(memory.key_free.at[0])
    if ends and ends.shared:
        plgpu.barrier_wait(memory.more_ready.at[1])
    if ends:
        columns = cores.columns()
        inside = columns < ends.valid
        if ends.shared:
            inside |= (columns >= ends.more_row) & (columns < ends.more_valid)
        scores = jnp.where(inside, scores, _MASKED)

    def filled(number: float, *shape: int) -> jax.Array:
        layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
        return cores.laid_out(jnp.full(shape, number, jnp.float32), layout)

    sums = _Sums(filled(_MASKED, ROWS), filled(0, ROWS), filled(0, ROWS) if return_entropy else None)
    carry = (scores, filled(0, ROWS, head_dim), sums)
    scores, output, sums = lax.fori_loop(0, steps - 1, step, carry)

    if tiles.tail:
        scores = jnp.where(cores.columns() < tiles.tail, scores, _MASKED)
    weights, output, sums = soften(scores, output, sums)
    last = (steps - 1) % stages
    plgpu.barrier_wait(memory.value_ready.at[last])
    wait_turn()
    output = cores.accumulate(output, weights, memory.value, last)
    pl.when(warpgroup < warpgroups - 1)(pass_turn)
    plgpu.barrier_arrive(memory.value_free.at[last])

    log_total = jnp.log(sums.total) * _LOG2_E
    logsumexp = (sums.maximum + log_total) * _LN_2
    output = output * _across(1 / sums.total, output.shape)
    if sums.weighted is None:
        return output, logsumexp
    # The true value is never negative, its rounding can be.
    entropy = jnp.maximum((log_total - sums.weighted / sums.total) * _LN_2, 0.0)
    return output, logsumexp, entropy


def _store_rows(rows_ref: Any, row_ref: Any, start: Any) -> None:
    """Copies the rows that exist: the copy of a contiguous row is not clipped at its end as that of a tile is."""
    q_tokens = row_ref.shape[0]
    group = math.gcd(q_tokens, ROWS)

    def copy(offset: int) -> None:
        plgpu.copy_smem_to_gmem(rows_ref.at[pl.ds(offset, group)], row_ref.at[pl.ds(start + offset, group)])

    for offset in range(0, ROWS, group):
        pl.when(start + offset < q_tokens)(functools.partial(copy, offset))


def _soften(scores: jax.Array, scale: float, sums: _Sums) -> tuple[jax.Array, jax.Array, _Sums]:
    """Weights of a tile relative to the new maximum, the factor of what was summed before, and the new sums."""
    maximum = jnp.maximum(sums.maximum, scores.max(axis=1) * scale)
    change = sums.maximum - maximum
    correction = jnp.exp2(change)
    logits = scores * scale - _across(maximum, scores.shape)
    weights = jnp.exp2(logits)
    total = correction * sums.total + weights.sum(axis=1)
    weighted = sums.weighted
    if weighted is not None:
        # x moves with the maximum, so sum 2^x x gains change * total: the term that the published algorithm drops.
        weighted = correction * (weighted + change * sums.total) + (weights * logits).sum(axis=1)
    return weights, correction, _Sums(maximum, total, weighted)


def _across(row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(row, shape, (0,))


def _barrier_join(barrier: Any) -> None:
    """Waits until every thread of the warpgroup that shares the barrier has come here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
