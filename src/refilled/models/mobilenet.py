"""MobileNet (Howard et al., 2017): depthwise-separable convolutions with a width multiplier."""

from itertools import pairwise

from torch import Tensor, nn

from refilled.errors import ModelError
from refilled.models.backbone import Backbone, global_average_pool
from refilled.models.mixed_convolution import MixedConv2d

STAGES = ((64, 1), (128, 2), (256, 2), (512, 6), (1024, 2))
"""Output channels at width 1 and number of blocks of each stage: 13 blocks in all (Table 1 of the paper)."""


class MobileNet(Backbone):
    """MobileNet (version 1) with ``width`` times its channels, rounded to multiples of 8.

    The total stride depends on the image size. It is 32, as published, for 64 pixels and more. Below, it is 8: the
    first two strides are left out, so that 32 pixels end in a 4×4 map. The feature maps are the outputs of the five
    stages.

    The initial weights are PyTorch's defaults. With those of He et al. training starts more slowly: on 100 bird species
    at 84 pixels, width 0.25 reached 16 % accuracy in 20 epochs with them and 20 % with the defaults (one seed,
    float32).

    Args:
        width: Multiplier of all channels, above 0 and at most 4; the paper uses 1, 0.75, 0.5 and 0.25.
        num_classes: Number of classes.
        image_size: Side length of the input images in pixels.

    Raises:
        ModelError: The width is out of range.
    """

    def __init__(self, width: float, num_classes: int, image_size: int = 224) -> None:
        if not 0 < width <= 4:
            raise ModelError(f"mobilenet_{width:g}: the width must be above 0 and at most 4, such as 0.5")
        channels = [max(8, 8 * round(width * out / 8)) for out, _ in STAGES]
        super().__init__(channels[-1], channels, num_classes)
        stem = max(8, 8 * round(width * 32 / 8))
        stem_stride, *strides = (2, 1, 2, 2, 2, 2) if image_size >= 64 else (1, 1, 1, 2, 2, 2)
        self.stem = _bn_relu(nn.Conv2d(3, stem, 3, stem_stride, 1, bias=False))
        self.stages = nn.ModuleList(
            _stage(inputs, outputs, blocks, stride)
            for (inputs, outputs), (_, blocks), stride in zip(pairwise([stem, *channels]), STAGES, strides, strict=True)
        )

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map normalised images to ``(N, 1024 * width)`` and the outputs of the five stages."""
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return global_average_pool(maps[-1]), tuple(maps[1:])


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = _separable(in_channels, out_channels, stride)
    return nn.Sequential(first, *(_separable(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def _separable(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    depthwise = MixedConv2d(in_channels, in_channels, 3, stride, 1, groups=in_channels, bias=False)
    pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(_bn_relu(depthwise), _bn_relu(pointwise))


def _bn_relu(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True))
