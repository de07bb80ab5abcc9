"""What only a Hopper GPU can prove of the attention kernel: accuracy, whole outputs, determinism.

    python -m bench.attention_checks --out bench/results/attention_checks_h200.json

Every check fails the command when it fails. `--only sanitize` runs three small calls, for compute-sanitizer.
"""

import argparse
import concurrent.futures
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import report
from pallas_kernels import AttentionResult, flash_attention_entropy

Array = np.ndarray
kernel = functools.partial(flash_attention_entropy, implementation="mosaic_gpu")


def float64_attention(query: Array, key: Array, value: Array, scale: float) -> tuple[Array, Array, Array]:
    """Output [rows, head_dim], entropy [rows] and logsumexp [rows] of one head in float64."""
    logits = query @ key.T * scale
    maximum = logits.max(axis=-1, keepdims=True)
    shifted = logits - maximum
    weights = np.exp(shifted)
    total = weights.sum(axis=-1)
    entropy = np.log(total) - (weights * shifted).sum(axis=-1) / total
    return weights @ value / total[:, None], entropy, np.log(total) + maximum[:, 0]


def inputs(
    seed: int, batch: int, q_tokens: int, heads: int, head_dim: int, capacity: int, dtype: Any = jnp.bfloat16
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unit queries and keys, from independent to aligned along the tokens, so that every entropy occurs."""
    rng = np.random.default_rng(seed)
    query, key, value = (
        rng.standard_normal((batch, tokens, heads, head_dim), np.float32)
        for tokens in (q_tokens, capacity, capacity)
    )
    blend = np.linspace(0, 1, q_tokens, dtype=np.float32)[None, :, None, None]
    query = (1 - blend) * query + 3 * blend * key[:, np.arange(q_tokens) % capacity]
    query, key = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    return tuple(jnp.asarray(x.astype(dtype)) for x in (query, key, value))  # type: ignore[return-value]


def errors(result: AttentionResult, arrays: Any, scale: float, kv_length: int, rows: Array, head: int) -> Any:
    """Errors of some rows of one head of the last batch row against float64."""
    # In NumPy from the start: on a GPU every little operation on a new shape would be compiled.
    query, key, value = (np.asarray(x)[-1].astype(np.float64) for x in arrays)
    output, entropy, logsumexp = (np.asarray(x).astype(np.float64) for x in result)
    group = query.shape[1] // key.shape[1]
    truth = float64_attention(
        query[rows, head], key[:kv_length, head // group], value[:kv_length, head // group], scale
    )
    got_output, got_entropy, got_logsumexp = (
        output[-1, rows, head],
        entropy[-1, head, rows],
        logsumexp[-1, head, rows],
    )
    norm = np.linalg.norm(truth[1])
    return {
        "entropy_max": float(np.abs(got_entropy - truth[1]).max()),
        "entropy_relative": float(np.linalg.norm(got_entropy - truth[1]) / norm) if norm > 1e-3 else 0.0,
        "entropy_lowest": float(entropy.min()),
        "entropy_range": [float(truth[1].min()), float(truth[1].max())],
        "logsumexp_max": float(np.abs(got_logsumexp - truth[2]).max()),
        "output_relative": float(np.linalg.norm(got_output - truth[0]) / np.linalg.norm(truth[0])),
        "finite": all(bool(np.isfinite(x).all()) for x in (output, entropy, logsumexp)),
    }


def require(error: dict[str, Any], where: str) -> None:
    """The bounds that the kernel promises."""
    good = error["finite"] and error["entropy_lowest"] >= 0
    good = good and error["entropy_max"] < 1e-4 and error["entropy_relative"] < 1e-5
    if not good or error["output_relative"] > 1e-2:
        raise AssertionError(f"{where}: {error}")


def accuracy() -> list[dict[str, Any]]:
    """Logit scales from 0.09 to 100, both dtypes, several head sizes; the output against cuDNN's too."""
    found = []
    cases = [(4096, 10521, 128, jnp.bfloat16), (1600, 4121, 128, jnp.bfloat16), (576, 1497, 128, jnp.float16)]
    cases += [(300, 700, head_dim, jnp.bfloat16) for head_dim in (48, 64, 96, 112, 192, 256)]
    for q_tokens, kv_length, head_dim, dtype in cases:
        arrays = inputs(q_tokens, 2, q_tokens, 4, head_dim, kv_length + -kv_length % 8, dtype)
        valid = (arrays[0], arrays[1][:, :kv_length], arrays[2][:, :kv_length])
        rows = np.unique(np.linspace(0, q_tokens - 1, 600).astype(int))
        for scale in (0.09, 1.0, 10.0, 30.0, 100.0):
            result = jax.jit(functools.partial(kernel, scale=scale, kv_length=kv_length))(*arrays)
            error = errors(result, arrays, scale, kv_length, rows, head=3)
            where = f"queries {q_tokens}, keys {kv_length}, head_dim {head_dim}, scale {scale}"
            require(error, where)
            error |= {"q_tokens": q_tokens, "kv_length": kv_length, "head_dim": head_dim, "scale": scale}
            if head_dim == 128:
                output = jax.nn.dot_product_attention(*valid, scale=scale, implementation="cudnn")
                cudnn = errors(result._replace(output=output), arrays, scale, kv_length, rows, head=3)
                error["cudnn_output_relative"] = cudnn["output_relative"]
                if error["output_relative"] > 1.02 * cudnn["output_relative"]:
                    raise AssertionError(f"{where}: output worse than cuDNN's: {error}")
            found.append(error | {"dtype": jnp.dtype(dtype).name})
    return found


def check_lengths(lengths: list[int]) -> dict[str, Any]:
    """Worst errors over these key counts, with query counts and head groups that vary along."""
    worst = {"entropy_max": 0.0, "entropy_relative": 0.0, "output_relative": 0.0, "logsumexp_max": 0.0}
    for kv_length in lengths:
        q_tokens, kv_heads = 1 + 37 * kv_length % 400, (1, 2, 4)[kv_length % 3]
        capacity = kv_length + (kv_length % 5) * 8
        query, _, _ = inputs(kv_length, 2, q_tokens, 4, 128, capacity)
        _, key, value = inputs(kv_length + 1, 2, q_tokens, kv_heads, 128, capacity)
        scale = (0.09, 1.0, 10.0, 30.0, 100.0)[kv_length % 5]
        result = jax.jit(functools.partial(kernel, scale=scale, kv_length=kv_length))(query, key, value)
        error = errors(result, (query, key, value), scale, kv_length, np.arange(q_tokens), head=3)
        require(error, f"queries {q_tokens}, keys {kv_length} of {capacity}, {kv_heads} key heads, scale {scale}")
        worst = {name: max(worst[name], error[name]) for name in worst}
    return worst


def lengths() -> dict[str, Any]:
    """Every key count from 1 to 300 and random ones up to 10521, over worker processes: each is a compilation."""
    wanted = [*range(1, 301), *np.random.default_rng(0).integers(301, 10522, 20).tolist()]
    workers = 14

    def work(index: int) -> dict[str, Any]:
        share = map(str, wanted[index::workers])
        command = [sys.executable, "-m", "bench.attention_checks", "--lengths", *share]
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise AssertionError(done.stderr[-2000:])
        return json.loads(done.stdout.splitlines()[-1])

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        worst = list(pool.map(work, range(workers)))
    return {name: max(item[name] for item in worst) for name in worst[0]} | {"lengths": len(wanted)}


VARIED = [  # q_tokens, kv_length, capacity, heads, head_dim
    (1, 1, 8, 16, 128),
    (36, 57, 304, 16, 128),
    (256, 521, 528, 16, 128),
    (576, 1497, 1600, 16, 128),
    (400, 921, 928, 28, 128),
    (1024, 2521, 2528, 16, 128),
    (1600, 4121, 4128, 8, 128),
    (720, 5000, 5000, 4, 64),
    (333, 777, 800, 4, 256),
    (2304, 6425, 6432, 8, 128),
]


def poison() -> dict[str, Any]:
    """Outputs written over donated NaNs must come out whole."""
    for q_tokens, kv_length, capacity, heads, head_dim in VARIED:
        arrays = inputs(1, 2, q_tokens, heads, head_dim, capacity)
        call = functools.partial(kernel, scale=3.0, kv_length=kv_length)
        clean = jax.jit(call)(*arrays)
        poisoned = jax.tree.map(lambda x: jnp.asarray(np.full_like(x, math.nan)), clean)

        def over(spoiled: AttentionResult, *arrays: jax.Array, call: Any = call) -> AttentionResult:
            del spoiled
            return call(*arrays)

        result = jax.jit(over, donate_argnums=0, keep_unused=True)(poisoned, *arrays)
        if not all(jax.tree.leaves(jax.tree.map(np.array_equal, result, clean))):
            raise AssertionError(f"outputs not fully written at {q_tokens} x {kv_length}")
    return {"shapes": len(VARIED)}


def repeat() -> dict[str, Any]:
    """1,000 runs over varied shapes, bit for bit: a race would show as a difference."""
    runs = 100
    for q_tokens, kv_length, capacity, heads, head_dim in VARIED:
        arrays = inputs(2, 2, q_tokens, heads, head_dim, capacity)
        call = jax.jit(functools.partial(kernel, scale=20.0, kv_length=kv_length))
        first = call(*arrays)
        same = jax.jit(lambda a, b: jnp.array([(x == y).all() for x, y in zip(a, b, strict=True)]).all())
        equal = [same(call(*arrays), first) for _ in range(runs)]
        if not all(bool(x) for x in equal):
            raise AssertionError(f"runs differ at {q_tokens} x {kv_length}")
    return {"runs": runs * len(VARIED)}


def vmap() -> dict[str, Any]:
    """A mapped axis gives what separate calls give."""
    arrays = [jnp.stack([x, 2 * x]) for x in inputs(3, 2, 200, 4, 128, 304)]
    call = functools.partial(kernel, scale=3.0, kv_length=301)
    mapped = jax.jit(jax.vmap(call))(*arrays)
    for index in range(2):
        alone = jax.jit(call)(*(x[index] for x in arrays))
        if not all(np.array_equal(a[index], b) for a, b in zip(mapped, alone, strict=True)):
            raise AssertionError("vmap differs from separate calls")
    return {"mapped": 2}


def sanitize() -> dict[str, Any]:
    """A class of every number of compute warpgroups, with ragged tails, as small as they come."""
    for q_tokens, kv_length, heads in ((72, 133, 1), (130, 200, 70), (300, 330, 30)):
        arrays = inputs(4, 1, q_tokens, heads, 128, kv_length + -kv_length % 8)
        jax.block_until_ready(jax.jit(functools.partial(kernel, kv_length=kv_length))(*arrays))
    return {"calls": 3}


CHECKS: dict[str, Callable[[], Any]] = {
    "accuracy": accuracy,
    "lengths": lengths,
    "poison": poison,
    "repeat": repeat,
    "vmap": vmap,
    "sanitize": sanitize,
}


def main() -> None:
    """Runs the checks and writes what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=[*CHECKS][:-1], help="checks to run")
    parser.add_argument("--lengths", nargs="+", type=int, help="key counts of a worker process")
    options = parser.parse_args()
    if options.lengths:
        print(json.dumps(check_lengths(options.lengths)))
        return
    found: dict[str, Any] = {}
    for name in options.only:
        found[name] = CHECKS[name]()
        print(name, "holds", json.dumps(found[name])[:300], flush=True)
    if options.out:
        out = Path(options.out)
        report.write(out.stem, found, out.parent)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main()
