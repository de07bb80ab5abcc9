"""The matrix products of one compute warpgroup of the Hopper kernel, on tensor cores (wgmma) and interpreted."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 64  # query rows of a compute warpgroup: the height of one wgmma


class TensorCores(NamedTuple):
    """The matrix products of a warpgroup; each method returns when its products are done."""

    block_kv: int

    def score(self, query_ref: Any, keys: Any, slot: Any) -> jax.Array:
        """query · key^T: [64, block_kv]."""

        def multiply(scores_ref: Any) -> jax.Array:
            plgpu.wgmma(scores_ref, query_ref, _transposed(keys.at[slot]))
            return scores_ref[...]

        return pl.run_scoped(multiply, plgpu.ACC((ROWS, self.block_kv), jnp.float32))

    def accumulate(self, output: jax.Array, weights: jax.Array, values: Any, slot: Any) -> jax.Array:
        """Output + weights · value: [64, head_dim]."""

        def multiply(output_ref: Any) -> None:
            plgpu.wgmma(output_ref, weights, values.at[slot])

        return pl.run_state(multiply)(plgpu.ACC.init(output))

    def accumulate_and_score(
        self,
        output: jax.Array,
        weights: jax.Array,
        values: Any,
        value_slot: Any,
        query_ref: Any,
        keys: Any,
        key_slot: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """Both, in flight at the same time."""

        def multiply(refs: Any) -> None:
            output_ref, scores_ref = refs
            plgpu.wgmma(output_ref, weights, values.at[value_slot])
            plgpu.wgmma(scores_ref, query_ref, _transposed(keys.at[key_slot]))

        zeros = self.laid_out(jnp.zeros((ROWS, self.block_kv), jnp.float32), plgpu.Layout.WGMMA)
        return pl.run_state(multiply)((plgpu.ACC.init(output), plgpu.ACC.init(zeros)))

    def laid_out(self, x: jax.Array, layout: Any) -> jax.Array:
        """The array, spread over the warpgroup's registers as the products want it."""
        return plgpu.layout_cast(x, layout)

    def columns(self) -> jax.Array:
        """Column numbers of a tile of logits: [64, block_kv]."""
        return plgpu.broadcasted_iota(jnp.int32, (ROWS, self.block_kv), 1, layout=plgpu.Layout.WGMMA)


class InterpretedTensorCores(NamedTuple):
    """The same products for Pallas' interpreter, which knows neither accumulators in flight nor layouts."""

    block_kv: int

    def score(self, query_ref: Any, keys: Any, slot: Any) -> jax.Array:
        """query · key^T: [64, block_kv]."""
        return _exact_dot(query_ref[...], keys.at[slot][...].T)

    def accumulate(self, output: jax.Array, weights: jax.Array, values: Any, slot: Any) -> jax.Array:
        """Output + weights · value: [64, head_dim]."""
        return output + _exact_dot(weights, values.at[slot][...])

    def accumulate_and_score(
        self,
        output: jax.Array,
        weights: jax.Array,
        values: Any,
        value_slot: Any,
        query_ref: Any,
        keys: Any,
        key_slot: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """Both."""
        return self.accumulate(output, weights, values, value_slot), self.score(query_ref, keys, key_slot)

    def laid_out(self, x: jax.Array, layout: Any) -> jax.Array:
        """The array: the interpreter has no registers."""
        del layout
        return x

    def columns(self) -> jax.Array:
        """Column numbers of a tile of logits: [64, block_kv]."""
        return lax.broadcasted_iota(jnp.int32, (ROWS, self.block_kv), 1)


def _exact_dot(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.dot(left.astype(jnp.float32), right.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def _transposed(ref: Any) -> Any:
    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))  # jax 0.10
