"""How far a precision strays from float32 at full size: python -m bench.precision --model infinity_2b

Random weights at the real size generate an image in bfloat16 or float8; the same weights and bits run through the
float32 model, and every scale's logits are compared. It also shows that the full size generates at all.
"""

import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Float

from bench import report
from bench.full_size import full_size_config
from toprovar_jax import command_line
from toprovar_jax.config import ARCHITECTURES
from toprovar_jax.errors import InputError
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.linear import quantize_in_place
from toprovar_jax.models.skeleton import Parameters, abstract_parameters, random_parameters
from toprovar_jax.output import PipelineOutput
from toprovar_jax.pipeline import InfinityPipeline

# Relative root-mean-square difference of the logits of any scale.
TOLERANCES = {"bfloat16": 0.01, "float8_e4m3fn": 0.03}
TEXT_TOKENS = 20

_MODEL = flags.DEFINE_enum("model", "infinity_2b", list(ARCHITECTURES), "Architecture.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", list(TOLERANCES), "Precision.")
_PIXELS = flags.DEFINE_string("pixels", "1M", "Pixel budget.")
_RUNS = flags.DEFINE_integer("runs", 3, "Timed runs after the first.", lower_bound=1)
_OUT = flags.DEFINE_string("out", str(report.RESULTS), "Folder for the JSON.")


def relative_difference(value: Float[np.ndarray, "*shape"], reference: Float[np.ndarray, "*shape"]) -> float:
    """Root-mean-square difference over the reference's root mean square."""
    difference = np.asarray(value, np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(reference, np.float64)))


def main() -> None:
    """Generates, repeats in float32 with the same bits, prints a row per scale, writes JSON."""
    config, dtype = full_size_config(_MODEL.value), _DTYPE.value
    params = {
        "transformer": random_parameters(Infinity, config.transformer, jnp.bfloat16),
        "vae": random_parameters(BSQVAE, config.vae, jnp.bfloat16),
    }
    features = np.random.default_rng(0).standard_normal((TEXT_TOKENS, config.transformer.text_channels))
    rounded = jax.tree.map(lambda leaf: leaf, params["transformer"])
    quantize_in_place(rounded, abstract_parameters(Infinity, config.transformer, dtype))
    pipe = InfinityPipeline(config, params | {"transformer": rounded}, dtype=dtype)

    def generate(pipe: InfinityPipeline, **arguments: object) -> PipelineOutput:
        return pipe(
            text_features=[features.astype(np.float32)],
            pixels=_PIXELS.value,
            output_type="np",
            trace=True,
            **arguments,  # type: ignore[arg-type]
        )

    first = generate(pipe)
    print(f"{dtype}: compiled in {first.timings.compile:.1f} s, first run {first.timings.total:.2f} s", flush=True)
    warm = [generate(pipe) for _ in range(_RUNS.value)]
    for output in warm:
        np.testing.assert_array_equal(output.images, first.images, "the same seed must give the same image")
    images = np.asarray(first.images)
    print(f"{dtype} image {images.shape}, mean {images.mean():.1f}, deviation {images.std():.1f}", flush=True)
    if images.std() == 0:
        raise InputError("the image is flat: the weights' scale does not suit this architecture")

    exact = InfinityPipeline(config, _as_float32(params), dtype="float32")
    reference = generate(exact, forced_bits=first.bits)
    print(
        f"float32: compiled in {reference.timings.compile:.1f} s, run {reference.timings.total:.2f} s", flush=True
    )
    assert first.trace is not None
    assert reference.trace is not None
    rows: list[dict[str, Any]] = []
    for scale, (low, high) in enumerate(zip(first.trace.scales, reference.trace.scales, strict=True)):
        row: dict[str, Any] = {
            "scale": scale,
            "relative_difference": relative_difference(low.logits_raw, high.logits_raw),
            "max_difference": float(np.abs(low.logits_raw - high.logits_raw).max()),
            "logits_deviation": float(high.logits_raw.std()),
            "changed_bits": float(np.mean(low.bits != high.bits)),
        }
        rows.append(row)
        print(
            f"scale {scale:2d}: relative {row['relative_difference']:.4f}  max {row['max_difference']:.4f}  "
            f"logits {row['logits_deviation']:.3f}  changed bits {row['changed_bits']:.4f}"
        )
    totals = [1e3 * output.timings.total for output in warm]
    pixels_apart = np.abs(images.astype(int) - np.asarray(reference.images).astype(int))
    tolerance, suffix = TOLERANCES[dtype], "" if dtype == "bfloat16" else f"_{dtype}"
    path = report.write(
        f"precision_{_MODEL.value}{suffix}",
        {
            "model": _MODEL.value,
            "dtype": dtype,
            "pixels": _PIXELS.value,
            "tolerance": tolerance,
            "compile_s": first.timings.compile,
            "float32_compile_s": reference.timings.compile,
            "total_ms": {"median": statistics.median(totals), "min": min(totals), "max": max(totals)},
            "image_levels_apart": {"mean": float(pixels_apart.mean()), "max": int(pixels_apart.max())},
            "peak_device_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
            "scales": rows,
        },
        Path(_OUT.value),
    )
    worst = max(row["relative_difference"] for row in rows)
    print(f"warm total {statistics.median(totals):.0f} ms, wrote {path}")
    if not worst <= tolerance:
        raise InputError(f"{dtype} differs by {worst:.4f} from float32, more than the tolerance {tolerance}")


def _as_float32(params: dict[str, Parameters]) -> dict[str, Parameters]:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


if __name__ == "__main__":
    command_line.run(main)
