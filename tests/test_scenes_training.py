"""The training run's parts at toy size; the run itself is rehearsed with `configs/tiny.json`."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.scenes import (
    dataset,
    render,
    stages,
    tokenizer,
    train_detector,
    train_text,
    train_transformer,
    train_vae,
    training,
    weights,
    world,
)
from bench.scenes.detector import DetectorOutput
from bench.scenes.training import StageConfig
from toprovar_jax.errors import InputError
from toprovar_jax.models.bsq_vae import BSQVAE, multi_scale_quantize, sum_codes
from toprovar_jax.models.infinity import Infinity, attend_scale_by_scale
from toprovar_jax.models.skeleton import abstract_parameters
from toprovar_jax.schedule import Grid

CONFIGS = training.EMBEDDED_CONFIG.parent
SETTINGS = StageConfig(batch_size=4, learning_rate=0.05, warmup_steps=16)


def toy_scenes(count: int = 16) -> dataset.SceneBatch:
    return dataset.training_scenes(count, seed=0, processes=1)


def pull_towards(target):
    """A loss whose minimum is known: squared distance of a vector to the target."""

    def loss(parameters, scenes, key):
        del scenes, key
        value = jnp.square(parameters["x"] - target).mean()
        return value, {"distance": jnp.sqrt(value)}

    return loss


def run(state, seconds=0.5, decay=0.3, constants=3.0, records=None):
    step = training.make_step(SETTINGS, pull_towards)
    return training.run_chunk(
        SETTINGS, step, state, constants, toy_scenes(), seed=0, seconds=seconds, decay=decay,
        log=lambda **numbers: None if records is None else records.append(numbers),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock that every look at advances by 10 ms, so that chunks take the same steps on any machine."""
    ticks = itertools.count(step=0.01)
    monkeypatch.setattr(training, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))


def test_a_chunk_descends_and_the_average_follows():
    records = []
    state = run(training.initial_state(SETTINGS, {"x": jnp.zeros(3)}), records=records)
    np.testing.assert_allclose(state.average["x"], 3.0, atol=0.3)
    assert records[-1]["steps"] == int(state.step)
    assert records[-1]["loss"] < 0.1


def three_steps() -> list[float]:
    """The weights after three steps of a loss that depends on the scenes drawn."""

    def towards_the_scenes(target):
        def loss(parameters, scenes, key):
            del key
            return jnp.square(parameters["x"] - target - scenes.placement[:, 0, :3]).mean(), {}

        return loss

    step = training.make_step(SETTINGS, towards_the_scenes)
    state = training.replicate(training.initial_state(SETTINGS, {"x": jnp.zeros(3)}))
    scenes, key = training.replicate((toy_scenes(), jax.random.key(0)))
    for _ in range(3):
        state, _ = step(state, training.replicate(jnp.float32(3)), scenes, key, 0.1)
    return state.parameters["x"].tolist()


def test_several_devices_take_the_same_steps_as_one():
    program = "import jax, tests.test_scenes_training as t; print(len(jax.devices()), *t.three_steps())"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    devices, *values = run.stdout.split()
    assert devices == "2"
    np.testing.assert_allclose([float(value) for value in values], three_steps(), rtol=1e-5)


