r"""Prototypical networks: classify by the nearest class mean, in an embedding trained for that.

.. math:: f(x)_c = -\|\phi(x) - p_c\|^2 / \tau, \qquad p_c = \frac{1}{K} \sum_{y_i = c} \phi(x_i)

References:
    Snell, Swersky and Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017.
"""

from functools import partial

import torch
from torch import Tensor

from refilled.fewshot.bank import Bank, Learner, on_embeddings, one_hot
from refilled.fewshot.meta_learner import MetaLearner, MetaTask
from refilled.models import Backbone


def prototypes(support: Tensor, labels: Tensor) -> Tensor:
    """Return the mean embedding ``(T, N, d)`` of each class, given ``(T, S, d)`` and labels ``(S,)``."""
    member = one_hot(labels, support)  # (S, N)
    return (member / member.sum(0)).T @ support


def nearness(query: Tensor, centers: Tensor, temperature: float = 1.0) -> Tensor:
    """Return negative squared distances ``(T, Q, N)`` between ``(T, Q, d)`` and ``(T, N, d)``, over the temperature."""
    middle = centers.mean(1, keepdim=True)  # centring reduces cancellation between classes
    centers = centers - middle
    to_middle = torch.linalg.vector_norm(query, dim=2, keepdim=True).square() - 2 * query @ middle.mT
    to_middle += middle.square().sum(2, keepdim=True)
    cross = query @ centers.mT - middle @ centers.mT
    squared: Tensor = centers.square().sum(2)[:, None] - 2 * cross + to_middle
    return -squared / temperature


def prototype_scores(support: Tensor, labels: Tensor, query: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the :func:`nearness` ``(T, Q, N)`` of query ``(T, Q, d)`` to the prototypes of support ``(T, S, d)``."""
    return nearness(query, prototypes(support, labels), temperature)


class ProtoNet(MetaLearner):
    """An embedding trained by the cross-entropy of the nearness to prototypes."""

    def __init__(self, backbone: Backbone, temperature: float) -> None:
        super().__init__(backbone)
        self.temperature = temperature

    def scores(self, task: MetaTask) -> Tensor:
        """Return the scores ``(T, Q, N)`` of the query images."""
        support, query = self.embed(task)
        return prototype_scores(support, task.labels, query, self.temperature)


def meta_learner(backbone: Backbone, *, temperature: float = 64.0) -> ProtoNet:
    """Train the embedding for the nearest class mean (Snell et al., NeurIPS 2017)."""
    return ProtoNet(backbone, temperature)


def protonet(bank: Bank, *, temperature: float = 64.0) -> Learner:
    """Nearest class mean, in a model that is preferably meta-trained for it (ProtoNet)."""
    return on_embeddings(bank, partial(prototype_scores, temperature=temperature))
