"""Generates images: python -m toprovar_jax.generate [--checkpoint DIR] --prompt TEXT

Writes one PNG per image, with prompt, seed, settings and the checkpoint's digest as text chunks.
"""

import contextlib
import functools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import flags
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from toprovar_jax import command_line, request
from toprovar_jax.checkpoint import DTYPES, EMBEDDED
from toprovar_jax.config import CheckpointConfig
from toprovar_jax.errors import InputError
from toprovar_jax.manifest import load_manifest
from toprovar_jax.output import PipelineOutput
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.pruning.policies import POLICY_NAMES, resolve_policy
from toprovar_jax.visualization.folder import write_trace
from toprovar_jax.visualization.measurements import PictureTrace, picture_trace

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", str(EMBEDDED), "Folder written by `python -m convert`; default: the model in the package."
)
_PROMPT = flags.DEFINE_string("prompt", None, "What to draw.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "Text file with one prompt per line.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "images", "Folder for the PNG files; made where missing.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of each prompt's first image; the next ones count up.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "Images per prompt.")
_GUIDANCE_SCALE = flags.DEFINE_float(
    "guidance_scale", None, "Classifier-free guidance; default: the checkpoint's."
)
_TEMPERATURE = flags.DEFINE_float("temperature", None, "Sampling temperature; default: the checkpoint's.")
_ASPECT_RATIO = flags.DEFINE_float("aspect_ratio", None, "height / width; the nearest template is used.")
_HEIGHT = flags.DEFINE_integer("height", None, "Height in pixels, with --width, instead of --aspect_ratio.")
_WIDTH = flags.DEFINE_integer("width", None, "Width in pixels, with --height, instead of --aspect_ratio.")
_PIXELS = flags.DEFINE_string(
    "pixels", None, "Pixel budget: 0.06M, 0.25M, 0.60M or 1M; default: the checkpoint's."
)
_POLICY = flags.DEFINE_string(
    "policy", "dense", f"What to prune: {', '.join(POLICY_NAMES)}, or a plan's JSON file."
)
_SAVE_TRACE = flags.DEFINE_string(
    "save_trace",
    None,
    "Folder for what pruning saw and did: per image a folder with entropy maps, pruned tokens, focused shares, "
    "layer scores and the plan.",
)
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Precision; default: the checkpoint's.")


def main() -> None:
    """Reads the flags, generates, writes the files and prints one line of timings per prompt."""
    prompts = _prompts()
    # Unknown names and files that are no plans are found before anything is loaded.
    policy = _POLICY.value if _POLICY.value in POLICY_NAMES else resolve_policy(_POLICY.value)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_output_folder(Path(_OUTPUT_DIR.value), "--output_dir"))
        trace_folder = None
        if _SAVE_TRACE.value is not None:
            trace_folder = stack.enter_context(_output_folder(Path(_SAVE_TRACE.value), "--save_trace"))
        command_line.use_compilation_cache()
        _check_settings(load_manifest(_CHECKPOINT.value).config)
        pipe = InfinityPipeline.from_pretrained(_CHECKPOINT.value, _DTYPE.value)
        policy = resolve_policy(policy, pipe.folder, pipe.checkpoint_digest)
        for index, prompt in enumerate(prompts):
            with _progress_bar() as show:
                output = pipe(
                    prompt,
                    num_images_per_prompt=_NUM_IMAGES.value,
                    seed=_SEED.value,
                    guidance_scale=_GUIDANCE_SCALE.value,
                    temperature=_TEMPERATURE.value,
                    aspect_ratio=_ASPECT_RATIO.value,
                    height=_HEIGHT.value,
                    width=_WIDTH.value,
                    pixels=_PIXELS.value,
                    policy=policy,
                    trace=trace_folder is not None,
                    callback_on_scale_end=show,
                )
            for i, path in enumerate(_write(output, pipe, prompt, folder, index)):
                print(path)
                if trace_folder is not None:
                    print(_write_trace(picture_trace(output, policy, i), trace_folder / path.stem))
            print(_timings_line(output))


