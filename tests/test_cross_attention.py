"""Cross attention with the text folded in against the plain form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from toprovar_jax.models.infinity import Infinity
from toprovar_jax.models.text_attention import CrossAttention, FoldedText, KeyValue

CONFIG = dataclasses.replace(tiny.CONFIG.transformer, embed_dim=64, num_heads=4)


@pytest.mark.parametrize("lengths", [[8, 3], [5, 8]])
def test_folded_text_gives_the_same_updates(lengths):
    attention = CrossAttention(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(0), 5))
    for bias in (attention.query.bias, attention.value_bias, attention.output.bias):
        bias[...] = jax.random.normal(next(keys), bias.shape)
    features, x = jax.random.normal(next(keys), (2, 8, 64)), jax.random.normal(next(keys), (2, 7, 64))
    mask = jnp.arange(8) < jnp.asarray(lengths)[:, None]

    text = attention.text_key_value(features)
    expected = attention(x, text, mask)
    np.testing.assert_allclose(attention(x, attention.fold(text, mask), mask), expected, atol=1e-5)
    # What is masked does not matter.
    other = attention.text_key_value(jnp.where(mask[..., None], features, 5.0))
    np.testing.assert_allclose(attention(x, attention.fold(other, mask), mask), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tokens", "form"),
    [("bfloat16", 15, FoldedText), ("bfloat16", 16, KeyValue), ("float32", 15, KeyValue)],
)
def test_text_is_folded_where_that_saves_work_and_rounding_may_differ(dtype, tokens, form):
    model = Infinity(CONFIG, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    context = model.encode_text(jnp.ones((2, tokens, CONFIG.text_channels)), jnp.asarray([tokens, 1]))
    assert {type(text) for text in context.cross_attention} == {KeyValue}
    assert {type(text) for text in model.fold_text(context).cross_attention} == {form}
