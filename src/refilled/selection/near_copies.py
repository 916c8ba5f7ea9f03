"""Near copies: the same image, re-encoded, resized or slightly shifted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from refilled.data import Split
from refilled.losses.distances import unit_rows
from refilled.models.backbone import luma

_NEIGHBOURS = 8  # per image; copies of copies are joined
_COARSE = 8  # pixels
_SIDE = 32  # pixels to which larger images are averaged down
_SHIFTS = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
_LOWEST, _HIGHEST = 0.95, 0.995
_SHARE = 0.1
_FLAT = 2.0  # levels of 255: a smaller standard deviation is noise
_TINT = 16.0  # levels of 255
_BLOCK = 1024  # images or pairs at a time
_DECODED = 256


@dataclass(frozen=True)
class Copies:
    """Which of N images are near copies of one another.

    Attributes:
        groups: A number for each image ``(N,)``; copies share one.
        correlation: For each group of several images, the lowest correlation by which two of them were joined. 1.0:
            all pixels are equal.
        limit: Minimum correlation of two copies.
    """

    groups: NDArray[np.int64]
    correlation: dict[int, float]
    limit: float


def near_copies(embedding: Tensor, parts: Sequence[Split]) -> Copies:
    """Find near copies: the embedding and the pixels give candidates, and the pixels confirm them.

    Images with equal pixels are copies. For each other image, the candidates are the 8 images with the highest cosine
    similarity of centred embeddings, and the 8 whose grey versions of 8 pixels correlate most. A candidate is a copy if
    the correlation of the grey versions, at most 32 pixels wide, reaches the limit at a shift of at most one pixel, and
    the colours agree.

    The similarity of different images depends on the data: drawings of digits correlate more than photographs. The
    limit therefore depends on the median m, over the images, of the highest correlation with a candidate. It is
    ``1 - (1 - m) / 10``, but at least 0.95 and at most 0.995: the distance of a copy to 1 is at most a tenth of that of
    the median pair.

    Time grows with the square of the number of images.

    Args:
        embedding: Embeddings ``(N, d)`` of the images of all parts, in their order.
        parts: The parts. All images have the same size.
    """
    digests = np.concatenate([part.digests for part in parts])
    _, first, equal = np.unique(digests, return_index=True, return_inverse=True)
    if len(first) == 1:
        return Copies(np.zeros(len(equal), dtype=np.int64), {0: 1.0} if len(equal) > 1 else {}, _HIGHEST)
    small = torch.cat([_small(block) for part in parts for block in part.pixels.split(_DECODED)])
    small = small[torch.from_numpy(first)]
    points = embedding[torch.from_numpy(first)]
    pairs = torch.cat([_candidates(points - points.mean(0)), _candidates(_coarse(small))], 1).flatten(0, 1)
    found = torch.cat([_correlation(small[block[:, 0]], small[block[:, 1]]) for block in pairs.split(_BLOCK)])
    best = found.reshape(len(first), -1).amax(1)
    limit = float(np.clip(1 - _SHARE * (1 - float(best.median())), _LOWEST, _HIGHEST))
    same = found >= limit
    numbers = _joined(pairs[same].numpy(), len(first))
    groups = numbers[equal.reshape(-1)]
    several, counts = np.unique(groups, return_counts=True)
    correlation = dict.fromkeys(several[counts > 1].tolist(), 1.0)
    for number, value in zip(numbers[pairs[same][:, 0].numpy()].tolist(), found[same].tolist(), strict=True):
        correlation[number] = min(correlation[number], value)
    return Copies(groups, correlation, limit)


def _candidates(points: Tensor) -> Tensor:
    """Return pairs of positions ``(N, K, 2)``: each of the points ``(N, d)`` with its K nearest by cosine."""
    count = min(_NEIGHBOURS, len(points) - 1)
    unit = unit_rows(points)
    pairs = []
    for rows in torch.arange(len(unit)).split(_BLOCK):
        similarity = unit[rows] @ unit.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        nearest = similarity.topk(count).indices
        pairs.append(torch.stack([rows[:, None].expand_as(nearest), nearest], 2))
    return torch.cat(pairs)


def _coarse(pixels: Tensor) -> Tensor:
    """Return grey versions of 8 pixels of uint8 images ``(N, 3, S, S)``, minus their mean, as ``(N, 64)``."""
    grey = torch.cat([_grey(block.float()) for block in pixels.split(_BLOCK)])
    coarse = F.interpolate(grey[:, None], (_COARSE, _COARSE), mode="area").flatten(1)
    return coarse - coarse.mean(1, keepdim=True)


def _grey(pixels: Tensor) -> Tensor:
    return luma(pixels, pixels.dtype)[:, 0]


def _small(pixels: Tensor) -> Tensor:
    """Average uint8 images ``(B, 3, S, S)`` down to at most 32 pixels, as uint8 to save memory."""
    if pixels.shape[-1] <= _SIDE:
        return pixels.cpu().contiguous()
    return F.interpolate(pixels.cpu().float(), (_SIDE, _SIDE), mode="area").round().to(torch.uint8)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return the highest correlation ``(B,)`` of uint8 images ``(B, 3, S, S)`` over small shifts; -1 for other colours.

    A flat image has no correlation. Its value is 1 if the pixels are equal up to noise, and 0 otherwise.
    """
    a, b = a.float(), b.float()
    grey_a, grey_b = _grey(a), _grey(b)
    best = torch.full((len(a),), -1.0)
    for down, right in _SHIFTS:
        best = best.maximum(_at_shift(grey_a, grey_b, down, right))
    flat = torch.minimum(grey_a.std((1, 2)), grey_b.std((1, 2))) < _FLAT
    best = torch.where(flat, ((a - b).abs().mean((1, 2, 3)) < _FLAT).float(), best)
    tint = ((a - grey_a[:, None]) - (b - grey_b[:, None])).mean((2, 3)).abs().amax(1)
    return torch.where(tint > _TINT, -1.0, best)


def _at_shift(a: Tensor, b: Tensor, down: int, right: int) -> Tensor:
    """Return the correlation ``(B,)`` of the overlap of images ``(B, S, S)`` when ``b`` is shifted."""
    side = a.shape[-1]
    a = a[:, max(0, down) : side + min(0, down), max(0, right) : side + min(0, right)].flatten(1)
    b = b[:, max(0, -down) : side - max(0, down), max(0, -right) : side - max(0, right)].flatten(1)
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))


def _joined(pairs: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Number the connected components of a graph ``(size,)`` with these edges ``(P, 2)``."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
    return np.asarray(connected_components(edges, directed=False)[1], dtype=np.int64)
