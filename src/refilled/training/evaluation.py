"""Measures of a model on labelled images: plain tensors in, a float out."""

from collections.abc import Container, Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from refilled.data import Pixels, Split
from refilled.losses.distances import class_centers, pairwise_distances
from refilled.models import Backbone
from refilled.outputs import Outputs, not_computed
from refilled.training.distributed import ALONE, World

SCORING_BATCH = 256  # images at a time


@torch.no_grad()
def outputs_by_batch(
    model: Backbone,
    pixels: Pixels,
    device: torch.device | str | None = None,
    batch_size: int = SCORING_BATCH,
    world: World = ALONE,
    parts: Container[str] = ("logits", "embedding"),
) -> Iterator[Outputs]:
    """Run a model in evaluation mode over images ``(N, 3, H, W)``, not augmented, and give its outputs batch by batch.

    It computes on ``device``, or where the model is. They come on the CPU, in float32; what is not among the ``parts``
    is ``(B, 0)``. Of no images there is one batch. Several processes run it on ``batch_size`` images each, and all get
    the outputs of all. The model's mode is put back afterwards.
    """
    training = model.training
    device = model.mean.device if device is None else device
    model.eval()
    try:
        for start in range(0, max(len(pixels), 1), batch_size * world.size):
            block = pixels[start : start + batch_size * world.size]
            (images,) = block[world.part(len(block))].split(batch_size)
            outputs = model(images.to(device)) if len(images) else _of_nothing(model)
            logits, embedding = (
                rows.float().cpu() if part in parts else not_computed(len(rows))
                for part, rows in (("logits", outputs.logits), ("embedding", outputs.embedding))
            )
            yield world.gather_outputs(Outputs(logits, embedding), len(block), parts)
    finally:
        model.train(training)


def _of_nothing(model: Backbone) -> Outputs:
    return Outputs(torch.empty(0, model.num_classes), torch.empty(0, model.embedding_dim))


def predict(
    model: Backbone,
    pixels: Pixels,
    device: torch.device | str | None = None,
    world: World = ALONE,
    parts: Container[str] = ("logits", "embedding"),
) -> Outputs:
    """Run a model in evaluation mode over all images ``(N, 3, H, W)``, not augmented; the outputs come on the CPU.

    What is not among the ``parts`` is ``(N, 0)``. Of several processes each runs it on a part, and gets all outputs.
    """
    logits, embedding, _ = zip(*outputs_by_batch(model, pixels, device, world=world, parts=parts), strict=True)
    return Outputs(torch.cat(logits), torch.cat(embedding))


def embed(model: Backbone, pixels: Pixels, device: torch.device | str | None = None, world: World = ALONE) -> Tensor:
    """Embed all images ``(N, 3, H, W)`` as :func:`predict` does, to ``(N, d)``."""
    return predict(model, pixels, device, world, parts=("embedding",)).embedding


def predict_classes(
    model: Backbone, pixels: Pixels, device: torch.device | str | None = None, world: World = ALONE
) -> Tensor:
    """Classify all images ``(N, 3, H, W)`` by their highest logit, to ``(N,)``; never are all logits held."""
    batches = outputs_by_batch(model, pixels, device, world=world, parts=("logits",))
    return torch.cat([outputs.logits.argmax(1) for outputs in batches])


def predict_classes_twice(
    model: Backbone, train: Split, pixels: Pixels, device: torch.device | str | None = None, world: World = ALONE
) -> tuple[Tensor, Tensor]:
    """Classify all images by their highest logit, and by the nearest class mean of the training images.

    The embeddings are L2-normalised. Neither they nor the logits are held for more than a batch.

    Returns:
        Class ids ``(N,)``, twice.
    """
    classes, places, counts = train.labels.unique(return_inverse=True, return_counts=True)
    centers = torch.zeros(len(classes), model.embedding_dim)
    seen = outputs_by_batch(model, train.pixels, device, world=world, parts=("embedding",))
    for outputs, here in zip(seen, places.split(SCORING_BATCH * world.size), strict=True):
        centers.index_add_(0, here, normalize(outputs.embedding))
    centers /= counts[:, None]
    highest, nearest = [], []
    for outputs in outputs_by_batch(model, pixels, device, world=world):
        highest.append(outputs.logits.argmax(1))
        nearest.append(classes[pairwise_distances(normalize(outputs.embedding), centers).argmin(1)])
    return torch.cat(highest), torch.cat(nearest)


def accuracy(found: Tensor, labels: Tensor) -> float:
    """Share, in percent, of the images whose class was found: ids ``(N,)``, twice."""
    return 100 * (found == labels).double().mean().item()


def class_accuracies(found: Tensor, labels: Tensor, num_classes: int) -> list[float]:
    """Accuracy in percent within each class; NaN for a class without images."""
    right = (found == labels).double()
    sums = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, labels, right)
    return (100 * sums / torch.bincount(labels, minlength=num_classes)).tolist()


def nearest_center_accuracy(
    train_embedding: Tensor, train_labels: Tensor, test_embedding: Tensor, test_labels: Tensor
) -> float:
    """Accuracy in percent of the nearest-class-mean classifier on L2-normalised embeddings.

    The centres are the class means of the *training* images ``(N, d)``, never of the images that are scored.
    """
    centers, classes = class_centers(normalize(train_embedding), train_labels)
    nearest = pairwise_distances(normalize(test_embedding), centers).argmin(1)
    return accuracy(classes[nearest], test_labels)


def nmi(embedding: Tensor, labels: Tensor, seed: int = 0) -> float:
    """Normalised mutual information, in percent, of classes and k-means clusters, as many as there are classes.

    The embedding ``(N, d)`` is L2-normalised first. The information is normalised by the mean of the two entropies.

    References: Strehl and Ghosh, Cluster Ensembles, JMLR 2002.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    rows = normalize(embedding).numpy()
    clusters = KMeans(len(labels.unique()), n_init=10, random_state=seed).fit_predict(rows)
    return 100 * float(normalized_mutual_info_score(labels.numpy(), clusters))
