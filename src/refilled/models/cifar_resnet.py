"""Residual networks for small images (He et al., CVPR 2016, section 4.2)."""

import torch.nn.functional as F
from torch import Tensor, nn

from refilled.errors import ModelError
from refilled.models.backbone import Backbone, global_average_pool, initialize_convolutions

DEPTHS = (8, 14, 20, 32, 44, 56, 110)
"""The depths 6n + 2 in use. The list is closed, so that ImageNet's ResNet-50 is not confused with one of these."""


class CifarResNet(Backbone):
    """ResNet-depth for CIFAR: three stages of basic blocks with 16, 32 and 64 channels, total stride 4.

    If the shape changes, the shortcut is a 1×1 convolution with batch norm, as in the distillation literature, and
    not the zero padding ("option A") of the original paper. The feature maps are the outputs of the three stages, after
    ReLU.

    Raises:
        ModelError: The depth is not in :data:`DEPTHS`.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        if depth not in DEPTHS:
            known = ", ".join(map(str, DEPTHS))
            raise ModelError(f"resnet{depth}: the CIFAR ResNets are {known}; ImageNet's are timm/resnet{depth}")
        blocks = (depth - 2) // 6
        super().__init__(64, (16, 32, 64), num_classes)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        initialize_convolutions(self)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map normalised images to ``(N, 64)`` and the outputs of the three stages."""
        first = self.layer1(F.relu(self.bn1(self.conv1(images)), inplace=True))
        second = self.layer2(first)
        third = self.layer3(second)
        return global_average_pool(third), (first, second, third)


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


class BasicBlock(nn.Module):
    """3×3, BN, ReLU, 3×3, BN, added to the input (or its projection if the shape changes), then ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        shortcut: Tensor = x if self.downsample is None else self.downsample(x)
        return F.relu(shortcut + residual, inplace=True)
