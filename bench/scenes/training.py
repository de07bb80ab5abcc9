"""What the training stages share: configuration, optimiser, the loop against the clock, the log."""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, PyTree

from bench.scenes.dataset import SceneBatch
from toprovar_jax.checkpoint import flatten, unflatten
from toprovar_jax.config import CheckpointConfig
from toprovar_jax.models.skeleton import Parameters

EMBEDDED_CONFIG = pathlib.Path(__file__).parent / "configs" / "embedded.json"
_LOG_SECONDS = 15.0
_STEPS_IN_FLIGHT = 8  # the clock is read when so many steps are done


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """Optimiser settings of one stage.

    Attributes:
      batch_size: scenes of a step.
      learning_rate: peak; reached by linear warm-up, then constant until the decay that the command asks for.
      warmup_steps: steps of the warm-up, at the start of every chunk.
      beta2: AdamW's second decay rate.
      weight_decay: AdamW's, on arrays of two or more dimensions.
      ema: decay rate of the averaged weights, which are what is kept.
    """

    batch_size: int
    learning_rate: float
    warmup_steps: int = 200
    beta2: float = 0.98
    weight_decay: float = 0.0
    ema: float = 0.998


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """A whole training run, as its JSON file states it.

    Attributes:
      model: what is trained; the checkpoint's configuration.
      image_size: side of the images in pixels.
      num_scenes: different scenes that one chunk draws from.
      detector: the detector's stage.
      vae: the tokenizer's stage.
      text: the text encoder's stage.
      prefix: the transformer's first stage, on the scales up to `prefix_scales` only.
      transformer: the transformer's main stage, on all scales.
      prefix_scales: scales of the prefix stage.
      feature_weight: weight of the detector-feature loss of the tokenizer.
      caption_dropout: share of captions replaced by the unconditional features.
      flip_strength: largest bit-flip probability of self-correction.
      dtype: of activations and matrix products; parameters train in float32.
    """

    model: CheckpointConfig
    image_size: int
    num_scenes: int
    detector: StageConfig
    vae: StageConfig
    text: StageConfig
    prefix: StageConfig
    transformer: StageConfig
    prefix_scales: int
    feature_weight: float = 0.1
    caption_dropout: float = 0.1
    flip_strength: float = 0.25
    dtype: str = "bfloat16"


def load_config(path: pathlib.Path) -> TrainingConfig:
    """Reads a training run's JSON file."""
    data: dict[str, Any] = json.loads(path.read_text())
    for name in ("detector", "vae", "text", "prefix", "transformer"):
        data[name] = StageConfig(**data[name])
    data["model"] = CheckpointConfig.from_json(data["model"])
    return TrainingConfig(**data)


class TrainState(NamedTuple):
    """Everything that a step updates."""

    parameters: Parameters
    average: Parameters
    optimizer: optax.OptState
    step: Int[Array, ""]


# (parameters, scenes of a step, key) -> loss and the numbers to log
Loss = Callable[[Parameters, SceneBatch, Key[Array, ""]], tuple[Float[Array, ""], dict[str, Array]]]
Step = Callable[[TrainState, PyTree, SceneBatch, Key[Array, ""], float], tuple[TrainState, dict[str, Array]]]


def fresh_parameters(skeleton: Parameters, seed: int) -> Any:
    """Float32 parameters to start from: kernels of variance 1/fan-in, neutral norms, zero biases, the rest small.

    Drawn on the host, where it takes no time: a device would compile every shape on its own.
    """
    generator = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name == "scale":
            return np.ones(shape, np.float32)
        if name == "log_scale":
            return np.full(shape, math.log(4), np.float32)
        if name.endswith("bias"):
            return np.zeros(shape, np.float32)
        deviation = math.prod(shape[:-1]) ** -0.5 if name == "kernel" else 0.02
        return (deviation * generator.standard_normal(shape)).astype(np.float32)

    leaves = flatten(skeleton)
    return unflatten({path: draw(path.split("/")[-1], leaf.shape) for path, leaf in leaves.items()})


def initial_state(config: StageConfig, parameters: Parameters) -> TrainState:
    """A state that starts from the given weights, be they fresh or a former chunk's average."""
    parameters = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), parameters)
    average = jax.tree.map(jnp.copy, parameters)
    return TrainState(parameters, average, _optimizer(config).init(parameters), jnp.zeros((), jnp.int32))


