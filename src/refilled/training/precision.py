"""The number format of training."""

import torch

from refilled.recipe import Precision


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """Resolve ``auto``: bfloat16 only where the hardware multiplies in it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    return "bf16-mixed" if fast else "32-true"
