"""Data and networks that the examples share. Replace them by your own."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn


def images_of(digits: range, part: str = "train") -> tuple[Tensor, Tensor]:
    """Return images ``(N, 1, 8, 8)`` in [0, 1] of some digits, and their class ids from 0.

    Every fifth image is in the part ``"test"``.
    """
    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(source.target)
    in_test = torch.arange(len(labels)) % 5 == 0
    chosen = (labels >= digits.start) & (labels < digits.stop) & (in_test == (part == "test"))
    return images[chosen], labels[chosen] - digits.start


class Network(nn.Module):
    """A small convolutional network that returns its embedding and its logits."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, 4 * width, 3, padding=1)
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(N, 1, 8, 8)`` to the embedding ``(N, 4 * width)`` and the logits ``(N, classes)``."""
        maps = F.max_pool2d(self.first(images).relu(), 2)
        embedding = self.second(maps).relu().amax((2, 3))
        return embedding, self.classifier(embedding)


def train_teacher(epochs: int = 20) -> Network:
    """Train a teacher on the digits 0 to 4, and freeze it."""
    torch.manual_seed(0)
    images, labels = images_of(range(5))
    teacher = Network(32, 5)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            _, logits = teacher(images[batch])
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()
    return teacher.eval().requires_grad_(False)


@torch.no_grad()
def accuracy_of(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the percentage of images that the network classifies correctly."""
    _, logits = network.eval()(images)
    return 100 * (logits.argmax(1) == labels).float().mean().item()
