"""Writes a tiny model with random weights in the published file formats, to try conversion and generation on.

    python -m bench.synthetic_checkpoint --out FOLDER [--preset tiny|tiny_patchify] [--overwrite]

The folder gets transformer.pth, vae.pth and text_encoder/ (model.safetensors, config.json, tokenizer.json), with
the names and layouts of the published files. Images from it are colourful noise.
"""

import json
import math
import string
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import tokenizers
import torch
from absl import flags
from torch import Tensor

from convert.reference import bsq_vae, infinity
from toprovar_jax import atomic_folder, command_line
from toprovar_jax.config import CheckpointConfig, GenerationDefaults, InfinityConfig, T5Config, VAEConfig

_WORDS = (
    "a an and at blue cat cube dog green in large left mountain of on over red right small sun synthetic the under"
)
_PUNCTUATION = string.ascii_letters + string.digits + string.punctuation
_PIECES = ["<pad>", "</s>", "<unk>", "▁", *_PUNCTUATION, *(f"▁{word}" for word in _WORDS.split())]

VOCABULARY = 128 * math.ceil(len(_PIECES) / 128)  # more rows than pieces, as published files have
_TEXT_ENCODER = T5Config(
    vocab_size=VOCABULARY,
    embed_dim=256,
    num_layers=2,
    num_heads=4,
    head_dim=32,
    mlp_dim=512,
)


def _transformer(code_dim: int, patchify: bool) -> InfinityConfig:
    return InfinityConfig(
        depth=4,
        embed_dim=128,
        num_heads=2,
        mlp_dim=512,
        code_dim=code_dim,
        patchify=patchify,
        num_chunks=2,
        text_channels=_TEXT_ENCODER.embed_dim,
    )


PRESETS: dict[str, CheckpointConfig] = {
    "tiny": CheckpointConfig(
        transformer=_transformer(16, patchify=False),
        vae=VAEConfig(code_dim=16, base_channels=32, channel_multipliers=(1, 1, 2, 2, 2)),
        text_encoder=_TEXT_ENCODER,
    ),
    "tiny_patchify": CheckpointConfig(
        transformer=_transformer(8, patchify=True),
        vae=VAEConfig(code_dim=8, base_channels=32, channel_multipliers=(1, 1, 2, 2)),
        text_encoder=_TEXT_ENCODER,
        defaults=GenerationDefaults(guidance_scale=3.0, temperature=1.0),
    ),
}


def randomize(tensors: Mapping[str, Tensor], seed: int = 0) -> None:
    """Fills a model's tensors in place with values of trained models' size; buffers keep what they are."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if name.endswith("zero_k_bias") or not tensor.is_floating_point():
            continue
        if name.endswith("scale_mul_1H11"):
            tensor.fill_(math.log(4))
        elif tensor.ndim == 1:
            is_scale = name.endswith("norm.weight") or (".norm" in name and name.endswith("weight"))
            tensor.normal_(mean=float(is_scale), std=0.1, generator=generator)
        elif name in ("cfg_uncond", "pos_start", "lvl_embed.weight", "shared.weight") or name.endswith("ada_gss"):
            tensor.normal_(std=0.5, generator=generator)
        else:
            fan_in = math.prod(tensor.shape[1:])
            tensor.normal_(std=fan_in**-0.5, generator=generator)


def transformer_tensors(config: InfinityConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a transformer under the published names."""
    tensors = dict(infinity.Infinity(config).state_dict())
    randomize(tensors, seed)
    return tensors


def vae_tensors(config: VAEConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a VAE under the published names."""
    tensors = dict(bsq_vae.BSQVAE(config).state_dict())
    randomize(tensors, seed)
    return tensors


def text_encoder_tensors(config: T5Config, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a T5 under the published names, with some of the unused ones."""
    inner = config.num_heads * config.head_dim
    width, hidden = config.embed_dim, config.mlp_dim
    shapes: dict[str, tuple[int, ...]] = {
        "shared.weight": (config.vocab_size, width),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
            config.num_buckets,
            config.num_heads,
        ),
        "encoder.final_layer_norm.weight": (width,),
        "decoder.final_layer_norm.weight": (width,),
        "lm_head.weight": (config.vocab_size, width),
    }
    for i in range(config.num_layers):
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        for projection in "qkv":
            shapes[f"{attention}.SelfAttention.{projection}.weight"] = (inner, width)
        shapes[f"{attention}.SelfAttention.o.weight"] = (width, inner)
        shapes[f"{attention}.layer_norm.weight"] = (width,)
        shapes[f"{mlp}.DenseReluDense.wi_0.weight"] = (hidden, width)
        shapes[f"{mlp}.DenseReluDense.wi_1.weight"] = (hidden, width)
        shapes[f"{mlp}.DenseReluDense.wo.weight"] = (width, hidden)
        shapes[f"{mlp}.layer_norm.weight"] = (width,)
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    randomize(tensors, seed)
    return tensors


def tokenizer() -> tokenizers.Tokenizer:
    """A small tokenizer of T5's kind: pieces with a mark for word starts, end-of-sequence token appended."""
    scores = [(piece, 0.0 if len(piece) > 1 else -10.0) for piece in _PIECES]
    result = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=_PIECES.index("<unk>")))
    result.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    result.decoder = tokenizers.decoders.Metaspace()
    result.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", _PIECES.index("</s>"))]
    )
    result.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return result


def write(folder: Path, config: CheckpointConfig, *, overwrite: bool = False) -> None:
    """Writes the files of a model with a text encoder.

    Raises:
      InputError: the folder exists and `overwrite` is not set, or cannot be written.
    """
    text = config.text_encoder
    if text is None:
        raise ValueError("the configuration has no text encoder")
    with atomic_folder.write_folder(folder, marker="transformer.pth", overwrite=overwrite) as partial:
        torch.save(transformer_tensors(config.transformer, seed=0), partial / "transformer.pth")
        torch.save({"vae": vae_tensors(config.vae, seed=1)}, partial / "vae.pth")
        (partial / "text_encoder").mkdir()
        safetensors.torch.save_file(
            text_encoder_tensors(text, seed=2), partial / "text_encoder" / "model.safetensors"
        )
        tokenizer().save(str(partial / "text_encoder" / "tokenizer.json"))
        settings = {
            "model_type": "t5",
            "d_ff": text.mlp_dim,
            "d_kv": text.head_dim,
            "d_model": text.embed_dim,
            "feed_forward_proj": "gated-gelu",
            "layer_norm_epsilon": text.norm_epsilon,
            "num_heads": text.num_heads,
            "num_layers": text.num_layers,
            "relative_attention_max_distance": text.max_distance,
            "relative_attention_num_buckets": text.num_buckets,
            "vocab_size": text.vocab_size,
        }
        (partial / "text_encoder" / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _main() -> None:
    write(Path(flags.FLAGS.out), PRESETS[flags.FLAGS.preset], overwrite=flags.FLAGS.overwrite)
    print(f"wrote {flags.FLAGS.out}")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder to make.", required=True)
    flags.DEFINE_enum("preset", "tiny", list(PRESETS), "Which model.")
    flags.DEFINE_bool("overwrite", False, "Replace a folder that this command wrote before.")
    command_line.run(_main)
