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
_PART_PIXELS = 2**20  # of a part: 20 images of 224 pixels (benchmarks/embedding.py)
_LEAST_PART = 4  # images


@torch.no_grad()
def outputs_by_batch(
    model: Backbone,
    pixels: Pixels,
    device: torch.device | str | None = None,
    batch_size: int = SCORING_BATCH,
    world: World = ALONE,
    parts: Container[str] = ("logits", "embedding"),
) -> Iterator[Outputs]:
    """Yield the outputs of a model in evaluation mode for images ``(N, 3, H, W)``, not augmented, batch by batch.

    The model's mode is restored afterwards.

    Args:
        model: The model.
        pixels: The images. Without images there is one empty batch.
        device: The device to compute on. None: the model's.
        batch_size: Images per batch and process.
        world: The processes that share each batch. Each of them gets the outputs for the whole batch.
        parts: The outputs to return, in float32 on the CPU. The others are
            :func:`~refilled.outputs.not_computed`.
    """
    training = model.training
    device = model.mean.device if device is None else device
    model.eval()
    try:
        for start in range(0, max(len(pixels), 1), batch_size * world.size):
            block = pixels[start : start + batch_size * world.size]
            (images,) = block[world.part(len(block))].split(batch_size)
            outputs = forward_in_parts(model, images.to(device)) if len(images) else _of_nothing(model)
            logits, embedding = (
                rows.float().cpu() if part in parts else not_computed(len(rows))
                for part, rows in (("logits", outputs.logits), ("embedding", outputs.embedding))
            )
            yield world.gather_outputs(Outputs(logits, embedding), len(block), parts)
    finally:
        model.train(training)


def forward_in_parts(model: Backbone, images: Tensor) -> Outputs:
    """Return logits and embedding of images ``(N, 3, H, W)``, on a CPU in parts whose activations fit its caches."""
    side = model.input_size or images.shape[-1]
    parts = images.split(max(_LEAST_PART, _PART_PIXELS // side**2)) if images.device.type == "cpu" else (images,)
    if len(parts) == 1:
        outputs: Outputs = model(images)
        return outputs
    logits, embedding, _ = zip(*map(model, parts), strict=True)
    return Outputs(torch.cat(logits), torch.cat(embedding))


def _of_nothing(model: Backbone) -> Outputs:
    return Outputs(torch.empty(0, model.num_classes), torch.empty(0, model.embedding_dim))


def predict(
    model: Backbone,
    pixels: Pixels,
    device: torch.device | str | None = None,
    world: World = ALONE,
    parts: Container[str] = ("logits", "embedding"),
) -> Outputs:
    """Return the outputs of a model for all images ``(N, 3, H, W)``; see :func:`outputs_by_batch`."""
    logits, embedding, _ = zip(*outputs_by_batch(model, pixels, device, world=world, parts=parts), strict=True)
    return Outputs(torch.cat(logits), torch.cat(embedding))


def embed(model: Backbone, pixels: Pixels, device: torch.device | str | None = None, world: World = ALONE) -> Tensor:
    """Return the embeddings ``(N, d)`` of images ``(N, 3, H, W)``; see :func:`outputs_by_batch`."""
    return predict(model, pixels, device, world, parts=("embedding",)).embedding


def predict_classes(
    model: Backbone, pixels: Pixels, device: torch.device | str | None = None, world: World = ALONE
) -> Tensor:
    """Return the class ids ``(N,)`` of the highest logits of images ``(N, 3, H, W)``.

    Only the logits of one batch are in memory at a time.
    """
    batches = outputs_by_batch(model, pixels, device, world=world, parts=("logits",))
    return torch.cat([outputs.logits.argmax(1) for outputs in batches])


def predict_classes_twice(
    model: Backbone, train: Split, pixels: Pixels, device: torch.device | str | None = None, world: World = ALONE
) -> tuple[Tensor, Tensor]:
    """Classify images by their highest logit, and by the nearest class mean of the training images.

    The embeddings are L2-normalised. Only the outputs of one batch are in memory at a time.

    Returns:
        Class ids ``(N,)`` of the highest logits, and class ids ``(N,)`` of the nearest class means.
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


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the accuracy in percent of predicted class ids ``(N,)``, given the true ones ``(N,)``."""
    return 100 * (predicted == labels).double().mean().item()


def class_accuracies(predicted: Tensor, labels: Tensor, num_classes: int) -> list[float]:
    """Return the accuracy in percent within each class; NaN for a class without images."""
    right = (predicted == labels).double()
    sums = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, labels, right)
    return (100 * sums / torch.bincount(labels, minlength=num_classes)).tolist()


def nearest_center_accuracy(
    train_embedding: Tensor, train_labels: Tensor, test_embedding: Tensor, test_labels: Tensor
) -> float:
    """Return the accuracy in percent of the nearest-class-mean classifier on L2-normalised embeddings.

    The class means are those of the *training* images, never of the scored images.

    Args:
        train_embedding: ``(N, d)``.
        train_labels: Class ids ``(N,)``.
        test_embedding: ``(M, d)``.
        test_labels: Class ids ``(M,)``.
    """
    centers, classes = class_centers(normalize(train_embedding), train_labels)
    nearest = pairwise_distances(normalize(test_embedding), centers).argmin(1)
    return accuracy(classes[nearest], test_labels)


def nmi(embedding: Tensor, labels: Tensor, seed: int = 0) -> float:
    """Return the normalised mutual information, in percent, of classes and k-means clusters.

    There is one cluster per class. The mutual information is divided by the mean of the two entropies.

    Args:
        embedding: ``(N, d)``; L2-normalised first.
        labels: Class ids ``(N,)``.
        seed: Seed of k-means.

    References:
        Strehl and Ghosh, Cluster Ensembles, JMLR 2002.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    rows = normalize(embedding).numpy()
    clusters = KMeans(len(labels.unique()), n_init=10, random_state=seed).fit_predict(rows)
    return 100 * float(normalized_mutual_info_score(labels.numpy(), clusters))
