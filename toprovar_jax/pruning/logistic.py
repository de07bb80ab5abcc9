"""Small classifiers: a standard scaler and a linear decision, as coefficients in JSON."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from toprovar_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class LogisticModel:
    """Multinomial logistic regression of standardised features.

    Attributes:
      classes: what is predicted.
      mean: of every feature, taken away first.
      scale: of every feature, divided by.
      coef: per class, one coefficient per feature.
      intercept: per class.

    Raises:
      InputError: the sizes do not fit each other.
    """

    classes: tuple[int, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    coef: tuple[tuple[float, ...], ...]
    intercept: tuple[float, ...]

    def __post_init__(self) -> None:
        features = len(self.mean)
        fits = len(self.scale) == features and all(len(row) == features for row in self.coef)
        if not fits or not len(self.coef) == len(self.intercept) == len(self.classes) > 0:
            raise InputError(
                "a decision model needs a mean and a scale per feature, and per class an intercept and a "
                "coefficient for every feature"
            )

    def predict(self, features: Float[np.ndarray, "batch features"]) -> Int[np.ndarray, "batch"]:
        """The most likely class of every row."""
        z = (features - np.asarray(self.mean)) / np.asarray(self.scale)
        scores = z @ np.asarray(self.coef).T + np.asarray(self.intercept)
        return np.asarray(self.classes)[scores.argmax(axis=1)]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "LogisticModel":
        """Reads the lists that JSON has in place of tuples.

        Raises:
          InputError: entries are missing, unknown or of the wrong size.
        """
        try:
            coef = tuple(tuple(row) for row in data["coef"])
            return cls(**{name: tuple(values) for name, values in data.items() if name != "coef"}, coef=coef)
        except (TypeError, KeyError) as error:
            raise InputError(f"not a decision model: {error!r}") from error