def make_step(config: StageConfig, loss: Callable[[PyTree], Loss]) -> jax.stages.Wrapped:
    """One compiled training step: draws scenes, AdamW on the loss, moving average of the weights.

    The scenes of a step are spread over all devices; everything else is on each of them (`replicate`).

    Args:
      config: the stage.
      loss: given the stage's constants (frozen weights, atlas), the loss to descend.
    """
    optimizer = _optimizer(config)
    mesh = _mesh()
    everywhere = NamedSharding(mesh, PartitionSpec())

    def step(
        state: TrainState, constants: PyTree, scenes: SceneBatch, key: Key[Array, ""], learning_rate: float
    ) -> tuple[TrainState, dict[str, Array]]:
        draw_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
        rows = jax.random.randint(draw_key, (config.batch_size,), 0, scenes.background.shape[0])
        rows = jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, PartitionSpec("batch")))
        batch = jax.tree.map(lambda x: x[rows], scenes)
        (value, numbers), gradients = jax.value_and_grad(loss(constants), has_aux=True)(
            state.parameters, batch, loss_key
        )
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(gradients)))
        # A batch whose gradient is not finite loses its update, no more.
        gradients = jax.tree.map(lambda g: jnp.where(jnp.isfinite(norm), g, 0), gradients)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = jax.tree.map(lambda p, u: p - learning_rate * u, state.parameters, updates)
        rate = jnp.minimum(config.ema, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda a, p: rate * a + (1 - rate) * p, state.average, parameters)
        state = TrainState(parameters, average, optimizer_state, state.step + 1)
        return state, {"loss": value, "gradient_norm": norm, **numbers}

    return jax.jit(step, donate_argnums=0, in_shardings=everywhere, out_shardings=everywhere)


def replicate(tree: PyTree) -> PyTree:
    """The arrays on every device."""
    return jax.device_put(tree, NamedSharding(_mesh(), PartitionSpec()))


def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("batch",))


def _optimizer(config: StageConfig) -> optax.GradientTransformation:
    """AdamW without its learning rate, which follows the clock and is applied in the step."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(0.9, config.beta2),
        optax.add_decayed_weights(config.weight_decay, lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree)),
    )


def run_chunk(
    config: StageConfig,
    step: Step,
    state: TrainState,
    constants: PyTree,
    scenes: SceneBatch,
    *,
    seed: int,
    seconds: float,
    decay: float,
    log: Callable[..., None],
) -> TrainState:
    """Trains until the time is up.

    Args:
      config: the stage.
      step: its compiled step.
      state: donated.
      constants: frozen arrays that the loss reads.
      scenes: what the steps draw from.
      seed: decides the draws.
      seconds: time of the chunk.
      decay: share of the time, at its end, in which the learning rate falls linearly to zero.
      log: receives the numbers of a step now and then.

    Raises:
      FloatingPointError: the loss is no longer finite.
    """
    key = replicate(jax.random.key(seed))
    start = reported = time.monotonic()
    done = done_then = 0
    while (elapsed := time.monotonic() - start) < seconds:
        rate = _learning_rate(config, done, elapsed / seconds, decay)
        for _ in range(_STEPS_IN_FLIGHT):
            state, numbers = step(state, constants, scenes, key, rate)
        done += _STEPS_IN_FLIGHT
        jax.block_until_ready(numbers)
        now = time.monotonic()
        if now - reported > _LOG_SECONDS or now - start >= seconds:
            speed = (done - done_then) * config.batch_size / (now - reported)
            log(steps=done, learning_rate=rate, samples_per_second=speed, **numbers)
            if not np.isfinite(numbers["loss"]):
                raise FloatingPointError(f"the loss is {numbers['loss']} after {done} steps")
            reported, done_then = now, done
    return state


def _learning_rate(config: StageConfig, step: int, elapsed: float, decay: float) -> float:
    warm = min(1.0, (step + _STEPS_IN_FLIGHT) / config.warmup_steps)
    falling = min(1.0, (1 - elapsed) / decay) if decay > 0 else 1.0
    return config.learning_rate * warm * max(falling, 0.01)


class Log:
    """Prints every record and appends it to a file, one JSON object a line."""

    def __init__(self, path: pathlib.Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._start = time.monotonic()

    def __call__(self, stage: str, **numbers: Any) -> None:
        """Records numbers, arrays included; floats keep five digits."""
        record = {"seconds": round(time.monotonic() - self._start, 1), "stage": stage}
        record |= {name: _plain(value) for name, value in numbers.items()}
        line = json.dumps(record)
        print(line, flush=True)
        with self._path.open("a") as file:
            file.write(line + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, jax.Array | np.ndarray):
        value = np.asarray(value, np.float64).tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
