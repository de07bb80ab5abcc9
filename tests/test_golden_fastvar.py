"""FastVAR reproduces what its published code stored (tests/golden/fastvar_tiny.npz), stored bits fed forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import golden
from tests.reference.golden_pruning import load_pruned
from tests.reference.parameters import infinity_parameters
from toprovar_jax import scale_loop
from toprovar_jax.pruning.fastvar import FastVAR
from toprovar_jax.pruning.plan import Span
from toprovar_jax.resize import resize_area

POLICY = FastVAR(layers=(3, 27))
SUBLAYERS = ("sa", "ca", "ffn")
UNDECIDED = 1e-4
LOGITS_TOLERANCE = 1e-3


@functools.cache
def stored():
    return load_pruned("fastvar_tiny")


@functools.cache
def parameters():
    return infinity_parameters(stored().config, "float32", stored().state)


@functools.cache
def computed():
    """By scale, output of the step and the code map after it."""
    case = stored()
    (plan,) = POLICY.plans(case.schedule, case.config.depth)
    assert list(plan.executed_scales) == case.description["executed_scales"]
    loop = scale_loop.LoopConfig(case.config, "float32", case.schedule, case.schedule[-1], guided=True, plan=plan)
    settings = scale_loop.SamplingSettings(case.description["cfg"], case.description["tau"], 1, 0.0)

    @functools.partial(jax.jit, static_argnames="scale")
    def step(params, state, context, bits, *, scale):
        draws = jnp.ones((1, case.schedule[scale].size, case.config.token_bits, 2))
        return scale_loop.scale_step(
            params, state, context, draws, settings, bits, loop=loop, scale=scale, record="activations"
        )

    context = jax.jit(functools.partial(scale_loop.encode_context, loop=loop))(
        parameters(), case.text_features[None], jnp.array([len(case.text_features)])
    )
    state, results = scale_loop.initial_state(loop, 1), {}
    for scale in plan.executed_scales:
        state = scale_loop.prepare(state, loop.step(scale))
        bits = case.unpack_bits(f"s{scale}", scale)
        state, output = step(parameters(), state, context, bits, scale=scale)
        results[scale] = jax.device_get((output, state.code_map))
    return results


@pytest.mark.parametrize("scale", stored().description["executed_scales"])
def test_activations_and_logits_of_every_stored_row(scale):
    case, (output, _) = stored(), computed()[scale]
    rows, compared = case.expected[f"s{scale}.rows"], 0
    values = output.activations | {"logits_raw": output.logits_raw}
    for name, value in values.items():
        prefix = f"s{scale}.{name}"
        if (expected := case.expected.get(f"{prefix}.rows")) is not None:
            tolerance = LOGITS_TOLERANCE if name == "logits_raw" else golden.TOLERANCE
            golden.assert_matches({prefix: expected}, {prefix: value[:, rows]}, tolerance)
            compared += 1
        if (expected := case.expected.get(f"{prefix}.mean_std")) is not None:
            # The stored deviation is the unbiased one.
            statistics = np.stack([value.mean(axis=(1, 2)), value.std(axis=(1, 2), ddof=1)], axis=1)
            golden.assert_matches({prefix: expected}, {prefix: statistics})
            compared += 1
    stored_keys = [key for key in case.expected if key.startswith((f"s{scale}.block", f"s{scale}.logits"))]
    assert compared == len(stored_keys)


def test_kept_tokens_of_every_sublayer_but_for_ties():
    case, compared, undecided = stored(), 0, 0
    for scale, description in case.description["pruned_scales"].items():
        output, _ = computed()[int(scale)]
        assert list(output.kept) == [Span(layer, layer + 1) for layer in case.description["pruned_layers"]]
        for (layer, _), kept in output.kept.items():
            assert kept.shape == (2, 3, description["kept"])
            for index, sublayer in enumerate(SUBLAYERS):
                prefix = f"s{scale}.layer{layer}.{sublayer}"
                expected = case.expected[f"{prefix}.kept"]
                same = np.array_equal(np.sort(kept[:, index]), np.sort(expected))
                undecided += not same
                compared += 1
                assert same or case.expected[f"{prefix}.gap"] < UNDECIDED, f"{prefix}: other tokens"
    print(f"{undecided} of {compared} kept sets differ, all with a gap below {UNDECIDED}")
    assert compared == 2 * 2 * 3 == sum(key.endswith(".kept") for key in case.expected)


def test_bits_but_for_ties_and_the_final_code_map():
    case, compared, undecided = stored(), 0, 0
    for scale in case.description["executed_scales"]:
        output, code_map = computed()[scale]
        conditional, unconditional = np.split(output.logits_raw / case.description["tau"], 2)
        guidance = case.description["cfg"]
        logits = (guidance * conditional + (1 - guidance) * unconditional).reshape(*output.bits.shape, 2)
        margin = np.abs(logits[..., 0] - logits[..., 1])
        different = output.bits != case.unpack_bits(f"s{scale}", scale)
        assert (margin[different] < UNDECIDED).all()
        undecided += int(different.sum())
        compared += different.size
    print(f"{undecided} of {compared} bits differ, all with a margin below {UNDECIDED}")
    assert compared == 16 * (1 + 16 + 24**2 + 32**2 + 40**2)
    expected = case.expected["final_summed_codes.every4"]
    golden.assert_matches({"final": expected}, {"final": code_map.transpose(0, 3, 1, 2)[..., ::4, ::4]})


def test_restoration_resizes_by_area():
    arrays = stored().expected
    source = jnp.asarray(arrays["area.in"].reshape(1, 24, 24, 2))
    for side in (32, 40):
        golden.assert_matches({"area": arrays[f"area.24to{side}"]}, {"area": resize_area(source, (side, side))})
