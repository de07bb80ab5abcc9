"""The bitwise tokenizer: images to bits on a pyramid of grids and back (BSQ-VAE).

A latent is quantised coarse to fine: every scale of a schedule stores the signs of what the coarser scales left
over, one bit per channel, each bit worth +-1/sqrt(channels). The code map, the sum of all scales enlarged to the
last grid, is what the decoder turns into an image.

All maps are [batch, height, width, channels]; schedules are those of the tokenizer
(`toprovar_jax.schedule.tokenizer_schedule`).
Source: docs/spec/infinity.md, section 6 (the published Infinity code), and section 7 for the precision.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Integer, PRNGKeyArray, UInt8

from toprovar_jax.config import VAEConfig
from toprovar_jax.precision import activation_dtype, matmul_precision
from toprovar_jax.resize import pixel_unshuffle, resize_area, resize_bilinear
from toprovar_jax.schedule import ScaleSchedule

# The names bind batch and bits alone, for the scales of one pyramid have different grids.
Bits = UInt8[Array, "batch _ _ bits"]
Map = Float32[Array, "batch _ _ bits"]


def bits_to_codes(bits: Integer[Array, "*shape bits"]) -> Float32[Array, "*shape bits"]:
    """Codes of 0/1 bits: +-1/sqrt(number of bits per code), a vector of length 1 (section 5, item 7)."""
    return (2 * bits.astype(jnp.float32) - 1) / math.sqrt(bits.shape[-1])


def quantize(latent: Float[Array, "*shape bits"]) -> UInt8[Array, "*shape bits"]:
    """Bits of a latent: 1 where a channel is positive, 0 where it is zero or negative (section 6.5)."""
    return (latent > 0).astype(jnp.uint8)


def sum_codes(bits: Sequence[Bits], schedule: ScaleSchedule) -> Map:
    """The code map [batch, *last grid, bits] of the given scales.

    Args:
      bits: bits of the first scales of the schedule, [batch, *grid, bits] each; fewer than the schedule's where
        generation stopped early.
      schedule: grid of every scale.
    """
    return sum(
        (resize_bilinear(bits_to_codes(scale_bits), schedule[-1]) for scale_bits in bits[1:]),
        start=resize_bilinear(bits_to_codes(bits[0]), schedule[-1]),
    )


class QuantizedScales(NamedTuple):
    """What `multi_scale_quantize` returns.

    Attributes:
      bits: [batch, *grid, bits] of every scale.
      code_map: [batch, *last grid, bits], equal to `sum_codes(bits, schedule)`.
      next_features: the code map after each scale but the last, averaged down to the next scale's grid. These are
        the tokenizer's own features; the transformer sees bilinear ones (`self_correction_inputs`).
    """

    bits: list[Bits]
    code_map: Map
    next_features: list[Map]


def multi_scale_quantize(
    latent: Float[Array, "batch height width channels"], schedule: ScaleSchedule
) -> QuantizedScales:
    """Quantises a latent coarse to fine (section 6.5).

    Args:
      latent: the encoder's output, on the last grid of the schedule.
      schedule: grid of every scale.

    Raises:
      ValueError: the latent is not on the schedule's last grid.
    """
    bits, code_maps = zip(*_quantize_scales(latent, schedule, lambda _, scale_bits: scale_bits), strict=True)
    next_features = [
        resize_area(code_map, grid) for code_map, grid in zip(code_maps[:-1], schedule[1:], strict=True)
    ]
    return QuantizedScales(list(bits), code_maps[-1], next_features)


class SelfCorrection(NamedTuple):
    """Inputs and targets of a training step; both on the transformer's grids.

    Attributes:
      inputs: [batch, *grid, token bits] of every scale but the first, which sees text alone.
      labels: [batch, *grid, token bits] of every scale: the bits that correct the mistakes of the scales before.
    """

    inputs: list[Map]
    labels: list[Bits]


def self_correction_inputs(
    latent: Float[Array, "batch height width channels"],
    schedule: ScaleSchedule,
    key: PRNGKeyArray,
    *,
    strength: float,
    num_noisy_scales: int,
    patchify: bool,
) -> SelfCorrection:
    """Training inputs with random mistakes, and the bits that correct them (bitwise self-correction, section 6.5).

    A mistake is a flipped bit. The flipped bits make the inputs and what the next scales have to make good; the
    labels keep the bits as quantised.

    Args:
      latent: the encoder's output, on the last grid of the schedule.
      schedule: grid of every scale.
      key: decides the flips.
      strength: largest probability of a flip; each scale draws its own from 0 to this in steps of 0.01. 0: none.
      num_noisy_scales: only the first so many scales flip bits.
      patchify: gather 2x2 codes into one token.

    Raises:
      ValueError: the latent is not on the schedule's last grid.
    """

    def flip(scale: int, bits: Bits) -> Bits:
        if scale >= num_noisy_scales:
            return bits
        probability_key, flip_key = jax.random.split(jax.random.fold_in(key, scale))
        probability = 0.01 * jax.random.randint(probability_key, (), 0, round(100 * strength) + 1)
        return bits ^ jax.random.bernoulli(flip_key, probability, bits.shape).astype(bits.dtype)

    labels, code_maps = zip(*_quantize_scales(latent, schedule, flip), strict=True)
    inputs = [resize_bilinear(code_map, grid) for code_map, grid in zip(code_maps[:-1], schedule[1:], strict=True)]
    if patchify:
        return SelfCorrection([pixel_unshuffle(x) for x in inputs], [pixel_unshuffle(bits) for bits in labels])
    return SelfCorrection(inputs, list(labels))


def _quantize_scales(
    latent: Array, schedule: ScaleSchedule, corrupt: Callable[[int, Bits], Bits]
) -> Iterator[tuple[Bits, Map]]:
    """Yields every scale's bits and the code map after it, into which the bits go as `corrupt` returns them."""
    if latent.shape[1:3] != tuple(schedule[-1]):
        height, width = schedule[-1]
        raise ValueError(
            f"the latent has {latent.shape[1]}x{latent.shape[2]} cells but the schedule ends at {height}x{width}: "
            f"resize the image to the schedule's last grid times the tokenizer's stride"
        )
    latent = latent.astype(jnp.float32)
    code_map = jnp.zeros_like(latent)
    for scale, grid in enumerate(schedule):
        bits = quantize(resize_area(latent - code_map, grid))
        code_map = code_map + resize_bilinear(bits_to_codes(corrupt(scale, bits)), schedule[-1])
        yield bits, code_map


