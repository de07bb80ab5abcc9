"""Every architecture of the specification's table can be built; nothing is allocated."""

import jax
import pytest

from toprovar_jax.config import ARCHITECTURES, CheckpointConfig, ConfigError, InfinityConfig, VAEConfig
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.skeleton import abstract_parameters

# docs/spec/infinity.md, section 1.2: billions of parameters, hidden width, head size, pool heads and their size.
TABLE = {
    "infinity_layer12": (0.125, 3072, 96, 16, 48),
    "infinity_layer16": (0.362, 4608, 96, 16, 72),
    "infinity_layer24": (0.941, 6144, 96, 16, 96),
    "infinity_2b": (2.205, 8192, 128, 16, 128),
    "infinity_layer32": (2.257, 8192, 104, 16, 130),
    "infinity_layer40": (4.716, 10752, 112, 16, 168),
    "infinity_8b": (8.376, 14336, 128, 16, 224),
    "infinity_layer48": (8.767, 13312, 120, 16, 210),
    "infinity_20b": (19.95, 18432, 128, 32, 144),
}


@pytest.mark.parametrize("name", TABLE)
def test_row(name):
    billions, mlp_dim, head_dim, pool_heads, pool_size = TABLE[name]
    config = ARCHITECTURES[name]
    assert (config.mlp_dim, config.head_dim, config.num_pool_heads) == (mlp_dim, head_dim, pool_heads)
    params = abstract_parameters(Infinity, config, "bfloat16")
    assert params["text_pool"]["query"].shape == (pool_heads, pool_size)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count / 1e9 == pytest.approx(billions, rel=2e-3)


def test_the_table_is_complete():
    assert set(TABLE) == set(ARCHITECTURES)


def test_bfloat16_stores_blocks_low_and_the_rest_exact():
    params = abstract_parameters(Infinity, ARCHITECTURES["infinity_2b"], "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params["blocks"])} == {"bfloat16"}
    outside = {name: tree for name, tree in params.items() if name != "blocks"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(outside)} == {"float32"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "embed_dim 32 must be divisible by num_heads 3"),
        ({"num_heads": 16}, "head_dim 2 must be divisible by 4 for 2-D RoPE"),
        ({"num_chunks": 3}, "depth 4 must be divisible by num_chunks 3"),
        ({"depth": 0}, "depth must be positive, got 0"),
        ({"rope_mode": 3}, "rope_mode must be 0, 1 or 2, got 3"),
        ({"text_channels": 64}, "embed_dim 32 must be divisible by the 0 heads of the text pool"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    possible = {"depth": 4, "embed_dim": 32, "num_heads": 2, "mlp_dim": 64, "code_dim": 4, "text_channels": 128}
    with pytest.raises(ConfigError, match=message):
        InfinityConfig(**{**possible, **changes})


def test_models_that_do_not_fit_together_are_refused():
    with pytest.raises(
        ConfigError, match="codes have 16 bits but the transformer expects 32: pass the VAE that this"
    ):
        CheckpointConfig(ARCHITECTURES["infinity_2b"], VAEConfig(16))
