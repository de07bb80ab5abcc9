"""The golden files as cases: what goes into a model, and every array that has to come out.

Needs numpy only, so that the tests of the JAX port run without torch. A loader takes the inputs of a file out by
name; whatever remains is expected output, and `assert_matches` demands a computed value for each of them. So no
stored array can be forgotten.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from toprovar_jax.config import InfinityConfig, VAEConfig
from toprovar_jax.schedule import Grid, ScaleSchedule, rope_grid

GOLDEN = Path(__file__).parent.parent / "golden"
TOLERANCE = 1e-4
# Difference between a float32 model and the stored runs of the official one with bfloat16 inside, when the stored
# bits are fed forward: rounding to 8 bits of mantissa through four blocks, on values of order 1 to 10.
BFLOAT16_TOLERANCE = 0.05

Arrays = dict[str, np.ndarray]

VAE_CONFIG = VAEConfig(code_dim=16, base_channels=32, channel_multipliers=(1, 2, 2), num_residual_blocks=1)
VAE_SCHEDULE = tuple(Grid(side, side) for side in (1, 2, 4, 6, 8))
VAE_PATCHIFY_SCHEDULE = tuple(Grid(side, side) for side in (1, 2, 4, 6))


def load(name: str) -> Arrays:
    """All arrays of tests/golden/{name}.npz."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def take(arrays: Arrays, prefix: str) -> Arrays:
    """Removes the entries that start with the prefix and returns them without it."""
    return {key.removeprefix(prefix): arrays.pop(key) for key in list(arrays) if key.startswith(prefix)}


def take_matching(arrays: Arrays, suffix: str) -> Arrays:
    """Removes the entries that end with the suffix and returns them without it."""
    return {key.removesuffix(suffix): arrays.pop(key) for key in list(arrays) if key.endswith(suffix)}


@dataclasses.dataclass(frozen=True)
class Run:
    """One stored generation: the model, its inputs, and `expected`, every stored result by its key."""

    name: str
    config: InfinityConfig
    state: Arrays
    text_features: list[np.ndarray]
    negative_text_features: list[np.ndarray] | None
    schedule: ScaleSchedule
    rope_grid: Grid
    guidance_scale: tuple[float, ...]
    temperature: tuple[float, ...]
    top_k: int
    top_p: float
    guidance_layer: int | None
    draws: list[np.ndarray] | None
    expected: Arrays

    @property
    def batch(self) -> int:
        """Number of images."""
        return len(self.text_features)

    def stored_bits(self) -> list[np.ndarray]:
        """Bits of every scale, [batch, 1, height, width, bits]."""
        return [self.expected[f"s{index}.bits"] for index in range(len(self.schedule))]


def _config(description: dict, level_embedding_per_chunk: bool) -> InfinityConfig:
    patchify = bool(description["apply_spatial_patchify"])
    config = InfinityConfig(
        depth=description["depth"],
        embed_dim=description["C"],
        num_heads=description["heads"],
        mlp_dim=4 * description["C"],
        code_dim=description["d_vae_tokenizer" if patchify else "d_vae"],
        patchify=patchify,
        num_chunks=description["block_chunks"],
        level_embedding_per_chunk=level_embedding_per_chunk,
        rope_mode=description["rope2d_normalized_by_hw"],
        text_channels=description["Ct5"],
        text_max_length=description["text_maxlen"],
    )
    assert config.head_dim == description["head_dim"]
    assert 2 * config.token_bits == description["V"]
    return config


def load_state(level_embedding_per_chunk: bool = False) -> tuple[InfinityConfig, Arrays]:
    """Configuration and state dict shared by all runs but the patchified one."""
    arrays = load("infinity_tiny_state")
    state = take(arrays, "sd/")
    description = json.loads(bytes(arrays.pop("config_json")))
    assert not arrays
    return _config(description, level_embedding_per_chunk), state


