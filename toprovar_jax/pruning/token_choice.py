"""Tokens of a scale that were chosen to run: takes them out, and puts what became of them back among the others.

Both directions read rows by index. A GPU does that at full bandwidth and in one pass with whatever uses the rows,
which writing to computed places is not.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from toprovar_jax.pruning.plan import TOKEN_ALIGNMENT


@dataclasses.dataclass(frozen=True)
class TokenChoice:
    """Chosen tokens, in every row for itself; made while a step is traced.

    Attributes:
      indices: the chosen tokens in the order in which they run, then others that only fill up to a multiple of 8.
      ranks: by token its place in that order, `count` or more where it is not chosen.
      count: how many are chosen.
    """

    indices: Int[Array, "rows aligned_count"]
    ranks: Int[Array, "rows tokens"]
    count: int

    @classmethod
    def from_indices(cls, kept: Int[Array, "rows count"], num_tokens: int) -> "TokenChoice":
        """A choice by the tokens' indices, which differ."""
        rows, count = kept.shape
        indices = jnp.pad(kept, ((0, 0), (0, _fill(count))))
        nowhere = jnp.full((rows, num_tokens), count)
        ranks = nowhere.at[jnp.arange(rows)[:, None], kept].set(jnp.arange(count), unique_indices=True)
        return cls(indices, ranks, count)

    @classmethod
    def furthest_from_mean(cls, x: Float[Array, "rows tokens channels"], count: int) -> "TokenChoice":
        """FastVAR's choice: tokens by falling squared distance from the mean token of their row.

        Source: docs/spec/fastvar_skipvar.md, section A.1; equal distances go by index.
        """
        distance = jnp.sum(jnp.square(x - jnp.mean(x, axis=1, keepdims=True)), axis=-1)
        # Every token is compared with every other one, which takes a GPU a third of the time of sorting so few.
        index = jnp.arange(distance.shape[1])
        own, other = distance[:, :, None], distance[:, None, :]
        before = (other > own) | ((other == own) & (index < index[:, None]))
        ranks = jnp.sum(before, axis=-1)
        here = ranks[:, None] == jnp.arange(count + _fill(count))[:, None]
        return cls(jnp.max(jnp.where(here, index, 0), axis=-1), ranks, count)

    @property
    def kept(self) -> Int[Array, "rows count"]:
        """The chosen tokens alone."""
        return self.indices[:, : self.count]

    @property
    def padding(self) -> int:
        """How many tokens only fill up."""
        return _fill(self.count)

    def take(self, x: Shaped[Array, "rows tokens *channels"]) -> Shaped[Array, "rows aligned_count *channels"]:
        """The rows of `x` that belong to the tokens that run."""
        return _take(x, self.indices)

    def take_shared(self, x: Shaped[Array, "tokens channels"]) -> Shaped[Array, "rows aligned_count channels"]:
        """The same of what all rows have in common."""
        return x.at[self.indices].get(mode="promise_in_bounds")

    def put_back(
        self,
        values: Shaped[Array, "rows aligned_count *channels"],
        others: Shaped[Array, "rows tokens *channels"] | float,
    ) -> Shaped[Array, "rows tokens *channels"]:
        """`values` at the chosen tokens, and `others` at the others."""
        chosen = _take(values, jnp.minimum(self.ranks, self.count - 1))
        return jnp.where(_append_axes(self.ranks < self.count, values.ndim), chosen, others)


def _fill(count: int) -> int:
    return -count % TOKEN_ALIGNMENT


def _append_axes(x: Array, ndim: int) -> Array:
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def _take(x: Array, indices: Array) -> Array:
    # Indices come from comparing and counting, so they are never out of bounds, and checking costs a kernel.
    return jnp.take_along_axis(x, _append_axes(indices, x.ndim), axis=1, mode="promise_in_bounds")
