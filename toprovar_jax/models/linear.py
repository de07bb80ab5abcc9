"""Linear layers: as flax has them, or multiplying in float8.

A float8 layer keeps its weights in float8_e4m3fn, three bits of mantissa, and rounds its inputs to it. On GPUs
that multiply float8 (NVIDIA's from compute capability 8.9 on) XLA hands such a product to cuBLAS, which may add up
with fewer bits than float32 has; elsewhere the rounded numbers are multiplied in bfloat16, which saves no time.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, PyTree

from toprovar_jax.precision import FLOAT8, matmul_precision

LARGEST = float(jnp.finfo(FLOAT8).max)


def linear(
    in_features: int,
    out_features: int,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike | None = None,
    use_bias: bool = True,
    rngs: nnx.Rngs,
) -> "nnx.Linear | Float8Linear":
    """A linear layer; its parameters are of `dtype` where `param_dtype` is None, and its own choice in float8."""
    if jnp.dtype(dtype) == FLOAT8:
        assert param_dtype is None, "a float8 layer chooses the dtypes of its parameters"
        return Float8Linear(in_features, out_features, use_bias=use_bias, rngs=rngs)
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=dtype if param_dtype is None else param_dtype,
        precision=matmul_precision(dtype),
        rngs=rngs,
    )


class Float8Linear(nnx.Module):
    """A linear layer that multiplies in float8 and returns bfloat16.

    Inputs are rounded as they are: to four significant bits from 2^-6 to 448, to multiples of 2^-9 below; what is
    larger becomes 448. Weights are smaller than that, so they have a scale.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      use_bias: whether a bfloat16 bias is added.
      rngs: source of the random initial weights.
    """

    def __init__(self, in_features: int, out_features: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        initial = nnx.initializers.lecun_normal()(rngs.params(), (in_features, out_features), jnp.float32)
        kernel, scale = quantize(initial)
        self.kernel = nnx.Param(kernel)
        self.kernel_scale = nnx.Param(scale)
        self.bias = nnx.Param(jnp.zeros(out_features, jnp.bfloat16)) if use_bias else None

    def __call__(self, x: Float[Array, "*batch in_features"]) -> Float[Array, "*batch out_features"]:
        """[..., in_features] of any float dtype to bfloat16 [..., out_features]."""
        # float8_e4m3fn has no infinity: whatever is too large for it would become NaN.
        rounded = jnp.clip(x, -LARGEST, LARGEST).astype(FLOAT8)
        # XLA for GPUs recognises float8 products in this form, scale and bias included.
        kernel = self.kernel[...].astype(jnp.bfloat16) * self.kernel_scale[...].astype(jnp.bfloat16)
        output = jnp.einsum("...i,oi->...o", rounded.astype(jnp.bfloat16), kernel)
        return output if self.bias is None else output + self.bias[...]


@jax.jit
def quantize(
    kernel: Float[Array, "in_features out_features"],
) -> tuple[Float[Array, "out_features in_features"], Float[Array, ""]]:
    """A kernel in float8_e4m3fn, and the float32 power of two to multiply it with.

    It comes transposed: cuBLAS multiplies float8 operands only where the summed axis is the last one of both.
    """
    _, exponent = jnp.frexp(jnp.max(jnp.abs(kernel.astype(jnp.float32))) / LARGEST)
    scale = jnp.ldexp(jnp.float32(1), exponent)
    return (kernel.T.astype(jnp.float32) / scale).astype(FLOAT8), scale


def quantize_in_place(parameters: PyTree, target: PyTree) -> None:
    """Puts kernels in float8 in the place of a model's own, one after the other: memory for two models is much.

    Args:
      parameters: nested dictionaries of bfloat16 or float32 arrays, which are changed.
      target: the skeleton to arrive at: the same dictionaries, those of float8 layers with a "kernel_scale".
    """
    if "kernel_scale" in target:
        parameters["kernel"], parameters["kernel_scale"] = quantize(parameters["kernel"])
        return
    for key, value in target.items():
        if isinstance(value, dict):
            quantize_in_place(parameters[key], value)
