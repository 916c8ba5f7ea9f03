r"""FEAT: self-attention adapts the prototypes of a task to each other; the nearest adapted prototype wins.

References:
    Ye, Hu, Zhan and Sha, Few-Shot Learning via Embedding Adaptation with Set-to-Set Functions, CVPR 2020.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.errors import MethodError
from refilled.fewshot.bank import Bank, Learner, on_embeddings
from refilled.fewshot.meta_learner import MetaLearner, MetaTask, query_loss
from refilled.fewshot.methods.protonet import nearness, prototypes
from refilled.models import Backbone


class SetAttention(nn.Module):
    r"""Self-attention with one head over a set, added to the set and layer-normalised.

    .. math:: x \leftarrow \mathrm{LayerNorm}\big(x + W_o\,\mathrm{softmax}(q k^\top / \sqrt d)\,v\big), \qquad
              q, k, v = W_q x, W_k x, W_v x

    Args:
        dim: Size d of the members.
        attention_dropout: Dropout rate of the attention weights.
        dropout: Dropout rate of the added term.
    """

    def __init__(self, dim: int, attention_dropout: float = 0.1, dropout: float = 0.5) -> None:
        super().__init__()
        self.attention_dropout, self.dropout = attention_dropout, dropout
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        for projection in (self.query, self.key, self.value):
            nn.init.normal_(projection.weight, std=dim**-0.5)
        nn.init.xavier_normal_(self.out.weight)

    def forward(self, members: Tensor) -> Tensor:
        """Adapt the members of sets ``(B, M, d)`` to each other. The result is equivariant to their order."""
        dropout = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(
            self.query(members), self.key(members), self.value(members), dropout_p=dropout
        )
        adapted: Tensor = self.norm(members + F.dropout(self.out(attended), self.dropout, self.training))
        return adapted


class Feat(MetaLearner):
    """Backbone and attention, trained by the nearness of queries to adapted prototypes.

    A second term has weight ``balance``: all images of a class, support and query, are adapted as a set, and each image
    must be near the centre of its own adapted class (Ye et al., Eq. 7).
    """

    def __init__(self, backbone: Backbone, temperature: float, temperature2: float, balance: float) -> None:
        super().__init__(backbone)
        self.temperature, self.temperature2, self.balance = temperature, temperature2, balance
        self.attention = SetAttention(backbone.embedding_dim)

    def scores(self, task: MetaTask) -> Tensor:
        """Return the scores ``(T, Q, N)`` of the query images."""
        support, query = self.embed(task)
        return adapted_scores(self.attention, support, task.labels, query, self.temperature)

    def loss(self, task: MetaTask) -> tuple[Tensor, Tensor]:
        """Return the loss and the scores ``(T, Q, N)`` of the query images."""
        support, query = self.embed(task)
        scores = adapted_scores(self.attention, support, task.labels, query, self.temperature)
        everything, labels = torch.cat([support, query], 1), torch.cat([task.labels, task.query_labels])
        centers = adapted_centers(self.attention, everything, labels)
        contrast = query_loss(nearness(everything, centers, self.temperature2), labels)
        return query_loss(scores, task.query_labels) + self.balance * contrast, scores


def adapted_scores(
    attention: SetAttention, support: Tensor, labels: Tensor, query: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return the nearness ``(T, Q, N)`` of query ``(T, Q, d)`` to the adapted prototypes of support ``(T, S, d)``."""
    return nearness(query, attention(prototypes(support, labels)), temperature)


def adapted_centers(attention: SetAttention, embedding: Tensor, labels: Tensor) -> Tensor:
    """Adapt the images of each class to each other and return the class means ``(T, N, d)``.

    Takes embeddings ``(T, M, d)`` and labels ``(M,)``, equally many per class.
    """
    order = labels.argsort(stable=True)
    classes = int(labels.max()) + 1
    sets = embedding[:, order].unflatten(1, (classes, -1))  # (T, N, M / N, d)
    adapted: Tensor = attention(sets.flatten(0, 1))
    centers: Tensor = adapted.mean(1).unflatten(0, sets.shape[:2])
    return centers


def meta_learner(
    backbone: Backbone, *, temperature: float = 64.0, temperature2: float = 16.0, balance: float = 1.0
) -> Feat:
    """Train embedding and attention together (Ye et al., CVPR 2020). The defaults are for ConvNet-4 and one shot."""
    return Feat(backbone, temperature, temperature2, balance)


def feat(bank: Bank, *, temperature: float = 64.0) -> Learner:
    """Nearest prototype after self-attention, in a model meta-trained for it (FEAT)."""
    weights = {name.removeprefix("attention."): value for name, value in bank.head.items()}
    attention = SetAttention(bank.model.embedding_dim)
    if {name: value.shape for name, value in weights.items()} != {
        name: value.shape for name, value in attention.state_dict().items()
    }:
        raise MethodError("feat needs a model that was trained with it; train one: refilled meta-train --method feat")
    attention.load_state_dict(weights)
    attention.eval()

    def classify(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
        with torch.no_grad():
            return adapted_scores(attention, support, labels, query, temperature)

    return on_embeddings(bank, classify)
