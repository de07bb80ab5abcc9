"""Programs that several threads ask for."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from toprovar_jax.programs import COMPILED_IN_HASTE, Programs, Recipe, _cpu_options


def doubled(x):
    return 2 * x


def test_threads_share_what_either_compiles():
    programs, traced, both = Programs(), [], threading.Barrier(2)

    def recipe(key):
        def make():
            traced.append(key)
            return Recipe(doubled, (jnp.arange(3.0),), {})

        return make

    def use(keys):
        both.wait()
        seconds = programs.compile({key: recipe(key) for key in keys})
        return seconds, [programs.run(key, jnp.arange(3.0)).tolist() for key in keys]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(use, ("abc", "bcd")))
    assert sorted(traced) == ["a", "b", "c", "d"]
    assert len(programs) == 4
    for seconds, values in results:
        assert seconds > 0
        assert values == [[0, 2, 4]] * 3
    assert programs.compile({key: recipe(key) for key in "abcd"}) == 0


def test_a_program_that_failed_may_be_compiled_again():
    programs = Programs()
    recipes = {"key": lambda: Recipe(doubled, (jnp.arange(3.0),), {})}
    programs.compiler_options = {"no_such_option": True}
    with pytest.raises(Exception, match="no_such_option"):
        programs.compile(recipes)
    assert len(programs) == 0
    programs.compiler_options = {}
    assert programs.compile(recipes) > 0


def test_convolutions_are_not_compiled_in_haste(monkeypatch):
    used = {}
    compile_lowered = jax.stages.Lowered.compile

    def compile_and_tell(lowered, options):
        used[lowered.as_text().split()[1]] = dict(options)
        return compile_lowered(lowered)

    everywhere = _cpu_options().items()
    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_and_tell)
    programs = Programs()
    programs.compiler_options = COMPILED_IN_HASTE
    quick, slow = (Recipe(doubled, (jnp.arange(2.0 + i),), {}, convolves=i == 1) for i in range(2))
    for key, recipe in (("quick", quick), ("slow", slow)):
        used.clear()
        programs.compile({key: lambda recipe=recipe: recipe})
        (options,) = used.values()
        assert ("xla_gpu_autotune_level" in options) == (key == "quick")
        assert everywhere <= options.items()


@pytest.mark.parametrize(
    ("options", "on_gpu", "used"),
    [
        ({"xla_backend_optimization_level": 0}, False, True),
        ({"xla_backend_optimization_level": 0}, True, False),
        ({"an_option_of_another_version": ""}, False, False),
    ],
)
def test_options_for_cpus_are_left_out_where_they_are_refused_and_elsewhere(monkeypatch, options, on_gpu, used):
    monkeypatch.setattr("toprovar_jax.programs._WITHOUT_YNNPACK", options)
    if on_gpu:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _cpu_options.__wrapped__() == (options if used else {})


def test_products_on_a_cpu_are_not_prepared_at_their_first_run():
    product = Recipe(jnp.dot, (jnp.ones((64, 64)),) * 2, {}).lower()
    assert ["ynn" in product.compile(options).as_text() for options in ({}, _cpu_options())] == [True, False]


def test_a_result_for_the_host_is_the_same_where_the_device_is_the_host():
    programs, x = Programs(), jnp.arange(3.0)
    programs.compile({"key": lambda: Recipe(doubled, (x,), {}, to_host=True)})
    assert programs.run("key", x).tolist() == [0, 2, 4]
