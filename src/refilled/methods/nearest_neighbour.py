"""Nearest neighbour: each image takes the class of its nearest training image in the teacher's embedding.

References:
    Cover and Hart, Nearest Neighbor Pattern Classification, IEEE Transactions on Information Theory, 1967.
"""

import torch
from torch import Tensor

from refilled.losses.distances import pairwise_distances, unit_rows
from refilled.outputs import ModelShape
from refilled.stages import Readout

_ROWS = 1024  # rows of the distance matrix that are computed at once


def nearest(train_embedding: Tensor, train_labels: Tensor, embedding: Tensor) -> Tensor:
    """Return the class ids ``(M,)`` of the nearest training image of each of M images, in L2-normalised embeddings.

    Args:
        train_embedding: ``(N, d)``.
        train_labels: Class ids ``(N,)``.
        embedding: ``(M, d)``.
    """
    known = unit_rows(train_embedding)
    neighbours = [pairwise_distances(rows, known).argmin(1) for rows in unit_rows(embedding).split(_ROWS)]
    return train_labels[torch.cat(neighbours)]


def nearest_neighbour(student: None, teacher: ModelShape) -> Readout:
    """Give each image the class of its nearest training image in the teacher's embedding; trains no student."""
    return Readout(nearest)
