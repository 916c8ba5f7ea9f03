"""Each query takes the class of its nearest support image."""

from torch import Tensor

from refilled.fewshot.bank import Bank, Learner, normalized, on_embeddings


def similarity_to_nearest(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """Return the cosine with the most similar support image of each class.

    Args:
        support: ``(T, S, d)``.
        labels: ``(S,)``, 0 .. N - 1.
        query: ``(T, Q, d)``.

    Returns:
        ``(T, Q, N)``.
    """
    cosines = normalized(query) @ normalized(support).mT  # (T, Q, S)
    classes = int(labels.max()) + 1
    nearest = cosines.new_full((*cosines.shape[:2], classes), -2.0)  # below every cosine
    return nearest.scatter_reduce(2, labels.expand_as(cosines), cosines, "amax")


def nearest_neighbour(bank: Bank) -> Learner:
    """Class of the nearest support image in the model's embedding (1NN)."""
    return on_embeddings(bank, similarity_to_nearest)
