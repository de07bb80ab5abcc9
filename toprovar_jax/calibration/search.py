"""The search for ToProVAR's settings.

Some pictures are drawn in full, then again under candidate settings: what becomes of the last scales, which layers
are detail layers, whose entropies choose tokens. The alphas of each candidate follow from the target by counting
operations, so that candidates differ in similarity to the full pictures alone. The best of a stage goes on to the
next one; at last comes the threshold: whether it pays off that some pictures start later.
Source: docs/spec/toprovar.md, sections 3 to 5.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, get_args

import numpy as np
from jaxtyping import Float

from toprovar_jax.calibration import candidates, layer_tables
from toprovar_jax.calibration.candidates import Candidate
from toprovar_jax.calibration.observation import deal
from toprovar_jax.calibration.trials import Trials
from toprovar_jax.errors import InputError
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.programs import COMPILED_IN_HASTE
from toprovar_jax.pruning.profile import Crossing, Profile

# Stages compare candidates on this share of the pictures.
_STAGE_SHARE = 0.5
# Where the largest speed-up at a similarity is looked for, and how closely.
_SPEEDUPS = (1.05, 8.0)
_COARSE_STEPS, _FINE_STEPS, _FINE_REACH = 4, 4, 1.3
# How far below all shares a threshold lies that no picture of the calibration waits for.
_MARGIN = 0.02


@dataclasses.dataclass(frozen=True)
class Target:
    """What a profile has to reach: one of the two.

    Attributes:
      speedup: transformer operations of a full run over those of a pruned one.
      similarity: mean SSIM to the full pictures.
    """

    speedup: float | None = None
    similarity: float | None = None

    @classmethod
    def from_text(cls, text: str) -> "Target":
        """Reads "speedup=3.4" or "ssim=0.85".

        Raises:
          InputError: it is neither, or out of range.
        """
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if name == "speedup" and 1 < value < 100:
            return cls(speedup=value)
        if name == "ssim" and 0 < value < 1:
            return cls(similarity=value)
        raise InputError(f"unknown target {text!r}: choose speedup=N above 1, or ssim=N between 0 and 1")

    def __str__(self) -> str:
        return f"ssim={self.similarity:g}" if self.speedup is None else f"speedup={self.speedup:g}"


@dataclasses.dataclass(frozen=True)
class Result:
    """A profile and what it reached in trials."""

    profile: Profile
    candidate: Candidate
    similarity: float
    speedup: float


class Search:
    """The search over one choice of pictures.

    Args:
      trials: the pictures.
      report: called with a line about every trial.
    """

    def __init__(self, trials: Trials, report: Callable[[str], object]):
        self._trials = trials
        self._report = report
        self._stage_batches = max(1, round(_STAGE_SHARE * trials.num_batches))
        self._results: dict[Hashable, Result] = {}
        self.tried: list[dict[str, Any]] = []

    def reach(self, target: Target) -> Result:
        """The best settings for a target, threshold included.

        Raises:
          InputError: no settings reach it.
        """
        if target.similarity is not None:
            return self._with_threshold(*self._largest_speedup(target.similarity))
        assert target.speedup is not None
        return self._with_threshold(self._best_candidate(target.speedup), target.speedup)

    def _largest_speedup(self, similarity: float) -> tuple[Candidate, float]:
        """The candidate that keeps a similarity at the largest speed-up, and that speed-up.

        By bisection of logarithms: coarsely with the first stage's candidates alone, since what is best at one
        speed-up need not be at another, then finely with the best of all stages near the border.
        """
        low, high = _SPEEDUPS
        coarse = self._bisect(self._last_scales(), similarity, (low, high), _COARSE_STEPS, self._stage_batches)
        if coarse is not None:
            low = coarse.speedup
        near = {self._best_candidate(low)} | (set() if coarse is None else {coarse.candidate})
        bounds = (low / _FINE_REACH, low * _FINE_REACH)
        fine = self._bisect(sorted(near, key=str), similarity, bounds, _FINE_STEPS, self._trials.num_batches)
        if fine is None:
            raise InputError(f"no settings keep ssim={similarity:g}: choose a lower target")
        return fine.candidate, fine.speedup

    def _bisect(
        self,
        tried: list[Candidate],
        similarity: float,
        bounds: tuple[float, float],
        steps: int,
        num_batches: int,
    ) -> Result | None:
        """The fastest result found that keeps a similarity."""
        low, high = bounds
        fastest: Result | None = None
        for _ in range(steps):
            middle = math.sqrt(low * high)
            results = self._try_out(tried, middle, num_batches)
            kept = [result for result in results if result.similarity >= similarity]
            if kept:
                fastest = max(kept, key=lambda result: result.speedup)
                low = fastest.speedup
                high = max(low, high)
            else:
                high = middle
        return fastest

    def _last_scales(self) -> list[Candidate]:
        trials = self._trials
        return candidates.of_last_scales(trials.depth, trials.num_scales, trials.observed.guided)

    def _best_candidate(self, speedup: float) -> Candidate:
        """Stage by stage."""
        trials, observed = self._trials, self._trials.observed
        best = self._best_of(self._last_scales(), speedup, None)
        tables = layer_tables.candidates(observed.singular_ratios)
        known = None if best is None else best.candidate
        best = self._best_of(candidates.of_tables(known, tables, trials.num_scales), speedup, best)
        if best is None:
            raise InputError(f"no settings reach a speed-up of {speedup:.2f}: choose a lower target")
        best = self._best_of(candidates.of_the_rest(best.candidate, trials.num_scales), speedup, best)
        assert best is not None
        return best.candidate

    def _best_of(self, tried: list[Candidate], speedup: float, best: Result | None) -> Result | None:
        others = [candidate for candidate in tried if best is None or candidate != best.candidate]
        for result in self._try_out(others, speedup, self._stage_batches):
            if best is None or result.similarity > best.similarity:
                best = result
        return best

    def _try_out(self, tried: list[Candidate], speedup: float, num_batches: int) -> list[Result]:
        """Those candidates that reach the speed-up, all pictures starting as early as they may.

        One that runs as another did is not tried again.
        """
        trials = self._trials
        solved: dict[Hashable, tuple[Candidate, Profile, int]] = {}
        for candidate in tried:
            start = trials.num_scales - candidate.prunable_scales
            profile = trials.solve(candidate, speedup, [start])
            if profile is not None:
                solved.setdefault((trials.runs(profile, start), num_batches), (candidate, profile, start))
        new = {key: setting for key, setting in solved.items() if key not in self._results}
        drawn = trials.similarities([(profile, start) for _, profile, start in new.values()], num_batches)
        for (key, (candidate, profile, start)), similarity in zip(new.items(), drawn, strict=True):
            result = Result(profile, candidate, float(np.mean(similarity)), trials.speedup(profile, [start]))
            self._results[key] = self._recorded(result)
        return [self._results[key] for key in solved]

    def _recorded(self, result: Result, remark: str = "") -> Result:
        settings = f"{result.candidate}, alpha_max {result.profile.alpha_max:.3f}{remark}"
        self.tried.append(
            {"settings": settings, "ssim": round(result.similarity, 4), "speedup": round(result.speedup, 3)}
        )
        self._report(f"ssim {result.similarity:.4f} at {result.speedup:.2f}x: {settings}")
        return result

    def _with_threshold(self, candidate: Candidate, speedup: float) -> Result:
        """Lets the start depend on the picture where that pays off; otherwise hardly any picture waits.

        At equal cost either all pictures start as early as they may, or half of them do, on either side of the
        median share: these prune more and the others less.
        """
        shares = self._trials.observed.focused_shares[:, self._trials.num_scales - candidate.prunable_scales - 1]
        best = self._try_threshold(candidate, speedup, "above", float(shares.min()) - _MARGIN)
        assert best is not None, "a candidate that was chosen reaches its speed-up"
        for crossing in get_args(Crossing):
            adaptive = self._try_threshold(candidate, speedup, crossing, float(np.median(shares)))
            if adaptive is not None and adaptive.similarity > best.similarity:
                best = adaptive
        return best

    def _try_threshold(
        self, candidate: Candidate, speedup: float, crossing: Crossing, tau: float
    ) -> Result | None:
        trials, num_scales = self._trials, self._trials.num_scales
        first = num_scales - candidate.prunable_scales
        starts = start_scales(trials.observed.focused_shares, first, crossing, tau)
        solved = trials.solve(candidate, speedup, starts)
        if solved is None:
            return None
        usual = num_scales - sorted(starts)[len(starts) // 2]
        profile = dataclasses.replace(solved, crossing=crossing, tau=tau, usual_scales=usual)
        distinct = sorted(set(starts))
        drawn = trials.similarities([(profile, start) for start in distinct], trials.num_batches)
        by_start = dict(zip(distinct, drawn, strict=True))
        similarity = float(np.mean([by_start[start][picture] for picture, start in enumerate(starts)]))
        result = Result(profile, candidate, similarity, trials.speedup(profile, starts))
        return self._recorded(result, f", start {crossing} {tau:.3f}")


def start_scales(
    shares: Float[np.ndarray, "pictures scales"], first: int, crossing: Crossing, tau: float
) -> list[int]:
    """The scale that each picture's pruning starts at, `first` at the earliest; the number of scales for never."""
    crossed = shares >= tau if crossing == "above" else shares <= tau
    num_scales = shares.shape[1]
    return [
        next((scale + 1 for scale in range(first - 1, num_scales - 1) if row[scale]), num_scales)
        for row in crossed
    ]


