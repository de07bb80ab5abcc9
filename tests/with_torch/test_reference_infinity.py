"""The PyTorch reference transformer reproduces every stored array of the official one."""

import dataclasses

import numpy as np
import pytest
import torch

from convert.reference import infinity, rope, sampling
from convert.reference.bsq_vae import BSQVAE, to_uint8
from convert.reference.infinity import Infinity
from tests.reference import golden
from tests.reference.torch_run import build, run_reference, tensors
from toprovar_jax.config import ARCHITECTURES
from toprovar_jax.schedule import Grid, rope_grid, scale_schedule


def decode(code_map):
    state = {name: torch.from_numpy(value) for name, value in golden.vae_golden().state.items()}
    vae = BSQVAE(golden.VAE_CONFIG)
    vae.load_state_dict(state, strict=True)
    image = vae.decode(torch.from_numpy(code_map))
    return {"image_float": image.numpy(), "image_uint8_bgr": to_uint8(image).flip(-1).numpy()}


@pytest.mark.parametrize("name", golden.FLOAT32_RUNS)
def test_every_stored_array_of_a_run(name):
    run = golden.load_run(name)
    results = run_reference(run)
    if "image_float" in run.expected:
        results |= decode(results["final_summed_codes"])
    golden.assert_matches(run.expected, results)


def test_teacher_forcing_equals_the_stored_logits_and_the_cached_path():
    run = golden.load_run("infinity_tiny_cfg1_greedy")
    arrays = golden.load("infinity_tiny_teacher_forcing")
    model = build(run.config, run.state)
    features = torch.from_numpy(arrays.pop("in.text_features"))
    latents = torch.from_numpy(arrays.pop("in.x_BLC_wo_prefix"))
    logits = model.teacher_forcing([features], latents, schedule=run.schedule, rope_grid=run.rope_grid).numpy()
    golden.assert_matches(arrays, {"logits": logits})
    cached = np.concatenate([run_reference(run)[f"s{i}.logits_raw"] for i in range(len(run.schedule))], axis=1)
    assert golden.relative_error(logits, cached) <= 1e-5


def official_text_attention(query, keys, values):
    """The published code casts to bfloat16 around every attention to the text."""
    low = [key.bfloat16() for key in keys], [value.bfloat16() for value in values]
    return RAGGED_ATTENTION(query.bfloat16(), *low).float()


RAGGED_ATTENTION = infinity.ragged_attention


@pytest.mark.parametrize(
    ("name", "attention", "tolerance"),
    [
        ("infinity_tiny_cfg4_bf16cross", official_text_attention, 1e-3),
        ("infinity_tiny_cfg4_bf16cross", RAGGED_ATTENTION, golden.BFLOAT16_TOLERANCE),
        ("infinity_tiny_cfg4_amp_emulated", RAGGED_ATTENTION, golden.BFLOAT16_TOLERANCE),
    ],
)
def test_every_stored_array_of_a_run_with_bfloat16_inside(name, attention, tolerance, monkeypatch):
    monkeypatch.setattr(infinity, "ragged_attention", attention)
    run = golden.load_run(name)
    results = run_reference(run, forced_bits=run.stored_bits())
    golden.assert_matches_bfloat16(run, results, tolerance)


@pytest.mark.parametrize("case", golden.sampling_cases(), ids=lambda case: case.name)
def test_filtered_probabilities_and_drawn_classes(case):
    logits, draws = torch.from_numpy(case.logits), torch.from_numpy(case.draws)
    probabilities = sampling.filtered_probabilities(logits[0], case.top_k, case.top_p)
    classes = sampling.draw(probabilities, draws)
    golden.assert_matches(case.expected, {"probs": probabilities.numpy(), "idx": classes.numpy()})


@pytest.mark.parametrize("table", golden.rope_golden().tables, ids=lambda t: f"mode{t.mode}-{t.aspect_ratio}")
def test_rope_tables(table):
    head_dim = golden.rope_golden().head_dim
    grids, final = scale_schedule(table.aspect_ratio), rope_grid(table.aspect_ratio)
    tables = [rope.rotation(table.mode, grid, final, head_dim) for grid in grids]
    cosine, sine = (torch.cat(parts).numpy() for parts in zip(*tables, strict=True))
    # The published table is padded to whole blocks of 128 rows.
    computed = {"cos": cosine[table.rows], "sin": sine[table.rows], "padded_len": -(-len(cosine) // 128) * 128}
    golden.assert_matches(table.expected, computed)


def test_rope_grid_indices_of_every_token():
    indices = golden.rope_golden().grid_indices
    assert len(indices) == 4
    for ratio, expected in indices.items():
        final = rope_grid(ratio)
        computed = [rope.grid_positions(2, grid, final) for grid in scale_schedule(ratio)]
        np.testing.assert_array_equal(torch.cat(computed).numpy(), expected)


def test_rotation_of_queries_and_keys():
    stored = golden.rope_golden()
    tables = rope.rotation(2, scale_schedule(1.0)[stored.scale], rope_grid(1.0), stored.head_dim)
    for given, expected in ((stored.query, stored.expected_query), (stored.key, stored.expected_key)):
        rotated = rope.rotate(torch.from_numpy(given), *tables).numpy()
        assert golden.relative_error(rotated, expected) <= golden.TOLERANCE


def test_resizes_and_pixel_shuffle():
    image, cases, packed, shuffled = golden.resize_cases()
    functions = {"trilinear": sampling.resize, "area": sampling.area_resize}
    for case in cases:
        resized = functions[case.kind](torch.from_numpy(image[:, :, 0]), case.grid).numpy()
        assert golden.relative_error(resized[:, :, None], case.expected) <= golden.TOLERANCE
    np.testing.assert_array_equal(torch.nn.functional.pixel_shuffle(torch.from_numpy(packed), 2), shuffled)


@pytest.mark.parametrize(("name", "entries"), [("infinity_2b", 694), ("infinity_8b", 862)])
def test_state_dict_has_the_published_entries(name, entries):
    with torch.device("meta"):
        state = Infinity(ARCHITECTURES[name]).state_dict()
    assert len(state) == entries
    assert "block_chunks.7.module.0.sa.scale_mul_1H11" in state


def test_state_dict_of_one_chunk_and_with_unused_entries_loads():
    config, state = golden.load_state()
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "block_chunks":
            parts[:4] = ["blocks", str(2 * int(parts[1]) + int(parts[3]))]
        renamed[".".join(parts)] = value
    for name in infinity.UNUSED_ENTRIES:
        renamed[name] = np.zeros(1, np.float32)
    chunked, single = build(config, state), build(dataclasses.replace(config, num_chunks=1), renamed)
    for ours, theirs in zip(single.parameters(), chunked.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_missing_tensor_is_refused():
    config, state = golden.load_state()
    del state["head.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        build(config, state)


def test_own_draws_follow_the_generator():
    run = golden.load_run("infinity_tiny_b2_sampled")
    model = build(run.config, run.state)

    def generate(seed):
        records = model.generate(
            tensors(run.text_features),
            schedule=run.schedule[:2],
            rope_grid=Grid(4, 4),
            guidance_scale=(1.0,) * 2,
            temperature=(1.0,) * 2,
            generator=torch.Generator().manual_seed(seed),
        )
        return records[-1].bits

    assert torch.equal(generate(1), generate(1))
    assert not torch.equal(generate(1), generate(2))
