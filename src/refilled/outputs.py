"""The outputs of a model for a batch of images."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Outputs(NamedTuple):
    """The outputs of any model for N images.

    This is a named tuple, because Lightning Fabric maps over the outputs of a forward pass and supports tuples.
    """

    logits: Tensor
    """Class scores ``(N, C)``."""

    embedding: Tensor
    """The penultimate, pooled representation ``(N, d)``, not normalised."""

    features: tuple[Tensor, ...] = ()
    """Feature maps ``(N, C_l, H_l, W_l)``, shallow to deep; empty unless requested."""


def not_computed(count: int, like: Tensor | None = None) -> Tensor:
    """Return the placeholder ``(count, 0)`` for logits or an embedding that no one reads.

    Args:
        count: Number of images.
        like: The placeholder has the dtype and the device of this tensor. None: float32 on the CPU.
    """
    return torch.empty(count, 0) if like is None else like.new_empty(count, 0)


class ModelShape(Protocol):
    """The properties of a model from which a method builds its losses."""

    embedding_dim: int
    feature_channels: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...] | None
