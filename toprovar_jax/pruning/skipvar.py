"""SkipVAR: two features of early pictures decide per image how many of the last scales to save, and how.

Source: docs/spec/fastvar_skipvar.md, section B.
"""

import dataclasses
import functools
import hashlib
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from toprovar_jax.errors import InputError
from toprovar_jax.manifest import DECISIONS_NAME
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.pruning.logistic import LogisticModel
from toprovar_jax.pruning.plan import Plan, ScalePlan
from toprovar_jax.pruning.policy import Policy, Report, require_scales
from toprovar_jax.resize import resize_bilinear
from toprovar_jax.schedule import ScaleSchedule

# Index of the scale on whose tokenizer grid the pictures are compared: pictures of one size, whatever the budget.
FEATURE_SCALE = 4
# Scales from the decision to the end, and most of them that a decision changes.
_AFTER_DECISION = 3
_RADIUS_SHARE = 0.4


@dataclasses.dataclass(frozen=True)
class DecisionModel:
    """What the features of an image decide.

    Attributes:
      skip: how many of the last scales to drop, 0 to 3.
      uncond: where none is dropped, how many of the last scales run without unconditional rows, 0 to 3.
    """

    skip: LogisticModel
    uncond: LogisticModel

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "DecisionModel":
        """Reads `skip` and `uncond`, each as `LogisticModel.from_json` does.

        Raises:
          InputError: the data are no decision model.
        """
        try:
            return cls(LogisticModel.from_json(data["skip"]), LogisticModel.from_json(data["uncond"]))
        except (TypeError, KeyError) as error:
            raise InputError(f"not a decision model: {error!r}") from error


@functools.cache
def published_model(target: str = "0.84") -> DecisionModel:
    """The published coefficients for a structural similarity to the dense image.

    Args:
      target: "0.84", "0.86" or "0.88"; higher saves less.

    Raises:
      InputError: nothing was published for this target.
    """
    text = resources.files(__package__).joinpath("skipvar_published.json").read_text(encoding="utf-8")
    models = json.loads(text)["models"]
    if target not in models:
        raise InputError(f"no SkipVAR model was published for {target!r}: choose one of {', '.join(models)}")
    return DecisionModel.from_json(models[target])


def decisions_text(content: dict[str, Any]) -> str:
    """The one and only text of a decision model's file, with a digest of its own; `load_decisions` reads it.

    Args:
      content: the model as `DecisionModel.from_json` takes it, and whatever tells how it was fitted.
    """
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, indent=1, sort_keys=True) + "\n"


def load_decisions(folder: str | os.PathLike[str]) -> DecisionModel | None:
    """The decision model beside a checkpoint's manifest; None where none was fitted (`bench.fit_skipvar`).

    Raises:
      InputError: the file is no decision model, or not as it was written.
    """
    path = Path(folder) / DECISIONS_NAME
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        model = DecisionModel.from_json(content)
        if decisions_text({name: value for name, value in content.items() if name != "digest"}) != text:
            raise InputError("it was altered after it was written")
        return model
    except FileNotFoundError:
        return None
    except (OSError, ValueError, InputError) as error:
        raise InputError(
            f"cannot read {path}: {error}; fit it again with `python -m bench.fit_skipvar`"
        ) from error


