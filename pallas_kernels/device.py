"""The device that a call is traced for."""

import re
from typing import Any

import jax

_HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")


def current_device() -> Any:
    """The device, real or abstract, of the ambient mesh, or else jax's default one."""
    if (abstract := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        return abstract
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    return default if isinstance(default, jax.Device) else jax.devices(default)[0]


def is_hopper(device: Any) -> bool:
    """Whether it has wgmma: Blackwell's GPUs do not."""
    return _HOPPER.search(device.device_kind) is not None