def _print_at_once(line: str) -> None:
    print(line, flush=True)


def calibrate(
    pipe: InfinityPipeline,
    prompts: Sequence[str],
    target: Target,
    *,
    num_pictures: int = 24,
    batch_size: int = 8,
    seed: int = 0,
    report: Callable[[str], object] = _print_at_once,
) -> Profile:
    """Finds a checkpoint's profile.

    Args:
      pipe: the checkpoint, with its text encoder; its own settings of sampling and size are calibrated for.
      prompts: what to draw; as varied as what will be asked for.
      target: what to reach.
      num_pictures: how many to judge by; rounded up to whole batches.
      batch_size: pictures drawn at once.
      seed: chooses prompts and pictures.
      report: called with a line about every trial.

    Raises:
      InputError: no settings reach the target, or the checkpoint cannot draw prompts or has too few scales.
    """
    if pipe.tokenizer is None or pipe.config.text_encoder is None:
        raise InputError("calibration draws prompts: convert the checkpoint again with --text_encoder")
    drawing = InfinityPipeline(pipe.config, pipe.params, dtype=pipe.dtype, tokenizer=pipe.tokenizer)
    drawing.programs.compiler_options = COMPILED_IN_HASTE
    trials = Trials(drawing, deal(prompts, num_pictures, batch_size, seed))
    search = Search(trials, report)
    result = search.reach(target)
    return dataclasses.replace(
        result.profile,
        checkpoint=pipe.checkpoint_digest,
        calibration={
            "target": str(target),
            "ssim": round(result.similarity, 4),
            "speedup": round(result.speedup, 3),
            "pictures": len(trials.observed.pictures),
            "seed": seed,
            "layer_table": result.candidate.table.name,
            "beta": result.candidate.table.beta,
            "tried": search.tried,
        },
    )
