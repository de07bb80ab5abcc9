"""The demonstration that prompts compile nothing once every step has run."""

import dataclasses

import pytest

from bench import reuse
from tests import tiny
from toprovar_jax.errors import InputError
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.text import Tokenizer

PROMPTS = ["a cat", "a red cat", "a dog left of a blue cat and a red dog", "a blue dog"]


def pipeline():
    defaults = dataclasses.replace(tiny.CONFIG.defaults, pixels="0.06M")
    config = dataclasses.replace(tiny.CONFIG, defaults=defaults)
    return InfinityPipeline(config, tiny.parameters(), dtype="float32", tokenizer=Tokenizer(tiny.tokenizer_json()))


def test_nothing_is_compiled_after_one_prompt_of_every_length():
    results = reuse.measure(pipeline(), ("dense", "fastvar"), PROMPTS, seed=0)
    assert list(results) == ["dense", "fastvar"]
    for found in results.values():
        assert found["prompts"] == 4
        assert found["text_lengths"] == sorted(set(found["text_lengths"]))
        assert all(seconds > 0 for seconds in found["compile_seconds_of_first"])
        assert found["compiled_afterwards"] == 0
        assert found["loop_ms"] == pytest.approx(sum(found["scale_ms"]), rel=0.5)
    assert results["dense"]["times_fewer_operations"] == 1
    assert results["fastvar"]["times_fewer_operations"] > 1.5


def test_a_compilation_is_not_overlooked(monkeypatch):
    drawing = pipeline()
    drawn = []

    def forgetful(*args, **kwargs):
        drawn.append(args)
        if len(drawn) == 3:
            drawing._generate._ready.clear()
            drawing.programs._compiled.clear()
        return drawing(*args, **kwargs)

    forgetful.tokenizer, forgetful.programs, forgetful.config = drawing.tokenizer, drawing.programs, drawing.config
    monkeypatch.setattr(reuse, "InfinityPipeline", type(forgetful))
    with pytest.raises(InputError, match=r"programs were compiled for prompts that needed none$"):
        reuse.measure(forgetful, ("dense",), PROMPTS[:2], seed=0)
