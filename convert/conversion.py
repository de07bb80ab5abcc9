"""Published files -> a checkpoint folder."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import tokenizers
from flax import nnx

from convert import architecture, mapping, names
from convert.readers import Weights, read_weights
from toprovar_jax import checkpoint
from toprovar_jax.checkpoint import TOKENIZER_NAME, Component
from toprovar_jax.config import CheckpointConfig, GenerationDefaults, InfinityConfig, T5Config, VAEConfig
from toprovar_jax.errors import InputError
from toprovar_jax.manifest import FileRecord, Manifest
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.skeleton import Parameters, abstract_parameters
from toprovar_jax.models.t5 import T5Encoder

PathLike = str | os.PathLike[str]

ModelConfig = InfinityConfig | VAEConfig | T5Config


class _Model(NamedTuple):
    """What a component is called, its module, and the tensors that its files may have besides."""

    kind: architecture.Kind
    module: Callable[..., nnx.Module]
    unused: names.Unused


_MODELS: dict[Component, _Model] = {
    "transformer": _Model("transformer", Infinity, names.INFINITY_UNUSED),
    "vae": _Model("VAE", BSQVAE, names.VAE_UNUSED),
    "text_encoder": _Model("text encoder", T5Encoder, names.T5_UNUSED),
}


def convert(
    *,
    transformer: PathLike,
    vae: PathLike,
    out: PathLike,
    text_encoder: PathLike | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    rope_mode: Literal[0, 1, 2] = 2,
    level_embedding_per_chunk: bool = False,
    pixels: str = GenerationDefaults.pixels,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Converts published files into a checkpoint folder, which appears complete or not at all.

    Tensors stay in the files' memory maps until they are written, so memory does not grow with the model.

    Args:
      transformer: `.pth` or `.safetensors` file, or folder of shards.
      vae: the tokenizer's file, with either spelling of its names.
      out: folder to make.
      text_encoder: folder of a T5 with gated GELU and its tokenizer.json; without it prompts cannot be encoded.
      dtype: precision policy to store.
      rope_mode: see `InfinityConfig`; every release has 2.
      level_embedding_per_chunk: see `InfinityConfig`; no release has it.
      pixels: default pixel budget, a key of `schedule.PIXEL_BUDGETS`.
      guidance_scale: default guidance; None is the release's: 3 with patchify, else 4.
      temperature: default temperature; None is the release's: 1 with patchify, else 0.5.
      overwrite: replace an existing checkpoint.

    Returns:
      The manifest of the new checkpoint.

    Raises:
      InputError: an input is missing, damaged, of the wrong kind or does not fit, or `out` cannot be written.
    """
    checkpoint.check_target(out, overwrite=overwrite)
    transformer_weights, vae_weights = read_weights(Path(transformer)), read_weights(Path(vae))
    architecture.check_kind(transformer_weights, "transformer", "--transformer")
    architecture.check_kind(vae_weights, "VAE", "--vae")
    sources = [*transformer_weights.files, *vae_weights.files]
    text_weights, tokenizer = None, None
    if text_encoder is not None:
        text_weights, tokenizer, files = _read_text_encoder(Path(text_encoder))
        sources += files
    vae_config = architecture.vae_config(vae_weights)
    # First, because the bits of its codes tell how to read the transformer's tokens.
    parameters: dict[Component, Parameters] = {"vae": map_parameters(vae_weights, "vae", vae_config)}
    transformer_config = architecture.infinity_config(
        transformer_weights, vae_config, rope_mode=rope_mode, level_embedding_per_chunk=level_embedding_per_chunk
    )
    release_guidance, release_temperature = (3.0, 1.0) if transformer_config.patchify else (4.0, 0.5)
    config = CheckpointConfig(
        transformer=transformer_config,
        vae=vae_config,
        text_encoder=None if text_weights is None else architecture.t5_config(text_weights),
        defaults=GenerationDefaults(
            guidance_scale=release_guidance if guidance_scale is None else guidance_scale,
            temperature=release_temperature if temperature is None else temperature,
            pixels=pixels,
        ),
    )
    parameters["transformer"] = map_parameters(transformer_weights, "transformer", config.transformer)
    if text_weights is not None and config.text_encoder is not None:
        parameters["text_encoder"] = map_parameters(text_weights, "text_encoder", config.text_encoder)
    return checkpoint.save(
        out,
        config,
        parameters,
        dtype=dtype,
        tokenizer=tokenizer,
        sources=[FileRecord.of(path) for path in sources],
        overwrite=overwrite,
    )


def normalize(weights: Weights, component: Component) -> Weights:
    """Settles the freedoms that a file has beside its names: a longer table, a tensor with two names.

    Raises:
      InputError: the two names hold different tensors.
    """
    if component == "text_encoder":
        return mapping.with_alias(weights, *names.T5_ALIAS)
    if component == "transformer" and "cfg_uncond" in weights.tensors:
        rows = weights.tensors["cfg_uncond"][: architecture.MAX_TEXT_LENGTH]
        return dataclasses.replace(weights, tensors={**weights.tensors, "cfg_uncond": rows})
    return weights


def official_names(weights: Weights, component: Component, config: ModelConfig) -> names.Names:
    """The tensors that a component of this configuration needs, in the spelling of this file."""
    skeleton = abstract_parameters(_MODELS[component].module, config, "float32")
    shapes = {path: leaf.shape for path, leaf in checkpoint.flatten(skeleton).items()}
    if isinstance(config, InfinityConfig):
        return names.infinity_names(shapes, depth=config.depth, num_chunks=config.num_chunks)
    if isinstance(config, VAEConfig):
        return names.vae_names(shapes, nested=architecture.is_nested(weights))
    return names.t5_names(shapes)


def check_values(weights: Weights, component: Component) -> None:
    """Reads every value of a component's file once.

    Raises:
      InputError: lists the tensors with values that are not finite, or not zero where they have to be.
    """
    mapping.check_values(weights, _MODELS[component].unused)


def map_parameters(weights: Weights, component: Component, config: ModelConfig) -> Parameters:
    """A component's parameters as views of its file.

    Raises:
      InputError: names, shapes or values do not fit the configuration.
    """
    weights = normalize(weights, component)
    model = _MODELS[component]
    expected = official_names(weights, component, config)
    return checkpoint.unflatten(mapping.take(weights, model.kind, expected, model.unused))


def _read_text_encoder(folder: Path) -> tuple[Weights, str, list[Path]]:
    if not folder.is_dir():
        raise InputError(f"--text_encoder {folder} is no folder: pass the folder of flan-t5-xl")
    weights = read_weights(folder)
    architecture.check_kind(weights, "text encoder", "--text_encoder")
    tokenizer = folder / TOKENIZER_NAME
    try:
        text = tokenizer.read_text(encoding="utf-8")
        highest = max(tokenizers.Tokenizer.from_str(text).get_vocab().values())
    except FileNotFoundError:
        raise InputError(f"{folder} has no {TOKENIZER_NAME}: download it into the folder too") from None
    except Exception as error:  # the package raises nothing more specific
        raise InputError(f"{tokenizer} is not a readable tokenizer: download it again") from error
    if highest >= (vocabulary := architecture.t5_config(weights).vocab_size):
        raise InputError(
            f"{tokenizer} has ids up to {highest} but the text encoder knows {vocabulary}: they must match"
        )
    config = folder / "config.json"
    return weights, text, [*weights.files, tokenizer, *([config] if config.is_file() else [])]
