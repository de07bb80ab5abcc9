"""What ToProVAR has learned about one checkpoint: thresholds, layer scores, and where they came from.

A profile lies beside the checkpoint's manifest, not in it: it is made later, and calibrating again replaces it
without touching a weight. It carries a digest of its own and the manifest's digest, so it cannot be taken for that
of another model. Scales are counted from the last one, so that a profile serves every schedule.
Source: docs/spec/toprovar.md, sections 3 to 5.
"""

import dataclasses
import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

from toprovar_jax.errors import InputError
from toprovar_jax.manifest import PROFILE_NAME
from toprovar_jax.pruning.entropy import Normalization

FORMAT_VERSION = 1

# On which side of tau a scale's focused share lets pruning start: "above" is Eq. 3, "below" is Eq. 13.
Crossing = Literal["above", "below"]

# Whose entropies choose tokens: at the last dense scale, resized, those of the same layers or of all layers; or at
# the scale itself those of the dense layer before.
Source = Literal["same_layers", "all_layers", "layer_before"]

_CALIBRATE = "python -m toprovar_jax.calibrate --checkpoint DIR --prompts FILE --target speedup=3"


class ProfileError(InputError):
    """A profile that is missing, damaged or of another model; the message is one line and names the fix."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """ToProVAR's settings for one checkpoint.

    Attributes:
      layer_scores: R of every layer, 0 to 1 (Eq. 4); 0 keeps the layer dense.
      tau: threshold of the focused share that lets pruning start.
      crossing: on which side of tau it starts.
      prunable_scales: last scales that may be pruned at all; the focused share of earlier ones is not asked for.
      usual_scales: last scales that are pruned where the start does not depend on the image; 0 prunes nothing.
      dropped_scales: last scales that are not run at all once pruning has started.
      conditional_scales: last scales of those that run which do without the unconditional rows, likewise.
      token_scales: last scales that may run on some tokens, the dropped ones among them; None for all that may be
        pruned.
      alpha_min: share of pruned tokens at tendency 0 (Eq. 6).
      alpha_max: share of pruned tokens at tendency 1.
      normalization: how entropies become relative (Eq. 5).
      source: whose entropies choose the tokens.
      checkpoint: digest of the checkpoint's manifest; None for a model that is not on disk.
      calibration: how the settings were found, for people to read: JSON-ready.

    Raises:
      ProfileError: a value is impossible.
    """

    layer_scores: tuple[float, ...]
    tau: float
    crossing: Crossing
    prunable_scales: int
    usual_scales: int
    dropped_scales: int = 0
    conditional_scales: int = 0
    token_scales: int | None = None
    alpha_min: float = 0.0
    alpha_max: float = 1.0
    normalization: Normalization = "rank"
    source: Source = "same_layers"
    checkpoint: str | None = None
    calibration: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, choices in (("crossing", Crossing), ("normalization", Normalization), ("source", Source)):
            if getattr(self, name) not in get_args(choices):
                raise ProfileError(
                    f"unknown {name} {getattr(self, name)!r} in the profile: choose one of "
                    f"{', '.join(get_args(choices))}"
                )
        if not self.layer_scores or not all(0 <= score <= 1 for score in self.layer_scores):
            raise ProfileError("a profile needs one layer score from 0 to 1 for every layer")
        numbers = (self.tau, self.alpha_min, self.alpha_max)
        if not all(math.isfinite(number) for number in numbers):
            raise ProfileError(f"tau and the alphas of a profile must be finite, got {numbers}")
        if self.alpha_min > self.alpha_max:
            raise ProfileError(f"alpha_min {self.alpha_min:g} must not exceed alpha_max {self.alpha_max:g}")
        if not 0 <= self.usual_scales <= self.prunable_scales:
            raise ProfileError(
                f"usual_scales must lie between 0 and prunable_scales {self.prunable_scales}, got "
                f"{self.usual_scales}"
            )
        if min(self.dropped_scales, self.conditional_scales, self.token_scales or 0) < 0:
            raise ProfileError("dropped_scales, conditional_scales and token_scales must not be negative")
        if self.source == "layer_before" and self.layer_scores[0] > 0:
            raise ProfileError(
                "no layer comes before layer 0, so source 'layer_before' needs layer score 0 there: keep it dense"
            )

    def check_depth(self, depth: int) -> None:
        """Raises ProfileError where the profile is for another number of layers."""
        if len(self.layer_scores) != depth:
            raise ProfileError(
                f"the profile is for a transformer of {len(self.layer_scores)} layers, but this one has {depth}: "
                f"calibrate with `{_CALIBRATE}`"
            )

    def check_checkpoint(self, checkpoint: str | None) -> None:
        """Raises ProfileError where the profile is for another checkpoint.

        Args:
          checkpoint: digest of its manifest; None for a model that is not on disk, which is not compared.
        """
        if None not in (self.checkpoint, checkpoint) and self.checkpoint != checkpoint:
            raise ProfileError(f"the profile belongs to another checkpoint: calibrate with `{_CALIBRATE}`")

    def to_text(self) -> str:
        """The file's one and only text; `from_text` is the inverse."""
        return json.dumps({**self._content(), "digest": self._digest()}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_text(cls, text: str) -> "Profile":
        """Rebuilds a profile.

        Raises:
          ProfileError: the text was not written by `to_text`, or by another format version.
        """
        try:
            content = json.loads(text)
            version, _ = content.pop("format"), content.pop("digest")
            if version != FORMAT_VERSION:
                raise ProfileError(
                    f"the profile has format {version} but this version reads {FORMAT_VERSION}: calibrate with "
                    f"`{_CALIBRATE}`"
                )
            profile = cls(**{**content, "layer_scores": tuple(content["layer_scores"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ProfileError):
                raise
            raise ProfileError(f"not a profile: {error}; calibrate with `{_CALIBRATE}`") from error
        if profile.to_text() != text:
            raise ProfileError(f"the profile was altered after it was written: calibrate with `{_CALIBRATE}`")
        return profile

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the profile beside a checkpoint's manifest, replacing an earlier one in one step.

        Raises:
          ProfileError: the folder cannot be written.
        """
        path = Path(folder) / PROFILE_NAME
        partial = path.with_name(f"{PROFILE_NAME}.{os.getpid()}")
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(self.to_text())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise ProfileError(f"cannot write {path}: {error.strerror}; make the folder writable") from error
        return path

    def _content(self) -> dict[str, Any]:
        return {"format": FORMAT_VERSION, **dataclasses.asdict(self)}

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Finds out before any work whether a profile can be written, and makes the folder where there is none.

    Raises:
      ProfileError: it cannot.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ProfileError(
            f"cannot write into {folder}: {error.strerror}; make it writable or choose another folder"
        ) from error


def load_profile(folder: str | os.PathLike[str]) -> Profile | None:
    """The profile beside a checkpoint's manifest; None where it was never calibrated.

    Raises:
      ProfileError: the file is damaged, unreadable or of another format version.
    """
    path = Path(folder) / PROFILE_NAME
    try:
        return Profile.from_text(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from error
    except (OSError, ValueError) as error:
        raise ProfileError(f"cannot read {path}: {error}; calibrate with `{_CALIBRATE}`") from error
