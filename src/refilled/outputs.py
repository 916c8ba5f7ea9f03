"""What a model says about a batch of images."""

from typing import NamedTuple, Protocol

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


class ModelShape(Protocol):
    """What a method may ask about a model in order to build its losses."""

    embedding_dim: int
    feature_channels: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...] | None
