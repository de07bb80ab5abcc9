"""The bitwise tokenizer (BSQ-VAE) in eager float32 PyTorch, with the parameter names of the published files.

Written from docs/spec/infinity.md, section 6. Images are RGB in [-1, 1].
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from convert.reference.sampling import area_resize, bits_to_codes, resize
from toprovar_jax.config import VAEConfig
from toprovar_jax.schedule import Grid, tokenizer_schedule


class Conv(nn.Module):
    """A convolution one level down, as the published names want it."""

    def __init__(
        self, channels_in: int, channels_out: int, size: int = 3, stride: int = 1, padding: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, channels, height, width]."""
        return self.conv(x)


class Norm(nn.Module):
    """A group norm one level down, as the published names want it."""

    def __init__(self, channels: int, config: VAEConfig) -> None:
        super().__init__()
        groups = 24 if config.num_groups == 32 and channels % 32 else config.num_groups
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, channels, height, width]."""
        return self.norm(x)


class ResidualBlock(nn.Module):
    """Two normalised convolutions beside a skip connection (section 6.1)."""

    def __init__(self, channels_in: int, channels_out: int, config: VAEConfig) -> None:
        super().__init__()
        self.norm1 = Norm(channels_in, config)
        self.conv1 = Conv(channels_in, channels_out)
        self.norm2 = Norm(channels_out, config)
        self.conv2 = Conv(channels_out, channels_out)
        self.nin_shortcut = (
            nn.Identity() if channels_in == channels_out else Conv(channels_in, channels_out, size=1, padding=0)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, channels, height, width]."""
        hidden = self.conv1(functional.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(functional.silu(self.norm2(hidden)))


class Downsample(nn.Module):
    """Halves the grid; the zero padding is on the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, channels, height, width]."""
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the grid by repetition, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, channels, height, width]."""
        return self.conv(functional.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution where there is one."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        num_blocks: int,
        config: VAEConfig,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(a, b, config) for a, b in itertools.pairwise(widths))
        if downsample:
            self.downsample = Downsample(channels_out)
        if upsample:
            self.upsample = Upsample(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, channels, height, width]."""
        for module in self.block:
            x = module(x)
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class Middle(nn.Module):
    """Two residual blocks at the lowest resolution."""

    def __init__(self, channels: int, config: VAEConfig) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, config)
        self.block_2 = ResidualBlock(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, channels, height, width]."""
        return self.block_2(self.block_1(x))


class Encoder(nn.Module):
    """Image to code channels (section 6.3)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        levels = len(config.channel_multipliers)
        widths = [config.base_channels] + [config.level_channels(level) for level in range(levels)]
        self.conv_in = Conv(3, config.base_channels)
        self.down = nn.ModuleList(
            Level(widths[i], widths[i + 1], config.num_residual_blocks, config, downsample=i < levels - 1)
            for i in range(levels)
        )
        self.mid = Middle(widths[-1], config)
        self.norm_out = Norm(widths[-1], config)
        self.conv_out = Conv(widths[-1], config.code_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, 3, height, width] to [batch, bits, height / stride, width / stride]."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Code channels to image (section 6.2)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        levels = len(config.channel_multipliers)
        widths = [config.level_channels(level) for level in range(levels)]
        widths.append(widths[-1])
        self.conv_in = Conv(config.code_dim, widths[-1])
        self.mid = Middle(widths[-1], config)
        self.up = nn.ModuleList(
            Level(widths[i + 1], widths[i], config.num_residual_blocks + 1, config, upsample=i > 0)
            for i in range(levels)
        )
        self.norm_out = Norm(widths[0], config)
        self.conv_out = Conv(widths[0], 3)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, bits, height, width] to [batch, 3, height * stride, width * stride]."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class LookupFreeQuantizer(nn.Module):
    """Only holds the bit weights that published files contain and nothing reads."""

    def __init__(self, code_dim: int) -> None:
        super().__init__()
        self.register_buffer("mask", 2 ** torch.arange(code_dim - 1, -1, -1))


@dataclasses.dataclass
class MultiScaleCodes:
    """An image as bits (section 6.5)."""

    bits: list[Tensor]  # [batch, height, width, bits] of every scale
    next_features: list[Tensor]  # [batch, bits, next height, next width], area-resized sum of the codes
    code_map: Tensor  # [batch, bits, final height, final width], the sum of the resized codes


