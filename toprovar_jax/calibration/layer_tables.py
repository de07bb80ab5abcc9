"""Candidate tables of layers: which are detail layers, to be pruned, and which are global, to be kept dense."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

# A layer is a detail layer only where this share of the pictures agrees; the others are kept dense.
_AGREEMENT = 0.75


@dataclasses.dataclass(frozen=True)
class LayerTable:
    """Which layers are detail layers.

    Attributes:
      name: how the table was made.
      detail: one entry per layer.
      beta: the beta of Eq. 4 that puts layer scores of 1/2 at the border; None where no scores made the table.
    """

    name: str
    detail: tuple[bool, ...]
    beta: float | None = None

    @property
    def scores(self) -> tuple[float, ...]:
        """R of every layer, near 1 or near 0, as exactly that, so that successive layers share their tokens."""
        return tuple(float(detail) for detail in self.detail)

    def without_first(self) -> "LayerTable":
        """The table with layer 0 dense."""
        return dataclasses.replace(self, detail=(False, *self.detail[1:]))


def every_layer(depth: int) -> LayerTable:
    """All layers are detail layers."""
    return LayerTable("all layers", (True,) * depth)


def middle_layers(depth: int) -> LayerTable:
    """All but the first and the last eighth of the layers, as the paper describes what its scores find."""
    edge = max(1, round(depth / 8))
    return LayerTable("middle layers", tuple(edge <= layer < depth - edge for layer in range(depth)))


def by_singular_ratio(name: str, ratios: Float[np.ndarray, "pictures layers"], num_detail: int) -> LayerTable:
    """The layers of lowest ratio of singular values are detail layers (Eq. 4).

    The border lies between the medians of two layers. A layer that lies on different sides of it in different
    pictures is ambiguous, one without a second singular value undefined: both are kept dense, so that fewer than
    `num_detail` layers may remain.

    Args:
      name: of the table.
      ratios: per picture and layer.
      num_detail: how many layers to take at most, from 1 to all but one.
    """
    medians = np.sort(np.median(ratios, axis=0))
    border = float(medians[num_detail - 1] + medians[num_detail]) / 2
    detail = np.mean(ratios < border, axis=0) >= _AGREEMENT
    beta = math.log(2) / (border - 1) if 1 < border < math.inf else None
    return LayerTable(f"{num_detail} by {name}", tuple(detail.tolist()), beta)


def candidates(singular_ratios: Float[np.ndarray, "pictures layers"]) -> list[LayerTable]:
    """Different tables worth a trial, none of them empty."""
    depth = singular_ratios.shape[1]
    tables = [every_layer(depth), middle_layers(depth)]
    for num_detail in sorted({max(1, depth // 2), max(1, 3 * depth // 4)} - {depth}):
        tables.append(by_singular_ratio("singular ratio", singular_ratios, num_detail))
    distinct = {table.detail: table for table in reversed(tables) if any(table.detail)}
    return list(reversed(distinct.values()))
