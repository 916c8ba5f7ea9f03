"""The size and the speed of the network of a run."""

from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from refilled.models import Backbone, multiplications_of
from refilled.runs.environment import device_name
from refilled.words import count_of

BATCHES = (1, 32)
"""Images at a time."""

_SECONDS = 0.3  # per batch size, after the first pass
_PASSES = 20  # at most
_SLOW = 2.0  # seconds; a pass that takes longer is not repeated


@dataclass(frozen=True)
class Speed:
    """The cost of a forward pass.

    Attributes:
        parameters: Their number, with those of the classifier.
        multiplications: Multiply-accumulate operations for one image; None if they cannot be counted.
        milliseconds: Time per image by the number of images at a time, in float32: the median of several passes.
            Empty if it was not measured.
        image_size: Side length of the images in pixels.
        device: Name of the processor or accelerator.
        threads: Threads of the computation; 0 on an accelerator.
    """

    parameters: int
    multiplications: int | None
    milliseconds: dict[int, float]
    image_size: int
    device: str
    threads: int

    def rows(self) -> list[list[str]]:
        """Return the rows of a table."""
        count = "unknown" if self.multiplications is None else f"{self.multiplications / 1e6:,.1f} million"
        threads = "" if not self.threads else f", {count_of(self.threads, 'thread')}"
        where = f"{self.device}{threads}, float32"
        return [
            ["measure", "value"],
            ["image size", f"{self.image_size} × {self.image_size} pixels"],
            ["parameters", f"{self.parameters:,}"],
            ["multiply-accumulates per image", count],
            *(
                [f"time per image, batch of {batch}", f"{value:.3g} ms ({where})"]
                for batch, value in self.milliseconds.items()
            ),
            *([] if self.milliseconds else [["time per image", "not measured, since other runs were under way"]]),
        ]


def speed_of(network: Backbone, image_size: int, timed: bool = True) -> Speed:
    """Count and time a network on noise, on its present device, for about a second, or three passes of a slow one.

    Its weights, its mode and the random numbers do not change.

    Args:
        network: The network.
        image_size: Side length of the images in pixels; a network may resize them.
        timed: Whether the network is timed.
    """
    device, training = network.mean.device, network.training
    network.eval()
    try:
        noise = torch.randint(
            256,
            (max(BATCHES), image_size, image_size, 3),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(0),
        )
        images = noise.permute(0, 3, 1, 2).to(device)  # channels-last, as tasks hold them
        multiplications = multiplications_of(network, images[:1])
        batches = BATCHES if timed else ()
        milliseconds = {batch: 1000 * _seconds(network, images[:batch]) / batch for batch in batches}
    finally:
        network.train(training)
    return Speed(
        sum(parameter.numel() for parameter in network.parameters()),
        multiplications,
        milliseconds,
        image_size,
        device_name(device),
        torch.get_num_threads() if device.type == "cpu" else 0,
    )


def _seconds(network: Backbone, images: torch.Tensor) -> float:
    """Return the median time of a pass; the first pass, which sets up the kernels, counts only if it is slow."""
    taken = [_pass(network, images)]
    if taken[0] > _SLOW:
        return taken[0]
    taken = []
    while not taken or (sum(taken) < _SECONDS and len(taken) < _PASSES):
        taken.append(_pass(network, images))
    return median(taken)


@torch.no_grad()
def _pass(network: Backbone, images: torch.Tensor) -> float:
    start = perf_counter()
    network(images).logits.cpu()  # waits for an accelerator
    return perf_counter() - start
