"""The Infinity transformer in eager float32 PyTorch, with the parameter names of the published files.

Written from docs/spec/infinity.md, sections 3 to 5. Rows are batch entries: with guidance the conditional rows
come first and as many unconditional rows follow. A prompt's text features keep their length, nothing is padded.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from convert.reference import rope, sampling
from toprovar_jax.config import InfinityConfig
from toprovar_jax.schedule import Grid, tokenizer_schedule

NORM_EPSILON = 1e-6
MAX_LOG_SCALE = math.log(100)
# Entries of older published files that hold no weights.
UNUSED_ENTRIES = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")

Rotation = tuple[Tensor, Tensor]
KeyValue = tuple[Tensor, Tensor]


@dataclasses.dataclass
class Text:
    """What the transformer knows of the prompts: one row per prompt, then one per unconditional branch."""

    normed: list[Tensor]  # [tokens, text_channels] each
    condition: Tensor  # [rows, channels]
    context: list[Tensor]  # [tokens, channels] each
    modulation: Tensor  # [rows, 1, 6, channels]


@dataclasses.dataclass
class ScaleRecord:
    """Everything computed for one scale."""

    block_input: Tensor  # [rows, tokens, channels], level embedding added
    block_outputs: list[Tensor]  # [rows, tokens, channels] each, as the next block gets them
    logits_raw: Tensor  # [rows, tokens, 2 * token_bits], before temperature and guidance
    logits: Tensor  # [batch, tokens * token_bits, 2], after both
    probabilities: Tensor  # [batch, tokens * token_bits, 2], after the filters
    bits: Tensor  # [batch, height, width, bits] on the tokenizer grid: the model's own choice
    codes: Tensor  # [batch, bits, height, width] of the bits fed forward
    code_map: Tensor  # [batch, bits, final height, final width], sum of the resized codes so far
    next_latent: Tensor | None  # [batch, bits, next height, next width]; none after the last scale


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm over channels without parameters."""
    return functional.layer_norm(x, x.shape[-1:], eps=NORM_EPSILON)


def ragged_attention(
    query: Float[Tensor, "rows heads tokens head_dim"], keys: Sequence[Tensor], values: Sequence[Tensor]
) -> Float[Tensor, "rows tokens channels"]:
    """Attention of every row to its own text, scaled by 1/sqrt(head_dim).

    Args:
      query: queries.
      keys: [text tokens, heads, head_dim] for each row.
      values: [text tokens, heads, head_dim] for each row.
    """
    rows = [
        functional.scaled_dot_product_attention(row_query, key.transpose(0, 1)[None], value.transpose(0, 1)[None])
        for row_query, key, value in zip(query.split(1), keys, values, strict=True)
    ]
    return torch.cat(rows).transpose(1, 2).flatten(2)


