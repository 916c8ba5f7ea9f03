"""Whether the network may be used, and whether the Hugging Face hub can be reached.

The libraries of the hub try again for a minute where there is no network. One quick request is made before them; if it
fails, they read their cache only.
"""

import os
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

VARIABLES = ("REFILLED_OFFLINE", "HF_HUB_OFFLINE")
"""Environment variables that forbid downloads."""

_TRUE = ("1", "ON", "YES", "TRUE")
_TIMEOUT = 3.0  # seconds
_REMEMBERED = 60.0  # seconds that an answer holds, since several networks may be loaded in a row


def go_offline() -> None:
    """Forbid the network to this process and to those that it starts."""
    os.environ.update(dict.fromkeys(VARIABLES, "1"))
    os.environ.setdefault("WANDB_MODE", "offline")
    _switch(True)


def forbidden() -> str | None:
    """Return who has forbidden the network, as ``REFILLED_OFFLINE is set``; None if it may be used."""
    for name in VARIABLES:
        if os.environ.get(name, "").upper() in _TRUE:
            return f"{name} is set" if name != "REFILLED_OFFLINE" else "--offline or REFILLED_OFFLINE is set"
    constants = sys.modules.get("huggingface_hub.constants")
    return "HF_HUB_OFFLINE is set" if constants is not None and constants.HF_HUB_OFFLINE else None


def address() -> str:
    """Return the address of the hub: ``$HF_ENDPOINT``, or that of Hugging Face."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def fault_of(url: str) -> str | None:
    """Ask an address once, and return why it does not answer; None if it does."""
    try:
        with urlopen(Request(url, method="HEAD"), timeout=_TIMEOUT):
            return None
    except HTTPError:  # it answered
        return None
    except URLError as error:  # its certificate is judged by the library that downloads, which has its own list
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, ValueError) as error:
        return str(error)


def no_hub() -> str | None:
    """Return why nothing can be downloaded from the hub, as the start of a sentence; None if it can be reached."""
    if reason := forbidden():
        return reason
    fault = _fault_lately(address(), time.monotonic() // _REMEMBERED)
    return None if fault is None else f"{address()} cannot be reached ({fault})"


@lru_cache(maxsize=4)
def _fault_lately(url: str, time_span: float) -> str | None:
    return fault_of(url)


@contextmanager
def hub() -> Iterator[str | None]:
    """Let the libraries of the hub download, or read only their cache if there is no network; see :func:`no_hub`."""
    reason = no_hub()
    if reason is None:
        yield None
        return
    before = _switch(True)
    try:
        yield reason
    finally:
        _switch(before)


def _switch(offline: bool) -> bool:
    """Tell the libraries that are imported, which have read the environment already; return what they had."""
    constants: Any = sys.modules.get("huggingface_hub.constants")
    datasets: Any = sys.modules.get("datasets.config")
    before = bool(getattr(constants, "HF_HUB_OFFLINE", _forbidden_by_hub()))
    if constants is not None:
        setattr(constants, "HF_HUB_OFFLINE", offline)  # noqa: B010
    if datasets is not None:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            setattr(datasets, name, offline)
    return before


def _forbidden_by_hub() -> bool:
    """Return whether the libraries of the hub will find downloads forbidden when they are imported."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE
