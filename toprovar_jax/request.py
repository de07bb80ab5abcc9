"""What a call of the pipeline asks for, checked and filled with the checkpoint's defaults.

Arguments come here as the caller gave them, which may be anything, and leave as what the library relies on.
"""

import dataclasses
import math
import operator
import warnings
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Float32, UInt8, UInt32

from toprovar_jax.config import CheckpointConfig
from toprovar_jax.errors import InputError
from toprovar_jax.schedule import (
    ASPECT_RATIOS,
    PIXEL_BUDGETS,
    Grid,
    ScaleSchedule,
    rope_grid,
    scale_schedule,
    tokenizer_schedule,
)

OUTPUT_TYPES = ("pil", "np", "latent")

# What callers may pass: numbers of Python, numpy or jax, alone or in lists, tuples or arrays.
Numbers = ArrayLike | Sequence[ArrayLike]
GridLike = Sequence[SupportsIndex] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Grids of a run.

    Attributes:
      schedule: token grids.
      rope_grid: grid that positions refer to.
    """

    schedule: ScaleSchedule
    rope_grid: Grid


@dataclasses.dataclass(frozen=True)
class ScaleSettings:
    """Guidance and sampling, one value per scale each."""

    guidance_scale: tuple[float, ...]
    temperature: tuple[float, ...]
    top_k: tuple[int, ...]
    top_p: tuple[float, ...]

    @property
    def guided(self) -> bool:
        """Whether any scale needs unconditional rows."""
        return any(scale != 1 for scale in self.guidance_scale)


def image_size(config: CheckpointConfig, schedule: ScaleSchedule) -> tuple[int, int]:
    """Height and width in pixels of what a schedule generates."""
    height, width = tokenizer_schedule(schedule, config.transformer.patchify)[-1]
    return height * config.vae.stride, width * config.vae.stride


def resolve_geometry(
    config: CheckpointConfig,
    *,
    height: Any,
    width: Any,
    aspect_ratio: Any,
    pixels: Any,
    schedule: Any,
    rope: Any,
) -> Geometry:
    """Chooses the grids.

    Height and width choose the nearest aspect ratio and, where `pixels` names none, the budget nearest in area;
    an explicit schedule replaces both.

    Raises:
      InputError: the arguments contradict each other or name something that does not exist.
    """
    if aspect_ratio is not None:
        aspect_ratio = _ratio(aspect_ratio)
    if (height is None) != (width is None):
        raise InputError("height and width belong together: pass both, or aspect_ratio instead")
    if height is not None and width is not None:
        if aspect_ratio is not None:
            raise InputError("aspect_ratio contradicts height and width: pass one or the other")
        if min(_whole_number(height), _whole_number(width)) < 1:
            raise InputError(f"height and width must be positive whole numbers, got {height!r} and {width!r}")
        aspect_ratio = height / width
    if schedule is not None:
        return _explicit_geometry(config, schedule, aspect_ratio, rope)
    ratio = 1.0 if aspect_ratio is None else aspect_ratio
    if not 0.25 <= ratio <= 4:
        raise InputError(
            f"no aspect ratio near {ratio:g} (height / width): choose one from {min(ASPECT_RATIOS)} to "
            f"{max(ASPECT_RATIOS)}"
        )
    if pixels is None:
        pixels = config.defaults.pixels
        if height is not None and width is not None:
            pixels = _nearest_budget(config, ratio, height * width)
    chosen = scale_schedule(ratio, pixels)
    if pixels not in (known := _known_budgets(config)):
        raise InputError(
            f"{pixels} has {len(chosen)} scales but the model knows {config.transformer.max_scales}: choose one "
            f"of {', '.join(known)}"
        )
    size = image_size(config, chosen)
    if height is not None and size != (height, width):
        warnings.warn(
            f"generating {size[0]}x{size[1]} (height x width), the nearest size to {height}x{width}", stacklevel=3
        )
    return Geometry(chosen, rope_grid(ratio) if rope is None else _grid(rope))


def _explicit_geometry(config: CheckpointConfig, schedule: Any, aspect_ratio: float | None, rope: Any) -> Geometry:
    try:
        grids = tuple(_grid(pair) for pair in schedule)
    except TypeError:
        raise InputError(f"scale_schedule must be a list of grids (height, width), got {schedule!r}") from None
    if not grids or grids[0] != (1, 1):
        raise InputError("scale_schedule must start with the grid (1, 1), which holds the text's token")
    if len(grids) > config.transformer.max_scales:
        raise InputError(
            f"scale_schedule has {len(grids)} scales but the model knows {config.transformer.max_scales}"
        )
    ratio = grids[-1].height / grids[-1].width if aspect_ratio is None else aspect_ratio
    return Geometry(grids, rope_grid(ratio) if rope is None else _grid(rope))


def _ratio(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(
            f"aspect_ratio must be height / width as a number, 1.0 for a square, got {value!r}"
        ) from None


def _whole_number(value: Any) -> int:
    """The value, or 0 where it is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        return 0


