"""Shapes of the tensors in a file -> configuration of the model that they belong to.

Every number is read off several tensors where it can be, and the majority counts: a single wrong tensor is then
reported as that by the comparison of all shapes, and not as a model of odd shape. Where all tensors that tell a
number are missing, any number will do: the comparison lists them together with everything else that does not fit.
Source: docs/spec/infinity.md, sections 1.2, 4.1 and 6.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from convert.mapping import REMEDY
from convert.names import Shape
from convert.readers import Weights
from toprovar_jax.config import ConfigError, InfinityConfig, T5Config, VAEConfig
from toprovar_jax.errors import InputError

Kind = Literal["transformer", "VAE", "text encoder"]

_KIND_MARKS: dict[Kind, str] = {
    "transformer": r"pos_start|word_embed\.|block_chunks\.|blocks\.\d+\.(sa|ca|ffn)\.",
    "VAE": r"(encoder\.down|decoder\.up)\.\d+\.",
    "text encoder": r"encoder\.block\.\d+\.layer\.",
}
_BLOCK = r"(?:block_chunks\.\d+\.module|blocks)\.\d+"
# A longer table of unconditional features is cut by the published loader; prompts have at most 512 tokens.
MAX_TEXT_LENGTH = 512


def check_kind(weights: Weights, kind: Kind, flag: str) -> None:
    """Notices files that were given to the wrong flag.

    Raises:
      InputError: the file holds another kind of model, or none that is known.
    """
    found = [
        name for name, mark in _KIND_MARKS.items() if any(re.match(mark, tensor) for tensor in weights.tensors)
    ]
    if kind in found:
        return
    if found:
        raise InputError(f"{flag} {weights.path} holds a {found[0]}, not a {kind}: were two files swapped?")
    raise InputError(f"{flag} {weights.path} does not hold a {kind} in the published layout: pass its own file")


def shapes_of(weights: Weights) -> dict[str, Shape]:
    """Shape of every tensor by name."""
    return {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}


def infinity_config(
    weights: Weights, vae: VAEConfig, *, rope_mode: Literal[0, 1, 2], level_embedding_per_chunk: bool
) -> InfinityConfig:
    """Configuration of the transformer in a file.

    Args:
      weights: the file.
      vae: the tokenizer that it will be used with; the ratio of token bits to code bits tells patchify.
      rope_mode: see `InfinityConfig`; the file does not say.
      level_embedding_per_chunk: see `InfinityConfig`; the file does not say.

    Raises:
      InputError: token and code widths do not belong together, or no model has these numbers.
    """
    read = _Reader(weights)
    token_bits = read.vote(
        "bits per token",
        [*read.sizes(r"word_embed\.weight", 1), *(rows // 2 for rows in read.sizes(r"head\.(weight|bias)", 0))],
        otherwise=vae.code_dim,
    )
    if token_bits not in (vae.code_dim, 4 * vae.code_dim):
        raise InputError(
            f"the VAE's codes have {vae.code_dim} bits but the tokens of {weights.path} have {token_bits}, not as "
            "many nor four times as many: pass the VAE that this transformer was trained with"
        )
    chunks = read.indices(r"block_chunks\.(\d+)\.module\.(\d+)\.")
    plain = read.indices(r"blocks\.(\d+)\.")
    num_chunks = 1 + max((chunk for chunk, _ in chunks), default=0)
    per_chunk = 1 + max((offset for _, offset in chunks), default=max(plain, default=(0,))[0])
    text_rows = read.vote("number of unconditional features", read.sizes(r"cfg_uncond", 0), MAX_TEXT_LENGTH)
    numbers = {
        "depth": num_chunks * per_chunk,
        "embed_dim": read.vote(
            "width",
            [
                *read.sizes(r"pos_start", 2),
                *read.sizes(r"(lvl_embed|head)\.weight", 1),
                *read.sizes(r"word_embed\.(weight|bias)", 0),
                *read.sizes(rf"{_BLOCK}\.(sa\.(q_bias|v_bias|proj\.weight)|ca_norm\.weight)", 0),
            ],
            otherwise=2048,
        ),
        # Every width has a head, should nothing tell their number.
        "num_heads": read.vote("number of heads", read.sizes(rf"{_BLOCK}\.sa\.scale_mul_1H11", 1), otherwise=1),
        "mlp_dim": read.vote(
            "width of the feed-forward layers",
            [
                *read.sizes(rf"{_BLOCK}\.ffn\.fc1\.(weight|bias)", 0),
                *read.sizes(rf"{_BLOCK}\.ffn\.fc2\.weight", 1),
            ],
            otherwise=1,
        ),
        "code_dim": vae.code_dim,
        "num_chunks": num_chunks,
        "text_channels": read.vote(
            "width of the text features",
            [
                *read.sizes(r"cfg_uncond", 1),
                *read.sizes(r"text_norm\.weight", 0),
                *read.sizes(r"text_proj_for_(sos\.ca\.mat_kv|ca\.0)\.weight", 1),
            ],
            otherwise=128,
        ),
        "text_max_length": min(MAX_TEXT_LENGTH, text_rows),
        "max_scales": read.vote("number of scales", read.sizes(r"lvl_embed\.weight", 0), otherwise=15),
    }
    try:
        return InfinityConfig(
            **numbers,
            patchify=token_bits == 4 * vae.code_dim,
            level_embedding_per_chunk=level_embedding_per_chunk,
            rope_mode=rope_mode,
        )
    except ConfigError as error:
        raise InputError(f"{weights.path} has tensors of no possible transformer ({error}): {REMEDY}") from error


def is_nested(weights: Weights) -> bool:
    """Whether a VAE's names have the additional level `.conv` and `.norm` (section 6.4)."""
    return any(
        re.search(r"\.(conv_in\.conv|norm_out\.norm|conv1\.conv|norm1\.norm)\.", name) for name in weights.tensors
    )


