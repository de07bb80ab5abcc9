"""Prompts to padded tokens, and padded tokens to the same features as unpadded ones."""

import functools
import string
import warnings

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from toprovar_jax import text
from toprovar_jax.config import T5Config
from toprovar_jax.errors import InputError
from toprovar_jax.models.skeleton import random_parameters
from toprovar_jax.models.t5 import T5Encoder

PAD, END, UNKNOWN, SPACE = 0, 1, 2, 3
VOCABULARY = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]


def _tokenizer_json(*, appends_end=True):
    """One token per letter, in the manner of T5's: a word starts with ▁, a prompt ends with </s>."""
    tokenizer = tokenizers.Tokenizer(models.Unigram([(piece, 0.0) for piece in VOCABULARY], unk_id=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    if appends_end:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return text.Tokenizer(_tokenizer_json().to_str())


def _letters(word):
    return [SPACE, *(VOCABULARY.index(letter) for letter in word)]


def test_prompts_are_padded_to_a_common_bucket_and_the_end_token_counts(tokenizer):
    batch = tokenizer.encode(["cab", "a b fuzzy"])
    first = [*_letters("cab"), END]
    second = [*_letters("a"), *_letters("b"), *_letters("fuzzy"), END]
    assert (len(first), len(second)) == (5, 11)
    np.testing.assert_array_equal(batch.tokens, [first + [PAD] * 27, second + [PAD] * 21])
    np.testing.assert_array_equal(batch.lengths, [5, 11])
    assert batch.tokens.dtype == batch.lengths.dtype == np.int32


def test_the_files_own_truncation_and_padding_are_switched_off():
    raw = _tokenizer_json()
    raw.enable_truncation(4)
    raw.enable_padding(length=30)
    assert text.Tokenizer(raw.to_str()).encode(["abcdef"]).lengths == [8]


def test_a_long_prompt_is_cut_with_a_warning_and_keeps_its_end_token(tokenizer):
    with pytest.warns(
        UserWarning, match=r"the prompt has 602 tokens and the text encoder reads 512.*'aaaa"
    ) as caught:
        batch = tokenizer.encode(["cab", "a" * 600])
    assert len(caught) == 1
    assert batch.tokens.shape == (2, 512)
    np.testing.assert_array_equal(batch.lengths, [5, 512])
    np.testing.assert_array_equal(batch.tokens[1], [*_letters("a" * 510), END])


def test_a_prompt_of_exactly_the_limit_is_left_whole(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = tokenizer.encode(["a" * 510])
    np.testing.assert_array_equal(batch.tokens, [[*_letters("a" * 510), END]])


def _word_tokenizer(knows):
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "cat", "red"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return text.Tokenizer(tokenizer.to_str(), knows)


def test_words_outside_a_small_vocabulary_are_answered_with_what_the_model_knows():
    tokenizer = _word_tokenizer("red cats")
    with pytest.warns(
        UserWarning, match=r"the model does not know 'Dragon', 'blue'; it knows red cats$"
    ) as caught:
        batch = tokenizer.encode(["red Dragon", "blue cat", "Dragon"])
    assert len(caught) == 1
    np.testing.assert_array_equal(batch.tokens[:, :3], [[4, UNKNOWN, END], [UNKNOWN, 3, END], [UNKNOWN, END, PAD]])


def test_known_words_and_tokenizers_of_any_text_get_no_such_answer(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _word_tokenizer("red cats").encode(["Red cat", "red"])
        _word_tokenizer(None).encode(["dragon"])
        assert UNKNOWN in tokenizer.encode(["café 猫"]).tokens


@pytest.mark.parametrize("prompt", ["", " \t\n"])
def test_empty_prompt_is_refused(tokenizer, prompt):
    with pytest.raises(InputError, match="the prompt is empty: describe the image in at least one word"):
        tokenizer.encode(["cab", prompt])


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"'])
def test_unreadable_tokenizer_is_refused_in_one_line(content):
    with pytest.raises(
        InputError, match=r"tokenizer\.json is not readable \(.*pass the tokenizer\.json"
    ) as caught:
        text.Tokenizer(content)
    assert "\n" not in str(caught.value)


def test_tokenizer_without_end_token_is_refused():
    with pytest.raises(
        InputError, match=r"tokenizer\.json does not end prompts with </s>: pass the tokenizer\.json"
    ):
        text.Tokenizer(_tokenizer_json(appends_end=False).to_str())


@pytest.mark.parametrize(("length", "bucket"), [(1, 32), (32, 32), (33, 64), (65, 128), (512, 512)])
def test_buckets(length, bucket):
    assert text.text_bucket(length) == bucket


def test_no_bucket_beyond_the_limit():
    with pytest.raises(ValueError, match="a text may have up to 512 tokens, got 513"):
        text.text_bucket(513)


def test_features_do_not_depend_on_the_padding_or_the_batch_and_are_zero_where_padded(tokenizer):
    config = T5Config(vocab_size=32, embed_dim=16, num_layers=2, num_heads=2, head_dim=8, mlp_dim=24)
    params = random_parameters(T5Encoder, config, "float32")
    encode = jax.jit(functools.partial(text.encode_text, config=config, dtype="float32"))
    batch = tokenizer.encode(["cab", "a b fuzzy"])
    features = encode(params, *batch)
    assert features.shape == (2, 32, 16)
    for row, prompt in enumerate(["cab", "a b fuzzy"]):
        length = batch.lengths[row]
        assert not features[row, length:].any()
        alone = tokenizer.encode([prompt])
        np.testing.assert_allclose(encode(params, *alone)[0, :length], features[row, :length], atol=1e-5)
        unpadded = encode(params, alone.tokens[:, :length], alone.lengths)
        np.testing.assert_allclose(unpadded[0], features[row, :length], atol=1e-5)
