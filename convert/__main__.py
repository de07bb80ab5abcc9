"""Converts published PyTorch files into a checkpoint folder, or checks a converted one against them.

python -m convert --transformer FILE_OR_FOLDER --vae FILE [--text_encoder FOLDER] --out FOLDER
python -m convert check --checkpoint FOLDER --transformer FILE_OR_FOLDER --vae FILE
"""

import functools
import sys

import jax
from absl import flags

from toprovar_jax import command_line
from toprovar_jax.checkpoint import STORED_DTYPES
from toprovar_jax.errors import InputError
from toprovar_jax.schedule import PIXEL_BUDGETS


def _define_shared_flags() -> None:
    flags.DEFINE_string(
        "transformer", None, "The transformer: a .pth or .safetensors file, or a folder of shards."
    )
    flags.DEFINE_string("vae", None, "The tokenizer (VAE) that the transformer was trained with.")


def _define_conversion_flags() -> None:
    flags.DEFINE_string("text_encoder", None, "Folder of flan-t5-xl with its tokenizer.json; omit to go without.")
    flags.DEFINE_string("out", None, "Checkpoint folder to make.")
    flags.DEFINE_enum("dtype", "float32", STORED_DTYPES, "Precision to store.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing checkpoint, in one step.")
    flags.DEFINE_enum("rope_mode", "2", ["0", "1", "2"], "How positions of small scales are found; releases: 2.")
    flags.DEFINE_bool("level_embedding_per_chunk", False, "Add the level embedding before every chunk of blocks.")
    flags.DEFINE_enum("pixels", "1M", list(PIXEL_BUDGETS), "Default pixel budget.")
    flags.DEFINE_float("guidance_scale", None, "Default guidance; omit for the release's (4, with patchify 3).")
    flags.DEFINE_float("temperature", None, "Default temperature; omit for the release's (0.5, with patchify 1).")


def _define_check_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "The converted checkpoint folder.")


def _need_flags(example: str, *names: str) -> None:
    if missing := [f"--{name}" for name in names if not flags.FLAGS[name].value]:
        raise InputError(f"missing {', '.join(missing)}: for example python -m convert {example}")


def _need_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError("conversion needs PyTorch: pip install 'toprovar-jax[convert]'") from None


def _convert() -> None:
    example = "--transformer infinity_2b_reg.pth --vae infinity_vae_d32reg.pth --out infinity-2b"
    _need_flags(example, "transformer", "vae", "out")
    _need_torch()
    from convert.conversion import convert

    values = flags.FLAGS
    manifest = convert(
        transformer=values.transformer,
        vae=values.vae,
        out=values.out,
        text_encoder=values.text_encoder,
        dtype=values.dtype,
        rope_mode=int(values.rope_mode),  # type: ignore[arg-type]
        level_embedding_per_chunk=values.level_embedding_per_chunk,
        pixels=values.pixels,
        guidance_scale=values.guidance_scale,
        temperature=values.temperature,
        overwrite=values.overwrite,
    )
    shape, size = manifest.config.transformer, sum(record.size for record in manifest.files)
    print(
        f"wrote {values.out}: depth {shape.depth}, width {shape.embed_dim}, {shape.num_heads} heads, "
        f"{shape.code_dim} bits per code{', patchify' if shape.patchify else ''}, {manifest.dtype}, "
        f"{size / 1e9:.2f} GB, digest {manifest.digest[:12]}"
    )


def _check() -> None:
    example = "check --checkpoint infinity-2b --transformer infinity_2b_reg.pth --vae infinity_vae_d32reg.pth"
    _need_flags(example, "checkpoint", "transformer", "vae")
    _need_torch()
    from convert.check import check

    values = flags.FLAGS
    report = check(checkpoint=values.checkpoint, transformer=values.transformer, vae=values.vae)
    print(report)
    if not report.passed:
        sys.exit(1)


def _refuse_command(name: str) -> None:
    raise InputError(f"unknown command {name!r}: did you mean check? To convert, give every input by its flag")


def main() -> None:
    """Runs the conversion, or the check where it is the first argument."""
    jax.config.update("jax_platforms", "cpu")  # an accelerator has nothing to do here
    program, *arguments = sys.argv
    command = arguments[0] if arguments and not arguments[0].startswith("-") else None
    _define_shared_flags()
    if command == "check":
        _define_check_flags()
        command_line.run(_check, [program, *arguments[1:]])
    elif command is not None:
        command_line.run(functools.partial(_refuse_command, command), [program])
    else:
        _define_conversion_flags()
        command_line.run(_convert)


if __name__ == "__main__":
    main()
