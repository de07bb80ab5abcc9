"""The programs that a kind of batch may run, under every plan that its policy may follow."""

import dataclasses
import functools
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, UInt8, UInt32

from toprovar_jax.batch import Batch
from toprovar_jax.config import CheckpointConfig, VAEConfig
from toprovar_jax.models.bsq_vae import BSQVAE
from toprovar_jax.models.infinity import TextContext
from toprovar_jax.models.skeleton import Parameters, bind
from toprovar_jax.programs import Recipe
from toprovar_jax.pruning.plan import Plan, ScaleStep
from toprovar_jax.pruning.policy import Policy
from toprovar_jax.scale_loop import (
    LoopConfig,
    LoopState,
    context_parameters,
    draw_all_scales,
    drop_unconditional_rows,
    encode_context,
    image_keys,
    initial_state,
    scale_parameters,
    scale_step,
)
from toprovar_jax.schedule import ScaleSchedule

Entropies = dict[int, Float[Array, "rows _tokens"]]  # by layer


@dataclasses.dataclass(frozen=True)
class ScalePrograms:
    """Keys of the programs of one scale under one plan.

    Attributes:
      step: what the scale does.
      run: its step.
      entropy_layers: layers whose entropy the policy wants of the step.
      cut: drops the unconditional rows before the step; None for guided steps and unguided runs.
      scores: the policy's scores for the step; None where it needs none.
      score_layers: by earlier scale, the layers whose entropies the scores are computed from.
      observe: what the policy looks at after the step; None where it does not look.
    """

    step: ScaleStep
    run: Hashable
    entropy_layers: tuple[int, ...]
    cut: Hashable | None
    scores: Hashable | None
    score_layers: dict[int, tuple[int, ...]]
    observe: Hashable | None


@dataclasses.dataclass(frozen=True)
class BatchPrograms:
    """Keys of the programs that a kind of batch may run.

    Attributes:
      start: projects the text, and makes the first state and the draws of every scale.
      decode: makes pixels; None for batches that are not decoded.
      first_plan: the plan that a run starts with.
      scales: by plan, the programs of the scales that it runs.
    """

    start: Hashable
    decode: Hashable | None
    first_plan: Plan
    scales: dict[Plan, dict[int, ScalePrograms]]


Recipes = dict[Hashable, Callable[[], Recipe]]


def program_parameters(params: dict[str, Parameters]) -> dict[str, Parameters]:
    """What the programs of a batch take of a checkpoint's parameters: "text", "scales" and "vae"."""
    transformer = params["transformer"]
    return {
        "text": context_parameters(transformer),
        "scales": scale_parameters(transformer),
        "vae": params["vae"],
    }


def batch_programs(
    config: CheckpointConfig, params: dict[str, Parameters], dtype: str, batch: Batch
) -> tuple[BatchPrograms, Recipes]:
    """The programs that batches like this one may run, and how to compile each.

    Args:
      config: the checkpoint's models.
      params: their parameters, or shapes of them, as from `program_parameters`.
      dtype: "float32", "bfloat16" or "float8_e4m3fn".
      batch: what to generate.

    Raises:
      InputError: the batch's policy cannot apply to it.
    """
    builder = _Builder(config, params, dtype, batch)
    return builder.programs, builder.recipes


