"""Trains the embedded model, in chunks that resume from weights alone.

    python -m bench.scenes.train --workdir .checkpoints/scenes --stages detector,vae,prefix,transformer \
      --seconds 80,180,120,240

Needs the sprite pack (`python -m bench.scenes.sprites`) and, for more than a rehearsal, one GPU. Every stage
starts from its weights in the working folder where there are some, trains for its seconds, and writes its averaged
weights, a line of log.jsonl now and then, and what it measured. The optimiser starts anew in every chunk.

Stages: detector; vae, which measures reconstructions with the detector; prefix, the transformer on its first
scales; transformer, on all of them. The last two need a tokenizer that passed its gate.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import PyTree
from PIL import Image

from bench.scenes import (
    dataset,
    detector,
    prompts,
    render,
    score,
    sprites,
    train_detector,
    train_transformer,
    train_vae,
    training,
    weights,
)
from bench.scenes.training import Log, Loss, StageConfig, TrainingConfig
from toprovar_jax import command_line
from toprovar_jax.errors import InputError
from toprovar_jax.models.bsq_vae import BSQVAE, multi_scale_quantize
from toprovar_jax.models.skeleton import Parameters, abstract_parameters, bind, random_parameters

STAGES = ("detector", "vae", "prefix", "transformer")
GATE = 0.95  # share of the objects found in the originals that must be found in the reconstructions
_BATCH = 32

_CONFIG = flags.DEFINE_string(
    "config", str(pathlib.Path(__file__).parent / "configs" / "embedded.json"), "The run's JSON file."
)
_WORKDIR = flags.DEFINE_string("workdir", ".checkpoints/scenes", "Folder of weights and log.")
_STAGES = flags.DEFINE_list("stages", None, f"What to train, in order: {', '.join(STAGES)}.", required=True)
_SECONDS = flags.DEFINE_list("seconds", None, "Training time of each stage.", required=True)
_DECAY = flags.DEFINE_float(
    "decay",
    0.3,
    "Share of each stage's time in which the learning rate falls to zero; 0 for chunks to be continued.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Decides scenes and draws; take another one for every chunk.")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, ready to be compiled before its turn.

    Attributes:
      settings: the optimiser's.
      loss: given the constants, the loss.
      constants: shapes of the frozen arrays that the loss reads.
      stored: shapes and dtypes of the weights as they are kept.
      path: where they are kept.
      fresh: makes the weights that training from nothing starts from.
    """

    settings: StageConfig
    loss: Callable[[PyTree], Loss]
    constants: PyTree
    stored: Parameters
    path: pathlib.Path
    fresh: Callable[[], Parameters]


def define_stage(name: str, config: TrainingConfig, workdir: pathlib.Path, atlas: render.Atlas) -> Stage:
    """The stage of this name.

    Raises:
      InputError: there is no such stage.
    """
    detector_stored = abstract_parameters(detector.Detector, detector.CONFIG, jnp.bfloat16)
    vae_stored = abstract_parameters(BSQVAE, config.model.vae, jnp.bfloat16)
    if name == "detector":
        return Stage(
            config.detector,
            train_detector.make_loss(config),
            atlas,
            detector_stored,
            workdir / "detector.safetensors",
            lambda: random_parameters(detector.Detector, detector.CONFIG, jnp.float32),
        )
    if name == "vae":
        return Stage(
            config.vae,
            train_vae.make_loss(config),
            train_vae.VAEConstants(atlas, detector_stored),
            vae_stored,
            workdir / "vae.safetensors",
            lambda: random_parameters(BSQVAE, config.model.vae, jnp.float32),
        )
    if name in ("prefix", "transformer"):
        scales = config.prefix_scales if name == "prefix" else len(train_vae.schedule_of(config))
        return Stage(
            config.prefix if name == "prefix" else config.transformer,
            train_transformer.make_loss(config, scales),
            train_transformer.TransformerConstants(atlas, vae_stored),
            train_transformer.skeletons(config, "bfloat16"),
            workdir / "transformer.safetensors",
            lambda: train_transformer.initial_parameters(config),
        )
    raise InputError(f"unknown stage {name!r}: choose from {', '.join(STAGES)}")


