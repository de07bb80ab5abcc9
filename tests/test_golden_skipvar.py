"""SkipVAR reproduces what its published code stored (tests/golden/skipvar_*.npz), stored bits fed forward."""

import dataclasses
import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import golden
from tests.reference.golden_pruning import load_pruned
from tests.reference.parameters import infinity_parameters, vae_parameters
from toprovar_jax.config import CheckpointConfig
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.pruning import skipvar

UNDECIDED = 1e-4
LOGITS_TOLERANCE = 1e-3
FEATURE_TOLERANCE = 1e-5
DECISIONS = {"base": (0, 0), "skip2": (2, 0), "skip3": (3, 0), "uncond1": (0, 1), "uncond3": (0, 3)}


@dataclasses.dataclass(frozen=True)
class ForcedSkipVAR(skipvar.SkipVAR):
    """SkipVAR whose decision is given."""

    decision: tuple[int, int] = (0, 0)

    def decide(self, features):
        assert features.shape == (1, 2)
        return self.decision


@functools.cache
def stored():
    return load_pruned("skipvar_tiny")


@functools.cache
def pipeline():
    case = stored()
    params = {
        "transformer": infinity_parameters(case.config, "float32", case.state),
        "vae": vae_parameters(golden.VAE_CONFIG, "float32", golden.vae_golden().state),
    }
    return InfinityPipeline(CheckpointConfig(case.config, golden.VAE_CONFIG), params, dtype="float32")


def stored_bits(name, scale):
    """A decision's own bits where they are stored, else those of the plain run, which it shares."""
    own = f"{name}.s{scale}"
    return stored().unpack_bits(own if f"{own}.bits_packed" in stored().expected else f"base.s{scale}", scale)


@functools.cache
def computed(name):
    case = stored()
    return pipeline()(
        text_features=[case.text_features],
        guidance_scale=case.description["cfg"],
        temperature=case.description["tau"],
        top_k=1,
        top_p=0.0,
        policy=ForcedSkipVAR(decision=DECISIONS[name]),
        scale_schedule=case.schedule,
        rope_grid=case.schedule[-1],
        output_type="latent",
        forced_bits=[stored_bits(name, scale) for scale in range(len(case.schedule))],
        trace=True,
    )


def final_logits(trace):
    """Guided where the scale is, [1, tokens * bits, 2]."""
    logits = trace.logits_raw / stored().description["tau"]
    if len(logits) == 2:
        guidance = stored().description["cfg"]
        logits = guidance * logits[:1] + (1 - guidance) * logits[1:]
    return logits.reshape(1, -1, 2)


@pytest.mark.parametrize("name", DECISIONS)
def test_a_forced_decision(name):
    case, out = stored(), computed(name)
    assert list(out.plan.executed_scales) == case.expected[f"{name}.executed"].tolist()
    assert len(out.trace.scales) == len(out.bits) == len(out.plan.executed_scales)
    compared, undecided, num_bits = 1, 0, 0
    for scale, trace in enumerate(out.trace.scales):
        skip, uncond = DECISIONS[name]
        assert len(trace.logits_raw) == (1 if scale >= 13 - skip - uncond and uncond else 2)
        logits = final_logits(trace)
        margin = np.abs(logits[..., 0] - logits[..., 1]).reshape(trace.bits.shape)
        different = trace.bits != stored_bits(name, scale)
        assert (margin[different] < UNDECIDED).all(), f"{name}, scale {scale}"
        undecided += int(different.sum())
        num_bits += different.size
        for key in ("logits_final", "logits_final_every16"):  # both hold every 16th row
            if (expected := case.expected.get(f"{name}.s{scale}.{key}")) is not None:
                golden.assert_matches({key: expected}, {key: logits[:, ::16]}, LOGITS_TOLERANCE)
                compared += 1
    expected = case.expected[f"{name}.final_summed_codes"]
    golden.assert_matches({"final": expected}, {"final": out.images.transpose(0, 3, 1, 2)})
    print(f"{name}: {undecided} of {num_bits} bits differ, all with a margin below {UNDECIDED}")
    assert compared == sum(
        key.startswith(f"{name}.") and ("logits" in key or "final" in key) for key in case.expected
    )


def test_the_features_of_a_run():
    scales = computed("base").trace.scales
    assert [scale for scale, trace in enumerate(scales) if trace.report is not None] == [8, 9]
    features = skipvar.features(scales[8].report, scales[9].report)
    np.testing.assert_allclose(features, stored().expected["features"][None], atol=FEATURE_TOLERANCE, rtol=0)


def test_the_features_of_a_pair_of_pictures():
    arrays = golden.load("skipvar_features")
    new, old = (jnp.asarray(arrays[f"img_{name}"].transpose(0, 2, 3, 1)) for name in ("new", "old"))
    edges = {name: skipvar.edge_strength(image) for name, image in (("new", new), ("old", old))}
    golden.assert_matches({"sobel": arrays["sobel_new"][:, 0]}, {"sobel": edges["new"]}, FEATURE_TOLERANCE)
    share = np.asarray(skipvar.high_frequency_share(new, 0.4))
    values = skipvar.features(
        {"edges": np.asarray(edges["old"])}, {"edges": np.asarray(edges["new"]), "high_frequency": share}
    )
    expected = np.asarray([[arrays["diff_hf"], arrays["ratio_04"].item()]], np.float64)
    np.testing.assert_allclose(values, expected, atol=FEATURE_TOLERANCE, rtol=0)
    wider = np.asarray(skipvar.high_frequency_share(new, 0.25))
    np.testing.assert_allclose(wider, arrays["ratio_025"][0], atol=FEATURE_TOLERANCE, rtol=0)


@pytest.mark.parametrize("target", ["84", "86", "88"])
@pytest.mark.parametrize("decision", ["skip", "uncond"])
def test_the_published_decisions_on_a_grid_of_features(target, decision):
    arrays = golden.load("skipvar_features")
    model = getattr(skipvar.published_model(f"0.{target}"), decision)
    predicted = model.predict(arrays["grid"])
    np.testing.assert_array_equal(predicted, arrays[f"pred.{target}.{decision}"])
    assert len(np.unique(predicted)) > 1


def test_the_package_holds_the_documented_coefficients():
    documented = json.loads((Path(__file__).parent.parent / "docs/spec/skipvar_logistic.json").read_text())
    for target in ("84", "86", "88"):
        models = documented["models"][f"decision_model_ssim_{target}"]
        for model in models.values():
            del model["n_train"]
        assert skipvar.published_model(f"0.{target}") == skipvar.DecisionModel.from_json(models)
