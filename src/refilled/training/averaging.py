"""An exponential moving average of a network's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    r"""An exponential moving average (EMA) of a network's parameters and of its floating-point buffers.

    After update :math:`t`, counted from 1, :math:`\bar w \leftarrow d_t \bar w + (1 - d_t) w` with
    :math:`d_t = \min(d, \frac{1 + t}{10 + t})`, so that the first weights do not linger in short runs (the rule of
    TensorFlow's ``ExponentialMovingAverage``). Integer buffers, which count, are copied.

    Args:
        network: The network; its present weights start the average.
        decay: d, at least 0 and below 1.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay, self.updates = network, decay, 0
        # In the memory layout of the weights, because the update reads both in the order of memory.
        self.values = {name: torch.empty_like(value).copy_(value) for name, value in network.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the network's present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in self.network.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the network the averaged weights while the context is open."""
        own = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.give()
        try:
            yield
        finally:
            self.network.load_state_dict(own)

    def give(self) -> None:
        """Copy the averaged weights to the network."""
        self.network.load_state_dict(self.values)

    def restore(self, values: Mapping[str, Tensor], updates: int) -> None:
        """Continue from an average that was saved after this many updates."""
        self.updates = updates
        for name, value in self.values.items():
            value.copy_(values[name])