def load_constants(name: str, workdir: pathlib.Path, stage: Stage) -> PyTree:
    """The frozen arrays of a stage, from what earlier stages left.

    Raises:
      InputError: the tokenizer has not passed its gate.
    """
    if name == "vae":
        path = workdir / "detector.safetensors"
        return stage.constants._replace(detector=weights.load_parameters(path, stage.constants.detector))
    if name in ("prefix", "transformer"):
        gate = workdir / "vae.json"
        if not gate.exists() or not json.loads(gate.read_text())["passed"]:
            raise InputError(f"no tokenizer passed its gate ({gate}): train the vae stage first, or longer")
        path = workdir / "vae.safetensors"
        return stage.constants._replace(vae=weights.load_parameters(path, stage.constants.vae))
    return stage.constants


def compile_step(stage: Stage, scenes: dataset.SceneBatch) -> training.Step:
    """The stage's training step, compiled for these scenes; safe to call in a thread beside training."""
    state = jax.eval_shape(lambda: training.initial_state(stage.settings, stage.fresh()))
    step = training.make_step(stage.settings, stage.loss)
    return step.lower(state, stage.constants, scenes, jax.random.key(0), np.float32(0)).compile()


def measure_vae(
    config: TrainingConfig, workdir: pathlib.Path, parameters: Parameters, atlas: render.Atlas, log: Log
) -> None:
    """PSNR and detector recall on reconstructions of the evaluation scenes; writes vae.json and a sheet."""
    asked = prompts.load_prompts("evaluation")
    truth = score.render_prompts(asked, atlas)
    reconstruct = jax.jit(lambda images: _reconstruct(config, parameters, images))
    batches = range(0, len(truth) - len(truth) % _BATCH, _BATCH)
    decoded = np.concatenate([np.asarray(reconstruct(truth[start : start + _BATCH])) for start in batches])
    truth, asked = truth[: len(decoded)], asked[: len(decoded)]
    detector_weights = detector.load_weights(workdir / "detector.safetensors")
    in_truth = score.recall(asked, detector.detect(detector_weights, truth))
    in_decoded = score.recall(asked, detector.detect(detector_weights, decoded))
    psnr = 10 * np.log10(4 / np.square(truth - decoded).mean((1, 2, 3)))
    result = {
        "psnr_mean": float(psnr.mean()),
        "psnr_worst_tenth": float(np.percentile(psnr, 10)),
        "recall_on_truth": in_truth,
        "recall_on_reconstructions": in_decoded,
        "passed": in_decoded >= GATE * in_truth,
    }
    (workdir / "vae.json").write_text(json.dumps(result, indent=1) + "\n")
    log("vae measured", **result)
    shown = np.linspace(0, len(truth) - 1, 16).astype(int)
    rows = [np.concatenate(render.to_bytes(images[shown]), axis=1) for images in (truth, decoded)]
    Image.fromarray(np.concatenate(rows)).save(workdir / "reconstructions.png")


def _reconstruct(config: TrainingConfig, parameters: Parameters, images: jax.Array) -> jax.Array:
    vae = bind(BSQVAE, config.model.vae, jnp.bfloat16, parameters)
    return vae.decode(multi_scale_quantize(vae.encode(images), train_vae.schedule_of(config)).code_map)


def main() -> None:
    """Runs the stages one after the other, each compiled while the one before trains."""
    names, seconds = _STAGES.value, [float(value) for value in _SECONDS.value]
    if len(names) != len(seconds):
        raise InputError(f"--stages names {len(names)} stages but --seconds has {len(seconds)} numbers")
    config = training.load_config(pathlib.Path(_CONFIG.value))
    workdir = pathlib.Path(_WORKDIR.value)
    log = Log(workdir / "log.jsonl")
    log("start", stages=names, budget=seconds, decay=_DECAY.value, seed=_SEED.value, device=str(jax.devices()[0]))
    scenes = dataset.training_scenes(config.num_scenes, _SEED.value, processes=min(16, os.cpu_count() or 1))
    scenes = jax.device_put(scenes)
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
                training.initial_state(stage.settings, parameters),
                constants,
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
            if name == "vae":
                measure_vae(config, workdir, kept, atlas, log)


if __name__ == "__main__":
    command_line.run(main)
