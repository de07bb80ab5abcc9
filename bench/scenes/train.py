"""Trains the embedded model, in chunks that resume from weights alone.

    python -m bench.scenes.train --workdir .checkpoints/scenes --stages detector,vae,text,prefix,transformer \
      --seconds 80,180,60,120,240

Needs the sprite pack (`python -m bench.scenes.sprites`) and, for more than a rehearsal, a GPU; several GPUs share
the scenes of every step. Every stage starts from its weights in the working folder where there are some, trains
for its seconds, and writes its averaged weights, a line of log.jsonl now and then, and what it measured. The
optimiser starts anew in every chunk.

Stages: detector; vae, which measures reconstructions with the detector; text, the text encoder; prefix, the
transformer on its first scales; transformer, on all of them. The last two need a text encoder and a tokenizer that
passed its gate.
"""

import concurrent.futures
import os
import pathlib

import jax
from absl import flags

from bench.scenes import dataset, detector, render, score, sprites, train_detector, training, weights
from bench.scenes.stages import (
    STAGES,
    compile_step,
    define_stage,
    import_checkpoint,
    load_constants,
    measure_vae,
)
from bench.scenes.training import Log
from toprovar_jax import command_line
from toprovar_jax.errors import InputError

_CONFIG = flags.DEFINE_string("config", str(training.EMBEDDED_CONFIG), "The run's JSON file.")
_WORKDIR = flags.DEFINE_string("workdir", ".checkpoints/scenes", "Folder of weights and log.")
_STAGES = flags.DEFINE_list("stages", None, f"What to train, in order: {', '.join(STAGES)}.", required=True)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Start from this checkpoint of an earlier run.")
_SECONDS = flags.DEFINE_list("seconds", None, "Training time of each stage.", required=True)
_DECAY = flags.DEFINE_float(
    "decay",
    0.3,
    "Share of each stage's time in which the learning rate falls to zero; 0 for chunks to be continued.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Decides scenes and draws; take another one for every chunk.")


def main() -> None:
    """Runs the stages one after the other, each compiled while the one before trains."""
    names, seconds = _STAGES.value, [float(value) for value in _SECONDS.value]
    if len(names) != len(seconds):
        raise InputError(f"--stages names {len(names)} stages but --seconds has {len(seconds)} numbers")
    config = training.load_config(pathlib.Path(_CONFIG.value))
    workdir = pathlib.Path(_WORKDIR.value)
    log = Log(workdir / "log.jsonl")
    if _CHECKPOINT.value is not None:
        import_checkpoint(pathlib.Path(_CHECKPOINT.value), workdir)
    log(
        "start",
        stages=names,
        budget=seconds,
        decay=_DECAY.value,
        seed=_SEED.value,
        devices=[d.device_kind for d in jax.devices()],
    )
    processes = min(16, os.cpu_count() or 1)
    scenes = training.replicate(dataset.training_scenes(config.num_scenes, _SEED.value, processes))
    atlas = render.build_atlas(sprites.load_pack(), config.image_size)
    log("scenes sampled")

    stages = [define_stage(name, config, workdir, atlas) for name in names]
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        steps = [executor.submit(compile_step, stage, scenes) for stage in stages]
        for name, stage, step, budget in zip(names, stages, steps, seconds, strict=True):
            constants = load_constants(name, workdir, stage)
            resumed = stage.path.exists()
            parameters = weights.load_parameters(stage.path, stage.stored) if resumed else stage.fresh()
            compiled = step.result()
            log(
                f"{name} starts",
                resumed=resumed,
                parameters=sum(leaf.size for leaf in jax.tree.leaves(parameters)),
            )
            state = training.run_chunk(
                stage.settings,
                compiled,
                training.replicate(training.initial_state(stage.settings, parameters)),
                training.replicate(constants),
                scenes,
                seed=_SEED.value,
                seconds=budget,
                decay=_DECAY.value,
                log=lambda name=name, **numbers: log(name, **numbers),
            )
            kept = train_detector.cast_like(state.average, stage.stored)
            weights.save_parameters(stage.path, kept)
            if name == "detector":
                table = score.measure_detector(detector.load_weights(stage.path), atlas)
                log("detector measured", **{task: value.mean for task, value in table.items()})
            if name == "text":
                weights.save_parameters(workdir / "text_encoder.safetensors", kept["text_encoder"])
            if name == "vae":
                measure_vae(config, workdir, kept, atlas, log)


if __name__ == "__main__":
    command_line.run(main)
