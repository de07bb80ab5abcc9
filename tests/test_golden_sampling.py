"""Filters and draws of the JAX port against every stored array of the official ones."""

import jax
import jax.numpy as jnp
import pytest

from tests.reference import golden
from toprovar_jax import sampling

# top_k and top_p are traced, as in the generation loop.
_filter = jax.jit(sampling.filter_probabilities)


@pytest.mark.parametrize("case", golden.sampling_cases(), ids=lambda case: case.name)
def test_filtered_probabilities_and_drawn_classes(case):
    probabilities = _filter(case.logits[0], case.top_k, case.top_p)
    classes = sampling.sample_classes(probabilities, jnp.asarray(case.draws))
    golden.assert_matches(case.expected, {"probs": probabilities, "idx": classes})


def test_a_draw_of_zero_never_chooses_a_class_that_was_filtered_out():
    probabilities = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    draws = jnp.asarray([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    assert sampling.sample_classes(probabilities, draws).tolist() == [0, 1, 1]
