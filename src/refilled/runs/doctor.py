"""Whether this machine can train: packages, devices, speed, memory, folders, network.

Imports are inside the functions, so that a package that cannot be imported is a finding.
"""

import os
import platform
import shutil
import tempfile
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from refilled import network
from refilled.files import cache_folder

NETWORKS = {"wrn_10_1": 32, "mobilenet_0.25": 64}
"""Networks whose steps are timed, with the side length of their images: plain convolutions, and depthwise ones."""

_PACKAGES = ("torch", "torchvision", "timm")
_FOR_DEVELOPERS = ("dev", "docs", "examples")


def examine(offline: bool = False) -> dict[str, Any]:
    """Examine the machine for some seconds.

    Args:
        offline: Do not try to reach the Hugging Face hub.

    Returns:
        Plain data. ``problems`` lists what keeps runs from working; sizes are in bytes, times in seconds.
    """
    problems: list[str] = []
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _packages(problems),
        "extras": _extras(),
    }
    if not problems:
        found |= {"devices": _devices(), "threads": _threads(), "precision": _precision(problems)}
        from refilled.data import free_memory

        found["free_memory"] = free_memory()
        found["data_root"] = _data_root()
    found |= {"cache": _cache(problems), "hub": _hub(offline)}
    return {**found, "problems": problems}


def _packages(problems: list[str]) -> dict[str, str]:
    found = {"refilled": metadata.version("refilled")}
    for name in _PACKAGES:
        try:
            found[name] = str(import_module(name).__version__)
        except Exception as error:  # a damaged package fails in any way
            problems.append(f"{name} cannot be imported ({error}); install it: pip install --force-reinstall {name}")
    return found


def _extras() -> dict[str, dict[str, Any]]:
    """Return for each optional part what is installed of it, and how to install the rest."""
    from packaging.requirements import Requirement

    found: dict[str, dict[str, Any]] = {}
    for text in metadata.requires("refilled") or ():
        requirement = Requirement(text)
        for extra in metadata.metadata("refilled").get_all("Provides-Extra") or ():
            wanted = requirement.marker is not None and requirement.marker.evaluate({"extra": extra})
            if not wanted or requirement.marker.evaluate({"extra": ""}) or extra in _FOR_DEVELOPERS:  # type: ignore[union-attr]
                continue
            part = found.setdefault(extra, {"installed": {}, "missing": [], "install": None})
            version = _version(requirement.name)
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                part["missing"].append(f"{requirement.name}{requirement.specifier}")
                part["install"] = f"pip install 'refilled[{extra}]'"
            else:
                part["installed"][requirement.name] = version
    return dict(sorted(found.items()))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    import torch

    from refilled.runs.environment import device_name

    devices = {"cpu": device_name(torch.device("cpu"))}
    devices |= {f"cuda:{n}": torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _precision(problems: list[str]) -> dict[str, Any]:
    """Time a step of each network on the CPU in either precision; an accelerator is asked, not timed."""
    import torch

    from refilled.models import create_model
    from refilled.runs.choice import step_seconds
    from refilled.runs.environment import find_device
    from refilled.training.precision import resolve_precision

    device = find_device("auto")
    found: dict[str, Any] = {"device": device.type, "auto": resolve_precision("auto", device), "cpu_steps": {}}
    for name, size in NETWORKS.items():
        try:
            with torch.random.fork_rng(devices=[]):
                seconds = step_seconds(create_model(name, 10, image_size=size), size)
        except Exception as error:  # the question is whether it works
            problems.append(f"a training step of {name} fails: {error}")
            continue
        faster = min(seconds, key=seconds.__getitem__)
        found["cpu_steps"][name] = {"seconds": seconds, "faster": faster}
    return found


def _data_root() -> dict[str, Any]:
    from refilled.data.opening import data_folder

    folder = data_folder(None)
    return {
        "folder": str(folder),
        "exists": folder.is_dir(),
        "from": "REFILLED_DATA" if _data_variable() else "default",
    }


def _data_variable() -> bool:
    return bool(os.environ.get("REFILLED_DATA"))


def _cache(problems: list[str]) -> dict[str, Any]:
    folder = cache_folder()
    found: dict[str, Any] = {"folder": str(folder), "writable": True, "bytes": 0, "free": None}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"refilled")
        found |= {"bytes": _size(folder), "free": shutil.disk_usage(folder).free}
    except OSError as error:
        found["writable"] = False
        problems.append(f"the cache folder {folder} cannot be written ({error}); set REFILLED_CACHE to another folder")
    return found


def _size(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(path) / name).lstat().st_size
            except FileNotFoundError:  # another process has just removed it
                continue
    return total


def _hub(offline: bool) -> dict[str, Any]:
    address = network.address()
    if offline or network.forbidden():
        return {"address": address, "reached": None, "error": None}
    fault = network.fault_of(address)
    return {"address": address, "reached": fault is None, "error": fault}
