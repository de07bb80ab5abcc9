"""Speed of attention with entropy against its alternatives, over every scale of Infinity 2B and 8B.

    python -m bench.attention --out bench/results/attention_h200.json

Kernel times are CUPTI's (the sum of all kernels of a call, no launch gaps), the arms of a shape interleaved, in
one process. PyTorch's attention runs in a process of its own by CUDA-graph replay: compare it with more caution.
The kernel reads the padded cache of the model (`kv_length` below its capacity); the other arms get arrays of
exactly the valid length, without a charge for cutting them out.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bench import report
from pallas_kernels import flash_attention_entropy

SIDES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)  # token grids of a square 1M image
HEADS = {"2b": 16, "8b": 28}
BATCH, HEAD_DIM = 2, 128  # guidance: a conditional and an unconditional row
SCALE = HEAD_DIM**-0.5
ARMS = (
    "kernel with entropy", "kernel", "cuDNN", "cuDNN, entropy by identity", "materialised entropy", "reference"
)  # fmt: skip

Attention = Callable[..., Any]
Shape = tuple[int, int, int]  # heads, q_tokens, kv_length


def shapes(heads: int) -> list[Shape]:
    """(heads, q_tokens, kv_length) of every scale."""
    areas = [side * side for side in SIDES]
    return [(heads, area, sum(areas[: index + 1])) for index, area in enumerate(areas)]


def materialised(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output and entropy by way of the matrix of weights, as a model without a kernel would."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * SCALE
    log_weights = jax.nn.log_softmax(logits, axis=-1)
    weights = jnp.exp(log_weights)
    output = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
    return output, -jnp.sum(weights * log_weights, axis=-1)


def inputs(heads: int) -> list[jax.Array]:
    """Query, key and value at the capacity of a cache that holds every scale, padded to a multiple of 8."""
    capacity = sum(side * side for side in SIDES)
    shape = (BATCH, capacity + -capacity % 8, heads, HEAD_DIM)
    return [jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(heads), 3)]


def arms(shape: Shape, arrays: list[jax.Array]) -> dict[str, tuple[Attention, tuple[jax.Array, ...]]]:
    """Every arm of a shape: its compiled function and its arguments."""
    _, q_tokens, kv_length = shape
    query, *cache = arrays[0][:, :q_tokens], *arrays[1:]
    valid = [x[:, :kv_length] for x in cache]
    kernel = functools.partial(
        flash_attention_entropy, scale=SCALE, kv_length=kv_length, implementation="mosaic_gpu"
    )
    cudnn = functools.partial(jax.nn.dot_product_attention, scale=SCALE, implementation="cudnn")
    identity = functools.partial(flash_attention_entropy, scale=SCALE, implementation="cudnn")
    without = functools.partial(kernel, return_entropy=False)
    # What other devices than Hopper GPUs run.
    portable = functools.partial(flash_attention_entropy, scale=SCALE, implementation="reference")
    functions: list[Attention] = [kernel, without, cudnn, identity, materialised, portable]
    arguments = [(query, *cache)] * 2 + [(query, *valid)] * 4
    compiled = [
        jax.jit(function).lower(*taken).compile() for function, taken in zip(functions, arguments, strict=True)
    ]
    return dict(zip(ARMS, zip(compiled, arguments, strict=True), strict=True))


def measure(
    shape_arms: dict[str, tuple[Attention, tuple[jax.Array, ...]]], repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of `repeats` calls of every arm, the arms taking turns."""
    from jax.experimental.mosaic.gpu import profiler

    cupti = profiler.Cupti(finalize=False)
    times: dict[str, list[float]] = {name: [] for name in shape_arms}
    for _ in range(repeats):
        for name, (function, arguments) in shape_arms.items():
            times[name].append(cupti.measure(function)(*arguments)[1])
    return times


def row(model: str, shape: Shape, arm: str, milliseconds: list[float]) -> dict[str, Any]:
    """One line of the table: median, the interval that holds nine tenths of the calls, and throughput."""
    heads, q_tokens, kv_length = shape
    median = statistics.median(milliseconds)
    cuts = statistics.quantiles(milliseconds, n=20, method="inclusive")
    return {
        "model": model,
        "heads": heads,
        "q_tokens": q_tokens,
        "kv_length": kv_length,
        "arm": arm,
        "median_ms": median,
        "interval_ms": [cuts[0], cuts[-1]],
        "tflops": 4 * BATCH * heads * q_tokens * kv_length * HEAD_DIM / median / 1e9,
    }


def torch_rows(repeats: int) -> list[dict[str, Any]]:
    """PyTorch's attention over the same shapes, from a process of its own."""
    listed = [(model, *shape) for model, heads in HEADS.items() for shape in shapes(heads)]
    command = [sys.executable, "-m", "bench.attention_torch", json.dumps(listed), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    return [row(model, tuple(shape), arm, times) for model, shape, arm, times in measured]


def table(rows: list[dict[str, Any]]) -> str:
    """Microseconds by shape and arm, and cuDNN's time over the kernel's."""
    names = list(dict.fromkeys(item["arm"] for item in rows))
    lines = [f"{'model':<6}{'queries':>8}{'keys':>7}  " + "".join(f"{name:>28}" for name in names)]
    sums: dict[str, dict[str, float]] = {model: dict.fromkeys(names, 0.0) for model in HEADS}
    by_shape: dict[tuple[Any, ...], dict[str, float]] = {}
    for item in rows:
        shape = (item["model"], item["q_tokens"], item["kv_length"])
        by_shape.setdefault(shape, {})[item["arm"]] = item["median_ms"]
        sums[item["model"]][item["arm"]] += item["median_ms"]
    entries = [*by_shape.items(), *(((model, "all", ""), total) for model, total in sums.items())]
    for (model, queries, keys), times in entries:
        cells = "".join(f"{times.get(name, float('nan')) * 1e3:>28.1f}" for name in names)
        ratio = times["cuDNN"] / times["kernel with entropy"]
        cost = times["kernel with entropy"] / times["kernel"] - 1
        lines.append(f"{model:<6}{queries:>8}{keys:>7}  {cells}  cuDNN/kernel {ratio:.3f}, entropy {cost:+.1%}")
    return "\n".join(lines)


def main() -> None:
    """Times everything, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of every arm")
    options = parser.parse_args()
    rows = []
    for model, heads in HEADS.items():
        arrays = inputs(heads)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            prepared = list(pool.map(lambda shape, arrays=arrays: arms(shape, arrays), shapes(heads)))
        for shape, shape_arms in zip(shapes(heads), prepared, strict=True):
            for arm, times in measure(shape_arms, options.repeats).items():
                rows.append(row(model, shape, arm, times))
    rows += torch_rows(options.repeats)
    out = Path(options.out)
    timing = "CUPTI, kernels of a call summed, arms interleaved; torch: CUDA-graph replay"
    report.write(out.stem, {"timing": timing, "rows": rows}, out.parent)
    print(table(rows))


if __name__ == "__main__":
    # Leaves room on the card for PyTorch's process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main()
