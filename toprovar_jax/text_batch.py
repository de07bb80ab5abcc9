"""Text features of a batch, padded to a common bucket of lengths."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from toprovar_jax.config import InfinityConfig
from toprovar_jax.errors import InputError
from toprovar_jax.request import float_array
from toprovar_jax.text import text_bucket


class TextBatch(NamedTuple):
    """Features of one text per row, zero-padded.

    Attributes:
      features: text features.
      lengths: how many rows of each are real.
    """

    features: Float[Array | np.ndarray, "batch text_tokens channels"]
    lengths: Int[Array | np.ndarray, "batch"]

    @property
    def text_tokens(self) -> int:
        """Padded length."""
        return self.features.shape[1]

    def padded(self, text_tokens: int) -> "TextBatch":
        """The same batch with room for `text_tokens` rows."""
        missing = text_tokens - self.text_tokens
        if missing == 0:
            return self
        return self._replace(features=jnp.pad(jnp.asarray(self.features), ((0, 0), (0, missing), (0, 0))))

    def repeated(self, times: int) -> "TextBatch":
        """Every text `times` times in a row."""
        if times == 1:
            return self
        return TextBatch(jnp.repeat(self.features, times, axis=0), jnp.repeat(self.lengths, times))


def pad_features(features: Any, config: InfinityConfig) -> TextBatch:
    """Batches given features.

    Args:
      features: one [tokens, channels] array per text.
      config: the transformer that will read them.

    Raises:
      InputError: there is none, or one has the wrong shape or length.
    """
    try:
        arrays = [float_array(f"text features {i}", array) for i, array in enumerate(features)]
    except TypeError:
        raise InputError(f"text features must be a list of arrays, got {features!r}") from None
    if not arrays:
        raise InputError("text features are empty: pass one [tokens, channels] array per image")
    for i, array in enumerate(arrays):
        if array.ndim != 2 or array.shape[1] != config.text_channels:
            raise InputError(
                f"text features {i} must have the shape [tokens, {config.text_channels}], got {list(array.shape)}"
            )
        if not 1 <= array.shape[0] <= config.text_max_length:
            raise InputError(
                f"text features {i} must have 1 to {config.text_max_length} tokens, got {array.shape[0]}"
            )
        if not np.isfinite(array).all():
            raise InputError(f"text features {i} holds values that are not finite")
    lengths = np.asarray([len(array) for array in arrays], dtype=np.int32)
    text_tokens = text_bucket(int(lengths.max()))
    padded = np.zeros((len(arrays), text_tokens, config.text_channels), dtype=np.float32)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return TextBatch(padded, lengths)


def broadcast_negative(negative: TextBatch, num_texts: int) -> TextBatch:
    """One negative text for all, or one for each.

    Raises:
      InputError: their number fits neither.
    """
    count = len(negative.lengths)
    if count == num_texts:
        return negative
    if count != 1:
        raise InputError(f"got {count} negative prompts for {num_texts} prompts: pass one, or one per prompt")
    return negative.repeated(num_texts)


def pad_to_common_length(first: TextBatch, second: TextBatch) -> tuple[TextBatch, TextBatch]:
    """Both batches padded to the longer one's length."""
    text_tokens = max(first.text_tokens, second.text_tokens)
    return first.padded(text_tokens), second.padded(text_tokens)