def test_a_chunk_resumes_from_weights_alone(tmp_path):
    first = run(training.initial_state(SETTINGS, {"x": jnp.zeros(3)}))
    weights.save_parameters(tmp_path / "x.safetensors", first.average)
    resumed = weights.load_parameters(tmp_path / "x.safetensors", {"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
    np.testing.assert_array_equal(resumed["x"], first.average["x"])
    second = run(training.initial_state(SETTINGS, resumed), seconds=0.1)
    np.testing.assert_allclose(second.average["x"], 3.0, atol=0.3)


def test_a_gradient_that_is_not_finite_changes_nothing():
    state = training.initial_state(SETTINGS, {"x": jnp.ones(3)})
    step = training.make_step(SETTINGS, pull_towards)
    state, numbers = step(state, jnp.nan, toy_scenes(), jax.random.key(0), 0.1)
    np.testing.assert_array_equal(state.parameters["x"], 1.0)
    assert not np.isfinite(numbers["loss"])


def test_a_loss_that_is_not_finite_ends_the_chunk():
    with pytest.raises(FloatingPointError, match="the loss is nan after 8 steps"):
        run(training.initial_state(SETTINGS, {"x": jnp.zeros(3)}), seconds=0.015, constants=jnp.nan)


def test_learning_rate_warms_up_stays_and_falls():
    def rate(step: int, elapsed: float, decay: float) -> float:
        return training._learning_rate(SETTINGS, step, elapsed, decay) / SETTINGS.learning_rate

    assert rate(0, 0.0, 0.3) == pytest.approx(0.5)
    assert rate(8, 0.0, 0.3) == rate(1000, 0.7, 0.3) == 1
    assert rate(1000, 0.85, 0.3) == pytest.approx(0.5)
    assert rate(1000, 0.99, 0.0) == 1


def test_log_prints_and_keeps_every_record(tmp_path, capsys):
    log = training.Log(tmp_path / "run" / "log.jsonl")
    log("vae", psnr=jnp.float32(31.23456), accuracy=jnp.array([0.5, 0.25]), passed=True)
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    assert record | {"seconds": 0} == {
        "seconds": 0, "stage": "vae", "psnr": 31.235, "accuracy": [0.5, 0.25], "passed": True,
    }  # fmt: skip
    assert json.loads(capsys.readouterr().out) == record


def test_large_trees_are_spread_over_files(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_FILE_BYTES", 100)
    tree = {"blocks": {index: {"kernel": jnp.full((4, 4), index, jnp.float32)} for index in range(5)}}
    path = tmp_path / "model.safetensors"
    weights.save_parameters(path, tree)
    assert len(list(tmp_path.iterdir())) == 5
    weights.save_parameters(path, tree, jnp.bfloat16)
    assert len(list(tmp_path.iterdir())) == 2
    loaded = weights.load_parameters(path, tree)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()) and a.dtype == b.dtype, loaded, tree))


def test_weights_of_another_configuration_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    weights.save_parameters(path, {"a": jnp.zeros(2), "b": jnp.zeros(3)})
    skeleton = {"a": jax.ShapeDtypeStruct((2,), jnp.float32), "b": jax.ShapeDtypeStruct((4,), jnp.float32)}
    with pytest.raises(ValueError, match=r"does not fit this configuration: b \(1 in all\)"):
        weights.load_parameters(path, skeleton)
    with pytest.raises(InputError, match="run the stage that trains them first"):
        weights.load_parameters(tmp_path / "none.safetensors", skeleton)


def test_the_transformer_does_not_train_before_the_tokenizer_passed(tmp_path):
    config = training.load_config(CONFIGS / "tiny.json")
    atlas = render.Atlas(*(jax.ShapeDtypeStruct((1,), jnp.uint8) for _ in range(3)))
    stage = stages.define_stage("transformer", config, tmp_path, atlas)
    with pytest.raises(InputError, match="no tokenizer passed its gate"):
        stages.load_constants("transformer", tmp_path, stage)
    (tmp_path / "vae.json").write_text('{"passed": false}')
    with pytest.raises(InputError, match="no tokenizer passed its gate"):
        stages.load_constants("transformer", tmp_path, stage)


def test_the_command_wants_seconds_for_every_stage(tmp_path):
    command = [sys.executable, "-m", "bench.scenes.train", f"--workdir={tmp_path}"]
    run = subprocess.run([*command, "--stages=vae", "--seconds=1,2"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == "error: --stages names 1 stages but --seconds has 2 numbers\n"


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(
        InputError, match="unknown stage 'gan': choose from detector, vae, text, prefix, transformer"
    ):
        stages.define_stage("gan", training.load_config(CONFIGS / "tiny.json"), tmp_path, None)


def test_the_embedded_model_fits_what_may_ship():
    config = training.load_config(CONFIGS / "embedded.json")
    trees = [
        train_text.skeletons(config, "bfloat16")["text_encoder"],
        abstract_parameters(Infinity, config.model.transformer, "bfloat16"),
        abstract_parameters(BSQVAE, config.model.vae, "bfloat16"),
    ]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))
    # A checkpoint's compression takes a fifth off trained weights; the tokenizer and the files' headers add 50 kB.
    assert 30e6 < 0.81 * size < 39.5e6
    assert tokenizer.build_tokenizer().get_vocab_size() <= config.model.text_encoder.vocab_size
    assert train_vae.schedule_of(config)[-1].height * config.model.vae.stride == config.image_size


