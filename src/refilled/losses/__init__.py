"""All losses of all methods, by name. They need only torch, and each is imported when it is first accessed.

A loss is a :class:`torch.nn.Module` that is called as ``loss(student_tensor, teacher_tensor, labels)`` and returns a
scalar. Its formula is a function in the same file.

>>> import torch
>>> from refilled.losses import RKDDistanceLoss
>>> value = RKDDistanceLoss()(torch.randn(32, 64), torch.randn(32, 128), torch.arange(32) % 8)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refilled.losses.imbalance import BalancedCrossEntropyLoss
    from refilled.losses.local_kd import LocalKDLoss, LogitKDLoss
    from refilled.losses.triplet_alignment import TripletAlignmentLoss
    from refilled.losses.trust import Trusted, label_information
    from refilled.methods.at import AttentionLoss
    from refilled.methods.crd import ContrastiveLoss
    from refilled.methods.dkd import DKDLoss
    from refilled.methods.feature_mse import FeatureMSELoss
    from refilled.methods.fitnet import HintLoss
    from refilled.methods.kd import KDLoss
    from refilled.methods.nst import NeuronSelectivityLoss
    from refilled.methods.regression import EmbeddingRegressionLoss
    from refilled.methods.rkd import RKDAngleLoss, RKDDistanceLoss
    from refilled.methods.self_training import PseudoLabelLoss
    from refilled.methods.sp import SimilarityPreservingLoss
    from refilled.methods.vid import VariationalLoss

# The module of each loss. The loss of a baseline is in the file of its method.
_HOMES = {
    "AttentionLoss": "refilled.methods.at",
    "BalancedCrossEntropyLoss": "refilled.losses.imbalance",
    "ContrastiveLoss": "refilled.methods.crd",
    "DKDLoss": "refilled.methods.dkd",
    "EmbeddingRegressionLoss": "refilled.methods.regression",
    "FeatureMSELoss": "refilled.methods.feature_mse",
    "HintLoss": "refilled.methods.fitnet",
    "KDLoss": "refilled.methods.kd",
    "LocalKDLoss": "refilled.losses.local_kd",
    "LogitKDLoss": "refilled.losses.local_kd",
    "NeuronSelectivityLoss": "refilled.methods.nst",
    "PseudoLabelLoss": "refilled.methods.self_training",
    "RKDAngleLoss": "refilled.methods.rkd",
    "RKDDistanceLoss": "refilled.methods.rkd",
    "SimilarityPreservingLoss": "refilled.methods.sp",
    "TripletAlignmentLoss": "refilled.losses.triplet_alignment",
    "Trusted": "refilled.losses.trust",
    "VariationalLoss": "refilled.methods.vid",
    "label_information": "refilled.losses.trust",
}

__all__ = [
    "AttentionLoss",
    "BalancedCrossEntropyLoss",
    "ContrastiveLoss",
    "DKDLoss",
    "EmbeddingRegressionLoss",
    "FeatureMSELoss",
    "HintLoss",
    "KDLoss",
    "LocalKDLoss",
    "LogitKDLoss",
    "NeuronSelectivityLoss",
    "PseudoLabelLoss",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "SimilarityPreservingLoss",
    "TripletAlignmentLoss",
    "Trusted",
    "VariationalLoss",
    "label_information",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'refilled.losses' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
