"""Prompts to tokens, and tokens to the text features that the transformer reads.

Source: docs/spec/infinity.md, section 3.1.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int, Int32

from toprovar_jax.config import T5Config
from toprovar_jax.errors import InputError
from toprovar_jax.models.skeleton import Parameters, bind
from toprovar_jax.models.t5 import T5Encoder

MAX_TOKENS = 512

# Lengths that texts are padded to, so that few shapes are compiled: one serves most prompts.
TEXT_BUCKETS = (32, 64, 128, 256, MAX_TOKENS)

_END_OF_SEQUENCE = "</s>"
_UNKNOWN = "<unk>"


def text_bucket(length: int) -> int:
    """The smallest padded length with room for `length` tokens.

    Raises:
      ValueError: no bucket is that long.
    """
    for bucket in TEXT_BUCKETS:
        if length <= bucket:
            return bucket
    raise ValueError(f"a text may have up to {MAX_TOKENS} tokens, got {length}")


class TokenBatch(NamedTuple):
    """Tokens of a batch of prompts, padded to a common bucket.

    Attributes:
      tokens: vocabulary indices, 0 where padded.
      lengths: how many tokens of each prompt are real; the end-of-sequence token is.
    """

    tokens: Int32[Array | np.ndarray, "batch tokens"]
    lengths: Int32[Array | np.ndarray, "batch"]


class Tokenizer:
    """The text encoder's tokenizer.

    Args:
      tokenizer_json: text of the tokenizer.json that is published with the text encoder.
      knows: what prompts can ask for; where given, a word outside the vocabulary is answered with it.

    Raises:
      InputError: the text is no tokenizer, or one that does not end prompts the way T5 expects.
    """

    def __init__(self, tokenizer_json: str, knows: str | None = None) -> None:
        self._knows = knows
        remedy = "pass the tokenizer.json that is published with the text encoder"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the package raises nothing narrower
            raise InputError(f"tokenizer.json is not readable ({error}): {remedy}") from error
        # The file may carry settings of its own for both.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._end = self._tokenizer.encode("a").ids[-1:]
        if self._end != [self._tokenizer.token_to_id(_END_OF_SEQUENCE)]:
            raise InputError(f"tokenizer.json does not end prompts with {_END_OF_SEQUENCE}: {remedy}")

    def encode(self, prompts: Sequence[str], max_length: int = MAX_TOKENS) -> TokenBatch:
        """Tokenizes prompts.

        A prompt of more than `max_length` tokens loses its last ones, but not the end-of-sequence token, and a
        warning says so. So does one about words that the model does not know, where it can say what it knows.

        Raises:
          InputError: a prompt is empty or holds what no text has, as bytes do that are not UTF-8.
        """
        rows = []
        unknown: dict[str, None] = {}
        for prompt in prompts:
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"the prompt is no valid text ({prompt[:40]!r}): pass it in UTF-8") from error
            if not prompt.strip():
                raise InputError("the prompt is empty: describe the image in at least one word")
            encoding = self._tokenizer.encode(prompt)
            row = encoding.ids
            if self._knows is not None:
                unknown |= {
                    prompt[start:end]: None
                    for (start, end), token in zip(encoding.offsets, encoding.tokens, strict=True)
                    if token == _UNKNOWN
                }
            if len(row) > max_length:
                warnings.warn(
                    f"the prompt has {len(row)} tokens and the text encoder reads {max_length}: its end is cut "
                    f"off, shorten it ({prompt[:40]!r}...)",
                    stacklevel=2,
                )
                row = row[: max_length - 1] + self._end
            rows.append(row)
        if unknown:
            words = ", ".join(map(repr, unknown))
            warnings.warn(f"the model does not know {words}; it knows {self._knows}", stacklevel=2)
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.zeros((len(rows), text_bucket(int(lengths.max()))), np.int32)
        for padded, row in zip(tokens, rows, strict=True):
            padded[: len(row)] = row
        return TokenBatch(tokens, lengths)


def encode_text(
    params: Parameters,
    tokens: Int[Array, "batch tokens"],
    lengths: Int[Array, "batch"],
    *,
    config: T5Config,
    dtype: DTypeLike,
) -> Float32[Array, "batch tokens channels"]:
    """Text features, zero where padded; how far a text is padded does not change its features.

    Args:
      params: the text encoder's parameters.
      tokens: vocabulary indices.
      lengths: how many tokens of each text are real.
      config: the text encoder.
      dtype: the precision policy that the parameters were loaded for.
    """
    mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
    features = bind(T5Encoder, config, dtype, params)(tokens, mask)
    return jnp.where(mask[..., None], features, 0)
