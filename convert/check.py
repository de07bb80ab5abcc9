"""Side by side: the PyTorch reference on the published files, the JAX port on the checkpoint made from them."""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from convert import architecture, conversion
from convert.readers import Weights, read_weights
from convert.reference import bsq_vae, infinity
from toprovar_jax import checkpoint as checkpoints
from toprovar_jax import sampling, scale_loop
from toprovar_jax.checkpoint import Component
from toprovar_jax.config import InfinityConfig, VAEConfig
from toprovar_jax.errors import InputError
from toprovar_jax.manifest import Manifest
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.skeleton import Parameters, bind
from toprovar_jax.scale_loop import LoopConfig, SamplingSettings
from toprovar_jax.schedule import rope_grid, scale_schedule

# Both sides compute in float32 on the same weights; only the order of sums differs.
TOLERANCE = 1e-3
_NUM_SCALES = 3
_TEXT_TOKENS = 12
_GUIDANCE_SCALE = 3.0

# Each program runs once: compiling is most of the time, and what is computed is the same at every level.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@dataclasses.dataclass(frozen=True)
class Report:
    """Outcome of a check.

    Attributes:
      worst_error: largest difference of any value, relative to its array's largest value where that exceeds 1.
      worst_name: array where it occurs.
      wrong_bits: bits that the two models choose differently although the reference's logits are no near tie.
      total_bits: bits compared.
    """

    worst_error: float
    worst_name: str
    wrong_bits: int
    total_bits: int

    @property
    def passed(self) -> bool:
        """Whether the port computes what the reference does."""
        return self.worst_error <= TOLERANCE and self.wrong_bits == 0

    def __str__(self) -> str:
        return (
            f"{'passed' if self.passed else 'FAILED'}: worst error {self.worst_error:.2e} in {self.worst_name} "
            f"(tolerance {TOLERANCE:.0e}), wrong bits {self.wrong_bits} of {self.total_bits}"
        )


def check(
    *,
    checkpoint: str | os.PathLike[str],
    transformer: str | os.PathLike[str],
    vae: str | os.PathLike[str],
) -> Report:
    """Compares every block's output, the logits, the chosen bits, a decoded and an encoded image.

    The first scales are generated from random text features under guidance, with random bits fed forward on both
    sides, so that every scale has the same input. All is computed in float32; where the checkpoint stores
    bfloat16, the reference's weights are rounded to it as well.

    Args:
      checkpoint: converted folder.
      transformer: the file or folder that it was converted from.
      vae: the file that it was converted from.

    Raises:
      InputError: the checkpoint or a file is damaged, or they are of different architectures.
    """
    manifest = checkpoints.load_manifest(checkpoint)
    config = manifest.config
    transformer_weights, vae_weights = read_weights(Path(transformer)), read_weights(Path(vae))
    architecture.check_kind(transformer_weights, "transformer", "--transformer")
    architecture.check_kind(vae_weights, "VAE", "--vae")
    with torch.device("meta"):
        reference = infinity.Infinity(config.transformer)
        reference_vae = bsq_vae.BSQVAE(config.vae)
    _load(reference, transformer_weights, manifest, "transformer")
    _load(reference_vae, vae_weights, manifest, "vae")
    comparison = _Comparison()
    code_map = _compare_transformers(
        comparison,
        reference,
        checkpoints.load_parameters(checkpoint, "transformer", "float32"),
        config.transformer,
    )
    _compare_vaes(
        comparison, reference_vae, checkpoints.load_parameters(checkpoint, "vae", "float32"), config.vae, code_map
    )
    return comparison.report()


class _Comparison:
    """Collects differences."""

    def __init__(self) -> None:
        self._worst = (0.0, "nothing")
        self._wrong_bits = self._total_bits = 0

    def add(self, name: str, expected: torch.Tensor, actual: jax.Array) -> None:
        """Compares two arrays."""
        wanted = expected.detach().numpy()
        error = np.abs(wanted - np.asarray(actual)).max() / max(1.0, np.abs(wanted).max())
        # A value that is not a number is the worst that can be.
        self._worst = max(self._worst, (float(np.nan_to_num(error, nan=np.inf)), name))

    def add_logits(self, name: str, expected: torch.Tensor, actual: jax.Array) -> None:
        """Compares logits [..., 2] of the two values of every bit, and the bits that the larger one chooses."""
        self.add(name, expected, actual)
        wanted, found = (np.subtract(x[..., 1], x[..., 0]) for x in (expected.numpy(), np.asarray(actual)))
        differs = ((wanted > 0) != (found > 0)) & (np.abs(wanted) > TOLERANCE)
        self._wrong_bits += int(differs.sum())
        self._total_bits += differs.size

    def report(self) -> Report:
        """What was found."""
        return Report(*self._worst, self._wrong_bits, self._total_bits)