def _prompts() -> list[str]:
    prompt, file = _PROMPT.value, _PROMPT_FILE.value
    if prompt is not None and file is None:
        if not prompt.strip():
            raise InputError("the prompt is empty: say what to draw")
        return [prompt]
    if file is None or prompt is not None:
        raise InputError("pass what to draw with --prompt TEXT or --prompt_file FILE, one of the two")
    return command_line.read_prompts(file)


def _check_settings(config: CheckpointConfig) -> None:
    """Finds out before the weights are loaded whether the pipeline will refuse the flags.

    Raises:
      InputError: it will.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pipeline gives the same ones
        geometry = request.resolve_geometry(
            config,
            height=_HEIGHT.value,
            width=_WIDTH.value,
            aspect_ratio=_ASPECT_RATIO.value,
            pixels=_PIXELS.value,
            schedule=None,
            rope=None,
        )
    request.resolve_settings(
        config,
        len(geometry.schedule),
        guidance_scale=_GUIDANCE_SCALE.value,
        temperature=_TEMPERATURE.value,
        top_k=None,
        top_p=None,
    )
    request.resolve_seeds(_SEED.value, request.resolve_count("num_images_per_prompt", _NUM_IMAGES.value))


@contextlib.contextmanager
def _output_folder(folder: Path, flag: str) -> Iterator[Path]:
    """Makes a flag's folder and finds out that it can be written; a run that fails leaves no empty ones behind."""
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to the output folder {folder} ({error.strerror}): choose another {flag}"
        ) from error
    try:
        yield folder
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):  # it holds earlier images
                path.rmdir()
        raise


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], object]]:
    """A callback that shows a bar from the first scale on, so that an error before it is one line alone."""
    with contextlib.ExitStack() as stack:
        bar = functools.cache(
            lambda num_scales: stack.enter_context(tqdm(desc="scales", unit="scale", total=num_scales))
        )
        yield lambda _, num_scales: bar(num_scales).update()


def _write(output: PipelineOutput, pipe: InfinityPipeline, prompt: str, folder: Path, index: int) -> list[Path]:
    settings = {
        "guidance_scale": _GUIDANCE_SCALE.value,
        "temperature": _TEMPERATURE.value,
        "pixels": _PIXELS.value,
    }
    defaults = pipe.config.defaults
    paths = []
    for i, image in enumerate(output.images):
        assert isinstance(image, Image.Image)
        info = PngInfo()
        info.add_itxt("prompt", prompt)
        info.add_text("seed", str(_SEED.value + i))
        for name, value in settings.items():
            info.add_text(name, str(getattr(defaults, name) if value is None else value))
        info.add_text("policy", _POLICY.value)
        info.add_text("size", f"{image.height}x{image.width}")
        info.add_text("dtype", pipe.dtype)
        info.add_text("checkpoint", str(pipe.checkpoint_digest))
        path = folder / f"image_{index:04d}_seed_{_SEED.value + i}.png"
        partial = path.with_suffix(".partial")
        try:
            image.save(partial, format="PNG", pnginfo=info)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise InputError(
                f"cannot write {path} ({error.strerror}): make room for it or choose another --output_dir"
            ) from error
        paths.append(path)
    return paths


def _write_trace(trace: PictureTrace, folder: Path) -> Path:
    try:
        return write_trace(trace, folder)
    except OSError as error:
        raise InputError(
            f"cannot write {folder} ({error.strerror}): make room for it or choose another --save_trace"
        ) from error


def _timings_line(output: PipelineOutput) -> str:
    timings = output.timings
    return (
        f"cold: compile {timings.compile:.2f} s | warm: text {timings.text:.3f} s, {len(output.bits)} scales "
        f"{sum(timings.scales):.3f} s, decode {timings.decode:.3f} s, total {timings.total:.3f} s"
    )


if __name__ == "__main__":
    command_line.run(main)