def _grid(pair: Any) -> Grid:
    try:
        height, width = map(_whole_number, pair)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise InputError(f"a grid is a pair of positive whole sides (height, width), got {pair!r}")
    return Grid(height, width)


def _nearest_budget(config: CheckpointConfig, ratio: float, area: int) -> str:
    def distance(pixels: str) -> float:
        return abs(math.log(math.prod(image_size(config, scale_schedule(ratio, pixels))) / area))

    return min(_known_budgets(config), key=distance)


def _known_budgets(config: CheckpointConfig) -> list[str]:
    return [name for name, num_scales in PIXEL_BUDGETS.items() if num_scales <= config.transformer.max_scales]


def resolve_settings(
    config: CheckpointConfig,
    num_scales: int,
    *,
    guidance_scale: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
) -> ScaleSettings:
    """Repeats scalars for every scale and fills in the checkpoint's defaults.

    Raises:
      InputError: a value is out of range, or a sequence has not one value per scale.
    """
    defaults = config.defaults

    def per_scale(name: str, value: Any, default: float | int) -> tuple[float, ...]:
        if value is None:
            return (float(default),) * num_scales
        try:
            values = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            values = np.empty((0, 0))
        if values.ndim == 0:
            values = np.full(num_scales, values)
        if values.shape != (num_scales,):
            raise InputError(f"{name} must be one number or {num_scales} of them, one per scale; got {value!r}")
        if not np.isfinite(values).all():
            raise InputError(f"{name} must be finite, got {value!r}")
        return tuple(float(v) for v in values)

    counts = per_scale("top_k", top_k, defaults.top_k)
    if min(counts) < 0 or any(count % 1 for count in counts):
        raise InputError(f"top_k must be 0 (off) or a positive whole number, got {top_k!r}")
    settings = ScaleSettings(
        guidance_scale=per_scale("guidance_scale", guidance_scale, defaults.guidance_scale),
        temperature=per_scale("temperature", temperature, defaults.temperature),
        top_k=tuple(map(int, counts)),
        top_p=per_scale("top_p", top_p, defaults.top_p),
    )
    if min(settings.temperature) <= 0:
        raise InputError(f"temperature must be above 0, got {temperature!r}: use top_k=1 for greedy sampling")
    if not all(0 <= value <= 1 for value in settings.top_p):
        raise InputError(f"top_p must lie between 0 (off) and 1, got {top_p!r}")
    return settings


def resolve_seeds(seed: Any, num_images: int) -> UInt32[np.ndarray, "batch"]:
    """One seed per image, uint32: `seed` + i, or those given.

    Raises:
      InputError: the number of seeds is wrong, or one is no whole number of 32 bits.
    """
    values = np.asarray(seed, dtype=object)
    try:
        given = [operator.index(value) for value in np.atleast_1d(values)]
    except TypeError:
        raise InputError(f"seeds must be whole numbers, got {seed!r}") from None
    seeds = [given[0] + i for i in range(num_images)] if values.ndim == 0 else given
    if len(seeds) != num_images:
        raise InputError(f"got {len(seeds)} seeds for {num_images} images: pass one number or one seed per image")
    if not all(0 <= s < 2**32 for s in seeds):
        raise InputError(f"seeds must lie between 0 and 2**32 - 1, got {seed!r}")
    return np.asarray(seeds, dtype=np.uint32)