class _Builder:
    def __init__(self, config: CheckpointConfig, params: dict[str, Parameters], dtype: str, batch: Batch):
        self._config = config
        self._params = params
        self._dtype = dtype
        self._batch = batch
        plans = batch.policy.plans(batch.loop.schedule, config.transformer.depth)
        capacities = zip(*(plan.cache_capacities for plan in plans), strict=True)
        # Every plan must find room in the same cache, and programs must not depend on the rest of their plan.
        self._loop = dataclasses.replace(batch.loop, cache_capacities=tuple(map(max, capacities)))
        self._shape = (self._loop, batch.size, batch.text.text_tokens)
        self._start = Recipe(_start, (params["text"], batch.seeds, *batch.context_arguments), {"loop": self._loop})
        self.recipes: Recipes = {}
        self.programs = BatchPrograms(
            start=self._add("start", self._shape, batch.negative is None, recipe=lambda: self._start),
            first_plan=plans[0],
            scales={
                plan: {scale: self._scale_programs(plan, scale) for scale in plan.executed_scales}
                for plan in plans
            },
            decode=self._add("decode", batch.loop.code_grids[-1], batch.size, recipe=self._decode_recipe)
            if batch.decode
            else None,
        )

    @functools.cached_property
    def _start_shapes(self) -> tuple[TextContext, LoopState, tuple[jax.ShapeDtypeStruct, ...]]:
        return self._start.output_shapes()

    def _add(self, *key: Hashable, recipe: Callable[[], Recipe]) -> Hashable:
        self.recipes[key] = recipe
        return key

    def _loop_with(self, plan: Plan) -> LoopConfig:
        return dataclasses.replace(self._loop, plan=plan)

    def _scale_programs(self, plan: Plan, scale: int) -> ScalePrograms:
        batch, policy = self._batch, self._batch.policy
        loop, step = self._loop_with(plan), self._loop_with(plan).step(scale)
        wanted = policy.entropy_layers(plan, scale)
        reported = tuple(range(plan.depth)) if batch.trace else wanted
        forced = batch.forced_bits[scale] is not None
        run = self._add(
            "scale",
            self._shape,
            step,
            reported,
            batch.trace,
            forced,
            recipe=functools.partial(self._scale_recipe, loop, scale, reported),
        )
        cut = scores = observe = None
        if loop.guided and not step.guided:
            layout = (step.restored, step.restore_grid, step.by_sublayer)
            cut = self._add(
                "drop_unconditional_rows",
                self._shape,
                layout,
                recipe=lambda: self._cut_recipe(loop, scale),
            )
        score_layers = {
            earlier: policy.entropy_layers(plan, earlier) for earlier in policy.score_scales(plan, scale)
        }
        if plan.selection == "scores" and step.scored_runs:
            scores = self._add(
                "scores",
                self._shape,
                policy,
                plan,
                scale,
                recipe=functools.partial(self._scores_recipe, loop, scale),
            )
        if policy.observes(plan, scale):
            observe = self._add(
                "observe",
                self._shape,
                policy,
                scale,
                step.guided,
                wanted,
                recipe=lambda: self._observe_recipe(loop, scale, wanted),
            )
        return ScalePrograms(step, run, wanted, cut, scores, score_layers, observe)

    def _scale_recipe(self, loop: LoopConfig, scale: int, entropy_layers: tuple[int, ...]) -> Recipe:
        batch, step = self._batch, loop.step(scale)
        context, _, draws = self._start_shapes
        if loop.guided and not step.guided:
            context = _with_rows(context, batch.size)
        scores = None
        if loop.executed_plan.selection == "scores" and step.scored_runs:
            scores = self._scores_recipe(loop, scale).output_shapes()
        return Recipe(
            scale_step,
            (
                self._params["scales"],
                self._state_shapes(loop, scale),
                context,
                draws[scale],
                batch.sampling_settings[scale],
                batch.forced_bits[scale],
                scores,
            ),
            {
                "loop": loop,
                "scale": scale,
                "record": "logits" if batch.trace else "bits",
                "entropy_layers": entropy_layers,
            },
            donate=(1,),
        )

    def _cut_recipe(self, loop: LoopConfig, scale: int) -> Recipe:
        state = self._state_shapes(loop, scale)
        cache, saved = _with_rows((state.cache, state.saved), 2 * self._batch.size)
        context, *_ = self._start_shapes
        arguments = (cache, saved, context)
        return Recipe(drop_unconditional_rows, arguments, {"batch": self._batch.size})

    def _scores_recipe(self, loop: LoopConfig, scale: int) -> Recipe:
        policy, plan = self._batch.policy, loop.executed_plan
        entropies = {
            earlier: self._entropy_shapes(loop, earlier, policy.entropy_layers(plan, earlier))
            for earlier in policy.score_scales(plan, scale)
        }
        static = {"policy": policy, "plan": plan, "step": loop.step(scale), "batch": self._batch.size}
        return Recipe(_scores, (entropies,), static)

    def _observe_recipe(self, loop: LoopConfig, scale: int, layers: tuple[int, ...]) -> Recipe:
        return Recipe(
            _observe,
            (
                self._params["vae"],
                self._state_shapes(loop, scale).code_map,
                self._entropy_shapes(loop, scale, layers),
            ),
            {
                "policy": self._batch.policy,
                "config": self._config.vae,
                "dtype": self._dtype,
                "schedule": loop.schedule,
                "code_grids": loop.code_grids,
                "scale": scale,
            },
            convolves=True,
        )

    def _decode_recipe(self) -> Recipe:
        _, state, _ = self._start_shapes
        static = {"config": self._config.vae, "dtype": self._dtype}
        return Recipe(decode_pixels, (self._params["vae"], state.code_map), static, convolves=True, to_host=True)

    def _state_shapes(self, loop: LoopConfig, scale: int) -> LoopState:
        state: LoopState = jax.eval_shape(functools.partial(initial_state, loop, self._batch.size, scale))
        return state

    def _entropy_shapes(self, loop: LoopConfig, scale: int, layers: tuple[int, ...]) -> PyTree:
        rows = self._batch.size * (2 if loop.step(scale).guided else 1)
        return {layer: jax.ShapeDtypeStruct((rows, loop.schedule[scale].size), jnp.float32) for layer in layers}


def _with_rows(shapes: PyTree, rows: int) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), shapes)


def decode_pixels(
    params: Parameters, code_map: Float[Array, "batch height width code_dim"], *, config: VAEConfig, dtype: str
) -> UInt8[Array, "batch pixel_height pixel_width 3"]:
    """Code map to RGB; values are truncated to integers, as published (docs/spec/infinity.md, section 5)."""
    image = bind(BSQVAE, config, dtype, params).decode(code_map)
    return ((image + 1) / 2 * 255).astype(jnp.uint8)


def _start(
    params: Parameters, seeds: UInt32[Array, "batch"], *text: Array, loop: LoopConfig
) -> tuple[TextContext, LoopState, tuple[Float[Array, "batch _tokens bits 2"], ...]]:
    context = encode_context(params, *text, loop=loop)
    return context, initial_state(loop, seeds.shape[0]), draw_all_scales(image_keys(seeds), loop)


def _scores(
    entropies: dict[int, Entropies], *, policy: Policy, plan: Plan, step: ScaleStep, batch: int
) -> Float[Array, "runs batch tokens"]:
    stacked = {scale: jnp.stack(list(layers.values())) for scale, layers in entropies.items()}
    return policy.scores(stacked, plan=plan, step=step, batch=batch)


def _observe(
    vae_params: Parameters,
    code_map: Float[Array, "batch height width code_dim"],
    entropy: Entropies,
    *,
    policy: Policy,
    config: VAEConfig,
    dtype: str,
    schedule: ScaleSchedule,
    code_grids: ScaleSchedule,
    scale: int,
) -> PyTree[Array]:
    return policy.observe(
        code_map,
        jnp.stack(list(entropy.values())) if entropy else None,
        bind(BSQVAE, config, dtype, vae_params),
        schedule=schedule,
        code_grids=code_grids,
        scale=scale,
    )
