"""Official state dicts as parameters of the JAX modules, without the converter, its table or torch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax.config import InfinityConfig, VAEConfig
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.skeleton import abstract_parameters

_INFINITY = {
    "unconditional_features": "cfg_uncond",
    "start_position": "pos_start",
    "level_embedding": "lvl_embed.weight",
    "text_pool": "text_proj_for_sos.ca",
    "text_projection.up": "text_proj_for_ca.0",
    "text_projection.down": "text_proj_for_ca.2",
    "word_embedding": "word_embed",
    "shared_modulation": "shared_ada_lin.1",
    "head_modulation": "head_nm.ada_lin.1",
}
_BLOCK = {
    "modulation": "ada_gss",
    "self_attention": "sa",
    "cross_attention": "ca",
    "cross_norm": "ca_norm",
    "mlp.up": "ffn.fc1",
    "mlp.down": "ffn.fc2",
}
_ATTENTION = {
    "query_key_value": "mat_qkv",
    "key_value": "mat_kv",
    "query": "mat_q",
    "output": "proj",
    "query_bias": "q_bias",
    "value_bias": "v_bias",
    "log_scale": "scale_mul_1H11",
}
_VAE = {
    "middle.0": "mid.block_1",
    "middle.1": "mid.block_2",
    "blocks": "block",
    "shortcut": "nin_shortcut",
    "downsample": "downsample.conv",
    "upsample": "upsample.conv",
}
_LEAF = {"kernel": "weight", "scale": "weight"}


def _replace(path: str, table: Mapping[str, str]) -> str:
    """Renames every run of whole parts that the table names."""
    path = f".{path}."
    for ours, official in table.items():
        path = path.replace(f".{ours}.", f".{official}.")
    return path.strip(".")


def _infinity_name(path: str, config: InfinityConfig) -> str:
    prefix = ""
    if path.startswith("blocks."):
        _, index, path = path.split(".", 2)
        chunk, within = divmod(int(index), config.depth // config.num_chunks)
        prefix = f"blocks.{index}." if config.num_chunks == 1 else f"block_chunks.{chunk}.module.{within}."
        path = _replace(path, _BLOCK)
    else:
        path = _replace(path, _INFINITY)
    return prefix + _replace(path, _ATTENTION | _LEAF)


def _vae_name(path: str) -> str:
    path, leaf = _replace(path, _VAE | _LEAF).rsplit(".", 1)
    return f"{path}.{'norm' if 'norm' in path.rsplit('.', 1)[-1] else 'conv'}.{leaf}"


def _to_ours(value: np.ndarray, leaf: str) -> np.ndarray:
    if leaf != "kernel":
        return value
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _fill(skeleton: Any, state: Mapping[str, np.ndarray], official_name: Callable[[str], str]) -> Any:
    unused = {name for name in state if not name.endswith(("zero_k_bias", "lfq.mask"))}

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        parts = [str(entry.key) for entry in path]
        name = official_name(".".join(parts))
        unused.remove(name)
        value = _to_ours(state[name], parts[-1])
        assert value.size == np.prod(leaf.shape), name
        return jnp.asarray(value.reshape(leaf.shape), leaf.dtype)

    filled = jax.tree_util.tree_map_with_path(fill, skeleton)
    assert not unused, f"no place for {sorted(unused)}"
    return filled


def infinity_parameters(config: InfinityConfig, dtype: str, state: Mapping[str, np.ndarray]) -> Any:
    """Parameters of `Infinity`; every tensor of the state dict has its place."""
    skeleton = abstract_parameters(Infinity, config, dtype)
    return _fill(skeleton, state, lambda path: _infinity_name(path, config))


def vae_parameters(config: VAEConfig, dtype: str, state: Mapping[str, np.ndarray]) -> Any:
    """Parameters of `BSQVAE`; every tensor of the state dict has its place."""
    return _fill(abstract_parameters(BSQVAE, config, dtype), state, _vae_name)