def _load(module: nn.Module, weights: Weights, manifest: Manifest, component: Component) -> None:
    """Gives a reference module the file's weights, rounded as the checkpoint stores them."""
    weights = conversion.normalize(weights, component)
    conversion.check_values(weights, component)
    expected = conversion.official_names(weights, component, getattr(manifest.config, component))
    stored = checkpoints.flatten(checkpoints.skeleton(manifest.config, component, manifest.dtype))
    state = {name: torch.zeros(x.shape) for name, x in module.state_dict().items() if name.endswith("zero_k_bias")}
    for name, tensor in weights.tensors.items():
        rounded = name in expected and stored[expected[name].path].dtype == jnp.bfloat16
        tensor = tensor.bfloat16() if rounded else tensor
        state[name] = tensor.float() if tensor.is_floating_point() else tensor
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(
            f"{weights.path} is of another architecture than the checkpoint: pass the file it was converted from"
        ) from error


@torch.no_grad()
def _compare_transformers(
    comparison: _Comparison, reference: infinity.Infinity, parameters: Parameters, config: InfinityConfig
) -> np.ndarray:
    """Runs both over the first scales and returns the code map [1, height, width, code_dim] of the bits fed in."""
    loop = LoopConfig(
        transformer=config,
        dtype="float32",
        schedule=scale_schedule()[:_NUM_SCALES],
        rope_grid=rope_grid(),
        guided=True,
    )
    random = np.random.default_rng(0)
    features = random.standard_normal((1, _TEXT_TOKENS, config.text_channels), dtype=np.float32)
    bits = [random.integers(0, 2, (1, *grid, config.code_dim), dtype=np.uint8) for grid in loop.code_grids]
    records = reference.generate(
        list(torch.from_numpy(features)),
        schedule=loop.schedule,
        rope_grid=loop.rope_grid,
        guidance_scale=[_GUIDANCE_SCALE] * _NUM_SCALES,
        temperature=[1.0] * _NUM_SCALES,
        forced_bits=[torch.from_numpy(scale_bits) for scale_bits in bits],
    )
    context = _jit(functools.partial(scale_loop.encode_context, loop=loop))(
        parameters, jnp.asarray(features), jnp.asarray([_TEXT_TOKENS], jnp.int32)
    )
    settings = SamplingSettings(guidance_scale=_GUIDANCE_SCALE, temperature=1.0, top_k=0, top_p=0.0)
    draws = scale_loop.draw_all_scales(jax.random.split(jax.random.key(0), 1), loop)
    state = scale_loop.initial_state(loop, batch=1)
    for scale, record in enumerate(records):
        step = _jit(functools.partial(scale_loop.scale_step, loop=loop, scale=scale, record="activations"))
        state, output = step(parameters, state, context, draws[scale], settings, jnp.asarray(bits[scale]))
        assert output.logits_raw is not None
        assert output.activations is not None
        for layer, expected in enumerate(record.block_outputs):
            name = f"block{layer}_out"
            comparison.add(f"{name} of scale {scale}", expected, output.activations[name])
        conditional, unconditional = jnp.split(output.logits_raw, 2)
        comparison.add_logits(
            f"logits of scale {scale}",
            record.logits,
            sampling.guide(conditional, unconditional, _GUIDANCE_SCALE).reshape(record.logits.shape),
        )
    code_map = np.asarray(state.code_map)
    comparison.add("code map", records[-1].code_map.movedim(1, -1), state.code_map)
    return code_map


def _compare_vaes(
    comparison: _Comparison,
    reference: bsq_vae.BSQVAE,
    parameters: Parameters,
    config: VAEConfig,
    code_map: np.ndarray,
) -> None:
    @_jit
    def decode(parameters: Parameters, code_map: jax.Array) -> jax.Array:
        model: BSQVAE = bind(BSQVAE, config, "float32", parameters)
        return model.decode(code_map)

    @_jit
    def encode(parameters: Parameters, image: jax.Array) -> jax.Array:
        model: BSQVAE = bind(BSQVAE, config, "float32", parameters)
        return model.encode(image)

    image = reference.decode(torch.tensor(code_map).movedim(-1, 1))
    latent = reference.encode(image)
    image_last = image.movedim(1, -1)
    comparison.add("decoded image", image_last, decode(parameters, jnp.asarray(code_map)))
    comparison.add("encoded image", latent.movedim(1, -1), encode(parameters, jnp.asarray(image_last.numpy())))
