"""The number of multiplications that a network needs for an image."""

from contextlib import suppress

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from refilled.models.backbone import Backbone


def multiplications_of(network: Backbone, images: Tensor) -> int | None:
    """Count the multiply-accumulates of convolutions, linear layers and attention for one image.

    Args:
        network: The network, in evaluation mode, on the device of the images.
        images: One image ``(1, 3, S, S)``.

    Returns:
        The number; None for a network that PyTorch's counter does not see into, such as a compiled program.
    """
    with torch.no_grad(), suppress(Exception), FlopCounterMode(display=False) as counter:
        network(images)
        return int(counter.get_total_flops()) // 2
    return None