class TextNorm(nn.Module):
    """RMS norm of the text features (section 3.4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [tokens, channels]."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPSILON) * self.weight


class TextAttention(nn.Module):
    """Attention to the text: keys without and values with a bias, an output projection."""

    v_bias: nn.Parameter
    zero_k_bias: Tensor

    def __init__(self, channels: int, text_channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mat_kv = nn.Linear(text_channels, 2 * channels, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("zero_k_bias", torch.zeros(channels))
        self.proj = nn.Linear(channels, channels)

    def attend(self, query: Tensor, text: Sequence[Tensor]) -> Tensor:
        """Queries [rows, heads, tokens, head_dim] to [rows, tokens, channels]."""
        bias = torch.cat([self.zero_k_bias, self.v_bias])
        key_values = [
            functional.linear(row, self.mat_kv.weight, bias).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
            for row in text
        ]
        keys, values = zip(*key_values, strict=True)
        return self.proj(ragged_attention(query, keys, values))


class TextPool(TextAttention):
    """One learned query, the same for every prompt, pools its text features (section 3.4)."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__(config.embed_dim, config.text_channels, config.num_pool_heads)
        self.mat_q = nn.Parameter(torch.zeros(1, self.num_heads, config.embed_dim // self.num_heads))

    def forward(self, text: Sequence[Tensor]) -> Float[Tensor, "rows channels"]:
        """Pools the [tokens, text_channels] of every row."""
        query = self.mat_q[:, :, None].expand(len(text), -1, -1, -1)
        return self.attend(query, text)[:, 0]


class CrossAttention(TextAttention):
    """Attention of the image tokens to the projected text (section 4.6)."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__(config.embed_dim, config.embed_dim, config.num_heads)
        self.mat_q = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, context: Sequence[Tensor]) -> Tensor:
        """Maps [rows, tokens, channels]."""
        query = self.mat_q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.attend(query, context)


class SelfAttention(nn.Module):
    """Attention with normalised queries and keys, rotary positions and a cache (section 4.3)."""

    zero_k_bias: Tensor

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        channels = config.embed_dim
        self.num_heads = config.num_heads
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, config.num_heads, 1, 1), math.log(4)))
        self.mat_qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(channels))
        self.v_bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("zero_k_bias", torch.zeros(channels))
        self.proj = nn.Linear(channels, channels)

    def forward(
        self, x: Tensor, rotation: Rotation, past: KeyValue | None, mask: Tensor | None
    ) -> tuple[Tensor, KeyValue]:
        """Maps [rows, tokens, channels]; also returns all keys and values, the past ones first."""
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        projected = functional.linear(x, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # [rows, heads, tokens, head_dim] each
        query = functional.normalize(query, dim=-1) * self.scale_mul_1H11.clamp(max=MAX_LOG_SCALE).exp()
        query, key = rope.rotate(query, *rotation), rope.rotate(functional.normalize(key, dim=-1), *rotation)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
        return self.proj(attended.transpose(1, 2).flatten(2)), (key, value)


class FeedForward(nn.Module):
    """Two linear layers around a tanh-approximate GELU."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., channels]."""
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Self attention, cross attention and feed-forward, modulated by the pooled text (section 4.2)."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, config.embed_dim))
        self.sa = SelfAttention(config)
        self.ca = CrossAttention(config)
        self.ca_norm = nn.LayerNorm(config.embed_dim, eps=NORM_EPSILON)
        self.ffn = FeedForward(config.embed_dim, config.mlp_dim)

    def forward(
        self, x: Tensor, text: Text, rotation: Rotation, past: KeyValue | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Maps [rows, tokens, channels]; also returns the keys and values to pass as `past` of the next scale."""
        gate1, gate2, scale1, scale2, shift1, shift2 = (self.ada_gss + text.modulation).unbind(2)
        attended, key_value = self.sa(layer_norm(x) * (1 + scale1) + shift1, rotation, past, mask)
        x = x + gate1 * attended
        x = x + self.ca(self.ca_norm(x), text.context)
        return x + gate2 * self.ffn(layer_norm(x) * (1 + scale2) + shift2), key_value


class BlockChunk(nn.Module):
    """Only gives its blocks the prefix that they have in the published files."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.module = nn.ModuleList(blocks)


class HeadNorm(nn.Module):
    """Layer norm modulated by the pooled text (section 4.7)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Maps [rows, tokens, channels]."""
        scale, shift = self.ada_lin(condition).unflatten(-1, (1, 2, -1)).unbind(2)
        return layer_norm(x) * (1 + scale) + shift


class Infinity(nn.Module):
    """The transformer and its generation loop.

    `load_state_dict(strict=True)` takes a published state dict unchanged. Blocks are named
    `block_chunks.{i}.module.{j}`, or `blocks.{k}` where the configuration has a single chunk.
    """

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.embed_dim
        self.cfg_uncond = nn.Parameter(torch.zeros(config.text_max_length, config.text_channels))
        self.pos_start = nn.Parameter(torch.zeros(1, 1, channels))
        self.text_norm = TextNorm(config.text_channels)
        self.text_proj_for_sos = nn.ModuleDict({"ca": TextPool(config)})
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(config.text_channels, channels), nn.GELU(approximate="tanh"), nn.Linear(channels, channels)
        )
        self.lvl_embed = nn.Embedding(config.max_scales, channels)
        self.word_embed = nn.Linear(config.token_bits, channels)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))
        self.head_nm = HeadNorm(channels)
        self.head = nn.Linear(channels, 2 * config.token_bits)
        blocks = [Block(config) for _ in range(config.depth)]
        self.chunk_size = config.depth // config.num_chunks
        if config.num_chunks == 1:
            self.blocks = nn.ModuleList(blocks)
        else:
            starts = range(0, config.depth, self.chunk_size)
            self.block_chunks = nn.ModuleList(BlockChunk(blocks[i : i + self.chunk_size]) for i in starts)
        self.register_load_state_dict_pre_hook(_drop_unused_entries)

    def all_blocks(self) -> list[Block]:
        """The blocks in the order in which they run."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def encode_text(self, text_features: Sequence[Float[Tensor, "_tokens text_channels"]]) -> Text:
        """The text path (section 3.4), one row for each entry."""
        normed = [self.text_norm(features) for features in text_features]
        condition = self.text_proj_for_sos["ca"](normed)
        return Text(
            normed=normed,
            condition=condition,
            context=[self.text_proj_for_ca(features) for features in normed],
            modulation=self.shared_ada_lin(condition).unflatten(-1, (1, 6, -1)),
        )

    def first_input(self, text: Text) -> Float[Tensor, "rows 1 channels"]:
        """Input of scale 0, without level embedding."""
        return text.condition[:, None] + self.pos_start

    def logits(self, x: Tensor, condition: Tensor) -> Float[Tensor, "rows tokens twice_bits"]:
        """The head (section 4.7): channel 2k is bit k = 0, channel 2k + 1 is bit k = 1."""
        return self.head(self.head_nm(x, condition))

    def _repeats_level_embedding(self, layer: int) -> bool:
        return self.config.level_embedding_per_chunk and layer > 0 and layer % self.chunk_size == 0

    def _rotation(self, grid: Grid, rope_grid: Grid) -> Rotation:
        return rope.rotation(self.config.rope_mode, grid, rope_grid, self.config.head_dim)

    @torch.no_grad()
    def teacher_forcing(
        self,
        text_features: Sequence[Float[Tensor, "_tokens text_channels"]],
        latents: Float[Tensor, "batch tokens_after_first token_bits"],
        *,
        schedule: Sequence[Grid],
        rope_grid: Grid,
    ) -> Float[Tensor, "batch tokens twice_bits"]:
        """Raw logits of all scales at once; a token sees the tokens of its own and of earlier scales.

        Args:
          text_features: one entry per image.
          latents: inputs of scales 1 and up, concatenated, before the word embedding.
          schedule: token grid of every scale.
          rope_grid: grid that positions refer to.
        """
        text = self.encode_text(text_features)
        scales = torch.repeat_interleave(torch.arange(len(schedule)), torch.tensor([g.size for g in schedule]))
        level_embedding = self.lvl_embed(scales)
        x = torch.cat([self.first_input(text), self.word_embed(latents)], dim=1) + level_embedding
        cosines, sines = zip(*(self._rotation(grid, rope_grid) for grid in schedule), strict=True)
        rotation = torch.cat(cosines), torch.cat(sines)
        mask = scales[:, None] >= scales[None, :]
        for layer, block in enumerate(self.all_blocks()):
            if self._repeats_level_embedding(layer):
                x = x + level_embedding
            x, _ = block(x, text, rotation, mask=mask)
        return self.logits(x, text.condition)

    @torch.no_grad()
    def generate(
        self,
        text_features: Sequence[Float[Tensor, "_tokens text_channels"]],
        *,
        schedule: Sequence[Grid],
        rope_grid: Grid,
        guidance_scale: Sequence[float],
        temperature: Sequence[float],
        top_k: int = 0,
        top_p: float = 0.0,
        negative_text_features: Sequence[Float[Tensor, "_tokens text_channels"]] | None = None,
        guidance_layer: int | None = None,
        draws: Sequence[Tensor] | None = None,
        forced_bits: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> list[ScaleRecord]:
        """The sampling loop (section 5), one record per scale.

        Args:
          text_features: one entry per image.
          schedule: token grid of every scale; the first has one token.
          rope_grid: grid that positions refer to.
          guidance_scale: one per scale; where all are 1 there are no unconditional rows.
          temperature: one per scale.
          top_k: see `sampling.filtered_probabilities`.
          top_p: see `sampling.filtered_probabilities`.
          negative_text_features: one entry per image, in place of the learned unconditional features.
          guidance_layer: negative index m: guidance mixes the rows after block depth + m, not the logits.
          draws: Exp(1) draws of every scale, [batch * tokens * token_bits, 2] or anything of that size.
          forced_bits: bits to feed forward at every scale instead of the sampled ones, on the tokenizer grid.
          generator: source of the draws where none are given.
        """
        batch = len(text_features)
        guided = any(scale != 1 for scale in guidance_scale)
        rows = list(text_features)
        if guided:
            rows += negative_text_features or [self.cfg_uncond[: len(features)] for features in text_features]
        text = self.encode_text(rows)
        code_grids = tokenizer_schedule(tuple(schedule), self.config.patchify)
        code_map = text.condition.new_zeros(batch, self.config.code_dim, *code_grids[-1])
        cache: list[KeyValue | None] = [None] * self.config.depth
        records: list[ScaleRecord] = []
        x = self.first_input(text)
        for index, grid in enumerate(schedule):
            level_embedding = self.lvl_embed.weight[index]
            block_input = x = x + level_embedding
            outputs = []
            guidance = guidance_scale[index]
            rotation = self._rotation(grid, rope_grid)
            for layer, block in enumerate(self.all_blocks()):
                if self._repeats_level_embedding(layer):
                    x = x + level_embedding
                x, cache[layer] = block(x, text, rotation, cache[layer])
                if guidance != 1 and guidance_layer is not None and layer == self.config.depth + guidance_layer:
                    x = _guide(x, guidance).repeat(2, 1, 1)
                outputs.append(x)
            if guidance != 1 and guidance_layer is None:
                logits_raw = self.logits(x, text.condition)
                logits = _guide(logits_raw / temperature[index], guidance)
            else:
                logits_raw = self.logits(x[:batch], text.condition[:batch])
                logits = logits_raw / temperature[index]
            logits = logits.reshape(batch, -1, 2)
            probabilities = sampling.filtered_probabilities(logits, top_k, top_p)
            if draws is None:
                exponential = torch.empty_like(probabilities).exponential_(generator=generator)
            else:
                exponential = draws[index].view_as(probabilities)
            bits = self._to_code_grid(sampling.draw(probabilities, exponential), grid)
            codes = sampling.bits_to_codes(bits if forced_bits is None else forced_bits[index].view_as(bits))
            code_map = code_map + sampling.resize(codes, code_grids[-1])
            next_latent = None
            if index + 1 < len(schedule):
                next_latent = sampling.resize(code_map, code_grids[index + 1])
                x = self.embed_latent(next_latent).repeat(2 if guided else 1, 1, 1)
            records.append(
                ScaleRecord(
                    block_input, outputs, logits_raw, logits, probabilities, bits, codes, code_map, next_latent
                )
            )
        return records

    def _to_code_grid(self, bits: Tensor, grid: Grid) -> Int[Tensor, "batch height width bits"]:
        """Bits per token to bits on the tokenizer grid."""
        spatial = bits.view(len(bits), *grid, self.config.token_bits).permute(0, 3, 1, 2)
        if self.config.patchify:
            spatial = functional.pixel_shuffle(spatial, 2)
        return spatial.permute(0, 2, 3, 1)

    def embed_latent(
        self, latent: Float[Tensor, "batch bits height width"]
    ) -> Float[Tensor, "batch tokens channels"]:
        """A latent on the tokenizer grid to block inputs, without level embedding."""
        if self.config.patchify:
            latent = functional.pixel_unshuffle(latent, 2)
        return self.word_embed(latent.flatten(2).transpose(1, 2))


def _guide(rows: Tensor, guidance_scale: float) -> Tensor:
    conditional, unconditional = rows.chunk(2)
    return guidance_scale * conditional + (1 - guidance_scale) * unconditional


def _drop_unused_entries(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    del module
    for name in UNUSED_ENTRIES:
        state_dict.pop(prefix + name, None)
