"""A small model as the published files hold it, and the paths from its tensors to our parameters."""

from pathlib import Path

import numpy as np

from bench import synthetic_checkpoint
from convert import architecture, conversion
from convert.readers import Weights
from tests.reference.parameters import infinity_parameters, vae_parameters
from toprovar_jax import checkpoint
from toprovar_jax.config import CheckpointConfig, InfinityConfig, T5Config, VAEConfig

CONFIG = CheckpointConfig(
    transformer=InfinityConfig(
        depth=4,
        embed_dim=32,
        num_heads=4,
        mlp_dim=64,
        code_dim=6,
        num_chunks=2,
        text_channels=128,
        text_max_length=9,
    ),
    vae=VAEConfig(code_dim=6, base_channels=32, channel_multipliers=(1, 2, 2)),
    text_encoder=T5Config(
        vocab_size=synthetic_checkpoint.VOCABULARY,
        embed_dim=128,
        num_layers=2,
        num_heads=2,
        head_dim=24,
        mlp_dim=40,
        num_buckets=16,
        max_distance=64,
    ),
)
TRANSFORMER = synthetic_checkpoint.transformer_tensors(CONFIG.transformer)
VAE = synthetic_checkpoint.vae_tensors(CONFIG.vae)
TEXT_ENCODER = synthetic_checkpoint.text_encoder_tensors(CONFIG.text_encoder)


def weights(tensors, path):
    return Weights(Path(path), (), tensors)


def map_infinity(found):
    """Parameters by path, with the configuration that the file tells."""
    transformer = architecture.infinity_config(found, CONFIG.vae, rope_mode=2, level_embedding_per_chunk=False)
    return checkpoint.flatten(conversion.map_parameters(found, "transformer", transformer))


def map_vae(found):
    return checkpoint.flatten(conversion.map_parameters(found, "vae", architecture.vae_config(found)))


def map_text_encoder(found):
    return checkpoint.flatten(conversion.map_parameters(found, "text_encoder", architecture.t5_config(found)))


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(np.asarray(actual[path]), np.asarray(value), err_msg=path)


EXPECTED_TRANSFORMER = checkpoint.flatten(
    infinity_parameters(CONFIG.transformer, "float32", {name: x.numpy() for name, x in TRANSFORMER.items()})
)
EXPECTED_VAE = checkpoint.flatten(
    vae_parameters(CONFIG.vae, "float32", {name: x.numpy() for name, x in VAE.items()})
)


def flat_spelling(tensors):
    """Names without the level that the published modules add."""
    flat = {}
    for name, x in tensors.items():
        head, kind = name.rsplit(".", 1)
        flat[f"{head.removesuffix('.conv').removesuffix('.norm')}.{kind}"] = x
    return flat
