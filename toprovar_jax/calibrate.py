"""Calibrates pruning: python -m toprovar_jax.calibrate [--checkpoint DIR] --prompts FILE --target speedup=3.4

Draws a few dozen pictures in full and under candidate settings, and writes the best settings for the target as a
profile beside the checkpoint, where --policy toprovar finds them. Prints a line per trial.
"""

from absl import flags

from toprovar_jax import command_line
from toprovar_jax.calibration.search import Target, calibrate
from toprovar_jax.checkpoint import DTYPES, EMBEDDED
from toprovar_jax.errors import InputError
from toprovar_jax.manifest import load_manifest
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.pruning.profile import check_writable

# Flags of its own: other commands have some of the same names.
FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    str(EMBEDDED),
    "Folder written by `python -m convert`; default: the model in the package.",
    flag_values=FLAGS,
)
_PROMPTS = flags.DEFINE_string(
    "prompts", None, "Text file with one prompt per line, like those to be drawn.", flag_values=FLAGS
)
_TARGET = flags.DEFINE_string(
    "target",
    "speedup=3.4",
    "speedup=N: N times fewer transformer operations, as similar to the full pictures as can be; ssim=N: the "
    "fewest operations at this mean similarity.",
    flag_values=FLAGS,
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir",
    None,
    "Folder for the profile; default: the checkpoint's, for --policy toprovar.",
    flag_values=FLAGS,
)
_NUM_IMAGES = flags.DEFINE_integer("num_images", 24, "Pictures to judge by.", lower_bound=1, flag_values=FLAGS)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Pictures drawn at once.", lower_bound=1, flag_values=FLAGS)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Chooses prompts and pictures.", lower_bound=0, upper_bound=10**6, flag_values=FLAGS
)
_DTYPE = flags.DEFINE_enum("dtype", None, DTYPES, "Precision; default: the checkpoint's.", flag_values=FLAGS)


def main() -> None:
    """Reads the flags, calibrates and writes the profile."""
    target = Target.from_text(_TARGET.value)
    if _PROMPTS.value is None:
        raise InputError("no prompts: pass --prompts FILE with one prompt per line")
    prompts = command_line.read_prompts(_PROMPTS.value)
    load_manifest(_CHECKPOINT.value)
    folder = _CHECKPOINT.value if _OUTPUT_DIR.value is None else _OUTPUT_DIR.value
    check_writable(folder)
    command_line.use_compilation_cache()
    pipe = InfinityPipeline.from_pretrained(_CHECKPOINT.value, _DTYPE.value)
    profile = calibrate(
        pipe,
        prompts,
        target,
        num_pictures=_NUM_IMAGES.value,
        batch_size=_BATCH_SIZE.value,
        seed=_SEED.value,
    )
    reached = profile.calibration
    print(f"reached ssim {reached['ssim']:.4f} at {reached['speedup']:.2f}x fewer operations")
    print(f"wrote {profile.save(folder)}")


if __name__ == "__main__":
    command_line.run(main, flag_values=FLAGS)