def resolve_guidance_layer(config: CheckpointConfig, guidance_layer: Any) -> int:
    """0 for guidance on the logits, else a negative index of a block counted from the end.

    Raises:
      InputError: there is no such block.
    """
    depth = config.transformer.depth
    if guidance_layer is None:
        return 0
    try:
        layer = operator.index(guidance_layer)
    except TypeError:
        layer = 1  # which is none
    if layer not in range(1 - depth, 1):
        raise InputError(
            f"guidance_layer must be 0 (on the logits) or from {1 - depth} to -1 (after that block, counted from "
            f"the end), got {guidance_layer!r}"
        )
    return layer


def resolve_count(name: str, value: Any) -> int:
    """A number of things.

    Raises:
      InputError: it is no whole number or below 1.
    """
    if (count := _whole_number(value)) < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    return count


def resolve_texts(name: str, value: Any) -> list[str]:
    """One text, or several.

    Raises:
      InputError: there is none, or something else among them.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name} must be a text or a list of texts, got {value!r}")
    if not texts:
        raise InputError(f"{name} is an empty list: pass at least one text")
    return list(texts)


def float_array(name: str, value: Any) -> Float32[np.ndarray, "..."]:
    """An array on the host.

    Raises:
      InputError: the value is no array of numbers, as lists of unequal lengths are none.
    """
    try:
        return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be an array of numbers, got {type(value).__name__}") from None


def _per_scale_arrays(name: str, values: Any, num_scales: int) -> list[Any]:
    try:
        given = [] if values is None else list(values)
    except TypeError:
        raise InputError(f"{name} must be a list of arrays, one per scale, got {values!r}") from None
    if len(given) > num_scales:
        raise InputError(f"{name} has {len(given)} entries for {num_scales} scales: pass at most one per scale")
    return given + [None] * (num_scales - len(given))


def resolve_forced_bits(
    forced_bits: Any, code_grids: ScaleSchedule, num_images: int, code_dim: int
) -> tuple[UInt8[np.ndarray, "batch _height _width code_dim"] | None, ...]:
    """Bits to go on with, one entry per scale; None leaves a scale free.

    Raises:
      InputError: an entry has the wrong shape or other values than 0 and 1.
    """
    entries = _per_scale_arrays("forced_bits", forced_bits, len(code_grids))
    resolved: list[np.ndarray | None] = []
    for scale, (entry, grid) in enumerate(zip(entries, code_grids, strict=True)):
        if entry is None:
            resolved.append(None)
            continue
        bits = float_array(f"forced_bits[{scale}]", entry)
        if bits.ndim == 5 and bits.shape[1] == 1:
            bits = bits[:, 0]
        shape = (num_images, *grid, code_dim)
        if bits.shape != shape:
            raise InputError(f"forced_bits[{scale}] must have the shape {list(shape)}, got {list(bits.shape)}")
        if not np.isin(bits, (0, 1)).all():
            raise InputError(f"forced_bits[{scale}] holds other values than 0 and 1")
        resolved.append(bits.astype(np.uint8))
    return tuple(resolved)


def resolve_draws(
    draws: Any, schedule: ScaleSchedule, num_images: int, token_bits: int
) -> tuple[Float[np.ndarray, "batch _tokens bits 2"] | None, ...]:
    """Exp(1) draws, one entry per scale; None leaves a scale to its seed.

    Raises:
      InputError: an entry has another shape or a negative value.
    """
    entries = _per_scale_arrays("sampling_draws", draws, len(schedule))
    resolved: list[np.ndarray | None] = []
    for scale, (entry, grid) in enumerate(zip(entries, schedule, strict=True)):
        if entry is None:
            resolved.append(None)
            continue
        values = float_array(f"sampling_draws[{scale}]", entry)
        shape = (num_images, grid.size, token_bits, 2)
        if values.shape not in (shape, (num_images, math.prod(shape[1:3]), 2), (math.prod(shape[:3]), 2)):
            raise InputError(
                f"sampling_draws[{scale}] must have the shape {list(shape)}, got {list(values.shape)}"
            )
        if not (values >= 0).all():
            raise InputError(f"sampling_draws[{scale}] must hold Exp(1) draws, which are never negative")
        resolved.append(values.reshape(shape))
    return tuple(resolved)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises InputError where a value is not one of the choices."""
    if value not in choices:
        raise InputError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
