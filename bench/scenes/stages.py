"""The stages of a training run: what each trains, from what, what it measures, and the checkpoint of the whole."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import PyTree
from PIL import Image

from bench.scenes import (
    captions,
    dataset,
    detector,
    prompts,
    render,
    score,
    tokenizer,
    train_detector,
    train_text,
    train_transformer,
    train_vae,
    training,
    weights,
)
from bench.scenes.training import Log, Loss, StageConfig, TrainingConfig
from toprovar_jax import checkpoint
from toprovar_jax.errors import InputError
from toprovar_jax.manifest import Manifest
from toprovar_jax.models.bsq_vae import BSQVAE, multi_scale_quantize
from toprovar_jax.models.skeleton import Parameters, abstract_parameters, bind

STAGES = ("detector", "vae", "text", "prefix", "transformer")
GATE = 0.95  # share of the objects found in the originals that must be found in the reconstructions
_STORED_DTYPE = "bfloat16"
_BATCH = 32


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
    detector_stored = abstract_parameters(detector.Detector, detector.CONFIG, _STORED_DTYPE)
    stored = _skeletons(config)
    if name == "detector":
        return Stage(
            config.detector,
            train_detector.make_loss(config),
            atlas,
            detector_stored,
            workdir / "detector.safetensors",
            lambda: training.fresh_parameters(detector_stored, seed=0),
        )
    if name == "vae":
        return Stage(
            config.vae,
            train_vae.make_loss(config),
            train_vae.VAEConstants(atlas, detector_stored),
            stored["vae"],
            workdir / "vae.safetensors",
            lambda: training.fresh_parameters(stored["vae"], seed=0),
        )
    if name == "text":
        return Stage(
            config.text,
            train_text.make_loss(config),
            (),
            train_text.skeletons(config, _STORED_DTYPE),
            workdir / "text.safetensors",
            lambda: train_text.initial_parameters(config),
        )
    if name in ("prefix", "transformer"):
        scales = config.prefix_scales if name == "prefix" else len(train_vae.schedule_of(config))
        return Stage(
            config.prefix if name == "prefix" else config.transformer,
            train_transformer.make_loss(config, scales),
            train_transformer.TransformerConstants(atlas, stored["vae"], stored["text_encoder"]),
            stored["transformer"],
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
        return stage.constants._replace(
            vae=weights.load_parameters(workdir / "vae.safetensors", stage.constants.vae),
            text_encoder=weights.load_parameters(
                workdir / "text_encoder.safetensors", stage.constants.text_encoder
            ),
        )
    return stage.constants


def compile_step(stage: Stage, scenes: dataset.SceneBatch) -> training.Step:
    """The stage's training step, compiled for these scenes; safe to call in a thread beside training."""
    state = jax.eval_shape(functools.partial(training.initial_state, stage.settings), stage.stored)
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
        # A detector that finds little in the originals says nothing about their copies.
        "passed": in_truth >= GATE and in_decoded >= GATE * in_truth,
    }
    (workdir / "vae.json").write_text(json.dumps(result, indent=1) + "\n")
    log("vae measured", **result)
    shown = np.linspace(0, len(truth) - 1, 16).astype(int)
    rows = [np.concatenate(render.to_bytes(images[shown]), axis=1) for images in (truth, decoded)]
    Image.fromarray(np.concatenate(rows)).save(workdir / "reconstructions.png")


def _reconstruct(config: TrainingConfig, parameters: Parameters, images: jax.Array) -> jax.Array:
    vae = bind(BSQVAE, config.model.vae, _STORED_DTYPE, parameters)
    return vae.decode(multi_scale_quantize(vae.encode(images), train_vae.schedule_of(config)).code_map)


def export_checkpoint(
    config: TrainingConfig, workdir: pathlib.Path, out: pathlib.Path, *, overwrite: bool = False
) -> Manifest:
    """Writes the checkpoint of a run's weights, in the format of any converted model.

    Raises:
      InputError: weights are missing, or the folder exists.
      ValueError: the weights are of another configuration.
    """
    skeletons = _skeletons(config)
    parameters = {
        name: weights.load_parameters(workdir / f"{name}.safetensors", skeletons[name]) for name in skeletons
    }
    return checkpoint.save(
        out,
        dataclasses.replace(config.model, knows=captions.summary()),
        parameters,
        dtype=_STORED_DTYPE,
        tokenizer=tokenizer.build_tokenizer().to_str(),
        overwrite=overwrite,
    )


def import_checkpoint(folder: pathlib.Path, workdir: pathlib.Path) -> None:
    """Writes what a run continues from, out of an earlier run's checkpoint; its tokenizer passed the gate then.

    Raises:
      CheckpointError: the folder holds no checkpoint, or an altered one.
    """
    for name in checkpoint.COMPONENTS:
        weights.save_parameters(workdir / f"{name}.safetensors", checkpoint.load_parameters(folder, name))
    (workdir / "vae.json").write_text('{"passed": true}\n')


def _skeletons(config: TrainingConfig) -> dict[checkpoint.Component, Parameters]:
    return {name: checkpoint.skeleton(config.model, name, _STORED_DTYPE) for name in checkpoint.COMPONENTS}