@dataclasses.dataclass(frozen=True)
class SkipVAR(Policy):
    """The published rule, counted from the last scale so that it applies to every schedule.

    Of S scales, the pictures after S-5 and S-4 are compared; then some of the last three are dropped, or run
    without guidance. A batch does what its most demanding image needs.

    Attributes:
      model: decides from the features.
    """

    model: DecisionModel = dataclasses.field(default_factory=published_model)

    def plans(self, schedule: ScaleSchedule, depth: int) -> tuple[Plan, ...]:
        require_scales("skipvar", schedule, FEATURE_SCALE + 1)
        decisions = [(0, 0), *((0, uncond) for uncond in (1, 2, 3)), *((skip, 0) for skip in (1, 2, 3))]
        return tuple(self._plan(schedule, depth, *decision) for decision in decisions)

    def _plan(self, schedule: ScaleSchedule, depth: int, skip: int, uncond: int) -> Plan:
        runs = len(schedule) - skip
        scales = [
            ScalePlan.dense(grid, depth, guided=scale < runs - uncond)
            for scale, grid in enumerate(schedule[:runs])
        ]
        return Plan(schedule, depth, (*scales, *[ScalePlan.dropped()] * skip))

    def observes(self, plan: Plan, scale: int) -> bool:
        return len(plan.schedule) - scale in (_AFTER_DECISION + 1, _AFTER_DECISION + 2)

    def observe(
        self,
        code_map: Float[Array, "batch height width code_dim"],
        entropy: Float[Array, "layers rows tokens"] | None,
        vae: BSQVAE,
        *,
        schedule: ScaleSchedule,
        code_grids: ScaleSchedule,
        scale: int,
    ) -> dict[str, Array]:
        del entropy, schedule, scale
        picture = vae.decode(resize_bilinear(code_map, code_grids[FEATURE_SCALE]))
        return {"edges": edge_strength(picture), "high_frequency": high_frequency_share(picture, _RADIUS_SHARE)}

    def choose(self, plan: Plan, scale: int, reports: dict[int, Report]) -> Plan:
        if len(plan.schedule) - scale != _AFTER_DECISION + 1:
            return plan
        skip, uncond = self.decide(features(reports[scale - 1], reports[scale]))
        return self._plan(plan.schedule, plan.depth, skip, uncond)

    def decide(self, features: Float[np.ndarray, "batch 2"]) -> tuple[int, int]:
        """For a batch, how many of the last scales to drop, and how many to run without unconditional rows."""
        skip = self.model.skip.predict(features)
        if skip.min() > 0:
            return int(skip.min()), 0
        # An image that may lose whole scales may lose their guidance too.
        return 0, int(self.model.uncond.predict(features[skip == 0]).min())


def features(before: Report, after: Report) -> Float[np.ndarray, "batch 2"]:
    """How much the edges changed from one scale to the next, and the later picture's share of high frequencies."""
    change = np.abs(after["edges"].astype(np.float64) - before["edges"]).mean(axis=(1, 2))
    return np.stack([change, after["high_frequency"].astype(np.float64)], axis=1)


def edge_strength(image: Float[Array, "batch height width 3"]) -> Float[Array, "batch height width"]:
    """Length of the Sobel gradient of the mean colour, the picture being black beyond its edges."""
    grey = jnp.pad(jnp.mean(image, axis=-1), ((0, 0), (1, 1), (1, 1)))
    smooth_rows = grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]
    smooth_columns = grey[:, :, :-2] + 2 * grey[:, :, 1:-1] + grey[:, :, 2:]
    across = smooth_rows[:, :, :-2] - smooth_rows[:, :, 2:]
    down = smooth_columns[:, :-2] - smooth_columns[:, 2:]
    return jnp.sqrt(jnp.square(across) + jnp.square(down))


def high_frequency_share(
    image: Float[Array, "batch height width 3"], radius_share: float
) -> Float[Array, "batch"]:
    """Share of spectral amplitude of the mean colour outside a disc around frequency 0.

    Args:
      image: the picture.
      radius_share: radius of the disc as a share of half the shorter side, rounded down to whole frequencies.
    """
    amplitude = jnp.abs(jnp.fft.fftshift(jnp.fft.fft2(jnp.mean(image, axis=-1)), axes=(1, 2)))
    height, width = amplitude.shape[1:]
    radius = int(radius_share * min(height, width) / 2)
    distance = np.hypot(np.arange(height)[:, None] - height // 2, np.arange(width) - width // 2)
    outside = jnp.sum(amplitude * (distance > radius), axis=(1, 2))
    return outside / (jnp.sum(amplitude, axis=(1, 2)) + 1e-6)