def _split(features: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    return np.split(features, np.cumsum(lengths)[:-1])


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What the description of a file says beyond its arrays."""

    sides: tuple[int, ...] = (1, 2, 4, 6)
    guidance_scale: float | tuple[float, ...] = 4.0
    temperature: float | tuple[float, ...] = 0.5
    top_k: int = 1
    top_p: float = 0.0
    aspect_ratio: float = 1.0
    guidance_layer: int | None = None
    level_embedding_per_chunk: bool = False


_SETTINGS = {
    "infinity_tiny_cfg4_greedy": _Settings(sides=(1, 2, 4, 6, 8)),
    "infinity_tiny_cfg1_greedy": _Settings(sides=(1, 2, 4, 6, 8), guidance_scale=1.0),
    "infinity_tiny_b2_sampled": _Settings(
        guidance_scale=(1.0, 3.0, 1.0, 5.0), temperature=(1.0, 0.5, 0.7, 0.9), top_k=900, top_p=0.97
    ),
    "infinity_tiny_negprompt": _Settings(guidance_scale=3.0),
    "infinity_tiny_insertion_m2": _Settings(guidance_scale=3.0, guidance_layer=-2),
    "infinity_tiny_lvl_every_chunk": _Settings(level_embedding_per_chunk=True),
    "infinity_tiny_nonsquare": _Settings(aspect_ratio=0.75),
    "infinity_tiny_patchify": _Settings(guidance_scale=3.0),
    "infinity_tiny_cfg4_bf16cross": _Settings(),
    "infinity_tiny_cfg4_amp_emulated": _Settings(),
}
BFLOAT16_RUNS = ("infinity_tiny_cfg4_bf16cross", "infinity_tiny_cfg4_amp_emulated")
FLOAT32_RUNS = tuple(name for name in _SETTINGS if name not in BFLOAT16_RUNS)


def load_run(name: str) -> Run:
    """A stored generation by the name of its file."""
    settings = _SETTINGS[name]
    arrays = load(name)
    schedule = tuple(Grid(side, side) for side in settings.sides)
    if "sched" in arrays:
        schedule = tuple(Grid(int(height), int(width)) for _, height, width in arrays.pop("sched"))
    own_state = take(arrays, "sd/")
    if own_state:
        description = json.loads(bytes(arrays.pop("config_json")))
        assert [[1, *grid] for grid in schedule] == description["schedule"]
        config, state = _config(description, settings.level_embedding_per_chunk), own_state
    else:
        config, state = load_state(settings.level_embedding_per_chunk)
    features = arrays.pop("in.text_features")
    lengths = arrays.pop("in.lens") if "in.lens" in arrays else np.array([len(features)])
    negative = arrays.pop("in.neg_features") if "in.neg_features" in arrays else None
    draws = take_matching(arrays, ".exp_draws")

    def per_scale(value: float | tuple[float, ...]) -> tuple[float, ...]:
        return value if isinstance(value, tuple) else (value,) * len(schedule)

    return Run(
        name=name,
        config=config,
        state=state,
        text_features=_split(features, lengths),
        negative_text_features=None if negative is None else [negative],
        schedule=schedule,
        rope_grid=rope_grid(settings.aspect_ratio),
        guidance_scale=per_scale(settings.guidance_scale),
        temperature=per_scale(settings.temperature),
        top_k=settings.top_k,
        top_p=settings.top_p,
        guidance_layer=settings.guidance_layer,
        draws=[draws[f"s{index}"] for index in range(len(schedule))] if draws else None,
        expected=arrays,
    )


def assert_matches(
    expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray], tolerance: float = TOLERANCE
) -> None:
    """Every expected array has a computed one: integers equal, floats close, 8-bit images nearly equal.

    Floats may differ by `tolerance`, absolutely or, where the expected value is above 1, relatively. Of an image's
    values 99.9 % must be equal and the rest differ by 1.
    """
    assert expected, "a golden file without expected arrays proves nothing"
    for key, value in expected.items():
        assert key in actual, f"nobody computes {key}"
        computed = np.asarray(actual[key])
        assert computed.shape == value.shape, f"{key}: {computed.shape} instead of {value.shape}"
        if key.startswith("image_uint8"):
            difference = np.abs(computed.astype(int) - value.astype(int))
            assert difference.max() <= 1, f"{key}: off by {difference.max()}"
            assert (difference == 0).mean() >= 0.999, f"{key}: {(difference != 0).mean():.4%} of the values differ"
        elif np.issubdtype(value.dtype, np.integer):
            wrong = int((computed != value).sum())
            assert wrong == 0, f"{key}: {wrong} of {value.size} differ"
        else:
            error = relative_error(computed, value)
            assert error <= tolerance, f"{key}: error {error:.2e}"


def assert_matches_bfloat16(run: Run, actual: Mapping[str, np.ndarray], tolerance: float) -> None:
    """A stored run with bfloat16 inside against results of a run that its stored bits were fed forward in.

    Floats are compared as in `assert_matches`. Rounding may flip bits whose two values are nearly equally likely:
    2 % may differ. The stored bits must be what the stored logits choose.
    """
    bits = take_matching(dict(run.expected), ".bits")
    assert_matches(
        {key: value for key, value in run.expected.items() if not key.endswith(".bits")}, actual, tolerance
    )
    for scale, stored in bits.items():
        conditional, unconditional = run.expected[f"{scale}.logits_raw"].reshape(2, -1, 2)
        guidance = run.guidance_scale[0]
        guided = guidance * conditional + (1 - guidance) * unconditional
        np.testing.assert_array_equal(guided.argmax(-1), stored.ravel())
        wrong = int((actual[f"{scale}.bits"] != stored).sum())
        assert wrong <= 0.02 * stored.size, f"{scale}.bits: {wrong} of {stored.size} differ"


def relative_error(computed: np.ndarray, expected: np.ndarray) -> float:
    """Worst difference, absolute or, where the expected value is above 1, relative to it."""
    computed = np.asarray(computed, np.float64)
    assert np.isfinite(computed).all(), "not finite"
    return float(np.max(np.abs(computed - expected) / np.maximum(1, np.abs(expected))))


@dataclasses.dataclass(frozen=True)
class SamplingCase:
    """Logits, filters, and the probabilities and classes that come out."""

    name: str
    logits: np.ndarray  # [1, rows, classes]
    draws: np.ndarray  # [rows, classes]
    top_k: int
    top_p: float
    expected: Arrays  # probs [rows, classes], idx [rows]


def sampling_cases() -> list[SamplingCase]:
    """Everything in sampling.npz."""
    arrays = load("sampling")
    cases = []
    for kind in ("bit", "v16"):
        logits, draws = arrays.pop(f"{kind}.logits"), arrays.pop(f"{kind}.exp_draws")
        for setting in [key.split(".", 1)[1].removesuffix(".probs") for key in arrays if key.startswith(kind)]:
            if not setting.endswith(".idx"):
                top_k, top_p = setting.removeprefix("k").split("_p")
                expected = take(arrays, f"{kind}.{setting}.")
                cases.append(SamplingCase(f"{kind}.{setting}", logits, draws, int(top_k), float(top_p), expected))
    assert not arrays, f"unknown keys {sorted(arrays)}"
    return cases


@dataclasses.dataclass(frozen=True)
class RopeTable:
    """Rows of the table of all tokens of a ratio's 1M schedule."""

    mode: Literal[0, 1, 2]
    aspect_ratio: float
    rows: np.ndarray  # token positions
    expected: Arrays  # cos and sin [rows, head_dim / 2], padded_len


@dataclasses.dataclass(frozen=True)
class RopeGolden:
    """Everything in rope2d.npz."""

    head_dim: int
    tables: list[RopeTable]
    grid_indices: dict[float, np.ndarray]  # ratio -> [tokens, 2], mode 2
    query: np.ndarray  # [batch, heads, tokens, head_dim], as the next two
    key: np.ndarray
    expected_query: np.ndarray
    expected_key: np.ndarray
    scale: int  # of the ratio 1.0 1M schedule, which the queries and keys belong to


def rope_golden() -> RopeGolden:
    """Everything in rope2d.npz."""
    arrays = load("rope2d")
    tables = []
    for mode in (0, 1, 2):
        for ratio in ("1.0", "0.75"):
            entries = {key: arrays.pop(f"mode{mode}.ratio{ratio}.{key}") for key in ("cos", "sin", "padded_len")}
            rows = arrays.pop(f"mode{mode}.ratio{ratio}.rows")
            tables.append(RopeTable(mode, float(ratio), rows, entries))
    application = take(arrays, "apply.")
    indices = take(take_matching(arrays, ".yx_index"), "mode2.ratio")
    assert not arrays, f"unknown keys {sorted(arrays)}"
    golden = RopeGolden(
        head_dim=application["q_in"].shape[-1],
        tables=tables,
        grid_indices={float(ratio): value for ratio, value in indices.items()},
        query=application.pop("q_in"),
        key=application.pop("k_in"),
        expected_query=application.pop("q_out"),
        expected_key=application.pop("k_out"),
        scale=int(application.pop("scale_ind")),
    )
    assert not application, f"unknown keys {sorted(application)}"
    return golden


@dataclasses.dataclass(frozen=True)
class ResizeCase:
    """One resize of the common input."""

    kind: Literal["trilinear", "area"]
    grid: tuple[int, int]
    expected: np.ndarray  # [1, channels, 1, height, width]


def resize_cases() -> tuple[np.ndarray, list[ResizeCase], np.ndarray, np.ndarray]:
    """Everything in interp_primitives.npz: the map to resize, the cases, a packed map and its pixel shuffle."""
    arrays = load("interp_primitives")
    image, packed, shuffled = arrays.pop("in"), arrays.pop("ps.in"), arrays.pop("ps.pixel_shuffle2")
    np.testing.assert_array_equal(arrays.pop("pu.pixel_unshuffle2_of_shuffled"), packed)
    cases = []
    for kind in ("trilinear", "area"):
        for grid, expected in take(arrays, f"{kind}.").items():
            height, width = grid.split("x")
            cases.append(ResizeCase(kind, (int(height), int(width)), expected))
    assert not arrays, f"unknown keys {sorted(arrays)}"
    return image, cases, packed, shuffled


@dataclasses.dataclass(frozen=True)
class VAEGolden:
    """Everything in vae_tiny_state.npz and vae_tiny_io.npz; `expected` holds what has to be computed."""

    state: Arrays
    decoder_bits: list[np.ndarray]  # [1, 1, height, width, bits] of every scale
    image: np.ndarray  # [1, 3, height, width], for the encoder
    patchify_features: np.ndarray  # [1, bits, height, width], encoder output for self-correction with patchify
    expected: Arrays


def vae_golden() -> VAEGolden:
    """Everything in vae_tiny_state.npz and vae_tiny_io.npz."""
    state, arrays = load("vae_tiny_state"), load("vae_tiny_io")
    return VAEGolden(
        state=take(state, "sd/"),
        decoder_bits=[arrays.pop(f"dec.bits{index}.bits") for index in range(len(VAE_SCHEDULE))],
        image=arrays.pop("enc.image"),
        patchify_features=arrays.pop("bsc.patchify.h"),
        expected=arrays,
    )
