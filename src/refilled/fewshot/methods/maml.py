r"""MAML: initial weights that adapt to a task in a few steps of gradient descent on its support images.

.. math:: \theta_t' = \theta - \alpha \nabla_\theta \ell_t^{\mathrm{support}}(\theta), \qquad
          \min_\theta \sum_t \ell_t^{\mathrm{query}}(\theta_t')

References:
    Finn, Abbeel and Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from refilled.data import Episodes
from refilled.errors import MethodError
from refilled.fewshot.bank import Bank, Learner
from refilled.fewshot.meta_learner import MetaLearner, MetaTask
from refilled.models import Backbone

Weights = dict[str, Tensor]


def adapt(
    loss: Callable[[Weights], Tensor], weights: Weights, *, steps: int, lr: float, first_order: bool = False
) -> Weights:
    """Take ``steps`` differentiable steps of gradient descent on the loss.

    Args:
        loss: Maps weights by name to a scalar.
        weights: Initial weights by name.
        steps: Number of steps.
        lr: Step size.
        first_order: Treat the gradients as constants when differentiating (Finn et al., section 5.2).
    """
    for _ in range(steps):
        gradients = grad(loss)(weights)
        if first_order:
            gradients = {name: gradient.detach() for name, gradient in gradients.items()}
        weights = {name: value - lr * gradients[name] for name, value in weights.items()}
    return weights


def each_task(one: Callable[[Tensor, Tensor], Tensor], support: Tensor, query: Tensor, *, together: bool) -> Tensor:
    """Map ``one`` over the tasks, the first dimension of both, with :func:`torch.func.vmap` if ``together`` is set.

    On a CPU a loop takes half the time, since grouped convolutions are slow there. On 32 pixels a training step of
    ConvNet-4 took 223 ms per task instead of 490 (8 tasks, second order, one thread).
    """
    if together:
        mapped: Tensor = vmap(one, randomness="different")(support, query)
        return mapped
    return torch.stack([one(images, asked) for images, asked in zip(support, query, strict=True)])


class BatchStatisticsNorm(nn.BatchNorm2d):
    """Twice-differentiable batch norm that uses only the statistics of the current batch.

    Scale and shift are applied outside the normalisation. Inside, second derivatives under :func:`torch.func.vmap` are
    silently wrong (torch 2.15; pytorch/functorch issue 534).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to the same shape."""
        normalized = F.batch_norm(x, None, None, training=True, eps=self.eps)
        return normalized * self.weight[:, None, None] + self.bias[:, None, None]


def on_batch_statistics(model: nn.Module) -> nn.Module:
    """Replace every batch norm of a model by a :class:`BatchStatisticsNorm` with the same weights; return the model."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchStatisticsNorm
    return model


class Maml(MetaLearner):
    """A backbone whose classifier has one output per class of a task.

    Batch norm always uses the statistics of the current batch, support or query, as in the authors' code; running
    statistics do not describe an adapted model. The query images of a task are therefore classified together.

    Args:
        backbone: The backbone. Its running statistics are not changed.
        steps: Number of inner steps.
        lr: Size of inner steps.
        first_order: Whether to omit second derivatives.
    """

    def __init__(self, backbone: Backbone, steps: int, lr: float, first_order: bool) -> None:
        super().__init__(backbone)
        self.steps, self.lr, self.first_order = steps, lr, first_order
        # A tuple hides it from torch, so that its parameters do not count as the learner's.
        self._body = (_OnNormalized(on_batch_statistics(deepcopy(backbone))),)

    def scores(self, task: MetaTask) -> Tensor:
        """Return the scores ``(T, Q, N)`` of the query images, with weights adapted to each task."""
        weights: Weights = dict(self.backbone.named_parameters())

        def one(support: Tensor, query: Tensor) -> Tensor:
            def loss(adapted: Weights) -> Tensor:
                return F.cross_entropy(self._logits(adapted, support), task.labels)

            adapted = adapt(loss, weights, steps=self.steps, lr=self.lr, first_order=self.first_order)
            return self._logits(adapted, query)

        # Normalise here, since the backbone's in-place operations on bytes cannot be mapped by vmap.
        support, query = (
            self.backbone.normalize(images.flatten(0, 1)).unflatten(0, images.shape[:2])
            for images in (task.support, task.query)
        )
        return each_task(one, support, query, together=support.device.type != "cpu")

    def _logits(self, weights: Weights, images: Tensor) -> Tensor:
        named = {f"body.{name}": value for name, value in weights.items()}
        logits: Tensor = functional_call(self._body[0], named, (images,))
        return logits


class _OnNormalized(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = cast(Backbone, body)

    def forward(self, images: Tensor) -> Tensor:
        embedding, _ = self.body.embed(images)
        logits: Tensor = self.body.classifier(embedding)
        return logits


def meta_learner(backbone: Backbone, *, steps: int = 5, lr: float = 0.01, first_order: bool = False) -> Maml:
    """Train weights for fast adaptation, through the second derivatives by default (Finn et al., ICML 2017)."""
    return Maml(backbone, steps, lr, first_order)


def maml(bank: Bank, *, steps: int = 10, lr: float = 0.01) -> Learner:
    """A few steps of gradient descent on the support images of each task, from meta-trained weights (MAML)."""
    model = bank.model
    learner = Maml(model, steps, lr, first_order=True)

    def scores(episodes: Episodes) -> Tensor:
        classes = int(episodes.labels.max()) + 1
        if model.num_classes != classes:
            raise MethodError(
                f"maml needs a model with as many classes as a task, {classes}, but the model was trained for "
                f"{model.num_classes}; train it with --n-way {classes}"
            )
        support, query = (bank.images(rows).to(bank.device) for rows in (episodes.support, episodes.query))
        with torch.no_grad():
            task = MetaTask(support, episodes.labels.to(bank.device), query, episodes.query_labels)
            return learner.scores(task).cpu()

    return scores
