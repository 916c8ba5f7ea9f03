"""Wide residual networks for small images (Zagoruyko and Komodakis, BMVC 2016)."""

import torch.nn.functional as F
from torch import Tensor, nn

from refilled.errors import ModelError
from refilled.models.backbone import Backbone, global_average_pool, initialize_convolutions


class WideResNet(Backbone):
    """WRN-depth-width: three stages of pre-activation blocks with 16, 32 and 64 times ``width`` channels.

    As the distillation literature uses it: depth = 6n + 4, no dropout, total stride 4, and the convolution of a
    shortcut reads the activated input. The feature maps are the ends of the three stages; the deepest is
    taken before the last batch norm and ReLU, as in AT, VID and later methods.

    Raises:
        ModelError: The depth is not 6n + 4.
    """

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1 or width < 1:
            raise ModelError(f"wrn_{depth}_{width}: depth must be 6n + 4 (10, 16, 22, 28, 40), width 1 or more")
        channels = (16 * width, 32 * width, 64 * width)
        super().__init__(channels[-1], channels, num_classes)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = _stage(16, channels[0], blocks, stride=1)
        self.block2 = _stage(channels[0], channels[1], blocks, stride=2)
        self.block3 = _stage(channels[1], channels[2], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(channels[2])
        initialize_convolutions(self)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map normalised images to ``(N, 64 * width)`` and the ends of the three stages."""
        first = self.block1(self.conv1(images))
        second = self.block2(first)
        third = self.block3(second)
        return global_average_pool(F.relu(self.bn1(third), inplace=True)), (first, second, third)


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreActivationBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(PreActivationBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


class PreActivationBlock(nn.Module):
    """BN, ReLU, 3×3, BN, ReLU, 3×3, added to the input, or to its 1×1 projection if the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        activated = F.relu(self.bn1(x), inplace=True)
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(activated)
        return shortcut + residual
