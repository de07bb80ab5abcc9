"""The policies by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from toprovar_jax.errors import InputError
from toprovar_jax.pruning.fastvar import FastVAR
from toprovar_jax.pruning.plan import Plan, PlanError
from toprovar_jax.pruning.policy import Dense, Fixed, Policy
from toprovar_jax.pruning.skipvar import SkipVAR

POLICIES: dict[str, Callable[[], Policy]] = {"dense": Dense, "fastvar": FastVAR, "skipvar": SkipVAR}


def resolve_policy(policy: Any) -> Policy:
    """The policy, plan, name of a policy or name of a plan's JSON file that a call passes, as a policy.

    Raises:
      InputError: there is no such policy, or the file is no plan.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Plan):
        return Fixed(policy)
    if isinstance(policy, str) and policy in POLICIES:
        return POLICIES[policy]()
    if not isinstance(policy, str) or not policy.endswith(".json"):
        raise InputError(f"unknown policy {policy!r}: choose one of {', '.join(POLICIES)}, or a plan's JSON file")
    try:
        return Fixed(Plan.from_text(Path(policy).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the plan {policy}: {error}") from error
    except PlanError as error:
        raise PlanError(f"{policy}: {error}") from error
