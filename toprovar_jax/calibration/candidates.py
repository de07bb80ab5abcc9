"""What calibration may try: settings but for the alphas, which follow from the target, and the threshold."""

import dataclasses

from toprovar_jax.calibration import layer_tables
from toprovar_jax.calibration.layer_tables import LayerTable
from toprovar_jax.pruning.profile import Profile, Source

# Last scales that may be pruned: where the search begins, and where it goes if nothing reaches the target there.
_PRUNABLE_SCALES, _MORE_PRUNABLE_SCALES = 4, 6


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings but for the alphas and the threshold."""

    table: LayerTable
    prunable_scales: int
    dropped_scales: int = 0
    conditional_scales: int = 0
    token_scales: int | None = None
    source: Source = "same_layers"

    def profile(self, alpha_max: float) -> Profile:
        """The settings as a profile that starts where it may."""
        return Profile(
            layer_scores=self.table.scores,
            tau=0.0,
            crossing="above",
            prunable_scales=self.prunable_scales,
            usual_scales=self.prunable_scales,
            dropped_scales=self.dropped_scales,
            conditional_scales=self.conditional_scales,
            token_scales=self.token_scales,
            alpha_max=alpha_max,
            source=self.source,
        )

    def __str__(self) -> str:
        tokens = "all" if self.token_scales is None else f"last {self.token_scales}"
        return (
            f"last {self.prunable_scales} scales, {self.dropped_scales} dropped, {self.conditional_scales} "
            f"conditional, tokens in {tokens}, {self.table.name}, {self.source.replace('_', ' ')}"
        )

    def with_scales(self, prunable: int) -> "Candidate":
        """The same for more or fewer scales; if all of those that run were conditional, they are so again."""
        all_conditional = self.conditional_scales == self.prunable_scales - self.dropped_scales
        conditional = prunable - self.dropped_scales if all_conditional else self.conditional_scales
        return dataclasses.replace(self, prunable_scales=prunable, conditional_scales=conditional)


def of_last_scales(depth: int, num_scales: int, guided: bool) -> list[Candidate]:
    """What may become of the last scales: dropped, without unconditional rows, on fewer tokens."""
    prunable = min(_PRUNABLE_SCALES, num_scales - 1)
    half = prunable // 2
    choices = [(0, 0, None), (0, 0, half), (1, 0, None), (2, 0, None)]
    if guided:
        choices += [(0, half, None), (0, prunable, None), (0, prunable, half), (0, prunable, 1)]
        choices += [(1, half, None), (1, prunable - 1, None), (2, prunable - 2, None)]
    table = layer_tables.every_layer(depth)
    distinct = dict.fromkeys(choice for choice in choices if choice[0] < prunable and choice[2] != 0)
    return [Candidate(table, prunable, dropped, conditional, tokens) for dropped, conditional, tokens in distinct]


def of_tables(best: Candidate | None, tables: list[LayerTable], num_scales: int) -> list[Candidate]:
    """Which layers are detail layers. Where nothing has reached the target yet, more scales and all layers."""
    if best is not None:
        return [dataclasses.replace(best, table=table) for table in tables]
    few, many = (min(scales, num_scales - 1) for scales in (_PRUNABLE_SCALES, _MORE_PRUNABLE_SCALES))
    return [Candidate(tables[0], few), Candidate(tables[0], many, dropped_scales=min(2, many - 1))]


def of_the_rest(best: Candidate, num_scales: int) -> list[Candidate]:
    """Whose entropies choose tokens, and one scale more or less that is pruned, or that runs on fewer tokens."""
    sources: tuple[Source, ...] = ("same_layers", "all_layers")
    others = [dataclasses.replace(best, source=source) for source in sources]
    others.append(dataclasses.replace(best, source="layer_before", table=best.table.without_first()))
    if best.token_scales is not None:
        others += [
            dataclasses.replace(best, token_scales=scales)
            for scales in (best.token_scales - 1, best.token_scales + 1)
            if best.dropped_scales < scales < best.prunable_scales
        ]
    return others + [
        best.with_scales(scales)
        for scales in (best.prunable_scales - 1, best.prunable_scales + 1)
        if best.dropped_scales < scales < num_scales
    ]
