"""The policies by name."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toprovar_jax.errors import InputError
from toprovar_jax.pruning.fastvar import FastVAR
from toprovar_jax.pruning.plan import Plan, PlanError
from toprovar_jax.pruning.policy import Dense, Fixed, Policy
from toprovar_jax.pruning.profile import Profile, ProfileError, load_profile
from toprovar_jax.pruning.skipvar import SkipVAR, load_decisions
from toprovar_jax.pruning.toprovar import ToProVAR

# Those that need nothing but their name. "toprovar" goes by the profile of the checkpoint, "skipvar" by decisions
# fitted to it where there are any, else by the published ones.
POLICIES: dict[str, Callable[[], Policy]] = {"dense": Dense, "fastvar": FastVAR, "skipvar": SkipVAR}


POLICY_NAMES = (*POLICIES, "toprovar")


def resolve_policy(
    policy: Any, folder: str | os.PathLike[str] | None = None, checkpoint: str | None = None
) -> Policy:
    """The policy, plan, name of a policy or name of a plan's JSON file that a call passes, as a policy.

    Args:
      policy: what was passed.
      folder: of the checkpoint, whose profile "toprovar" takes; None for a model that is not on disk.
      checkpoint: digest of the checkpoint's manifest.

    Raises:
      InputError: there is no such policy, the file is no plan, or a profile is missing or of another checkpoint.
    """
    if policy == "toprovar":
        policy = ToProVAR(_profile(folder))
    if policy == "skipvar" and folder is not None and (decisions := load_decisions(folder)) is not None:
        return SkipVAR(decisions)
    if isinstance(policy, ToProVAR):
        policy.profile.check_checkpoint(checkpoint)
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Plan):
        return Fixed(policy)
    if isinstance(policy, str) and policy in POLICIES:
        return POLICIES[policy]()
    if not isinstance(policy, str) or not policy.endswith(".json"):
        raise InputError(
            f"unknown policy {policy!r}: choose one of {', '.join(POLICY_NAMES)}, or a plan's JSON file"
        )
    try:
        return Fixed(Plan.from_text(Path(policy).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the plan {policy}: {error}") from error
    except PlanError as error:
        raise PlanError(f"{policy}: {error}") from error


def _profile(folder: str | os.PathLike[str] | None) -> Profile:
    if folder is None:
        raise ProfileError(
            "policy 'toprovar' needs a checkpoint on disk with a profile: pass ToProVAR(profile) in its place"
        )
    if (profile := load_profile(folder)) is None:
        raise ProfileError(
            f"{folder} has no profile for policy 'toprovar': make one with `python -m toprovar_jax.calibrate "
            f"--checkpoint {folder} --prompts FILE --target speedup=3`"
        )
    return profile
