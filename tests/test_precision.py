"""The precision that matrix products ask for."""

import jax
import jax.numpy as jnp
import pytest

from toprovar_jax.precision import matmul_precision


def test_float32_asks_for_the_highest_precision_and_bfloat16_for_the_default():
    assert matmul_precision(jnp.float32) is jax.lax.Precision.HIGHEST
    assert matmul_precision(jnp.bfloat16) is None


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="unknown dtype float16: choose float32 or bfloat16"):
        matmul_precision(jnp.float16)
