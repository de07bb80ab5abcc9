"""Profiles: one text each way, every misuse refused in one line, and a place beside the manifest."""

import dataclasses
import json
import os

import jaxtyping
import pytest

from tests import tiny
from toprovar_jax import checkpoint, manifest
from toprovar_jax.checkpoint import EMBEDDED
from toprovar_jax.pruning.flops import PlanCost
from toprovar_jax.pruning.profile import PROFILE_NAME, Profile, ProfileError, check_writable, load_profile
from toprovar_jax.pruning.toprovar import ToProVAR
from toprovar_jax.schedule import scale_schedule

PROFILE = Profile(
    layer_scores=(0.0, 0.25, 1.0),
    tau=0.4,
    crossing="above",
    prunable_scales=4,
    usual_scales=3,
    dropped_scales=1,
    checkpoint="abc",
    calibration={"target": "speedup=3", "prompts": 24},
)


def refused(match):
    return pytest.raises(ProfileError, match=match)


def test_text_round_trip():
    assert Profile.from_text(PROFILE.to_text()) == PROFILE
    assert hash(PROFILE) == hash(Profile.from_text(PROFILE.to_text()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crossing": "both"}, r"^unknown crossing 'both' in the profile: choose one of above, below$"),
        ({"normalization": "l2"}, r"^unknown normalization 'l2' in the profile: choose one of sum, mean, rank$"),
        (
            {"source": "mlp"},
            r"^unknown source 'mlp' in the profile: choose one of same_layers, all_layers, layer_before$",
        ),
        ({"layer_scores": ()}, r"^a profile needs one layer score from 0 to 1 for every layer$"),
        ({"layer_scores": (0.0, 1.1)}, r"one layer score from 0 to 1"),
        ({"layer_scores": (0.0, float("nan"))}, r"one layer score from 0 to 1"),
        ({"tau": float("inf")}, r"^tau and the alphas of a profile must be finite"),
        ({"alpha_min": 0.9, "alpha_max": 0.8}, r"^alpha_min 0.9 must not exceed alpha_max 0.8$"),
        ({"usual_scales": 5}, r"^usual_scales must lie between 0 and prunable_scales 4, got 5$"),
        ({"dropped_scales": -1}, r"^dropped_scales, conditional_scales and token_scales must not be negative$"),
        (
            {"source": "layer_before", "layer_scores": (0.5, 0.5)},
            r"^no layer comes before layer 0, so source 'layer_before' needs layer score 0 there: keep it dense$",
        ),
    ],
)
def test_impossible_values_are_refused(changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users' calls are not checked
    with refused(message):
        dataclasses.replace(PROFILE, **changes)


def test_another_model_is_refused():
    PROFILE.check_depth(3)
    with refused(r"^the profile is for a transformer of 3 layers, but this one has 32: calibrate with `python"):
        PROFILE.check_depth(32)
    PROFILE.check_checkpoint("abc")
    PROFILE.check_checkpoint(None)
    dataclasses.replace(PROFILE, checkpoint=None).check_checkpoint("def")
    with refused(r"^the profile belongs to another checkpoint: calibrate with `python -m toprovar_jax.calibrate"):
        PROFILE.check_checkpoint("def")


def test_texts_that_are_no_profiles_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    altered = PROFILE.to_text().replace('"tau": 0.4', '"tau": 0.5')
    with refused(r"^the profile was altered after it was written: calibrate with"):
        Profile.from_text(altered)
    content = json.loads(PROFILE.to_text())
    with refused(r"^the profile has format 9 but this version reads 1: calibrate with"):
        Profile.from_text(json.dumps({**content, "format": 9}))
    for text in ("", "[]", "{}", json.dumps({**content, "colour": "red"}), json.dumps({**content, "tau": None})):
        with refused(r"^not a profile: [^\n]*; calibrate with [^\n]*$"):
            Profile.from_text(text)


def test_a_profile_lies_beside_the_manifest(tmp_path):
    folder = tmp_path / "model"
    digest = checkpoint.save(folder, tiny.CONFIG, tiny.parameters(), dtype="float32").digest
    assert load_profile(folder) is None
    for tau in (0.4, 0.3):
        saved = dataclasses.replace(PROFILE, checkpoint=digest, tau=tau)
        assert saved.save(folder) == folder / PROFILE_NAME
        assert load_profile(folder) == saved
    (folder / f"{PROFILE_NAME}.8f3k2").write_text("left by a killed process")
    assert manifest.load_manifest(folder).digest == digest
    (folder / PROFILE_NAME).write_text("{}")
    with refused(rf"^{folder / PROFILE_NAME}: not a profile: "):
        load_profile(folder)


def test_a_folder_that_cannot_be_written_or_read_is_named(tmp_path):
    with refused(rf"^cannot write {tmp_path}/gone/{PROFILE_NAME}: No such file or directory; make"):
        PROFILE.save(tmp_path / "gone")
    (tmp_path / PROFILE_NAME).mkdir()
    with refused(rf"^cannot write {tmp_path}/{PROFILE_NAME}: Is a directory; make the folder writable$"):
        PROFILE.save(tmp_path)
    assert os.listdir(tmp_path) == [PROFILE_NAME]
    check_writable(tmp_path)
    check_writable(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir()
    for folder in ("/proc", "/proc/new"):
        with refused(rf"^cannot write into {folder}: .*; make it writable or choose another folder$"):
            check_writable(folder)
    with refused(rf"^cannot read {tmp_path}/{PROFILE_NAME}: .*Is a directory"):
        load_profile(tmp_path)


def test_the_model_in_the_package_has_one_that_saves_what_it_says():
    model, profile = manifest.load_manifest(EMBEDDED), load_profile(EMBEDDED)
    profile.check_checkpoint(model.digest)
    schedule = scale_schedule(pixels=model.config.defaults.pixels)
    *_, dense = plans = ToProVAR(profile).plans(schedule, model.config.transformer.depth)
    costs = [PlanCost(model.config.transformer, plan).loop().total for plan in (plans[0], dense)]
    assert costs[1] / costs[0] == pytest.approx(profile.calibration["speedup"], rel=0.01)
    assert profile.calibration["speedup"] >= 3.4
