"""The precision policy of every model, and the one switch it needs.

A model is built for one `dtype`, float32, bfloat16 or float8_e4m3fn, and never mixes policies:

* Stored parameters. The skeleton that `flax.nnx.eval_shape` gives is the authority; conversion and loading cast
  to it. Float32 models store float32 throughout. In bfloat16, Infinity stores the parameters of its blocks in
  bfloat16 and everything outside the blocks in float32; the VAE and T5 store the parameters of convolutions,
  linear layers and embeddings in bfloat16 and those of norms in float32.
* Matrix products and convolutions take operands of `dtype`. For float32 they ask for the highest precision: an
  accelerator would otherwise round the operands to TF32 or bfloat16, and bits would flip. For bfloat16 the default
  is already exact in its products.
* float8_e4m3fn is bfloat16 but for the four large products of Infinity's blocks, whose weights and inputs are
  float8 (`models/linear.py`). Nothing is stored in it: weights become float8 when they are loaded.
* Statistics (means, variances, norms, softmax) are float32 for every `dtype`, as are logits, codes, the code map,
  resizes and images.

Source: docs/spec/infinity.md, section 7 (the published GPU path, from which the bfloat16 policy follows).
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)


def activation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """What a model of this policy computes in where no layer says otherwise: bfloat16 for float8, else `dtype`."""
    return jnp.dtype(jnp.bfloat16) if jnp.dtype(dtype) == FLOAT8 else jnp.dtype(dtype)


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """The `precision` argument of a matrix product or convolution whose operands are of `dtype`.

    Returns:
      The highest precision for float32, None (the default) for bfloat16.

    Raises:
      ValueError: operands are never of this dtype.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float32:
        return jax.lax.Precision.HIGHEST
    if dtype == jnp.bfloat16:
        return None
    raise ValueError(f"no matrix product takes {dtype.name} operands: choose float32 or bfloat16")
