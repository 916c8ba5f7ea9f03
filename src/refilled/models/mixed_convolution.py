"""Convolutions that train fast and correctly on CPUs in mixed precision, each in the format that suits it."""

import torch
from torch import Tensor, nn


class MixedConv2d(nn.Conv2d):
    """A convolution that trains in float32 on CPUs where bfloat16 would be slow or wrong.

    The backward pass in bfloat16 on CPUs has two faults. For a depthwise convolution it takes several times as long as
    in float32, and with a stride about 20 times as long. If the image is narrower than the stride, the gradients of
    weights that see only padding are uninitialised memory (torch 2.14 and 2.15). All other convolutions, and all of
    them without gradients, as in a teacher, compute in the format of autocast. ``benchmarks/precision.py`` measures
    the difference.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, D, H', W')``, in bfloat16 under autocast to it."""
        mixed = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
        if not mixed or not (self._is_depthwise or self._overlooks(x)):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.to(self.weight.dtype)).to(torch.get_autocast_dtype("cpu"))

    @property
    def _is_depthwise(self) -> bool:
        return 1 < self.groups == self.in_channels

    def _overlooks(self, x: Tensor) -> bool:
        return self.stride != (1, 1) and min(x.shape[2:]) < max(self.stride)


def mix_convolutions(model: nn.Module) -> None:
    """Let every convolution of a model compute as :class:`MixedConv2d` does, with the same weights and names.

    Subclasses of ``torch.nn.Conv2d``, such as timm's with TensorFlow's padding, keep their own forward.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, MixedConv2d):
            kind = type(module)
            if kind not in _MIXED:
                _MIXED[kind] = type(f"Mixed{kind.__name__}", (MixedConv2d, kind), {})
            module.__class__ = _MIXED[kind]


_MIXED: dict[type[nn.Conv2d], type[nn.Conv2d]] = {nn.Conv2d: MixedConv2d}