def _conv(in_channels: int, out_channels: int, size: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        in_channels,
        out_channels,
        (size, size),
        padding=size // 2,
        dtype=dtype,
        param_dtype=dtype,
        precision=matmul_precision(dtype),
        rngs=rngs,
    )


def _downsampling_conv(channels: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        channels,
        channels,
        (3, 3),
        strides=2,
        # One row at the bottom and one column at the right only; "SAME" would do so for even sizes alone.
        padding=((0, 1), (0, 1)),
        dtype=dtype,
        param_dtype=dtype,
        precision=matmul_precision(dtype),
        rngs=rngs,
    )


def _add_taps(kernel: Array, axis: int) -> Array:
    """Three taps along an axis as two for either pixel of a corner: [pixel, cell, ...] without that axis.

    The upper (left) pixel sees the upper (left) cell twice, the other one the other cell.
    """
    first, middle, last = (jax.lax.index_in_dim(kernel, tap, axis, keepdims=False) for tap in range(3))
    return jnp.stack([jnp.stack([first + middle, last]), jnp.stack([first, middle + last])])


class EnlargingConv(nnx.Module):
    """3x3 convolution of a map whose every cell is first repeated in 2x2 pixels (section 6.2).

    The four pixels around a corner between cells see the same 2x2 cells. So a 2x2 convolution of the map itself
    gives them as four times the channels: taps that fall on the same cell are added up beforehand, which leaves 4
    of 9 products and no enlarged map to write and read.
    """

    def __init__(self, channels: int, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        initial = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(initial(rngs.params(), (3, 3, channels, channels), dtype))
        self.bias = nnx.Param(jnp.zeros(channels, dtype))

    def __call__(self, x: Array) -> Array:
        """[batch, height, width, channels] to twice the grid."""
        batch, height, width, channels = x.shape
        dtype = self.kernel.dtype
        # [column's pixel, cell, row's pixel, cell, in, out]
        kernel = _add_taps(_add_taps(self.kernel[...].astype(jnp.float32), 0), 2).transpose(3, 1, 4, 2, 0, 5)
        corners = jax.lax.conv_general_dilated(
            x.astype(dtype),
            kernel.reshape(2, 2, channels, 4 * channels).astype(dtype),
            window_strides=(1, 1),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=matmul_precision(dtype),
        )
        corners = corners + jnp.tile(self.bias[...], 4)
        corners = corners.reshape(batch, height + 1, width + 1, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        # The corners along the border reach half a cell too far.
        return corners.reshape(batch, 2 * height + 2, 2 * width + 2, channels)[:, 1:-1, 1:-1]


class GroupNorm(nnx.Module):
    """Normalises each group of channels over all pixels, in float32 (section 6.1)."""

    def __init__(self, channels: int, config: VAEConfig) -> None:
        self.num_groups = 24 if config.num_groups == 32 and channels % 32 else config.num_groups
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))

    def __call__(self, x: Array) -> Array:
        """[batch, height, width, channels] of any float dtype to float32."""
        batch, _, _, channels = x.shape
        x = x.astype(jnp.float32)
        # One pass over x gives both moments. Pixels first: reducing them together with a group's channels makes
        # XLA for GPUs write a float32 [pixels, groups] partial result to memory.
        moments = jnp.stack([x.mean(axis=(1, 2)), jnp.square(x).mean(axis=(1, 2))])
        mean, mean_square = moments.reshape(2, batch, self.num_groups, -1).mean(axis=3)
        inverse = jax.lax.rsqrt(jnp.maximum(mean_square - jnp.square(mean), 0) + 1e-6)
        group_size = channels // self.num_groups
        factor = jnp.repeat(inverse, group_size, axis=1) * self.scale[...]
        offset = self.bias[...] - jnp.repeat(mean, group_size, axis=1) * factor
        return x * factor[:, None, None] + offset[:, None, None]


