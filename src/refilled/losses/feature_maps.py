"""Pairing of feature maps: each map of the student learns from one map of the teacher.

Maps are paired from the deep end, the last with the last and so on, until one network has no more. Nearly all networks
for one image size end at the same stride, so paired maps usually have the same size. The maps left unpaired are
shallow ones, which carry the least information about classes. Where sizes differ, for example between strides 4 and 8,
the larger map is averaged down to the smaller.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from refilled.errors import MethodError
from refilled.losses.distances import at_least_float32
from refilled.outputs import ModelShape


def check_feature_maps(student: ModelShape, teacher: ModelShape) -> None:
    """Refuse models whose feature maps cannot be compared.

    Raises:
        MethodError: One of the two has no feature maps.
    """
    for role, model in (("student", student), ("teacher", teacher)):
        if not model.feature_channels:
            raise MethodError(
                f"the method compares feature maps, but the {role} has none: models from a Python file, and a few of "
                "timm, return only their embedding; use refilled, rkd or regression, which read only the embedding"
            )


def paired_channels(student: ModelShape, teacher: ModelShape) -> list[tuple[int, int]]:
    """Return the channels (C_S, C_T) of each pair of maps, shallow to deep.

    Raises:
        MethodError: One of the two has no feature maps.
    """
    check_feature_maps(student, teacher)
    return list(zip(reversed(student.feature_channels), reversed(teacher.feature_channels), strict=False))[::-1]


def paired_maps(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs of maps, ``(N, C_S, H, W)`` and ``(N, C_T, H, W)``, shallow to deep.

    The maps are in float32 or better. No gradient flows to the teacher's maps.
    """
    pairs = zip(reversed(student), reversed(teacher), strict=False)
    return [same_size(seen, taught.detach()) for seen, taught in pairs][::-1]


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average the larger of two maps ``(N, C, H, W)`` down to the size of the smaller, in float32 or better."""
    height, width = (min(sides) for sides in zip(a.shape[-2:], b.shape[-2:], strict=True))
    return _shrink(at_least_float32(a), height, width), _shrink(at_least_float32(b), height, width)


def _shrink(maps: Tensor, height: int, width: int) -> Tensor:
    if maps.shape[-2:] == (height, width):
        return maps  # pooling would copy them, and its backward pass is slow
    return F.adaptive_avg_pool2d(maps, (height, width))
