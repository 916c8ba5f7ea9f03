"""The interface of a meta-learner: a loss over whole tasks."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.models import Backbone


class MetaTask(NamedTuple):
    """The images of T tasks, which all share the same labels."""

    support: Tensor
    """uint8 ``(T, S, 3, H, W)``."""

    labels: Tensor
    """``(S,)``, 0 .. N - 1."""

    query: Tensor
    """uint8 ``(T, Q, 3, H, W)``."""

    query_labels: Tensor
    """``(Q,)``."""


class MetaLearner(nn.Module):
    """A backbone and any other weights that are learned from many tasks.

    Subclasses define :meth:`scores`. They also define :meth:`loss` where it is not the cross-entropy of the scores.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def scores(self, task: MetaTask) -> Tensor:
        """Return the scores ``(T, Q, N)`` of the query images."""
        raise NotImplementedError

    def loss(self, task: MetaTask) -> tuple[Tensor, Tensor]:
        """Return the scalar loss to minimise, and the scores ``(T, Q, N)`` of the query images."""
        scores = self.scores(task)
        return query_loss(scores, task.query_labels), scores

    def embed(self, task: MetaTask) -> tuple[Tensor, Tensor]:
        """Embed support and query images in one pass; return ``(T, S, d)`` and ``(T, Q, d)``."""
        images = torch.cat([task.support, task.query], 1)
        embedding = self.backbone(images.flatten(0, 1)).embedding.unflatten(0, images.shape[:2])
        support, query = embedding.split([task.support.shape[1], task.query.shape[1]], 1)
        return support, query

    def head(self) -> dict[str, Tensor]:
        """Return all weights except the backbone's, by name."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}


def query_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of scores ``(T, Q, N)`` of T tasks that share the labels ``(Q,)``."""
    return F.cross_entropy(scores.flatten(0, 1), labels.repeat(len(scores)))
