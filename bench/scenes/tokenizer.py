"""Tokenizer of the embedded model: one token per word of the world's language, "</s>" at the end as in T5."""

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from bench.scenes import captions

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1 and 2, as in T5


def build_tokenizer() -> tokenizers.Tokenizer:
    """The tokenizer; `save` writes it as the tokenizer.json that any checkpoint carries.

    Case and punctuation are ignored; a word outside the world becomes "<unk>".
    """
    vocabulary = {word: index for index, word in enumerate([PAD, END, UNKNOWN, *captions.vocabulary()])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(tokenizers.Regex(r"[^\p{L}\p{N}]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])
    return tokenizer
