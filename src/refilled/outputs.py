"""What a model says about a batch of images."""

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """What any model says about N images.

    A named tuple and not a dataclass: Lightning Fabric maps over the outputs of a forward pass, and it
    knows tuples.
    """

    logits: Tensor
    """Class scores ``(N, C)``."""

    embedding: Tensor
    """The penultimate, pooled representation ``(N, d)``, not normalised."""

    features: tuple[Tensor, ...] = ()
    """Feature maps ``(N, C_l, H_l, W_l)``, shallow to deep; empty unless they were asked for."""
