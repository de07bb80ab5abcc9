"""What runs and what does not: per scale and layer a number of tokens, known before anything is compiled.

A `Plan` describes a whole run; `Plan.step` takes out of it what one compiled scale step depends on, so that plans
that differ elsewhere share the step. The model executes steps and knows no policy.
Source: docs/spec/toprovar.md, section 6; docs/spec/fastvar_skipvar.md.
"""

import dataclasses
import itertools
import json
from typing import Any, Literal, NamedTuple, get_args

from toprovar_jax.errors import InputError
from toprovar_jax.schedule import Grid, ScaleSchedule

# How the kept tokens are found.
# "variance": before every sub-layer anew, the tokens furthest from the mean of the residual stream, each row for
#   itself (FastVAR).
# "entropy": once for a run of layers, those of lowest attention entropy in the last layer before it
#   that has all tokens.
# "scores": once for a run of layers, those of lowest score, handed to the step.
Selection = Literal["variance", "entropy", "scores"]

TOKEN_ALIGNMENT = 8  # GPU copy engines want lengths that are multiples of 8
_NUM_BUCKETS = 8


class PlanError(InputError):
    """A plan that cannot be executed, or does not fit what it is asked for; the message names the fix."""


class Span(NamedTuple):
    """Layers from `start` up to, not including, `stop`."""

    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class LayerRun:
    """Successive layers that a scale runs on the same number of tokens.

    Attributes:
      span: the layers.
      kept_tokens: how many tokens run; 0 skips the layers.
      pruned: whether that is fewer than the scale has.
    """

    span: Span
    kept_tokens: int
    pruned: bool


@dataclasses.dataclass(frozen=True)
class ScalePlan:
    """What one scale does.

    Attributes:
      kept_tokens: per layer how many tokens run: all of the grid, some, or 0 (the layer is skipped). Empty for a
        scale that is dropped: it is not run at all and adds nothing to the code map.
      guided: whether the unconditional rows run too, in runs that have any.
    """

    kept_tokens: tuple[int, ...]
    guided: bool = True

    @classmethod
    def dense(cls, grid: Grid, depth: int, guided: bool = True) -> "ScalePlan":
        """All tokens in all layers."""
        return cls((grid.size,) * depth, guided)

    @classmethod
    def dropped(cls) -> "ScalePlan":
        """A scale that is not run."""
        return cls((), guided=False)

    @property
    def runs(self) -> bool:
        """Whether the scale is run at all."""
        return bool(self.kept_tokens)


