"""Measures of a model on labelled images: plain tensors in, a float out."""

import torch
from torch import Tensor

from refilled.data import Pixels
from refilled.distances import class_centers, pairwise_distances
from refilled.distributed import ALONE, World
from refilled.models import Backbone
from refilled.outputs import Outputs

SCORING_BATCH = 256  # images at a time


@torch.no_grad()
def predict(
    model: Backbone,
    pixels: Pixels,
    device: torch.device | str = "cpu",
    batch_size: int = SCORING_BATCH,
    world: World = ALONE,
) -> Outputs:
    """Run a model in evaluation mode over all images ``(N, 3, H, W)``, not augmented; the outputs come on the CPU.

    The model's mode is put back afterwards. Of several processes each runs it on a part, and gets all outputs.
    """
    training = model.training
    model.eval()
    try:
        outputs = [model(batch.to(device)) for batch in pixels[world.part(len(pixels))].split(batch_size)]
    finally:
        model.train(training)
    logits = [output.logits.float().cpu() for output in outputs] or [torch.empty(0, model.num_classes)]
    embedding = [output.embedding.float().cpu() for output in outputs] or [torch.empty(0, model.embedding_dim)]
    return world.gather_outputs(Outputs(torch.cat(logits), torch.cat(embedding)), len(pixels))


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share, in percent, of the images whose highest logit ``(N, C)`` is their class ``(N,)``."""
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def class_accuracies(logits: Tensor, labels: Tensor, num_classes: int) -> list[float]:
    """Accuracy in percent within each class; NaN for a class without images."""
    right = (logits.argmax(1) == labels).double()
    sums = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, labels, right)
    return (100 * sums / torch.bincount(labels, minlength=num_classes)).tolist()


def nearest_center_accuracy(
    train_embedding: Tensor, train_labels: Tensor, test_embedding: Tensor, test_labels: Tensor
) -> float:
    """Accuracy in percent of the nearest-class-mean classifier on L2-normalised embeddings.

    The centres are the class means of the *training* images ``(N, d)``, never of the images that are scored.
    """
    normalize = torch.nn.functional.normalize
    centers, classes = class_centers(normalize(train_embedding), train_labels)
    nearest = pairwise_distances(normalize(test_embedding), centers).argmin(1)
    return 100 * (classes[nearest] == test_labels).double().mean().item()


def nmi(embedding: Tensor, labels: Tensor, seed: int = 0) -> float:
    """Normalised mutual information, in percent, of classes and k-means clusters, as many as there are classes.

    The embedding ``(N, d)`` is L2-normalised first. The information is normalised by the mean of the two entropies.

    References: Strehl and Ghosh, Cluster Ensembles, JMLR 2002.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    rows = torch.nn.functional.normalize(embedding).numpy()
    clusters = KMeans(len(labels.unique()), n_init=10, random_state=seed).fit_predict(rows)
    return 100 * float(normalized_mutual_info_score(labels.numpy(), clusters))
