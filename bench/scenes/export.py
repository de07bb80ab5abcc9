"""Makes a checkpoint of a training run's weights, in the format of any converted model.

python -m bench.scenes.export --workdir .checkpoints/scenes --out FOLDER
"""

import pathlib

from absl import flags

from bench.scenes import training
from bench.scenes.stages import export_checkpoint
from toprovar_jax import command_line

_CONFIG = flags.DEFINE_string("config", str(training.EMBEDDED_CONFIG), "The run's JSON file.")
_WORKDIR = flags.DEFINE_string("workdir", ".checkpoints/scenes", "Folder with the run's weights.")
_OUT = flags.DEFINE_string("out", None, "Folder of the checkpoint.", required=True)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace an existing checkpoint.")


def main() -> None:
    """Exports the run named by the flags."""
    config = training.load_config(pathlib.Path(_CONFIG.value))
    manifest = export_checkpoint(
        config, pathlib.Path(_WORKDIR.value), pathlib.Path(_OUT.value), overwrite=_OVERWRITE.value
    )
    print(f"wrote {_OUT.value}: {sum(record.size for record in manifest.files) / 1e6:.1f} MB")


if __name__ == "__main__":
    command_line.run(main)
