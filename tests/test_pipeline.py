"""The pipeline: batches, seeds, settings, outputs, and every way a call can be wrong."""

import dataclasses
import functools
import inspect

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from toprovar_jax import InputError, checkpoint, request, scale_loop
from toprovar_jax.config import CheckpointConfig
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.schedule import Grid


def generate(*args, **kwargs):
    return tiny.pipeline()(*args, **({"scale_schedule": tiny.SCHEDULE, "output_type": "np"} | kwargs))


def assert_same_bits(one, other):
    for a, b in zip(one.bits, other.bits, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_same_seed_gives_the_same_image_and_another_seed_another():
    first, again, other = (generate("a red cat", seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.images, again.images)
    assert any((a != b).any() for a, b in zip(first.bits, other.bits, strict=True))


def test_an_image_does_not_depend_on_its_batch():
    """Prompts of different lengths, alone and together."""
    prompts = ["a cat", "a red dog and a blue cat left of a dog"]
    together = generate(prompts, seed=[5, 9])
    for i, (prompt, seed) in enumerate(zip(prompts, (5, 9), strict=True)):
        alone = generate(prompt, seed=seed)
        for scale, bits in enumerate(alone.bits):
            np.testing.assert_array_equal(together.bits[scale][i : i + 1], bits)


def test_images_of_one_prompt_use_consecutive_seeds():
    batch = generate(["a cat", "a dog"], num_images_per_prompt=2, seed=7)
    assert batch.images.shape == (4, 8, 6, 3)
    for i, (prompt, seed) in enumerate([("a cat", 7), ("a cat", 8), ("a dog", 9), ("a dog", 10)]):
        np.testing.assert_array_equal(batch.bits[-1][i], generate(prompt, seed=seed).bits[-1][0])


def test_draws_depend_on_seed_scale_token_and_bit_alone():
    """A larger grid or more bits extend the draws; they change none of them."""
    key = scale_loop.image_keys(np.array([11], np.uint32))[0]
    first, small = scale_loop.sampling.exponential_draws(key, (Grid(1, 1), Grid(2, 2)), bits=4)
    again, large = scale_loop.sampling.exponential_draws(key, (Grid(1, 1), Grid(3, 3)), bits=4)
    assert [x.shape for x in (first, small, large)] == [(1, 4, 2), (4, 4, 2), (9, 4, 2)]
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(small, large[:4])
    assert len(np.unique(np.concatenate([first, large]))) == first.size + large.size
    (many,) = scale_loop.sampling.exponential_draws(key, (Grid(64, 64),), bits=4)
    assert abs(float(np.mean(many)) - 1) < 0.02


def test_output_types():
    pixels = generate("a cat")
    images = generate("a cat", output_type="pil").images
    latent = generate("a cat", output_type="latent")
    assert [image.size for image in images] == [(6, 8)]
    np.testing.assert_array_equal(np.asarray(images[0]), pixels.images[0])
    assert latent.images.shape == (1, 4, 3, 4)
    assert latent.images.dtype == np.float32
    decoded = tiny.pipeline()("a cat", scale_schedule=tiny.SCHEDULE, output_type="np").images
    np.testing.assert_array_equal(decoded, pixels.images)


def test_trace_has_guided_rows_only_where_guidance_acts():
    scales = generate("a cat", guidance_scale=[1.0, 3.0, 1.0], trace=True).trace.scales
    assert [scale.logits_raw.shape for scale in scales] == [(1, 1, 8), (2, 4, 8), (1, 12, 8)]
    assert [scale.bits.shape for scale in scales] == [(1, 1, 1, 4), (1, 2, 2, 4), (1, 4, 3, 4)]
    assert {scale.code_map.shape for scale in scales} == {(1, 4, 3, 4)}


def test_guidance_of_one_everywhere_equals_no_guidance():
    off = generate("a cat", guidance_scale=1, trace=True)
    barely = generate("a cat", guidance_scale=[1.0, 1.0, 1.0 + 1e-6], trace=True)
    for a, b in zip(off.trace.scales, barely.trace.scales, strict=True):
        np.testing.assert_allclose(a.logits_raw[:1], b.logits_raw[:1], atol=1e-4)


def test_forced_bits_feed_forward_while_the_trace_keeps_the_choice():
    free = generate("a cat", trace=True)
    flipped = [1 - bits for bits in free.bits]
    forced = generate("a cat", trace=True, forced_bits=flipped)
    np.testing.assert_array_equal(forced.trace.scales[0].bits, free.trace.scales[0].bits)
    for given, used in zip(flipped, forced.bits, strict=True):
        np.testing.assert_array_equal(given, used)
    np.testing.assert_allclose(forced.trace.scales[0].code_map, -free.trace.scales[0].code_map, atol=1e-6)
    with_frames = generate("a cat", forced_bits=[bits[:, None] for bits in flipped])
    np.testing.assert_array_equal(with_frames.images, forced.images)


def test_forcing_some_scales_leaves_the_others_free():
    free = generate("a cat")
    partly = generate("a cat", forced_bits=[free.bits[0]])
    assert_same_bits(free, partly)


def test_greedy_sampling_ignores_the_seed():
    assert_same_bits(generate("a cat", top_k=1, seed=0), generate("a cat", top_k=1, seed=1))


def test_negative_prompts_change_the_picture_and_one_serves_all_prompts():
    plain = generate(["a cat", "a dog"], trace=True)
    one = generate(["a cat", "a dog"], negative_prompt="blue", trace=True)
    each = generate(["a cat", "a dog"], negative_prompt=["blue", "blue"], trace=True)
    np.testing.assert_allclose(one.trace.scales[0].logits_raw, each.trace.scales[0].logits_raw, atol=1e-5)
    rows = one.trace.scales[0].logits_raw
    np.testing.assert_array_equal(rows[:2], plain.trace.scales[0].logits_raw[:2])
    assert np.abs(rows[2:] - plain.trace.scales[0].logits_raw[2:]).max() > 1e-3


def test_the_functional_loop_equals_the_pipeline():
    """`scale_loop.sample` is one pure function; the pipeline runs the same steps one program at a time."""
    expected = generate("a cat", text_features=None, output_type="latent")
    text = tiny.pipeline().tokenizer.encode(["a cat"])
    key = ("text", text.tokens.shape)
    encoded = tiny.pipeline().programs.run(key, tiny.parameters()["text_encoder"], *text)
    loop = scale_loop.LoopConfig(
        tiny.CONFIG.transformer, "float32", tuple(Grid(*pair) for pair in tiny.SCHEDULE), Grid(72, 54), guided=True
    )
    settings = tuple(scale_loop.SamplingSettings(3.0, 0.7, 900, 0.97) for _ in tiny.SCHEDULE)
    sample = jax.jit(scale_loop.sample, static_argnames="loop")
    code_map, bits = sample(
        tiny.parameters()["transformer"],
        encoded,
        text.lengths,
        scale_loop.image_keys(np.zeros(1, np.uint32)),
        settings,
        loop=loop,
    )
    for a, b in zip(bits, expected.bits, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(code_map, expected.images, atol=1e-5)


def test_programs_compile_once_for_all_prompts_seeds_and_settings():
    generate("a red cat")
    pipe = tiny.pipeline()
    before = len(pipe.programs)
    out = generate("a blue dog", seed=123, guidance_scale=2.5, temperature=1.3, top_k=0, top_p=0.5)
    assert len(pipe.programs) == before
    assert out.timings.compile == 0.0
    assert len(out.timings.scales) == 3
    assert out.timings.total == out.timings.text + sum(out.timings.scales) + out.timings.decode
    assert min(out.timings.text, *out.timings.scales, out.timings.decode) > 0


def test_callback_sees_every_scale():
    seen = []
    generate("a cat", callback_on_scale_end=lambda scale, num_scales: seen.append((scale, num_scales)))
    assert seen == [(0, 3), (1, 3), (2, 3)]


def test_height_and_width_choose_the_nearest_size_and_say_so():
    pipe = tiny.pipeline()
    with pytest.warns(UserWarning, match=r"generating 32x32 \(height x width\), the nearest size to 30x33"):
        out = pipe("a cat", height=30, width=33, output_type="latent")
    assert out.images.shape == (1, 16, 16, 4)


def test_a_model_of_few_scales_refuses_larger_budgets_and_never_chooses_one():
    config = dataclasses.replace(
        tiny.CONFIG, transformer=dataclasses.replace(tiny.CONFIG.transformer, max_scales=10)
    )
    resolve = functools.partial(
        request.resolve_geometry, config, **dict.fromkeys(("aspect_ratio", "schedule", "rope"))
    )
    with pytest.raises(
        InputError, match=r"1M has 13 scales but the model knows 10: choose one of 0\.06M, 0\.25M$"
    ):
        resolve(height=None, width=None, pixels="1M")
    with pytest.warns(UserWarning, match="generating 64x64"):
        assert len(resolve(height=500, width=500, pixels=None).schedule) == 10


def test_reconstruction_has_the_size_of_the_nearest_template():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    assert tiny.pipeline().reconstruct(image).size == (44, 22)
    assert tiny.pipeline().reconstruct(image.convert("L")).mode == "RGB"


def test_reconstruction_takes_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    expected = np.asarray(tiny.pipeline().reconstruct(Image.fromarray(pixels)))
    assert expected.std() > 1
    for array in (pixels, jax.numpy.asarray(pixels)):
        np.testing.assert_array_equal(
            inspect.unwrap(InfinityPipeline.reconstruct)(tiny.pipeline(), array), expected
        )


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (np.zeros((32, 32, 3), np.float32), r"float32 \[32, 32, 3\]"),
        (np.zeros((32, 32), np.uint8), r"uint8 \[32, 32\]"),
        (np.zeros((1, 32, 32, 3), np.uint8), r"uint8 \[1, 32, 32, 3\]"),
        (np.zeros((32, 32, 4), np.uint8), r"uint8 \[32, 32, 4\]"),
        (Image.new("RGB", (0, 5)), r"uint8 \[5, 0, 3\]"),
        ("cat.png", "'cat.png'"),
        (None, "None"),
        ([[1], [1, 2]], r"\[\[1\], \[1, 2\]\]"),
    ],
)
def test_reconstruction_of_anything_else_is_refused(image, got):
    reconstruct = inspect.unwrap(InfinityPipeline.reconstruct)
    with pytest.raises(
        InputError, match=rf"the image must be a PIL image or a uint8 array \[height, width, 3\], got {got}$"
    ):
        reconstruct(tiny.pipeline(), image)


def test_bfloat16_stays_close_to_float32():
    """The stated tolerance: logits differ by at most 3 % (root mean square) at every scale, bits forced."""
    reference = generate("a cat", trace=True)
    pipe = InfinityPipeline(
        tiny.CONFIG,
        tiny.parameters("bfloat16"),
        dtype="bfloat16",
        tokenizer=tiny.pipeline().tokenizer,
    )
    low = pipe("a cat", scale_schedule=tiny.SCHEDULE, output_type="np", trace=True, forced_bits=reference.bits)
    for a, b in zip(low.trace.scales, reference.trace.scales, strict=True):
        difference = np.linalg.norm(a.logits_raw - b.logits_raw) / np.linalg.norm(b.logits_raw)
        assert 0 < difference < 0.03
    assert np.abs(low.images.astype(int) - reference.images.astype(int)).mean() < 2


def test_numbers_may_come_from_numpy_and_jax():
    settings = {"guidance_scale": [1.0, 2.0, 3.0], "top_k": 0, "guidance_layer": -1, "rope_grid": (64, 64)}
    plain = generate("a red cat", seed=3, **settings)
    for number, array in ((np.int64, np.asarray), (np.asarray, jax.numpy.asarray), (jax.numpy.asarray, list)):
        other = {
            "guidance_scale": array([1.0, 2.0, 3.0]),
            "top_k": array([0, 0, 0]),
            "guidance_layer": np.int64(-1),
            "rope_grid": np.asarray([64, 64]),
            "scale_schedule": [list(grid) for grid in tiny.SCHEDULE],
        }
        assert_same_bits(plain, generate("a red cat", seed=number(3), **other))
        assert_same_bits(plain, generate("a red cat", seed=array([3]), **other))
    assert_same_bits(plain, generate("a red cat", seed=3, **settings, scale_schedule=np.asarray(tiny.SCHEDULE)))


def test_draws_may_come_as_rows():
    shapes = [(1, height * width, 4, 2) for height, width in tiny.SCHEDULE]
    draws = [np.random.default_rng(0).exponential(size=shape) for shape in shapes]
    plain = generate("a red cat", sampling_draws=draws)
    for merged in ((-1, 2), (1, -1, 2)):
        assert_same_bits(plain, generate("a red cat", sampling_draws=[d.reshape(merged) for d in draws]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to draw: pass a prompt, or text_features in its place"),
        ({"prompt": "  "}, "the prompt is empty: describe the image in at least one word"),
        ({"prompt": []}, "prompt is an empty list: pass at least one text"),
        ({"text_features": []}, r"text features are empty: pass one \[tokens, channels\] array per image"),
        (
            {"text_features": [np.zeros((3, 5))]},
            r"text features 0 must have the shape \[tokens, 128\], got \[3, 5\]",
        ),
        ({"text_features": [tiny.features(33)]}, "text features 0 must have 1 to 32 tokens, got 33"),
        ({"text_features": [tiny.features(2) * np.nan]}, "text features 0 holds values that are not finite"),
        ({"prompt": "a", "policy": "sparse"}, "unknown policy 'sparse': choose one of dense, fastvar"),
        ({"prompt": "a", "output_type": "jpg"}, "unknown output_type 'jpg': choose one of pil, np, latent"),
        (
            {"prompt": "a", "num_images_per_prompt": 0},
            "num_images_per_prompt must be a whole number of at least 1, got 0",
        ),
        ({"prompt": "a", "height": 32}, "height and width belong together"),
        (
            {"prompt": "a", "height": 32, "width": 0},
            "height and width must be positive whole numbers, got 32 and 0",
        ),
        (
            {"prompt": "a", "height": 32, "width": 32, "aspect_ratio": 1.0},
            "aspect_ratio contradicts height and width",
        ),
        (
            {"prompt": "a", "scale_schedule": None, "aspect_ratio": 9.0},
            r"no aspect ratio near 9 .* from 0.333 to 3.0",
        ),
        (
            {"prompt": "a", "scale_schedule": None, "pixels": "4M"},
            "unknown pixel budget '4M': choose one of 0.06M",
        ),
        ({"prompt": "a", "scale_schedule": [(2, 2)]}, r"scale_schedule must start with the grid \(1, 1\)"),
        (
            {"prompt": "a", "scale_schedule": [(1, 1), (0, 2)]},
            r"a grid is a pair of positive whole sides .* got \(0, 2\)",
        ),
        ({"prompt": "a", "scale_schedule": [(1, 1), (2,)]}, r"a grid is a pair of .* got \(2,\)"),
        ({"prompt": "a", "rope_grid": (1, 64, 64)}, r"a grid is a pair of .* got \(1, 64, 64\)"),
        ({"prompt": "a", "scale_schedule": [(1, 1)] * 16}, "scale_schedule has 16 scales but the model knows 15"),
        ({"prompt": "a", "temperature": 0.0}, "temperature must be above 0, got 0.0: use top_k=1 for greedy"),
        ({"prompt": "a", "guidance_scale": [1.0, 2.0]}, "guidance_scale must be one number or 3 of them, one per"),
        (
            {"prompt": "a", "guidance_scale": [np.ones(1), np.ones(2)]},
            "guidance_scale must be one number or 3 of them",
        ),
        ({"prompt": "a", "guidance_scale": float("inf")}, "guidance_scale must be finite, got inf"),
        ({"prompt": "a", "top_p": 1.5}, r"top_p must lie between 0 \(off\) and 1, got 1.5"),
        ({"prompt": "a", "top_k": -1}, r"top_k must be 0 \(off\) or a positive whole number, got -1"),
        ({"prompt": "a", "top_k": 1.5}, r"top_k must be 0 \(off\) or a positive whole number, got 1.5"),
        ({"prompt": "a", "guidance_layer": -2}, r"guidance_layer must be 0 \(on the logits\) or from -1 to -1"),
        ({"prompt": "a", "seed": [1, 2]}, "got 2 seeds for 1 images: pass one number or one seed per image"),
        ({"prompt": "a", "seed": 1.5}, "seeds must be whole numbers, got 1.5"),
        ({"prompt": "a", "seed": -1}, r"seeds must lie between 0 and 2\*\*32 - 1, got -1"),
        ({"prompt": "a", "guidance_scale": 1.0, "negative_prompt": "b"}, "a negative prompt needs guidance"),
        (
            {"prompt": ["a"] * 3, "negative_prompt": ["b"] * 2},
            "got 2 negative prompts for 3 prompts: pass one, or",
        ),
        ({"prompt": "a", "forced_bits": [None] * 4}, "forced_bits has 4 entries for 3 scales: pass at most one"),
        (
            {"prompt": "a", "forced_bits": [np.zeros((1, 2, 1, 4))]},
            r"forced_bits\[0\] must have the shape \[1, 1, 1, 4\]",
        ),
        (
            {"prompt": "a", "forced_bits": [np.full((1, 1, 1, 4), 2)]},
            r"forced_bits\[0\] holds other values than 0 and",
        ),
        (
            {"prompt": "a", "sampling_draws": [np.ones(3)]},
            r"sampling_draws\[0\] must have the shape \[1, 1, 4, 2\]",
        ),
        (
            {"prompt": "a", "sampling_draws": [np.ones((1, 4, 1, 2))]},
            r"sampling_draws\[0\] must have the shape \[1, 1, 4, 2\], got \[1, 4, 1, 2\]",
        ),
        (
            {"prompt": "a", "sampling_draws": [-np.ones((1, 1, 4, 2))]},
            r"sampling_draws\[0\] must hold Exp\(1\) draws",
        ),
    ],
)
def test_bad_calls_name_the_remedy(arguments, message):
    with pytest.raises(InputError, match=message):
        generate(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 3}, "prompt must be a text or a list of texts, got 3"),
        ({"prompt": [None]}, r"prompt must be a text or a list of texts, got \[None\]"),
        ({"prompt": b"a cat"}, "prompt must be a text or a list of texts, got b'a cat'"),
        (
            {"prompt": "a", "negative_prompt": ["b", 1]},
            r"negative_prompt must be a text or a list .* got \['b', 1\]",
        ),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt must be a whole number of at least 1, got 1.5"),
        ({"num_images_per_prompt": "2"}, "num_images_per_prompt must be a whole number of at least 1, got '2'"),
        (
            {"scale_schedule": None, "aspect_ratio": "1:1"},
            "aspect_ratio must be height / width as a number, 1.0 for a square, got '1:1'",
        ),
        ({"height": 32.5, "width": 32}, "height and width must be positive whole numbers, got 32.5 and 32"),
        ({"height": "32", "width": 32}, "height and width must be positive whole numbers, got '32' and 32"),
        ({"guidance_layer": -1.0}, r"guidance_layer must be 0 \(on the logits\) or .* got -1.0"),
        ({"scale_schedule": 3}, r"scale_schedule must be a list of grids \(height, width\), got 3"),
        ({"rope_grid": "ab"}, r"a grid is a pair of positive whole sides \(height, width\), got 'ab'"),
        ({"text_features": 3}, "text features must be a list of arrays, got 3"),
        ({"text_features": ["a cat"]}, "text features 0 must be an array of numbers, got str"),
        ({"forced_bits": 3}, "forced_bits must be a list of arrays, one per scale, got 3"),
        ({"forced_bits": [[[1], [0, 1]]]}, r"forced_bits\[0\] must be an array of numbers, got list"),
        ({"sampling_draws": ["x"]}, r"sampling_draws\[0\] must be an array of numbers, got str"),
    ],
)
def test_arguments_of_other_types_name_what_is_wanted(arguments, message):
    call = inspect.unwrap(InfinityPipeline.__call__)  # as users call it, without the tests' type checks
    with pytest.raises(InputError, match=message):
        call(tiny.pipeline(), **{"prompt": "a", "scale_schedule": tiny.SCHEDULE, "output_type": "np"} | arguments)


