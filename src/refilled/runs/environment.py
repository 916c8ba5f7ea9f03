"""The machine and the software that a run uses."""

import platform
from importlib.metadata import version

import torch

from refilled.errors import RunError


def find_device(name: str) -> torch.device:
    """Find a device by its name; ``auto`` is the accelerator if there is one.

    Raises:
        RunError: The device cannot be used here.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"device '{name}' cannot be used here, choose another with --device: {reason}") from error
    return device


def device_name(device: torch.device) -> str:
    """Return the name of a device's hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(torch.cpu.get_capabilities().get("cpu_name", platform.machine()))


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect results."""
    return {name: version(name) for name in ("refilled", "torch", "timm")} | {"python": platform.python_version()}
