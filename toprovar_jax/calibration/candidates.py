"""What calibration may try: settings but for the alphas, which follow from the target, and the threshold."""

import dataclasses

from toprovar_jax.calibration.layer_tables import LayerTable, middle_layers
from toprovar_jax.pruning.profile import Profile, Source

# Where the search begins, and where it goes if nothing reaches the target from there.
_PRUNABLE_SCALES, _MORE_PRUNABLE_SCALES = 4, 6


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings but for the alphas and the threshold."""

    table: LayerTable
    prunable_scales: int
    dropped_scales: int = 0
    conditional_scales: int = 0
    alpha_min: float = 0.0
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
            alpha_min=self.alpha_min,
            alpha_max=max(self.alpha_min, alpha_max),
            source=self.source,
        )

    def __str__(self) -> str:
        return (
            f"last {self.prunable_scales} scales, {self.dropped_scales} dropped, {self.conditional_scales} "
            f"conditional, {self.table.name}, {self.source.replace('_', ' ')}, alpha_min {self.alpha_min:g}"
        )


def of_last_scales(depth: int, num_scales: int, guided: bool) -> list[Candidate]:
    """What may become of the last scales: some dropped, some without unconditional rows, all on fewer tokens."""
    prunable = min(_PRUNABLE_SCALES, num_scales - 1)
    without_rows = (0, prunable // 2, prunable) if guided else (0,)
    pairs = [(0, rows) for rows in without_rows] + [(1, rows) for rows in without_rows[:2]] + [(2, 0)]
    table = middle_layers(depth)
    return [Candidate(table, prunable, dropped, rows) for dropped, rows in pairs if dropped < prunable]


def of_tables(best: Candidate | None, tables: list[LayerTable], num_scales: int) -> list[Candidate]:
    """Which layers are detail layers. Where nothing has reached the target yet, more scales and all layers."""
    if best is not None:
        return [dataclasses.replace(best, table=table) for table in tables]
    few, many = (min(scales, num_scales - 1) for scales in (_PRUNABLE_SCALES, _MORE_PRUNABLE_SCALES))
    return [Candidate(tables[0], few), Candidate(tables[0], many, dropped_scales=min(2, many - 1))]


def of_the_rest(best: Candidate, num_scales: int) -> list[Candidate]:
    """Whose entropies choose tokens, one scale more or less, and pruning that depends less on the scale."""
    sources: tuple[Source, ...] = ("same_layers", "all_layers")
    others = [dataclasses.replace(best, source=source) for source in sources]
    others.append(dataclasses.replace(best, source="layer_before", table=best.table.without_first()))
    others += [
        dataclasses.replace(best, prunable_scales=scales)
        for scales in (best.prunable_scales - 1, best.prunable_scales + 1)
        if best.dropped_scales < scales < num_scales
    ]
    return [*others, dataclasses.replace(best, alpha_min=0.3)]
