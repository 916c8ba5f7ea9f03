"""Augment batches of uint8 images, as a pure function of (seed, view, index)."""

import math
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from refilled.data.keyed import keyed_integers, keyed_uniform
from refilled.errors import TaskError, unknown

Augmentation = Literal["none", "crop", "crop-flip", "resized-crop-flip"]

_LEAST_AREA = 0.35
"""Smallest area of a resized crop. Inception's 0.08 often misses the subject of a small image."""
_WIDEST = 4 / 3
"""Largest aspect ratio of a resized crop, and the inverse of the smallest (Szegedy et al., CVPR 2015)."""


def augment(pixels: Tensor, indices: Tensor, *, seed: int, view: int, kind: Augmentation) -> Tensor:
    """Return a random view of each image: padded by reflection, cropped to its size, and optionally mirrored.

    The view of an image depends only on (seed, view, index), so it is the same in every batch, process and resumed run.
    The padding is an eighth of the side length, 4 pixels for CIFAR's 32 (paper, supplement 2.2). A resized crop covers
    35 to 100 % of the area and is scaled to the size of the image (Szegedy et al., CVPR 2015).

    Args:
        pixels: uint8 images ``(N, 3, S, S)``, on any device.
        indices: Positions of the images in the training set, integers ``(N,)``.
        seed: The run's seed.
        view: Number of the view: the epoch, or the epoch modulo the number of views of a teacher cache.
        kind: ``"none"`` returns ``pixels`` itself, ``"crop"`` pads and crops, ``"crop-flip"`` also mirrors with
            probability 1/2, and ``"resized-crop-flip"`` resizes a crop and mirrors with probability 1/2.

    Returns:
        uint8 ``(N, 3, S, S)`` in channels-last memory, which the convolutions of a CPU read faster.

    Raises:
        TaskError: ``kind`` is unknown.
    """
    if kind not in get_args(Augmentation):
        raise TaskError(unknown("augmentation", str(kind), get_args(Augmentation)))
    if kind == "none":
        return pixels
    count, channels, side, _ = pixels.shape
    padding = side // 8
    keys = indices.cpu().numpy()
    if kind == "resized-crop-flip":
        return _resized_crops(pixels, seed, view, keys)
    device = pixels.device  # only the random numbers are drawn on the CPU
    top = torch.from_numpy(keyed_integers(2 * padding + 1, seed, "top", view, keys)).to(device) - padding  # (N,)
    left = torch.from_numpy(keyed_integers(2 * padding + 1, seed, "left", view, keys)).to(device) - padding  # (N,)
    along = torch.arange(side, device=device)
    rows = _reflect(top[:, None] + along, side)  # (N, S): row of the image for each row of the view
    columns = _reflect(left[:, None] + along, side)  # (N, S)
    if kind == "crop-flip":
        columns = torch.where(_mirrored(seed, view, keys).to(device)[:, None], columns.flip(1), columns)
    # One lookup of whole pixels: on a CPU four times as fast as indexing with rows and columns. For large images,
    # 32-bit positions double the speed again.
    number = torch.int32 if count * side * side < 2**31 else torch.int64
    image = torch.arange(count, dtype=number, device=device)[:, None, None] * side * side
    source = (image + rows.to(number)[:, :, None] * side + columns.to(number)[:, None, :]).flatten()  # (N S S,)
    flat = pixels.permute(0, 2, 3, 1).reshape(-1, channels)  # (N S S, 3), no copy if channels-last
    return flat.index_select(0, source).view(count, side, side, channels).permute(0, 3, 1, 2)


def _mirrored(seed: int, view: int, keys: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(keyed_integers(2, seed, "mirror", view, keys)).bool()


def _resized_crops(pixels: Tensor, seed: int, view: int, keys: NDArray[np.int64]) -> Tensor:
    """Return a random crop of each image, resized to the size of the image by bilinear interpolation."""

    def draw(what: str, low: float, high: float) -> Tensor:
        return torch.from_numpy(low + (high - low) * keyed_uniform(seed, what, view, keys)).float()

    side, device = pixels.shape[-1], pixels.device
    area, skew = draw("area", _LEAST_AREA, 1), draw("skew", -math.log(_WIDEST), math.log(_WIDEST)).div(2).exp()
    height, width = (area.sqrt() / skew).clamp(max=1), (area.sqrt() * skew).clamp(max=1)  # (N,), relative to the side
    # Centres and half lengths on the scale -1 to 1 of grid_sample; a mirrored axis has a negative length.
    centre_y, centre_x = draw("top", -1, 1) * (1 - height), draw("left", -1, 1) * (1 - width)
    width = torch.where(_mirrored(seed, view, keys), -width, width)
    along = (2 * torch.arange(side, device=device) + 1) / side - 1  # (S,): the centres of the pixels
    y = centre_y.to(device)[:, None] + height.to(device)[:, None] * along  # (N, S)
    x = centre_x.to(device)[:, None] + width.to(device)[:, None] * along
    grid = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], dim=-1)  # (N, S, S, 2)
    views = F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)
    return views.round_().to(torch.uint8, memory_format=torch.channels_last)


def _reflect(positions: Tensor, length: int) -> Tensor:
    """Reflect positions beyond either border back inside, without repeating the border: -1 becomes 1."""
    positions = positions.abs()
    return torch.where(positions >= length, 2 * (length - 1) - positions, positions)
