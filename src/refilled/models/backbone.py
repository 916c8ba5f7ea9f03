"""The contract of every model, teacher or student."""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refilled.outputs import Outputs

M = TypeVar("M", bound=nn.Module)


class Backbone(nn.Module):
    """An image classifier: an embedding and a linear classifier on it.

    A family writes :meth:`embed`; everything else is here. Images come as RGB ``(N, 3, H, W)``, either uint8 or
    float in [0, 1], at whatever size the data has: a model resizes and normalises for itself, so that a teacher
    and a student with different needs see the very same view.

    Args:
        embedding_dim: Size d of the embedding.
        feature_channels: Channels of the feature maps that :meth:`embed` gives, shallow to deep.
        num_classes: Number C of classes.
        mean: Mean of each channel that the model expects, on the scale [0, 1].
        std: Standard deviation likewise.
        input_size: Side length in pixels that images are resized to, or None for as they come.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        embedding_dim: int,
        feature_channels: Sequence[int],
        num_classes: int,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        input_size: int | None = None,
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.feature_channels = tuple(feature_channels)
        self.num_classes = num_classes
        self.input_size = input_size
        self.class_names: tuple[str, ...] | None = None  # what the classes are called, where that is known
        # Not persistent: they belong to the description of the model (model.json), not to its weights.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.classifier: nn.Module = nn.Linear(embedding_dim, num_classes)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map normalised images to their embedding ``(N, d)`` and feature maps, shallow to deep."""
        raise NotImplementedError

    def normalize(self, images: Tensor) -> Tensor:
        """Bring images, uint8 or float in [0, 1], to the size, mean and std that the model expects."""
        size = self.input_size
        if size is not None and images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        if images.dtype == torch.uint8:
            return (images - 255 * self.mean) / (255 * self.std)
        return (images - self.mean) / self.std

    def forward(self, images: Tensor, features: bool = False) -> Outputs:
        """Return the outputs; the feature maps only when asked for, since holding on to them costs memory."""
        embedding, maps = self.embed(self.normalize(images))
        return Outputs(self.classifier(embedding), embedding, maps if features else ())

    def reset_classifier(self, generator: torch.Generator) -> None:
        """Draw the classifier anew, from the distribution that :class:`torch.nn.Linear` starts with."""
        with torch.no_grad():
            for parameter in self.classifier.parameters():
                bound = self.embedding_dim**-0.5
                drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
                parameter.copy_(bound * drawn)


def freeze(model: M) -> M:
    """Make a teacher of a model: evaluation mode, no gradients. Returns the same model."""
    return model.eval().requires_grad_(False)
