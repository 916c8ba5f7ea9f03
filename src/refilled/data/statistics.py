"""Statistics of images."""

import torch

from refilled.data.store import Pixels

_BLOCK = 256  # images copied to memory at a time


def channel_statistics(pixels: Pixels) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel of uint8 images ``(N, 3, S, S)``, on the scale [0, 1]."""
    counts = torch.zeros(3, 256, dtype=torch.float64)
    for block in pixels.split(_BLOCK):
        counts += torch.stack([torch.bincount(block[:, channel].flatten(), minlength=256) for channel in range(3)])
    levels = torch.arange(256) / 255
    share = counts / counts.sum(1, keepdim=True)
    mean = (share * levels).sum(1)
    variance = (share * (levels - mean[:, None]).square()).sum(1)
    # At least one level, so that the normalisation of a constant channel does not divide by zero.
    return mean.tolist(), variance.sqrt().clamp(min=1 / 255).tolist()