def test_features_replace_prompts():
    """A prompt beside them is a label: it is not read, whatever it says."""
    features, negative = [tiny.features(3)], [tiny.features(5, seed=1)]
    alone = generate(text_features=features, negative_text_features=negative, trace=True)
    both = generate("a cat", "blue", text_features=features, negative_text_features=negative, trace=True)
    for a, b in zip(alone.trace.scales, both.trace.scales, strict=True):
        np.testing.assert_array_equal(a.logits_raw, b.logits_raw)
    prompts = generate("a cat", "blue", trace=True).trace.scales[0].logits_raw
    assert np.abs(both.trace.scales[0].logits_raw - prompts).max(axis=(1, 2)).min() > 1e-3


def test_a_checkpoint_without_text_encoder_says_what_to_do():
    config = CheckpointConfig(tiny.CONFIG.transformer, tiny.CONFIG.vae, defaults=tiny.CONFIG.defaults)
    with pytest.raises(
        InputError, match="no text encoder: convert again with --text_encoder, or pass text_features"
    ):
        InfinityPipeline(config, tiny.parameters(), dtype="float32")("a cat")


def test_out_of_device_memory_is_explained(monkeypatch):
    def run_out_of_memory(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")

    generate("a cat")
    monkeypatch.setattr(tiny.pipeline().programs, "run", run_out_of_memory)
    with pytest.raises(InputError, match="out of device memory: generate fewer images at once, choose a smaller"):
        generate("a cat")


def test_a_prompt_that_is_too_long_is_cut_with_a_warning():
    with pytest.warns(UserWarning, match="the prompt has 41 tokens and the text encoder reads 32"):
        generate("cat " * 40)


def test_programs_share_no_parameters_but_those_of_cross_attention():
    parameters = tiny.parameters()["transformer"]
    parts = scale_loop.context_parameters(parameters), scale_loop.scale_parameters(parameters)
    text, scales = (
        {name for name, leaf in checkpoint.flatten(part).items() if leaf is not None} for part in parts
    )
    assert text | scales == set(checkpoint.flatten(parameters))
    shared = {tuple(name.split("/")[2:-1]) for name in text & scales}
    assert shared == {("cross_attention", "query"), ("cross_attention", "output")}
