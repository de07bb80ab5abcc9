"""The policies that `bench.quality --policies` compares: a line each."""

import dataclasses
from collections.abc import Mapping, Sequence

from toprovar_jax.errors import InputError
from toprovar_jax.pruning.fastvar import FastVAR
from toprovar_jax.pruning.policy import Dense, Policy
from toprovar_jax.pruning.profile import Profile
from toprovar_jax.pruning.skipvar import SkipVAR
from toprovar_jax.pruning.toprovar import ToProVAR


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the comparison.

    Attributes:
      name: as tables show it.
      policy: what the pipeline follows.
      against: cases before it that it is compared with, besides the first.
    """

    name: str
    policy: Policy
    against: tuple[str, ...] = ()


def all_cases(
    profile: Profile | None, skipvar: SkipVAR | None = None, more: Mapping[str, Profile] | None = None
) -> tuple[Case, ...]:
    """All cases, the dense one first; those of ToProVAR need a profile.

    The ablations name what is left on: the rows of the paper's Table 10, and a start that all images share.

    Args:
      profile: of the checkpoint.
      skipvar: with decisions that were fitted to the checkpoint; None takes the published ones.
      more: other profiles of the checkpoint by name, for instance one that saves as much as a peer does.
    """
    peers = (
        Case("dense", Dense()),
        Case("fastvar", FastVAR()),
        Case("skipvar", skipvar or SkipVAR()),
    )
    if profile is None:
        return peers
    full = ToProVAR(profile)
    ablate = dataclasses.replace
    return (
        *peers,
        Case("toprovar", full, against=("fastvar", "skipvar")),
        *(
            Case(f"toprovar {name}", ToProVAR(other), against=("fastvar", "skipvar", "toprovar"))
            for name, other in (more or {}).items()
        ),
        Case("fixed exit", ablate(full, use_scale=False, use_layers=False, use_tokens=False)),
        Case("scale", ablate(full, use_layers=False, use_tokens=False)),
        Case("scale+token", ablate(full, use_layers=False)),
        Case("scale+layer", ablate(full, use_tokens=False)),
        Case("layer+token", ablate(full, use_scale=False)),
    )


def choose(names: Sequence[str], known: Sequence[Case]) -> list[Case]:
    """The cases of these names, or all for "all", in their order; the first one always comes along.

    Raises:
      InputError: a name is unknown.
    """
    by_name = {case.name: case for case in known}
    for name in names:
        if name not in ("all", *by_name):
            uncalibrated = not any(isinstance(case.policy, ToProVAR) for case in known)
            hint = "; those of ToProVAR need a profile, so calibrate the checkpoint first" if uncalibrated else ""
            raise InputError(f"unknown policy {name!r}: choose from all, {', '.join(by_name)}{hint}")
    return [case for case in known if case is known[0] or "all" in names or case.name in names]
