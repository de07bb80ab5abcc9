"""PyTorch's half of bench.attention: times scaled_dot_product_attention and prints JSON. Not run by hand."""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.attention import BATCH, HEAD_DIM, SCALE

BACKENDS = {
    "torch SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "torch SDPA, FlashAttention-2": SDPBackend.FLASH_ATTENTION,
}
CALLS = 10  # in one graph


def captured(function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of `CALLS` calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Time of one call, by replay."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / CALLS


def main() -> None:
    """Reads the shapes and the number of repeats from the command line."""
    shapes, repeats = json.loads(sys.argv[1]), int(sys.argv[2])
    measured = []
    for model, heads, q_tokens, kv_length in shapes:
        query, key, value = (
            torch.randn(BATCH, tokens, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for tokens in (q_tokens, kv_length, kv_length)
        )
        graphs = {}
        for arm, backend in BACKENDS.items():
            with sdpa_kernel(backend):
                attend = functools.partial(scaled_dot_product_attention, query, key, value, scale=SCALE)
                try:
                    attend()
                except RuntimeError:  # "No available kernel": this backend refuses the shape
                    continue
                graphs[arm] = captured(attend)
        times: dict[str, list[float]] = {arm: [] for arm in graphs}
        for _ in range(repeats):
            for arm, graph in graphs.items():
                times[arm].append(milliseconds(graph))
        measured += [(model, (heads, q_tokens, kv_length), arm, taken) for arm, taken in times.items()]
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
