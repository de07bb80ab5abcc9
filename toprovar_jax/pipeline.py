"""From prompt to image: a thin shell around the pure functions of the library."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from os import PathLike
from typing import Any, SupportsIndex, TypeVar

import jax
import numpy as np
from jaxtyping import Array, DTypeLike, Float, UInt8
from PIL import Image

from toprovar_jax import request
from toprovar_jax.batch import Batch
from toprovar_jax.batch_programs import decode_pixels
from toprovar_jax.checkpoint import EMBEDDED, dtype_name, load_parameters, load_tokenizer
from toprovar_jax.config import CheckpointConfig, VAEConfig
from toprovar_jax.errors import InputError
from toprovar_jax.generation import Generator
from toprovar_jax.images import fit_image, to_image, to_images
from toprovar_jax.manifest import load_manifest
from toprovar_jax.models.bsq_vae import BSQVAE, multi_scale_quantize
from toprovar_jax.models.skeleton import Parameters, bind
from toprovar_jax.output import PipelineOutput
from toprovar_jax.programs import Programs, Recipe
from toprovar_jax.pruning.plan import Plan
from toprovar_jax.pruning.policies import resolve_policy
from toprovar_jax.pruning.policy import Policy
from toprovar_jax.request import GridLike, Numbers
from toprovar_jax.scale_loop import LoopConfig
from toprovar_jax.schedule import ScaleSchedule, tokenizer_schedule
from toprovar_jax.schedule import scale_schedule as tabulated_schedule
from toprovar_jax.text import TokenBatch, Tokenizer, encode_text
from toprovar_jax.text_batch import TextBatch, broadcast_negative, pad_features, pad_to_common_length

T = TypeVar("T")


class InfinityPipeline:
    """A checkpoint ready to generate.

    Args:
      config: the checkpoint's models and defaults.
      params: parameters by model: "transformer", "vae" and, for prompts, "text_encoder".
      dtype: "float32", "bfloat16" or "float8_e4m3fn", the policy that the parameters were loaded for.
      tokenizer: turns prompts into tokens; without it only text features can be given.
      checkpoint_digest: identifies the checkpoint, for instance in the images' metadata.
      folder: of the checkpoint, where policy "toprovar" looks for its profile and "skipvar" for its decisions.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        params: dict[str, Parameters],
        *,
        dtype: str,
        tokenizer: Tokenizer | None = None,
        checkpoint_digest: str | None = None,
        folder: str | PathLike[str] | None = None,
    ):
        self.config = config
        self.params = params
        self.dtype = dtype
        self.tokenizer = tokenizer
        self.checkpoint_digest = checkpoint_digest
        self.folder = folder
        self.programs = Programs()
        self._generate = Generator(config, params, dtype, self.programs)

    @classmethod
    def from_pretrained(
        cls, path: str | PathLike[str] = EMBEDDED, dtype: DTypeLike | None = None
    ) -> "InfinityPipeline":
        """Loads a checkpoint and verifies every byte of it.

        Args:
          path: folder written by `python -m convert`; by default the small model that comes with the package.
          dtype: float32, bfloat16 or float8_e4m3fn; the checkpoint's own where None.

        Raises:
          CheckpointError: the folder is missing, incomplete, altered or of another format, or the dtype unknown.
          InputError: the device has too little memory.
        """
        manifest = load_manifest(path)
        name = manifest.dtype if dtype is None else dtype_name(dtype)
        with _explain_out_of_memory():
            params = {
                "transformer": load_parameters(path, "transformer", name),
                "vae": load_parameters(path, "vae", name),
            }
            if manifest.config.text_encoder is not None:
                params["text_encoder"] = load_parameters(path, "text_encoder", name)
        tokenizer = load_tokenizer(path)
        return cls(
            manifest.config,
            params,
            dtype=name,
            tokenizer=None if tokenizer is None else Tokenizer(tokenizer, manifest.config.knows),
            checkpoint_digest=manifest.digest,
            folder=path,
        )

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: Numbers = 0,
        guidance_scale: Numbers | None = None,
        temperature: Numbers | None = None,
        top_k: Numbers | None = None,
        top_p: Numbers | None = None,
        height: int | None = None,
        width: int | None = None,
        aspect_ratio: float | None = None,
        pixels: str | None = None,
        guidance_layer: SupportsIndex | None = None,
        policy: str | Plan | Policy = "dense",
        output_type: str = "pil",
        trace: bool = False,
        callback_on_scale_end: Callable[[int, int], object] | None = None,
        text_features: Sequence[Any] | None = None,
        negative_text_features: Sequence[Any] | None = None,
        forced_bits: Sequence[Any] | None = None,
        sampling_draws: Sequence[Any] | None = None,
        scale_schedule: Sequence[GridLike] | np.ndarray | None = None,
        rope_grid: GridLike | None = None,
    ) -> PipelineOutput:
        """Generates images.

        Args:
          prompt: one or several.
          negative_prompt: what to steer away from, one for all or one per prompt; needs guidance.
          num_images_per_prompt: images of one prompt follow each other in the batch.
          seed: image i uses seed + i; or one seed per image. An image depends on its seed, not on its batch.
          guidance_scale: classifier-free guidance, one number or one per scale; 1 is off.
          temperature: divides the logits, one number or one per scale.
          top_k: 1 is greedy, 0 is off, one number or one per scale.
          top_p: nucleus threshold, 0 is off, one number or one per scale.
          height: pixels, with `width`; the nearest size that the model knows is generated, with a warning.
          width: pixels, with `height`.
          aspect_ratio: height / width, instead of `height` and `width`; the nearest template is used.
          pixels: pixel budget: "0.06M", "0.25M", "0.60M" or "1M".
          guidance_layer: 0 or None guides the logits; a negative index guides inside the network after that block.
          policy: what to prune: "dense" (nothing), "fastvar", "skipvar", "toprovar" (by the profile beside the
            checkpoint), a policy object, a plan, or the name of a plan's JSON file.
          output_type: "pil" images, "np" uint8 RGB, or "latent" code maps.
          trace: also return every scale's logits, bits, code map, attention entropy and kept tokens.
          callback_on_scale_end: called with (scale index, number of scales).
          text_features: one [tokens, channels] array per text, in place of prompts: a prompt given as well is not
            read.
          negative_text_features: the same in place of negative prompts.
          forced_bits: per scale, bits [batch, height, width, code_dim] (a frame axis of 1 may follow batch) to go
            on with instead of the chosen ones; None entries, or fewer entries than scales, leave scales free.
          sampling_draws: per scale, Exp(1) draws [batch, tokens, bits, 2] in place of the seed's; axes before the
            last may be merged, as in [batch * tokens * bits, 2].
          scale_schedule: token grids (height, width) in place of the tabulated ones.
          rope_grid: grid that positions refer to; by default the last 1M grid of the aspect ratio.

        Raises:
          InputError: an argument is impossible or contradicts another, or the device is out of memory.
        """
        chosen_policy = resolve_policy(policy, self.folder, self.checkpoint_digest)
        request.check_choice("output_type", output_type, request.OUTPUT_TYPES)
        images_per_prompt = request.resolve_count("num_images_per_prompt", num_images_per_prompt)
        transformer = self.config.transformer
        geometry = request.resolve_geometry(
            self.config,
            height=height,
            width=width,
            aspect_ratio=aspect_ratio,
            pixels=pixels,
            schedule=scale_schedule,
            rope=rope_grid,
        )
        settings = request.resolve_settings(
            self.config,
            len(geometry.schedule),
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        loop = LoopConfig(
            transformer=transformer,
            dtype=self.dtype,
            schedule=geometry.schedule,
            rope_grid=geometry.rope_grid,
            guided=settings.guided,
            guidance_layer=request.resolve_guidance_layer(self.config, guidance_layer),
        )
        with _explain_out_of_memory():
            started = time.perf_counter()
            prompts = self._read("prompt", prompt, text_features)
            negatives = self._read("negative_prompt", negative_prompt, negative_text_features)
            if prompts is None:
                raise InputError("nothing to draw: pass a prompt, or text_features in its place")
            if negatives is not None and not loop.guided:
                raise InputError("a negative prompt needs guidance: set guidance_scale to another value than 1")
            num_images = len(prompts.lengths) * images_per_prompt
            # Everything that is put on the device stays there to the end of the image. Where a buffer is freed
            # meanwhile, later ones may be at other addresses than in the image before, and to rewrite a program's
            # CUDA graph for them takes the host 1.6 ms.
            prompts, negatives, seeds = _upload((prompts, negatives, request.resolve_seeds(seed, num_images)))
            text, text_compile = self._encode(prompts)
            negative, negative_compile = (None, 0.0) if negatives is None else self._encode(negatives)
            if negative is not None:
                negative = broadcast_negative(negative, len(text.lengths))
                text, negative = pad_to_common_length(text, negative)
                negative = negative.repeated(images_per_prompt)
            text = text.repeated(images_per_prompt)
            text_seconds = time.perf_counter() - started - text_compile - negative_compile
            batch = Batch(
                loop=loop,
                policy=chosen_policy,
                text=text,
                negative=negative,
                settings=settings,
                seeds=seeds,
                forced_bits=request.resolve_forced_bits(
                    forced_bits, loop.code_grids, num_images, transformer.code_dim
                ),
                draws=request.resolve_draws(sampling_draws, loop.schedule, num_images, transformer.token_bits),
                trace=trace,
                decode=output_type != "latent",
            )
            output = self._generate(batch, callback_on_scale_end)
        timings = dataclasses.replace(
            output.timings,
            compile=output.timings.compile + text_compile + negative_compile,
            text=output.timings.text + text_seconds,
        )
        images = to_images(np.asarray(output.images)) if output_type == "pil" else output.images
        return dataclasses.replace(output, images=images, timings=timings)

    def reconstruct(
        self, image: Image.Image | UInt8[np.ndarray, "height width 3"], pixels: str | None = None
    ) -> Image.Image:
        """Encodes an image to bits and decodes them again: what the tokenizer keeps of it.

        Args:
          image: a PIL image or RGB pixels, resized and centre-cropped to the nearest aspect ratio that the model
            knows.
          pixels: pixel budget; the checkpoint's own where None.

        Raises:
          InputError: the image is something else, the budget is unknown or the device is out of memory.
        """
        picture = to_image(image)
        budget = self.config.defaults.pixels if pixels is None else pixels
        schedule = tabulated_schedule(picture.height / picture.width, budget)
        height, width = request.image_size(self.config, schedule)
        fitted = fit_image(picture, height, width)[None]
        codes = tokenizer_schedule(schedule, self.config.transformer.patchify)
        key = ("reconstruct", codes)
        static = {"config": self.config.vae, "dtype": self.dtype, "schedule": codes}
        with _explain_out_of_memory():
            self.programs.compile(
                {key: lambda: Recipe(reconstruct_pixels, (self.params["vae"], fitted), static, convolves=True)}
            )
            return to_images(np.asarray(self.programs.run(key, self.params["vae"], fitted)))[0]

    def _read(self, name: str, prompt: Any, features: Any) -> TokenBatch | TextBatch | None:
        """Given features, or else the tokens of prompts."""
        if features is not None:
            return pad_features(features, self.config.transformer)
        if prompt is None:
            return None
        prompts = request.resolve_texts(name, prompt)
        if self.config.text_encoder is None or self.tokenizer is None:
            raise InputError(
                "this checkpoint has no text encoder: convert again with --text_encoder, or pass text_features"
            )
        return self.tokenizer.encode(prompts, self.config.transformer.text_max_length)

    def _encode(self, text: TokenBatch | TextBatch) -> tuple[TextBatch, float]:
        """Features of a text, and the seconds that compiling for them took."""
        if isinstance(text, TextBatch):
            return text, 0.0
        key = ("text", text.tokens.shape)
        arguments = self.params["text_encoder"], *text
        static: dict[str, Hashable] = {"config": self.config.text_encoder, "dtype": self.dtype}
        seconds = self.programs.compile({key: lambda: Recipe(encode_text, arguments, static)})
        return TextBatch(self.programs.run(key, *arguments), text.lengths), seconds


@functools.partial(jax.jit, donate_argnums=0)
def _upload(arrays: T) -> T:
    """Puts arrays of the host on the device, in half of the time that `jax.device_put` takes.

    They are donated, so that what is uploaded is the result itself, and nothing is freed when it has been copied.
    """
    return arrays


def reconstruct_pixels(
    params: Parameters,
    image: Float[Array, "batch pixel_height pixel_width 3"],
    *,
    config: VAEConfig,
    dtype: str,
    schedule: ScaleSchedule,
) -> UInt8[Array, "batch pixel_height pixel_width 3"]:
    """Image in [-1, 1] to the bits of a tokenizer schedule and back to RGB."""
    latent = bind(BSQVAE, config, dtype, params).encode(image)
    return decode_pixels(params, multi_scale_quantize(latent, schedule).code_map, config=config, dtype=dtype)


@contextlib.contextmanager
def _explain_out_of_memory() -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            "out of device memory: generate fewer images at once, choose a smaller pixel budget, or load the "
            "checkpoint with dtype bfloat16 or float8_e4m3fn"
        ) from error