def true_maps(scenes: dataset.SceneBatch, cells: int = 8) -> DetectorOutput:
    """What a perfect detector would give."""
    heat, owner = train_detector._targets(scenes, cells)

    def one_hot(values, classes):
        return 20.0 * jax.nn.one_hot(train_detector._of_owner(values, owner), classes)

    return DetectorOutput(
        center=jnp.where(heat > 0.999, 20.0, -20.0),
        noun=one_hot(scenes.noun, 50),
        color=one_hot(scenes.color, 10),
        log_radius=jnp.log(train_detector._of_owner(scenes.placement[..., 2], owner)),
    )


def test_detection_loss_is_low_for_the_truth_and_high_for_every_mistake():
    scenes = toy_scenes(64)
    truth = true_maps(scenes)
    certain = jnp.ones(64)
    loss, numbers = train_detector.detection_loss(truth, scenes, certain)
    assert loss < 0.01
    for name, part in (("center", "center"), ("noun", "noun"), ("color", "color"), ("log_radius", "radius")):
        wrong = truth._replace(**{name: jnp.roll(getattr(truth, name), 1, axis=-1) + 0.1})
        changed = train_detector.detection_loss(wrong, scenes, certain)[1]
        assert changed[part] > numbers[part] + 0.05
        assert all(changed[other] == numbers[other] for other in numbers if other != part)


def test_exchanged_colours_teach_no_colours():
    scenes = toy_scenes()
    wrong = true_maps(scenes)._replace(color=jnp.zeros((16, 8, 8, 10)))
    assert train_detector.detection_loss(wrong, scenes, jnp.ones(16))[1]["color"] > 1
    assert train_detector.detection_loss(wrong, scenes, jnp.zeros(16))[1]["color"] == 0


def test_augmentation_says_where_colours_are_still_true():
    ramp = jnp.broadcast_to(jnp.array([-0.6, 0.0, 0.6]), (300, 8, 8, 3))
    images, true_colors = train_detector.augment(ramp, jax.random.key(0))
    order = np.argsort(np.asarray(images.mean((1, 2))), axis=-1)
    in_order = (order == np.arange(3)).all(-1)
    assert in_order[np.asarray(true_colors) == 1].all()
    assert 0.55 < float(true_colors.mean()) < 0.78
    # One in six permutations changes nothing.
    assert in_order[np.asarray(true_colors) == 0].mean() == pytest.approx(1 / 6, abs=0.12)


def test_some_images_go_without_their_last_scales():
    schedule = (Grid(1, 1), Grid(2, 2), Grid(3, 3), Grid(4, 4))
    latent = jax.random.normal(jax.random.key(0), (200, 4, 4, 8))
    code_map, decoded = train_vae._quantize_dropping(latent, schedule, jax.random.key(1))
    quantized = multi_scale_quantize(latent, schedule)
    np.testing.assert_allclose(code_map, quantized.code_map)
    parts = np.stack([np.asarray(sum_codes(quantized.bits[:count], schedule)) for count in (1, 2, 3, 4)])
    distances = np.abs(parts - np.asarray(decoded)).max((2, 3, 4))
    np.testing.assert_allclose(distances.min(0), 0, atol=1e-5)
    kept = distances.argmin(0) + 1
    assert 0.02 < np.mean(kept < 4) < 0.2
    assert set(kept) == {1, 2, 3, 4}


@pytest.mark.parametrize("sides", [(1, 2, 3), (1, 2, 4, 6, 8, 12)])
def test_attention_for_training_equals_that_of_generation_and_has_a_gradient(sides):
    schedule = tuple(Grid(side, side) for side in sides)
    tokens = sum(grid.size for grid in schedule)
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, tokens, 2, 8))
    expected, _ = attend_scale_by_scale(schedule)(query, key, value)
    attend = train_transformer.differentiable_attention(schedule)
    output, _ = attend(query, key, value)
    np.testing.assert_allclose(output, expected, atol=2e-5)
    # The first scale must not see the others: its output does not change with their values.
    gradient = jax.grad(lambda v: attend(query, key, v)[0][:, 0].sum())(value)
    assert (np.asarray(gradient[:, 0]) != 0).all()
    assert (np.asarray(gradient[:, 1:]) == 0).all()