@dataclasses.dataclass(frozen=True)
class ScaleStep:
    """All of a plan that one compiled scale step depends on.

    Attributes:
      scale: index of the scale.
      guided: whether the unconditional rows run too, in runs that have any.
      runs: the layers in order, cut into runs.
      cache_lengths: per layer, tokens in the cache before the step.
      selection: how kept tokens are found; None where all are kept.
      restored: layers whose updates, saved by an earlier scale, the state still carries.
      restore_grid: the grid of those updates; None where there are none.
      saved: layers whose updates this step has to save.
      by_sublayer: whether updates are saved and restored per sub-layer.
    """

    scale: int
    guided: bool
    runs: tuple[LayerRun, ...]
    cache_lengths: tuple[int, ...]
    selection: Selection | None
    restored: tuple[Span, ...]
    restore_grid: Grid | None
    saved: tuple[Span, ...]
    by_sublayer: bool

    @property
    def scored_runs(self) -> tuple[LayerRun, ...]:
        """Runs of layers that need a choice of tokens."""
        return tuple(run for run in self.runs if run.pruned and run.kept_tokens > 0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every scale and layer of a run does.

    Attributes:
      schedule: token grids of the run.
      depth: layers of the transformer.
      scales: one entry per scale.
      selection: how kept tokens are found.
      restore_scale: the scale whose updates fill in for tokens that did not run, resized to the scale at hand;
        None where nothing is pruned.

    Raises:
      PlanError: the parts contradict each other.
    """

    schedule: ScaleSchedule
    depth: int
    scales: tuple[ScalePlan, ...]
    selection: Selection = "scores"
    restore_scale: int | None = None

    @classmethod
    def dense(cls, schedule: ScaleSchedule, depth: int) -> "Plan":
        """Everything runs."""
        return cls(schedule, depth, tuple(ScalePlan.dense(grid, depth) for grid in schedule))

    def __post_init__(self) -> None:
        if len(self.scales) != len(self.schedule):
            raise PlanError(f"the plan has {len(self.scales)} scales for a schedule of {len(self.schedule)}")
        self._check_counts()
        self._check_guidance()
        self._check_restoration()

    def _check_counts(self) -> None:
        for scale, (grid, entry) in enumerate(zip(self.schedule, self.scales, strict=True)):
            if not entry.runs:
                if scale == 0:
                    raise PlanError("a plan must run scale 0, which holds the text's token")
                if entry.guided:
                    raise PlanError(f"scale {scale} of the plan is dropped, so it cannot be guided")
                continue
            if len(entry.kept_tokens) != self.depth:
                raise PlanError(
                    f"scale {scale} of the plan counts tokens for {len(entry.kept_tokens)} layers, but the model "
                    f"has {self.depth}: give one count per layer"
                )
            if not all(0 <= kept <= grid.size for kept in entry.kept_tokens):
                raise PlanError(
                    f"scale {scale} of the plan must keep from 0 to {grid.size} tokens in every layer, got "
                    f"{min(entry.kept_tokens)} to {max(entry.kept_tokens)}"
                )

    def _check_guidance(self) -> None:
        switches = [entry.guided for entry in self.scales if entry.runs]
        if switches != sorted(switches, reverse=True):
            raise PlanError(
                "a plan cannot guide again after a conditional-only scale: the unconditional cache has a gap there"
            )

    def _check_restoration(self) -> None:
        pruned = {scale: spans for scale in range(len(self.scales)) if (spans := self._pruned_layers(scale))}
        if not pruned:
            if self.restore_scale is not None:
                raise PlanError("a plan that prunes no tokens needs no restore_scale: leave it out")
            return
        first = min(pruned)
        if self.restore_scale is None or not 0 <= self.restore_scale < first:
            raise PlanError(
                f"the plan prunes scale {first}, so restore_scale must name an earlier scale, got "
                f"{self.restore_scale}"
            )
        if not self.scales[self.restore_scale].runs:
            raise PlanError(f"the plan's restore_scale {self.restore_scale} is dropped: name one that runs")
        if self.selection == "entropy" and any(0 in layers for layers in pruned.values()):
            raise PlanError(
                "layer 0 has no layer before it whose entropy could choose its tokens: keep it dense, or choose "
                "selection 'variance' or 'scores'"
            )

    def _pruned_layers(self, scale: int) -> list[int]:
        size = self.schedule[scale].size
        return [layer for layer, kept in enumerate(self.scales[scale].kept_tokens) if kept < size]

    @property
    def executed_scales(self) -> tuple[int, ...]:
        """Indices of the scales that run."""
        return tuple(scale for scale, entry in enumerate(self.scales) if entry.runs)

    @property
    def cache_capacities(self) -> tuple[int, ...]:
        """Per layer, the length of a cache buffer: room for every kept token but the last scale's, aligned."""
        lengths = self._cache_lengths(len(self.scales) - 1)
        return tuple(-(-length // TOKEN_ALIGNMENT) * TOKEN_ALIGNMENT for length in lengths)

    def _cache_lengths(self, scale: int) -> tuple[int, ...]:
        ran = [entry.kept_tokens for entry in self.scales[:scale] if entry.runs]
        return tuple(sum(counts) for counts in zip(*ran, strict=True)) if ran else (0,) * self.depth

    def step(self, scale: int, breaks: tuple[int, ...] = ()) -> ScaleStep:
        """What the compiled step of a scale depends on.

        Args:
          scale: index of a scale that runs.
          breaks: layers before which the whole residual stream is needed, so that no run of layers goes across.
        """
        entry = self.scales[scale]
        assert entry.runs, f"scale {scale} is dropped"
        needed = self._restored_spans(scale, breaks)
        restore_scale = -1 if self.restore_scale is None else self.restore_scale
        carries = bool(needed) and restore_scale < scale
        runs = self._runs(scale, breaks)
        return ScaleStep(
            scale=scale,
            guided=entry.guided,
            runs=runs,
            cache_lengths=self._cache_lengths(scale),
            selection=self.selection if any(run.pruned and run.kept_tokens for run in runs) else None,
            restored=needed if carries else (),
            restore_grid=self.schedule[restore_scale] if carries else None,
            saved=needed if restore_scale == scale else (),
            by_sublayer=bool(needed) and restore_scale <= scale and self.selection == "variance",
        )

    def _restored_spans(self, first: int, breaks: tuple[int, ...]) -> tuple[Span, ...]:
        """Layers that some scale from `first` on needs restored."""
        return tuple(
            sorted(
                {
                    run.span
                    for scale in range(first, len(self.scales))
                    for run in self._runs(scale, breaks)
                    if run.pruned
                }
            )
        )

    def _runs(self, scale: int, breaks: tuple[int, ...]) -> tuple[LayerRun, ...]:
        size, counts = self.schedule[scale].size, self.scales[scale].kept_tokens

        def together(layer: int) -> bool:
            kept = counts[layer]
            # Where tokens are chosen before every sub-layer, nothing is shared between layers.
            alone = self.selection == "variance" and kept < size
            return layer > 0 and counts[layer - 1] == kept and layer not in breaks and not alone

        starts = [layer for layer in range(len(counts)) if not together(layer)]
        return tuple(
            LayerRun(Span(start, stop), counts[start], counts[start] < size)
            for start, stop in itertools.pairwise([*starts, len(counts)])
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_json` is its inverse."""
        return {
            "schedule": [list(grid) for grid in self.schedule],
            "depth": self.depth,
            "selection": self.selection,
            "restore_scale": self.restore_scale,
            "scales": [
                {"kept_tokens": list(entry.kept_tokens), "guided": entry.guided} if entry.runs else "dropped"
                for entry in self.scales
            ],
        }

    @classmethod
    def from_json(cls, data: Any) -> "Plan":
        """Rebuilds a plan.

        Raises:
          PlanError: the data are no plan, or one that cannot be executed.
        """
        try:
            content = dict(data)
            scales = tuple(_scale_from_json(entry) for entry in content.pop("scales"))
            schedule = tuple(Grid(*map(_whole, grid)) for grid in content.pop("schedule"))
            restore_scale = content.pop("restore_scale")
            restore_scale = None if restore_scale is None else _whole(restore_scale)
            depth, selection = _whole(content.pop("depth")), content.pop("selection")
        except (TypeError, KeyError, ValueError) as error:
            raise PlanError(f"not a plan: {error!r}; write one with Plan.to_json") from error
        if selection not in get_args(Selection):
            names = ", ".join(get_args(Selection))
            raise PlanError(f"unknown selection {selection!r} in the plan: choose one of {names}")
        if content:
            raise PlanError(f"not a plan: unknown entries {sorted(content)}; write one with Plan.to_json")
        return cls(schedule, depth, scales, selection, restore_scale)

    @classmethod
    def from_text(cls, text: str) -> "Plan":
        """Reads a plan from the text of a JSON file.

        Raises:
          PlanError: the text is no JSON, or no plan.
        """
        try:
            return cls.from_json(json.loads(text))
        except json.JSONDecodeError as error:
            raise PlanError(f"not a plan, and no JSON: {error}") from error

    def table(self) -> str:
        """A table to print: one line per scale."""
        rows = [("scale", "grid", "tokens", "rows", "layers: kept tokens")]
        for scale, (grid, entry) in enumerate(zip(self.schedule, self.scales, strict=True)):
            rows.append(
                (
                    str(scale),
                    f"{grid.height}x{grid.width}",
                    str(grid.size),
                    ("guided" if entry.guided else "conditional") if entry.runs else "-",
                    self._describe_layers(scale) if entry.runs else "dropped",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([*(cell.rjust(width) for cell, width in zip(row[:4], widths, strict=True)), row[4]])
            for row in rows
        ]
        if self.restore_scale is not None:
            lines.append(f"tokens chosen by {self.selection}; the others restored from scale {self.restore_scale}")
        return "\n".join(lines)

    def _describe_layers(self, scale: int) -> str:
        size = self.schedule[scale].size
        parts = []
        for kept, group in itertools.groupby(enumerate(self.scales[scale].kept_tokens), lambda item: item[1]):
            layers = [layer for layer, _ in group]
            name = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
            amount = "all" if kept == size else f"{kept} ({kept / size:.0%})" if kept else "skipped"
            parts.append(f"{name}: {amount}")
        return ", ".join(parts)


def _scale_from_json(entry: Any) -> ScalePlan:
    if entry == "dropped":
        return ScalePlan.dropped()
    if sorted(entry) != ["guided", "kept_tokens"] or not isinstance(entry["guided"], bool):
        raise ValueError(f"a scale is 'dropped' or has kept_tokens and guided, got {entry}")
    return ScalePlan(tuple(_whole(kept) for kept in entry["kept_tokens"]), entry["guided"])


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is no whole number")
    return value


def buckets(grid: Grid) -> tuple[int, ...]:
    """The few token counts that adaptive policies choose from: eighths of a grid, in multiples of 8, and all."""
    steps = (grid.size * eighth / _NUM_BUCKETS for eighth in range(1, _NUM_BUCKETS))
    aligned = {-(-int(-(-step // 1)) // TOKEN_ALIGNMENT) * TOKEN_ALIGNMENT for step in steps}
    return (*sorted(count for count in aligned if count < grid.size), grid.size)


def bucket(grid: Grid, count: float) -> int:
    """The smallest bucket of at least `count` tokens; all of the grid where none is."""
    return next((size for size in buckets(grid) if size >= count), grid.size)
