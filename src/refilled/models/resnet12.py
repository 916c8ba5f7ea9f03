"""ResNet-12, the larger network of few-shot learning (Oreshkin et al., NeurIPS 2018; Lee et al., CVPR 2019)."""

import torch.nn.functional as F
from torch import Tensor, nn

from refilled.errors import ModelError
from refilled.models.backbone import Backbone, global_average_pool, initialize_convolutions

CHANNELS = (64, 160, 320, 640)
SMALLEST_IMAGE = 2 ** len(CHANNELS)
_SLOPE = 0.1  # of the leaky ReLU


class ResNet12(Backbone):
    """Four residual blocks of three 3×3 convolutions with 64, 160, 320 and 640 channels, each halving the image.

    There is no dropout, which some implementations add. The feature maps are the outputs of the four blocks.

    Args:
        num_classes: Number of classes.
        image_size: Side length of the input images in pixels.
        width: Factor of the channels.

    Raises:
        ModelError: The images are too small to be halved four times, or a block has no channel at this width.
    """

    def __init__(self, num_classes: int, image_size: int = 84, width: float = 1.0) -> None:
        if image_size < SMALLEST_IMAGE:
            raise ModelError(
                f"resnet12 halves the images {len(CHANNELS)} times, so they need {SMALLEST_IMAGE} pixels or more, not "
                f"{image_size}; choose a larger image size"
            )
        channels = tuple(round(number * width) for number in CHANNELS)
        if channels[0] < 1:
            raise ModelError(f"resnet12 has no channels left at width {width}; give {1 / CHANNELS[0]} or more")
        super().__init__(channels[-1], channels, num_classes)
        inputs = (3, *channels[:-1])
        self.blocks = nn.ModuleList(TripleBlock(i, o) for i, o in zip(inputs, channels, strict=True))
        initialize_convolutions(self)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map normalised images to ``(N, 640 width)`` and the outputs of the four blocks."""
        maps = [images]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return global_average_pool(maps[-1]), tuple(maps[1:])


class TripleBlock(nn.Module):
    """Three 3×3 convolutions with BN, leaky ReLU between, added to a 1×1 projection; leaky ReLU and max pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(in_channels, out_channels, 3)
        self.conv2, self.bn2 = _conv_bn(out_channels, out_channels, 3)
        self.conv3, self.bn3 = _conv_bn(out_channels, out_channels, 3)
        self.shortcut = nn.Sequential(*_conv_bn(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C_in, H, W)`` to ``(N, C_out, H / 2, W / 2)``."""
        residual = F.leaky_relu(self.bn1(self.conv1(x)), _SLOPE, inplace=True)
        residual = F.leaky_relu(self.bn2(self.conv2(residual)), _SLOPE, inplace=True)
        residual = self.bn3(self.conv3(residual))
        return F.max_pool2d(F.leaky_relu(residual + self.shortcut(x), _SLOPE, inplace=True), 2)


def _conv_bn(in_channels: int, out_channels: int, kernel: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(out_channels)
