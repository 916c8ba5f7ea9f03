"""ConvNet-4, the small network of few-shot learning (Vinyals et al., NeurIPS 2016)."""

from typing import Literal

from torch import Tensor, nn

from refilled.errors import ModelError
from refilled.models.backbone import Backbone, global_average_pool

CHANNELS = 64
BLOCKS = 4
SMALLEST_IMAGE = 2**BLOCKS  # each block halves the side length

Pool = Literal["max", "average"]


class ConvNet4(Backbone):
    """Four blocks of 3×3 convolution, batch norm, ReLU and 2×2 max pooling, 64 channels each; then a global pool.

    The ReFilled paper uses the global maximum (supplement 2.3); others use the average or no pool. The feature maps are
    the outputs of the four blocks. The initial weights are PyTorch's defaults.

    Args:
        num_classes: Number of classes.
        pool: The global pool, ``"max"`` or ``"average"``.
        image_size: Side length of the input images in pixels.

    Raises:
        ModelError: The images are too small to be halved four times.
    """

    def __init__(self, num_classes: int, pool: Pool = "max", image_size: int = 84) -> None:
        if image_size < SMALLEST_IMAGE:
            raise ModelError(
                f"convnet4 halves the images {BLOCKS} times, so they need {SMALLEST_IMAGE} pixels or more, not "
                f"{image_size}; choose a larger image size"
            )
        super().__init__(CHANNELS, (CHANNELS,) * BLOCKS, num_classes)
        self.pool: Pool = pool
        inputs = (3, *[CHANNELS] * (BLOCKS - 1))
        self.blocks = nn.ModuleList(conv_block(channels, CHANNELS) for channels in inputs)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map normalised images to ``(N, 64)`` and the outputs of the four blocks."""
        maps = [images]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return global_pool(maps[-1], self.pool), tuple(maps[1:])


def conv_block(in_channels: int, out_channels: int, groups: int = 1) -> nn.Sequential:
    """Return convolution, batch norm, max pooling and ReLU, as ``groups`` independent blocks in parallel.

    ReLU after pooling gives the same result as before it, with a quarter of the values.
    """
    return nn.Sequential(
        nn.Conv2d(groups * in_channels, groups * out_channels, 3, padding=1, groups=groups),
        nn.BatchNorm2d(groups * out_channels),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),
    )


def global_pool(maps: Tensor, pool: Pool) -> Tensor:
    """Pool ``(N, C, H, W)`` over its pixels to ``(N, C)``."""
    return maps.amax((2, 3)) if pool == "max" else global_average_pool(maps)
