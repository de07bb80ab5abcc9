"""Runs the layers of one scale as its step says: on all tokens, on kept ones, or not at all.

What does not run adds the update that the same layers made at an earlier scale, resized. Kept tokens are gathered
before any norm or product, so the work of the others is not compiled.
Source: docs/spec/toprovar.md, sections 5 and 6; docs/spec/fastvar_skipvar.md, sections A.1 and A.2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from toprovar_jax.models.infinity import (
    Attend,
    Attended,
    Cache,
    Infinity,
    Rotation,
    TextContext,
    append_and_attend,
)
from toprovar_jax.pruning.entropy import lowest_tokens
from toprovar_jax.pruning.plan import TOKEN_ALIGNMENT, LayerRun, ScaleStep, Span
from toprovar_jax.pruning.token_choice import TokenChoice
from toprovar_jax.resize import resize_area
from toprovar_jax.schedule import Grid

# By layers, what they added to the residual stream of every token: in one piece, or per sub-layer where tokens are
# chosen before every sub-layer.
Updates = dict[Span, Float[Array, "rows parts _saved_tokens channels"]]


class LayersResult(NamedTuple):
    """What the layers of one scale left behind.

    Attributes:
      x: the residual stream of all tokens.
      cache: with the tokens that ran.
      saved: the updates that the step has to save.
      kept: by layers, indices of the tokens that ran; once per sub-layer where each has its own choice, else once.
      entropy: by layer asked for, the attention entropy of its tokens in nats, mean over heads; NaN where a token
        did not run.
      activations: `block0_in`, and `block{i}_out` of every layer after which all tokens are at hand.
    """

    x: Float[Array, "rows tokens channels"]
    cache: Cache
    saved: Updates
    kept: dict[Span, Int[Array, "rows choices kept"]]
    entropy: dict[int, Float[Array, "rows tokens"]]
    activations: dict[str, Array]


def run_layers(
    model: Infinity,
    x: Float[Array, "rows tokens channels"],
    context: TextContext,
    levels: Float[Array, "channels"],
    rotation: Rotation,
    cache: Cache,
    restored: Updates,
    scores: Float[Array, "runs batch tokens"] | None,
    *,
    step: ScaleStep,
    grid: Grid,
    batch: int,
    entropy_layers: tuple[int, ...],
    after_run: Callable[[int, Array], Array],
) -> LayersResult:
    """Runs all layers of a scale.

    Args:
      model: the transformer.
      x: input tokens, level embedding not yet added.
      context: the text.
      levels: the scale's level embedding.
      rotation: cos and sin of all tokens.
      cache: keys and values of earlier scales.
      restored: updates that an earlier scale saved.
      scores: where the step selects by scores, one per token for every scored run: the lowest are kept.
      step: what runs (static).
      grid: the scale's grid.
      batch: number of images, so that rows = batch, or 2 x batch under guidance.
      entropy_layers: layers whose attention entropy is wanted (static).
      after_run: (index of the next layer, x) -> x, after every run of layers, for guidance inside the layers.
    """
    padding = _padding(step, grid, entropy_layers)
    x, cos, sin = (
        _pad_tokens(array, axis, padding) for array, axis in ((x, 1), (rotation[0], 0), (rotation[1], 0))
    )
    execution = _Execution(
        model, context, (cos, sin), cache, restored, scores, step, grid, batch, entropy_layers, padding
    )
    for run in step.runs:
        start, stop = run.span
        if start in model.config.level_layers:
            x = x + levels
        if start == 0:
            execution.activations["block0_in"] = x
        x = after_run(stop, execution.run(run, x))
        execution.activations[f"block{stop - 1}_out"] = x
    return LayersResult(
        x=x[:, : grid.size],
        cache=tuple(execution.cache),
        saved=execution.saved,
        kept=execution.kept,
        entropy={layer: execution.entropy_of(layer) for layer in entropy_layers},
        activations={name: array[:, : grid.size] for name, array in execution.activations.items()},
    )


def _padding(step: ScaleStep, grid: Grid, entropy_layers: tuple[int, ...]) -> int:
    """Tokens to add once, so that attention need not in every layer; none where layers leave more than x."""
    plain = not (step.saved or entropy_layers or any(run.pruned for run in step.runs))
    return -grid.size % TOKEN_ALIGNMENT if plain else 0


def _pad_tokens(x: Array, axis: int, padding: int) -> Array:
    return jnp.pad(x, [(0, padding if i == axis else 0) for i in range(x.ndim)])


class _Execution:
    """One pass through the layers while it is traced: what goes in, and what has come out so far."""

    def __init__(
        self,
        model: Infinity,
        context: TextContext,
        rotation: Rotation,
        cache: Cache,
        restored: Updates,
        scores: Array | None,
        step: ScaleStep,
        grid: Grid,
        batch: int,
        entropy_layers: tuple[int, ...],
        padding: int,
    ):
        self._model = model
        self._context = context
        self._rotation = rotation
        self._restored = restored
        self._step = step
        self._grid = grid
        self._batch = batch
        self._padding = padding
        self._scores = {} if scores is None else dict(zip(step.scored_runs, scores, strict=True))
        self._sources = _entropy_sources(step)
        self._entropy_layers = {*entropy_layers, *self._sources.values()}
        self.cache = list(cache)
        self.saved: Updates = {}
        self.kept: dict[Span, Array] = {}
        self.entropy: dict[int, Array] = {}
        self.activations: dict[str, Array] = {}

    def run(self, run: LayerRun, x: Array) -> Array:
        """Runs some layers and returns the residual stream of all tokens."""
        if not run.pruned:
            return self._run_all_tokens(run.span, x)
        if run.kept_tokens == 0:
            parts = range(self._restored[run.span].shape[1])
            return x + sum(self._restore(run.span, part) for part in parts)
        if self._step.selection == "variance":
            return self._run_sublayers(run, x)
        return self._run_kept_tokens(run, x)

    def entropy_of(self, layer: int) -> Float[Array, "rows tokens"]:
        """Entropy of a layer's tokens; NaN where it was skipped."""
        rows = self._batch * (2 if self._step.guided else 1)
        return self.entropy.get(layer, jnp.full((rows, self._grid.size), jnp.nan))

    def _run_all_tokens(self, span: Span, x: Array) -> Array:
        by_sublayer = self._step.by_sublayer
        before: dict[int, Array] = {}
        for layer in range(*span):
            before[layer] = x
            if by_sublayer and Span(layer, layer + 1) in self._step.saved:
                x = self._run_and_save_sublayers(layer, x)
            else:
                x, attended = self._model.run_block(layer, x, self._context, self._rotation, self._attend(layer))
                self._record(layer, attended)
            self.activations[f"block{layer}_out"] = x
            for saved in self._step.saved if not by_sublayer else ():
                if saved.stop == layer + 1 and saved.start in before:
                    self._save(saved, [x - before[saved.start]])
        return x

    def _run_and_save_sublayers(self, layer: int, x: Array) -> Array:
        updates = []
        for update_of in self._sublayers(layer):
            update = update_of(x, self._rotation, None)
            updates.append(update)
            x = x + update
        self._save(Span(layer, layer + 1), updates)
        return x

    def _run_sublayers(self, run: LayerRun, x: Array) -> Array:
        """One layer; tokens are chosen before every sub-layer, in every row for itself."""
        (layer, _), choices = run.span, []
        for part, update_of in enumerate(self._sublayers(layer)):
            choice = TokenChoice.furthest_from_mean(x, run.kept_tokens)
            choices.append(choice.kept)
            update = update_of(choice.take(x), self._rotation_of(choice), choice)
            x = x + choice.put_back(update, self._restore(run.span, part))
        self.kept[run.span] = jnp.stack(choices, axis=1)
        return x

    def _run_kept_tokens(self, run: LayerRun, x: Array) -> Array:
        """All layers of the run on the same tokens, which both guidance halves share."""
        if self._step.selection == "entropy":
            scores = self.entropy[self._sources[run]].reshape(-1, self._batch, self._grid.size).mean(axis=0)
        else:
            scores = self._scores[run]
        kept = lowest_tokens(scores, self._grid, run.kept_tokens)
        kept = jnp.tile(kept, (x.shape[0] // self._batch, 1))
        self.kept[run.span] = kept[:, None]
        choice = TokenChoice.from_indices(kept, self._grid.size)
        rotation, others = self._rotation_of(choice), x + self._restore(run.span)
        x = choice.take(x)
        for layer in range(*run.span):
            attend = self._attend(layer, choice)
            x, attended = self._model.run_block(layer, x, self._context, rotation, attend)
            self._record(layer, attended, choice)
        return choice.put_back(x, others)

    def _sublayers(self, layer: int) -> tuple[Callable[[Array, Rotation, TokenChoice | None], Array], ...]:
        """The three updates of a block as functions of tokens, their rotation and which they are."""
        block, context = self._model.blocks[layer], self._context
        modulation = context.modulation[layer]

        def attention(x: Array, rotation: Rotation, choice: TokenChoice | None) -> Array:
            update, attended = block.attention_update(x, modulation, rotation, self._attend(layer, choice))
            self._record(layer, attended, choice)
            return update

        return (
            attention,
            lambda x, *_: block.cross_update(x, context.cross_attention[layer], context.mask),
            lambda x, *_: block.mlp_update(x, modulation),
        )

    def _attend(self, layer: int, choice: TokenChoice | None = None) -> Attend[Attended]:
        length = self._step.cache_lengths[layer]
        padding = self._padding if choice is None else choice.padding
        return append_and_attend(self.cache[layer], length, padding, layer in self._entropy_layers)

    def _rotation_of(self, choice: TokenChoice) -> Rotation:
        cos, sin = self._rotation
        return choice.take_shared(cos), choice.take_shared(sin)

    def _record(self, layer: int, attended: Attended, choice: TokenChoice | None = None) -> None:
        self.cache[layer] = attended.cache
        if (entropy := attended.entropy) is not None:
            self.entropy[layer] = entropy if choice is None else choice.put_back(entropy, jnp.nan)

    def _save(self, span: Span, updates: list[Array]) -> None:
        dtype = self.cache[span.start].key.dtype
        self.saved[span] = jnp.stack(updates, axis=1).astype(dtype)

    def _restore(self, span: Span, part: int = 0) -> Float[Array, "rows tokens channels"]:
        assert self._step.restore_grid is not None
        saved = self._restored[span][:, part]
        rows, _, channels = saved.shape
        resized = resize_area(saved.reshape(rows, *self._step.restore_grid, channels), self._grid)
        return resized.reshape(rows, self._grid.size, channels)


def _entropy_sources(step: ScaleStep) -> dict[LayerRun, int]:
    """For every run whose tokens are chosen by entropy, the last layer before it that has all tokens."""
    if step.selection != "entropy":
        return {}
    return {
        run: max(
            layer
            for earlier in step.runs
            if not earlier.pruned
            for layer in range(*earlier.span)
            if layer < run.span.start
        )
        for run in step.scored_runs
    }
