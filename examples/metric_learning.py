"""pytorch-metric-learning's sampler and miner with this package's alignment.

``TripletAlignmentLoss`` mines its own triplets, as the paper does. To use other triplets, take them from any miner and
give the margins of student and teacher to the function ``triplet_alignment``.
"""

import torch
import torch.nn.functional as F
from digits import Network, images_of, train_teacher
from pytorch_metric_learning.miners import TripletMarginMiner
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor

from refilled.losses.triplet_alignment import triplet_alignment


def margins(embedding: Tensor, triplets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return how much farther each negative is than its positive, for unit embeddings: ``(T,)``."""
    anchor, positive, negative = (F.normalize(embedding)[indices] for indices in triplets)
    return (anchor - negative).norm(dim=1) - (anchor - positive).norm(dim=1)


def class_mean_accuracy(student: Network) -> float:
    """Return the percentage of test images whose nearest class mean is that of their class."""
    with torch.no_grad():
        train, test = (student(images_of(range(5, 10), part)[0])[0] for part in ("train", "test"))
    labels, test_labels = images_of(range(5, 10))[1], images_of(range(5, 10), "test")[1]
    means = torch.stack([F.normalize(train)[labels == label].mean(0) for label in range(5)])
    return 100 * (torch.cdist(F.normalize(test), means).argmin(1) == test_labels).float().mean().item()


def main(epochs: int = 10, teacher_epochs: int = 10, temperature: float = 2.0) -> float:
    """Align the student's embedding and return the accuracy of its nearest class means in percent."""
    teacher = train_teacher(teacher_epochs)
    images, labels = images_of(range(5, 10))
    torch.manual_seed(0)
    student = Network(8, 5)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    miner = TripletMarginMiner(margin=0.2, type_of_triplets="semihard")
    sampler = MPerClassSampler(labels, m=8, batch_size=40, length_before_new_iter=len(labels))
    for _ in range(epochs):
        for batch in torch.tensor(list(sampler)).split(40):
            with torch.no_grad():
                teacher_embedding, _ = teacher(images[batch])
            embedding, _ = student(images[batch])
            triplets = miner(embedding, labels[batch])
            if len(triplets[0]) == 0:
                continue
            of_teacher = margins(teacher_embedding, triplets) / temperature
            loss = triplet_alignment(margins(embedding, triplets), of_teacher).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    accuracy = class_mean_accuracy(student)
    print(f"nearest class means of the student: {accuracy:.1f} % of the test images")
    return accuracy


if __name__ == "__main__":
    main()
