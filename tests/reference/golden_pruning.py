"""The golden files of the two pruned forks: their model, their inputs, and every stored result."""

import dataclasses
import json

import numpy as np

from tests.reference.golden import Arrays, load, take
from toprovar_jax.config import InfinityConfig
from toprovar_jax.schedule import Grid, ScaleSchedule


@dataclasses.dataclass(frozen=True)
class PrunedGolden:
    """One fork's file; `expected` holds what has to be computed, by its key."""

    config: InfinityConfig
    state: Arrays
    schedule: ScaleSchedule
    description: dict
    text_features: np.ndarray
    expected: Arrays

    def unpack_bits(self, key: str, scale: int) -> np.ndarray:
        """Bits of a scale, [1, height, width, code_dim]."""
        shape = (1, *self.schedule[scale], self.config.code_dim)
        packed = self.expected[f"{key}.bits_packed"]
        return np.unpackbits(packed)[: np.prod(shape)].reshape(shape)


def load_pruned(name: str) -> PrunedGolden:
    """A fork's golden file."""
    arrays = load(name)
    state = take(arrays, "sd/")
    description = json.loads(bytes(arrays.pop("config_json")))
    # The forks' schedules replaced the 1M list, so positions refer to their own last grid.
    schedule = tuple(Grid(height, width) for _, height, width in description["schedule"])
    config = InfinityConfig(
        depth=description["depth"],
        embed_dim=description["C"],
        num_heads=description["heads"],
        mlp_dim=4 * description["C"],
        code_dim=description["d_vae"],
        num_chunks=description["block_chunks"],
        text_channels=description["Ct5"],
        text_max_length=description["text_maxlen"],
    )
    arrays.pop("in.lens", None)
    return PrunedGolden(config, state, schedule, description, arrays.pop("in.text_features"), arrays)
