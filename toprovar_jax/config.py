"""Frozen configurations of the three models and of a checkpoint; the released architectures by name.

Everything a module needs to build itself is here, and nothing else decides shapes: a configuration is
hashable, travels in a checkpoint's manifest as JSON and serves as a static argument of compiled functions.
Source: docs/spec/infinity.md, sections 1 and 6 (the published Infinity code).
"""

import dataclasses
import math
from typing import Any

from toprovar_jax.errors import InputError


class ConfigError(InputError):
    """A configuration that no model can be built from; the message names the field and the remedy."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True)
class InfinityConfig:
    """Shapes and switches of the Infinity transformer (docs/spec/infinity.md, section 1.2).

    Attributes:
      depth: number of transformer blocks.
      embed_dim: width of the residual stream.
      num_heads: attention heads of every block; the head size must be divisible by 4 (2-D RoPE).
      mlp_dim: hidden width of the feed-forward layer.
      code_dim: channels (bits) of one tokenizer code.
      patchify: whether one token covers 2x2 tokenizer codes (the 8B release).
      num_chunks: groups of blocks in the published file; also where the level embedding is added again when
        `level_embedding_per_chunk` is set.
      level_embedding_per_chunk: add the level embedding before every chunk instead of once before block 0.
      rope_mode: how grid positions of small scales map to the RoPE grid (section 4.4): 0 unchanged, 1 resized
        tables, 2 rounded to the final grid (every release).
      text_channels: width of the text features.
      text_max_length: rows of the learned unconditional features.
      max_scales: rows of the level embedding.
    """

    depth: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    code_dim: int
    patchify: bool = False
    num_chunks: int = 1
    level_embedding_per_chunk: bool = False
    rope_mode: int = 2
    text_channels: int = 2048
    text_max_length: int = 512
    max_scales: int = 15

    def __post_init__(self) -> None:
        for name in ("depth", "embed_dim", "num_heads", "mlp_dim", "code_dim", "num_chunks", "text_channels"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(
            self.embed_dim % self.num_heads == 0,
            f"embed_dim {self.embed_dim} must be divisible by num_heads {self.num_heads}",
        )
        _require(self.head_dim % 4 == 0, f"head_dim {self.head_dim} must be divisible by 4 for 2-D RoPE")
        _require(
            self.depth % self.num_chunks == 0,
            f"depth {self.depth} must be divisible by num_chunks {self.num_chunks}",
        )
        _require(self.rope_mode in (0, 1, 2), f"rope_mode must be 0, 1 or 2, got {self.rope_mode}")
        _require(
            self.num_pool_heads > 0 and self.embed_dim % self.num_pool_heads == 0,
            f"embed_dim {self.embed_dim} must be divisible by the {self.num_pool_heads} heads of the text pool",
        )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def token_bits(self) -> int:
        """Bits that one token predicts: 4 x code_dim with patchify, else code_dim."""
        return self.code_dim * (4 if self.patchify else 1)

    @property
    def level_layers(self) -> tuple[int, ...]:
        """Layers before which the level embedding is added."""
        chunks = self.num_chunks if self.level_embedding_per_chunk else 1
        return tuple(range(0, self.depth, self.depth // chunks))

    @property
    def num_pool_heads(self) -> int:
        """Heads of the attentive text pool: text_channels // 128, or // 64 above 4096 channels (section 3.4)."""
        return self.text_channels // (64 if self.embed_dim > 4096 else 128)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Shapes of the BSQ-VAE (docs/spec/infinity.md, section 6).

    Attributes:
      code_dim: channels (bits) of one code.
      base_channels: channels of the first level.
      channel_multipliers: channels of level i are base_channels * channel_multipliers[i].
      num_residual_blocks: residual blocks of an encoder level; a decoder level has one more.
      num_groups: groups of GroupNorm; 24 are used where the channels are not divisible by 32 and this is 32.
    """

    code_dim: int
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)
    num_residual_blocks: int = 2
    num_groups: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "channel_multipliers", tuple(self.channel_multipliers))
        _require(self.code_dim > 0, f"code_dim must be positive, got {self.code_dim}")
        _require(len(self.channel_multipliers) > 0, "channel_multipliers must name at least one level")

    @property
    def stride(self) -> int:
        """Pixels per code along each side: every level but the last halves the grid."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def level_channels(self, level: int) -> int:
        """Channels of a level, 0 being the one at full resolution."""
        return self.base_channels * self.channel_multipliers[level]


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shapes of a T5 encoder with gated GELU; the defaults are flan-t5-xl's."""

    vocab_size: int = 32128
    embed_dim: int = 2048
    num_layers: int = 24
    num_heads: int = 32
    head_dim: int = 64
    mlp_dim: int = 5120
    num_buckets: int = 32
    max_distance: int = 128
    norm_epsilon: float = 1e-6


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """Sampling settings that travel with a checkpoint and apply where a call names none.

    Attributes:
      guidance_scale: classifier-free guidance; 1 switches it off.
      temperature: divides the logits.
      top_k: 1 is greedy, 2 or more does nothing for binary choices, 0 is off.
      top_p: nucleus threshold over the two values of a bit; 0 is off.
      pixels: pixel budget, a key of the scale schedules ("0.06M", "0.25M", "0.60M", "1M").
    """

    guidance_scale: float = 4.0
    temperature: float = 0.5
    top_k: int = 900
    top_p: float = 0.97
    pixels: str = "1M"

    def __post_init__(self) -> None:
        _require(math.isfinite(self.guidance_scale), f"guidance_scale must be finite, got {self.guidance_scale}")
        _require(
            math.isfinite(self.temperature) and self.temperature > 0,
            f"temperature must be finite and above 0, got {self.temperature}",
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Everything that a checkpoint folder's manifest says about its models.

    Attributes:
      transformer: the Infinity transformer.
      vae: its bitwise tokenizer.
      text_encoder: what encodes prompts; None where text features have to be given.
      defaults: sampling settings.
      knows: what prompts can ask for, in words, where the text encoder has a small vocabulary of whole words; who
        uses others gets to see it.
    """

    transformer: InfinityConfig
    vae: VAEConfig
    text_encoder: T5Config | None = None
    defaults: GenerationDefaults = GenerationDefaults()
    knows: str | None = None

    def __post_init__(self) -> None:
        _require(
            self.transformer.code_dim == self.vae.code_dim,
            f"the VAE's codes have {self.vae.code_dim} bits but the transformer expects "
            f"{self.transformer.code_dim}: pass the VAE that this transformer was trained with",
        )
        if self.text_encoder is not None:
            _require(
                self.transformer.text_channels == self.text_encoder.embed_dim,
                f"the text encoder gives {self.text_encoder.embed_dim} channels but the transformer expects "
                f"{self.transformer.text_channels}: pass the text encoder that this transformer was trained with",
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "CheckpointConfig":
        """Rebuilds a configuration.

        Raises:
          ConfigError: a field is missing, unknown or impossible.
        """
        try:
            text_encoder = data.get("text_encoder")
            return cls(
                transformer=InfinityConfig(**data["transformer"]),
                # JSON has no tuples.
                vae=VAEConfig(**{**data["vae"], "channel_multipliers": tuple(data["vae"]["channel_multipliers"])}),
                text_encoder=None if text_encoder is None else T5Config(**text_encoder),
                defaults=GenerationDefaults(**data["defaults"]),
                knows=data.get("knows"),
            )
        except (TypeError, KeyError) as error:
            raise ConfigError(f"the checkpoint's configuration does not fit this version: {error}") from error


def _architecture(depth: int, embed_dim: int, num_heads: int, num_chunks: int, code_dim: int) -> InfinityConfig:
    # Python's round() is half-to-even, as in the published code; it matters for layer32 and layer48.
    mlp_dim = 256 * round(4 * embed_dim / 256)
    return InfinityConfig(
        depth=depth,
        embed_dim=embed_dim,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
        num_chunks=num_chunks,
        code_dim=code_dim,
    )


# Table of section 1.2. The code width is a property of the tokenizer; 32 unless a release says otherwise.
ARCHITECTURES: dict[str, InfinityConfig] = {
    "infinity_layer12": _architecture(12, 768, 8, 4, code_dim=16),
    "infinity_layer16": _architecture(16, 1152, 12, 4, code_dim=32),
    "infinity_layer24": _architecture(24, 1536, 16, 4, code_dim=32),
    "infinity_2b": _architecture(32, 2048, 16, 8, code_dim=32),
    "infinity_layer32": _architecture(32, 2080, 20, 4, code_dim=32),
    "infinity_layer40": _architecture(40, 2688, 24, 4, code_dim=32),
    "infinity_8b": dataclasses.replace(_architecture(40, 3584, 28, 8, code_dim=14), patchify=True),
    "infinity_layer48": _architecture(48, 3360, 28, 4, code_dim=32),
    "infinity_20b": _architecture(58, 4608, 36, 2, code_dim=32),
}

VAE_STRIDE_16 = (1, 2, 4, 4, 4)
VAE_STRIDE_8 = (1, 2, 4, 4)