class ResidualBlock(nnx.Module):
    """Two rounds of norm, swish and 3x3 convolution beside a skip connection (section 6.1)."""

    def __init__(
        self, in_channels: int, out_channels: int, config: VAEConfig, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.norm1 = GroupNorm(in_channels, config)
        self.conv1 = _conv(in_channels, out_channels, 3, dtype, rngs)
        self.norm2 = GroupNorm(out_channels, config)
        self.conv2 = _conv(out_channels, out_channels, 3, dtype, rngs)
        self.shortcut = None if in_channels == out_channels else _conv(in_channels, out_channels, 1, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        """[batch, height, width, in_channels] to [batch, height, width, out_channels]."""
        y = self.conv1(nnx.swish(self.norm1(x)))
        y = self.conv2(nnx.swish(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class EncoderLevel(nnx.Module):
    """Residual blocks of one resolution, then, except at the last level, the step to half of it."""

    def __init__(self, level: int, config: VAEConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        channels = config.level_channels(level)
        in_channels = config.level_channels(level - 1) if level > 0 else config.base_channels
        self.blocks = nnx.List(
            ResidualBlock(in_channels if index == 0 else channels, channels, config, dtype, rngs)
            for index in range(config.num_residual_blocks)
        )
        is_last = level == len(config.channel_multipliers) - 1
        self.downsample = None if is_last else _downsampling_conv(channels, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        """[batch, height, width, channels of the level above] to half the grid."""
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class DecoderLevel(nnx.Module):
    """Residual blocks of one resolution, then, except at level 0, the step to twice of it."""

    def __init__(self, level: int, config: VAEConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        channels = config.level_channels(level)
        in_channels = config.level_channels(min(level + 1, len(config.channel_multipliers) - 1))
        self.blocks = nnx.List(
            ResidualBlock(in_channels if index == 0 else channels, channels, config, dtype, rngs)
            for index in range(config.num_residual_blocks + 1)
        )
        self.upsample = None if level == 0 else EnlargingConv(channels, dtype, rngs)

    def __call__(self, x: Array) -> tuple[Array, dict[str, Array]]:
        """[batch, height, width, channels of the level below] to twice the grid, and named intermediates."""
        for block in self.blocks:
            x = block(x)
        out = {"blocks": x}
        if self.upsample is not None:
            x = out["upsample"] = self.upsample(x)
        return x, out


class Encoder(nnx.Module):
    """Image to latent (section 6.3)."""

    def __init__(self, config: VAEConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        num_levels = len(config.channel_multipliers)
        channels = config.level_channels(num_levels - 1)
        self.conv_in = _conv(3, config.base_channels, 3, dtype, rngs)
        self.down = nnx.List(EncoderLevel(level, config, dtype, rngs) for level in range(num_levels))
        self.middle = nnx.List(ResidualBlock(channels, channels, config, dtype, rngs) for _ in range(2))
        self.norm_out = GroupNorm(channels, config)
        self.conv_out = _conv(channels, config.code_dim, 3, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        """[batch, pixel_height, pixel_width, 3] to [batch, height, width, code_dim]."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        for block in self.middle:
            x = block(x)
        return self.conv_out(nnx.swish(self.norm_out(x)))


class Decoder(nnx.Module):
    """Code map to image, not yet clamped (section 6.2)."""

    def __init__(self, config: VAEConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        num_levels = len(config.channel_multipliers)
        channels = config.level_channels(num_levels - 1)
        self.conv_in = _conv(config.code_dim, channels, 3, dtype, rngs)
        self.middle = nnx.List(ResidualBlock(channels, channels, config, dtype, rngs) for _ in range(2))
        self.up = nnx.List(DecoderLevel(level, config, dtype, rngs) for level in range(num_levels))
        self.norm_out = GroupNorm(config.level_channels(0), config)
        self.conv_out = _conv(config.level_channels(0), 3, 3, dtype, rngs)

    def __call__(self, x: Array) -> tuple[Array, dict[str, Array]]:
        """[batch, height, width, code_dim] to [batch, pixel_height, pixel_width, 3], and named intermediates."""
        out: dict[str, Array] = {}
        x = out["conv_in"] = self.conv_in(x)
        for block in self.middle:
            x = block(x)
        out["middle"] = x
        for index in reversed(range(len(self.up))):
            x, level_out = self.up[index](x)
            out |= {f"up/{index}/{name}": value for name, value in level_out.items()}
        return self.conv_out(nnx.swish(self.norm_out(x))), out


class BSQVAE(nnx.Module):
    """Encoder and decoder of the tokenizer; the quantiser between them has no parameters.

    Args:
      config: shapes.
      dtype: float32 or bfloat16, of convolutions and their parameters, float8_e4m3fn as bfloat16; norms are
        float32.
      rngs: initialises the parameters.
    """

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.encoder = Encoder(config, activation_dtype(dtype), rngs)
        self.decoder = Decoder(config, activation_dtype(dtype), rngs)

    def encode(
        self, image: Float[Array, "batch pixel_height pixel_width 3"]
    ) -> Float32[Array, "batch height width code_dim"]:
        """Latent of an RGB image with values in [-1, 1]; its grid is the image's divided by the stride."""
        return self.encoder(image).astype(jnp.float32)

    def decode(
        self, code_map: Float[Array, "batch height width code_dim"]
    ) -> Float32[Array, "batch pixel_height pixel_width 3"]:
        """RGB image with values in [-1, 1] of a code map; its sides are the code map's times the stride."""
        image, _ = self.decoder(code_map)
        return jnp.clip(image.astype(jnp.float32), -1, 1)
