"""The JAX port against the PyTorch reference on random small models, schedules, guidance and batches."""

import dataclasses

import hypothesis
import numpy as np
import torch
from hypothesis import strategies as st

from convert.reference.infinity import Infinity
from tests.reference import golden
from tests.reference.golden import Arrays, Run
from tests.reference.jax_run import run_jax
from tests.reference.torch_run import run_reference
from toprovar_jax.config import InfinityConfig
from toprovar_jax.schedule import Grid, ScaleSchedule, tokenizer_schedule


@st.composite
def configs(draw: st.DrawFn) -> InfinityConfig:
    num_chunks, chunk_size = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 1), (2, 2)]))
    text_channels = draw(st.sampled_from([128, 256]))
    return InfinityConfig(
        depth=num_chunks * chunk_size,
        embed_dim=draw(st.sampled_from([8, 16, 24])) * (heads := draw(st.integers(1, 4))),
        num_heads=heads,
        mlp_dim=draw(st.sampled_from([16, 40])),
        code_dim=draw(st.integers(1, 5)),
        patchify=draw(st.booleans()),
        num_chunks=num_chunks,
        level_embedding_per_chunk=draw(st.booleans()),
        rope_mode=draw(st.sampled_from([0, 1, 2])),
        text_channels=text_channels,
        text_max_length=8,
        max_scales=5,
    )


def random_state(config: InfinityConfig, random: np.random.Generator) -> Arrays:
    """Weights of a size that keeps activations near 1, under the official names."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Infinity(config).state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        value = random.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.5)
        if name.endswith("zero_k_bias"):
            value = np.zeros(shape)
        elif name.endswith("scale_mul_1H11"):
            # Some beyond the bound ln 100 that the model clamps at.
            value = random.uniform(0, 6, shape)
        state[name] = value.astype(np.float32)
    return state


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What distinguishes one run from another; the seed makes all of its arrays."""

    config: InfinityConfig
    schedule: ScaleSchedule
    rope_grid: Grid
    guidance_scale: tuple[float, ...]
    guidance_layer: int | None
    temperature: tuple[float, ...]
    top_k: int
    top_p: float
    text_lengths: list[int]
    negative_lengths: list[int] | None
    seed: int


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    config = draw(configs())
    grids = st.builds(Grid, st.integers(1, 5), st.integers(1, 5))
    schedule = (Grid(1, 1), *draw(st.lists(grids, min_size=1, max_size=2)))
    batch = draw(st.integers(1, 3))
    lengths = st.lists(st.integers(1, 8), min_size=batch, max_size=batch)
    kind = draw(st.sampled_from(["none", "logits", "layers"]) if config.depth > 1 else st.just("logits"))
    earlier_scales = st.tuples(*[st.sampled_from([1.0, 3.0, 7.5])] * (len(schedule) - 1))
    return Scenario(
        config=config,
        schedule=schedule,
        rope_grid=draw(st.sampled_from([Grid(64, 64), Grid(54, 72), Grid(111, 37)])),
        guidance_scale=(1.0,) * len(schedule) if kind == "none" else (*draw(earlier_scales), 2.5),
        guidance_layer=draw(st.integers(1 - config.depth, -1)) if kind == "layers" else None,
        temperature=draw(st.tuples(*[st.sampled_from([0.5, 1.0, 1.7])] * len(schedule))),
        top_k=draw(st.sampled_from([0, 1, 900])),
        top_p=draw(st.sampled_from([0.0, 0.7, 0.97])),
        text_lengths=draw(lengths),
        negative_lengths=draw(lengths) if kind != "none" and draw(st.booleans()) else None,
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def build_run(scenario: Scenario) -> tuple[Run, list[np.ndarray]]:
    """The run, and random bits to feed forward, so that a near tie cannot change what follows it."""
    config, random = scenario.config, np.random.default_rng(scenario.seed)
    batch = len(scenario.text_lengths)

    def features(lengths: list[int]) -> list[np.ndarray]:
        return [random.standard_normal((n, config.text_channels), dtype=np.float32) for n in lengths]

    draws_shape = (batch, config.token_bits, 2)
    run = Run(
        name="random",
        config=config,
        state=random_state(config, random),
        text_features=features(scenario.text_lengths),
        negative_text_features=None if scenario.negative_lengths is None else features(scenario.negative_lengths),
        schedule=scenario.schedule,
        rope_grid=scenario.rope_grid,
        guidance_scale=scenario.guidance_scale,
        temperature=scenario.temperature,
        top_k=scenario.top_k,
        top_p=scenario.top_p,
        guidance_layer=scenario.guidance_layer,
        draws=[random.standard_exponential((g.size, *draws_shape), dtype=np.float32) for g in scenario.schedule],
        expected={},
    )
    code_grids = tokenizer_schedule(scenario.schedule, config.patchify)
    return run, [random.integers(0, 2, (batch, *grid, config.code_dim), dtype=np.uint8) for grid in code_grids]


@hypothesis.settings(max_examples=9, derandomize=True, deadline=None, database=None)
@hypothesis.given(scenarios())
def test_every_intermediate_equals_the_reference(scenario):
    run, forced_bits = build_run(scenario)
    expected = run_reference(run, forced_bits)
    actual = run_jax(run, forced_bits=forced_bits)
    assert actual.keys() == expected.keys()
    golden.assert_matches(expected, actual)
