"""Pipelines of a release's size with random weights: latency does not depend on what the weights say."""

import json
from pathlib import Path

from toprovar_jax.config import (
    ARCHITECTURES,
    VAE_STRIDE_8,
    VAE_STRIDE_16,
    CheckpointConfig,
    GenerationDefaults,
    T5Config,
    VAEConfig,
)
from toprovar_jax.errors import InputError
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.skeleton import random_parameters
from toprovar_jax.models.t5 import T5Encoder
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.pruning.profile import Profile
from toprovar_jax.text import Tokenizer


def full_size_config(model: str, text_encoder: T5Config | None = None) -> CheckpointConfig:
    """A release-like checkpoint configuration of an architecture.

    Args:
      model: a name of `ARCHITECTURES`.
      text_encoder: the text encoder, or None for a checkpoint without.
    """
    transformer = ARCHITECTURES[model]
    levels = VAE_STRIDE_8 if transformer.patchify else VAE_STRIDE_16
    vae = VAEConfig(code_dim=transformer.code_dim, channel_multipliers=levels)
    defaults = GenerationDefaults(guidance_scale=4.0, temperature=0.5)
    return CheckpointConfig(transformer, vae, text_encoder, defaults)


def aggressive_profile(model: str) -> Profile:
    """A ToProVAR profile that is to save as much time as the paper reports, for models of random weights.

    The paper makes the loop of 2B 3.4 times and that of 8B 2.7 times as fast. Here the inner layers of the last
    five scales keep a quarter of their tokens in 2B and three eighths in others; the last two scales of 2B, the
    last one of others are dropped. The start is known beforehand, and no image is looked at to find it: a focused
    share is never below 0.
    """
    depth, of_2b = ARCHITECTURES[model].depth, model == "infinity_2b"
    dense, pruned = depth // 8, 0.75 if of_2b else 0.625
    return Profile(
        layer_scores=(0.0,) * dense + (1.0,) * (depth - 2 * dense) + (0.0,) * dense,
        tau=0.0,
        crossing="above",
        prunable_scales=5,
        usual_scales=5,
        dropped_scales=2 if of_2b else 1,
        alpha_min=pruned,
        alpha_max=pruned,
    )


def word_tokenizer() -> Tokenizer:
    """A tokenizer that makes one (unknown) token of every word and ends prompts as T5's does."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    return Tokenizer(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": {"type": "Whitespace"},
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [
                        {"Sequence": {"id": "A", "type_id": 0}},
                        {"SpecialToken": {"id": "</s>", "type_id": 0}},
                    ],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                    "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
                },
                "decoder": None,
                "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
            }
        )
    )


def load_pipeline(model: str, dtype: str) -> InfinityPipeline:
    """A pipeline with text encoder: random weights on the device, or those of a checkpoint.

    Args:
      model: a name of `ARCHITECTURES`, or a checkpoint's folder.
      dtype: precision policy to load in.

    Raises:
      InputError: it is neither.
    """
    if model in ARCHITECTURES:
        config = full_size_config(model, T5Config())
        assert config.text_encoder is not None
        params = {
            "transformer": random_parameters(Infinity, config.transformer, dtype),
            "vae": random_parameters(BSQVAE, config.vae, dtype),
            "text_encoder": random_parameters(T5Encoder, config.text_encoder, dtype),
        }
        return InfinityPipeline(config, params, dtype=dtype, tokenizer=word_tokenizer())
    if not Path(model).is_dir():
        raise InputError(
            f"unknown model {model!r}: pass a checkpoint's folder or one of {', '.join(ARCHITECTURES)}"
        )
    return InfinityPipeline.from_pretrained(model, dtype)
