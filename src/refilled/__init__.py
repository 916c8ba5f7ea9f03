"""refilled: distil a strong vision model trained on other classes into a small model for your own.

The losses need only torch:

>>> import torch
>>> from refilled import TripletAlignmentLoss
>>> loss = TripletAlignmentLoss(temperature=2.0)
>>> value = loss(torch.randn(32, 64), torch.randn(32, 128), torch.arange(32) % 8)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refilled.config import Run
    from refilled.errors import RefilledError
    from refilled.export.loaded import load
    from refilled.losses.distances import class_centers
    from refilled.losses.local_kd import LocalKDLoss
    from refilled.losses.mining import Triplets, semi_hard_triplets
    from refilled.losses.triplet_alignment import TripletAlignmentLoss
    from refilled.outputs import Outputs

# The module of each public name. It is imported on first access, so that the command line starts without torch.
_HOMES = {
    "LocalKDLoss": "refilled.losses.local_kd",
    "Outputs": "refilled.outputs",
    "RefilledError": "refilled.errors",
    "Run": "refilled.config",
    "TripletAlignmentLoss": "refilled.losses.triplet_alignment",
    "Triplets": "refilled.losses.mining",
    "class_centers": "refilled.losses.distances",
    "load": "refilled.export.loaded",
    "semi_hard_triplets": "refilled.losses.mining",
}

__all__ = [
    "LocalKDLoss",
    "Outputs",
    "RefilledError",
    "Run",
    "TripletAlignmentLoss",
    "Triplets",
    "class_centers",
    "load",
    "semi_hard_triplets",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'refilled' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