class BSQVAE(nn.Module):
    """Encoder, decoder and multi-scale quantiser.

    `load_state_dict(strict=True)` takes a published state dict unchanged, with or without the `.conv` / `.norm`
    level in its names.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantizer = nn.ModuleDict({"lfq": LookupFreeQuantizer(config.code_dim)})
        self.quantize = self.quantizer  # published files name it twice
        self.register_load_state_dict_pre_hook(_to_nested_names)

    @torch.no_grad()
    def encode(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch bits rows columns"]:
        """Code channels of an image, not yet quantised."""
        return self.encoder(image)

    @torch.no_grad()
    def decode(self, code_map: Float[Tensor, "batch bits rows columns"]) -> Float[Tensor, "batch 3 height width"]:
        """The image of a code map, clamped to [-1, 1]."""
        return self.decoder(code_map).clamp(-1, 1)


def quantize(features: Float[Tensor, "batch bits rows columns"], schedule: Sequence[Grid]) -> MultiScaleCodes:
    """Bits of every scale, each quantising what the coarser scales left over.

    Args:
      features: encoder output.
      schedule: tokenizer grid of every scale; the last is that of the features.
    """
    residual = features
    code_map = torch.zeros_like(features)
    bits: list[Tensor] = []
    next_features: list[Tensor] = []
    for index, grid in enumerate(schedule):
        scale_bits = area_resize(residual, grid).permute(0, 2, 3, 1) > 0
        codes = resize(bits_to_codes(scale_bits), schedule[-1])
        residual = residual - codes
        code_map = code_map + codes
        bits.append(scale_bits)
        if index + 1 < len(schedule):
            next_features.append(area_resize(code_map, schedule[index + 1]))
    return MultiScaleCodes(bits, next_features, code_map)


def self_correction(
    features: Float[Tensor, "batch bits rows columns"],
    schedule: Sequence[Grid],
    patchify: bool,
    flips: Sequence[Bool[Tensor, "batch _height _width bits"]] | None = None,
) -> tuple[Float[Tensor, "batch tokens_after_first token_bits"], list[Tensor]]:
    """Training inputs and labels of the transformer.

    Args:
      features: encoder output.
      schedule: transformer grid of every scale.
      patchify: whether a token covers 2x2 codes.
      flips: bits that are inverted in what the next scales see, on the tokenizer grid; none where not given.

    Returns:
      The inputs of scales 1 and up, concatenated, and the bits [batch, tokens, token_bits] of every scale.
    """
    grids = tokenizer_schedule(tuple(schedule), patchify)
    residual = features
    code_map = torch.zeros_like(features)
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    for index, grid in enumerate(grids):
        bits = area_resize(residual, grid).permute(0, 2, 3, 1) > 0
        labels.append(_to_tokens(bits.permute(0, 3, 1, 2).float(), patchify).long())
        codes = resize(bits_to_codes(bits if flips is None else bits ^ flips[index]), grids[-1])
        residual = residual - codes
        code_map = code_map + codes
        if index + 1 < len(grids):
            inputs.append(_to_tokens(resize(code_map, grids[index + 1]), patchify))
    return torch.cat(inputs, dim=1), labels


def to_uint8(image: Float[Tensor, "batch 3 height width"]) -> UInt8[Tensor, "batch height width 3"]:
    """RGB pixels of an image in [-1, 1]; values are truncated, not rounded."""
    return ((image + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1)


def _to_tokens(x: Tensor, patchify: bool) -> Tensor:
    return (functional.pixel_unshuffle(x, 2) if patchify else x).flatten(2).transpose(1, 2)


def _to_nested_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {prefix + name: value for name, value in module.state_dict().items()}
    for name in [name for name in state_dict if name not in own]:
        path, kind = name.rsplit(".", 1)
        for level in ("conv", "norm"):
            if f"{path}.{level}.{kind}" in own:
                state_dict[f"{path}.{level}.{kind}"] = state_dict.pop(name)
    for name, value in own.items():
        if name.endswith("lfq.mask"):
            state_dict.setdefault(name, value)