def test_fresh_weights_keep_the_size_of_what_passes_through():
    shapes = {"conv": {"kernel": (3, 3, 64, 32), "bias": (32,)}, "norm": {"scale": (8,)}, "log_scale": (2,)}
    skeleton = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    first, again, other = (training.fresh_parameters(skeleton, seed) for seed in (0, 0, 1))
    assert first["conv"]["kernel"].std() == pytest.approx((3 * 3 * 64) ** -0.5, rel=0.05)
    assert first["conv"]["kernel"].dtype == np.float32
    assert not first["conv"]["bias"].any()
    assert (first["norm"]["scale"] == 1).all()
    np.testing.assert_allclose(np.exp(first["log_scale"]), 4, rtol=1e-6)
    assert (first["conv"]["kernel"] == again["conv"]["kernel"]).all()
    assert (first["conv"]["kernel"] != other["conv"]["kernel"]).any()


def test_dropped_captions_do_not_matter():
    config = dataclasses.replace(training.load_config(CONFIGS / "tiny.json"), caption_dropout=1.0)
    schedule = train_vae.schedule_of(config)[:3]
    parameters = jax.tree.map(jnp.asarray, train_transformer.initial_parameters(config))
    pairs = train_transformer.SelfCorrection(inputs=[jnp.zeros((2, *grid, 8)) for grid in schedule[1:]], labels=[])
    text = jax.tree.map(jnp.asarray, train_text.initial_parameters(config)["text_encoder"])
    features, mask = train_text.encode(config, text, dataset.encode_captions(["a red car", "a blue dog"]))

    def logits(dropout: float):
        settings = dataclasses.replace(config, caption_dropout=dropout)
        return train_transformer.caption_logits(
            settings, parameters, features, mask, pairs, schedule, jax.random.key(0)
        )

    dropped, kept = logits(1.0), logits(0.0)
    np.testing.assert_allclose(dropped[0], dropped[1], atol=1e-5)
    assert float(jnp.abs(kept[0] - kept[1]).max()) > 1e-3


def true_answers(scenes: dataset.SceneBatch) -> train_text.ObjectAnswers:
    """What a perfect probe would say of two objects, the first left of the second."""
    color = 20.0 * jax.nn.one_hot(scenes.color + 1, 11)
    return train_text.ObjectAnswers(color, 20.0 * jax.nn.one_hot(jnp.array([[0, 1, 0, 0]]), 4))


def two_objects(caption: str) -> dataset.SceneBatch:
    left, right = world.SceneObject("apple", "red"), world.SceneObject("car", "blue")
    scene = world.Scene("position", (left, right), "night sky", relation="left of")
    return dataset.pack([(scene, [world.Placement(-0.5, 0.1, 0.3, 0), world.Placement(0.5, 0, 0.3, 0)], caption)])


def test_answers_are_wrong_about_colours_and_about_sides():
    scenes = two_objects("a red apple left of a blue car")
    truth = true_answers(scenes)
    assert train_text.answer_loss(truth, scenes)[0] < 1e-3
    no_red = train_text.answer_loss(truth._replace(color=jnp.roll(truth.color, 1, -1)), scenes)
    assert no_red[0] > 10
    assert (no_red[1]["color_accuracy"], no_red[1]["side_accuracy"]) == (0, 1)
    swapped = truth._replace(side=truth.side[:, jnp.array([1, 0, 2, 3])])
    assert train_text.answer_loss(swapped, scenes)[0] > 5


def test_an_object_alone_is_on_no_side():
    scene = world.Scene("single_object", (world.SceneObject("car", "blue"),), "night sky")
    scenes = dataset.pack([(scene, [world.Placement(0, 0, 0.5, 0)], "a blue car")])
    assert train_text.answer_loss(true_answers(scenes), scenes)[0] < 1e-3
    assert train_text.answer_loss(true_answers(scenes), scenes)[1]["side_accuracy"] == 0


def test_a_fresh_text_encoder_already_hears_the_order_of_words():
    config = training.load_config(CONFIGS / "embedded.json")
    text = jax.tree.map(jnp.asarray, train_text.initial_parameters(config)["text_encoder"])
    query, key, value = np.split(text["blocks"][0]["attention"]["query_key_value"]["kernel"], 3, axis=1)
    np.testing.assert_allclose([8 * query.std(), key.std()], value.std(), rtol=0.05)
    captions = ["a red apple left of a blue car", "a blue apple left of a red car"]
    (first, second), _ = train_text.encode(
        dataclasses.replace(config, dtype="float32"), text, dataset.encode_captions(captions)
    )
    apple = 2
    similarity = (
        jnp.vdot(first[apple], second[apple]) / jnp.linalg.norm(first[apple]) / jnp.linalg.norm(second[apple])
    )
    assert similarity < 0.95
