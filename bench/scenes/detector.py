"""The detector that scores pictures: finds every object with its noun, colour, place and size.

A small convolutional network gives, for every cell of a stride-8 map, how likely an object's centre is there and
what the object would be. It is trained on rendered scenes alone; its weights are in `trained/`.
"""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, UInt8

from bench.scenes import weights, world
from toprovar_jax.models.skeleton import Parameters, abstract_parameters, bind
from toprovar_jax.precision import matmul_precision

WEIGHTS_PATH = pathlib.Path(__file__).parent / "trained" / "detector.safetensors"
MIN_CONFIDENCE = 0.4
_MAX_DETECTIONS = 8
_NUM_GROUPS = 8
_BATCH = 32


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """Channels of the maps at stride 2, 4, 8 and 16; the last also serves at stride 32."""

    channels: tuple[int, int, int, int] = (24, 48, 96, 112)


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object found in a picture; places and radius as in `world`, confidence from 0 to 1."""

    noun: str
    color: str
    x: float
    y: float
    radius: float
    confidence: float


class DetectorOutput(NamedTuple):
    """Maps of a batch of pictures, float32.

    Attributes:
      center: logit of an object's centre lying in the cell.
      noun: logits over `world.NOUNS`.
      color: logits over `world.COLORS`.
      log_radius: natural logarithm of the object's radius.
    """

    center: Float[Array, "batch rows columns"]
    noun: Float[Array, "batch rows columns nouns"]
    color: Float[Array, "batch rows columns colors"]
    log_radius: Float[Array, "batch rows columns"]


def _conv(inputs: int, outputs: int, size: int, stride: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=stride,
        dtype=dtype,
        param_dtype=dtype,
        precision=matmul_precision(dtype),
        rngs=rngs,
    )


class _Residual(nnx.Module):
    def __init__(self, channels: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = nnx.GroupNorm(channels, _NUM_GROUPS, dtype=jnp.float32, rngs=rngs)
        self.conv1 = _conv(channels, channels, 3, 1, dtype, rngs)
        self.norm2 = nnx.GroupNorm(channels, _NUM_GROUPS, dtype=jnp.float32, rngs=rngs)
        self.conv2 = _conv(channels, channels, 3, 1, dtype, rngs)

    def __call__(self, x: Array) -> Array:
        return x + self.conv2(nnx.silu(self.norm2(self.conv1(nnx.silu(self.norm1(x))))))


class _Level(nnx.Module):
    def __init__(self, inputs: int, outputs: int, num_blocks: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.downsample = _conv(inputs, outputs, 3, 2, dtype, rngs)
        self.blocks = nnx.List([_Residual(outputs, dtype, rngs) for _ in range(num_blocks)])

    def __call__(self, x: Array) -> Array:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class Detector(nnx.Module):
    """The network; images are RGB in [-1, 1] with sides divisible by 32."""

    def __init__(self, config: DetectorConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        stem, quarter, eighth, deep = config.channels
        self.stem = _conv(3, stem, 5, 2, dtype, rngs)
        self.quarter = _Level(stem, quarter, 1, dtype, rngs)
        self.eighth = _Level(quarter, eighth, 2, dtype, rngs)
        self.sixteenth = _Level(eighth, deep, 1, dtype, rngs)
        self.bottom = _Level(deep, deep, 1, dtype, rngs)
        self.from_bottom = _conv(deep, deep, 1, 1, dtype, rngs)
        self.from_sixteenth = _conv(deep, eighth, 1, 1, dtype, rngs)
        self.merged = _Residual(eighth, dtype, rngs)
        self.norm_out = nnx.GroupNorm(eighth, _NUM_GROUPS, dtype=jnp.float32, rngs=rngs)
        outputs = 2 + len(world.NOUNS) + len(world.COLORS)
        self.head = _conv(eighth, outputs, 1, 1, jnp.float32, rngs)

    def features(self, images: Float[Array, "batch height width 3"]) -> tuple[Array, Array]:
        """The first two maps, for a feature loss: edges and textures, not yet objects."""
        stem = nnx.silu(self.stem(images))
        return stem, self.quarter(stem)

    def __call__(self, images: Float[Array, "batch height width 3"]) -> DetectorOutput:
        eighth = self.eighth(self.features(images)[1])
        sixteenth = self.sixteenth(eighth)
        sixteenth = sixteenth + _double(self.from_bottom(self.bottom(sixteenth)))
        merged = self.merged(eighth + _double(self.from_sixteenth(sixteenth)))
        maps = self.head(nnx.silu(self.norm_out(merged)))
        noun_end = 2 + len(world.NOUNS)
        return DetectorOutput(maps[..., 0], maps[..., 2:noun_end], maps[..., noun_end:], maps[..., 1])


def _double(x: Array) -> Array:
    return x.repeat(2, axis=1).repeat(2, axis=2)


CONFIG = DetectorConfig()


def detect(
    parameters: Parameters,
    images: Float[np.ndarray, "batch height width 3"] | UInt8[np.ndarray, "batch height width 3"],
) -> list[list[Detection]]:
    """Objects of every picture, the most confident first.

    Args:
      parameters: of `CONFIG`'s detector, as `load_weights` returns them.
      images: RGB, with values in [-1, 1] or in bytes.
    """
    found: list[list[Detection]] = []
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        # One compiled shape: the last batch is filled up.
        filled = np.concatenate([batch, np.zeros((_BATCH - len(batch), *batch.shape[1:]), batch.dtype)])
        peaks = jax.device_get(_peaks(parameters, filled))
        found += [_detections(jax.tree.map(lambda x, row=row: x[row], peaks)) for row in range(len(batch))]
    return found


@jax.jit
def _peaks(parameters: Parameters, images: Array) -> dict[str, Array]:
    """The most confident local maxima of every picture, [batch, _MAX_DETECTIONS]."""
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 127.5 - 1
    output = bind(Detector, CONFIG, jnp.float32, parameters)(images)
    confidence = jax.nn.sigmoid(output.center)
    batch, rows, columns = confidence.shape
    neighbourhood = jax.lax.reduce_window(confidence, -jnp.inf, jax.lax.max, (1, 5, 5), (1, 1, 1), "SAME")
    peaks = jnp.where(confidence == neighbourhood, confidence, 0).reshape(batch, rows * columns)
    best, cell = jax.lax.top_k(peaks, _MAX_DETECTIONS)

    def at_cell(values: Array) -> Array:
        return jnp.take_along_axis(values.reshape(batch, rows * columns), cell, axis=1)

    return {
        "confidence": best,
        "x": (cell % columns + 0.5) / columns * 2 - 1,
        "y": (cell // columns + 0.5) / rows * 2 - 1,
        "radius": jnp.exp(at_cell(output.log_radius)),
        "noun": at_cell(output.noun.argmax(-1)),
        "color": at_cell(output.color.argmax(-1)),
    }


def _detections(peaks: dict[str, np.ndarray]) -> list[Detection]:
    return [
        Detection(
            noun=world.NOUNS[peaks["noun"][index]],
            color=world.COLORS[peaks["color"][index]],
            **{name: float(peaks[name][index]) for name in ("x", "y", "radius", "confidence")},
        )
        for index in range(len(peaks["confidence"]))
        if peaks["confidence"][index] >= MIN_CONFIDENCE
    ]


@functools.cache
def load_weights(path: pathlib.Path = WEIGHTS_PATH) -> Parameters:
    """The parameters of `CONFIG`'s detector, float32."""
    return weights.load_parameters(path, abstract_parameters(Detector, CONFIG, jnp.float32))
