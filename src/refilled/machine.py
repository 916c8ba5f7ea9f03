"""Settings of this process that decide how fast it computes, and never what."""

import ctypes

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = 2**25  # bytes; larger blocks still come and go one by one, or pieces of them would add up


def use_machine(threads: int | None) -> None:
    """Compute on so many threads, or on as many as torch chooses, and keep freed memory for the next step.

    glibc gives what is freed at the end of its heap back to the system. Each step of training, which asks for the same
    blocks as the step before, then gets them page by page and filled with zeros. On a processor that takes up to a
    quarter of a network's forward pass. Other systems' allocators are left as they are.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)
        mallopt(_TRIM_THRESHOLD, -1)  # never


def give_memory_back() -> None:
    """Return to the system, where it is glibc's, all memory that was freed and kept."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
