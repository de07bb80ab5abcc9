"""A tiny model with everything a checkpoint can hold: transformer, tokenizer, text encoder, random weights."""

import functools

import jax
import numpy as np
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, processors

from toprovar_jax.config import CheckpointConfig, GenerationDefaults, InfinityConfig, T5Config, VAEConfig
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.skeleton import abstract_parameters, random_parameters
from toprovar_jax.models.t5 import T5Encoder
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.schedule import Grid
from toprovar_jax.text import Tokenizer

WORDS = ("a", "red", "blue", "cat", "dog", "and", "left", "of")

CONFIG = CheckpointConfig(
    transformer=InfinityConfig(
        depth=2,
        embed_dim=32,
        num_heads=2,
        mlp_dim=64,
        code_dim=4,
        num_chunks=2,
        text_channels=128,
        text_max_length=32,
    ),
    vae=VAEConfig(code_dim=4, base_channels=8, channel_multipliers=(1, 1), num_residual_blocks=1, num_groups=4),
    text_encoder=T5Config(vocab_size=16, embed_dim=128, num_layers=1, num_heads=2, head_dim=16, mlp_dim=32),
    defaults=GenerationDefaults(guidance_scale=3.0, temperature=0.7, pixels="0.06M"),
)

# Three small grids: enough for growing, square and non-square scales.
SCHEDULE = ((1, 1), (2, 2), (4, 3))
# The fewest scales that every policy works on.
SIX_SCALES = tuple(Grid(*pair) for pair in ((1, 1), (1, 2), (2, 2), (2, 3), (3, 4), (4, 4)))


def tokenizer_json() -> str:
    """A word-level tokenizer that ends every prompt with </s>, as T5's does."""
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = RawTokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer.to_str()


MODELS = {
    "transformer": (Infinity, CONFIG.transformer),
    "vae": (BSQVAE, CONFIG.vae),
    "text_encoder": (T5Encoder, CONFIG.text_encoder),
}


@functools.cache
def parameters(dtype: str = "float32"):
    """Random parameters of all components; those of bfloat16 are the rounded ones of float32."""
    if dtype == "float32":
        return {name: random_parameters(*model, "float32") for name, model in MODELS.items()}
    return {
        name: jax.tree.map(lambda x, y: x.astype(y.dtype), parameters()[name], abstract_parameters(*model, dtype))
        for name, model in MODELS.items()
    }


@functools.cache
def pipeline() -> InfinityPipeline:
    """One pipeline for all tests of a process, so that they share compiled programs."""
    return InfinityPipeline(CONFIG, parameters(), dtype="float32", tokenizer=Tokenizer(tokenizer_json()))


def features(tokens: int, seed: int = 0) -> np.ndarray:
    """Random text features of one text."""
    shape = (tokens, CONFIG.transformer.text_channels)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