def vae_config(weights: Weights) -> VAEConfig:
    """Configuration of the VAE in a file.

    Raises:
      InputError: no VAE has the numbers that the tensors tell.
    """
    read = _Reader(weights)
    levels = 1 + max(read.indices(r"(?:encoder\.down|decoder\.up)\.(\d+)\."))[0]
    channels: list[int] = []
    for level in range(levels):
        sizes = read.sizes(
            rf"(encoder\.down|decoder\.up)\.{level}\.block\.\d+\.(conv[12]|norm2)(\.conv|\.norm)?\.(weight|bias)",
            0,
        )
        channels.append(read.vote(f"channels of level {level}", sizes, otherwise=channels[-1] if channels else 32))
    base_channels = read.vote(
        "channels of the first convolution",
        read.sizes(r"encoder\.conv_in(\.conv)?\.(weight|bias)", 0),
        otherwise=channels[0],
    )
    if any(count % base_channels for count in channels):
        raise InputError(
            f"{weights.path} has levels of {channels} channels, no multiples of {base_channels}: {REMEDY}"
        )
    if any(count % 32 and count % 24 for count in channels):
        raise InputError(
            f"{weights.path} has levels of {channels} channels, which form neither 32 nor 24 groups to normalise: "
            f"{REMEDY}"
        )
    return VAEConfig(
        code_dim=read.vote(
            "bits per code",
            [
                *read.sizes(r"decoder\.conv_in(\.conv)?\.weight", 1),
                *read.sizes(r"encoder\.conv_out(\.conv)?\.(weight|bias)", 0),
            ],
            otherwise=32,
        ),
        base_channels=base_channels,
        channel_multipliers=tuple(count // base_channels for count in channels),
        # A level of the decoder has one block more.
        num_residual_blocks=max(
            1,
            *(1 + block for (block,) in read.indices(r"encoder\.down\.\d+\.block\.(\d+)\.")),
            *(block for (block,) in read.indices(r"decoder\.up\.\d+\.block\.(\d+)\.")),
        ),
    )


def t5_config(weights: Weights) -> T5Config:
    """Configuration of the T5 encoder in a folder; what tensors do not say comes from its config.json.

    Raises:
      InputError: config.json is unreadable, or it is no T5 with gated GELU (T5 1.1, flan-t5).
    """
    read = _Reader(weights)
    settings = _json(weights.path / "config.json")
    if settings.get("feed_forward_proj", "gated-gelu") != "gated-gelu":
        raise InputError(f"{weights.path} is no T5 with gated GELU: pass flan-t5-xl or another T5 1.1 encoder")
    embedding = r"(shared|encoder\.embed_tokens)\.weight"
    position_bias = r"encoder\.block\.0\..*\.relative_attention_bias\.weight"
    attention = r"encoder\.block\.\d+\.layer\.0\.SelfAttention"
    mlp = r"encoder\.block\.\d+\.layer\.1\.DenseReluDense"
    num_heads = read.vote("number of heads", read.sizes(position_bias, 1), otherwise=1)
    inner_width = read.vote(
        "width of the attention",
        [*read.sizes(rf"{attention}\.[qkv]\.weight", 0), *read.sizes(rf"{attention}\.o\.weight", 1)],
        otherwise=num_heads,
    )
    return T5Config(
        vocab_size=read.vote("vocabulary", read.sizes(embedding, 0), otherwise=T5Config.vocab_size),
        embed_dim=read.vote(
            "width",
            [*read.sizes(embedding, 1), *read.sizes(r"encoder\..*layer_norm\.weight", 0)],
            otherwise=T5Config.embed_dim,
        ),
        num_layers=1 + max(read.indices(r"encoder\.block\.(\d+)\."))[0],
        num_heads=num_heads,
        head_dim=max(1, inner_width // num_heads),
        mlp_dim=read.vote(
            "width of the feed-forward layers",
            [*read.sizes(rf"{mlp}\.wi_[01]\.weight", 0), *read.sizes(rf"{mlp}\.wo\.weight", 1)],
            otherwise=T5Config.mlp_dim,
        ),
        num_buckets=read.vote("buckets", read.sizes(position_bias, 0), otherwise=T5Config.num_buckets),
        max_distance=settings.get("relative_attention_max_distance", T5Config.max_distance),
        norm_epsilon=settings.get("layer_norm_epsilon", T5Config.norm_epsilon),
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a model's configuration: download it again")
    return content


class _Reader:
    """Looks numbers up in the names and shapes of a file."""

    def __init__(self, weights: Weights) -> None:
        self._path = weights.path
        self._shapes: Mapping[str, Shape] = shapes_of(weights)

    def sizes(self, pattern: str, axis: int) -> Iterator[int]:
        """Length of an axis in every tensor whose name fits."""
        return (
            shape[axis]
            for name, shape in self._shapes.items()
            if re.fullmatch(pattern, name) and len(shape) > axis
        )

    def indices(self, pattern: str) -> set[tuple[int, ...]]:
        """The numbers in every name that begins like the pattern."""
        matches = (re.match(pattern, name) for name in self._shapes)
        return {tuple(map(int, match.groups())) for match in matches if match}

    def vote(self, what: str, values: Iterable[int], otherwise: int) -> int:
        """The most frequent of the values, the first of them on a tie; `otherwise` where there are none.

        Raises:
          InputError: it is zero.
        """
        [(winner, _)] = Counter(values).most_common(1) or [(otherwise, 0)]
        if winner < 1:
            raise InputError(f"{self._path} has tensors of size 0 where the {what} should be: {REMEDY}")
        return winner
