"""Process-wide settings for speed and reproducibility."""

import ctypes
import os

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = 2**25  # bytes; larger blocks still come and go one by one, or pieces of them would add up


def use_machine(threads: int | None, device: str = "cpu") -> None:
    """Set the number of threads (None: torch's choice) and make computation on ``device`` deterministic.

    Freed memory is kept for the next step. glibc gives what is freed at the end of its heap back to the system. Each
    step of training, which asks for the same blocks as the step before, then gets them page by page and filled with
    zeros. On a processor that takes up to a quarter of a network's forward pass. Other systems' allocators are left as
    they are.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)
        mallopt(_TRIM_THRESHOLD, -1)  # never
    repeat_exactly(torch.device(device))


def repeat_exactly(device: torch.device) -> None:
    """Let the same computation give the same bits, which a GPU does not do of itself.

    Its fastest kernels are chosen by a race, and some sum in the order in which threads happen to come. Operations that
    have no exact form warn. It has to be said before the GPU is first used.
    """
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # To fill fresh memory would cost time, and nothing here reads it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def give_memory_back() -> None:
    """Return to the system, where it is glibc's, all memory that was freed and kept."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
