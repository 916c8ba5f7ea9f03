"""Strided convolutions that train fast and correctly on CPUs in mixed precision."""

import torch
from torch import Tensor, nn


class StridedConv2d(nn.Conv2d):
    """A convolution with a stride that computes in float32 where bfloat16 would be slow or wrong.

    The backward pass in bfloat16 on CPUs has two faults. For a depthwise convolution it takes about 20 times as long as
    in float32; a training step of MobileNet at 84 pixels, which has four of them, takes 1.6 times as long. If the image
    is narrower than the stride, the gradients of weights that see only padding are uninitialised memory (torch 2.14 and
    2.15). Without gradients, as in a teacher, this class computes in bfloat16 like any convolution.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C, H / stride, W / stride)``."""
        suits = self.groups < self.in_channels and min(x.shape[2:]) >= max(self.stride)
        mixed = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
        if suits or not mixed or self.stride == (1, 1):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def mend_strided(model: nn.Module) -> None:
    """Convert every plain strided convolution of a model to a :class:`StridedConv2d` with the same weights."""
    for module in model.modules():
        if type(module) is nn.Conv2d and module.stride != (1, 1):
            module.__class__ = StridedConv2d
