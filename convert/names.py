"""Official tensor names <-> our parameter paths, one table per model.

A rule pairs an official name with the path of one of our parameters and says how the tensor is laid out there; it
has several names where our parameter holds their tensors side by side. Names in braces stand for indices;
`{block}`, `{conv}` and `{norm}` for the spellings that a file may use. A table is expanded over the parameters of
the model's skeleton, so that every parameter has exactly one rule.
Source: docs/spec/infinity.md, sections 4.1 and 6.4; for T5 the names of Hugging Face's `T5EncoderModel`.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Mapping

from torch import Tensor

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How our parameter is laid out relative to the official tensor.

    Attributes:
      to_ours: a view of the official tensor in our layout.
      official_shape: shape of the official tensor, given ours.
    """

    to_ours: Callable[[Tensor], Tensor]
    official_shape: Callable[[Shape], Shape]


SAME = Layout(lambda x: x, lambda shape: shape)
# A linear layer's weight is [out, in] there and [in, out] here.
TRANSPOSED = Layout(lambda x: x.t(), lambda shape: shape[::-1])
# A convolution's weight is [out, in, height, width] there and [height, width, in, out] here.
CHANNELS_LAST = Layout(lambda x: x.permute(2, 3, 1, 0), lambda shape: (shape[3], shape[2], shape[0], shape[1]))


