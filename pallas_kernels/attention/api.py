"""The one entry point of attention with entropy: checks the call and picks an implementation."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.attention import cudnn, reference

Implementation = Literal["mosaic_gpu", "cudnn", "reference"]

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


class AttentionResult(NamedTuple):
    """What one call of `flash_attention_entropy` returns; a pytree.

    Attributes:
      output: [batch, q_tokens, heads, head_dim], in the query's dtype.
      entropy: [batch, heads, q_tokens], float32, in nats, 0 to the logarithm of the number of keys attended to;
        None where it was not asked for.
      logsumexp: [batch, heads, q_tokens], float32, of the scaled logits.
    """

    output: jax.Array
    entropy: jax.Array | None
    logsumexp: jax.Array


def flash_attention_entropy(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    more_key: jax.Array | None = None,
    more_value: jax.Array | None = None,
    *,
    scale: float | None = None,
    kv_length: int | None = None,
    more_length: int | None = None,
    return_entropy: bool = True,
    implementation: Implementation | None = None,
) -> AttentionResult:
    """Softmax attention without a mask, and the Shannon entropy of every query's weights, in one pass.

    The entropy of a query is -sum_j a_j ln a_j over its weights a = softmax(scale q k^T); the matrix of weights is
    never formed (pallas_kernels/README.md derives the recurrences). Forward only: differentiating raises.

    The keys may lie in two pairs of arrays, such as a cache and the new tokens that it has no room for: a query
    attends to the first `kv_length` tokens of `key` and `value` and the first `more_length` of `more_key` and
    `more_value`. "mosaic_gpu" reads both where they are; the others put them together first.

    Args:
      query: [batch, q_tokens, heads, head_dim], float32, bfloat16 or float16.
      key: [batch, capacity, kv_heads, head_dim], the query's dtype; kv_heads divides heads, and query head h
        attends to key head h // (heads // kv_heads).
      value: [batch, capacity, kv_heads, head_dim], the query's dtype.
      more_key: [batch, more_capacity, kv_heads, head_dim], the query's dtype.
      more_value: [batch, more_capacity, kv_heads, head_dim], the query's dtype; given if `more_key` is.
      scale: factor of the logits, finite and not negative; 1/sqrt(head_dim) by default.
      kv_length: valid prefix of `key` and `value`, which may be a cache with room to spare; a Python int, the
        whole capacity by default.
      more_length: valid prefix of `more_key` and `more_value`, likewise.
      return_entropy: without it `entropy` is None and its work is not done.
      implementation: None takes the best that supports the call on the device that it is traced for: that of the
        ambient mesh, else jax's default device. A name demands one:
        "mosaic_gpu": one kernel, on Hopper GPUs, in bfloat16 and float16. Query tokens and capacities should
          be multiples of 8: others cost a padded copy.
        "cudnn": cuDNN's kernel, on NVIDIA GPUs, in bfloat16 and float16. Its entropy comes from a second call and
          the identity H = logsumexp - scale q·(a K), whose error grows with the logits:
          None takes it for calls without entropy only.
        "reference": plain jax.numpy, anywhere.

    Raises:
      TypeError: a dtype that is not supported or differs between the inputs; a length is no Python int; the call
        is differentiated.
      ValueError: shapes that do not fit each other; one of `more_key` and `more_value` without the other, or a
        `more_length` without them; scale or a length out of range; an unknown implementation, or one that cannot
        run this call or runs on no such device.
    """
    _check_arrays(query, key=key, value=value)
    kv_length = _checked_length("kv_length", kv_length, "key and value", key.shape[1])
    more: tuple[jax.Array, ...] = ()
    if more_key is not None and more_value is not None:
        more = (more_key, more_value)
        _check_arrays(query, more_key=more_key, more_value=more_value)
        if more_key.shape[2] != key.shape[2]:
            raise ValueError(f"key has {key.shape[2]} heads but more_key has {more_key.shape[2]}")
        more_length = _checked_length("more_length", more_length, "more_key and more_value", more_key.shape[1])
    elif more_key is not None or more_value is not None or more_length is not None:
        raise ValueError("more_key and more_value go together, and more_length with them: give both or none")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale must be finite and not negative, got {scale}")
    name = _chosen(implementation, query, return_entropy)
    lengths = {"kv_length": kv_length, "more_length": more_length or 0}
    return _run(query, key, value, *more, name=name, scale=scale, **lengths, return_entropy=return_entropy)


# Jitted, so that a model of many layers lowers each kernel once: lowering one takes a quarter of a second.
@functools.partial(jax.jit, static_argnames=("name", "scale", "kv_length", "more_length", "return_entropy"))
def _run(
    *arrays: jax.Array, name: str, scale: float, kv_length: int, more_length: int, return_entropy: bool
) -> AttentionResult:
    options: dict[str, Any] = {"scale": scale, "return_entropy": return_entropy}
    if name == "mosaic_gpu":
        options |= {"kv_length": kv_length, "more_length": more_length}
    else:
        options |= {"kv_length": kv_length + more_length}
        if more_length:
            query, key, value, more_key, more_value = arrays
            pairs = ((key, more_key), (value, more_value))
            arrays = (query, *(jnp.concatenate([x[:, :kv_length], y], axis=1) for x, y in pairs))
    return AttentionResult(*_forward_only(functools.partial(_attention(name), **options))(*arrays))


def _chosen(implementation: str | None, query: jax.Array, return_entropy: bool) -> str:
    reasons = {"mosaic_gpu": _not_for_mosaic_gpu(query), "cudnn": _not_for_cudnn(query), "reference": None}
    if implementation is None:
        if reasons["mosaic_gpu"] is None:
            return "mosaic_gpu"
        return "cudnn" if reasons["cudnn"] is None and not return_entropy else "reference"
    if implementation not in reasons:
        names = ", ".join(repr(name) for name in get_args(Implementation))
        raise ValueError(f"unknown implementation {implementation!r}: choose one of {names}, or None for the best")
    if reason := reasons[implementation]:
        raise ValueError(
            f"implementation {implementation!r} cannot run this call: {reason}; "
            "implementation=None takes one that can"
        )
    return implementation


def _attention(name: str) -> Callable[..., tuple[jax.Array, jax.Array | None, jax.Array]]:
    if name == "mosaic_gpu":
        # Pallas' GPU dialects take half a second to import: only where they are used.
        from pallas_kernels.attention import mosaic_gpu

        return mosaic_gpu.attention
    return cudnn.attention if name == "cudnn" else reference.attention


def _not_for_mosaic_gpu(query: jax.Array) -> str | None:
    head_dim, kind = query.shape[-1], _device().device_kind
    if query.dtype == jnp.float32:
        return "it multiplies bfloat16 and float16 only, not float32"
    if head_dim % 16 or head_dim > 256:
        return f"it needs a head_dim that is a multiple of 16 up to 256, not {head_dim}"
    if not re.search(r"\b(H100|H200|H800|H20|GH200)\b", kind):
        return f"it needs a Hopper GPU (H100, H200, GH200), and the device is {kind}"
    return None


def _not_for_cudnn(query: jax.Array) -> str | None:
    head_dim, device = query.shape[-1], _device()
    if query.dtype == jnp.float32:
        return "it multiplies bfloat16 and float16 only, not float32"
    if head_dim % 8 or head_dim > 128:
        return f"it needs a head_dim that is a multiple of 8 up to 128, not {head_dim}"
    # An abstract device does not know its compute capability: take it for one that serves.
    if not device.device_kind.startswith("NVIDIA") or float(getattr(device, "compute_capability", 8.0)) < 8.0:
        return f"it needs an NVIDIA GPU from Ampere on, and the device is {device.device_kind}"
    return None


def _device() -> Any:
    """The device that the call is traced for, real or abstract."""
    if (abstract := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        return abstract
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


def _check_arrays(query: jax.Array, **pair: jax.Array) -> None:
    """Raises unless a pair of keys and values, given by the caller's names of them, fits the query."""
    for name, array in {"query": query, **pair}.items():
        if array.ndim != 4:
            raise ValueError(f"{name} must be [batch, tokens, heads, head_dim], got shape {array.shape}")
        if array.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {array.dtype}: cast it first")
        if array.dtype != query.dtype:
            raise TypeError(f"query is {query.dtype} but {name} is {array.dtype}: cast them to one dtype")
        if 0 in array.shape:
            raise ValueError(f"{name} is empty: its shape is {array.shape}")
    (key_name, key), (value_name, value) = pair.items()
    if key.shape != value.shape:
        raise ValueError(f"{key_name} and {value_name} must have one shape, got {key.shape} and {value.shape}")
    batch, _, heads, head_dim = query.shape
    key_batch, _, kv_heads, key_head_dim = key.shape
    if batch != key_batch:
        raise ValueError(f"query has batch {batch} but {key_name} has batch {key_batch}")
    if head_dim != key_head_dim:
        raise ValueError(f"query has head_dim {head_dim} but {key_name} has head_dim {key_head_dim}")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key heads: use a divisor of {heads}")


def _checked_length(name: str, length: int | None, arrays: str, capacity: int) -> int:
    if length is None:
        return capacity
    if isinstance(length, bool) or not hasattr(length, "__index__") or isinstance(length, jax.core.Tracer):
        raise TypeError(
            f"{name} must be a Python int, got {type(length).__name__}: it decides what is compiled, "
            "so pass it as a static argument of jit"
        )
    length = int(length)
    if not 1 <= length <= capacity:
        raise ValueError(f"{name} {length} must lie between 1 and the capacity {capacity} of {arrays}")
    return length


def _forward_only(function):  # type: ignore[no-untyped-def]
    """The function, with one clear error in place of a derivative."""
    wrapped = jax.custom_jvp(function)

    @wrapped.defjvp
    def _jvp(primals, tangents):  # type: ignore[no-untyped-def]
        del primals, tangents
        raise TypeError(
            "flash_attention_entropy is forward only and has no gradient: wrap its inputs in "
            "jax.lax.stop_gradient, or train with jax.nn.dot_product_attention"
        )

    return wrapped
