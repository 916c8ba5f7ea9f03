"""Process-wide settings for speed and reproducibility."""

import ctypes
import os

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = 2**25  # bytes; larger blocks are still returned to the system, or their fragments would add up


def use_machine(threads: int | None, device: str = "cpu") -> None:
    """Set the number of threads and make computation on ``device`` deterministic.

    The process also keeps freed memory for the next step of training, which allocates the same blocks. By default,
    glibc returns memory at the end of its heap to the system, which hands it out again page by page and zeroed. On a
    CPU, this takes up to a quarter of the time of a forward pass. Other allocators are not changed.

    Args:
        threads: Number of threads. None: torch's current number.
        device: Name of the device.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)
        mallopt(_TRIM_THRESHOLD, -1)  # never
    repeat_exactly(torch.device(device))


def repeat_exactly(device: torch.device) -> None:
    """Make repeated computations bit-identical. Call it before the first use of a GPU.

    By default, a GPU selects its kernels by timing them, and some kernels sum in an order that varies between calls.
    Operations without a deterministic implementation warn.
    """
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling new memory costs time, and no code here reads it before writing.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def give_memory_back() -> None:
    """Return freed memory that the process kept to the system; only glibc supports this."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