def _without_axes(*axes: int) -> Layout:
    """Axes of length 1 of the official tensor are dropped."""

    def official_shape(shape: Shape) -> Shape:
        remaining = iter(shape)
        return tuple(1 if axis in axes else next(remaining) for axis in range(len(shape) + len(axes)))

    return Layout(lambda x: x.squeeze(axes), official_shape)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table; the tensors of several official names are our columns, from left to right."""

    official: str | tuple[str, ...]
    ours: str
    layout: Layout = SAME


@dataclasses.dataclass(frozen=True)
class Unused:
    """Tensors that may be in a file although the model needs none of them, as patterns of names.

    Attributes:
      ignored: may hold anything.
      zero: must hold zeros.
    """

    ignored: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()


def _linear(official: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{official}.weight", f"{ours}/kernel", TRANSPOSED), Rule(f"{official}.bias", f"{ours}/bias")


def _norm(official: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{official}.weight", f"{ours}/scale"), Rule(f"{official}.bias", f"{ours}/bias")


def _conv(official: str, ours: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{official}{{conv}}.weight", f"{ours}/kernel", CHANNELS_LAST),
        Rule(f"{official}{{conv}}.bias", f"{ours}/bias"),
    )


def _residual_block(official: str, ours: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{official}.norm1{{norm}}", f"{ours}/norm1"),
        *_conv(f"{official}.conv1", f"{ours}/conv1"),
        *_norm(f"{official}.norm2{{norm}}", f"{ours}/norm2"),
        *_conv(f"{official}.conv2", f"{ours}/conv2"),
        *_conv(f"{official}.nin_shortcut", f"{ours}/shortcut"),
    )


INFINITY_RULES: tuple[Rule, ...] = (
    Rule("cfg_uncond", "unconditional_features"),
    Rule("pos_start", "start_position", _without_axes(0, 1)),
    Rule("text_norm.weight", "text_norm/scale"),
    Rule("text_proj_for_sos.ca.mat_q", "text_pool/query", _without_axes(0)),
    Rule("text_proj_for_sos.ca.mat_kv.weight", "text_pool/key_value/kernel", TRANSPOSED),
    Rule("text_proj_for_sos.ca.v_bias", "text_pool/value_bias"),
    *_linear("text_proj_for_sos.ca.proj", "text_pool/output"),
    *_linear("text_proj_for_ca.0", "text_projection/up"),
    *_linear("text_proj_for_ca.2", "text_projection/down"),
    Rule("lvl_embed.weight", "level_embedding"),
    *_linear("word_embed", "word_embedding"),
    *_linear("shared_ada_lin.1", "shared_modulation"),
    *_linear("head_nm.ada_lin.1", "head_modulation"),
    *_linear("head", "head"),
    Rule("{block}.ada_gss", "blocks/{k}/modulation", _without_axes(0, 1)),
    Rule("{block}.sa.scale_mul_1H11", "blocks/{k}/self_attention/log_scale", _without_axes(0, 2, 3)),
    Rule("{block}.sa.mat_qkv.weight", "blocks/{k}/self_attention/query_key_value/kernel", TRANSPOSED),
    Rule("{block}.sa.q_bias", "blocks/{k}/self_attention/query_bias"),
    Rule("{block}.sa.v_bias", "blocks/{k}/self_attention/value_bias"),
    *_linear("{block}.sa.proj", "blocks/{k}/self_attention/output"),
    *_norm("{block}.ca_norm", "blocks/{k}/cross_norm"),
    *_linear("{block}.ca.mat_q", "blocks/{k}/cross_attention/query"),
    Rule("{block}.ca.mat_kv.weight", "blocks/{k}/cross_attention/key_value/kernel", TRANSPOSED),
    Rule("{block}.ca.v_bias", "blocks/{k}/cross_attention/value_bias"),
    *_linear("{block}.ca.proj", "blocks/{k}/cross_attention/output"),
    *_linear("{block}.ffn.fc1", "blocks/{k}/mlp/up"),
    *_linear("{block}.ffn.fc2", "blocks/{k}/mlp/down"),
)

# Buffers that the model does not use. The first kind stands for a bias that is not there and has to be zero.
INFINITY_UNUSED = Unused(
    zero=("*.zero_k_bias",),
    ignored=("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen"),
)

VAE_RULES: tuple[Rule, ...] = (
    *_conv("encoder.conv_in", "encoder/conv_in"),
    *_residual_block("encoder.down.{i}.block.{j}", "encoder/down/{i}/blocks/{j}"),
    *_conv("encoder.down.{i}.downsample.conv", "encoder/down/{i}/downsample"),
    *_residual_block("encoder.mid.block_1", "encoder/middle/0"),
    *_residual_block("encoder.mid.block_2", "encoder/middle/1"),
    *_norm("encoder.norm_out{norm}", "encoder/norm_out"),
    *_conv("encoder.conv_out", "encoder/conv_out"),
    *_conv("decoder.conv_in", "decoder/conv_in"),
    *_residual_block("decoder.mid.block_1", "decoder/middle/0"),
    *_residual_block("decoder.mid.block_2", "decoder/middle/1"),
    *_residual_block("decoder.up.{i}.block.{j}", "decoder/up/{i}/blocks/{j}"),
    *_conv("decoder.up.{i}.upsample.conv", "decoder/up/{i}/upsample"),
    *_norm("decoder.norm_out{norm}", "decoder/norm_out"),
    *_conv("decoder.conv_out", "decoder/conv_out"),
)

VAE_UNUSED = Unused(ignored=("quantizer.lfq.mask", "quantize.lfq.mask"))

_T5_ATTENTION = "encoder.block.{i}.layer.0.SelfAttention"
_T5_MLP = "encoder.block.{i}.layer.1.DenseReluDense"
T5_RULES: tuple[Rule, ...] = (
    Rule("shared.weight", "token_embedding"),
    Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_attention_bias"),
    Rule(
        tuple(f"{_T5_ATTENTION}.{name}.weight" for name in "qkv"),
        "blocks/{i}/attention/query_key_value/kernel",
        TRANSPOSED,
    ),
    Rule(f"{_T5_ATTENTION}.o.weight", "blocks/{i}/attention/output/kernel", TRANSPOSED),
    Rule("encoder.block.{i}.layer.0.layer_norm.weight", "blocks/{i}/attention_norm/scale"),
    Rule((f"{_T5_MLP}.wi_0.weight", f"{_T5_MLP}.wi_1.weight"), "blocks/{i}/mlp/gate_up/kernel", TRANSPOSED),
    Rule(f"{_T5_MLP}.wo.weight", "blocks/{i}/mlp/down/kernel", TRANSPOSED),
    Rule("encoder.block.{i}.layer.1.layer_norm.weight", "blocks/{i}/mlp_norm/scale"),
    Rule("encoder.final_layer_norm.weight", "final_norm/scale"),
)

# The decoder of T5 is not used; the encoder's embedding is the shared one under a second name.
T5_ALIAS = ("encoder.embed_tokens.weight", "shared.weight")
T5_UNUSED = Unused(ignored=("decoder.*", "lm_head.weight"))


@dataclasses.dataclass(frozen=True)
class Expected:
    """An official tensor that a model needs; those of one path are its columns, in the order of the table."""

    path: str
    shape: Shape
    layout: Layout


Names = dict[str, Expected]


def infinity_names(shapes: Mapping[str, Shape], *, depth: int, num_chunks: int) -> Names:
    """Official names of the transformer's parameters.

    Args:
      shapes: shape of every parameter by path, as the model's skeleton has them.
      depth: number of blocks.
      num_chunks: groups that the file stores the blocks in; with 1 it stores a plain list.
    """
    per_chunk = depth // num_chunks

    def spell(indices: Mapping[str, int]) -> dict[str, str]:
        if "k" not in indices:
            return {}
        chunk, offset = divmod(indices["k"], per_chunk)
        return {"block": f"blocks.{offset}" if num_chunks == 1 else f"block_chunks.{chunk}.module.{offset}"}

    return _expand(INFINITY_RULES, shapes, spell)


def vae_names(shapes: Mapping[str, Shape], *, nested: bool) -> Names:
    """Official names of the VAE's parameters.

    Args:
      shapes: shape of every parameter by path.
      nested: whether the file has the additional level `.conv` and `.norm` in its names (section 6.4).
    """
    level = {"conv": ".conv", "norm": ".norm"} if nested else {"conv": "", "norm": ""}
    return _expand(VAE_RULES, shapes, lambda _: level)


def t5_names(shapes: Mapping[str, Shape]) -> Names:
    """Hugging Face's names of the text encoder's parameters, given the shape of every parameter by path."""
    return _expand(T5_RULES, shapes, lambda _: {})


def is_ignored(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a tensor's name matches one of the patterns of an ignore list."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _expand(
    rules: tuple[Rule, ...], shapes: Mapping[str, Shape], spell: Callable[[Mapping[str, int]], Mapping[str, str]]
) -> Names:
    patterns = [(re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>\\d+)", rule.ours)), rule) for rule in rules]
    names: Names = {}
    for path, shape in shapes.items():
        [(match, rule)] = [(match, rule) for pattern, rule in patterns if (match := pattern.fullmatch(path))]
        indices = {name: int(text) for name, text in match.groupdict().items()}
        officials = (rule.official,) if isinstance(rule.official, str) else rule.official
        part = shape if len(officials) == 1 else (*shape[:-1], shape[-1] // len(officials))
        for official in officials:
            name = official.format(**indices, **spell(indices))
            names[name] = Expected(path, rule.layout.official_shape(part), rule.layout)
    return names
